"""Random walks over a cache with prefixes, in paged placement, beside an oracle that knows every token of every block.

Prompts are made of two tokens and blocks are small, so that nearly every one has been seen, in part, before. A second
cache, whose hash has two bits, goes along.
"""

import random

import pytest
from conftest import DEPTH
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model import GRANTED
from prefix_oracle import Tied
from prefix_pair import PrefixPair

from kvcache import KVCacheSpec

NAMES = list(range(8))
INDEX = st.integers(0, len(NAMES) - 1)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
PROMPT = TOKENS | st.tuples(st.integers(1, 12), TOKENS).map(lambda drawn: [0] * drawn[0] + drawn[1][:2])
SALT = st.sampled_from([None, None, None, None, 1, True, 1.0])
GROWTH = st.none() | st.integers(0, 12)


def until_tied(step):
    """A walk ends where the order of evictions says nothing about which of two blocks leaves."""

    def careful(walk, *arguments, **named):
        if walk.ended:
            return
        try:
            step(walk, *arguments, **named)
        except Tied:
            walk.ended = True

    careful.__name__ = step.__name__
    return careful


class PrefixMachine(RuleBasedStateMachine):
    ended = False

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([1, 2, 4]),
        num_layers=st.integers(1, 3),
        overcommit=st.sampled_from([1.0, 1.0, 1.5]),
    )
    def begin(self, num_blocks, block_size, num_layers, overcommit):
        spec = KVCacheSpec(num_layers, 1, 2, num_blocks * block_size, block_size)
        self.pair = PrefixPair(spec, overcommit)
        self.model = self.pair.model

    def live(self):
        return list(self.model.sequences)

    def pick(self, index):
        return self.live()[index % len(self.live())]

    def something_lives(self):
        return bool(self.model.sequences) and not self.ended

    def vacant(self, index):
        names = [name for name in NAMES if name not in self.model.sequences]
        return names[index % len(names)] if names else None

    # ---- sequences

    @rule(index=INDEX, prompt=PROMPT, salt=SALT, growth=GROWTH, written=st.integers(0, 12) | st.just(99))
    def allocate(self, index, prompt, salt, growth, written):
        self.admit(index, prompt, salt, growth, written)

    @rule(index=INDEX, tokens=st.integers(1, 9), salt=SALT, growth=GROWTH)
    def allocate_counted(self, index, tokens, salt, growth):
        self.admit(index, tokens, salt, growth, 99)

    @until_tied
    def admit(self, index, prompt, salt, growth, written):
        name = self.vacant(index)
        if name is None:
            return
        limits = {} if growth is None else {"max_new_tokens": growth}
        if self.pair.allocate(name, prompt, salt, **limits) is GRANTED:
            self.fill(name, self.model.sequences[name].committed, written)

    def fill(self, name, start, most):
        """Writes every layer from `start` on; the last layer only so many tokens."""
        count = self.model.sequences[name].tokens - start
        for layer in range(self.model.num_layers):
            of_these = min(count, most) if layer == self.model.num_layers - 1 else count
            if of_these:
                self.pair.write(name, layer, start, of_these)

    @precondition(something_lives)
    @rule(index=INDEX)
    @until_tied
    def free(self, index):
        self.pair.free(self.pick(index))

    @precondition(something_lives)
    @rule(index=INDEX, name=INDEX)
    @until_tied
    def fork(self, index, name):
        if self.vacant(name) is not None:
            self.pair.fork(self.pick(index), self.vacant(name))

    @precondition(something_lives)
    @rule(index=INDEX, tokens=TOKENS, named=st.booleans(), write=st.booleans())
    @until_tied
    def append(self, index, tokens, named, write):
        name, before = self.pick(index), self.model.sequences[self.pick(index)].tokens
        tokens = tokens[:5]
        verdict = self.pair.append_ids(name, tokens) if named else self.pair.append(name, len(tokens))
        if verdict is GRANTED and write:
            self.fill(name, before, 99)

    @precondition(something_lives)
    @rule(index=INDEX, tokens=TOKENS, start=st.none() | st.integers(0, 12))
    @until_tied
    def set_tokens(self, index, tokens, start):
        self.pair.set_tokens(self.pick(index), tokens, start)

    @precondition(something_lives)
    @rule(index=INDEX, tokens=st.integers(0, 20))
    @until_tied
    def truncate(self, index, tokens):
        name = self.pick(index)
        self.pair.truncate(name, tokens % (self.model.sequences[name].tokens + 1))

    @precondition(something_lives)
    @rule(index=INDEX, growth=st.integers(0, 12))
    @until_tied
    def set_limit(self, index, growth):
        name = self.pick(index)
        self.pair.set_limit(name, self.model.sequences[name].tokens + growth or 1)

    # ---- contents

    @precondition(something_lives)
    @rule(index=INDEX, layer=st.integers(0, 2), start=st.integers(0, 20), count=st.integers(1, 9))
    @until_tied
    def write(self, index, layer, start, count):
        name = self.pick(index)
        tokens = self.model.sequences[name].tokens
        if tokens:
            start %= tokens
            self.pair.write(name, layer % self.model.num_layers, start, min(count, tokens - start))

    @precondition(something_lives)
    @rule(index=INDEX, tokens=st.none() | st.integers(0, 20))
    @until_tied
    def commit(self, index, tokens):
        name = self.pick(index)
        if tokens is not None:
            tokens %= self.model.sequences[name].tokens + 1
        self.pair.commit(name, tokens)

    @precondition(something_lives)
    @rule(
        members=st.lists(INDEX, min_size=1, max_size=4),
        tokens=st.lists(st.integers(0, 1), min_size=4, max_size=4),
        named=st.sampled_from(["at once", "later", "never"]),
        drop=st.booleans(),
    )
    @until_tied
    def step(self, members, tokens, named, drop):
        members = list(dict.fromkeys(self.pick(index) for index in members))
        self.pair.step(members, tokens[: len(members)], named, drop)

    @precondition(lambda self: not self.ended)
    @rule(prompt=PROMPT, salt=SALT)
    def probe(self, prompt, salt):
        self.pair.probe(prompt, salt)

    # ---- after every rule

    @invariant()
    def everything_compares(self):
        if hasattr(self, "pair") and not self.ended:
            self.pair.compare()
            self.pair.compare_cached(self.pair.cache.stats())

    def teardown(self):
        if not hasattr(self, "pair"):
            return
        if not self.ended:
            for name in self.live():
                self.pair.free(name)
            self.pair.compare()
            assert self.pair.cache.total_allocated == 0
        self.pair.cache.close()
        self.pair.twin.close()


def crowded_step(walk, chance):
    def tokens(most):
        return [chance.choice([0, 0, 1]) for _ in range(chance.randint(1, most))]

    index, few, salt = chance.randrange(8), chance.randint(1, 4), chance.choice([None] * 6 + [1, True])
    growth, written, named = chance.choice([None, 0, 6]), chance.choice([99, 99, 3]), chance.random() < 0.8
    actions = {lambda: walk.admit(index, tokens(24), salt, growth, written): 8}
    if walk.live():
        actions |= {
            lambda: walk.free(index): 7,
            lambda: walk.fork(index, index): 2,
            lambda: walk.append(index, tokens(4), named, True): 6,
            lambda: walk.set_tokens(index, tokens(3), None): 1,
            lambda: walk.truncate(index, chance.randint(0, 20)): 1,
            lambda: walk.write(index, chance.randint(0, 1), chance.randint(0, 20), few): 1,
            lambda: walk.commit(index, None): 1,
            lambda: walk.step([index, index + 1], tokens(1) * 2, "at once" if named else "later", False): 4,
        }
    chance.choices(list(actions), actions.values())[0]()
    walk.everything_compares()


def crowded_walk(walk, seed, steps=400):
    """Long, by a seed, through a pool in which everything that is kept is evicted in the end."""
    chance = random.Random(seed)
    size = chance.randint(4, 24), chance.choice([1, 2, 4])
    walk.begin(*size, chance.randint(1, 2), chance.choice([1.0, 1.5]))
    for _ in range(steps):
        if not walk.ended:
            crowded_step(walk, chance)
    evicted, hits = walk.model.evicted, walk.model.hit_tokens
    walk.teardown()
    return evicted, hits


def test_no_walk_leaves_the_oracle_of_prefixes():
    run_state_machine_as_test(PrefixMachine)


@pytest.mark.parametrize("seed", range(int(12 * DEPTH)))
def test_no_long_walk_leaves_the_oracle_of_prefixes(seed):
    evicted, hits = crowded_walk(PrefixMachine(), seed)
    assert evicted and hits

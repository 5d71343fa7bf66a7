"""Walks over a cache, every step compared with the oracle: answers, counters, places and contents.

`CacheMachine` is driven by Hypothesis, which finds short walks and shrinks them. `crowded_walk` drives the
same rules by a seed: long walks through pools that have been nearly full for hundreds of calls.
"""

import importlib.util
import random

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from model import GRANTED
from pair import Pair
from pair_batch import BatchPair

from kvcache import KVCacheSpec, LayerSpec, PlaneSpec

NAMES = ["a", "b", "c", "d", "e", "f", ("a", 1), 7, frozenset({3}), None]
FLOATS = ("float32", "float16") + (("bfloat16",) if importlib.util.find_spec("ml_dtypes") else ())
OVERCOMMITS = [1.0, 1.0, 1.5, float("inf")]
INDEX = st.integers(0, len(NAMES) - 1)
PROMPT = st.integers(1, 8) | st.integers(1, 70)
GROWTH = st.integers(0, 8) | st.none() | st.integers(0, 30)
CROWD = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 8) | st.none()), max_size=len(NAMES)
)  # prompts and growth of several newcomers


def uneven_layers(dtype):
    """Grouped heads; V narrower than K; one plane alone; quantised planes that belong together."""
    return (
        LayerSpec((PlaneSpec("k", 2, 8, dtype), PlaneSpec("v", 2, 6, dtype))),
        LayerSpec((PlaneSpec("latent", 1, 7, dtype),)),
        LayerSpec(
            (
                PlaneSpec("k", 3, 2, "uint32"),
                PlaneSpec("k_scales", 3, 1, dtype),
                PlaneSpec("v", 1, 5, "uint8"),
            )
        ),
    )


class CacheMachine(RuleBasedStateMachine):
    placement = "contiguous"
    backend = "numpy"
    dtypes = ("float32",)
    pair_type = Pair
    bounds = (None,)  # to draw `max_move_tokens` from

    @initialize(
        num_blocks=st.integers(4, 14) | st.integers(1, 3),
        block_size=st.integers(1, 5),
        overcommit=st.sampled_from(OVERCOMMITS),
        data=st.data(),
        crowd=CROWD,
    )
    def make(self, num_blocks, block_size, overcommit, data, crowd):
        dtype = data.draw(st.sampled_from(self.dtypes), label="dtype")
        bound = data.draw(st.sampled_from(self.bounds), label="bound")
        self.begin(num_blocks, block_size, overcommit, dtype, bound)
        self.crowd(crowd)

    def begin(self, num_blocks, block_size, overcommit, dtype, bound=None):
        layers = uneven_layers(dtype)
        spec = KVCacheSpec.from_layers(layers, num_blocks * block_size, block_size)
        self.pair = self.pair_type(spec, self.placement, self.backend, overcommit, bound)
        self.model = self.pair.model
        self.holds = []
        self.batch = None

    # ---- choices

    def live(self):
        return list(self.model.sequences)

    def pick(self, index):
        live = self.live()
        return live[index % len(live)]

    def vacant_name(self, index):
        names = [name for name in NAMES if name not in self.model.sequences]
        return names[index % len(names)] if names else None

    def stored(self):
        return self.backend != "none"

    def something_lives(self):
        return bool(self.model.sequences)

    # ---- admission

    @rule(index=INDEX, prompt=PROMPT, growth=GROWTH, total=st.booleans())
    def allocate(self, index, prompt, growth, total):
        if len(self.model.sequences) == len(NAMES):
            return
        name = self.vacant_name(index)
        limits = {}
        if growth is not None:
            limits = {"max_tokens": prompt + growth} if total else {"max_new_tokens": growth}
        verdict = self.pair.allocate(name, prompt, **limits)
        if verdict is GRANTED and self.stored():
            self.pair.write_all(name)

    @rule(index=INDEX, more=st.integers(-3, 1), growth=st.none() | st.integers(0, 3))
    def allocate_at_the_border(self, index, more, growth):
        """All free blocks at once, a token more or a few less: granted wherever the free blocks are."""
        prompt = (self.model.free_blocks - self.model.claimed_blocks) * self.model.block_size + more
        if prompt > 0:
            self.allocate(index, prompt, growth, False)

    @rule(crowd=CROWD)
    def crowd(self, crowd):
        for prompt, growth in crowd:
            self.allocate(0, prompt, growth, True)
            self.pair.compare()

    @rule(keep=st.integers(0, 2), every=st.integers(2, 3))
    def thin_out(self, keep, every):
        """Frees all but every second or third sequence in the order of their places: a comb."""
        by_place = sorted(self.live(), key=lambda name: [b.place for b in self.model.sequences[name].blocks])
        for number, name in enumerate(by_place):
            if number % every != keep:
                self.pair.free(name)

    @rule(index=INDEX, start=st.integers(0, 1000), form=st.sampled_from([list, tuple, np.array]))
    def allocate_named_tokens(self, index, start, form):
        name = self.vacant_name(index)
        if len(self.model.sequences) < len(NAMES):
            self.pair.allocate(name, 3, tokens=form(range(start, start + 3)))

    @precondition(something_lives)
    @rule(index=INDEX, name=INDEX)
    def fork(self, index, name):
        if len(self.model.sequences) < len(NAMES):
            self.pair.fork(self.pick(index), self.vacant_name(name))

    @precondition(something_lives)
    @rule(index=INDEX)
    def free(self, index):
        self.pair.free(self.pick(index))

    @rule(index=INDEX)
    def free_of_an_unknown_id_is_a_no_op(self, index):
        if len(self.model.sequences) < len(NAMES):
            assert self.pair.cache.free_for(self.vacant_name(index)) is False

    # ---- growing and shrinking

    @precondition(something_lives)
    @rule(index=INDEX, count=st.integers(0, 9), write=st.booleans())
    def append(self, index, count, write):
        request_id = self.pick(index)
        before = self.model.sequences[request_id].tokens
        if self.pair.append(request_id, count) is GRANTED and write and count and self.stored():
            self.pair.write_all(request_id, before)

    @precondition(something_lives)
    @rule(index=INDEX)
    def append_one(self, index):
        self.pair.append_one(self.pick(index))

    @precondition(something_lives)
    @rule(index=INDEX, tokens=st.integers(0, 24))
    def truncate(self, index, tokens):
        request_id = self.pick(index)
        self.pair.truncate(request_id, tokens % (self.model.sequences[request_id].tokens + 1))

    @precondition(something_lives)
    @rule(index=INDEX, growth=st.integers(0, 12))
    def set_limit(self, index, growth):
        request_id = self.pick(index)
        self.pair.set_limit(request_id, self.model.sequences[request_id].tokens + growth or 1)

    @rule(budget=st.none() | st.integers(0, 40))
    def compact(self, budget):
        self.pair.compact(budget)

    @precondition(something_lives)
    @rule(rounds=st.integers(1, 6), count=st.integers(1, 2))
    def grow_all(self, rounds, count):
        for _ in range(rounds):
            for name in self.live():
                self.append(self.live().index(name), count, True)
                self.pair.compare()

    # ---- contents

    @precondition(something_lives)
    @rule(
        index=INDEX,
        layer=st.integers(0, 2),
        start=st.integers(0, 24),
        count=st.integers(1, 9),
        name=st.booleans(),
    )
    def write(self, index, layer, start, count, name):
        request_id = self.pick(index)
        tokens = self.model.sequences[request_id].tokens
        if tokens and self.stored():
            start %= tokens
            count = min(count, tokens - start)
            self.pair.write(request_id, layer, start, count, name or start + count != tokens)

    @precondition(something_lives)
    @rule(index=INDEX, tokens=st.none() | st.integers(0, 24))
    def commit(self, index, tokens):
        request_id = self.pick(index)
        self.pair.commit(
            request_id, tokens if tokens is None else tokens % (self.model.sequences[request_id].tokens + 1)
        )

    @precondition(something_lives)
    @rule(index=INDEX, layer=st.integers(0, 2), copy=st.sampled_from([None, False, True]))
    def look(self, index, layer, copy):
        """The views of K and V are those of the planes, and `copy` is obeyed."""
        if not self.stored():
            return
        request_id = self.pick(index)
        sequence = self.model.sequences[request_id]
        if copy is False and not self.pair.is_one_run(sequence):
            pytest.raises(ValueError, self.pair.cache.get_k_view, request_id, layer, copy=False)
            return
        first = self.pair.cache.get_k_view(request_id, layer, copy=copy)
        self.pair.compare_view(
            request_id,
            sequence,
            layer,
            0,
            first if copy is not True else self.frozen_like(first, request_id, layer),
        )
        if self.backend == "numpy" and sequence.tokens:
            shares = any(
                np.shares_memory(first, plane) for plane in self.pair.cache.arena.planes[layer].values()
            )
            assert shares is (copy is not True and self.pair.is_one_run(sequence))

    def frozen_like(self, array, request_id, layer):
        """A copy is writable where a view may not be; the comparison expects a view's flags."""
        if self.backend == "numpy":
            array.flags.writeable = self.pair.cache.get_k_view(request_id, layer).flags.writeable
        return array

    @precondition(something_lives)
    @rule(index=INDEX, layer=st.integers(0, 2), position=st.integers(0, 24))
    def write_through_a_view(self, index, layer, position):
        request_id = self.pick(index)
        sequence = self.model.sequences[request_id]
        if self.backend != "numpy" or not sequence.tokens or not self.pair.is_one_run(sequence):
            return
        views = self.pair.cache.get_views(request_id, layer)
        if views[0].flags.writeable:
            position %= sequence.tokens
            (row,) = self.pair.new_rows(request_id, layer, position, 1)
            for view, plane_row in zip(views, row, strict=True):
                view[:, position] = plane_row
            self.model.set_row(request_id, layer, position, row)

    # ---- holds

    @precondition(lambda self: len(self.holds) < 2 and self.model.bound is None)
    @rule()
    def hold(self):
        self.holds.append(self.pair.hold())

    @precondition(lambda self: self.holds)
    @rule()
    def release(self):
        self.pair.release(self.holds.pop())

    # ---- a batch

    @precondition(lambda self: len(self.model.sequences) > 1)
    @rule(order=st.permutations(range(len(NAMES))), leave_out=st.integers(0, 2))
    def make_batch(self, order, leave_out):
        live = self.live()
        self.batch = BatchPair(self.pair, [live[i] for i in order if i < len(live)][leave_out:])

    def has_batch(self):
        return self.batch is not None

    @precondition(lambda self: self.has_batch() and self.something_lives())
    @rule(index=INDEX)
    def batch_add(self, index):
        self.batch.add(self.pick(index))

    @precondition(lambda self: self.has_batch() and self.batch.members)
    @rule(index=INDEX)
    def batch_remove(self, index):
        self.batch.remove(self.batch.members[index % len(self.batch.members)].request_id)

    @precondition(has_batch)
    @rule(order=st.permutations(range(len(NAMES))), leave_out=st.integers(0, 1))
    def batch_reorder(self, order, leave_out):
        self.batch.reorder([index for index in order if index < len(self.batch.members)][leave_out:])

    @precondition(lambda self: self.has_batch() and self.stored())
    @rule(steps=st.integers(1, 5), layer=st.integers(0, 2))
    def batch_decode(self, steps, layer):
        for _ in range(steps):
            self.batch.append(None)
            self.batch.write(layer, False)
            self.everything_compares()

    @precondition(has_batch)
    @rule(
        counts=st.none()
        | st.integers(0, 3)
        | st.lists(st.integers(0, 5), min_size=len(NAMES), max_size=len(NAMES))
    )
    def batch_append(self, counts):
        self.batch.append(counts[: len(self.batch.members)] if isinstance(counts, list) else counts)

    @precondition(has_batch)
    @rule(counts=st.integers(0, 3) | st.lists(st.integers(0, 5), min_size=len(NAMES), max_size=len(NAMES)))
    def batch_truncate(self, counts):
        self.batch.truncate(counts)

    @precondition(lambda self: self.has_batch() and self.stored())
    @rule(layer=st.integers(0, 2), skip_refused=st.booleans())
    def batch_write(self, layer, skip_refused):
        self.batch.write(layer, skip_refused)

    @precondition(lambda self: self.has_batch() and self.stored())
    @rule(most=st.integers(1, 4), spare=st.integers(0, 2), layer=st.integers(0, 2))
    def batch_write_shared(self, most, spare, layer):
        """A step is shared before it is written, in a pool that has few blocks left for copies."""
        self.batch.append(None)
        self.everything_compares()
        for member in self.batch.members[:most]:
            if member.request_id in self.model.sequences:
                self.fork(self.live().index(member.request_id), 0)
                self.pair.compare()
        self.allocate_at_the_border(0, -spare * self.model.block_size, 0)
        self.pair.compare()
        self.batch.write(layer, False)

    # ---- after every step

    @invariant()
    def everything_compares(self):
        if hasattr(self, "pair"):
            self.pair.compare()
            if self.batch is not None:
                self.batch.compare()

    def teardown(self):
        if not hasattr(self, "pair"):
            return
        while self.holds:
            self.pair.release(self.holds.pop())
        for request_id in self.live():
            self.pair.free(request_id)
        self.pair.compare()
        assert self.pair.cache.total_allocated == 0
        self.pair.cache.close()


def machine(placement, backend, dtypes, bounds=(None,)):
    name = f"{placement.capitalize()}{backend.capitalize()}Machine"
    options = {"placement": placement, "backend": backend, "dtypes": dtypes, "bounds": bounds}
    return type(name, (CacheMachine,), options)


def crowded_step(walk, chance):
    """One call, chosen so that the pool stays nearly full."""
    index, few, layer = chance.randrange(len(NAMES)), chance.randint(1, 4), chance.randint(0, 2)
    crowded = len(walk.live()) > len(NAMES) - 2 or walk.model.free_blocks <= 1
    growable = [n for n, s in enumerate(walk.model.sequences.values()) if s.tokens < s.limit] or [index]
    always = {
        lambda: walk.allocate(index, chance.randint(1, 20), chance.randint(0, 20), True): 8,
        lambda: walk.allocate(index, chance.randint(1, 12), None, True): 2,
        lambda: walk.allocate_at_the_border(index, chance.randint(-3, 1), 0): 3,
        walk.hold: 0 if walk.holds or walk.model.bound is not None else 1,
        lambda: walk.compact(chance.choice([None, 0, 5, 20, 60])): 1,
        walk.release: 8 if walk.holds else 0,
    }
    with_sequences = {
        lambda: walk.free(index): 9 if crowded else 1,
        lambda: walk.thin_out(chance.randint(0, 1), 2): 3 if crowded else 0,
        lambda: walk.append(chance.choice(growable), few, True): 12,
        lambda: walk.grow_all(1, 1): 3,
        lambda: walk.truncate(index, chance.randint(0, 24)): 2,
        lambda: walk.set_limit(index, chance.randint(0, 12)): 3,
        lambda: walk.fork(index, index): 3,
        lambda: walk.write(index, layer, chance.randint(0, 24), few, True): 4,
        lambda: walk.commit(index, None): 1,
        lambda: walk.make_batch(chance.sample(range(len(NAMES)), len(NAMES)), 1): 2,
    }
    with_batch = {
        lambda: walk.batch_append(chance.randint(0, 2)): 6,
        lambda: walk.batch_write(layer, False): 6 if walk.stored() else 0,
        lambda: walk.batch_truncate(few - 1): 1,
        lambda: walk.batch_write_shared(few, chance.randint(0, 2), layer): 2 if walk.stored() else 0,
    }
    actions = always | (with_sequences if walk.live() else {}) | (with_batch if walk.batch else {})
    chance.choices(list(actions), actions.values())[0]()
    walk.everything_compares()


def crowded_walk(walk, seed, overcommit=1.0, steps=400):
    """Begins a walk that has not begun, goes so many steps, and ends it."""
    chance = random.Random(seed)
    size = chance.randint(8, 32), chance.randint(1, 5)
    walk.begin(*size, overcommit, chance.choice(walk.dtypes), chance.choice(walk.bounds))
    for _ in range(steps):
        crowded_step(walk, chance)
    walk.teardown()

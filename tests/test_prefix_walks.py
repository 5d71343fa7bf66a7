"""Random walks in both placements, under holds and bounds on moves too: a hit is never wrong, whatever the hash.

K/V at each position say which prefix they stand after, so that whoever is served another one's shows it. What has ever
been committed bounds what may be found; a second cache, whose hash has two bits, goes along and says the same.
"""

import random

import numpy as np
import pytest
from conftest import DEPTH
from prompts import planes, shows

from kvcache import CacheFull, CacheHeld, KVCache

SALTS = [None, None, None, None, "a", 0]


class Walk:
    def __init__(self, seed, placement, bound=None, policy="lru"):
        self.chance = random.Random(seed)
        self.size = self.chance.choice([1, 2, 4])
        self.blocks = self.chance.choice([4, 8, 16, 40])
        self.paged = placement == "paged"
        options = {
            "placement": placement,
            "overcommit": self.chance.choice([1.0, 1.0, 1.5]),
            "policy": policy,
        }
        shape = 2, 1, 2, self.blocks * self.size, self.size
        self.caches = [KVCache(*shape, max_move_tokens=bound, **options) for _ in range(2)]
        self.caches[1]._weaken_hash(2)
        self.tokens = {}  # of live sequences
        self.right = {}  # per layer: how many positions from 0 on have K/V of these tokens
        self.known = {}
        self.salts = {}
        self.committed = set()  # (salt, prefix) of whole blocks that have ever been committed
        self.number = 0

    def both(self, call):
        """What the one cache answers or raises, the other does too."""
        answers = []
        for cache in self.caches:
            try:
                answers.append(call(cache))
            except (CacheHeld, CacheFull, ValueError) as error:
                answers.append(type(error))
        assert answers[0] == answers[1]
        return answers[0]

    def pick(self):
        return self.chance.choice(list(self.tokens))

    def prompt(self):
        most = self.blocks * self.size
        base = self.chance.choice([[0] * 60, [0, 1] * 30, [1] * 60])
        tail = [self.chance.randint(0, 1) for _ in range(self.chance.randint(1, 6))]
        return (base[: self.chance.randint(0, min(60, most - 1))] + tail)[:most]

    def note_committed(self, name):
        """What of a sequence may be found from now on."""
        whole = min(*self.right[name], self.known[name]) // self.size
        for blocks in range(1, whole + 1):
            self.committed.add((self.salts[name], tuple(self.tokens[name][: blocks * self.size])))

    def write(self, name, start, count, layer):
        answer = self.both(
            lambda cache: cache.write(
                name,
                layer,
                *[plane[:, :count] for plane in planes(cache, layer, self.tokens[name], start)],
                start=start,
            )
        )
        if answer is None:
            marks = self.right[name]
            if start < min(marks):
                marks[:] = [min(mark, start) for mark in marks]
            if start <= marks[layer]:
                marks[layer] = max(marks[layer], start + count)
            self.note_committed(name)

    # ---- what it does

    def allocate(self):
        prompt, salt = self.prompt(), self.chance.choice(SALTS)
        self.number += 1
        name, more = self.number, self.chance.choice([None, None, self.chance.randint(0, 10)])
        limit = None if more is None else min(self.blocks * self.size, len(prompt) + more)
        found = self.both(lambda cache: cache.probe(prompt, salt=salt))
        for blocks in range(1, found // self.size + 1):
            assert (salt, tuple(prompt[: blocks * self.size])) in self.committed
        form = self.chance.choice([list, tuple, np.array])
        priority, ttl = self.chance.choice([0, 0, 3, -1]), self.chance.choice([None, 5, 20.5])

        def allocate(cache):
            grant = cache.allocate_for(
                name, form(prompt), salt=salt, max_tokens=limit, priority=priority, ttl=ttl
            )
            return grant and grant.cached_tokens

        before = self.caches[0].stats()
        cached = self.both(allocate)
        if cached is None or cached is CacheHeld:
            assert self.caches[0].stats() == before
            return
        assert cached == found if self.paged else cached <= found
        self.tokens[name], self.salts[name] = prompt, salt
        self.right[name], self.known[name] = [cached, cached], len(prompt)
        for cache in self.caches:
            shows(cache, name, prompt, cached)
        missing = len(prompt) - cached
        for layer in range(2):
            count = missing if self.chance.random() < 0.8 else self.chance.randint(0, missing)
            if count:
                self.write(name, cached, count, layer)

    def free(self):
        name = self.pick()
        assert self.both(lambda cache: cache.free_for(name)) is True
        for table in (self.tokens, self.right, self.known, self.salts):
            del table[name]

    def append(self):
        name, new = self.pick(), [self.chance.randint(0, 1) for _ in range(self.chance.randint(1, 3))]
        start, named = len(self.tokens[name]), self.chance.random() < 0.8
        if self.both(lambda cache: cache.append_tokens(name, new if named else len(new))) is True:
            self.tokens[name] = self.tokens[name] + new
            if named and self.known[name] == start:
                self.known[name] = len(self.tokens[name])
            for layer in range(2):
                if self.chance.random() < 0.9:
                    self.write(name, start, len(new), layer)
            late = not named and self.known[name] == start and self.chance.random() < 0.5
            if late and self.both(lambda cache: cache.set_tokens(name, new)) is None:
                self.known[name] = len(self.tokens[name])
                self.note_committed(name)

    def fork(self):
        name, self.number = self.pick(), self.number + 1
        twin = self.number
        if self.both(lambda cache: bool(cache.fork(name, twin))) is True:
            self.tokens[twin], self.right[twin] = self.tokens[name], list(self.right[name])
            self.known[twin], self.salts[twin] = self.known[name], self.salts[name]

    def truncate(self):
        name = self.pick()
        keep = self.chance.randint(0, len(self.tokens[name]))
        if self.both(lambda cache: cache.truncate(name, keep)) is True:
            self.cut(name, keep)

    def rewrite(self):
        name = self.pick()
        if self.tokens[name]:
            start = self.chance.randint(0, len(self.tokens[name]) - 1)
            count = self.chance.randint(1, len(self.tokens[name]) - start)
            self.write(name, start, count, self.chance.randint(0, 1))

    def step(self):
        members = self.chance.sample(list(self.tokens), min(3, len(self.tokens)))
        new = [self.chance.randint(0, 1) for _ in members]
        named = self.chance.choice(["at once", "later"])
        batches = {cache: cache.batch(members) for cache in self.caches}
        got = self.both(lambda cache: batches[cache].append(new if named == "at once" else None).tolist())
        if got is CacheHeld:
            return
        if named == "later":
            assert self.both(lambda cache: batches[cache].set_tokens(new)) is None
        rows = []
        for name, token, grant in zip(members, new, got, strict=True):
            if grant:
                if self.known[name] == len(self.tokens[name]):
                    self.known[name] += 1
                self.tokens[name] = [*self.tokens[name], token]
                rows.append(
                    [
                        p[:, 0]
                        for p in planes(self.caches[0], 0, self.tokens[name], len(self.tokens[name]) - 1)
                    ]
                )
        for layer in range(2 if rows else 0):
            given = [np.stack(plane) for plane in zip(*rows, strict=True)]
            if (
                self.both(lambda cache, layer=layer, given=given: batches[cache].write(layer, *given))
                is not None
            ):
                continue
            for name, grant in zip(members, got, strict=True):
                if grant and self.right[name][layer] == len(self.tokens[name]) - 1:
                    self.right[name][layer] += 1
        for name in members:
            self.note_committed(name)
        if self.chance.random() < 0.3:
            self.drop(members, batches)

    def drop(self, members, batches):
        drops = [self.chance.randint(0, min(2, len(self.tokens[name]))) for name in members]
        cuts = self.both(lambda cache: batches[cache].truncate(drops).tolist())
        for name, drop, cut in zip(members, drops, cuts, strict=True):
            if cut:
                self.cut(name, len(self.tokens[name]) - drop)

    def cut(self, name, keep):
        self.tokens[name] = self.tokens[name][:keep]
        self.right[name] = [min(mark, keep) for mark in self.right[name]]
        self.known[name] = min(self.known[name], keep)

    def hold(self):
        holds = [cache.hold() for cache in self.caches]
        for hold in holds:
            hold.__enter__()
        for _ in range(self.chance.randint(1, 5)):
            self.act(self.chance.choice(["free", "free", "allocate", "append", "truncate", "fork"]))
            self.compare()
        for hold in holds:
            hold.__exit__(None, None, None)

    def act(self, action):
        if action == "allocate" or self.tokens:
            getattr(self, action)()

    def compare(self):
        one, other = self.caches
        stats = one.stats()
        assert stats == other.stats()
        assert (stats.hit_tokens, stats.evictions_room) == (
            other.stats().hit_tokens,
            other.stats().evictions_room,
        )
        assert stats.used_blocks + stats.free_blocks == self.blocks
        assert stats.cached_blocks <= stats.free_blocks
        for cache in self.caches:
            cache.check()
            for name, tokens in self.tokens.items():
                assert cache.used_tokens(name) == len(tokens)
                if tokens:
                    shows(cache, name, tokens, min(self.right[name]))

    def walk(self, steps):
        actions = ["allocate"] * 4 + ["free"] * 3 + ["append"] * 3 + ["step"] * 2
        actions += ["fork", "truncate", "rewrite", "hold"]
        for _ in range(steps):
            self.act(self.chance.choice(actions))
            self.compare()
        while self.tokens:
            self.free()
        self.compare()
        stats = self.caches[0].stats()
        assert stats.used_blocks == 0
        for cache in self.caches:
            cache.close()
        return stats


class KeepingWalk(Walk):
    """With pins, priorities, quotas, events, and the end of everything that is cached, too."""

    ACTIONS = ("pin", "unpin", "limit", "tell", "clear")

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.pins = []
        self.limits = {}  # salt -> most cached blocks
        self.stored = {}  # number of a block that events have told of -> its tokens

    def both(self, call):
        before = [cache.stats().pinned_blocks for cache in self.caches]
        assert before[0] == before[1]
        return super().both(call)

    def pin(self):
        what = {"tokens": self.prompt(), "salt": self.chance.choice(SALTS)}
        if self.tokens and self.chance.random() < 0.5:
            what = {"request_id": self.pick()}
        before = self.caches[0].stats()
        pinned = self.both(lambda cache: cache.pin(**what))
        if pinned:
            self.pins.append((what, pinned))
            if len(what.get("tokens", ())) in range(1, self.blocks * self.size):
                assert self.caches[0].probe([*what["tokens"], 0], what["salt"]) >= pinned
        else:
            assert self.caches[0].stats() == before

    def unpin(self):
        if self.pins:
            what, _ = self.chance.choice(self.pins)
            last = max(number for number, (other, _) in enumerate(self.pins) if other == what)
            what, pinned = self.pins.pop(last)
            assert self.both(lambda cache: cache.unpin(**what)) == pinned

    def limit(self):
        most = self.chance.choice([0, 1, 3, None])
        self.both(lambda cache: cache.set_quota("a", most and most * cache.spec.block_bytes))
        self.limits["a"] = most

    def tell(self):
        for event in self.caches[0].events():
            if event.kind == "stored":
                assert event.block not in self.stored and event.salt in SALTS and event.dropped == 0
                assert len(event.tokens) == self.size
                self.stored[event.block] = event.tokens
            elif event.kind == "evicted":
                assert self.stored.pop(event.block, event.tokens) == event.tokens
            else:
                self.stored.clear()

    def clear(self):
        if self.chance.random() < 0.2:
            self.both(lambda cache: cache.clear_prefix_cache())
            self.pins.clear()
            self.known = dict.fromkeys(self.known, -1)  # nothing more of them is kept
            assert self.caches[0].stats().cached_blocks == self.caches[0].stats().pinned_blocks == 0

    def act(self, action):
        if self.chance.random() < 0.3:
            getattr(self, self.chance.choice(self.ACTIONS))()
            self.compare()
        super().act(action)

    def walk(self, steps):
        actions = (
            ["allocate"] * 4 + ["free"] * 3 + ["append"] * 3 + ["step", "fork", "truncate", "rewrite", "hold"]
        )
        for _ in range(steps):
            self.act(self.chance.choice(actions))
            self.compare()
        for name in list(self.tokens):
            assert self.both(lambda cache, name=name: cache.free_for(name)) is True
        self.tokens.clear()
        for what, _ in reversed(self.pins):
            assert self.both(lambda cache, what=what: cache.unpin(**what))
        self.compare()
        assert self.caches[0].stats().used_blocks == self.caches[0].stats().pinned_blocks == 0
        for cache in self.caches:
            cache.close()


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("policy", ["lru", "priority", "lfu", "fifo", "worth"])
@pytest.mark.parametrize("seed", range(int(4 * DEPTH)))
def test_pins_quotas_and_clearing_leave_every_hit_right(placement, policy, seed):
    KeepingWalk(seed, placement, policy=policy).walk(150)


@pytest.mark.parametrize("seed", range(int(4 * DEPTH)))
def test_pins_and_quotas_under_a_bound_on_moves_leave_every_hit_right(seed):
    KeepingWalk(seed, "contiguous", 4).walk(150)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "worth"])
@pytest.mark.parametrize("seed", range(int(4 * DEPTH)))
def test_no_walk_hits_what_is_not_its_prefix(placement, policy, seed):
    stats = Walk(seed, placement, policy=policy).walk(150)
    assert stats.queries


@pytest.mark.parametrize("bound", [0, 4, 16])
@pytest.mark.parametrize("seed", range(int(4 * DEPTH)))
def test_no_walk_under_a_bound_on_moves_hits_what_is_not_its_prefix(bound, seed):
    Walk(seed, "contiguous", bound).walk(150)

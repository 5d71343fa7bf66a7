"""Eight threads whose prompts collide, in a pool that evicts: whatever one of them hits is what it asked for."""

import os
import random
import sys
import threading
import time

import pytest
from prompts import fill, leave, shows

from kvcache import CacheFull, Tokens

SECONDS = float(os.environ.get("KVCACHE_TEST_SECONDS", "10"))
THREADS = 8


class Engine(threading.Thread):
    """Runs prompts of two tokens; every sequence of its own shows K/V of exactly its tokens at all times."""

    def __init__(self, cache, number, deadline):
        super().__init__(daemon=True)
        self.cache, self.number, self.deadline = cache, number, deadline
        self.chance = random.Random(number)
        self.tokens = {}
        self.rounds = self.hits = 0
        self.error = None

    def run(self):
        try:
            while time.monotonic() < self.deadline:
                self.rounds += 1
                self.chance.choice([self.begin, self.begin, self.decode, self.branch, self.look, self.end])()
            while self.tokens:
                self.end()
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            self.error = error

    def prompt(self):
        base = self.chance.choice([[0] * 20, [0, 1] * 10, [1, 1, 0] * 7])
        return base[: self.chance.randint(1, 18)] + [self.chance.randint(0, 1) for _ in range(3)]

    def begin(self):
        tokens, salt = self.prompt(), self.chance.choice([None, None, "a"])
        found = self.cache.probe(tokens, salt=salt)
        assert found % self.cache.spec.block_size == 0
        assert found < len(tokens)
        name = (self.number, self.rounds)
        if len(self.tokens) > 3:
            return
        grant = self.cache.allocate_for(name, tokens, salt=salt, max_new_tokens=4)
        if grant is None:
            return
        self.hits += grant.cached_tokens
        with self.cache.hold():
            shows(self.cache, name, tokens, grant.cached_tokens)
        missing = len(tokens) - grant.cached_tokens
        cancelled = self.chance.random() < 0.1
        fill(
            self.cache,
            name,
            tokens[: len(tokens) - missing // 2] if cancelled else tokens,
            grant.cached_tokens,
        )
        self.tokens[name] = tokens
        if cancelled:
            self.cache.free_for(name)
            del self.tokens[name]

    def pick(self):
        return self.chance.choice(list(self.tokens)) if self.tokens else None

    def decode(self):
        name, token = self.pick(), self.chance.randint(0, 1)
        if name is not None and self.cache.append_token(name, token):
            self.tokens[name] = [*self.tokens[name], token]
            self.write_last(name)

    def write_last(self, name):
        """Where a shared block cannot be copied the sequence ends: its last token has no K/V."""
        try:
            fill(self.cache, name, self.tokens[name], len(self.tokens[name]) - 1)
        except CacheFull:
            self.cache.free_for(name)
            del self.tokens[name]

    def branch(self):
        name, twin = self.pick(), (self.number, self.rounds)
        if name is not None and len(self.tokens) < 5 and self.cache.fork(name, twin):
            self.tokens[twin] = self.tokens[name]

    def look(self):
        with self.cache.hold():
            for name, tokens in self.tokens.items():
                shows(self.cache, name, tokens)

    def end(self):
        name = self.pick()
        if name is not None:
            if self.chance.random() < 0.5:
                self.cache.commit(name)
            self.look()
            assert self.cache.free_for(name) is True
            del self.tokens[name]


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("bits", [2, 64])
def test_threads_with_colliding_prompts_hit_nothing_but_their_own(make_cache, placement, bits):
    cache = make_cache(2, 1, 2, 240, 2, placement=placement)
    if bits < 64:
        cache._weaken_hash(bits)
    deadline = time.monotonic() + SECONDS / 5
    engines = [Engine(cache, number, deadline) for number in range(THREADS)]
    for engine in engines:
        engine.start()
    while time.monotonic() < deadline:
        cache.check()
        time.sleep(0.05)
    for engine in engines:
        engine.join(120)
        assert not engine.is_alive(), "stuck"
        if engine.error:
            raise engine.error
    cache.check()
    stats = cache.stats()
    assert (stats.used_blocks, stats.claimed_blocks, stats.num_sequences) == (0, 0, 0)
    assert sum(engine.hits for engine in engines) == stats.hit_tokens > 0
    assert stats.evictions_room > 0


# ---- short calls, all at once


@pytest.fixture
def hurried():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def all_at_once(*works):
    """Each in a thread of its own, again and again for a while; what one of them raises."""
    errors, deadline = [], time.monotonic() + SECONDS / 10

    def work(call):
        try:
            while time.monotonic() < deadline and not errors:
                call()
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(each,), daemon=True) for each in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "stuck"
    if errors:
        raise errors[0]


def test_pins_of_one_prefix_by_many_threads_are_all_undone(make_cache, hurried):
    cache, prompt = make_cache(), list(range(16))
    leave(cache, prompt)

    def pin():
        assert cache.pin(tokens=prompt) == 16
        assert cache.unpin(tokens=prompt) == 16

    all_at_once(pin, pin, pin)
    assert cache.stats().pinned_blocks == 0
    assert cache.unpin(tokens=prompt) == 0


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_pins_beside_one_who_clears_the_cache_are_undone_or_forgotten(make_cache, hurried, placement):
    cache, prompt, names = make_cache(placement=placement), list(range(16)), iter(range(10**9))

    def come_and_go():
        name = next(names)
        if cache.allocate_for(name, prompt):
            cache.commit(name)
            cache.free_for(name)

    def pin():
        cache.pin(tokens=prompt)
        cache.unpin(tokens=prompt)

    def clear():
        cache.clear_prefix_cache()
        cache.check()

    all_at_once(come_and_go, pin, pin, clear)
    while cache.unpin(tokens=prompt):
        pass
    assert cache.stats().pinned_blocks == 0


def test_more_salts_than_are_remembered_by_many_threads_do_no_harm(make_cache, hurried):
    cache, prompt = make_cache(), Tokens(range(8))

    def look(salts):
        return lambda: cache.probe(prompt, salt=next(salts))

    all_at_once(*[look(iter(range(number, 10**9, 4))) for number in range(4)])
    leave(cache, list(range(8)), salt="mine")
    assert cache.probe([*range(8), 1], salt="mine") == 8

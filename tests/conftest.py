"""Profiles for Hypothesis, and fixtures that end every test of a structure in `check()`."""

import os

import pytest
from hypothesis import HealthCheck, settings

DEPTH = float(os.environ.get("KVCACHE_TEST_DEPTH", "1"))  # times as many examples

settings.register_profile(
    "kvcache",
    deadline=None,
    max_examples=max(1, int(60 * DEPTH)),
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    print_blob=True,
)
settings.load_profile("kvcache")


@pytest.fixture
def make_allocator():
    """Makes block allocators; each is checked when the test ends."""
    from kvcache import BlockAllocator

    made = []

    def make(num_blocks):
        made.append(BlockAllocator(num_blocks))
        return made[-1]

    yield make
    for allocator in made:
        allocator.check()


@pytest.fixture
def make_cache():
    """Makes caches, by default of two layers, two heads, 4 wide, 16 blocks of 4 tokens; each is checked."""
    from kvcache import KVCache

    made = []

    def make(*shape, **options):
        made.append(KVCache(*(shape or (2, 2, 4, 64, 4)), **options))
        return made[-1]

    yield make
    for cache in made:
        check_and_close(cache)


def check_and_close(cache):
    from kvcache import CacheClosed

    try:
        cache.check()
    except CacheClosed:
        return
    cache.close()

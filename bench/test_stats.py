"""Looking at a busy cache: 1,024 sequences in a pool of 65,536 blocks that has been lived in."""

import io

import pytest
from scenes import LivedIn

pytestmark = pytest.mark.benchmark(group="looking")

CALLS = 100


@pytest.fixture(scope="module")
def pool():
    return LivedIn(65_536, "contiguous")


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


def test_stats(measure, pool):
    seen = []

    def look():
        seen[:] = [pool.cache.stats() for _ in range(CALLS)]

    def verify():
        assert seen[-1].num_sequences == len(pool.tokens) and seen[-1].used_blocks == pool.held

    measure(look, verify=verify, calls=CALLS, turns=CALLS)
    pool.cache.check()


def test_dump_cache_stats(measure, pool):
    """The guide's text, a line for each sequence."""
    texts = []

    def look():
        file = io.StringIO()
        pool.cache.dump_cache_stats(file)
        texts.append(file.getvalue())

    def verify():
        text = texts.pop()
        assert text.count("request-") == len(pool.tokens) and not texts

    measure(look, verify=verify, rounds=20)
    pool.cache.check()

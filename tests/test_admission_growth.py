"""Growth through the queue: what ends its wait, what its refusals say, and whose tokens are taken back."""

import pytest
from crowd import Crowd

from kvcache.admission import Wait

SIZE, BLOCKS = 4, 8


@pytest.fixture
def crowd(make_cache):
    made = []

    def make(strategy=None, *, overcommit=2.0, placement="contiguous", **options):
        cache = make_cache(
            1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=overcommit, placement=placement
        )
        made.append(Crowd(cache, strategy or Wait(), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ---- a limit that is lowered while it waits


def test_growth_whose_limit_is_lowered_meanwhile_is_told_so(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    here.pass_time(3)
    assert here.cache.set_limit("a", 11)
    refused = here.answer(("grow", "a"))
    assert (refused.reason, refused.tokens, refused.max_tokens, refused.waited) == ("never_fits", 8, 11, 3.0)
    assert here.queue.stats().tenants[""].growth_refused["never_fits"] == 1
    assert here.cache.used_tokens("a") == 4


def test_growth_that_still_fits_a_lowered_limit_waits_on(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    here.cache.set_limit("a", 12)
    assert here.answer(("grow", "a")) is None
    here.free("b")
    assert here.answer(("grow", "a")) is True


def test_newcomers_do_not_wait_behind_growth_that_can_never_be(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=32), here.ask("b", 16)
    assert here.grow("a", 16) is None
    assert here.ask("new", 12) is None  # it would fit, but growth goes first
    here.cache.set_limit("a", 16)
    assert here.answer(("grow", "a")).reason == "never_fits"
    assert here.answer("new")


def test_an_append_meanwhile_that_leaves_too_little_of_the_limit_ends_the_wait(crowd):
    here = crowd()
    here.ask("a", 3, max_tokens=12), here.ask("b", 28)
    assert here.grow("a", 9) is None
    assert here.cache.append_token("a")
    here.queue.poke()
    assert here.answer(("grow", "a")).reason == "never_fits"

"""Who is admitted, what is promised, and how far it may grow."""

import math
import pickle

import numpy as np
import pytest
from observation import unchanged

from kvcache import KVCache, KVCacheSpec, RequestTooLarge

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


# ---- the record of a grant


def test_a_grant_tells_what_was_granted(make_cache):
    grant = make_cache().allocate_for("a", 6, max_tokens=11)
    assert (grant.request_id, grant.tokens, grant.max_tokens, grant.cached_tokens) == ("a", 6, 11, 0)


def test_a_grant_is_truthy(make_cache):
    assert make_cache().allocate_for("a", 1)


def test_a_grant_is_immutable(make_cache):
    grant = make_cache().allocate_for("a", 6)
    for name in ("request_id", "tokens", "max_tokens", "cached_tokens"):
        with pytest.raises(AttributeError):
            setattr(grant, name, 0)
    assert grant.tokens == 6


def test_a_grant_outlives_its_sequence(make_cache):
    cache = make_cache()
    grant = cache.allocate_for("a", 6)
    cache.append_token("a")
    cache.free_for("a")
    assert grant.tokens == 6


def test_a_prompt_may_be_token_ids(make_cache):
    cache = make_cache(prefix_cache=False)
    for number, prompt in enumerate(
        [[5, 6, 7], (5, 6, 7), range(3), np.arange(3), np.arange(3, dtype=np.int32)]
    ):
        assert cache.allocate_for(number, prompt).tokens == 3


def test_the_prompt_counts_as_used(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    assert cache.used_tokens("a") == 6
    assert cache.capacity("a") == 8
    assert cache.token_offset_in_block("a") == 2


# ---- not now, never


@BOTH
def test_what_does_not_fit_now_is_none(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with unchanged(cache):
        assert cache.allocate_for("b", 25) is None
    assert cache.allocate_for("b", 24)
    assert cache.is_full


@BOTH
def test_what_is_claimed_is_not_given_away(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 4, max_tokens=60)
    with unchanged(cache):
        assert cache.allocate_for("b", 8) is None
        assert cache.allocate_for("b", 4, max_tokens=5) is None
    assert cache.allocate_for("b", 4)
    assert cache.stats().claimed_blocks == 14


def test_a_prompt_larger_than_the_arena_never_fits(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3)
    with unchanged(cache), pytest.raises(RequestTooLarge) as caught:
        cache.allocate_for("b", 65)
    error = caught.value
    assert (error.what, error.tokens, error.blocks_needed, error.num_blocks) == ("prompt", 65, 17, 16)
    assert isinstance(error, ValueError)
    assert (
        str(pickle.loads(pickle.dumps(error)))
        == str(error)
        == "prompt of 65 tokens needs 17 blocks, the arena has 16"
    )


@pytest.mark.parametrize("limits", [{"max_tokens": 65}, {"max_new_tokens": 62}])
def test_a_limit_larger_than_the_arena_never_fits(make_cache, limits):
    cache = make_cache()
    with unchanged(cache), pytest.raises(RequestTooLarge) as caught:
        cache.allocate_for("b", 3, **limits)
    assert (caught.value.what, caught.value.tokens, caught.value.blocks_needed) == ("max_tokens", 65, 17)


def test_the_whole_arena_can_be_one_sequence(make_cache):
    cache = make_cache()
    assert cache.allocate_for("a", 64)
    assert cache.append_token("a") is False


def test_the_arena_is_rounded_up_to_blocks(make_cache):
    cache = make_cache(1, 1, 4, 61, 4)
    assert cache.allocate_for("a", 64)


def test_a_limit_below_the_prompt_is_an_error(make_cache):
    cache = make_cache()
    with unchanged(cache), pytest.raises(ValueError) as caught:
        cache.allocate_for("a", 6, max_tokens=5)
    assert not isinstance(caught.value, RequestTooLarge)


def test_a_limit_that_is_the_prompt_is_granted(make_cache):
    cache = make_cache()
    assert cache.allocate_for("a", 6, max_tokens=6).max_tokens == 6
    assert cache.allocate_for("b", 6, max_new_tokens=0).max_tokens == 6
    assert cache.append_token("a") is False


# ---- limits


def test_fixed_mode_ends_with_the_block_of_the_prompt(make_cache):
    cache = make_cache()
    assert cache.allocate_for("a", 6).max_tokens == 8
    assert cache.limit("a") == 8
    assert [cache.append_token("a") for _ in range(4)] == [True, True, False, False]
    assert cache.used_tokens("a") == 8


def test_fixed_mode_of_whole_blocks_grows_by_nothing(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    with unchanged(cache):
        assert cache.append_token("a") is False


@BOTH
def test_a_limit_in_total_is_reached_exactly(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 3, max_tokens=10)
    assert cache.stats().claimed_blocks == 2
    assert [cache.append_token("a") for _ in range(8)] == [True] * 7 + [False]
    assert cache.stats().claimed_blocks == 0


def test_a_limit_beyond_the_prompt_counts_from_it(make_cache):
    cache = make_cache()
    assert cache.allocate_for("a", 3, max_new_tokens=7).max_tokens == 10
    assert cache.limit("a") == 10


@BOTH
def test_blocks_come_on_demand(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 4, max_tokens=64)
    assert cache.stats().used_blocks == 1
    cache.append_tokens("a", 4)
    assert cache.stats().used_blocks == 2
    cache.append_token("a")
    assert (cache.stats().used_blocks, cache.capacity("a")) == (3, 12)


@BOTH
def test_granted_limits_are_all_reached_in_a_full_pool(make_cache, placement):
    cache = make_cache(placement=placement)
    for name in "abcd":
        assert cache.allocate_for(name, 4, max_tokens=16)
    for _ in range(12):
        assert all(cache.append_token(name) for name in "dbca")
    assert cache.is_full


# ---- overcommit


@BOTH
def test_overcommit_lets_more_be_promised_than_there_is(make_cache, placement):
    cache = make_cache(placement=placement, overcommit=1.5)
    assert cache.allocate_for("a", 4, max_tokens=64)
    assert cache.allocate_for("b", 4, max_tokens=32)
    with unchanged(cache):
        assert cache.allocate_for("c", 1) is None
    assert cache.stats().claimed_blocks == 22


@BOTH
def test_with_overcommit_an_append_may_be_refused(make_cache, placement):
    cache = make_cache(placement=placement, overcommit=math.inf)
    assert cache.allocate_for("a", 60, max_tokens=64)
    assert cache.allocate_for("b", 4, max_tokens=64)
    with unchanged(cache):
        assert cache.append_token("a") is False
    assert cache.append_tokens("b", 1) is False
    cache.free_for("b")
    assert cache.append_token("a") is True


def test_unbounded_overcommit_still_needs_blocks_for_the_prompt(make_cache):
    cache = make_cache(overcommit=math.inf)
    cache.allocate_for("a", 60)
    with unchanged(cache):
        assert cache.allocate_for("b", 5) is None


@pytest.mark.parametrize("overcommit", [0.99, 0, -1, math.nan, -math.inf])
def test_overcommit_below_one_is_an_error(overcommit):
    with pytest.raises(ValueError):
        KVCache(1, 1, 4, 64, 4, overcommit=overcommit)


@pytest.mark.parametrize("overcommit", [True, "2", None])
def test_overcommit_that_is_no_number_is_an_error(overcommit):
    with pytest.raises(TypeError):
        KVCache(1, 1, 4, 64, 4, overcommit=overcommit)


# ---- limits that change


@BOTH
def test_a_limit_may_be_raised_while_its_claim_fits(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 4, max_tokens=8)
    cache.allocate_for("b", 32)
    with unchanged(cache):
        assert cache.set_limit("a", 33) is False
    assert cache.set_limit("a", 32) is True
    assert cache.limit("a") == 32
    assert cache.append_tokens("a", 28) is True


def test_a_limit_may_be_lowered_to_what_is_used(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 5, max_tokens=64)
    assert cache.set_limit("a", 5) is True
    assert cache.stats().claimed_blocks == 0
    assert cache.append_token("a") is False


def test_a_limit_below_what_is_used_is_an_error(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 5, max_tokens=64)
    with unchanged(cache), pytest.raises(ValueError):
        cache.set_limit("a", 4)


def test_a_limit_past_the_arena_is_an_error(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 5)
    with unchanged(cache), pytest.raises(RequestTooLarge) as caught:
        cache.set_limit("a", 65)
    assert (caught.value.what, caught.value.tokens) == ("max_tokens", 65)


# ---- no refusal for fragmentation


@BOTH
def test_every_second_block_free_is_room_for_half_the_pool(make_cache, placement):
    cache = make_cache(placement=placement)
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    assert cache.allocate_for("large", 32)
    assert cache.is_full
    if placement == "contiguous":
        assert all(cache.is_contiguous(request_id) for request_id in cache)
        assert cache.stats().moves > 0
    else:
        assert not cache.is_contiguous("large")
        assert cache.stats().moves == 0


# ---- construction


def test_a_cache_can_be_made_from_a_spec(make_cache):
    spec = KVCacheSpec(3, 2, 8, 100, 16, dtype="float16", v_head_dim=4)
    cache = make_cache(spec)
    assert cache.stats().total_blocks == 7
    assert cache.stats().arena_bytes == spec.arena_bytes == 7 * 16 * 3 * 2 * (8 + 4) * 2


@pytest.mark.parametrize(
    "also",
    [
        {"num_kv_heads": 2},
        {"head_dim": 8},
        {"max_total_tokens": 64},
        {"block_size": 16},
        {"dtype": "float16"},
    ],
)
def test_a_shape_beside_a_spec_is_an_error(also):
    with pytest.raises(TypeError):
        KVCache(KVCacheSpec(1, 2, 8, 64), **also)


def test_a_positional_shape_beside_a_spec_is_an_error():
    with pytest.raises(TypeError):
        KVCache(KVCacheSpec(1, 2, 8, 64), 2)


@pytest.mark.parametrize(
    "options", [{"backend": "cuda"}, {"placement": "scattered"}, {"dtype": "float64"}, {"dtype": "int8"}]
)
def test_an_unknown_choice_is_an_error(options):
    with pytest.raises(ValueError):
        KVCache(1, 1, 4, 64, 4, **options)


@BOTH
def test_the_same_calls_give_the_same_places(make_cache, placement):
    def walk():
        cache = make_cache(placement=placement)
        for number in range(8):
            cache.allocate_for(("request", number), 3 + number % 3, max_tokens=16 if number % 2 else None)
        for number in (1, 4, 6):
            cache.free_for(("request", number))
        cache.allocate_for("late", 11, max_tokens=20)
        cache.append_tokens("late", 6)
        return [cache.block_table(request_id).tolist() for request_id in cache], cache.stats()

    assert walk() == walk()


def test_a_grant_of_nothing_cannot_be_made_anew(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 4, max_tokens=8)
    cache.truncate("a", 0)
    cache.set_limit("a", 0)
    grant = cache.fork("a", "b")
    assert grant.max_tokens == 0
    with pytest.raises(TypeError, match="does not change"):
        grant.__init__("other", 9, 9, 9)
    assert (grant.request_id, grant.tokens) == ("b", 0)

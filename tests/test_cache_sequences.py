"""Live sequences: identity and order, growth, cuts, forks, frees, and what has been committed."""

import numpy as np
import pytest
from observation import to_numpy, unchanged

from kvcache import SequenceExists

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


def fill(cache, request_id, value, start=0):
    """Writes every layer and plane of the default cache from `start` on; values count up from `value`."""
    count = cache.used_tokens(request_id) - start
    rows = (value + np.arange(count, dtype=np.float32))[None, :, None] * np.ones((2, 1, 4), np.float32)
    for layer in range(2):
        cache.write(request_id, layer, rows, -rows, start=start)


def values(cache, request_id, layer=0):
    """The first head's values of K, one per token; V and the other head must agree."""
    k, v = (to_numpy(view) for view in cache.get_kv_views(request_id, layer))
    assert np.array_equal(k, -v)
    assert np.array_equal(k[0], k[1])
    return k[0, :, 0].tolist()


# ---- identity and order


def test_ids_come_in_order_of_admission(make_cache):
    cache = make_cache()
    for request_id in ("c", "a", "b"):
        cache.allocate_for(request_id, 1)
    cache.free_for("a")
    cache.allocate_for("a", 1)
    cache.fork("c", "d")
    assert list(cache) == ["c", "b", "a", "d"]
    assert len(cache) == cache.num_allocated_sequences == 4


def test_iteration_gives_the_very_objects(make_cache):
    cache = make_cache()
    request_id = ("request", 10**6)
    cache.allocate_for(request_id, 1)
    assert next(iter(cache)) is request_id
    assert ("request", int("1000000")) in cache


def test_any_hashable_is_an_id(make_cache):
    cache = make_cache()
    ids = ["a", 1, ("a", 1), None, frozenset({1}), 2.5, b"a", object()]
    for request_id in ids:
        cache.allocate_for(request_id, 1)
    assert list(cache) == ids
    assert all(request_id in cache for request_id in ids)
    assert all(cache.free_for(request_id) for request_id in ids)


def test_equal_ids_are_one_id(make_cache):
    cache = make_cache()
    cache.allocate_for(1, 1)
    with unchanged(cache), pytest.raises(SequenceExists):
        cache.allocate_for(1.0, 1)
    assert True in cache


def test_a_cache_may_change_after_iteration_has_begun(make_cache):
    cache = make_cache()
    for request_id in "abc":
        cache.allocate_for(request_id, 1)
    for request_id in list(cache):
        cache.free_for(request_id)
    assert list(cache) == []


def test_an_empty_cache_contains_nothing(make_cache):
    cache = make_cache()
    assert "a" not in cache and len(cache) == 0 and list(cache) == []


# ---- growth


def test_no_tokens_can_always_be_appended(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    with unchanged(cache):
        assert cache.append_tokens("a", 0) is True
        assert cache.append_tokens("a", []) is True


def test_tokens_are_appended_all_or_none(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3, max_tokens=9)
    with unchanged(cache):
        assert cache.append_tokens("a", 7) is False
    assert cache.append_tokens("a", 6) is True
    assert cache.used_tokens("a") == 9


def test_tokens_may_be_appended_as_ids(make_cache):
    cache = make_cache(prefix_cache=False)
    cache.allocate_for("a", [1, 2, 3], max_tokens=20)
    assert cache.append_token("a", 4) is True
    assert cache.append_tokens("a", [5, 6]) is True
    assert cache.append_tokens("a", np.array([7, 8, 9])) is True
    assert cache.used_tokens("a") == 9


@pytest.mark.parametrize("count", [62, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**70])
def test_an_append_past_the_limit_is_false_however_far(make_cache, count):
    cache = make_cache()
    cache.allocate_for("a", 3, max_tokens=64)
    with unchanged(cache):
        assert cache.append_tokens("a", count) is False


@BOTH
def test_growth_keeps_what_was_written(make_cache, placement):
    cache = make_cache(placement=placement)
    for number, request_id in enumerate("abcd"):
        cache.allocate_for(request_id, 3, max_tokens=16)
        fill(cache, request_id, 100 * number)
    for tokens in range(3, 16):
        for number, request_id in enumerate("abcd"):
            assert cache.append_token(request_id)
            fill(cache, request_id, 100 * number + tokens, start=tokens)
        for number, request_id in enumerate("abcd"):
            assert values(cache, request_id) == [100 * number + position for position in range(tokens + 1)]
            assert values(cache, request_id, layer=1) == values(cache, request_id)


def test_a_contiguous_sequence_is_one_run_after_every_call(make_cache):
    cache = make_cache()
    for request_id in "abcd":
        cache.allocate_for(request_id, 3, max_tokens=16)
    for _ in range(13):
        for request_id in "abcd":
            cache.append_token(request_id)
            for other in cache:
                table = cache.block_table(other)
                assert cache.is_contiguous(other)
                assert table.tolist() == list(range(table[0], table[0] + len(table)))


def test_paged_blocks_never_move(make_cache):
    cache = make_cache(placement="paged")
    for request_id in "abcd":
        cache.allocate_for(request_id, 3, max_tokens=16)
    before = {request_id: cache.block_table(request_id).tolist() for request_id in cache}
    for _ in range(13):
        for request_id in "abcd":
            cache.append_token(request_id)
    assert all(cache.block_table(request_id).tolist()[:1] == before[request_id] for request_id in cache)
    assert (cache.stats().moves, cache.stats().moved_tokens) == (0, 0)


def test_a_block_table_is_a_copy_of_int32(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 9)
    table = cache.block_table("a")
    assert table.dtype == np.int32 and table.shape == (3,)
    kept = table.tolist()
    if table.flags.writeable:
        table[:] = 7
    assert cache.block_table("a").tolist() == kept


def test_moved_tokens_are_the_used_tokens_of_what_moved(make_cache):
    cache = make_cache(1, 1, 4, 12, 4)
    for request_id, prompt in (("a", 3), ("b", 2), ("c", 1)):
        cache.allocate_for(request_id, prompt, max_tokens=4)
    places = {request_id: cache.block_table(request_id).tolist() for request_id in cache}
    first = min("abc", key=lambda request_id: places[request_id])
    cache.free_for(first)
    others = [request_id for request_id in "abc" if request_id != first]
    middle = min(others, key=lambda request_id: places[request_id])
    cache.free_for(middle)
    (last,) = (request_id for request_id in others if request_id != middle)
    used = cache.used_tokens(last)
    assert cache.allocate_for("large", 8)
    moved = cache.block_table(last).tolist() != places[last]
    assert (cache.stats().moves, cache.stats().moved_tokens) == ((1, used) if moved else (0, 0))


# ---- cuts


@BOTH
def test_a_cut_gives_whole_blocks_back(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 13)
    assert cache.truncate("a", 5) is True
    assert (cache.used_tokens("a"), cache.capacity("a"), cache.stats().used_blocks) == (5, 8, 2)


@BOTH
def test_a_cut_to_nothing_keeps_the_sequence(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 13)
    assert cache.truncate("a", 0) is True
    assert (cache.used_tokens("a"), cache.capacity("a")) == (0, 0)
    assert cache.is_contiguous("a") is True
    assert cache.block_table("a").tolist() == []
    assert cache.get_k_view("a", 0).shape == (2, 0, 4)
    assert "a" in cache
    assert cache.append_tokens("a", 16) is True


@BOTH
def test_blocks_that_a_cut_gives_back_are_claimed_again(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 64)
    cache.truncate("a", 0)
    assert (cache.stats().free_blocks, cache.stats().claimed_blocks) == (16, 16)
    with unchanged(cache):
        assert cache.allocate_for("b", 1) is None
    assert cache.append_tokens("a", 64) is True


@BOTH
def test_a_cut_keeps_the_prefix(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 13, max_tokens=20)
    fill(cache, "a", 50)
    cache.truncate("a", 6)
    assert values(cache, "a") == [50, 51, 52, 53, 54, 55]
    cache.append_tokens("a", 2)
    fill(cache, "a", 90, start=6)
    assert values(cache, "a") == [50, 51, 52, 53, 54, 55, 90, 91]


def test_a_cut_to_the_same_length_changes_nothing(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 13)
    with unchanged(cache):
        assert cache.truncate("a", 13) is True


def test_a_cut_beyond_the_end_is_an_error(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 13)
    with unchanged(cache), pytest.raises(ValueError):
        cache.truncate("a", 14)


# ---- frees


def test_a_free_says_whether_there_was_anything_to_free(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 13)
    assert cache.free_for("a") is True
    with unchanged(cache):
        assert cache.free_for("a") is False
        assert cache.free_for("never seen") is False


@BOTH
def test_a_free_gives_blocks_and_claims_back(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 13, max_tokens=64)
    cache.free_for("a")
    stats = cache.stats()
    assert (stats.free_blocks, stats.claimed_blocks, stats.num_sequences) == (16, 0, 0)
    assert cache.allocate_for("b", 64)


def test_an_id_can_live_again(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 13)
    cache.free_for("a")
    assert cache.allocate_for("a", 2).tokens == 2
    assert cache.used_tokens("a") == 2


# ---- forks


@BOTH
def test_a_fork_reads_the_same_prefix(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 7, max_tokens=20)
    fill(cache, "a", 50)
    grant = cache.fork("a", "b")
    assert (grant.request_id, grant.tokens, grant.max_tokens, grant.cached_tokens) == ("b", 7, 20, 7)
    assert values(cache, "b") == values(cache, "a") == [50 + position for position in range(7)]


@BOTH
def test_both_sides_of_a_fork_grow_apart(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6, max_tokens=20)
    fill(cache, "a", 50)
    cache.fork("a", "b")
    for request_id, value in (("b", 200), ("a", 100)):
        cache.append_tokens(request_id, 5)
        fill(cache, request_id, value, start=6)
    assert values(cache, "a") == [50, 51, 52, 53, 54, 55, 100, 101, 102, 103, 104]
    assert values(cache, "b") == [50, 51, 52, 53, 54, 55, 200, 201, 202, 203, 204]


@BOTH
def test_a_fork_inherits_the_limit(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6, max_tokens=9)
    cache.fork("a", "b")
    cache.set_limit("a", 6)
    assert cache.limit("b") == 9
    assert [cache.append_token("b") for _ in range(4)] == [True, True, True, False]


@BOTH
def test_a_fork_outlives_its_parent(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6, max_tokens=9)
    fill(cache, "a", 50)
    cache.fork("a", "b")
    assert cache.free_for("a") is True
    cache.allocate_for("c", 8)
    fill(cache, "c", 900)
    assert values(cache, "b") == [50, 51, 52, 53, 54, 55]
    cache.free_for("b")
    cache.free_for("c")
    assert cache.total_allocated == 0


@BOTH
def test_a_fork_that_does_not_fit_is_none(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6, max_tokens=64)
    with unchanged(cache):
        assert cache.fork("a", "b") is None


@BOTH
def test_a_fork_to_a_live_id_is_an_error(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6)
    cache.allocate_for("b", 6)
    for new_id in ("a", "b"):
        with unchanged(cache), pytest.raises(SequenceExists) as caught:
            cache.fork("a", new_id)
        assert caught.value.request_id == new_id


@BOTH
def test_an_empty_sequence_can_be_forked(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6)
    cache.truncate("a", 0)
    assert cache.fork("a", "b").tokens == 0
    assert cache.append_tokens("b", 8) and cache.append_tokens("a", 8)


def test_a_contiguous_fork_is_a_copy(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    cache.fork("a", "b")
    assert (cache.stats().used_blocks, cache.stats().copied_tokens) == (4, 6)
    assert not set(cache.block_table("a").tolist()) & set(cache.block_table("b").tolist())


def test_a_paged_fork_shares_its_blocks(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 6)
    cache.fork("a", "b")
    assert (cache.stats().used_blocks, cache.stats().copied_tokens) == (2, 0)
    assert cache.block_table("a").tolist() == cache.block_table("b").tolist()


def test_the_first_append_after_a_paged_fork_copies_the_partial_block(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 6)
    cache.fork("a", "b")
    assert cache.stats().claimed_blocks == 1
    cache.append_token("a")
    a, b = cache.block_table("a").tolist(), cache.block_table("b").tolist()
    assert a[0] == b[0] and a[1] != b[1]
    stats = cache.stats()
    assert (stats.used_blocks, stats.claimed_blocks, stats.copied_tokens) == (3, 0, 2)
    cache.append_token("b")
    assert cache.block_table("b").tolist() == b


def test_a_paged_fork_at_a_block_boundary_copies_nothing(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 8, max_tokens=12)
    cache.fork("a", "b")
    cache.append_token("a")
    cache.append_token("b")
    assert (cache.stats().used_blocks, cache.stats().copied_tokens) == (4, 0)


def test_a_claimed_copy_is_there_even_in_a_full_pool(make_cache):
    cache = make_cache(1, 1, 4, 16, 4, placement="paged")
    cache.allocate_for("a", 6)
    cache.fork("a", "b")
    assert cache.allocate_for("c", 5) is None
    assert cache.allocate_for("c", 4)
    assert cache.append_token("b") and cache.append_token("a")
    assert cache.is_full


def test_a_cut_into_a_shared_block_needs_a_claim(make_cache):
    cache = make_cache(1, 1, 4, 8, 4, placement="paged")
    cache.allocate_for("a", 8)
    cache.fork("a", "b")
    for tokens in (7, 4, 1):
        with unchanged(cache):
            assert cache.truncate("b", tokens) is False
    cache.free_for("a")
    assert cache.truncate("b", 1) is True


# ---- what has been committed


def committed(cache, request_id):
    grant = cache.fork(request_id, "a fork that only asks")
    cache.free_for("a fork that only asks")
    return grant.cached_tokens


def rows(count):
    return np.zeros((2, count, 4), np.float32)


def test_nothing_is_committed_at_first(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    assert committed(cache, "a") == 0


def test_committed_is_the_least_of_the_layers(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    cache.write("a", 0, rows(8), rows(8))
    assert committed(cache, "a") == 0
    cache.write("a", 1, rows(5), rows(5), start=0)
    assert committed(cache, "a") == 5


def test_a_write_beyond_a_gap_does_not_count(make_cache):
    cache = make_cache(1, 2, 4, 64, 4)
    cache.allocate_for("a", 8)
    cache.write("a", 0, rows(2), rows(2), start=6)
    assert committed(cache, "a") == 0
    cache.write("a", 0, rows(6), rows(6), start=0)
    assert committed(cache, "a") == 6
    cache.write("a", 0, rows(2), rows(2), start=6)
    assert committed(cache, "a") == 8


def test_commit_raises_and_never_lowers(make_cache):
    cache = make_cache(backend="none")
    cache.allocate_for("a", 8)
    cache.commit("a", 6)
    assert committed(cache, "a") == 6
    cache.commit("a", 2)
    assert committed(cache, "a") == 6
    cache.commit("a")
    assert committed(cache, "a") == 8


def test_a_write_at_the_end_of_what_was_committed_extends_it(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    cache.commit("a", 6)
    for layer in range(2):
        cache.write("a", layer, rows(2), rows(2), start=6)
    assert committed(cache, "a") == 8


def test_a_cut_lowers_what_is_committed(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    cache.commit("a")
    cache.truncate("a", 3)
    cache.append_tokens("a", 2)
    assert committed(cache, "a") == 3


def test_a_write_below_what_is_committed_lowers_it_until_all_layers_follow(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    cache.commit("a")
    cache.write("a", 0, rows(3), rows(3), start=2)
    assert committed(cache, "a") == 2
    cache.write("a", 1, rows(3), rows(3), start=2)
    assert committed(cache, "a") == 5


def test_a_commit_beyond_what_is_used_is_an_error(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    with unchanged(cache), pytest.raises(ValueError):
        cache.commit("a", 7)

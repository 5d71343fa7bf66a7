"""Prefixes: what is found, what is not, and where the K/V of what is found are."""

import array
import gc
import weakref

import numpy as np
import pytest
from observation import unchanged
from prompts import fill, leave, planes, run, shows

from kvcache._ids import Tokens

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


@pytest.fixture(params=["contiguous", "paged"])
def cache(make_cache, request):
    """Two layers, 16 blocks of 4 tokens."""
    return make_cache(placement=request.param)


def ids(count, first=0):
    return list(range(first, first + count))


# ---- where the K/V of a hit are


def test_the_next_turn_of_a_conversation_goes_on_where_it_was(make_cache):
    cache = make_cache()
    run(cache, "turn", ids(8))
    place = cache.block_table("turn").tolist()
    cache.free_for("turn")
    before = cache.stats()
    assert run(cache, "next turn", ids(14)).cached_tokens == 8
    after = cache.stats()
    assert cache.block_table("next turn").tolist()[:2] == place
    assert after.revived_tokens - before.revived_tokens == 8
    assert (after.moves, after.copied_tokens, after.moved_cached_tokens) == (0, 0, 0)
    assert after.cached_blocks == 0
    shows(cache, "next turn", ids(14))


def test_a_beginning_that_others_may_want_too_is_copied_out(make_cache):
    cache = make_cache()
    leave(cache, ids(12))
    place = 0
    assert run(cache, "other end", ids(8) + ids(4, 90)).cached_tokens == 8
    assert (cache.stats().copied_tokens, cache.stats().revived_tokens) == (8, 0)
    assert cache.block_table("other end")[0] != place
    assert cache.probe([*ids(12), 1]) == 12
    shows(cache, "other end", ids(8) + ids(4, 90))


def test_where_there_is_no_room_for_both_the_cached_run_is_cut_and_goes_on(make_cache):
    cache = make_cache(2, 2, 4, 16, 4)
    leave(cache, ids(16))
    assert run(cache, "other end", ids(8) + ids(8, 90)).cached_tokens == 8
    stats = cache.stats()
    assert (stats.revived_tokens, stats.copied_tokens, stats.used_blocks) == (8, 0, 4)
    assert stats.evictions_room == 2
    shows(cache, "other end", ids(8) + ids(8, 90))


def test_paged_a_hit_costs_no_copy_and_no_block(make_cache):
    cache = make_cache(placement="paged")
    leave(cache, ids(12))
    run(cache, "one", ids(8) + ids(4, 90))
    run(cache, "two", ids(12) + ids(1, 70))
    assert cache.block_table("one")[:2].tolist() == cache.block_table("two")[:2].tolist()
    assert (cache.stats().copied_tokens, cache.stats().used_blocks) == (0, 5)


def test_paged_a_held_block_is_hit_rather_than_a_cached_one_of_the_same_content(make_cache):
    cache = make_cache(2, 2, 4, 16, 4, placement="paged")
    leave(cache, ids(8))
    run(cache, "same", ids(8))
    cache.allocate_for("crowd", 1)
    assert run(cache, "longer", ids(9)).cached_tokens == 8
    assert cache.is_full
    shows(cache, "longer", ids(9))


def test_paged_writing_into_a_hit_copies_it_first(make_cache):
    cache = make_cache(placement="paged")
    run(cache, "one", ids(9))
    run(cache, "two", ids(9))
    cache.write("two", 0, *[np.full((2, 1, 4), 5, np.float32)] * 2, start=2)
    shows(cache, "one", ids(9))
    assert np.all(cache.get_k_view("two", 0)[:, 2] == 5)
    assert cache.stats().copied_tokens == 4


def test_a_hit_view_of_a_shared_block_is_read_only(make_cache):
    cache = make_cache(placement="paged")
    run(cache, "one", ids(9))
    run(cache, "two", ids(9))
    assert cache.get_k_view("two", 0, copy=None).flags.writeable is False or not cache.is_contiguous("two")
    cache.free_for("one")
    shows(cache, "two", ids(9))


def test_a_live_sequence_is_hit_as_soon_as_it_is_committed(cache):
    cache.allocate_for("live", ids(12))
    assert cache.probe([*ids(12), 1]) == 0
    fill(cache, "live", ids(12))
    assert run(cache, "other", [*ids(12), 1]).cached_tokens == 12
    cache.append_token("live")


def test_two_that_compute_the_same_leave_it_once(cache):
    for name in ("one", "two"):
        cache.allocate_for(name, ids(8))
    for name in ("one", "two"):
        fill(cache, name, ids(8))
    cache.free_for("one")
    cache.free_for("two")
    assert cache.stats().cached_blocks == 2
    assert run(cache, "three", ids(9)).cached_tokens == 8


def test_an_exact_repeat_counts_as_a_use_of_all_of_it(make_cache):
    cache = make_cache(2, 2, 4, 16, 4, placement="paged")
    leave(cache, ids(8))
    leave(cache, ids(4, 50))
    leave(cache, ids(8))
    cache.allocate_for("room", 8)
    assert cache.probe([*ids(8), 1]) == 8
    assert cache.probe([*ids(4, 50), 1]) == 0


# ---- only what is there


def test_a_prefill_cancelled_halfway_leaves_the_whole_blocks_that_were_committed(cache):
    cache.allocate_for("cancelled", ids(16))
    fill(cache, "cancelled", ids(10))
    cache.free_for("cancelled")
    assert cache.stats().cached_blocks == 2
    assert run(cache, "again", ids(16)).cached_tokens == 8
    shows(cache, "again", ids(16))


def test_a_step_whose_last_layer_was_never_written_leaves_nothing(cache):
    cache.allocate_for("half", ids(12))
    cache.write("half", 0, *planes(cache, 0, ids(12)))
    assert cache.probe([*ids(12), 1]) == 0
    cache.free_for("half")
    assert (cache.probe([*ids(12), 1]), cache.stats().cached_blocks) == (0, 0)


def test_a_write_beyond_a_gap_leaves_what_is_before_the_gap(cache):
    cache.allocate_for("gap", ids(16))
    for layer in range(2):
        rows = planes(cache, layer, ids(16))
        cache.write("gap", layer, *[plane[:, 8:] for plane in rows], start=8)
        cache.write("gap", layer, *[plane[:, :4] for plane in rows], start=0)
    cache.free_for("gap")
    assert cache.probe([*ids(16), 1]) == 4


def test_layers_written_out_of_order_are_found_when_the_last_one_is_there(cache):
    cache.allocate_for("live", ids(8))
    cache.write("live", 1, *planes(cache, 1, ids(8)))
    assert cache.probe([*ids(8), 1]) == 0
    cache.write("live", 0, *planes(cache, 0, ids(8)))
    assert cache.probe([*ids(8), 1]) == 8


def test_a_write_below_what_is_committed_takes_it_out_of_the_index(cache):
    run(cache, "live", ids(12))
    cache.write("live", 0, *[plane[:, :1] for plane in planes(cache, 0, ids(12))], start=5)
    assert cache.probe([*ids(12), 1]) == 4
    cache.free_for("live")
    assert cache.stats().cached_blocks == 1


def test_truncated_drafts_leave_nothing(cache):
    run(cache, "live", ids(8), max_new_tokens=20)
    cache.append_tokens("live", ids(8, 8))
    fill(cache, "live", ids(16), 8)
    assert cache.probe([*ids(16), 1]) == 16
    cache.truncate("live", 8)
    cache.append_tokens("live", ids(4, 80))
    fill(cache, "live", ids(8) + ids(4, 80), 8)
    cache.free_for("live")
    assert cache.probe([*ids(16), 1]) == 8
    assert run(cache, "other", [*ids(8), *ids(4, 80), 1]).cached_tokens == 12


def test_what_a_fork_cuts_is_forgotten_although_its_parent_had_entered_it(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("parent", ids(8))
    cache.fork("parent", "child")
    cache.commit("parent")
    cache.free_for("parent")
    assert cache.probe([*ids(8), 1]) == 8
    assert cache.truncate("child", 0) is True
    assert (cache.stats().cached_blocks, cache.probe([*ids(8), 1])) == (0, 0)


def test_commit_says_that_what_came_otherwise_is_there(cache):
    cache.allocate_for("live", ids(12))
    cache.commit("live", 9)
    assert cache.probe([*ids(12), 1]) == 8
    cache.commit("live", 3)
    assert cache.probe([*ids(12), 1]) == 8
    cache.commit("live")
    assert cache.probe([*ids(12), 1]) == 12


def test_counted_tokens_are_never_found(cache):
    cache.allocate_for("counted", 8, max_new_tokens=8)
    cache.append_tokens("counted", 4)
    cache.commit("counted")
    cache.append_token("counted", 4)
    cache.free_for("counted")
    assert (cache.stats().cached_blocks, cache.stats().queries) == (0, 0)


def test_without_prefix_cache_nothing_is_kept(make_cache):
    cache = make_cache(prefix_cache=False)
    run(cache, "one", ids(12))
    assert cache.probe(ids(13)) == 0
    cache.free_for("one")
    assert run(cache, "two", ids(12)).cached_tokens == 0
    cache.append_token("two")
    stats = cache.stats()
    assert (stats.cached_blocks, stats.hit_tokens, stats.misses_disabled) == (0, 0, 2)
    assert stats.queries == 2


# ---- names


def test_the_answer_is_found_however_its_tokens_were_named(cache):
    named = {
        "one by one": lambda name: [cache.append_token(name, token) for token in ids(4, 8)],
        "at once": lambda name: cache.append_tokens(name, ids(4, 8)),
        "array": lambda name: cache.append_tokens(name, np.array(ids(4, 8))),
        "later": lambda name: (cache.append_tokens(name, 4), cache.set_tokens(name, ids(4, 8))),
        "from where": lambda name: (cache.append_tokens(name, 4), cache.set_tokens(name, ids(5, 7), start=7)),
        "batch": lambda name: cache.batch([name]).append(ids(4, 8), counts=4),
    }
    for name, append in named.items():
        run(cache, name, ids(8), max_new_tokens=20)
        append(name)
        fill(cache, name, ids(12), 8)
        assert cache.probe([*ids(12), 1]) == 12, name
        cache.truncate(name, 0)
        cache.free_for(name)
        cache.clear_prefix_cache()


def test_a_batch_names_its_step_afterwards(cache):
    for name in ("a", "b"):
        run(cache, name, [ord(name), *ids(6)], max_new_tokens=4)
    batch = cache.batch(["a", "b"])
    batch.append()
    batch.set_tokens([70, 80])
    for name, token in (("a", 70), ("b", 80)):
        fill(cache, name, [ord(name), *ids(6), token], 7)
    assert cache.probe([ord("a"), *ids(6), 70, 1]) == 8
    assert cache.probe([ord("b"), *ids(6), 80, 1]) == 8
    assert cache.probe([ord("b"), *ids(6), 70, 1]) == 4


def test_a_gap_in_the_names_stops_what_is_known(cache):
    run(cache, "live", ids(8), max_new_tokens=20)
    cache.append_tokens("live", 1)
    cache.append_tokens("live", ids(7, 9))
    fill(cache, "live", ids(16), 8)
    assert cache.probe([*ids(16), 1]) == 8
    cache.set_tokens("live", ids(8, 8))
    assert cache.probe([*ids(16), 1]) == 16


def test_a_counted_prompt_that_is_named_is_found(cache):
    cache.allocate_for("live", 8)
    fill(cache, "live", ids(8))
    cache.set_tokens("live", ids(8))
    assert run(cache, "other", [*ids(8), 1]).cached_tokens == 8


def test_what_a_fork_that_has_gone_has_named_keeps_its_name(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 8)
    cache.commit("a")
    cache.fork("a", "b")
    cache.set_tokens("a", ids(1))
    cache.set_tokens("b", ids(8))
    cache.free_for("b")
    with unchanged(cache), pytest.raises(ValueError, match="another id already"):
        cache.set_tokens("a", [9])
    assert cache.probe([*ids(8), 1]) == 8
    cache.set_tokens("a", ids(7, 1))
    cache.free_for("a")
    assert cache.probe([*ids(8), 1]) == 8


def test_a_counted_prompt_that_is_named_is_found_under_its_salt_alone(cache):
    cache.allocate_for("live", 8, salt="ours")
    fill(cache, "live", ids(8))
    cache.fork("live", "fork")
    cache.set_tokens("live", ids(8))
    cache.free_for("live")
    assert cache.probe([*ids(8), 1]) == 0
    assert run(cache, "other", [*ids(8), 1], salt="ours").cached_tokens == 8


def test_a_fork_knows_what_its_parent_knows(cache):
    run(cache, "parent", ids(6), max_new_tokens=10, salt="ours")
    cache.fork("parent", "child")
    cache.append_tokens("child", ids(2, 60))
    fill(cache, "child", ids(6) + ids(2, 60), 6)
    cache.append_tokens("parent", ids(2, 6))
    fill(cache, "parent", ids(8), 6)
    assert cache.probe([*ids(8), 1], salt="ours") == 8
    assert cache.probe([*ids(6), *ids(2, 60), 1], salt="ours") == 8
    assert cache.probe([*ids(8), 1]) == 0


def test_another_name_for_a_token_is_refused(cache):
    run(cache, "live", ids(8), max_new_tokens=8)
    cache.append_tokens("live", 2)
    with unchanged(cache):
        for tokens, start in (([1], 0), ([8, 9, 10], None), ([9], 9), ([8], 10)):
            with pytest.raises(ValueError, match=r"\d"):
                cache.set_tokens("live", tokens, start)
    cache.set_tokens("live", [8])
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        cache.set_tokens("live", [7], start=8)
    cache.set_tokens("live", ids(10), start=0)


# ---- ids in whatever form

FORMS = {
    "list": list,
    "tuple": tuple,
    "range": lambda tokens: range(tokens[0], tokens[-1] + 1),
    "Tokens": Tokens,
    "int32": lambda tokens: np.array(tokens, np.int32),
    "int64": lambda tokens: np.array(tokens, np.int64),
    "uint16": lambda tokens: np.array(tokens, np.uint16),
    "big-endian": lambda tokens: np.array(tokens, ">i4"),
    "strided": lambda tokens: np.repeat(np.array(tokens, np.int32), 2)[::2],
    "reversed": lambda tokens: np.array(tokens[::-1], np.int32)[::-1],
    "array.array": lambda tokens: array.array("i", tokens),
    "array of long": lambda tokens: array.array("q", tokens),
    "memoryview": lambda tokens: memoryview(np.array(tokens, np.int32)),
    "read-only": lambda tokens: np.frombuffer(np.array(tokens, np.int32).tobytes(), np.int32),
    "mlx": lambda tokens: pytest.importorskip("mlx.core").array(tokens),
    "mlx uint32": lambda tokens: pytest.importorskip("mlx.core").array(
        tokens, pytest.importorskip("mlx.core").uint32
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_ids_are_the_same_in_every_form(cache, form):
    leave(cache, ids(12, 100))
    assert cache.probe(form(ids(13, 100))) == 12
    assert cache.allocate_for("hit", form(ids(13, 100)), max_new_tokens=8).cached_tokens == 12
    assert cache.append_tokens("hit", form(ids(3, 113))) is True
    cache.commit("hit")
    assert cache.probe(form(ids(17, 100))) == 16


def test_an_array_is_not_kept(cache):
    prompt = np.array(ids(12), np.int32)
    gone = weakref.ref(prompt)
    run(cache, "one", prompt)
    prompt[:] = 9
    assert cache.probe(ids(13)) == 12
    del prompt
    gc.collect()
    assert gone() is None


# ---- salts


def test_salts_are_equal_when_type_and_value_are(cache):
    salts = [None, 1, True, 1.0, "1", b"1", (1,), 0, False, ""]
    for salt in salts[:4]:
        leave(cache, ids(8), salt=salt)
    assert [cache.probe(ids(9), salt=salt) for salt in salts] == [8] * 4 + [0] * 6
    assert cache.stats().cached_blocks == 8


# ---- counting


def test_queries_hits_and_misses_are_counted(cache):
    leave(cache, ids(8))  # cold
    run(cache, "short", ids(3))  # no whole block to look for
    run(cache, "hit", ids(9))
    run(cache, "salted", ids(9), salt="new")
    stats = cache.stats()
    assert (stats.queries, stats.query_tokens, stats.hit_tokens) == (4, 8 + 3 + 9 + 9, 8)
    assert (stats.misses_cold, stats.misses_partial, stats.misses_salted, stats.misses_evicted) == (
        1,
        1,
        1,
        0,
    )


def test_what_was_there_once_is_missed_as_evicted(cache):
    leave(cache, ids(8))
    cache.allocate_for("all", 64)
    cache.free_for("all")
    run(cache, "again", ids(9))
    assert (cache.stats().misses_evicted, cache.stats().evictions_room) == (1, 2)


def test_an_evicted_end_is_not_found_while_its_tokens_still_lie_there(cache):
    leave(cache, ids(32))
    assert cache.allocate_for("counted", 36)  # 9 of 16 blocks: one makes room, and gets no tokens
    assert (cache.stats().evictions_room, cache.probe(ids(33))) == (1, 28)
    run(cache, "again", ids(28))
    assert cache.probe(ids(33)) == 28


def test_what_was_entered_next_is_found_after_its_own_beginning_alone(cache):
    one, other, rest = ids(4), ids(4, 100), ids(4, 200)
    leave(cache, other)
    leave(cache, one)
    leave(cache, other + rest)
    assert (cache.probe(one + rest + [0]), cache.probe(other + rest + [0])) == (4, 8)


def test_conversations_that_grow_in_turns_are_found_whole(cache):
    prompts = {name: ids(28, 100 * name) for name in (1, 2)}
    for name in prompts:
        run(cache, name, prompts[name][:4], max_tokens=28)
    for at in range(4, 28, 4):
        for name in prompts:
            cache.append_tokens(name, prompts[name][at : at + 4])
            fill(cache, name, prompts[name][: at + 4], start=at)
    assert [cache.probe([*prompts[name], 0]) for name in prompts] == [28, 28]
    assert cache.probe(prompts[1][:8] + prompts[2][8:]) == 8


def test_a_probe_leaves_no_trace(cache):
    leave(cache, ids(8))
    before = cache.stats()
    with unchanged(cache):
        assert cache.probe(ids(9)) == 8
    assert tuple(cache.stats())[:-10] == tuple(before)[:-10]
    assert cache.stats().queries == before.queries


def test_cached_blocks_are_free_memory(cache):
    leave(cache, ids(32))
    stats = cache.stats()
    assert (stats.cached_blocks, stats.free_blocks, stats.used_blocks) == (8, 16, 0)
    assert (cache.total_allocated, cache.fragmentation, stats.largest_free_run) == (0, 0.0, 16)
    assert cache.allocate_for("all", 64)
    assert cache.stats().evictions_room == 8


# ---- the same calls, the same places


@BOTH
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority", "worth"])
def test_the_same_calls_give_the_same_places_and_evictions(make_cache, placement, policy):
    def course():
        cache = make_cache(1, 1, 2, 96, 4, placement=placement, policy=policy)
        chance = np.random.default_rng(5)
        live, told = [], []
        for number in range(400):
            if live and chance.random() < 0.5:
                cache.free_for(live.pop(int(chance.integers(len(live)))))
            else:
                prompt = chance.integers(0, 2, chance.integers(1, 30)).tolist()
                grant = run(cache, number, prompt, salt=[None, "a", 1][number % 3], max_new_tokens=3)
                live += [number] if grant else []
                told.append(grant and (grant.cached_tokens, cache.block_table(number).tolist()))
        return told, cache.stats().evicted_blocks, cache.stats().hit_tokens, cache.stats().moved_tokens

    first = course()
    assert course() == first
    assert first[1] > 20
    assert first[2] > 20


# ---- pins


def test_a_pin_that_has_been_cleared_before_it_is_noted_is_no_pin(cache):
    class Name:
        clears = True

        def __hash__(self):
            if self.clears and cache.stats().pinned_blocks:
                self.clears = False
                cache.clear_prefix_cache()
            return 1

    name = Name()
    run(cache, name, ids(8))
    assert cache.pin(name) == 8
    assert cache.stats().pinned_blocks == 0
    leave(cache, ids(8))
    assert cache.pin(tokens=ids(8)) == 8
    assert cache.unpin(name) == 0
    assert cache.stats().pinned_blocks == 2
    assert cache.unpin(tokens=ids(8)) == 8
    assert cache.stats().pinned_blocks == 0


# ---- the clock


def test_the_clock_is_read_once_by_each_call_that_uses_time_and_by_no_other(make_cache):
    reads = []
    cache = make_cache(clock=lambda: reads.append(1) or float(len(reads)))
    timed = [
        lambda: cache.allocate_for("a", ids(6), max_new_tokens=9),
        lambda: cache.allocate_for("full", 64, max_new_tokens=0),
        lambda: cache.fork("a", "b"),
        lambda: cache.commit("a"),
        lambda: cache.free_for("b"),
    ]
    for call in timed:
        before = len(reads)
        call()
        assert len(reads) == before + 1
    before = len(reads)
    cache.append_token("a", 6)
    cache.append_tokens("a", ids(2, 7))
    cache.write("a", 0, *[np.zeros((2, 1, 4), np.float32)] * 2)
    cache.truncate("a", 7)
    cache.set_limit("a", 16)
    cache.probe(ids(9))
    cache.stats()
    cache.batch(["a"]).append([7])
    cache.free_for("unknown")
    assert len(reads) == before


def test_a_clock_may_call_the_cache(make_cache):
    """It is never read under the lock."""
    told = []

    def clock():
        if caches:
            told.append((caches[0].stats().num_sequences, caches[0].probe(ids(9))))
            caches[0].check()
        return float(len(told))

    caches = []
    cache = make_cache(clock=clock)
    caches.append(cache)
    run(cache, "a", ids(8))
    cache.fork("a", "b")
    cache.commit("b")
    cache.free_for("a")
    cache.free_for("b")
    assert len(told) == 5
    caches.clear()


def test_a_clock_that_fails_has_changed_nothing(make_cache):
    failing = []

    def clock():
        if failing:
            raise OSError("no time")
        return 1.0

    cache = make_cache(clock=clock)
    run(cache, "a", ids(8))
    failing.append(1)
    for call in (
        lambda: cache.allocate_for("b", ids(4)),
        lambda: cache.fork("a", "b"),
        lambda: cache.commit("a"),
        lambda: cache.free_for("a"),
    ):
        with unchanged(cache), pytest.raises(OSError, match="no time"):
            call()
    failing.clear()
    assert cache.free_for("a") is True
    assert cache.probe([*ids(8), 1]) == 8


# ---- finalizers and holds


def test_a_finalizer_may_free_what_is_then_found(cache):
    class Request:
        def __init__(self, name):
            self.name = name
            run(cache, name, ids(8))

        def __del__(self):
            cache.free_for(self.name)

    request = Request("a")
    del request
    gc.collect()
    assert (len(cache), cache.stats().cached_blocks) == (0, 2)
    assert run(cache, "b", ids(9)).cached_tokens == 8


def test_what_is_freed_inside_a_hold_is_found_inside_it_where_nothing_moves(make_cache):
    cache = make_cache(placement="paged")
    run(cache, "a", ids(8))
    with cache.hold():
        cache.free_for("a")
        assert cache.stats().used_blocks == 2
        assert run(cache, "b", ids(9)).cached_tokens == 8
        assert cache.stats().used_blocks == 3
        cache.free_for("b")
    assert (cache.stats().used_blocks, cache.stats().cached_blocks) == (0, 2)
    assert cache.probe(ids(9)) == 8


def test_freed_inside_a_hold_is_evicted_only_after_it(cache):
    run(cache, "a", ids(32))
    with cache.hold():
        cache.free_for("a")
        view = cache.stats()
        assert (view.used_blocks, view.cached_blocks) == (8, 0)
        assert cache.probe([*ids(32), 1]) == 32
    assert cache.stats().cached_blocks == 8
    assert cache.allocate_for("all", 64)
    assert cache.probe([*ids(32), 1]) == 0

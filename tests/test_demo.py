"""The demonstration's engine loop, on bookkeeping alone and on a model, and that it cannot be fooled."""

import functools
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from kvcache import KVCache, demo


class Arithmetic:
    """A decoder without a model: the next token follows from all tokens before it."""

    def __init__(self, cache):
        self.cache = cache
        self.seen = {}
        self.batches = []
        self.computed = 0  # tokens of prompts

    def prefill(self, request_id, prompt, cached_tokens):
        assert self.cache.used_tokens(request_id) == len(prompt)
        self.cache.commit(request_id)
        self.computed += len(prompt) - cached_tokens
        self.seen[request_id] = list(prompt)
        return next_token(prompt)

    def step(self, tokens):
        self.batches.append(len(tokens))
        for request_id, token in zip(self.seen, tokens, strict=True):
            assert self.cache.append_token(request_id, token)
            self.cache.commit(request_id)
            self.seen[request_id].append(token)
        return [next_token(seen) for seen in self.seen.values()]

    def finish(self, request_id):
        del self.seen[request_id]
        self.cache.free_for(request_id)

    def alone(self, prompt, num_tokens):
        seen, choices = list(prompt), []
        for _ in range(num_tokens):
            choices.append(next_token(seen))
            seen.append(choices[-1].token)
        return choices


def next_token(seen):
    return SimpleNamespace(
        token=sum(i * token for i, token in enumerate(seen, 1)) % 97, logprob=-1.0, margin=0.5
    )


@pytest.fixture
def decoder():
    with KVCache(1, 1, 1, 512, 8, backend="none") as cache:
        yield Arithmetic(cache)
        cache.check()


def requests_of(count, arena_tokens=512, seed=0, turns=1):
    return demo.make_requests(count, demo.random_ids(1000, 97, seed), arena_tokens, seed, turns)


def all_turns(opening, answers):
    """A conversation whose answers are told."""
    request, answers = opening, iter(answers)
    while request is not None:
        yield request
        request = request.following(next(answers))


# --- requests -----------------------------------------------------------------------------------------------


def test_requests_are_their_seeds():
    assert requests_of(5) == requests_of(5)
    assert requests_of(5) != requests_of(5, seed=1)
    assert [request.request_id for request in requests_of(3)] == ["r000", "r001", "r002"]


def test_lengths_spread_like_a_chat_services():
    requests = requests_of(2000, arena_tokens=2**20)
    prompts = [len(request.prompt) for request in requests]
    outputs = [request.num_tokens for request in requests]
    for lengths, median, sigma in ((prompts, 64, 0.8), (outputs, 36, 0.65)):
        assert np.median(lengths) == pytest.approx(median, rel=0.1)
        assert np.std(np.log(lengths)) == pytest.approx(sigma, rel=0.1)


def test_no_request_takes_more_than_a_quarter_of_the_arena():
    assert max(len(request.prompt) + request.num_tokens for request in requests_of(500, 128)) <= 32


def test_prompts_are_cut_from_the_corpus_and_go_round():
    requests = demo.make_requests(50, range(10), 4096, 0)
    for request in requests:
        assert all((b - a) % 10 == 1 for a, b in zip(request.prompt, request.prompt[1:], strict=False))


def test_a_turn_repeats_what_was_said_before():
    opening = demo.Request("r", (1, 2), 3, later=(demo.Message((7,), 2), demo.Message((8, 9), 4)))
    turns = list(all_turns(opening, [(4, 5, 6), (10, 11), ()]))
    assert [turn.prompt for turn in turns] == [
        (1, 2),
        (1, 2, 4, 5, 6, 7),
        (1, 2, 4, 5, 6, 7, 10, 11, 8, 9),
    ]
    assert [(turn.request_id, turn.num_tokens) for turn in turns] == [("r", 3), ("r.2", 2), ("r.3", 4)]


def test_conversations_begin_with_few_system_prompts():
    openings = requests_of(12, 4096, turns=2)
    assert len({opening.prompt[:96] for opening in openings}) == 3
    assert len({opening.prompt for opening in openings}) == 12
    assert [len(opening.later) for opening in openings] == [1] * 12


@pytest.mark.parametrize(("arena_tokens", "turns"), [(128, 3), (512, 3), (512, 12), (4096, 3), (4096, 116)])
def test_no_conversation_takes_more_than_a_quarter_of_the_arena(arena_tokens, turns):
    for opening in requests_of(50, arena_tokens, turns=turns):
        *_, last = all_turns(opening, ((0,) * each.num_tokens for each in (opening, *opening.later)))
        assert last.turn == turns
        assert len(last.prompt) + last.num_tokens <= arena_tokens // 4


def test_conversations_that_would_not_fit_are_refused():
    assert demo.most_turns(4096) == 116
    with pytest.raises(ValueError, match="117 turns, an arena of 4096 tokens has room for 116"):
        requests_of(1, 4096, turns=117)


# --- serving ------------------------------------------------------------------------------------------------


def test_everyone_is_served_and_the_cache_is_empty_again(decoder):
    requests = requests_of(30)
    serving = demo.Serving(decoder, requests)
    serving.run(lambda progress: None)
    assert {name: len(choices) for name, choices in serving.choices.items()} == {
        request.request_id: request.num_tokens for request in requests
    }
    assert len(decoder.cache) == 0
    assert serving.largest_batch == max(decoder.batches) > 4
    assert serving.steps == len(decoder.batches)


def test_requests_are_admitted_in_the_order_of_the_queue(decoder):
    requests = requests_of(30)
    serving = demo.Serving(decoder, requests)
    serving.run(lambda progress: None)
    assert list(serving.choices) == [request.request_id for request in requests]


def test_a_request_of_one_token_never_joins_a_batch(decoder):
    serving = demo.Serving(decoder, [demo.Request("one", (1, 2, 3), 1)])
    serving.run(lambda progress: None)
    assert len(serving.choices["one"]) == 1
    assert decoder.batches == []


def test_an_idle_cache_that_refuses_is_an_error_not_an_endless_wait(decoder):
    decoder.cache.allocate_for("somebody", 500)
    with pytest.raises(RuntimeError, match="r000 is refused by an idle cache"):
        demo.Serving(decoder, requests_of(3)).run(lambda progress: None)


def test_progress_adds_up(decoder):
    requests, seen = requests_of(20), []
    result = demo.run(decoder, requests, seen.append)
    for progress in seen:
        if progress.phase == "serve":
            assert progress.finished + progress.waiting + len(progress.live) == 20
    served = [progress for progress in seen if progress.phase == "serve"]
    assert [progress.tokens for progress in served] == sorted(progress.tokens for progress in served)
    assert served[-1].tokens == seen[-1].tokens == result.tokens
    assert seen[-1].finished == 20


def test_a_result_says_what_happened(decoder):
    requests = requests_of(20)
    result = demo.run(decoder, requests)
    assert result.equal
    assert result.difference is None
    assert result.requests == 20
    assert result.tokens == sum(request.num_tokens for request in requests)
    assert result.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert result.moves == decoder.cache.stats().moves
    assert 0 < result.peak_used_blocks <= result.num_blocks == 64
    assert (result.smallest_margin, result.largest_logprob_difference) == (0.5, 0.0)
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert json.loads(json.dumps(result.as_dict()))["equal"] is True


# --- conversations ------------------------------------------------------------------------------------------


def test_every_turn_of_every_conversation_is_answered(decoder):
    openings = requests_of(10, turns=3)
    result = demo.run(decoder, openings)
    assert result.equal
    assert (result.requests, result.turns) == (30, 3)
    assert result.tokens == sum(each.num_tokens for one in openings for each in (one, *one.later))
    assert len(decoder.cache) == 0


def test_what_was_skipped_is_what_was_not_computed(decoder):
    result = demo.run(decoder, requests_of(10, turns=3))
    assert result.skipped_tokens == result.prompt_tokens - decoder.computed > 0
    assert result.skipped_share == pytest.approx(result.skipped_tokens / result.prompt_tokens)
    assert result.skipped_tokens == result.revived_tokens + result.copied_tokens + result.shared_tokens
    assert result.skipped_tokens == decoder.cache.stats().hit_tokens
    assert [turn.requests for turn in result.by_turn] == [10, 10, 10]
    assert sum(turn.prompt_tokens for turn in result.by_turn) == result.prompt_tokens
    assert all(turn.hits <= turn.requests for turn in result.by_turn)


def test_alone_in_the_arena_a_conversation_finds_all_whole_blocks_of_its_last_turn(decoder):
    (opening,) = requests_of(1, turns=4)
    serving = demo.Serving(decoder, [opening])
    serving.run(lambda progress: None)
    requests, there = list(serving.admitted), list(serving.admitted.values())
    expected = [
        (len(before.prompt) + before.num_tokens - 1) // 8 * 8  # the last token was never put in
        for before in requests[:-1]
    ]
    assert there == [0, *expected]
    assert decoder.cache.stats().revived_tokens == sum(expected)


def test_conversations_under_way_go_before_those_that_have_not_begun(decoder):
    serving = demo.Serving(decoder, requests_of(30, turns=2))
    begun, waiting = set(), []

    def watch(progress):
        begun.update(serving.choices)
        waiting.append([request.turn for request in serving.waiting])

    serving.run(watch)
    assert all(turns == sorted(turns, reverse=True) for turns in waiting)
    assert any({1, 2} <= set(turns) for turns in waiting)
    order = [request.turn for request in serving.admitted]
    assert order.index(2) < len(order) - 1 - order[::-1].index(1)


def test_without_a_prefix_cache_nothing_is_skipped():
    with KVCache(1, 1, 1, 512, 8, backend="none", prefix_cache=False) as cache:
        decoder = Arithmetic(cache)
        result = demo.run(decoder, requests_of(10, turns=3))
    assert (result.skipped_tokens, result.skipped_share, decoder.computed) == (0, 0.0, result.prompt_tokens)


def test_the_replay_repeats_its_own_answers(decoder):
    """A wrong answer that was served does not reach the prompts that it is compared by."""
    (opening,) = requests_of(1, turns=2)
    prompts, alone = [], decoder.alone
    decoder.alone = lambda prompt, num_tokens: prompts.append(prompt) or alone(prompt, num_tokens)
    step = decoder.step
    decoder.step = lambda tokens: [SimpleNamespace(token=1, logprob=0.0, margin=0.0) for _ in step(tokens)]
    result = demo.run(decoder, [opening])
    assert (result.difference.request_id, result.difference.position) == ("r000", 1)
    right = [choice.token for choice in alone(opening.prompt, opening.num_tokens)]
    assert prompts == [opening.prompt, (*opening.prompt, *right, *opening.later[0].text)]


def test_progress_counts_all_turns(decoder):
    seen = []
    demo.run(decoder, requests_of(8, turns=3), seen.append)
    assert {progress.requests for progress in seen} == {24}
    assert [progress.finished for progress in seen if progress.phase == "replay"] == list(range(1, 25))
    assert seen[-1].waiting == 0


# --- comparing ----------------------------------------------------------------------------------------------


def choices_of(*tokens):
    return [SimpleNamespace(token=token, margin=0.25) for token in tokens]


def test_the_first_difference_is_that_of_the_first_request():
    requests = [demo.Request(name, (1,), 3) for name in "abc"]
    alone = {name: choices_of(1, 2, 3) for name in "abc"}
    served = {"a": choices_of(1, 2, 3), "b": choices_of(1, 9, 8), "c": choices_of(0, 0, 0)}
    difference = demo.first_difference(requests, served, alone)
    assert difference == demo.Difference("b", 1, expected=2, got=9, margin=0.25)
    assert "request b differs at decoded token 1: 9 from the arena (won by" in str(difference)


@pytest.mark.parametrize(
    ("served", "alone", "position"),
    [
        ((1, 2), (1, 2, 3), 2),
        ((1, 2, 3), (1, 2), 2),
        ((1, 2), (1, 2), 2),
        ((), (), 0),
        ((1, 2, 3, 4), (1, 2, 3), 3),
    ],
)
def test_missing_and_extra_tokens_are_differences(served, alone, position):
    requests = [demo.Request("a", (1,), 3)]
    difference = demo.first_difference(requests, {"a": choices_of(*served)}, {"a": choices_of(*alone)})
    assert (difference.request_id, difference.position) == ("a", position)
    assert difference.got is None or difference.expected is None
    assert str(difference)


def test_equal_tokens_are_no_difference():
    requests = [demo.Request("a", (1,), 2)]
    assert demo.first_difference(requests, {"a": choices_of(1, 2)}, {"a": choices_of(1, 2)}) is None


# --- on a model ---------------------------------------------------------------------------------------------


@pytest.fixture
def bridge():
    mx = pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    mx.disable_compile()
    from kvcache import mlx_lm

    return mlx_lm


def run_on_a_model(bridge, corrupt=lambda cache, decoder: None, placement="contiguous", count=12, turns=1):
    model = bridge.random_llama(0)
    requests = demo.make_requests(count, demo.random_ids(1000, 512, 0), 768, 0, turns)
    with bridge.cache_for(model, 768, placement=placement) as cache:
        decoder = bridge.Decoder(model, cache)
        corrupt(cache, decoder)
        decoder.alone = functools.partial(alone_once, decoder.alone)
        result = demo.run(decoder, requests)
        cache.check()
    return result


ALONE = {}  # prompt -> choices: model and prompts are the same in every test


def alone_once(alone, prompt, num_tokens):
    if prompt not in ALONE:
        ALONE[prompt] = alone(prompt, num_tokens)
    return ALONE[prompt]


def test_sequences_move_and_every_token_is_right(bridge):
    result = run_on_a_model(bridge)
    assert result.difference is None
    assert result.moves > 0
    assert result.arena_copies == 0
    assert result.largest_batch >= 5
    assert result.distinct_tokens > 100  # the tokens of a model stuck on one would prove little
    assert result.largest_logprob_difference < 1e-3


def test_a_paged_arena_gives_the_same_tokens(bridge):
    result = run_on_a_model(bridge, placement="paged")
    assert result.difference is None
    assert result.moves == 0


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_conversations_on_a_model_skip_prefill_and_every_token_is_right(bridge, placement):
    fed = []

    def count_prefill(cache, decoder):
        prefill, model = decoder.prefill, decoder.model

        def counted(*arguments):
            decoder.model = lambda ids, cache: fed.append(ids.size) or model(ids, cache=cache)
            choice = prefill(*arguments)
            decoder.model = model
            return choice

        decoder.prefill = counted

    result = run_on_a_model(bridge, count_prefill, placement, count=5, turns=3)
    assert result.difference is None
    assert result.largest_logprob_difference < 1e-3
    assert result.skipped_tokens == result.prompt_tokens - sum(fed) > 0
    assert result.by_turn[2].hits > 0
    ways = {"contiguous": result.revived_tokens, "paged": result.shared_tokens}
    assert ways[placement] > 0


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_wrong_prefix_is_found_out(bridge, placement):
    """K and V of what is cached are overwritten, as a wrong hit would have them."""

    def spoil(cache, decoder):
        finish = decoder.finish

        def spoiling(request_id):
            table = cache.block_table(request_id)
            finish(request_id)
            slots = (table[:1] * cache.spec.block_size)[:, None] + np.arange(cache.spec.block_size)
            for plane in cache.arena.planes[1].values():
                if cache._owners()[table[0]] < 0:
                    np.asarray(memoryview(plane))[:, slots.ravel()] = 0

        decoder.finish = spoiling

    result = run_on_a_model(bridge, spoil, placement, count=4, turns=3)
    assert result.skipped_tokens > 0
    assert not result.equal
    assert "." in result.difference.request_id  # a later turn, the first ones had nothing wrong to find


def forget_v_of_one_token(cache, decoder):
    """The first token of one prompt, in one layer: V stays what it was."""
    import mlx.core as mx

    write = cache.write

    def lossy(request_id, layer, k, v, start=None):
        if layer == 1 and request_id == "r003":
            v = mx.concatenate([mx.zeros_like(v[:, :1]), v[:, 1:]], axis=1)
        write(request_id, layer, k, v, start=start)

    cache.write = lossy


def swap_two_rows_of_one_step(cache, decoder):
    """In one step, the first two members get each other's K and V."""
    steps = []

    def swapped(write, layer, k, v):
        steps.append(layer)
        if steps.count(layer) == 5:
            order = np.array([1, 0, *range(2, k.shape[0])]).tolist()
            k, v = k[order], v[order]
        write(layer, k, v)

    decoder.rows.batch = Spied(decoder.rows.batch, write=swapped)


def read_a_neighbour(cache, decoder):
    """Views of one sequence begin a block too early."""
    views = cache.get_kv_views

    def shifted(request_id, layer):
        k, v = views(request_id, layer)
        slot = (int(cache.block_table(request_id)[0]) - 1) * cache.spec.block_size
        if request_id != "r004" or slot < 0:
            return k, v
        return tuple(plane[:, slot : slot + k.shape[1]] for plane in cache.arena.planes[layer].values())

    cache.get_kv_views = shifted


def lose_the_moves_of_an_append(cache, decoder):
    """What moved is afterwards where it was: as if the moves of decode steps had copied nothing."""

    def forgetful(append, *arguments):
        planes = [plane for layer in cache.arena.planes for plane in layer.values()]
        before, moves = [np.array(plane) for plane in planes], cache.stats().moves
        granted = append(*arguments)
        if cache.stats().moves != moves:
            for plane, old in zip(planes, before, strict=True):
                np.asarray(memoryview(plane))[:] = old
        return granted

    decoder.rows.batch = Spied(decoder.rows.batch, append=forgetful)


class Spied:
    """An object with some methods wrapped."""

    def __init__(self, inner, **wrapped):
        self._inner = inner
        for name, wrapper in wrapped.items():
            setattr(self, name, functools.partial(wrapper, getattr(inner, name)))

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.mark.parametrize(
    "corrupt",
    [forget_v_of_one_token, swap_two_rows_of_one_step, read_a_neighbour, lose_the_moves_of_an_append],
)
def test_wrong_k_v_are_found_out(bridge, corrupt):
    result = run_on_a_model(bridge, corrupt)
    assert not result.equal
    assert result.difference.got != result.difference.expected
    assert result.largest_logprob_difference > 1e-3


# --- the view -----------------------------------------------------------------------------------------------


@pytest.fixture
def view():
    pytest.importorskip("rich")
    from kvcache import demo_view

    return demo_view


def console_of(terminal, width=100):
    from rich.console import Console

    return Console(
        file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False
    )


def test_on_a_terminal_the_arena_is_drawn_as_it_changes(view, decoder):
    console = console_of(True)
    with view.DemoView(console) as watch:
        demo.run(decoder, requests_of(20), watch)
    text = console.file.getvalue()
    assert "20/20 requests" in text
    assert "█" in text
    assert "serving from one arena" in text
    assert "replaying one by one" in text


def test_elsewhere_each_phase_is_a_line(view, decoder):
    console = console_of(False)
    with view.DemoView(console) as watch:
        demo.run(decoder, requests_of(20), watch)
    assert console.file.getvalue().splitlines() == [
        "serving from one arena: 20 requests ...",
        "replaying one by one: 20 requests ...",
    ]


def test_the_map_shows_who_holds_which_block(view, decoder):
    decoder.cache.allocate_for("a", 16)
    decoder.cache.allocate_for("b", 8)
    progress = demo.Progress("serve", 2, 0, 2, 1.0, 0, ("a", "b"), decoder.cache)
    console = console_of(True)
    console.print(view.DemoView(console).frame(progress))
    cells = [character for character in console.file.getvalue() if character in "█·"]
    held = set(decoder.cache.block_table("a")) | set(decoder.cache.block_table("b"))
    assert [index for index, cell in enumerate(cells) if cell == "█"] == sorted(held)
    assert len(cells) == 64


def test_the_map_shows_what_is_cached(view, decoder):
    decoder.cache.allocate_for("a", list(range(20)))
    decoder.cache.commit("a")
    decoder.cache.free_for("a")
    decoder.cache.allocate_for("b", list(range(50, 60)))
    progress = demo.Progress("serve", 2, 0, 2, 1.0, 0, ("b",), decoder.cache)
    console = console_of(True)
    console.print(view.DemoView(console).frame(progress))
    cells = [character for character in console.file.getvalue() if character in "█·▂"]
    assert (cells.count("█"), cells.count("▂"), len(cells)) == (2, 2, 64)


def test_what_was_skipped_is_shown_while_it_runs(view, decoder):
    console = console_of(True)
    with view.DemoView(console) as watch:
        result = demo.run(decoder, requests_of(10, turns=3), watch)
    told = f"{result.skipped_tokens:,} of {result.prompt_tokens:,} prompt tokens skipped"
    assert told in console.file.getvalue()


def test_a_large_arena_is_drawn_with_several_blocks_a_cell(view):
    with KVCache(1, 1, 1, 2**20, 1, backend="none") as cache:
        cache.allocate_for("a", 2**19)
        progress = demo.Progress("serve", 1, 0, 1, 1.0, 0, ("a",), cache)
        console = console_of(True)
        console.print(view.DemoView(console).frame(progress))
    cells = [character for character in console.file.getvalue() if character in "█·"]
    assert len(cells) <= view.MAP_ROWS * 94
    assert cells.count("█") == pytest.approx(len(cells) / 2, abs=2)


def printed(view, result):
    console = console_of(False)
    view.print_result(console, result, "what was run")
    return " ".join(console.file.getvalue().split())


def test_the_verdict_of_equal_tokens(view, decoder):
    text = printed(view, demo.run(decoder, requests_of(5)))
    assert text.startswith("what was run")
    assert text.endswith("of 5 requests are the same as alone, with mlx-lm's own cache")


def test_what_was_skipped_is_printed_turn_by_turn(view, decoder):
    result = demo.run(decoder, requests_of(10, turns=3))
    text = printed(view, result)
    skipped = f"{result.skipped_tokens:,} of {result.prompt_tokens:,} tokens skipped"
    assert f"prefill {skipped} ({result.skipped_share:.0%}): " in text
    for turn in result.by_turn:
        assert f"{turn.turn} │ 10 │ {turn.hits} │ {turn.prompt_tokens:,} │ {turn.skipped_tokens:,} │" in text
    assert "mlx-lm's cache, nothing skipped" in text


def test_of_single_requests_that_skip_nothing_no_prefill_is_printed(view, decoder):
    text = printed(view, demo.run(decoder, requests_of(5)))
    assert "prefill" not in text
    assert "mlx-lm's cache, one by one" in text


def test_the_verdict_of_a_difference_names_it(view, decoder):
    wrong = SimpleNamespace(token=-1, logprob=-2.0, margin=math.nan)
    decoder.alone = lambda prompt, num_tokens: [wrong] * num_tokens
    text = printed(view, demo.run(decoder, requests_of(5)))
    assert "✓" not in text
    assert "✗ request r000 differs at decoded token 0" in text
    assert text.endswith("-1 alone with mlx-lm's own cache")


def test_equal_tokens_with_other_logprobs_are_not_passed_over(view, decoder):
    alone = decoder.alone
    decoder.alone = lambda *request: [
        SimpleNamespace(token=choice.token, logprob=choice.logprob + 0.1) for choice in alone(*request)
    ]
    assert "differ by more than rounding explains" in printed(view, demo.run(decoder, requests_of(5)))

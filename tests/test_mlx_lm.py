"""mlx-lm's own code on a KVCache: every token has to be the one that mlx-lm's own cache gives."""
# ruff: noqa: E402 (mlx is asked for before what needs it is imported)

import copy
import gc
import math
import pickle
import threading

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

from mlx_lm.generate import generate_step, speculative_generate_step, stream_generate
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache as PlainCache
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from tiny_models import VOCABULARY, tiny, word_tokenizer

from kvcache import CacheFull, KVCache, KVCacheSpec, UnknownSequence
from kvcache import mlx_lm as bridge

mx.disable_compile()  # on the CPU it runs a C++ compiler

STOCK = ("llama", "qwen3", "qwen3_moe", "gemma3_text", "gpt_oss")  # attention over K and V as they are
OWN = ("gemma2", "deepseek_v3")  # attention of their own, or masks that they compute on


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture
def cache_of():
    """Makes caches for models, of 1,024 tokens in blocks of 8; each is checked when the test ends."""
    made = []

    def make(model, max_total_tokens=1024, block_size=8, **options):
        made.append(bridge.cache_for(model, max_total_tokens, block_size, **options))
        return made[-1]

    yield make
    for cache in made:
        cache.check()
        cache.close()


def prompt_of(length, seed=0):
    return np.random.default_rng([seed, length]).integers(VOCABULARY, size=length).tolist()


def decode(model, prompt, num_tokens, layers=None, **options):
    """Greedy tokens from mlx-lm's own loop; with its own cache where no other is given."""
    layers = make_prompt_cache(model) if layers is None else layers
    steps = generate_step(mx.array(prompt), model, max_tokens=num_tokens, prompt_cache=layers, **options)
    return [token for token, _ in steps]


def admitted(cache, prompt, num_tokens, request_id="a"):
    """A prompt cache of a sequence that was just admitted."""
    assert cache.allocate_for(request_id, prompt, max_new_tokens=num_tokens)
    return bridge.prompt_cache(cache, request_id)


def address_of(array):
    """Where an evaluated array begins, in bytes."""
    mx.eval(array)
    return np.asarray(memoryview(array)).__array_interface__["data"][0]


# --- one sequence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", STOCK + OWN)
def test_a_model_decodes_the_tokens_of_its_own_cache(architecture, cache_of):
    model, prompt = tiny(architecture), prompt_of(37)
    expected = decode(model, prompt, 24)
    assert len(set(expected)) > 4
    assert decode(model, prompt, 24, admitted(cache_of(model), prompt, 24)) == expected


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("chunk", [1, 7, 36])
def test_a_prompt_may_be_computed_in_chunks(model, cache_of, placement, chunk):
    prompt = prompt_of(37)
    layers = admitted(cache_of(model, placement=placement), prompt, 12)
    assert decode(model, prompt, 12, layers, prefill_step_size=chunk) == decode(model, prompt, 12)


def test_offset_counts_what_is_written_while_the_prompt_has_its_room(model, cache_of):
    cache, prompt, seen = cache_of(model), prompt_of(20), []
    layers = admitted(cache, prompt, 4)

    def watch(done, total):
        seen.append((done, [layer.offset for layer in layers], cache.used_tokens("a")))

    decode(model, prompt, 1, layers, prefill_step_size=8, prompt_progress_callback=watch)
    assert seen[:4] == [(0, [0] * 3, 20), (8, [8] * 3, 20), (16, [16] * 3, 20), (19, [19] * 3, 20)]


def test_a_sequence_admitted_with_less_than_its_prompt_grows(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(37)
    cache.allocate_for("a", prompt[:3], max_tokens=37 + 8)
    layers = bridge.prompt_cache(cache, "a")
    assert decode(model, prompt, 8, layers, prefill_step_size=10) == decode(model, prompt, 8)
    assert cache.used_tokens("a") == layers[0].offset == 45


def test_what_the_model_reads_is_the_arena(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(21)
    layers = admitted(cache, prompt, 4)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    slot = int(cache.block_table("a")[0]) * 8
    for layer, planes in zip(layers, cache.arena.planes, strict=True):
        for view, plane in zip(layer.keys_and_values(), planes.values(), strict=True):
            assert view.shape == (1, 2, 21, 16)
            assert address_of(view) == address_of(plane) + slot * 16 * 4


def test_a_write_past_the_limit_is_refused_with_its_numbers(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(15)
    layers = admitted(cache, prompt, 2)
    with pytest.raises(bridge.LimitReached) as caught:
        decode(model, prompt, 8, layers)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.request_id, error.tokens, error.limit) == ("a", 18, 17)
    assert (error.blocks_needed, error.blocks_available) == (0, 0)
    assert isinstance(error, CacheFull)
    assert str(error).startswith("sequence 'a' may have 17 tokens, the model would write 18")
    assert cache.used_tokens("a") == layers[0].offset == 17


def test_a_write_that_finds_no_block_is_refused_with_its_numbers(model, cache_of):
    cache = cache_of(model, 64, overcommit=4.0)
    layers = admitted(cache, prompt_of(30), 20)
    cache.allocate_for("b", 32)
    with pytest.raises(CacheFull) as caught:
        decode(model, prompt_of(30), 20, layers)
    assert not isinstance(caught.value, bridge.LimitReached)
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (1, 0)
    assert cache.used_tokens("a") == 32


def test_a_refused_write_changes_nothing(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(8)
    layers = admitted(cache, prompt, 0)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    before, kept = cache.stats(), [np.array(layer.keys) for layer in layers]
    with pytest.raises(CacheFull):
        model(mx.array([[1, 2]]), cache=layers)
    assert cache.stats() == before
    assert [layer.offset for layer in layers] == [8] * 3
    assert all(np.array_equal(keys, layer.keys) for keys, layer in zip(kept, layers, strict=True))


def squeeze(cache):
    """Make the cache move what it can: a sequence that takes all free blocks comes and goes."""
    assert cache.allocate_for("squeeze", cache.free_tokens)
    cache.free_for("squeeze")


def test_generations_in_flight_survive_moves(model, cache_of):
    prompts = [prompt_of(9, seed) for seed in range(4)]
    cache, running = cache_of(model, overcommit=math.inf), []
    for number, prompt in enumerate(prompts):
        layers = admitted(cache, prompt, 30, number)
        steps = generate_step(mx.array(prompt), model, max_tokens=30, prompt_cache=layers)
        running.append((steps, []))
    for turn in range(30):
        for steps, tokens in running:
            tokens.append(next(steps)[0])  # the step after it is in flight
            if turn % 7 == 3:
                squeeze(cache)
    assert [tokens for _, tokens in running] == [decode(model, prompt, 30) for prompt in prompts]
    assert cache.stats().moves > 4
    assert cache.stats().arena_copies == 0


def test_plain_calls_of_the_model_survive_moves(model, cache_of):
    """Outside mlx-lm's generation stream, with a step in flight when its sequence is moved."""
    cache, prompts = cache_of(model, overcommit=math.inf), {name: prompt_of(8, ord(name)) for name in "abc"}
    layers = {name: admitted(cache, prompt, 40, name) for name, prompt in prompts.items()}
    tokens = {name: mx.array(prompt) for name, prompt in prompts.items()}
    out = {name: [] for name in prompts}
    for turn in range(30):
        for name in prompts:
            tokens[name] = mx.argmax(model(tokens[name][None], cache=layers[name])[0, -1:], axis=-1)
            mx.async_eval(tokens[name])
            out[name].append(tokens[name])
            if turn % 7 == 3:
                squeeze(cache)
    assert cache.stats().moves > 4
    for name, prompt in prompts.items():
        assert [token.item() for token in out[name]] == decode(model, prompt, 30)


@pytest.mark.parametrize("draft", ["its own", "another"])
def test_speculative_decoding_trims_what_was_rejected(model, cache_of, draft):
    prompt, helper = prompt_of(25), model if draft == "its own" else tiny("llama", seed=1)
    mine, theirs = cache_of(model), cache_of(helper)
    layers = admitted(mine, prompt, 40) + admitted(theirs, prompt, 40)
    steps = speculative_generate_step(
        mx.array(prompt), model, helper, num_draft_tokens=3, max_tokens=20, prompt_cache=layers
    )
    assert [token for token, _, _ in steps] == decode(model, prompt, 20)
    for cache, layer in ((mine, layers[0]), (theirs, layers[-1])):
        assert cache.used_tokens("a") == layer.offset


def test_a_deep_copy_writes_beside_its_original(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(19)
    layers = admitted(cache, prompt, 30)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    branch = copy.deepcopy(layers)
    assert len({layer.request_id for layer in branch}) == 1
    assert branch[0].request_id in cache
    got = [
        decode(model, [token], 10, one)
        for token, one in ((3, branch), (5, layers), (7, copy.deepcopy(branch)))
    ]
    assert got[:2] == [decode(model, [*prompt, token], 10) for token in (3, 5)]
    assert got[2] != got[0]  # a copy of the copy goes on from the copy's end
    assert cache.used_tokens("a") == 19 + 1 + 10


def test_a_deep_copy_gives_its_blocks_back_when_it_is_forgotten(model, cache_of):
    cache = cache_of(model)
    layers = admitted(cache, prompt_of(19), 5)
    held = cache.stats().used_blocks
    branch = copy.deepcopy(layers)
    assert cache.stats().used_blocks == 2 * held
    del branch
    gc.collect()
    assert cache.stats().used_blocks == held
    assert list(cache) == ["a"]


def test_a_deep_copy_may_be_freed_by_its_id(model, cache_of):
    cache = cache_of(model)
    branch = copy.deepcopy(admitted(cache, prompt_of(19), 5))
    assert cache.free_for(branch[0].request_id)
    assert list(cache) == ["a"]


def test_a_deep_copy_that_does_not_fit_is_refused(model, cache_of):
    cache = cache_of(model, 64)
    layers = admitted(cache, prompt_of(20), 20)
    with pytest.raises(CacheFull) as caught:
        copy.deepcopy(layers)
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (5, 3)
    assert list(cache) == ["a"]


def test_a_fork_goes_on_from_what_its_parent_has(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(23)
    mx.eval(model(mx.array(prompt)[None], cache=admitted(cache, prompt, 30)))
    grant = cache.fork("a", "b")
    layers = bridge.prompt_cache(cache, "b", cached_tokens=grant.cached_tokens)
    assert layers[0].offset == 23
    assert decode(model, [9], 8, layers) == decode(model, [*prompt, 9], 8)


def test_trimming_nothing_keeps_the_room_of_the_prompt(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(20)
    layers = admitted(cache, prompt, 0)
    mx.eval(model(mx.array(prompt[:6])[None], cache=layers))
    assert [layer.trim(0) for layer in layers] == [0] * 3
    assert [layer.trim(2) for layer in layers] == [2] * 3
    assert (layers[2].offset, cache.used_tokens("a")) == (4, 20)
    assert decode(model, prompt[4:], 0, layers) == []
    assert np.allclose(layers[0].keys, _keys_after(model, prompt), atol=1e-5)


def _keys_after(model, prompt):
    plain = make_prompt_cache(model)
    mx.eval(model(mx.array(prompt)[None], cache=plain))
    return np.array(plain[0].keys[..., : len(prompt), :])


def test_trimming_more_than_there_is_trims_all(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(20)
    layers = admitted(cache, prompt, 20)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    assert [layer.trim(99) for layer in layers] == [20] * 3
    assert cache.used_tokens("a") == 0
    assert all(layer.empty() and layer.size() == 0 for layer in layers)
    assert decode(model, prompt, 6, layers) == decode(model, prompt, 6)


def test_a_cut_through_a_shared_block_without_room_for_a_copy_is_refused(model, cache_of):
    cache = cache_of(model, 32, placement="paged")
    layers = admitted(cache, prompt_of(32), 0)
    mx.eval(model(mx.array(prompt_of(32))[None], cache=layers))
    assert cache.fork("a", "b")
    before = cache.stats()
    with pytest.raises(CacheFull) as caught:
        layers[0].trim(2)
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (1, 0)
    assert cache.stats() == before
    assert layers[0].offset == 32


# --- one sequence, whose beginning is there -----------------------------------------------------------------


def reply(model, cache, prompt, num_tokens, request_id, steps_of=None):
    """An answer to a prompt of which only what is not there is computed, named and let go; and what was there."""
    grant = cache.allocate_for(request_id, prompt, max_new_tokens=num_tokens + 8)
    layers = bridge.prompt_cache(cache, request_id, cached_tokens=grant.cached_tokens)
    rest = prompt[grant.cached_tokens :]
    answer = decode(model, rest, num_tokens, layers) if steps_of is None else steps_of(rest, layers)
    cache.set_tokens(request_id, answer[: cache.used_tokens(request_id) - len(prompt)])
    cache.free_for(request_id)
    return answer, grant.cached_tokens


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("architecture", STOCK + OWN)
def test_turns_of_a_conversation_decode_the_tokens_of_its_whole_prompt(architecture, placement, cache_of):
    model, said = tiny(architecture), prompt_of(37)
    cache, found = cache_of(model, placement=placement), []
    for turn in range(3):
        answer, cached = reply(model, cache, said, 12, turn)
        assert answer == decode(model, said, 12)
        found.append(cached)
        said = [*said, *answer, *prompt_of(9, turn)]
    assert found == [0, (37 + 12) // 8 * 8, (37 + 12 + 9 + 12) // 8 * 8]


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_conversations_share_what_they_begin_with(model, cache_of, placement):
    cache, system = cache_of(model, placement=placement), prompt_of(24)
    first, second = [*system, *prompt_of(7, 1)], [*system, *prompt_of(11, 2)]
    assert cache.allocate_for("a", first, max_new_tokens=20)
    layers = bridge.prompt_cache(cache, "a")
    steps = generate_step(mx.array(first), model, max_tokens=20, prompt_cache=layers)
    mine = [next(steps)[0] for _ in range(5)]
    assert reply(model, cache, second, 12, "b") == (decode(model, second, 12), 24)
    assert mine + [token for token, _ in steps] == decode(model, first, 20)


@pytest.mark.parametrize("taken", [1, 3, 11, 12])
def test_of_an_answer_that_is_ended_early_all_that_was_yielded_can_be_named(model, cache_of, taken):
    cache, prompt = cache_of(model), prompt_of(21)

    def some(rest, layers):
        steps = generate_step(mx.array(rest), model, max_tokens=12, prompt_cache=layers)
        return [next(steps)[0] for _ in range(taken)]

    answer, _ = reply(model, cache, prompt, 12, "a", some)
    assert answer == decode(model, prompt, taken)
    longer = [*prompt, *answer, *prompt_of(5)]
    assert reply(model, cache, longer, 12, "b") == (decode(model, longer, 12), (21 + taken) // 8 * 8)


def test_the_answer_of_stream_generate_can_be_named_up_to_its_end(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(21)
    expected = decode(model, prompt, 12)
    tokenizer = word_tokenizer()

    def streamed(rest, layers):
        answers = stream_generate(model, tokenizer, rest, max_tokens=12, prompt_cache=layers)
        return [answer.token for answer in answers]

    assert reply(model, cache, prompt, 12, "a", streamed) == (expected, 0)
    longer = [*prompt, *expected, *prompt_of(5)]
    assert reply(model, cache, longer, 12, "b") == (decode(model, longer, 12), (21 + 12) // 8 * 8)


@pytest.mark.parametrize("num_tokens", [11, 20])
def test_what_speculative_decoding_accepted_is_found_again(model, cache_of, num_tokens):
    prompt, helper = prompt_of(25), tiny("llama", seed=1)
    cache, theirs = cache_of(model), cache_of(helper)

    def speculated(rest, layers):
        drafts = admitted(theirs, prompt, 40)
        steps = speculative_generate_step(
            mx.array(rest),
            model,
            helper,
            num_draft_tokens=3,
            max_tokens=num_tokens,
            prompt_cache=layers + drafts,
        )
        return [token for token, _, _ in steps]

    answer, _ = reply(model, cache, prompt, num_tokens, "a", speculated)
    assert answer == decode(model, prompt, num_tokens)
    longer = [*prompt, *answer, *prompt_of(9)]
    following, cached = reply(model, cache, longer, 12, "b")
    assert following == decode(model, longer, 12)
    assert cached >= (25 + num_tokens - 1) // 8 * 8


def test_an_answer_without_names_is_not_found(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(24)
    answer = decode(model, prompt, 20, admitted(cache, prompt, 20))
    cache.free_for("a")
    assert cache.probe([*prompt, *answer, 1]) == 24


def test_of_a_prompt_that_was_not_computed_to_its_end_only_what_was_is_found(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(40)
    layers = admitted(cache, prompt, 8)
    mx.eval(model(mx.array(prompt[:19])[None], cache=layers))
    cache.free_for("a")
    assert reply(model, cache, prompt, 8, "b") == (decode(model, prompt, 8), 16)


# --- masks and states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5, 64])
@pytest.mark.parametrize("offset", [0, 11])
@pytest.mark.parametrize("n", [1, 4])
def test_masks_are_those_of_mlx_lm(model, cache_of, n, offset, window):
    plain, prompt = PlainCache(), prompt_of(11)
    layers = admitted(cache_of(model), prompt, 0)
    if offset:
        mx.eval(model(mx.array(prompt)[None], cache=layers))
        plain.offset = offset
    for return_array in (False, True):
        mine = layers[0].make_mask(n, return_array=return_array, window_size=window)
        theirs = plain.make_mask(n, return_array=return_array, window_size=window)
        if isinstance(theirs, mx.array):
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs


def test_nothing_about_a_layer_says_quantized_or_empty(model, cache_of):
    prompt = prompt_of(12)
    layers = admitted(cache_of(model), prompt, 8)
    for name in ("bits", "group_size", "to_quantized", "__len__", "__bool__"):
        assert not hasattr(layers[0], name)
    assert decode(model, prompt, 8, layers, kv_bits=8, quantized_kv_start=0) == decode(model, prompt, 8)


def test_sizes_are_told(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(12)
    layers = admitted(cache, prompt, 8)
    assert layers[0].empty()
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    assert layers[0].size() == 12
    assert not layers[0].empty()
    assert all(layer.is_trimmable() for layer in layers)
    assert sum(layer.nbytes for layer in layers) == cache.capacity("a") * cache.spec.bytes_per_token


def test_the_state_of_mlx_lms_cache_can_be_taken_over_and_given_back(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(20)
    plain = make_prompt_cache(model)
    mx.eval(model(mx.array(prompt)[None], cache=plain))
    layers = admitted(cache, prompt, 10)
    for mine, theirs in zip(layers, plain, strict=True):
        mine.state = theirs.state
    back = [PlainCache.from_state(tuple(map(_copied, layer.state))) for layer in layers]
    expected = decode(model, [*prompt, 4], 8)
    assert decode(model, [4], 8, layers) == expected
    assert decode(model, [4], 8, back) == expected


def _copied(value):
    return mx.array(np.array(value)) if isinstance(value, mx.array) else value


def test_a_state_that_is_refused_changes_nothing(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(6)
    layers = admitted(cache, prompt, 0)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    before, state = np.array(layers[0].keys), layers[0].state
    with pytest.raises(ValueError, match="bfloat16"):
        layers[0].state = (state[0].astype(mx.bfloat16), state[1].astype(mx.bfloat16), 6)
    assert layers[0].offset == 6
    assert np.array_equal(layers[0].keys, before)


def test_keys_that_are_set_are_evaluated_with_the_state(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(6)
    layers = admitted(cache, prompt, 4)
    mx.eval(model(mx.array(prompt)[None], cache=layers))
    sent = mx.ones(3) * 2
    layers[-1].keys = mx.depends(layers[-1].keys, sent)
    assert layers[-1].state[0] is layers[-1].keys
    mx.eval([layer.state for layer in layers])
    assert np.array_equal(layers[-1].keys, layers[-1].keys_and_values()[0])
    awaited = layers[-1].keys
    mx.eval(model(mx.array([[1]]), cache=layers))
    assert layers[-1].keys is not awaited
    assert layers[-1].values.shape == (1, 2, 7, 16)


def test_stream_generate_takes_it_as_it_is(model, cache_of):
    prompt = prompt_of(14)
    layers = admitted(cache_of(model), prompt, 10)
    answers = list(stream_generate(model, word_tokenizer(), prompt, max_tokens=10, prompt_cache=layers))
    expected = decode(model, prompt, 10)
    assert [answer.token for answer in answers] == expected
    assert "".join(answer.text for answer in answers).split() == [f"w{token}" for token in expected]


def test_a_batch_is_refused_by_a_prompt_cache(model, cache_of):
    layers = admitted(cache_of(model), 4, 0)
    with pytest.raises(ValueError, match="holds 1 sequence, the model wrote 2"):
        model(mx.zeros((2, 4), mx.int32), cache=layers)


def test_a_cache_that_mlx_lm_cannot_use_is_refused(model, cache_of):
    cache = cache_of(model)
    with pytest.raises(UnknownSequence):
        bridge.prompt_cache(cache, "nobody")
    cache.allocate_for("a", 4)
    with pytest.raises(ValueError, match="cached_tokens is 5, the sequence has 4"):
        bridge.prompt_cache(cache, "a", cached_tokens=5)
    with KVCache(1, 2, 16, 64) as numpy_cache, pytest.raises(ValueError, match="backend='mlx'"):
        bridge.BatchCache(numpy_cache)


def test_a_cache_without_v_is_refused():
    from kvcache import LayerSpec, PlaneSpec

    spec = KVCacheSpec.from_layers([LayerSpec([PlaneSpec("latent", 1, 8)])], 64)
    with KVCache(spec, backend="mlx") as cache, pytest.raises(ValueError, match="layer 0 has 1 planes"):
        bridge.prompt_cache(cache, "a")


# --- a cache for a model ------------------------------------------------------------------------------------


def test_the_spec_is_read_off_the_model(model):
    assert bridge.spec_for(model, 100, 8) == KVCacheSpec(3, 2, 16, 100, 8)


def test_the_dtype_is_the_models():
    model = tiny("qwen3")
    model.set_dtype(mx.bfloat16)
    assert bridge.spec_for(model, 64).dtype == "bfloat16"


def test_latent_attention_has_two_planes_of_one_head():
    planes = bridge.spec_for(tiny("deepseek_v3"), 64).layers[0].planes
    assert [(plane.heads, plane.width) for plane in planes] == [(1, 24), (1, 8)]


def test_a_model_with_a_recurrent_state_is_refused():
    with pytest.raises(bridge.UnsupportedModel, match="layer 0 of this mamba model keeps a ArraysCache"):
        bridge.spec_for(tiny("mamba"), 64)


def test_options_go_to_the_cache(model, cache_of):
    cache = cache_of(model, 64, placement="paged", stream=mx.default_stream(mx.cpu))
    assert (cache.placement, cache.backend) == ("paged", "mlx")


# --- a batch ------------------------------------------------------------------------------------------------


def prefilled(model, cache, prompts, num_tokens):
    """A batch whose prompts are computed, and the first token of each."""
    rows, firsts = bridge.BatchCache(cache), []
    for request_id, prompt in prompts.items():
        logits = model(mx.array(prompt)[None], cache=admitted(cache, prompt, num_tokens, request_id))
        firsts.append(mx.argmax(logits[0, -1]).item())
        rows.add(request_id)
    return rows, firsts


def step(model, rows, tokens, **options):
    """One step of a batch: logits of each row, evaluated."""
    rows.append(**options)
    with bridge.routed_attention(), rows.cache.hold():
        logits = model(mx.array(tokens)[:, None], cache=rows.layers)
        mx.eval(logits)
    return logits[:, -1]


def step_greedily(model, rows, tokens):
    return mx.argmax(step(model, rows, tokens), axis=-1).tolist()


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("architecture", STOCK)
def test_a_batch_decodes_the_tokens_of_single_runs(architecture, placement, cache_of):
    model = tiny(architecture)
    prompts = {name: prompt_of(length) for name, length in (("a", 3), ("b", 30), ("c", 11))}
    rows, tokens = prefilled(model, cache_of(model, placement=placement), prompts, 16)
    out = [tokens]
    for _ in range(15):
        out.append(tokens := step_greedily(model, rows, tokens))
    for column, prompt in zip(zip(*out, strict=True), prompts.values(), strict=True):
        assert list(column) == decode(model, prompt, 16)


@pytest.mark.parametrize("architecture", STOCK)
def test_several_rows_of_one_sequence_see_each_other(architecture, cache_of):
    model = tiny(architecture)
    prompts = {name: prompt_of(length) for name, length in (("a", 4), ("b", 20), ("c", 9))}
    more = {"a": prompt_of(1, 7), "b": prompt_of(17, 8), "c": prompt_of(3, 9)}
    rows, _ = prefilled(model, cache_of(model), prompts, 20)
    tokens = [token for ids in more.values() for token in ids]
    logits = step(model, rows, tokens, counts=[len(ids) for ids in more.values()])
    ends = np.cumsum([len(ids) for ids in more.values()]) - 1
    for end, name in zip(ends, prompts, strict=True):
        plain = make_prompt_cache(model)
        model(mx.array(prompts[name])[None], cache=plain)
        expected = model(mx.array(more[name])[None], cache=plain)[0, -1]
        assert np.allclose(logits[int(end)], expected, atol=1e-3)
        assert mx.argmax(logits[int(end)]).item() == mx.argmax(expected).item()


def test_a_refused_member_has_no_row(model, cache_of):
    prompts = {"a": prompt_of(8), "b": prompt_of(8, 1)}
    cache = cache_of(model, overcommit=4.0)
    rows, (_, second) = prefilled(model, cache, prompts, 4)
    cache.set_limit("a", 8)
    assert rows.append().tolist() == [False, True]
    with bridge.routed_attention(), cache.hold():
        token = mx.argmax(model(mx.array([[second]]), cache=rows.layers)[0, -1]).item()
    assert [second, token] == decode(model, prompts["b"], 2)
    assert cache.used_tokens("a") == 8


def test_members_come_go_and_change_places(model, cache_of):
    prompts = {name: prompt_of(10, ord(name)) for name in "abc"}
    cache = cache_of(model)
    rows, tokens = prefilled(model, cache, prompts, 8)
    expected = {name: decode(model, prompt, 4) for name, prompt in prompts.items()}
    tokens = step_greedily(model, rows, tokens)
    rows.reorder([2, 0])
    assert rows.request_ids == ["c", "a"]
    tokens = step_greedily(model, rows, [tokens[2], tokens[0]])
    assert tokens == [expected["c"][2], expected["a"][2]]
    cache.free_for("c")
    rows.remove("c")
    assert step_greedily(model, rows, tokens[1:]) == [expected["a"][3]]


def test_an_id_that_is_no_member_changes_nothing(model, cache_of):
    rows, _ = prefilled(model, cache_of(model), {"a": prompt_of(5)}, 4)
    for call in (rows.add, rows.remove):
        with pytest.raises(UnknownSequence):
            call("nobody")
    assert rows.request_ids == ["a"]


@pytest.mark.parametrize("architecture", OWN)
def test_a_model_that_computes_on_k_v_or_mask_raises(architecture, cache_of):
    model = tiny(architecture)
    rows, tokens = prefilled(model, cache_of(model), {"a": prompt_of(5), "b": prompt_of(6)}, 4)
    with pytest.raises(Exception, match=r"one sequence at a time, with prompt_cache|incompatible function"):
        step(model, rows, tokens)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: mx.ones((2, 2)) * x,
        lambda x: mx.ones((2, 2)) @ x,
        lambda x: x & True,
        lambda x: ~x,
        lambda x: x[0],
        len,
        bool,
        list,
        lambda x: x.shape,
        lambda x: mx.concatenate([x]),
        lambda x: mx.fast.scaled_dot_product_attention(mx.ones((1, 1, 1, 4)), x, x, scale=1.0),
    ],
)
def test_computing_on_an_opaque_array_raises(model, cache_of, compute):
    cache = cache_of(model)
    cache.allocate_for("a", 3, max_new_tokens=2)
    rows = bridge.BatchCache(cache, ["a"])
    rows.append()
    layer = rows.layers[0]
    opaque = [*layer.update_and_fetch(mx.zeros((1, 2, 1, 16)), mx.zeros((1, 2, 1, 16))), layer.make_mask(1)]
    for one in opaque:
        with pytest.raises((TypeError, ValueError)):
            compute(one)


def test_rows_that_are_not_the_steps_are_refused(model, cache_of):
    rows, tokens = prefilled(model, cache_of(model), {"a": prompt_of(5), "b": prompt_of(6)}, 4)
    with pytest.raises(ValueError):
        step(model, rows, [*tokens, 1])
    queries = mx.zeros((2, 4, 3, 16))
    with pytest.raises(ValueError, match="the model has 2 rows of 3 tokens, the step 2 rows of 1"):
        rows.attend(0, queries, 1.0, None, None)


def test_a_batch_cannot_be_trimmed_by_mlx_lm(model, cache_of):
    rows, _ = prefilled(model, cache_of(model), {"a": prompt_of(5)}, 4)
    assert not rows.layers[0].is_trimmable()
    mx.eval([layer.state for layer in rows.layers])


# --- the way into mlx-lm's attention ------------------------------------------------------------------------


def test_attention_is_put_back_after_an_error_and_after_the_outermost_block():
    before = base.scaled_dot_product_attention.__code__
    with pytest.raises(KeyError):
        _fail_in_a_nested_route(before)
    assert base.scaled_dot_product_attention.__code__ is before


def _fail_in_a_nested_route(before):
    with bridge.routed_attention():
        with bridge.routed_attention():
            pass
        assert base.scaled_dot_product_attention.__code__ is not before
        raise KeyError


def test_routed_attention_leaves_other_caches_alone(model):
    prompt = prompt_of(13)
    expected, unrouted = decode(model, prompt, 8), _decode_quantized()
    with bridge.routed_attention():
        assert decode(model, prompt, 8) == expected
        assert _decode_quantized() == unrouted


def _decode_quantized():
    model = bridge.random_llama(hidden_size=128, vocab_size=VOCABULARY)  # heads of 32: quantized in groups
    return decode(model, prompt_of(13), 6, kv_bits=8, quantized_kv_start=0, kv_group_size=32)


def test_without_the_route_a_batch_raises(model, cache_of):
    rows, tokens = prefilled(model, cache_of(model), {"a": prompt_of(5)}, 4)
    rows.append()
    with pytest.raises(TypeError):
        model(mx.array(tokens)[:, None], cache=rows.layers)


@pytest.mark.parametrize(
    "unknown",
    [
        lambda queries, keys, values, cache, scale, mask: None,
        lambda queries, keys, values, cache, scale, mask, sinks=(): None,
        lambda keys, queries, values, cache, scale, mask, sinks=None: None,
        lambda queries, keys, values, cache, scale, mask, sinks=None, *, window=None: None,
    ],
)
def test_an_attention_of_unknown_signature_is_left_alone(monkeypatch, unknown):
    monkeypatch.setattr(bridge, "_attention", unknown)
    code = unknown.__code__
    with (
        pytest.raises(RuntimeError, match=r"expected \(queries, .*, mask, sinks=None\)"),
        bridge.routed_attention(),
    ):
        pytest.fail("it was opened")
    assert unknown.__code__ is code
    monkeypatch.undo()
    with bridge.routed_attention():
        assert base.scaled_dot_product_attention.__code__ is bridge._routed.__code__


def test_a_foreign_mask_in_a_batch_is_refused(model, cache_of):
    rows, _ = prefilled(model, cache_of(model), {"a": prompt_of(5)}, 4)
    rows.append()
    keys, values = rows.layers[0].keys_and_values()
    with (
        bridge.routed_attention(),
        pytest.raises(bridge.UnsupportedModel, match="made by its cache, got NoneType"),
    ):
        base.scaled_dot_product_attention(mx.zeros((1, 4, 1, 16)), keys, values, rows.layers[0], 1.0, None)


# --- the decoder --------------------------------------------------------------------------------------------


def test_the_decoder_serves_moving_sequences_beside_another_thread(model, cache_of):
    cache = cache_of(model, 8 * 44, overcommit=math.inf)  # the four end with 24 blocks, the others have 20
    decoder, stop, out = bridge.Decoder(model, cache), threading.Event(), {}
    prompts = {number: prompt_of(6 + 5 * number) for number in range(4)}

    def disturb():
        while not stop.is_set():
            for number in range(10):
                cache.allocate_for(("small", number), 16)
            for number in range(0, 10, 2):
                cache.free_for(("small", number))
            cache.allocate_for("large", 80)
            for request_id in [request_id for request_id in cache if request_id not in prompts]:
                cache.free_for(request_id)

    for request_id, prompt in prompts.items():
        cache.allocate_for(request_id, prompt, max_new_tokens=25)
        out[request_id] = [decoder.prefill(request_id, prompt)]
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(24):
            choices = decoder.step([tokens[-1].token for tokens in out.values()])
            for tokens, choice in zip(out.values(), choices, strict=True):
                tokens.append(choice)
    finally:
        stop.set()
        thread.join()
    for request_id, prompt in prompts.items():
        assert [choice.token for choice in out[request_id]] == decode(model, prompt, 25)
    assert cache.stats().moves > 0


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_the_decoder_finds_what_it_decoded_in_a_batch(model, cache_of, placement):
    cache = cache_of(model, placement=placement)
    decoder, said = bridge.Decoder(model, cache), {name: prompt_of(20, ord(name)) for name in "abc"}
    found = []
    for turn in range(2):
        answers = {}
        for name, prompt in said.items():
            grant = cache.allocate_for((name, turn), prompt, max_new_tokens=16)
            found.append(grant.cached_tokens)
            answers[name] = [decoder.prefill((name, turn), prompt, grant.cached_tokens)]
        for _ in range(15):
            newest = [choices[-1].token for choices in answers.values()]
            for choices, choice in zip(answers.values(), decoder.step(newest), strict=True):
                choices.append(choice)
        for name, choices in answers.items():
            tokens = [choice.token for choice in choices]
            assert tokens == decode(model, said[name], 16)
            decoder.finish((name, turn))
            said[name] = [*said[name], *tokens, *prompt_of(6, turn)]
    assert found == [0, 0, 0, 32, 32, 32]  # 20 + 15 tokens were put in


def test_tokens_of_a_batch_may_be_named_after_the_step(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(14)
    rows, tokens = prefilled(model, cache, {"a": prompt}, 10)
    answer = list(tokens)
    for _ in range(10):
        tokens = step_greedily(model, rows, tokens)
        rows.batch.set_tokens(answer[-1:])
        answer += tokens
    cache.free_for("a")
    assert cache.probe([*prompt, *answer]) == 24
    following = [*prompt, *answer, 5]
    assert reply(model, cache, following, 8, "b") == (decode(model, following, 8), 24)


def test_the_decoder_refuses_a_step_for_all_or_none(model, cache_of):
    cache = cache_of(model)
    decoder, tokens = bridge.Decoder(model, cache), []
    for request_id, room in (("a", 3), ("b", 1)):
        cache.allocate_for(request_id, prompt_of(7), max_new_tokens=room)
        tokens.append(decoder.prefill(request_id, prompt_of(7)).token)
    tokens = [choice.token for choice in decoder.step(tokens)]
    used = [cache.used_tokens(request_id) for request_id in "ab"]
    with pytest.raises(bridge.LimitReached, match="sequence 'b' may have 8 tokens, the model would write 9"):
        decoder.step(tokens)
    assert [cache.used_tokens(request_id) for request_id in "ab"] == used
    decoder.finish("b")
    assert [choice.token for choice in decoder.step(tokens[:1])] == decode(model, prompt_of(7), 3)[2:]


def test_the_decoder_says_how_clear_a_choice_was(model, cache_of):
    cache, prompt = cache_of(model), prompt_of(9)
    cache.allocate_for("a", prompt)
    choice = bridge.Decoder(model, cache).prefill("a", prompt)
    logits = np.sort(np.array(model(mx.array(prompt)[None])[0, -1], np.float64))
    assert choice.margin == pytest.approx(logits[-1] - logits[-2], abs=1e-4)
    assert choice.logprob == pytest.approx(logits[-1] - np.log(np.exp(logits).sum()), abs=1e-4)


def test_alone_is_mlx_lms_own_generation(model, cache_of):
    choices = bridge.Decoder(model, cache_of(model)).alone(prompt_of(9), 6)
    steps = list(generate_step(mx.array(prompt_of(9)), model, max_tokens=6))
    assert [choice.token for choice in choices] == [token for token, _ in steps]
    assert [choice.logprob for choice in choices] == [logprobs[token].item() for token, logprobs in steps]


# --- models -------------------------------------------------------------------------------------------------


def test_a_random_llama_is_its_seeds():
    ids = mx.array([prompt_of(20)])
    first, again, other = (np.array(bridge.random_llama(seed)(ids)) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_the_tokens_of_a_random_llama_depend_on_the_whole_context():
    model, prompt = bridge.random_llama(), prompt_of(60)
    tokens = decode(model, prompt, 40)
    assert len(set(tokens)) > 20
    assert decode(model, [(prompt[0] + 1) % VOCABULARY, *prompt[1:]], 40) != tokens


def test_rotating_layers_of_a_model_are_windows_here(cache_of):
    """A sequence much longer than the window, decoded one token at a time."""
    model, prompt = tiny("gemma3_text"), prompt_of(5)
    assert any(isinstance(layer, RotatingKVCache) for layer in make_prompt_cache(model))
    assert decode(model, prompt, 60, admitted(cache_of(model), prompt, 60)) == decode(model, prompt, 60)

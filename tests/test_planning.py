"""Budgets: sums that come out, what fits, and what is refused with the numbers."""

import dataclasses
import pickle

import pytest
from configs import DEEPSEEK, GEMMA3, LLAMA, QWEN3_NEXT, TINY
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError, KVCacheSpec, UnreadableConfig
from kvcache.costs import activation_bytes, costs_of
from kvcache.model_config import read_config
from kvcache.plan_record import constructor_of, record_of
from kvcache.planning import BudgetTooSmall, Wishes, make_plan, recommended_block_size, size

GIB = 2**30
MAMBA = {
    "model_type": "mamba",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "conv_kernel": 4,
    "vocab_size": 128,
}


def planned(config, **wishes):
    return make_plan(read_config(config), Wishes(**wishes))


# --- what a sequence costs


def test_a_sequence_costs_its_tokens_its_windows_and_its_state():
    assert costs_of(read_config(LLAMA)).sequence_bytes(8192) == 8192 * 131072
    gemma = costs_of(read_config(GEMMA3))
    assert gemma.sequence_bytes(100) == 100 * (65536 + 327680)
    assert gemma.sequence_bytes(8192) == 8192 * 65536 + 1024 * 327680
    qwen = costs_of(read_config(QWEN3_NEXT))
    assert qwen.sequence_bytes(1000) == 1000 * 24576 + 77266944


def test_in_an_arena_a_sequence_costs_whole_blocks_and_windows_in_full():
    gemma = costs_of(read_config(GEMMA3))
    assert gemma.arena_bytes_per_token == 65536 + 327680
    assert gemma.arena_sequence_bytes(8191, 16) == 8192 * (65536 + 327680)


@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK, GEMMA3, QWEN3_NEXT])
def test_the_arena_of_a_model_takes_what_the_plan_says(config):
    plan = planned(config, memory=2000 * GIB, concurrency=4, block_size=16)
    spec = KVCacheSpec.from_model(config, plan.max_total_tokens, plan.block_size)
    assert spec.arena_bytes == plan.budget.arena
    assert spec.bytes_per_token == plan.costs.arena_bytes_per_token


# --- how memory divides

CONFIGS = st.sampled_from([LLAMA, DEEPSEEK, GEMMA3, QWEN3_NEXT, MAMBA, TINY])
OPTIONAL_COUNT = st.none() | st.integers(1, 100_000)


@given(
    config=CONFIGS,
    memory=st.integers(0, 2**45),
    weights=st.none() | st.integers(0, 2**40),
    context=OPTIONAL_COUNT,
    concurrency=OPTIONAL_COUNT,
    block_size=st.none() | st.integers(1, 4096),
)
def test_the_parts_of_a_budget_sum_to_the_memory_and_none_is_below_zero(
    config, memory, weights, context, concurrency, block_size
):
    wishes = Wishes(memory, weights, None, context, concurrency, block_size)
    model = read_config(config)
    try:
        plan = make_plan(model, wishes)
    except BudgetTooSmall as error:
        plan, needed = None, error.needed
    if plan is None:
        assert needed > memory
        return
    budget = plan.budget
    parts = (
        budget.weights, budget.activations, budget.overhead, budget.state, budget.arena, budget.remaining,
    )  # fmt: skip
    assert sum(parts) == budget.memory == memory
    assert min(parts) >= 0
    each = plan.costs.arena_sequence_bytes(plan.context, plan.block_size)
    assert plan.sequences * each <= budget.arena + budget.state + budget.remaining
    if plan.max_total_tokens is not None:
        assert plan.max_total_tokens % plan.block_size == 0
        assert plan.max_total_tokens <= plan.tokens
        assert plan.max_total_tokens * plan.costs.arena_bytes_per_token == budget.arena
        KVCacheSpec.from_model(config, plan.max_total_tokens, plan.block_size)


def test_memory_that_would_just_do_does():
    with pytest.raises(BudgetTooSmall) as caught:
        planned(LLAMA, memory=GIB)
    needed = caught.value.needed
    assert planned(LLAMA, memory=needed).tokens == 16
    with pytest.raises(BudgetTooSmall):
        planned(LLAMA, memory=needed - 100)


def test_the_refusal_carries_its_numbers():
    with pytest.raises(BudgetTooSmall) as caught:
        planned(LLAMA, memory=10 * GIB, weights=12 * GIB, activations=GIB)
    error = caught.value
    assert (error.memory, error.weights, error.activations) == (10 * GIB, 12 * GIB, GIB)
    assert "10.00 GiB of memory do not hold weights of 12.00 GiB" in str(error)
    assert isinstance(error, (KVCacheError, ValueError))
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_all_memory_that_is_left_is_arena_where_no_concurrency_is_asked_for():
    plan = planned(LLAMA, memory=40 * GIB, weights=16 * GIB, activations=4 * GIB)
    room = 40 * GIB - 20 * GIB - 2 * GIB
    assert plan.budget.arena == room // (16 * 131072) * 16 * 131072
    assert (plan.tokens, plan.sequences) == (room // 131072 // 16 * 16, room // GIB)
    assert plan.budget.overhead == 2 * GIB


def test_an_arena_for_so_many_sequences_has_a_tenth_to_spare_and_the_rest_remains():
    plan = planned(LLAMA, memory=40 * GIB, weights=16 * GIB, activations=4 * GIB, concurrency=9)
    assert plan.max_total_tokens == 10 * 8192
    assert plan.budget.remaining == 8 * GIB
    assert plan.warnings == ()
    assert plan.reasons["max_total_tokens"] == "9 sequences of 8,192 tokens, and 10 % free"


def test_more_sequences_than_fit_are_a_warning_with_the_number_that_does():
    plan = planned(LLAMA, memory=40 * GIB, weights=16 * GIB, activations=4 * GIB, concurrency=19)
    assert plan.warnings == ("19 sequences of 8,192 tokens do not fit at a time: 18 do",)
    plan = planned(LLAMA, memory=40 * GIB, weights=16 * GIB, activations=4 * GIB, concurrency=18)
    assert "moves cost more" in plan.warnings[0]
    plan = planned(LLAMA, memory=40 * GIB, weights=37 * GIB, activations=GIB // 2)
    assert (plan.sequences, plan.max_total_tokens) == (0, 4096)
    assert "not one sequence of 8,192 tokens fits: it takes 1.00 GiB" in plan.warnings[0]


def test_states_of_all_sequences_are_in_the_budget_and_not_in_the_arena():
    plan = planned(QWEN3_NEXT, memory=200 * GIB, concurrency=8)
    assert plan.budget.state == 8 * 77266944
    plan = planned(MAMBA, memory=GIB)
    assert (plan.budget.arena, plan.tokens, plan.max_total_tokens) == (0, 0, None)
    assert plan.budget.state == plan.sequences * plan.costs.state_bytes


def test_a_context_beyond_what_the_model_is_made_for_is_a_warning():
    (warning,) = planned(TINY, context=4097).warnings
    assert warning == "a context of 4,097 tokens is more than the 4,096 that the model is made for"
    assert planned(TINY, context=4096).warnings == ()
    assert planned(TINY).context == 4096


def test_an_arena_stays_below_what_slots_can_number():
    plan = planned(TINY, memory=2**45)
    assert plan.max_total_tokens == 2**31 - 16
    assert KVCacheSpec.from_model(TINY, plan.max_total_tokens).arena_tokens < 2**31


def test_estimates_need_the_fields_that_they_follow_from():
    config = {name: value for name, value in LLAMA.items() if name != "vocab_size"}
    assert planned(config, memory=40 * GIB, weights=GIB, activations=GIB).sequences > 0
    with pytest.raises(UnreadableConfig, match="vocab_size is missing"):
        planned(config, memory=40 * GIB)
    with pytest.raises(UnreadableConfig, match="vocab_size is missing"):
        planned(config, memory=40 * GIB, weights=GIB)


def test_activations_grow_with_what_a_layer_makes():
    model = read_config(LLAMA)
    widest = 6 * 4096 + 3 * 2 * 8 * 128 + 3 * 14336
    assert activation_bytes(model, 4) == 2 * 2048 * widest * 2 + 4 * 4 * 128256


@pytest.mark.parametrize(
    ("context", "block_size"), [(1, 16), (8192, 16), (16384, 32), (32768, 64), (10**9, 64)]
)
def test_blocks_are_larger_where_half_of_one_is_next_to_nothing(context, block_size):
    assert recommended_block_size(context) == block_size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (2**50, "1,024.00 TiB")],
)
def test_bytes_are_told_in_the_largest_unit(count, text):
    assert size(count) == text


# --- as an object and as Python


def test_the_record_has_the_costs_and_everything_else():
    record = record_of(planned(GEMMA3, memory=80 * GIB, context=4096, concurrency=2))
    assert record["bytes_per_token"] == 65536
    assert record["windows"] == [{"bytes_per_token": 327680, "window": 1024}]
    assert record["state_bytes"] == 0
    assert record["sequence_bytes"] == 4096 * 65536 + 1024 * 327680
    assert sum(group["layers"] for group in record["layers"]) == record["num_layers"] == 48
    assert sum(group["bytes_per_token"] for group in record["layers"]) == record["arena_bytes_per_token"]
    assert record["budget"]["memory"] == 80 * GIB


@pytest.mark.parametrize("fields", [{}, {"v_head_dim": 8}, {"head_dim": 8, "num_key_value_heads": 1}])
def test_the_constructor_call_makes_the_cache_of_a_plain_model(fields):
    check_constructor(TINY | fields)


@pytest.mark.parametrize("layers", [3, 4, 5, 7])
@pytest.mark.parametrize("pattern", ["01", "0110", "0011", "0111"])
def test_the_constructor_call_makes_the_cache_of_layers_that_differ(layers, pattern):
    digits = [int(digit) for digit in (pattern * layers)[:layers]]
    swa = {"swa_head_dim": 4, "swa_num_key_value_heads": 1, "sliding_window": 8}
    check_constructor(
        TINY
        | swa
        | {"model_type": "mimo_v2_flash", "num_hidden_layers": layers, "hybrid_layer_pattern": digits}
    )


def test_the_constructor_call_makes_the_cache_of_latents_and_of_hybrids():
    check_constructor(DEEPSEEK | {"num_hidden_layers": 2, "kv_lora_rank": 16, "torch_dtype": "float32"})
    check_constructor(QWEN3_NEXT | {"num_hidden_layers": 8, "head_dim": 8, "torch_dtype": "float32"})


def check_constructor(config):
    plan = planned(config, concurrency=1, context=20, block_size=8)
    names = {}
    exec(constructor_of(plan), names)
    with names["cache"] as cache:
        assert names["spec"] == KVCacheSpec.from_model(config, plan.max_total_tokens, 8) == cache.spec
        cache.check()


def test_a_plan_does_not_change():
    plan = planned(LLAMA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.context = 1

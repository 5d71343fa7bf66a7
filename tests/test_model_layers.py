"""Which layer of a model is of which kind, under all the names that files have for it; what is not understood."""

import json
import pickle

import pytest
from configs import DEEPSEEK, GEMMA3, LLAMA, QWEN3_NEXT, kept, without
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError, UnreadableConfig
from kvcache.model_config import read_config
from kvcache.plan_record import record_of
from kvcache.planning import Wishes, make_plan

SHORT = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
TOKEN = 2 * 2 * 8 * 2  # bytes of a token in a layer of `SHORT`
MAMBA1 = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "hidden_size": 32}
MAMBA1_STATE = 3 * 64 * 2, 64 * 16
MAMBA2 = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "conv_kernel": 4}
MAMBA2_STATE = 3 * (64 + 2 * 2 * 16) * 2, 64 * 16


def states(layers, one):
    conv, elements = one
    return layers * (conv + 4 * elements), layers * (conv + 2 * elements)


PATTERNS = {
    "use_sliding_window is false": (
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
        (4 * TOKEN, (), None),
    ),
    "use_sliding_window is left out": (
        {"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 0},
        (4 * TOKEN, (), None),
    ),
    "use_sliding_window is false and layers are called sliding": (
        {
            "model_type": "qwen3",
            "use_sliding_window": False,
            "sliding_window": 16,
            "layer_types": ["sliding_attention"] * 4,
        },
        (4 * TOKEN, (), None),
    ),
    "windows from a layer on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        (3 * TOKEN, ((TOKEN, 16),), None),
    ),
    "a window in every layer": (
        {"model_type": "mistral", "sliding_window": 4096},
        (0, ((4 * TOKEN, 4096),), None),
    ),
    "a window that is null": ({"model_type": "phi3", "sliding_window": None}, (4 * TOKEN, (), None)),
    "Gemma 2 alternates": (
        {"model_type": "gemma2", "sliding_window": 64},
        (2 * TOKEN, ((2 * TOKEN, 64),), None),
    ),
    "Cohere's pattern": (
        {"model_type": "cohere2", "sliding_window": 64, "sliding_window_pattern": 4},
        (TOKEN, ((3 * TOKEN, 64),), None),
    ),
    "a pattern in letters": (
        {"model_type": "exaone4", "sliding_window": 64, "sliding_window_pattern": "LLG"},
        (TOKEN, ((3 * TOKEN, 64),), None),
    ),
    "Exaone without a window": (
        {"model_type": "exaone4", "sliding_window": None, "sliding_window_pattern": None},
        (4 * TOKEN, (), None),
    ),
    "layer_types": (
        {
            "model_type": "olmo3",
            "sliding_window": 64,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        (3 * TOKEN, ((TOKEN, 64),), None),
    ),
    "Llama 4's no_rope_layers": (
        {"model_type": "llama4_text", "attention_chunk_size": 128, "no_rope_layers": [1, 0, 1, 0]},
        (2 * TOKEN, ((2 * TOKEN, 128),), None),
    ),
    "Llama 4 with the interval of its class": (
        {"model_type": "llama4_text", "attention_chunk_size": 128, "no_rope_layers": []},
        (TOKEN, ((3 * TOKEN, 128),), None),
    ),
    "MiMo's swa fields": (
        {
            "model_type": "mimo_v2_flash",
            "hybrid_layer_pattern": [0, 1, 1, 0],
            "v_head_dim": 6,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 8,
            "swa_v_head_dim": 6,
            "sliding_window_size": 128,
            "attention_chunk_size": 128,
        },
        (2 * 2 * (8 + 6) * 2, ((2 * 4 * (8 + 6) * 2, 128),), None),
    ),
    "Gemma 4's global fields": (
        {
            "model_type": "gemma4_text",
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "global_head_dim": 16,
        },
        (2 * 2 * 1 * 16 * 2, ((2 * TOKEN, 32),), None),
    ),
    "Gemma 4's global heads where K and V have weights of their own": (
        {
            "model_type": "gemma4_text",
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": 1,
            "global_head_dim": 16,
        },
        (2 * 2 * 2 * 16 * 2, ((2 * TOKEN, 32),), None),
    ),
    "layers that read what an earlier one kept": (
        {
            "model_type": "gemma4_text",
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 8,
            "num_kv_shared_layers": 2,
        },
        (TOKEN, ((TOKEN, 32),), None),
    ),
    "Jamba's period and offset": (
        {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 2, **MAMBA1},
        (TOKEN, (), states(3, MAMBA1_STATE)),
    ),
    "Bamba's indices": (
        {
            "model_type": "bamba",
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": "auto",
            "mamba_n_groups": 2,
            **MAMBA1,
        },
        (TOKEN, (), states(3, MAMBA2_STATE)),
    ),
    "Falcon-H1 has both in every layer": (
        {"model_type": "falcon_h1", "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, **MAMBA1},
        (4 * TOKEN, (), states(4, MAMBA2_STATE)),
    ),
    "Nemotron's override pattern": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-E", **MAMBA2},
        (TOKEN, (), states(1, MAMBA2_STATE)),
    ),
    "Granite's layer_types": (
        {
            "model_type": "granitemoehybrid",
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            **MAMBA1,
        },
        (TOKEN, (), states(3, MAMBA2_STATE)),
    ),
    "Qwen's interval": (
        {
            "model_type": "qwen3_next",
            "full_attention_interval": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
        },
        (2 * TOKEN, (), states(2, (3 * (2 * 2 * 8 + 4 * 16) * 2, 4 * 8 * 16))),
    ),
    "Kimi's numbered layers": (
        {
            "model_type": "kimi_linear",
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "linear_attn_config": {
                "full_attn_layers": [4],
                "kda_layers": [1, 2, 3],
                "num_heads": 2,
                "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
        },
        (20 * 2, (), states(3, (3 * 3 * 16 * 2, 2 * 8 * 8))),
    ),
    "MiniMax's list of types": (
        {"model_type": "minimax_text_01", "attn_type_list": [0, 0, 0, 1]},
        (TOKEN, (), states(3, (0, 4 * 8 * 8))),
    ),
    "short convolutions": (
        {"model_type": "lfm2", "full_attn_idxs": [1], "conv_L_cache": 3, "hidden_size": 32},
        (TOKEN, (), states(3, (2 * 32 * 2, 0))),
    ),
    "RecurrentGemma repeats a short list": (
        {
            "model_type": "recurrent_gemma",
            "block_types": ["recurrent", "recurrent", "attention"],
            "attention_window_size": 64,
            "conv1d_width": 4,
            "lru_width": 48,
            "hidden_size": 32,
        },
        (0, ((TOKEN, 64),), states(3, (3 * 48 * 2, 48))),
    ),
    "DeepSeek V3.2's index": (
        {
            "model_type": "deepseek_v32",
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "index_head_dim": 128,
            "index_n_heads": 64,
            "index_topk": 2048,
        },
        (4 * (512 + 64 + 128) * 2, (), None),
    ),
    "layers that share an index": (
        {
            "model_type": "glm_moe_dsa",
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "index_head_dim": 128,
            "indexer_types": ["full", "shared", "shared", "full"],
        },
        ((4 * (512 + 64) + 2 * 128) * 2, (), None),
    ),
    "one head for all": ({"model_type": "gpt_bigcode", "multi_query": True}, (4 * TOKEN // 2, (), None)),
    "Falcon's one head": (
        {"model_type": "falcon", "multi_query": True, "num_kv_heads": 4},
        (4 * TOKEN // 2, (), None),
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_read(name):
    fields, expected = PATTERNS[name]
    assert kept(SHORT | fields) == expected


def test_a_list_of_blocks_says_everything_of_each_layer():
    blocks = [
        {"attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}, "ffn": {}},
        {"attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}, "ffn": {}},
        {"attention": {"n_heads_in_group": None, "no_op": False, "replace_with_linear": True}, "ffn": {}},
        {"attention": {"n_heads_in_group": 4, "window_length": 256}, "ffn": {}},
    ]
    config = SHORT | {"model_type": "nemotron-nas", "num_key_value_heads": None, "block_configs": blocks}
    assert kept(config) == (TOKEN, ((TOKEN // 2, 256),), None)
    assert read_config(config).kv_layers == (0, 3)


# --- what is refused

BROKEN = {
    "a type that is not known": (LLAMA | {"model_type": "rwkv"}, ["model_type"]),
    "a type that is not known, with fields that are not": (
        LLAMA | {"model_type": "titan", "num_memory_heads": 4},
        ["model_type", "num_memory_heads"],
    ),
    "a field that bears on the cache": (LLAMA | {"cla_share_factor": 2}, ["cla_share_factor"]),
    "several of them": (LLAMA | {"kv_mirror": [1], "swa_heads": 3}, ["kv_mirror", "swa_heads"]),
    "architectures without a type": (
        without(LLAMA, "model_type") | {"architectures": ["TitanForCausalLM"]},
        ["architectures", "model_type"],
    ),
    "an encoder": (LLAMA | {"is_encoder_decoder": True}, ["is_encoder_decoder"]),
    "a layer of a kind that is not known": (
        SHORT | {"layer_types": ["full_attention", "psychic_attention", "full_attention", "full_attention"]},
        ["layer_types"],
    ),
    "a letter that is not known": (
        SHORT | {"model_type": "nemotron_h", "hybrid_override_pattern": "MX*E", **MAMBA2},
        ["hybrid_override_pattern"],
    ),
    "a window of nobody knows which layers": (
        LLAMA | {"sliding_window": 64},
        ["sliding_window"],
    ),
    "chunks in a model without": (LLAMA | {"attention_chunk_size": 64}, ["attention_chunk_size"]),
    "recurrent layers of nobody knows which": (
        SHORT | {"model_type": "jamba", **MAMBA1},
        ["attn_layer_period", "layer_types"],
    ),
    "a recurrent layer that says nothing of its state": (
        SHORT | {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 2},
        ["mamba_d_state", "mamba_n_heads"],
    ),
    "half of a state": (
        SHORT | {"model_type": "qwen3_next", "linear_num_value_heads": 4},
        ["linear_key_head_dim", "linear_conv_kernel_dim"],
    ),
    "an offset beyond the period": (
        SHORT | {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 2, **MAMBA1},
        ["attn_layer_offset"],
    ),
    "a list that is too short": (SHORT | {"layer_types": ["full_attention"] * 3}, ["layer_types"]),
    "a list of another kind": (SHORT | {"layer_types": [1, 2, 3, 4]}, ["layer_types"]),
    "no list at all": (SHORT | {"layer_types": "full_attention"}, ["layer_types"]),
    "a pattern that is too long": (
        SHORT | {"model_type": "nemotron_h", "hybrid_override_pattern": "M*-EE", **MAMBA2},
        ["hybrid_override_pattern"],
    ),
    "digits that are none": (
        SHORT | {"model_type": "mimo_v2_flash", "hybrid_layer_pattern": [0, 1, 2, 0], "sliding_window": 8},
        ["hybrid_layer_pattern"],
    ),
    "truth for a digit": (
        SHORT | {"model_type": "mimo_v2_flash", "hybrid_layer_pattern": [0, True, 1, 0], "sliding_window": 8},
        ["hybrid_layer_pattern"],
    ),
    "a sliding layer without a window": (
        SHORT | {"model_type": "olmo3", "layer_types": ["sliding_attention"] * 4},
        ["sliding_window"],
    ),
    "an index beyond the layers": (
        SHORT | {"model_type": "bamba", "attn_layer_indices": [4], **MAMBA1},
        ["attn_layer_indices"],
    ),
    "a block with sinks": (
        SHORT
        | {
            "model_type": "deci",
            "block_configs": [{"attention": {"num_sink_tokens": 4, "n_heads_in_group": 1}}] * 4,
        },
        ["block_configs[0].attention.num_sink_tokens"],
    ),
    "a block of nothing": (
        SHORT | {"model_type": "deci", "block_configs": [{}] * 4},
        ["block_configs[0].attention"],
    ),
    "layers that are counted twice as shared": (
        SHORT | {"num_kv_shared_layers": 5},
        ["num_kv_shared_layers"],
    ),
    "nothing": ({}, ["num_hidden_layers"]),
    "no layers": (without(LLAMA, "num_hidden_layers"), ["num_hidden_layers"]),
    "no heads": (without(LLAMA, "num_attention_heads", "num_key_value_heads"), ["num_attention_heads"]),
    "no width": (without(LLAMA, "hidden_size"), ["hidden_size"]),
    "a width that does not divide": (LLAMA | {"hidden_size": 4097}, ["head_dim", "hidden_size"]),
    "heads that do not divide": (LLAMA | {"num_key_value_heads": 5}, ["num_key_value_heads"]),
    "heads below zero": (LLAMA | {"num_key_value_heads": -8}, ["num_key_value_heads"]),
    "no heads at all": (LLAMA | {"num_attention_heads": 0}, ["num_attention_heads"]),
    "heads in words": (LLAMA | {"num_attention_heads": "32"}, ["num_attention_heads"]),
    "half a head": (LLAMA | {"num_attention_heads": 32.0}, ["num_attention_heads"]),
    "a true number of layers": (LLAMA | {"num_hidden_layers": True}, ["num_hidden_layers"]),
    "too many layers": (LLAMA | {"num_hidden_layers": 10**30}, ["num_hidden_layers"]),
    "a head as wide as the sky": (LLAMA | {"head_dim": 2**31}, ["head_dim"]),
    "a switch in words": (
        LLAMA | {"model_type": "qwen2", "use_sliding_window": "no", "sliding_window": 4},
        ["use_sliding_window"],
    ),
    "text that is no object": ({"text_config": [LLAMA]}, ["text_config"]),
    "a type that is no name": (LLAMA | {"model_type": ["llama"]}, ["model_type"]),
    "nested fields": (
        {"model_type": "gemma3", "text_config": GEMMA3["text_config"] | {"num_hidden_layers": -1}},
        ["text_config.num_hidden_layers"],
    ),
    "a dtype that K and V are never in": (LLAMA | {"torch_dtype": "float8_e4m3fn"}, ["torch_dtype"]),
    "a dtype that is no name": (LLAMA | {"torch_dtype": 16}, ["torch_dtype"]),
    "a state's dtype": (QWEN3_NEXT | {"mamba_ssm_dtype": "int8"}, ["mamba_ssm_dtype"]),
    "latents without their width": (without(DEEPSEEK, "kv_lora_rank"), ["kv_lora_rank"]),
    "a context in words": (LLAMA | {"max_position_embeddings": "long"}, ["max_position_embeddings"]),
    "attention both ways": (
        SHORT | {"model_type": "gemma2", "sliding_window": 8, "use_bidirectional_attention": True},
        ["use_bidirectional_attention"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_understood_is_refused_by_name(name):
    config, fields = BROKEN[name]
    with pytest.raises(UnreadableConfig) as caught:
        read_config(config)
    error = caught.value
    assert set(fields) <= set(error.fields)
    assert all(field.rpartition(".")[2] in str(error) for field in fields)
    assert isinstance(error, (KVCacheError, ValueError))
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_nested_nonsense_ends():
    config = LLAMA
    for _ in range(50):
        config = {"text_config": config}
    with pytest.raises(UnreadableConfig, match="text_config"):
        read_config(config)


def test_a_message_is_short_however_long_a_field_is():
    with pytest.raises(UnreadableConfig) as caught:
        read_config(LLAMA | {"num_hidden_layers": "x" * 10_000, "model_type": "llama"})
    assert len(str(caught.value)) < 300
    with pytest.raises(UnreadableConfig, match="and 88 more"):
        read_config(LLAMA | {f"kv_mystery_{number:02}": 1 for number in range(100)})


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Llama4ForConditionalGeneration", "llama4"),
        ("GPT2LMHeadModel", "gpt2"),
        ("DeciLMForCausalLM", "deci"),
    ],
)
def test_an_architecture_stands_for_a_type_that_is_left_out(architecture, model_type):
    config = without(LLAMA, "model_type") | {"architectures": [architecture]}
    assert read_config(config).model_type == model_type


def test_a_model_that_nobody_has_named_is_not_guessed():
    with pytest.raises(UnreadableConfig, match="both missing") as told:
        read_config({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    assert told.value.fields == ("model_type", "architectures")


def test_an_mpt_of_another_attention_is_not_guessed():
    config = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32}
    with pytest.raises(UnreadableConfig, match=r"attn_config\.attn_type|attn_type") as told:
        read_config(config | {"attn_config": {"attn_type": "multiquery_attention"}})
    assert told.value.fields == ("attn_config.attn_type", "attn_config.kv_n_heads")


def test_layers_are_counted_by_their_list_where_no_field_says_how_many():
    config = without(SHORT, "num_hidden_layers")
    assert kept(config | {"model_type": "qwen3", "layer_types": ["full_attention"] * 3}) == (
        3 * TOKEN,
        (),
        None,
    )
    blocks = [{"attention": {"n_heads_in_group": 2}}] * 2
    assert kept(config | {"model_type": "deci", "block_configs": blocks}) == (2 * TOKEN, (), None)


NONSENSE = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        10**30,
        1.5,
        float("nan"),
        "",
        "auto",
        "32",
        [],
        [1],
        [None],
        [[]],
        {},
        {"a": 1},
    ]
)
WHOLE = [
    LLAMA,
    DEEPSEEK,
    QWEN3_NEXT,
    GEMMA3["text_config"],
    *(SHORT | fields for fields, _ in PATTERNS.values()),
]


@given(config=st.sampled_from(WHOLE), changes=st.lists(st.tuples(st.integers(0, 99), NONSENSE), max_size=3))
def test_whatever_is_in_a_config_it_is_read_or_refused(config, changes):
    names = sorted(config)
    changed = config | {names[number % len(names)]: value for number, value in changes}
    try:
        plan = make_plan(read_config({"text_config": changed}), Wishes(memory=2**42))
    except KVCacheError:
        return
    assert plan.costs.sequence_bytes(1) > 0
    json.dumps(record_of(plan), allow_nan=False)

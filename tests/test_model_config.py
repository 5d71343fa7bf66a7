"""A model's config: what each layer keeps, by published figures, and what is refused by name."""

import pickle

import pytest
from configs import DEEPSEEK, FILES, GEMMA3, LLAMA, QWEN3_NEXT, TINY, without, written

from kvcache import KVCacheError, KVCacheSpec, UnreadableConfig
from kvcache.costs import costs_of
from kvcache.model_config import read_config
from kvcache.model_weights import parameters_of, weight_bytes

PUBLISHED = {  # file: bytes per token, windows, state in float32 and bfloat16, billions of parameters
    "meta-llama--Llama-3.2-1B-Instruct": (32768, (), None, 1.24),
    "meta-llama--Meta-Llama-3.1-8B": (131072, (), None, 8.03),
    "meta-llama--Meta-Llama-3.1-70B": (327680, (), None, 70.55),
    "meta-llama--Meta-Llama-3.1-405B": (516096, (), None, 405.9),
    "mistralai--Mistral-7B-Instruct-v0.3": (131072, (), None, 7.25),
    "mistralai--Mixtral-8x7B-v0.1": (131072, (), None, 46.7),
    "mistralai--Mixtral-8x22B-v0.1": (229376, (), None, 140.6),
    "Qwen--Qwen2.5-7B-Instruct": (57344, (), None, 7.62),
    "Qwen--Qwen3-0.6B": (114688, (), None, 0.596),
    "Qwen--Qwen3-8B": (147456, (), None, 8.19),
    "Qwen--Qwen3-32B": (262144, (), None, 32.76),
    "Qwen--Qwen3-30B-A3B": (98304, (), None, 30.53),
    "Qwen--Qwen3-235B-A22B": (192512, (), None, 235.1),
    "microsoft--phi-4": (204800, (), None, 14.66),
    "google--gemma-2-9b": (172032, ((172032, 4096),), None, 9.24),
    "google--gemma-3-12b-it": (65536, ((327680, 1024),), None, 11.77),
    "openai--gpt-oss-20b": (24576, ((24576, 128),), None, 20.91),
    "openai--gpt-oss-120b": (36864, ((36864, 128),), None, 116.8),
    "meta-llama--Llama-4-Scout-17B-16E-Instruct": (49152, ((147456, 8192),), None, 107.8),
    "deepseek-ai--DeepSeek-V3": (70272, (), None, 671.0),
    "deepseek-ai--DeepSeek-R1": (70272, (), None, 671.0),
    "moonshotai--Kimi-K2-Instruct": (70272, (), None, 1026.0),
    "Qwen--Qwen3.5-27B": (65536, (), (153944064, 78446592), 27.0),
    "Qwen--Qwen3-Coder-Next.trimmed": (24576, (), (77266944, 39518208), 79.7),
    "nvidia--Nemotron-H-56B-Base-8K": (40960, (), (912605184, 459620352), 56.3),
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (6144, (), (49082368, 24965120), 31.6),
    "tiiuae--falcon-mamba-7b": (0, (), (36700160, 19922944), 7.27),
}


def kept(config, **options):
    """Bytes per token, windows, and state in float32 and bfloat16 (None where there is none)."""
    costs = costs_of(read_config(config, **options))
    state = tuple(costs.state_bytes_by_dtype.values())
    return costs.bytes_per_token, costs.windows, state if any(state) else None


@pytest.mark.skipif(not FILES.is_dir(), reason="published configs do not lie beside the checkout")
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_keeps_what_is_known_of_it(name):
    path = FILES / f"{name}.json"
    model = read_config(path)
    assert kept(path) == PUBLISHED[name][:3]
    assert costs_of(model).state_bytes == (PUBLISHED[name][2] or (0, 0))[0]
    assert parameters_of(model).total / 1e9 == pytest.approx(PUBLISHED[name][3], rel=0.01)


@pytest.mark.skipif(not FILES.is_dir(), reason="published configs do not lie beside the checkout")
def test_every_published_file_is_tried():
    assert {path.stem for path in FILES.glob("*.json")} == set(PUBLISHED)


def test_the_configs_written_down_here_keep_what_their_models_do():
    assert kept(LLAMA) == (131072, (), None)
    assert kept(DEEPSEEK) == (70272, (), None)
    assert kept(QWEN3_NEXT) == (24576, (), (77266944, 39518208))
    assert kept(GEMMA3) == (65536, ((327680, 1024),), None)


# --- which layers are of which kind

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


def test_heads_of_k_and_v_are_those_of_queries_where_no_field_tells_them():
    assert kept(without(LLAMA, "num_key_value_heads")) == (4 * 131072, (), None)


def test_a_head_is_as_wide_as_the_field_says_and_else_as_the_quotient():
    assert kept(LLAMA | {"head_dim": 256}) == (2 * 131072, (), None)
    assert kept(without(LLAMA | {"model_type": "qwen3", "hidden_size": 2048}, "head_dim"))[0] == 131072


def test_layers_without_attention_have_no_number_in_the_arena():
    model = read_config(QWEN3_NEXT)
    assert model.kv_layers == tuple(range(3, 48, 4))
    assert {layer.kind for layer in model.layers} == {"Gated DeltaNet", "full attention"}


def test_nested_fields_are_found_and_dtypes_outside_of_them_count():
    assert read_config(GEMMA3).dtype == "bfloat16"
    inside = GEMMA3 | {"text_config": GEMMA3["text_config"] | {"dtype": "float16"}}
    assert (read_config(inside).dtype, read_config(inside).dtype_field) == ("float16", "text_config.dtype")
    assert kept({"llm_config": LLAMA}) == kept(LLAMA)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("float32", "float32"), ("torch.float16", "float16"), (None, "bfloat16"), ("auto", "bfloat16")],
)
def test_k_and_v_are_kept_in_the_dtype_of_the_model(given, dtype):
    model = read_config(LLAMA | {"torch_dtype": given})
    assert (model.dtype, model.dtype_field) == (dtype, "torch_dtype" if given not in (None, "auto") else None)
    assert kept(LLAMA | {"torch_dtype": given})[0] == 131072 * (2 if dtype == "float32" else 1)


def test_the_dtype_of_a_state_is_the_config_s_or_the_larger():
    model = read_config(QWEN3_NEXT)
    assert (model.state_dtype, model.state_dtype_field) == ("float32", None)
    for name in ("mamba_ssm_dtype", "mamba_ssm_cache_dtype"):
        assert costs_of(read_config(QWEN3_NEXT | {name: "bfloat16"})).state_bytes == 39518208
    assert costs_of(read_config(QWEN3_NEXT, state_dtype="bfloat16")).state_bytes == 39518208


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


# --- files


def test_a_config_is_a_dict_a_file_or_a_folder(tmp_path):
    path = written(tmp_path, LLAMA)
    specs = {
        KVCacheSpec.from_model(config, 4096) for config in (path, str(tmp_path), tmp_path / "config.json")
    }
    assert specs == {KVCacheSpec.from_model(LLAMA, 4096)}


@pytest.mark.parametrize("text", ["{", "[]", "12", "\x00", "[" * 100_000])
def test_a_file_that_has_no_config_is_refused_by_name(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UnreadableConfig, match=r"config\.json (is not JSON|has a (list|int), expected an object)"
    ):
        read_config(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UnreadableConfig, match="is not JSON"):
        read_config(tmp_path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        KVCacheSpec.from_model(tmp_path / "nothing.json", 4096)


# --- the arena of a model


def test_the_spec_of_a_plain_model_is_the_one_written_by_hand():
    assert KVCacheSpec.from_model(LLAMA, 32768) == KVCacheSpec(32, 8, 128, 32768, dtype="bfloat16")
    assert KVCacheSpec.from_model(LLAMA, 32768, 32, dtype="float32") == KVCacheSpec(32, 8, 128, 32768, 32)


def test_latents_are_two_planes_of_one_head():
    spec = KVCacheSpec.from_model(DEEPSEEK, 65536)
    assert [(plane.name, plane.heads, plane.width) for plane in spec.layers[0].planes] == [
        ("k", 1, 512),
        ("v", 1, 64),
    ]
    assert (spec.num_layers, spec.bytes_per_token) == (61, 70272)


def test_layers_that_keep_nothing_are_not_in_the_arena():
    spec = KVCacheSpec.from_model(QWEN3_NEXT, 4096)
    assert (spec.num_layers, spec.bytes_per_token) == (12, 24576)


def test_layers_with_a_window_keep_all_tokens_in_an_arena():
    assert KVCacheSpec.from_model(GEMMA3, 4096).bytes_per_token == 65536 + 327680


def test_a_model_without_k_and_v_has_no_arena():
    config = {
        "model_type": "mamba",
        "hidden_size": 64,
        "state_size": 16,
        "conv_kernel": 4,
        "num_hidden_layers": 2,
    }
    with pytest.raises(UnreadableConfig, match="no layer keeps K and V"):
        KVCacheSpec.from_model(config, 4096)


@pytest.mark.parametrize(
    ("dtype", "error"), [("float8", ValueError), ("uint8", ValueError), (16, TypeError), (True, TypeError)]
)
def test_k_and_v_have_the_dtypes_of_a_plain_cache(dtype, error):
    with pytest.raises(error):
        KVCacheSpec.from_model(LLAMA, 4096, dtype=dtype)


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "qwen3_moe", "gemma3_text", "gemma2", "deepseek_v3"]
)
def test_the_spec_is_the_one_that_mlx_lm_s_layers_ask_for(architecture):
    pytest.importorskip("mlx_lm")
    from tiny_models import ARCHITECTURES, SHAPE, tiny

    from kvcache.mlx_lm import spec_for

    config = {"model_type": architecture} | SHAPE | ARCHITECTURES[architecture]
    assert shapes(KVCacheSpec.from_model(config, 64)) == shapes(spec_for(tiny(architecture), 64))


def shapes(spec):
    return [[(plane.name, plane.heads, plane.width) for plane in layer.planes] for layer in spec.layers]


# --- weights


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({}, 16),
        ({"torch_dtype": "float32"}, 32),
        ({"quantization": {"bits": 4, "group_size": 64}}, 4.5),
        ({"quantization": {"bits": 8, "group_size": 32}}, 9),
    ],
)
def test_weights_take_what_their_format_takes(fields, bits):
    model = read_config(LLAMA | fields)
    parameters = parameters_of(model)
    element = 4 if fields.get("torch_dtype") == "float32" else 2
    assert weight_bytes(model, parameters, element)[0] == pytest.approx(parameters.total * bits / 8)


def test_formats_that_leave_embeddings_alone_are_counted_so():
    for config, bits in (({"quant_method": "gptq", "bits": 4}, 4.25), ({"quant_method": "fp8"}, 8)):
        model = read_config(LLAMA | {"quantization_config": config})
        parameters = parameters_of(model)
        expected = parameters.embeddings * 2 + parameters.others * bits / 8
        assert weight_bytes(model, parameters, 2)[0] == pytest.approx(expected)


def test_a_format_that_is_not_known_is_refused_by_name():
    model = read_config(LLAMA | {"quantization_config": {"quant_method": "magic"}})
    with pytest.raises(UnreadableConfig, match="quant_method is 'magic'"):
        weight_bytes(model, parameters_of(model), 2)


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size"])
def test_parameters_are_not_estimated_without_a_field_that_they_follow_from(field):
    model = read_config(without(TINY, field))
    with pytest.raises(UnreadableConfig, match=f"{field} is missing"):
        parameters_of(model)

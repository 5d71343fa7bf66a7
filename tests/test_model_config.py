"""A model's config: what each layer keeps, by published figures, and what is refused by name."""

import pytest
from configs import DEEPSEEK, FILES, GEMMA3, LLAMA, QWEN3_NEXT, TINY, kept, without, written

from kvcache import KVCacheSpec, UnreadableConfig
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


# --- heads and dtypes


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


def test_by_default_there_is_room_for_one_sequence_of_the_longest_context():
    assert KVCacheSpec.from_model(LLAMA).max_total_tokens == LLAMA["max_position_embeddings"]
    with pytest.raises(UnreadableConfig, match="give max_total_tokens") as told:
        KVCacheSpec.from_model(without(LLAMA, "max_position_embeddings"))
    assert told.value.fields == ("max_position_embeddings",)


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

"""How many parameters a model has, and how many bytes they take: an estimate from its config.

Counted are embeddings, projections of attention and of recurrent layers, and feed-forward networks with their
experts; left out are norms, biases and routers (well below 1 %), vision and audio towers, and layers that only
predict further tokens. Quantised formats count the scales that their usual group size brings.
"""

from dataclasses import dataclass

from kvcache.model_fields import told
from kvcache.model_heads import hidden_field, query_heads


def _names(text):
    return frozenset(text.split())


TIED = _names("cohere cohere2 gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text")
# A feed-forward network without a gate
TWO_MATRICES = _names(
    "apertus arcee bloom codegen falcon gpt2 gpt_bigcode gpt_neox gptj mpt nemotron nemotron_h opt persimmon phi "
    "starcoder2"
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
INNER = ("intermediate_size", "ffn_hidden_size", "n_inner", "block_ff_dim")
# Whose layers have parts that are not counted here
NOT_COUNTED = _names(
    "dbrx deci falcon_h1 gemma3n gemma3n_text gemma4 gemma4_text lfm2 lfm2_moe minimax "
    "minimax_text_01 nemotron-nas recurrent_gemma zamba2 bamba granitemoehybrid kimi_linear olmo_hybrid"
)


@dataclass(frozen=True)
class Parameters:
    """How many of them lie in embeddings, in experts, and elsewhere."""

    embeddings: int
    experts: int
    others: int

    @property
    def total(self):
        """All of them."""
        return self.embeddings + self.experts + self.others


def parameters_of(model):
    """Estimate the `Parameters` of a model; a config that lacks what they follow from is refused."""
    fields = model.fields
    if fields.model_type is None or fields.model_type in NOT_COUNTED:
        fields.refuse("how many parameters such a model has is not known", "model_type")
    fields.need(hidden_field(fields), "vocab_size")
    hidden = fields.count(hidden_field(fields))
    tied = fields.flag("tie_word_embeddings", fields.model_type in TIED)
    if not fields.has("tie_word_embeddings") and isinstance(fields.outer.get("tie_word_embeddings"), bool):
        tied = fields.outer["tie_word_embeddings"]
    experts = others = 0
    for number, layer in enumerate(model.layers):
        others += _mixer(fields, layer, hidden)
        routed, always = feed_forward(fields, number)
        experts += routed
        others += always
    return Parameters(fields.count("vocab_size") * hidden * (1 if tied else 2), experts, others)


# --- attention and states


def _mixer(fields, layer, hidden):
    """Parameters of what a layer mixes tokens with."""
    if layer.kind.startswith("latent"):
        return _latent(fields, hidden)
    if layer.planes:
        (_, heads, k_width), (_, _, v_width) = layer.planes
        queries = query_heads(fields)
        gate = 2 if fields.flag("attn_output_gate", fields.model_type == "qwen3_next") else 1
        return hidden * (queries * (gate * k_width + v_width) + heads * (k_width + v_width))
    if layer.conv == 0:
        return 0
    if layer.kind == "Gated DeltaNet":
        names = (
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
        )
        k_heads, v_heads, k_width, v_width = (fields.count(name) for name in names)
        return hidden * (2 * k_heads * k_width + 3 * v_heads * v_width + 2 * v_heads)
    if layer.kind == "Mamba-2":
        heads = fields.count(fields.first("mamba_num_heads", "num_heads"))
        width = fields.count(fields.first("mamba_head_dim", "head_dim"))
        groups = fields.count("n_groups") * fields.count(fields.first("ssm_state_size", "state_size"))
        return hidden * (3 * heads * width + 2 * groups + heads)
    states = fields.count(fields.first("state_size", "mamba_d_state"))
    inner = layer.state // states
    rank = fields.values.get(fields.first("time_step_rank", "mamba_dt_rank"))
    rank = rank if isinstance(rank, int) else -(-hidden // 16)
    return inner * (3 * hidden + 2 * rank + 3 * states)


def _latent(fields, hidden):
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    fields.need(*names)
    nope, rope, v_width, latent = (fields.count(name) for name in names)
    heads, rank = query_heads(fields), fields.count("q_lora_rank", None)
    wide = heads * (nope + rope)
    queries = hidden * wide if rank is None else rank * (hidden + wide)
    index = 0
    if fields.has("index_head_dim", "index_n_heads") and rank is not None:
        index_heads, width = fields.count("index_n_heads"), fields.count("index_head_dim")
        index = rank * index_heads * width + hidden * (width + index_heads)
    return (
        queries
        + hidden * (latent + rope)
        + latent * heads * (nope + v_width)
        + heads * v_width * hidden
        + index
    )


# --- feed-forward networks


def feed_forward(fields, number):
    """Parameters of the experts of a layer, and of what every token passes there."""
    return tuple(_matrix(fields) * width for width in _widths(fields, number))


def active_width(fields, number):
    """How wide the feed-forward networks are that one token passes in a layer."""
    routed, always = _widths(fields, number)
    if not routed:
        return always
    chosen = fields.count(
        fields.first("num_experts_per_tok", "top_k_experts", "moe_top_k", "experts_per_token")
    )
    return routed // fields.count(fields.first(*EXPERTS)) * chosen + always


def _matrix(fields):
    return fields.count(hidden_field(fields)) * (2 if fields.model_type in TWO_MATRICES else 3)


def _widths(fields, number):
    """How wide all experts of a layer are together, and what every token passes."""
    if fields.has("hybrid_override_pattern"):
        letter = fields.values["hybrid_override_pattern"][number]
        if letter not in "-E":
            return 0, 0
        experts = letter == "E"
    elif fields.model_type in ("mamba", "mamba2", "falcon_mamba"):
        return 0, 0
    else:
        experts = _has_experts(fields, number)
    if not experts:
        return 0, _dense(fields)
    width = fields.count(fields.first("moe_intermediate_size", *INNER))
    count = fields.count(fields.first(*EXPERTS))
    own = fields.count("moe_shared_expert_intermediate_size", None)
    shared = fields.count("shared_expert_intermediate_size", 0, least=0)
    name = fields.first("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    shared += fields.count(name, 0, least=0) * (own or width)
    if fields.model_type in ("llama4", "llama4_text"):
        shared += width
    return count * width, shared


def _dense(fields):
    name = "intermediate_size_mlp" if fields.has("intermediate_size_mlp") else fields.first(*INNER)
    if not fields.has(name) and fields.model_type in (
        "bloom",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gptj",
        "codegen",
        "mpt",
    ):
        return 4 * fields.count(hidden_field(fields))
    return fields.count(name)


def _has_experts(fields, number):
    if not fields.has(fields.first(*EXPERTS)) or number < fields.count("first_k_dense_replace", 0, least=0):
        return False
    if fields.has("mlp_only_layers") and number in fields.items("mlp_only_layers", int):
        return False
    if isinstance(fields.values.get("moe_layer_freq"), list):
        frequencies = fields.items("moe_layer_freq", int)
        return number < len(frequencies) and frequencies[number] == 1
    if fields.has("expert_layer_period"):
        return number % fields.count("expert_layer_period") == fields.count("expert_layer_offset", 0, least=0)
    if number < fields.count("num_dense_layers", 0, least=0):
        return False
    step = fields.count(fields.first("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_freq"), 1)
    return (number + 1) % step == 0 or fields.has("moe_layer_freq")


# --- bytes


def weight_bytes(model, parameters, dtype_bytes):
    """Bytes of the weights, and a few words on how they are stored.

    Parameters
    ----------
    model : ModelConfig
    parameters : Parameters
    dtype_bytes : int
        Of a weight that is not quantised.
    """
    fields = model.fields
    config = fields.values.get("quantization_config") or fields.outer.get("quantization_config")
    plain = fields.outer.get("quantization") if config is None else None
    if isinstance(plain, dict):  # as mlx-lm writes it: embeddings too
        inner = fields.within("quantization", plain)
        bits = inner.count("bits", below=33) + 32 / inner.count("group_size", 64)
        return round(parameters.total * bits / 8), f"{plain['bits']} bits"
    if not isinstance(config, dict):
        return parameters.total * dtype_bytes, f"{8 * dtype_bytes} bits"
    inner = fields.within("quantization_config", config)
    method = config.get("quant_method")
    if method == "mxfp4":  # experts alone, a scale for each 32
        rest = (parameters.embeddings + parameters.others) * dtype_bytes
        return round(parameters.experts * 4.25 / 8) + rest, "MXFP4"
    if method in ("fp8", "fbgemm_fp8"):
        linear = parameters.experts + parameters.others
        return linear + parameters.embeddings * dtype_bytes, "FP8"
    if method in ("gptq", "awq"):  # a scale and an offset for each group
        bits = inner.count("bits", below=33) + 32 / inner.count("group_size", 128)
        linear = parameters.experts + parameters.others
        return round(
            linear * bits / 8
        ) + parameters.embeddings * dtype_bytes, f"{method.upper()}, {config['bits']} bits"
    return inner.refuse(
        f"quantization_config.quant_method is {told(method)}, and how many bytes that takes is not known",
        "quant_method",
    )

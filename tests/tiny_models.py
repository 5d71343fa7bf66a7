"""Small models of mlx-lm with random weights, whose greedy tokens depend on the whole context."""

import importlib
import math

import mlx.core as mx
from mlx.utils import tree_flatten

VOCABULARY = 128

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}

LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": None,
    "num_key_value_heads": 4,
}

STATE = {
    "state_size": 4,
    "conv_kernel": 3,
    "use_bias": False,
    "use_conv_bias": False,
    "time_step_rank": 2,
}

ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma3_text": {"sliding_window": 12, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "gpt_oss": {"sliding_window": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {},
    "deepseek_v3": LATENT,
    "mamba": STATE,
}


def tiny(architecture, seed=0):
    """A model of one of `ARCHITECTURES`, evaluated."""
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    config = {"model_type": architecture} | SHAPE | ARCHITECTURES[architecture]
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(weights))
    model.load_weights([(name, _weight(name, w, key)) for (name, w), key in zip(weights, keys, strict=True)])
    mx.eval(model.parameters())
    return model


def _weight(name, weight, key):
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 2 * weight
    if weight.ndim == 1 and "sinks" not in name:
        return weight
    if weight.ndim == 1 or "embed" in name:
        return mx.random.normal(weight.shape, scale=0.2, key=key)  # sinks, and embeddings that leave room
    gain = 2.0 if "attn" in name else 1.0
    return mx.random.normal(weight.shape, scale=gain / math.sqrt(weight.shape[-1]), key=key)


def word_tokenizer():
    """A tokenizer of the words w0, w1, ... for the tokens 0, 1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{token}": token for token in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")

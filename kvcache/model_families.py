"""Model types of Hugging Face, and what is true of each of them without being in its config.

A model type that is not here is refused: its fields may mean something else. Defaults are those of the type's
config class, for fields that published files leave out.
"""

import re


def _names(text):
    return frozenset(text.split())


LLAMA_LIKE = _names(
    "apertus arcee bitnet bloom cohere cwm codegen dbrx deepseek dots1 ernie4_5 ernie4_5_moe exaone falcon "
    "flex_olmo gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gptj granite granitemoe granitemoeshared helium "
    "hunyuan_v1_dense hunyuan_v1_moe internlm2 internlm3 llama minicpm minimax_m2 mpt nanochat nemotron "
    "nemotron-nas deci olmo olmo2 olmoe opt persimmon phi seed_oss smollm3 stablelm xverse"
)  # full attention in every layer, unless their fields say otherwise
LATENT = _names(
    "deepseek_v2 deepseek_v3 deepseek_v32 kimi_k2 kimi_k25 minicpm3 glm4_moe_lite glm_moe_dsa"
)  # multi-head latent attention
RECURRENT = _names(
    "bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe mamba mamba2 minimax "
    "minimax_text_01 nemotron_h olmo_hybrid qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen3_next "
    "recurrent_gemma zamba2"
)
WINDOW_EVERYWHERE = _names("mistral mixtral ministral ministral3 phi3 phimoe qwen3_moe starcoder2")
# The layers from `max_window_layers` on slide
WINDOW_FROM_LAYER = _names(
    "mimo qwen2 qwen2_5_vl qwen2_5_vl_text qwen2_vl qwen2_vl_text qwen3 qwen3_vl qwen3_vl_text"
)
# Windows are off unless `use_sliding_window` says that they are on
WINDOW_OFF = WINDOW_FROM_LAYER | _names("qwen2_moe qwen3_moe qwen3_vl_moe qwen3_vl_moe_text")
WINDOW_PERIOD = {  # all layers slide but every so manieth
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "exaone_moe": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n": 5,
    "gemma3n_text": 5,
    "gemma4": 6,
    "gemma4_text": 6,
    "gpt_oss": 2,
    "olmo3": 4,
}
WINDOW_BY_FIELDS = _names("mimo_v2 mimo_v2_flash qwen2_moe qwen3_vl_moe qwen3_vl_moe_text")
CHUNKS_PERIOD = {"llama4": 4, "llama4_text": 4}  # all layers attend in chunks but every so manieth
ATTENTION_PERIOD = {  # all layers are recurrent but every so manieth
    "qwen3_5": 4,
    "qwen3_5_text": 4,
    "qwen3_5_moe": 4,
    "qwen3_5_moe_text": 4,
    "qwen3_next": 4,
}

KNOWN = (
    LLAMA_LIKE
    | LATENT
    | RECURRENT
    | WINDOW_EVERYWHERE
    | WINDOW_FROM_LAYER
    | WINDOW_BY_FIELDS
    | set(WINDOW_PERIOD)
    | set(CHUNKS_PERIOD)
)

_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
_GEMMA4 = _GEMMA3 | {"global_head_dim": 512, "sliding_window": 512}
_GEMMA3N = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "sliding_window": 512,
    "num_kv_shared_layers": 15,
}
CLASS_DEFAULTS = {
    "deepseek_v32": {"index_head_dim": 128},
    "ernie4_5": {"num_key_value_heads": 2, "head_dim": 128},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "glm_moe_dsa": {"index_head_dim": 128},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64},
    "llama4": {"num_key_value_heads": 8},
    "llama4_text": {"num_key_value_heads": 8},
    "mamba": {"expand": 2},
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8},
    "phimoe": {"num_key_value_heads": 8},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "starcoder2": {"num_key_value_heads": 2},
}

# A field whose name looks like this bears on what is cached ...
BEARING = re.compile(
    r"attn|attention|(^|_)kv(_|$)|key_value|heads?(_|$)|window|sliding|swa|chunk|layer_types?|block_(type|config)|"
    r"pattern|hybrid|cache|ssm|mamba|(^|_)states?(_|$)|recurrent|rnn|lru|conv|latent|lora_rank|^index|sink|share|"
    r"memory|linear_|global_|compress"
)
# ... unless it is one that is read, or one of these, whose meaning is known not to.
READ = _names(
    "_sliding_window_pattern attention_chunk_size attention_head_dim attention_k_eq_v "
    "attention_window_size attn_config attn_layer_indices attn_layer_offset attn_layer_period "
    "attn_type_list block_configs block_types conv1d_width conv_L_cache conv_kernel "
    "full_attention_interval full_attn_idxs global_attn_every_n_layers global_head_dim head_dim "
    "hybrid_layer_pattern hybrid_override_pattern index_head_dim index_n_heads index_topk indexer_types "
    "kv_channels kv_lora_rank layer_types layers_block_type linear_attn_config linear_conv_kernel_dim "
    "linear_head_dim linear_key_head_dim linear_num_heads linear_num_key_heads linear_num_value_heads "
    "linear_value_head_dim lru_width mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state mamba_expand "
    "mamba_head_dim mamba_headdim mamba_n_groups mamba_n_heads mamba_ngroups mamba_num_heads "
    "mamba_ssm_cache_dtype mamba_ssm_dtype max_window_layers n_head n_heads n_mamba_heads no_rope_layers "
    "num_attention_heads num_global_key_value_heads num_heads num_key_value_heads num_kv_heads "
    "num_kv_shared_layers q_lora_rank qk_head_dim qk_nope_head_dim qk_rope_head_dim sliding_window "
    "sliding_window_pattern sliding_window_size ssm_state_size state_size swa_head_dim "
    "swa_num_attention_heads swa_num_key_value_heads swa_v_head_dim use_bidirectional_attention "
    "use_sliding_window v_head_dim "
)
WITHOUT_BEARING = _names(
    "_attn_implementation _attn_implementation_autoset activation_sparsity_pattern "
    "add_full_attention_sink_bias add_swa_attention_sink_bias attention_bias attention_dropout "
    "attention_hidden_size attention_in_multiplier attention_multiplier attention_out_bias "
    "attention_out_multiplier attention_probs_dropout_prob attention_projection_layout "
    "attention_softmax_in_fp32 attention_value_scale attn_implementation attn_logit_softcapping "
    "attn_output_gate attn_pdrop attn_scale attn_temperature_tuning cache_implementation chunk_size "
    "chunk_size_feed_forward conv_bias cross_attention_hidden_size full_attn_alpha_factor "
    "full_attn_beta_factor head_dtype hidden_states hybrid_layer_ids indexer_rope_interleave "
    "linear_a_log_max linear_a_log_min linear_allow_neg_eigval linear_attn_alpha_factor "
    "linear_attn_beta_factor linear_dt_init_floor linear_dt_max linear_dt_min lm_head_bias "
    "lm_head_multiplier mamba_chunk_size mamba_conv_bias mamba_dt_init_floor mamba_dt_limit mamba_dt_max "
    "mamba_dt_min mamba_dt_rank mamba_hidden_act mamba_norm_before_gate mamba_proj_bias mamba_rms_norm "
    "mamba_use_mlp mlp_layer_types moe_latent_size moe_num_shared_experts "
    "moe_shared_expert_intermediate_size moe_shared_expert_overlap mtp_hybrid_override_pattern "
    "mtp_layers_block_type n_shared_experts num_ln_in_parallel_attn num_shared_experts output_attentions "
    "output_hidden_states parallel_attn pruned_heads query_pre_attn_scalar reorder_and_upcast_attn "
    "scale_attention_softmax_in_fp32 scale_attn_by_inverse_layer_idx scale_attn_weights "
    "shared_expert_intermediate_size shared_intermediate_size ssm_in_multiplier ssm_multipliers "
    "ssm_out_multiplier swa_rope_theta use_cache use_conv_bias use_mamba_kernels use_mambapy "
    "use_shared_attention_adapter vocab_size_per_layer_input "
)


_ARCHITECTURE = re.compile(r"(\w+?)(ForCausalLM|ForConditionalGeneration|LMHeadModel)")
_BY_ARCHITECTURE = {name.replace("_", "").replace("-", ""): name for name in KNOWN} | {"decilm": "deci"}


def type_of_architecture(name):
    """The model type of an architecture such as ``"Qwen3MoeForCausalLM"``, None where it is not known."""
    match = _ARCHITECTURE.fullmatch(name) if isinstance(name, str) else None
    return _BY_ARCHITECTURE.get(match[1].lower()) if match else None


def unread(values):
    """Names of the fields of a config that bear on what is cached, are set, and are not understood here."""
    known = READ | WITHOUT_BEARING
    return sorted(
        name
        for name, value in values.items()
        if isinstance(name, str)
        and name not in known
        and BEARING.search(name)
        and value not in (None, False, 0, "", [], {})
    )

"""What recurrent layers keep for a sequence, however long it is: a convolution's last inputs, and a state.

Conventions of the counts: ``conv_kernel - 1`` columns of the convolution's inputs, which is what a step needs (some
caches keep one more), in the model's dtype; the state in a dtype of its own.
"""

from kvcache.model_heads import head_dim, query_heads


def state_of(fields):
    """Kind of a recurrent layer, and elements of its convolution's and of its recurrent state."""
    for signs, read in _RULES:
        if fields.has(*signs):
            return read(fields)
    kinds = ", ".join(signs[0] for signs, _ in _RULES)
    if fields.model_type == "minimax" or fields.has("attn_type_list"):
        return _lightning(fields)
    wanted = [signs[0] for signs, _ in _RULES]
    return fields.refuse(
        f"it has recurrent layers, and none of the fields that tell their state is there: {kinds}", *wanted
    )


def _conv(kernel, channels):
    return (kernel - 1) * channels


def _gated_delta(fields):
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    fields.need(*names, "linear_conv_kernel_dim")
    k_heads, v_heads, k_width, v_width = (fields.count(name) for name in names)
    channels = 2 * k_heads * k_width + v_heads * v_width
    conv = _conv(fields.count("linear_conv_kernel_dim"), channels)
    return "Gated DeltaNet", conv, v_heads * k_width * v_width


def _delta_of(fields, heads, width, kernel):
    """Kimi's delta attention: a convolution each for Q, K and V."""
    heads, width = fields.count(heads), fields.count(width)
    return "Kimi Delta Attention", _conv(fields.count(kernel), 3 * heads * width), heads * width * width


def _kimi_delta(fields):
    return _delta_of(fields.inner("linear_attn_config"), "num_heads", "head_dim", "short_conv_kernel_size")


def _kimi_delta_flat(fields):
    return _delta_of(fields, "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")


def _mamba2(heads_name, width, groups, state, kernel):
    def read(fields):
        fields.need(heads_name, groups, state, kernel)
        heads = fields.count(heads_name)
        channels = heads * (width(fields, heads) if callable(width) else fields.count(width))
        states = fields.count(state)
        conv = _conv(fields.count(kernel), channels + 2 * fields.count(groups) * states)
        return "Mamba-2", conv, channels * states

    return read


def _split_inner(fields, heads):
    """Width of a head where it is left to be worked out from what is expanded."""
    name = fields.first("mamba_d_head", "mamba_headdim")
    if fields.has(name) and fields.values[name] != "auto":
        return fields.count(name)
    inner = fields.count("mamba_d_ssm", None)
    if inner is None:
        fields.need("mamba_expand", "hidden_size")
        inner = fields.count("mamba_expand") * fields.count("hidden_size")
    if inner % heads:
        fields.refuse(f"{inner} channels are no multiple of {heads} heads", "mamba_expand", "mamba_d_ssm")
    return inner // heads


def _mamba1(inner, state, kernel):
    def read(fields):
        fields.need(state, kernel)
        channels, states = inner(fields), fields.count(state)
        return "Mamba", _conv(fields.count(kernel), channels), channels * states

    return read


def _expanded(fields):
    fields.need("mamba_expand", "hidden_size")
    return fields.count("mamba_expand") * fields.count("hidden_size")


def _intermediate(fields):
    """`intermediate_size` where it is there: `expand` beside it can be wrong."""
    if fields.has("intermediate_size"):
        return fields.count("intermediate_size")
    fields.need("expand", "hidden_size")
    return fields.count("expand") * fields.count("hidden_size")


def _short_conv(fields):
    fields.need("conv_L_cache", "hidden_size")
    return "short convolution", _conv(fields.count("conv_L_cache"), fields.count("hidden_size")), 0


def _linear_unit(fields):
    fields.need("conv1d_width", "hidden_size")
    width = fields.count("lru_width", fields.count("hidden_size"))
    return "linear recurrence", _conv(fields.count("conv1d_width"), width), width


def _lightning(fields):
    heads, width = query_heads(fields), head_dim(fields)
    return "lightning attention", 0, heads * width * width


_RULES = (  # fields that tell which of them it is; the first rules
    (("linear_num_value_heads",), _gated_delta),
    (("linear_attn_config",), _kimi_delta),
    (("linear_num_heads",), _kimi_delta_flat),
    (
        ("mamba_num_heads",),
        _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    ),
    (
        ("mamba_n_heads",),
        _mamba2("mamba_n_heads", _split_inner, "mamba_n_groups", "mamba_d_state", "mamba_d_conv"),
    ),
    (
        ("n_mamba_heads", "mamba_ngroups"),
        _mamba2("n_mamba_heads", _split_inner, "mamba_ngroups", "mamba_d_state", "mamba_d_conv"),
    ),
    (("mamba_d_state",), _mamba1(_expanded, "mamba_d_state", "mamba_d_conv")),
    (
        ("num_heads", "state_size", "n_groups"),
        _mamba2("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
    ),
    (("state_size",), _mamba1(_intermediate, "state_size", "conv_kernel")),
    (("conv_L_cache",), _short_conv),
    (("conv1d_width",), _linear_unit),
)

SIGNS = ("linear_num_value_heads", "linear_attn_config", "mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
SIGNS += ("mamba_d_state", "ssm_state_size", "state_size", "conv_L_cache", "conv1d_width", "attn_type_list")

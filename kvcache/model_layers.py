"""What each layer of a model keeps for a sequence, from the fields of its config."""

from dataclasses import dataclass

from kvcache.model_families import (
    ATTENTION_PERIOD,
    CHUNKS_PERIOD,
    LATENT,
    RECURRENT,
    WINDOW_EVERYWHERE,
    WINDOW_FROM_LAYER,
    WINDOW_OFF,
    WINDOW_PERIOD,
)
from kvcache.model_fields import MAX_LAYERS, told
from kvcache.model_heads import head_dim, kv_heads, query_heads
from kvcache.model_states import SIGNS, state_of

# Words for a layer in published files -> what is meant
FULL, SLIDING, CHUNKED, STATE, BOTH, NONE = "full", "sliding", "chunked", "state", "both", "none"
WORDS = {
    "full_attention": FULL,
    "attention": FULL,
    "indexed_attention": FULL,
    "deepseek_sparse_attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": STATE,
    "mamba": STATE,
    "recurrent": STATE,
    "conv": STATE,
    "hybrid": BOTH,
    "mlp": NONE,
    "moe": NONE,
}
LETTERS = {"M": STATE, "*": FULL, "-": NONE, "E": NONE}  # of a hybrid_override_pattern
WITHOUT_ATTENTION = ("mamba", "mamba2", "falcon_mamba")


@dataclass(frozen=True)
class Layer:
    """What one layer keeps for one sequence.

    Attributes
    ----------
    kind : str
        For people: ``"full attention"``, ``"Mamba-2"``, ...
    planes : tuple of (str, int, int)
        Name, heads and width of what it keeps for each token, in elements; empty if it keeps nothing per token.
    window : int or None
        The most tokens that it ever looks back to; None: all.
    conv, state : int
        Elements of convolution and recurrent state, however long the sequence is.
    """

    kind: str
    planes: tuple = ()
    window: int | None = None
    conv: int = 0
    state: int = 0

    @property
    def elements_per_token(self):
        """Elements of all planes for one token."""
        return sum(heads * width for _, heads, width in self.planes)


def layers_of(fields):
    """A tuple of `Layer`, one for each layer of the model."""
    if fields.has("block_configs"):
        return _layers_of_blocks(fields)
    meanings = _without_windows_switched_off(fields, _meanings(fields))
    layers = tuple(_layer(fields, meaning, number) for number, meaning in enumerate(meanings))
    return _shared(fields, layers)


def num_layers(fields):
    """How many layers the model has."""
    name = fields.first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if not fields.has(name):  # newer files have the list alone
        told_by = fields.first("layer_types", "layers_block_type", "block_configs")
        if fields.has(told_by):
            return len(fields.items(told_by, dict if told_by == "block_configs" else str))
    return fields.count(name, below=MAX_LAYERS)


# --- which layer is of which kind


def _meanings(fields):
    """FULL, SLIDING, ... for each layer."""
    for name, read in _PATTERNS.items():
        if fields.has(name):
            return read(fields, name, num_layers(fields))
    count = num_layers(fields)
    if fields.model_type in WITHOUT_ATTENTION:
        return [STATE] * count
    if fields.model_type in ATTENTION_PERIOD:
        return _every(ATTENTION_PERIOD[fields.model_type], count, STATE)
    if fields.model_type in CHUNKS_PERIOD:
        return _chunked(fields, count)
    if fields.model_type == "falcon_h1":
        return [BOTH] * count
    signs = [name for name in SIGNS if fields.has(name)]
    if fields.model_type in RECURRENT or signs:
        fields.refuse(
            f"which layers are recurrent is not told: none of {', '.join(_PATTERNS)}", *signs, *_PATTERNS
        )
    return _windowed(fields, count)


def _every(period, count, others):
    """Every so manieth layer attends to everything, the others do not."""
    return [others if (number + 1) % period else FULL for number in range(count)]


def _words(fields, name, count):
    return [_meaning(fields, name, word) for word in fields.items(name, str, count)]


def _meaning(fields, name, word):
    if word not in WORDS:
        fields.refuse(f"{fields.prefix}{name} has {told(word)}, known are {', '.join(WORDS)}", name)
    return WORDS[word]


def _letters(fields, name, count):
    pattern = fields.values[name]
    if not isinstance(pattern, str) or not set(pattern) <= set(LETTERS):
        fields.refuse(
            f"{fields.prefix}{name} is {told(pattern)}, expected a text of {' '.join(LETTERS)}", name
        )
    if len(pattern) != count:
        fields.refuse(f"{fields.prefix}{name} has {len(pattern)} letters for {count} layers", name)
    return [LETTERS[letter] for letter in pattern]


def _repeated_words(fields, name, count):
    """A short list that is repeated over the layers; its attention is local."""
    words = fields.items(name, str)
    if not words:
        fields.refuse(f"{fields.prefix}{name} is empty", name)
    meanings = [SLIDING if word == "attention" else _meaning(fields, name, word) for word in words]
    return (meanings * count)[:count]


def _digits(one, zero):
    def read(fields, name, count):
        digits = fields.items(name, int, count)
        if not set(digits) <= {0, 1}:
            fields.refuse(f"{fields.prefix}{name} is {told(digits)}, expected zeros and ones", name)
        return [one if digit else zero for digit in digits]

    return read


def _periodic(fields, name, count):
    fields.need("attn_layer_period", "attn_layer_offset")
    period = fields.count("attn_layer_period")
    offset = fields.count("attn_layer_offset", least=0, below=period)
    return [FULL if number % period == offset else STATE for number in range(count)]


def _indices(fields, name, count):
    found = {fields.whole(number, name, least=0, below=count) for number in fields.items(name, int)}
    return [FULL if number in found else STATE for number in range(count)]


def _numbered(fields, name, count):
    """Lists of layers, counted from 1, in an object of its own."""
    inner = fields.inner(name)
    inner.need("full_attn_layers", "kda_layers")
    meanings = [None] * count
    for field, meaning in (("full_attn_layers", FULL), ("kda_layers", STATE)):
        for number in inner.items(field, int):
            meanings[inner.whole(number, field, below=count + 1) - 1] = meaning
    if None in meanings:
        inner.refuse(
            f"{name} says nothing of layer {meanings.index(None) + 1}", "full_attn_layers", "kda_layers"
        )
    return meanings


def _full_interval(fields, name, count):
    return _every(fields.count(name), count, STATE)


_PATTERNS = {  # field -> how it is read; the first that is there rules
    "hybrid_override_pattern": _letters,
    "hybrid_layer_pattern": _digits(SLIDING, FULL),
    "layer_types": _words,
    "layers_block_type": _words,
    "block_types": _repeated_words,
    "attn_type_list": _digits(FULL, STATE),
    "attn_layer_period": _periodic,
    "attn_layer_indices": _indices,
    "full_attn_idxs": _indices,
    "linear_attn_config": _numbered,
    "full_attention_interval": _full_interval,
}


def _chunked(fields, count):
    """Layers with rotary positions attend within chunks, those without to everything."""
    if not fields.has("attention_chunk_size"):
        return [FULL] * count
    if fields.has("no_rope_layers") and fields.values["no_rope_layers"] != []:
        return _digits(CHUNKED, FULL)(fields, "no_rope_layers", count)
    period = fields.count("no_rope_layer_interval", CHUNKS_PERIOD[fields.model_type])
    return _every(period, count, CHUNKED)


def _windowed(fields, count):
    kind = fields.model_type
    if fields.has("attention_chunk_size"):
        fields.refuse(
            "attention_chunk_size: which layers attend in chunks is not known", "attention_chunk_size"
        )
    if not _window_is_on(fields):
        return [FULL] * count
    name = fields.first("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
    if fields.has(name):
        return _pattern(fields, name, count)
    if kind in WINDOW_PERIOD:
        return _every(WINDOW_PERIOD[kind], count, SLIDING)
    if kind in WINDOW_EVERYWHERE:
        return [SLIDING] * count
    if kind in WINDOW_FROM_LAYER:
        first = fields.count("max_window_layers", least=0)
        return [SLIDING if number >= first else FULL for number in range(count)]
    return fields.refuse(f"which layers slide by {_window_field(fields)} is not known", _window_field(fields))


def _pattern(fields, name, count):
    pattern = fields.values[name]
    if isinstance(pattern, str):  # L: local, G: global
        if not pattern or not set(pattern) <= {"L", "G"}:
            fields.refuse(f"{fields.prefix}{name} is {told(pattern)}, expected a text of L and G", name)
        return [SLIDING if pattern[number % len(pattern)] == "L" else FULL for number in range(count)]
    return _every(fields.count(name), count, SLIDING)


# --- windows


def _window_field(fields):
    return fields.first("sliding_window", "sliding_window_size", "attention_window_size")


def _window_is_on(fields):
    return fields.has(_window_field(fields)) and fields.flag(
        "use_sliding_window", fields.model_type not in WINDOW_OFF
    )


def _without_windows_switched_off(fields, meanings):
    """`use_sliding_window: false` rules over what the layers are called."""
    if fields.flag("use_sliding_window", True):
        return meanings
    return [FULL if meaning == SLIDING else meaning for meaning in meanings]


def _window(fields):
    both_ways = fields.values.get("use_bidirectional_attention")
    if both_ways not in (None, False, "vision"):
        fields.refuse(
            f"use_bidirectional_attention is {told(both_ways)}: only attention to what came before is known",
            "use_bidirectional_attention",
        )
    return fields.count(_window_field(fields))


# --- what a layer keeps


def _layer(fields, meaning, number):
    if meaning == NONE:
        return Layer("no attention")
    if meaning == STATE:
        kind, conv, state = state_of(fields)
        return Layer(kind, conv=conv, state=state)
    if meaning == BOTH:
        kind, conv, state = state_of(fields)
        return Layer(f"full attention and {kind}", _heads(fields, FULL), conv=conv, state=state)
    if fields.model_type in LATENT or fields.has("kv_lora_rank") or fields.has("qk_rope_head_dim"):
        if meaning != FULL:
            fields.refuse("kv_lora_rank: latent attention with a window is not known", "kv_lora_rank")
        return _latent(fields, number)
    planes = _heads(fields, meaning)
    if meaning == SLIDING:
        return Layer("sliding window", planes, _window(fields))
    if meaning == CHUNKED:
        return Layer("chunked attention", planes, fields.count("attention_chunk_size"))
    return Layer("full attention", planes)


def _heads(fields, meaning):
    """The planes K and V of a layer that keeps them for each head."""
    heads, width = kv_heads(fields), head_dim(fields)
    v_width = fields.count("v_head_dim", width)
    if meaning == SLIDING:
        heads = fields.count("swa_num_key_value_heads", heads)
        width = fields.count("swa_head_dim", width)
        v_width = fields.count("swa_v_head_dim", fields.count("v_head_dim", width))
    elif fields.has("global_head_dim") or fields.has("num_global_key_value_heads"):
        width = v_width = fields.count("global_head_dim", width)
        if fields.flag("attention_k_eq_v", True):  # where it is false, the field is not used
            heads = fields.count("num_global_key_value_heads", heads)
    return ("k", heads, width), ("v", heads, v_width)


def _latent(fields, number):
    """One latent for all heads, and the part of K that positions are rotated into; absorbed, as engines keep it."""
    fields.need("kv_lora_rank", "qk_rope_head_dim")
    planes = (
        ("k", 1, fields.count("kv_lora_rank")),
        ("v", 1, fields.count("qk_rope_head_dim")),
    )
    if not fields.has("index_head_dim") or not _has_indexer(fields, number):
        return Layer("latent attention", planes)
    return Layer("latent attention, indexed", (*planes, ("index_k", 1, fields.count("index_head_dim"))))


def _has_indexer(fields, number):
    if not fields.has("indexer_types"):
        return True
    kinds = fields.items("indexer_types", str, num_layers(fields))
    if not set(kinds) <= {"full", "shared"}:
        fields.refuse(f"indexer_types is {told(kinds)}, expected full and shared only", "indexer_types")
    return kinds[number] == "full"


def _shared(fields, layers):
    """The last layers of some models read what an earlier one has kept."""
    count = fields.count("num_kv_shared_layers", 0, least=0, below=len(layers) + 1)
    return layers[: len(layers) - count] + (Layer("shared with an earlier layer"),) * count


# --- block lists, which say everything of each layer


def _layers_of_blocks(fields):
    blocks = fields.items("block_configs", dict, num_layers(fields))
    return tuple(_block(fields, f"block_configs[{number}]", block) for number, block in enumerate(blocks))


def _block(fields, name, block):
    outside = fields.within(name, block)
    outside.need("attention")
    inner = outside.inner("attention")
    if inner.flag("no_op") or inner.flag("replace_with_linear"):
        return Layer("no attention")
    if inner.has("num_sink_tokens") or inner.has("sparsify"):
        field = inner.first("num_sink_tokens", "sparsify")
        inner.refuse(f"{inner.prefix}{field} is {told(inner.values[field])}, which is not known", field)
    group = inner.count("n_heads_in_group")
    queries = query_heads(fields)
    if queries % group:
        inner.refuse(
            f"{inner.prefix}n_heads_in_group is {group}, which does not divide {queries} heads",
            "n_heads_in_group",
        )
    width = head_dim(fields)
    planes = ("k", queries // group, width), ("v", queries // group, width)
    window = inner.count("window_length", None)
    return Layer("full attention" if window is None else "sliding window", planes, window)

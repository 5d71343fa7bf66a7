"""What a sequence of a model costs, and what a step needs beside it, in bytes.

Two costs differ and are kept apart. What a model needs to keep: layers with a window no more than their window.
What an arena takes today: such layers keep all tokens, as if they attended to everything.
"""

from dataclasses import dataclass

from kvcache.model_heads import hidden_field
from kvcache.model_weights import active_width
from kvcache.spec import ITEMSIZE

PREFILL_TOKENS = 2048  # that one step computes at most
USUAL_SEQUENCES = 16  # whose logits are held at a time, where no other number is given


@dataclass(frozen=True)
class Costs:
    """What a sequence costs.

    Attributes
    ----------
    bytes_per_token : int
        Of layers that keep all tokens.
    windows : tuple of (int, int)
        Bytes per token, and the most tokens that are kept, of layers with a window; by window.
    state_bytes : int
        Of layers whose state does not grow.
    state_bytes_by_dtype : dict
        The same, for a recurrent state in float32 and in bfloat16.
    arena_bytes_per_token : int
        Of all layers that keep tokens, as they lie in an arena: no window's front is released.
    """

    bytes_per_token: int
    windows: tuple
    state_bytes: int
    state_bytes_by_dtype: dict
    arena_bytes_per_token: int

    def sequence_bytes(self, tokens):
        """Bytes of a sequence of so many tokens, where windows keep no more than they need."""
        kept = sum(each * min(tokens, window) for each, window in self.windows)
        return self.bytes_per_token * tokens + kept + self.state_bytes

    def arena_sequence_bytes(self, tokens, block_size):
        """Bytes of a sequence in an arena, in whole blocks, and of its state beside it."""
        return self.arena_bytes_per_token * whole_blocks(tokens, block_size) + self.state_bytes


def whole_blocks(tokens, block_size):
    """Tokens, rounded up to whole blocks."""
    return -(-tokens // block_size) * block_size


def costs_of(model):
    """What a sequence of a model costs.

    Parameters
    ----------
    model : ModelConfig

    Returns
    -------
    Costs
    """
    element = ITEMSIZE[model.dtype]
    windows = {}
    for layer in model.layers:
        if layer.window is not None:
            windows[layer.window] = windows.get(layer.window, 0) + layer.elements_per_token * element
    unbounded = sum(layer.elements_per_token for layer in model.layers if layer.window is None) * element
    conv = sum(layer.conv for layer in model.layers) * element
    state = sum(layer.state for layer in model.layers)
    return Costs(
        bytes_per_token=unbounded,
        windows=tuple((windows[window], window) for window in sorted(windows)),
        state_bytes=conv + state * ITEMSIZE[model.state_dtype],
        state_bytes_by_dtype={name: conv + state * ITEMSIZE[name] for name in ("float32", "bfloat16")},
        arena_bytes_per_token=unbounded + sum(windows.values()),
    )


def activation_bytes(model, sequences=None):
    """An estimate of what a step needs beside weights and cache, in bytes.

    Twice what the widest layer makes of `PREFILL_TOKENS` tokens (its input, its norm, Q, K, V, what attention gives,
    and three arrays as wide as its feed-forward network), as allocators keep buffers for the next layer; and the
    logits of one token of each sequence, in float32. Attention is taken to be fused: no scores are kept.
    """
    fields = model.fields
    fields.need(hidden_field(fields), "vocab_size")
    hidden = fields.count(hidden_field(fields))
    tokens = min(PREFILL_TOKENS, model.max_position_embeddings or PREFILL_TOKENS)
    widest = 0
    for number, layer in enumerate(model.layers):
        mixed = 3 * layer.elements_per_token + (layer.conv and 2 * hidden)
        widest = max(widest, 6 * hidden + mixed + 3 * active_width(fields, number))
    logits = 4 * (sequences or USUAL_SEQUENCES) * fields.count("vocab_size")
    return 2 * tokens * widest * max(2, ITEMSIZE[model.dtype]) + logits

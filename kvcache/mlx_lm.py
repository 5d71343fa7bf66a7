"""mlx-lm's models, unmodified, on a `KVCache`: one sequence at a time, or a batch without padding.

- `cache_for` makes a cache with the layers that a model has, `spec_for` says what it will take.
- `prompt_cache` is one sequence as `mlx_lm.generate` wants it: an object per layer.
- `BatchCache` is a batch: one row per new token, each sequence attends over its own view of the arena.
  `routed_attention` makes mlx-lm's attention understand it.
- `Decoder` is the loop body of an engine made of these, `random_llama` a model to try it on.

mlx-lm 0.32 is supported: this is the one module that knows it.
"""

import inspect
import math
import threading
import types
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models import base, llama
from mlx_lm.models.cache import KVCache as PlainCache
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from .cache import KVCache
from .mlx_rows import BatchCache, RowKeys, RowMask, UnsupportedModel
from .mlx_sequence import LayerCache, LimitReached, Sequence, prompt_cache
from .spec import KVCacheSpec, LayerSpec, PlaneSpec

__all__ = [
    "BatchCache",
    "Choice",
    "Decoder",
    "LayerCache",
    "LimitReached",
    "UnsupportedModel",
    "cache_for",
    "load",
    "prompt_cache",
    "random_llama",
    "routed_attention",
    "spec_for",
]


# --- a cache for a model ------------------------------------------------------------------------------------


def spec_for(model, max_total_tokens, block_size=16):
    """Shapes and dtypes of the K and V of an mlx-lm model.

    They are read off what the model's layers hand to mlx-lm's own caches, in a graph that is never computed.

    Parameters
    ----------
    model : mlx.nn.Module
        A model of mlx-lm.
    max_total_tokens, block_size : int
        As in `KVCacheSpec`.

    Returns
    -------
    KVCacheSpec

    Raises
    ------
    UnsupportedModel
        A layer keeps something else than K and V per token, such as a recurrent state.

    Notes
    -----
    A layer with a sliding window keeps all tokens here. The window that the model's mask asks for is applied
    when they are read.
    """
    caches = make_prompt_cache(model)
    for number, cache in enumerate(caches):
        if type(cache) not in (PlainCache, RotatingKVCache):
            raise UnsupportedModel(
                f"layer {number} of this {type(model).__module__.rpartition('.')[2]} model keeps a "
                f"{type(cache).__name__}, expected K and V per token (KVCache or RotatingKVCache)"
            )
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    layers = [LayerSpec((_plane("k", cache.keys), _plane("v", cache.values))) for cache in caches]
    return KVCacheSpec.from_layers(layers, max_total_tokens, block_size)


def _plane(name, array):
    _, heads, _, width = array.shape
    return PlaneSpec(name, heads, width, str(array.dtype).removeprefix("mlx.core."))


def cache_for(model, max_total_tokens, block_size=16, **options):
    """Make a `KVCache` for an mlx-lm model, in MLX arrays.

    Parameters
    ----------
    model : mlx.nn.Module
        A model of mlx-lm.
    max_total_tokens, block_size : int
        As in `KVCacheSpec`.
    **options
        Further options of `KVCache`. ``stream`` is by default mlx-lm's generation stream and the calling
        thread's default stream, so that both `mlx_lm.generate` and plain calls of the model are waited for
        before a move.

    Returns
    -------
    KVCache
    """
    streams = (generation_stream, mx.default_stream(mx.default_device()))
    spec = spec_for(model, max_total_tokens, block_size)
    return KVCache(spec, **{"backend": "mlx", "stream": streams, **options})


# --- the way into mlx-lm's attention ------------------------------------------------------------------------

# mlx-lm's models import this function by name, before or after us. Its code is the one thing that all of them
# share.
_attention = base.scaled_dot_product_attention
_original = types.FunctionType(
    _attention.__code__, _attention.__globals__, _attention.__name__, _attention.__defaults__
)
_known_signature = ("queries", "keys", "values", "cache", "scale", "mask", "sinks=None")
_route_lock = threading.Lock()
_open_routes = 0


@contextmanager
def routed_attention():
    """Let mlx-lm's attention read `BatchCache`, for as long as the block is open.

    Replaces the code of ``mlx_lm.models.base.scaled_dot_product_attention`` and puts it back at the end.
    Calls with arrays go where they always went. Blocks nest, and may be open in several threads.

    Raises
    ------
    RuntimeError
        This mlx-lm's function has another signature than the one that is known here; nothing has been
        replaced.
    """
    global _open_routes  # noqa: PLW0603 (the function whose code it counts is global, too)
    with _route_lock:
        if _open_routes == 0:
            _verify(_attention)
            _attention.__code__ = _routed.__code__
        _open_routes += 1
    try:
        yield
    finally:
        with _route_lock:
            _open_routes -= 1
            if _open_routes == 0:
                _attention.__code__ = _original.__code__


def _verify(function):
    parameters = inspect.signature(function).parameters.values()
    found = tuple(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters)
    if found != _known_signature or function.__closure__ is not None:
        raise RuntimeError(
            f"mlx-lm {mlx_lm.__version__} has an attention function of ({', '.join(found)}), "
            f"expected ({', '.join(_known_signature)}): batches need mlx-lm 0.32"
        )


def _routed(queries, keys, values, cache, scale, mask, sinks=None):
    # Runs as mlx-lm's function, among that module's globals: names of this module have to be imported.
    from kvcache.mlx_lm import _attend

    return _attend(queries, keys, values, cache, scale, mask, sinks)


def _attend(queries, keys, values, cache, scale, mask, sinks):
    if type(keys) is not RowKeys:
        return _original(queries, keys, values, cache, scale, mask, sinks)
    if type(mask) is not RowMask:
        raise UnsupportedModel(
            f"the mask of a batch without padding is made by its cache, got {type(mask).__name__}"
        )
    return keys.rows.attend(keys.layer, queries, scale, mask.window, sinks)


# --- models -------------------------------------------------------------------------------------------------


def load(path_or_repo):
    """Load a model and its tokenizer through `mlx_lm.load`, and compute in float32.

    In half precision, the rounding of a batched matrix product flips the choice between two nearly equal
    logits.

    Parameters
    ----------
    path_or_repo : str
        A folder, or a repository of the Hugging Face hub.

    Returns
    -------
    tuple
        Model and tokenizer.
    """
    model, tokenizer = mlx_lm.load(path_or_repo)
    model.set_dtype(mx.float32)
    return model, tokenizer


def random_llama(
    seed=0,
    *,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=192,
    vocab_size=512,
):
    """Build a small Llama with random float32 weights, for demonstrations, tests and benchmarks.

    Greedy decoding soon repeats itself where attention is close to an average over the context. So embeddings
    are untied, queries and keys large enough that attention picks out single tokens, and its output is large
    beside the embedding: what comes next depends on the whole context.

    Parameters
    ----------
    seed : int
        Of the weights: the same seed gives the same model, and mlx's global generator is left alone.
    hidden_size, num_layers, num_heads, num_kv_heads, intermediate_size, vocab_size : int
        As in the configuration of a Llama.

    Returns
    -------
    mlx.nn.Module
        A model of mlx-lm, evaluated.
    """
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        vocab_size=vocab_size,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = llama.Model(arguments)
    weights = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(seed), len(weights))
    model.load_weights(
        [(name, _random_weight(name, w, key)) for (name, w), key in zip(weights, keys, strict=True)]
    )
    mx.eval(model.parameters())
    return model


def _random_weight(name, weight, key):
    if weight.ndim == 1:
        return weight  # of a norm: ones
    gain = 2.0 if "self_attn" in name else 1.0
    deviation = 1.0 if "embed_tokens" in name else gain / math.sqrt(weight.shape[-1])
    return mx.random.normal(weight.shape, scale=deviation, key=key)


# --- an engine's loop body ----------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A token that was decoded, and how clear the choice was."""

    token: int
    logprob: float  # of the token, natural logarithm
    margin: float  # of its logit over the second best


class Decoder:
    """Greedy decoding of many sequences on one cache.

    Prompts are computed one sequence at a time by `prompt_cache`, steps for all members at once by
    `BatchCache`.

    Parameters
    ----------
    model : mlx.nn.Module
        A model of mlx-lm.
    cache : KVCache
        As `cache_for` makes it.
    """

    def __init__(self, model, cache):
        self.model = model
        self.cache = cache
        self.rows = BatchCache(cache)

    def prefill(self, request_id, prompt, cached_tokens=0):
        """Compute what is not there yet of the prompt of a sequence that was just admitted; it is the last member then.

        Parameters
        ----------
        request_id : hashable
        prompt : sequence of int
            Token ids, as many as were admitted.
        cached_tokens : int
            Of these, from the first on, those that the admission found in place.

        Returns
        -------
        Choice
            The first new token.
        """
        with mx.stream(generation_stream), self.cache.hold():
            layers = prompt_cache(self.cache, request_id, cached_tokens=cached_tokens)
            logits = self.model(mx.array(prompt[cached_tokens:])[None], cache=layers)
            (choice,) = _greedy(logits[:, -1])
        self.rows.add(request_id)
        return choice

    def step(self, tokens):
        """Append one token to every member and decode the next.

        Parameters
        ----------
        tokens : list of int
            The newest token of each member, in batch order.

        Returns
        -------
        list of Choice
            The next token of each member.

        Raises
        ------
        CacheFull
            A member was refused, and nobody has been given a token: admit sequences with a limit that holds
            all that they will decode.
        """
        granted = self.rows.append(tokens)
        if not granted.all():
            self.rows.batch.truncate(granted.astype(int).tolist())
            refused = self.rows.request_ids[int(granted.argmin())]
            raise Sequence(self.cache, refused).refusal(self.cache.used_tokens(refused) + 1)
        with mx.stream(generation_stream), routed_attention(), self.cache.hold():
            logits = self.model(mx.array(tokens)[:, None], cache=self.rows.layers)
            return _greedy(logits[:, -1])

    def finish(self, request_id):
        """Take a member out and free its blocks."""
        self.rows.remove(request_id)
        self.cache.free_for(request_id)

    def alone(self, prompt, num_tokens):
        """Decode one prompt with mlx-lm's own generation and cache; nothing of this package takes part.

        Parameters
        ----------
        prompt : sequence of int
            Token ids.
        num_tokens : int
            Tokens to decode.

        Returns
        -------
        list of Choice
            `margin` is not computed and is ``nan``.
        """
        tokens, logprobs = [], []
        steps = generate_step(
            mx.array(prompt), self.model, max_tokens=num_tokens, prompt_cache=make_prompt_cache(self.model)
        )
        for token, step_logprobs in steps:
            tokens.append(token)
            logprobs.append(step_logprobs[token])
        return [
            Choice(token, p, math.nan) for token, p in zip(tokens, mx.stack(logprobs).tolist(), strict=True)
        ]


def _greedy(logits):
    """The best token of each row of logits ``(rows, vocabulary)``, evaluated."""
    tokens = mx.argmax(logits, axis=-1)
    second, best = mx.split(mx.sort(mx.topk(logits, 2, axis=-1), axis=-1), 2, axis=-1)
    logprobs = best[:, 0] - mx.logsumexp(logits, axis=-1)
    margins = (best - second)[:, 0]
    mx.eval(tokens, logprobs, margins)
    return [Choice(*row) for row in zip(tokens.tolist(), logprobs.tolist(), margins.tolist(), strict=True)]

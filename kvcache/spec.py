"""Shapes, dtypes and bytes of an arena: arithmetic only, nothing here allocates."""

import operator
from dataclasses import dataclass
from functools import cached_property

# What a plane may hold, in bytes.
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}
FLOATS = ("float32", "float16", "bfloat16")  # what K and V of a plain cache may be
MAX_TOKENS = 2**31  # an arena has fewer: slots are int32
MAX_AXIS = 2**31  # heads and width are below: array libraries count an axis in int32
MAX_LAYERS = 2**16


def itemsize(dtype):
    """Bytes of one element of a plane's dtype, given by name."""
    return ITEMSIZE[dtype_named(dtype)]


def dtype_named(dtype, known=tuple(ITEMSIZE)):
    """`dtype` itself if it is one of the `known` names; `TypeError` or `ValueError` otherwise."""
    if not isinstance(dtype, str):
        raise TypeError(f"dtype is a {type(dtype).__name__}, expected a name: {', '.join(known)}")
    if dtype not in known:
        raise ValueError(f"unknown dtype {dtype!r}, known are {', '.join(known)}")
    return dtype


def whole_number(value, name, least=1):
    """`value` as an int of at least `least`; a bool, float or str is a `TypeError`, too small a `ValueError`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an int")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} is {number}, expected at least {least}")
    return number


def _axis(value, name, limit=MAX_AXIS):
    number = whole_number(value, name)
    if number >= limit:
        raise ValueError(f"{name} is {number}, expected fewer than {limit}")
    return number


@dataclass(frozen=True)
class PlaneSpec:
    """One array of a layer, of shape ``(heads, arena tokens, width)``.

    Parameters
    ----------
    name : str
        What it is found by within its layer: ``"k"``, ``"v"``, ``"k_scales"``, ...
    heads, width : int
        Its first and last axis, in elements.
    dtype : str
        ``float32``, ``float16``, ``bfloat16``, ``uint32`` or ``uint8``.
    """

    name: str
    heads: int
    width: int
    dtype: str = "float32"

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"name of a plane is a {type(self.name).__name__}, expected a str")
        if not self.name:
            raise ValueError("name of a plane is empty")
        object.__setattr__(self, "heads", _axis(self.heads, "heads"))
        object.__setattr__(self, "width", _axis(self.width, "width"))
        dtype_named(self.dtype)

    @property
    def bytes_per_token(self):
        """Bytes of one token in this plane, all heads."""
        return self.heads * self.width * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class LayerSpec:
    """The planes of one layer, in the order in which writes take them and views return them.

    Parameters
    ----------
    planes : iterable of PlaneSpec
        At least one, no two of one name. K and V are the planes named ``"k"`` and ``"v"``, else the first and the
        second.
    """

    planes: tuple[PlaneSpec, ...]

    def __post_init__(self):
        planes = _tuple_of(PlaneSpec, self.planes, "planes")
        names = [plane.name for plane in planes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"planes of one layer share the name {', '.join(map(repr, repeated))}")
        object.__setattr__(self, "planes", planes)

    @property
    def k_index(self):
        """Number of the plane that K calls mean."""
        return self._index_of("k", 0)

    @property
    def v_index(self):
        """Number of the plane that V calls mean, `None` where there is no second plane."""
        return self._index_of("v", 1)

    def _index_of(self, name, otherwise):
        for index, plane in enumerate(self.planes):
            if plane.name == name:
                return index
        return otherwise if otherwise < len(self.planes) else None

    @property
    def bytes_per_token(self):
        """Bytes of one token in this layer, all planes."""
        return sum(plane.bytes_per_token for plane in self.planes)


def _tuple_of(kind, items, name):
    items = tuple(items)
    for item in items:
        if not isinstance(item, kind):
            raise TypeError(f"{name} has a {type(item).__name__}, expected {kind.__name__} only")
    if not items:
        raise ValueError(f"{name} is empty, expected at least one {kind.__name__}")
    return items


def _the_one(values):
    """The value that all have, `None` where they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


@dataclass(frozen=True, init=False, repr=False)
class KVCacheSpec:
    """Shape, dtype and size of a cache, before a byte of it exists.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
        Shape of the model's K and V. With grouped-query attention, heads of K and V, not of queries.
    max_total_tokens : int
        Tokens that all sequences together may have; rounded up to whole blocks.
    block_size : int
        Tokens per block.
    dtype : str
        ``float32``, ``float16`` or ``bfloat16``.
    v_head_dim : int, optional
        Width of V where it differs from K's.

    Raises
    ------
    TypeError
        A bool, float or str where an int belongs.
    ValueError
        A count below 1, an unknown dtype, or an arena of ``2**31`` tokens or more.

    Examples
    --------
    >>> spec = KVCacheSpec(32, 32, 64, 32768)
    >>> spec.num_blocks, spec.arena_bytes
    (2048, 17179869184)
    """

    layers: tuple[LayerSpec, ...]
    max_total_tokens: int
    block_size: int

    def __init__(
        self,
        num_layers,
        num_kv_heads,
        head_dim,
        max_total_tokens,
        block_size=16,
        dtype="float32",
        v_head_dim=None,
    ):
        num_layers = _axis(num_layers, "num_layers", MAX_LAYERS)
        heads = _axis(num_kv_heads, "num_kv_heads")
        k_width = _axis(head_dim, "head_dim")
        v_width = k_width if v_head_dim is None else _axis(v_head_dim, "v_head_dim")
        dtype_named(dtype, FLOATS)
        layer = LayerSpec((PlaneSpec("k", heads, k_width, dtype), PlaneSpec("v", heads, v_width, dtype)))
        self._fill((layer,) * num_layers, max_total_tokens, block_size)

    @classmethod
    def from_layers(cls, layers, max_total_tokens, block_size=16):
        """A spec of layers that may differ in planes, heads, widths and dtypes.

        Parameters
        ----------
        layers : iterable of LayerSpec
            One per layer of the model.
        max_total_tokens, block_size : int
            As in the constructor.

        Returns
        -------
        KVCacheSpec
            Equal to one from the constructor if its layers are.
        """
        spec = cls.__new__(cls)
        spec._fill(_tuple_of(LayerSpec, layers, "layers"), max_total_tokens, block_size)
        return spec

    @classmethod
    def from_model(cls, config, max_total_tokens=None, block_size=16, *, dtype=None):
        """A spec for a model that Hugging Face publishes, from its config.

        Layers that keep no K and V (recurrent ones, or such that read what an earlier layer has kept) are not in it:
        layer i of the arena is the i-th that does, as `kvcache.model_config.ModelConfig.kv_layers` numbers them.
        Layers with a sliding window keep all tokens. Multi-head latent attention has two planes of one head,
        ``"k"`` with the latent and ``"v"`` with the part of K that positions are rotated into.

        Parameters
        ----------
        config : dict, str or os.PathLike
            What is in a ``config.json``, its path, or the folder that it is in.
        max_total_tokens : int, optional
            As in the constructor; by default the longest context of the model: room for one such sequence.
        block_size : int
        dtype : str, optional
            ``float32``, ``float16`` or ``bfloat16``; by default that of the model, bfloat16 if it does not say.

        Returns
        -------
        KVCacheSpec

        Raises
        ------
        UnreadableConfig
            A field is missing, wrong, or not understood, or no layer keeps K and V; the error names the fields.
        OSError
            The file is not there, or cannot be read.
        """
        from kvcache.model_config import read_config

        if dtype is not None:
            dtype_named(dtype, FLOATS)
        model = read_config(config, dtype)
        layers = [layer.planes for layer in model.layers if layer.planes]
        if not layers:
            model.fields.refuse(
                "no layer keeps K and V, so that there is nothing to make an arena for", "model_type"
            )
        if max_total_tokens is None and model.max_position_embeddings is None:
            model.fields.refuse(
                "no field tells the longest context: give max_total_tokens", "max_position_embeddings"
            )
        made = {
            planes: LayerSpec(PlaneSpec(*plane, model.dtype) for plane in planes) for planes in set(layers)
        }
        tokens = model.max_position_embeddings if max_total_tokens is None else max_total_tokens
        return cls.from_layers([made[planes] for planes in layers], tokens, block_size)

    def _fill(self, layers, max_total_tokens, block_size):
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "max_total_tokens", whole_number(max_total_tokens, "max_total_tokens"))
        object.__setattr__(self, "block_size", whole_number(block_size, "block_size"))
        if self.arena_tokens >= MAX_TOKENS:
            raise ValueError(
                f"an arena of {self.num_blocks} blocks of {self.block_size} tokens has {self.arena_tokens} tokens, "
                f"expected fewer than {MAX_TOKENS}"
            )

    def __repr__(self):
        return (
            f"KVCacheSpec(num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"max_total_tokens={self.max_total_tokens}, block_size={self.block_size}, dtype={self.dtype!r}, "
            f"v_head_dim={self.v_head_dim})"
        )

    @property
    def num_layers(self):
        """Number of layers."""
        return len(self.layers)

    @cached_property
    def num_kv_heads(self):
        """Heads of every plane, `None` where planes or layers differ."""
        return _the_one(plane.heads for layer in self.layers for plane in layer.planes)

    @cached_property
    def head_dim(self):
        """Width of every layer's K, `None` where layers differ."""
        return _the_one(layer.planes[layer.k_index].width for layer in self.layers)

    @cached_property
    def v_head_dim(self):
        """Width of every layer's V, `None` where layers differ or have no V."""
        return _the_one(
            None if layer.v_index is None else layer.planes[layer.v_index].width for layer in self.layers
        )

    @cached_property
    def dtype(self):
        """Dtype of every plane, by name; `None` where planes or layers differ."""
        return _the_one(plane.dtype for layer in self.layers for plane in layer.planes)

    @property
    def num_blocks(self):
        """Blocks of the arena: `max_total_tokens` rounded up to whole blocks."""
        return -(-self.max_total_tokens // self.block_size)

    @property
    def arena_tokens(self):
        """Tokens that the arena has room for: ``num_blocks * block_size``."""
        return self.num_blocks * self.block_size

    @cached_property
    def bytes_per_token(self):
        """Bytes of one token, all layers and planes."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def block_bytes(self):
        """Bytes of one block, all layers and planes."""
        return self.bytes_per_token * self.block_size

    @property
    def arena_bytes(self):
        """Bytes of the whole arena."""
        return self.block_bytes * self.num_blocks

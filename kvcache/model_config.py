"""A model's ``config.json``: what its layers keep for a sequence, and in which dtypes."""

import json
from dataclasses import dataclass
from pathlib import Path

from kvcache.errors import UnreadableConfig
from kvcache.model_fields import Fields, told
from kvcache.model_layers import Layer, layers_of

DTYPES = ("float32", "float16", "bfloat16")
GIVEN = "given"
USUAL_DTYPE = "bfloat16"  # where no field tells it
USUAL_STATE_DTYPE = "float32"  # what kernels compute in, and the larger


@dataclass(frozen=True)
class ModelConfig:
    """What is known of a model from its config.

    Attributes
    ----------
    model_type : str or None
        As the config has it, of the language model in it.
    layers : tuple of Layer
        One for each layer of the model.
    dtype, state_dtype : str
        Of K, V and convolution states; of recurrent states.
    dtype_field, state_dtype_field : str or None
        The field that says so, `GIVEN` where the caller does, None where nothing does and the usual one is taken.
    max_position_embeddings : int or None
        The longest context that the model is made for.
    fields : Fields
        All that the config has of the language model.
    """

    model_type: str | None
    layers: tuple[Layer, ...]
    dtype: str
    dtype_field: str | None
    state_dtype: str
    state_dtype_field: str | None
    max_position_embeddings: int | None
    fields: Fields

    @property
    def kv_layers(self):
        """Numbers of the model's layers that keep K and V, in order: layer i of an arena is the i-th of them."""
        return tuple(number for number, layer in enumerate(self.layers) if layer.planes)


def read_config(config, dtype=None, state_dtype=None):
    """What a model keeps, from its config.

    Parameters
    ----------
    config : dict, str or os.PathLike
        The config as Hugging Face publishes it, its file, or the folder that it is in.
    dtype, state_dtype : str, optional
        Of K and V, and of recurrent states, where they are not what the config says.

    Returns
    -------
    ModelConfig

    Raises
    ------
    UnreadableConfig
        A field is missing, wrong, or not understood; the error names it.
    OSError
        The file is not there, or cannot be read.
    """
    if not isinstance(config, dict):
        config = load_config(config)
    fields = Fields(config)
    fields.check_known()
    kept, kept_field = _dtype(fields, ("dtype", "torch_dtype"), USUAL_DTYPE, dtype)
    state, state_field = _dtype(
        fields, ("mamba_ssm_dtype", "mamba_ssm_cache_dtype"), USUAL_STATE_DTYPE, state_dtype
    )
    layers = layers_of(fields)
    fields.require_type()
    longest = fields.first("max_position_embeddings", "model_max_length", "n_positions", "max_seq_len")
    return ModelConfig(
        model_type=fields.model_type,
        layers=layers,
        dtype=kept,
        dtype_field=kept_field,
        state_dtype=state,
        state_dtype_field=state_field,
        max_position_embeddings=fields.count(longest, None, below=2**63),
        fields=fields,
    )


def load_config(path):
    """The object in a ``config.json``, or in the one of a folder."""
    path = Path(path)
    if path.is_dir():
        path /= "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _no_config(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _no_config(f"{path} has a {type(config).__name__}, expected an object")
    return config


def _no_config(reason):
    return UnreadableConfig(model_type=None, fields=(), reason=reason)


def _dtype(fields, names, usual, given):
    """A dtype and the field that tells it, of the language model or of what it is nested in."""
    if given is not None:
        return given, GIVEN
    for values, prefix in ((fields.values, fields.prefix), (fields.outer, "")):
        for name in names:
            value = values.get(name)
            if value is None or value == "auto":
                continue
            plain = value.removeprefix("torch.") if isinstance(value, str) else value
            if plain not in DTYPES:
                raise UnreadableConfig(
                    model_type=fields.model_type,
                    fields=(prefix + name,),
                    reason=f"{prefix}{name} is {told(value)}, known are {', '.join(DTYPES)}",
                )
            return plain, prefix + name
    return usual, None

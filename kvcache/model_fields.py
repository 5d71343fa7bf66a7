"""The fields of one model's config, read strictly: a value that is not what it should be is named and refused."""

from kvcache.errors import UnreadableConfig
from kvcache.model_families import CLASS_DEFAULTS, KNOWN, type_of_architecture, unread

NESTED = (
    "text_config",
    "llm_config",
    "language_config",
    "thinker_config",
)  # where the language model is told
MAX_COUNT = 2**31
MAX_LAYERS = 2**16
NO_DEFAULT = object()


def told(value):
    """`repr` of a value of a config, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """Fields of the language model of a config.

    Parameters
    ----------
    config : dict
        As parsed from ``config.json``.

    Attributes
    ----------
    values : dict
        The fields, with what the type's config class has for those that are left out.
    outer : dict
        The config that they are nested in, or the same.
    prefix : str
        Where they are nested, ``"text_config."`` or nothing.
    model_type : str or None
    """

    def __init__(self, config):
        self.outer, self.prefix, self.model_type = config, "", None
        values = self._nested(config)
        self.model_type = self._type_of(values) or self._type_of(config) or self._by_architecture()
        self.values = CLASS_DEFAULTS.get(self.model_type, {}) | values

    def _nested(self, values, depth=0):
        name = next((name for name in NESTED if values.get(name) is not None), None)
        if name is None:
            return values
        if not isinstance(values[name], dict) or depth == 4:
            self.refuse(f"{name} is {told(values[name])}, expected an object", name)
        self.prefix += f"{name}."
        return self._nested(values[name], depth + 1)

    def _type_of(self, values):
        kind = values.get("model_type")
        if kind is not None and not isinstance(kind, str):
            self.refuse(f"model_type is {told(kind)}, expected a name", "model_type")
        return kind

    def _by_architecture(self):
        names = self.outer.get("architectures")
        return type_of_architecture(names[0]) if isinstance(names, list) and names else None

    def check_known(self):
        """Refuse a model type that is not known, and fields that bear on the cache and are not understood."""
        fields = unread(self.values)
        if self.model_type is not None and self.model_type not in KNOWN:
            also = f", nor {self._list(fields)}" if fields else ""
            self.refuse(
                f"model_type {told(self.model_type)} is not known{also}, and its layers may keep what no field "
                "tells: if they are those of a known type, put that one's name there",
                "model_type",
                *fields,
            )
        if self.model_type is None and self.outer.get("architectures") and not fields:
            self.refuse(
                f"architectures is {told(self.outer['architectures'])}, which is not known, and model_type is missing",
                "architectures",
                "model_type",
            )
        if fields:
            self.refuse(f"it is not known what {self._list(fields)} means for what is cached", *fields)
        if self.outer.get("is_encoder_decoder") or self.values.get("is_encoder_decoder"):
            self.refuse("is_encoder_decoder: only models that decode alone are known", "is_encoder_decoder")

    def require_type(self):
        """Refuse a config that reads well, of a model that nobody has named."""
        if self.model_type is None:
            self.refuse(
                "model_type and architectures are both missing, so that it is not known what its layers keep: if they "
                "are those of a known type, put that one's name into model_type",
                "model_type",
                "architectures",
            )

    def _list(self, names):
        names = [self.prefix + name for name in names]
        return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")

    def refuse(self, reason, *names):
        """Raise `UnreadableConfig` for fields of these names."""
        names = tuple(self.prefix + name for name in names)
        raise UnreadableConfig(model_type=self.model_type, fields=names, reason=reason)

    def has(self, *names):
        """Whether each of the fields is there, and not null."""
        return all(self.values.get(name) is not None for name in names)

    def first(self, *names):
        """The first of the names whose field is there, else the first of them all."""
        return next((name for name in names if self.has(name)), names[0])

    def need(self, *names):
        """Refuse a config that lacks one of these, naming all that it lacks."""
        missing = [name for name in names if not self.has(name)]
        if missing:
            self.refuse(f"{self._list(missing)} is missing", *missing)

    def count(self, name, default=NO_DEFAULT, least=1, below=MAX_COUNT):
        """A whole number; `default` where the field is missing or null."""
        if not self.has(name):
            if default is NO_DEFAULT:
                self.need(name)
            return default
        return self.whole(self.values[name], name, least, below)

    def whole(self, value, name, least=1, below=MAX_COUNT):
        """`value`, of the field of this name, as a whole number in bounds."""
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(f"{self.prefix}{name} is {told(value)}, expected a whole number", name)
        if value < least:
            self.refuse(f"{self.prefix}{name} is {told(value)}, expected at least {least}", name)
        if value >= below:
            self.refuse(f"{self.prefix}{name} is {told(value)}, expected fewer than {below}", name)
        return value

    def flag(self, name, default=False):
        """A truth value."""
        if not self.has(name):
            return default
        if not isinstance(self.values[name], bool):
            self.refuse(f"{self.prefix}{name} is {told(self.values[name])}, expected true or false", name)
        return self.values[name]

    def items(self, name, kind, length=None):
        """A list whose items are all of one type, and as many as there are layers if `length` is given."""
        value = self.values[name]
        wanted = f"a list of {kind.__name__}"
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            self.refuse(f"{self.prefix}{name} is {told(value)}, expected {wanted}", name)
        if length is not None and len(value) != length:
            self.refuse(f"{self.prefix}{name} has {len(value)} entries for {length} layers", name)
        return value

    def inner(self, name):
        """A nested object as fields of its own."""
        value = self.values[name]
        if not isinstance(value, dict):
            self.refuse(f"{self.prefix}{name} is {told(value)}, expected an object", name)
        return self.within(name, value)

    def within(self, name, values):
        """Fields of an object that lies in these at `name`."""
        inside = Fields({})
        inside.values, inside.outer, inside.model_type = values, {}, self.model_type
        inside.prefix = f"{self.prefix}{name}."
        return inside

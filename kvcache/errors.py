"""What can go wrong for good. Every error is a sentence, carries its numbers as attributes, and survives pickling.

"Not now" is no error: it is `None` or `False` from the call that was refused. The one exception is `CacheFull`,
for calls whose return value has no room for a refusal.
"""


class KVCacheError(Exception):
    """Base class of all errors of this package."""

    def __reduce__(self):
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls, args, attributes):
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error


def _counted(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _named(request_id):
    """`repr` of a request id, whatever its own `__repr__` does, in at most 200 characters."""
    try:
        text = repr(request_id)
    except Exception:  # noqa: BLE001 (a user's own repr may raise anything)
        text = f"<{type(request_id).__name__}>"
    return text if len(text) <= 200 else text[:197] + "..."


class RequestTooLarge(KVCacheError, ValueError):
    """The request exceeds the whole arena: waiting cannot help.

    Attributes
    ----------
    what : str
        What is too large: ``"prompt"``, ``"max_tokens"`` or ``"pin"``.
    tokens : int
        Tokens asked for.
    blocks_needed, num_blocks : int
        Blocks that they need, and blocks that the arena has.
    """

    def __init__(self, *, what, tokens, blocks_needed, num_blocks):
        size = f"{what} of {tokens}" if what == "max_tokens" else f"{what} of {_counted(tokens, 'token')}"
        super().__init__(f"{size} needs {_counted(blocks_needed, 'block')}, the arena has {num_blocks}")
        self.what = what
        self.tokens = tokens
        self.blocks_needed = blocks_needed
        self.num_blocks = num_blocks


class UnknownSequence(KVCacheError, KeyError):
    """No live sequence has this id: it was never admitted, or has been freed.

    Attributes
    ----------
    request_id : hashable
    """

    def __init__(self, *, request_id):
        super().__init__(f"no live sequence has the id {_named(request_id)}")
        self.request_id = request_id

    def __str__(self):  # KeyError would print the repr of the message
        return self.args[0]


class SequenceExists(KVCacheError, ValueError):
    """A live sequence, or a member of the batch, has this id already.

    Attributes
    ----------
    request_id : hashable
    """

    def __init__(self, *, request_id):
        super().__init__(f"a sequence with the id {_named(request_id)} exists already")
        self.request_id = request_id


class InvalidFree(KVCacheError, ValueError):
    """A run of blocks was freed or extended that is not live exactly as given.

    Attributes
    ----------
    start, length : int
        The run as given, in blocks.
    reason : str
        What is wrong with it.
    """

    def __init__(self, *, start, length, reason):
        super().__init__(f"run of {_counted(length, 'block')} from block {start} is refused: {reason}")
        self.start = start
        self.length = length
        self.reason = reason


class CacheFull(KVCacheError):
    """Blocks are needed that cannot be had now; nothing has been written.

    Attributes
    ----------
    blocks_needed, blocks_available : int
        Blocks that the call needs, and blocks that nobody holds or has a claim to.
    """

    def __init__(self, *, blocks_needed, blocks_available):
        super().__init__(
            f"the call needs {_counted(blocks_needed, 'more block')}, {blocks_available} available"
        )
        self.blocks_needed = blocks_needed
        self.blocks_available = blocks_available


class CacheClosed(KVCacheError):
    """The cache has been closed."""

    def __init__(self):
        super().__init__("the cache is closed")


class CacheHeld(KVCacheError):
    """The call has to wait for holds to end, and the calling thread has one itself; nothing has changed.

    Attributes
    ----------
    holds : int
        Holds that are open now, of all threads.
    """

    def __init__(self, *, holds):
        super().__init__(f"the call would wait for {_counted(holds, 'open hold')}, and this thread has one")
        self.holds = holds


class CorruptCacheFile(KVCacheError, ValueError):
    """A file of saved prefixes is cut short, altered, or no such file at all; nothing has changed.

    Attributes
    ----------
    path : str
    reason : str
        What is wrong with it.
    """

    def __init__(self, *, path, reason):
        super().__init__(f"{_named(path)} holds no cache that can be loaded: {reason}")
        self.path = path
        self.reason = reason


class IncompatibleCacheFile(KVCacheError, ValueError):
    """A file of saved prefixes was made for another model or another cache; nothing has changed.

    Attributes
    ----------
    path : str
    field : str
        What differs: ``"version"``, ``"fingerprint"``, ``"layers"`` or ``"block_size"``.
    found, wanted : int, str or bytes
        What the file says, and what the cache is.
    """

    def __init__(self, *, path, field, found, wanted):
        super().__init__(
            f"{_named(path)} was made for another cache: its {field} is {_named(found)}, not {_named(wanted)}"
        )
        self.path = path
        self.field = field
        self.found = found
        self.wanted = wanted


class Suspended(KVCacheError):
    """The sequence is suspended, or its K/V are on their way out or back; nothing has changed.

    Attributes
    ----------
    request_id : hashable
    """

    def __init__(self, *, request_id):
        super().__init__(f"the sequence with the id {_named(request_id)} is suspended: resume it first")
        self.request_id = request_id


class UnreadableConfig(KVCacheError, ValueError):
    """A model's config says something that is not understood, so that nothing can be planned from it.

    Attributes
    ----------
    model_type : str or None
        As the config has it.
    fields : tuple of str
        Names of the fields that are missing, wrong or unknown.
    reason : str
        What is wrong with them.
    """

    def __init__(self, *, model_type, fields, reason):
        kind = "" if model_type is None else f" of a {_named(model_type)} model"
        super().__init__(f"the config{kind} cannot be read: {reason}")
        self.model_type = model_type
        self.fields = tuple(fields)
        self.reason = reason

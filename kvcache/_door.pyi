from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, SupportsIndex, final

from kvcache._copy import Copier

__pyx_capi__: dict[str, Any]
__test__: dict[str, str]

EVENTS: tuple[str, str, str]

class CachedBlock(NamedTuple):
    event: str
    position: int
    length: int
    hits: int
    time: float

@final
class Allocation:
    def __init__(
        self,
        request_id: Hashable,
        tokens: SupportsIndex,
        max_tokens: SupportsIndex,
        cached_tokens: SupportsIndex,
    ) -> None: ...
    @property
    def request_id(self) -> Any: ...
    @property
    def tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

class Door:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        paged: bool,
        overcommit: float,
        num_marks: int,
        most_moved: int | None = None,
        copier: Copier | None = None,
        order: int | None = 0,
        clock: Callable[[], float] | None = None,
        block_bytes: int = 1,
        scorer: Any = None,
    ) -> None: ...
    def _watch(self, watcher: Callable[[Any], object]) -> None: ...
    def _unwatch(self, watcher: Callable[[Any], object]) -> None: ...

from collections.abc import Callable, Hashable
from typing import Any, SupportsIndex, final

from kvcache._copy import Copier

__pyx_capi__: dict[str, Any]
__test__: dict[str, str]

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
        copier: Copier | None = None,
    ) -> None: ...
    def _watch(self, watcher: Callable[[Any], object]) -> None: ...
    def _unwatch(self, watcher: Callable[[Any], object]) -> None: ...

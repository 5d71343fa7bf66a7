from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvcache._ids import Tokens
from kvcache._looks import Looks

__test__: dict[str, str]
KINDS: tuple[str, str, str]

class CacheEvent(NamedTuple):
    kind: str
    block: int
    parent: int
    tokens: tuple[int, ...]
    salt: Any
    dropped: int

class Prefixes(Looks):
    def probe(
        self,
        prompt: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        salt: Hashable | None = None,
    ) -> int: ...
    def set_tokens(
        self,
        request_id: Hashable,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        start: SupportsIndex | None = None,
    ) -> None: ...
    def pin(
        self,
        request_id: Hashable | None = None,
        *,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens | None = None,
        salt: Hashable | None = None,
    ) -> int: ...
    def unpin(
        self,
        request_id: Hashable | None = None,
        *,
        tokens: Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens | None = None,
        salt: Hashable | None = None,
    ) -> int: ...
    def clear_prefix_cache(self) -> None: ...
    def set_quota(self, salt: Hashable, max_bytes: SupportsIndex | None) -> None: ...
    def events(self) -> Iterator[CacheEvent]: ...

from collections.abc import Hashable, Sequence
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvcache._door import Allocation as Allocation
from kvcache._ids import Tokens
from kvcache._prefixes import Prefixes

__pyx_capi__: dict[str, Any]
__test__: dict[str, str]

class Hold:
    def __enter__(self) -> Hold: ...
    def __exit__(self, *exception: object) -> None: ...

class CacheCore(Prefixes):
    def allocate_for(
        self,
        request_id: Hashable,
        prompt: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        *,
        max_tokens: SupportsIndex | None = None,
        max_new_tokens: SupportsIndex | None = None,
        salt: Hashable | None = None,
        priority: SupportsIndex = 0,
        ttl: float | None = None,
    ) -> Allocation | None: ...
    def fork(self, request_id: Hashable, new_id: Hashable) -> Allocation | None: ...
    def free_for(self, request_id: Hashable) -> bool: ...
    def append_token(self, request_id: Hashable, token: SupportsIndex | None = None) -> bool: ...
    def append_tokens(
        self,
        request_id: Hashable,
        tokens: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
    ) -> bool: ...
    def truncate(self, request_id: Hashable, num_tokens: SupportsIndex) -> bool: ...
    def set_limit(self, request_id: Hashable, max_tokens: SupportsIndex) -> bool: ...
    def commit(self, request_id: Hashable, num_tokens: SupportsIndex | None = None) -> None: ...
    def compact(self, budget_tokens: int | None = None) -> int: ...
    def hold(self) -> Hold: ...
    def close(self) -> None: ...
    def _measured(
        self,
        prompt: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        max_tokens: SupportsIndex | None,
        max_new_tokens: SupportsIndex | None,
        salt: Hashable | None = None,
        priority: SupportsIndex = 0,
        ttl: float | None = None,
    ) -> tuple[SupportsIndex | Tokens, int, int]: ...
    def _look_ahead(
        self,
        prompt: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        max_tokens: SupportsIndex | None,
        max_new_tokens: SupportsIndex | None,
        salt: Hashable | None = None,
    ) -> tuple[int, int, int, int, int]: ...
    def _allocate_up_to(
        self,
        request_id: Hashable,
        prompt: SupportsIndex | Sequence[int] | npt.NDArray[np.integer[Any]] | Tokens,
        max_tokens: SupportsIndex | None,
        max_new_tokens: SupportsIndex | None,
        least: int | None,
        keep: int,
        salt: Hashable | None = None,
        priority: SupportsIndex = 0,
        ttl: float | None = None,
    ) -> Allocation | Literal[False] | None: ...
    def _append_now(
        self,
        request_id: Hashable,
        tokens: Any,
        record: Allocation | None = None,
        patient: bool = False,
    ) -> bool | None: ...
    def _take_back(self, record: Allocation, count: int) -> bool: ...
    def _record_of(self, request_id: Hashable) -> Allocation: ...
    def _growth_of(self, record: Allocation, more: int) -> tuple[int, int, int, int, int, int]: ...
    def _room_without(
        self,
        records: list[Allocation],
        prompt: SupportsIndex | Tokens = 1,
        salt: Hashable | None = None,
    ) -> tuple[int, int, int, list[int], list[int]]: ...
    def _is_live(self, record: Allocation) -> bool: ...
    def _end(self, record: Allocation) -> bool: ...
    def _hold_briefly(self) -> Hold: ...

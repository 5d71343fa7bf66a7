from collections.abc import Sequence
from typing import Any

from kvcache._copy import Copier

__pyx_capi__: dict[str, Any]
__test__: dict[str, str]

def pack(copier: Copier, spans: Sequence[tuple[int, int]], payload: Any) -> None: ...
def unpack(copier: Copier, spans: Sequence[tuple[int, int]], payload: Any) -> None: ...

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcache._copy import Sources
from kvcache._ids import Tokens
from kvcache._members import Members

__test__: dict[str, str]

class BatchCore(Members):
    def append(
        self, tokens: Sequence[Any] | npt.NDArray[np.integer[Any]] | Tokens | None = None, counts: Any = 1
    ) -> npt.NDArray[np.bool_]: ...
    def set_tokens(self, tokens: Sequence[Any] | npt.NDArray[np.integer[Any]] | Tokens) -> None: ...
    def truncate(self, counts: Any) -> npt.NDArray[np.bool_]: ...
    def _write_rows(self, sources: Sources, layer: int) -> None: ...

"""kvcache: the memory manager for the key/value caches of language-model inference."""

from kvcache._alloc import Allocation
from kvcache._door import CachedBlock
from kvcache._ids import Tokens
from kvcache._prefixes import CacheEvent
from kvcache._runs import BlockAllocator, BlockRun
from kvcache._version import __version__
from kvcache.cache import DecodeBatch, KVCache
from kvcache.errors import (
    CacheClosed,
    CacheFull,
    CacheHeld,
    CorruptCacheFile,
    IncompatibleCacheFile,
    InvalidFree,
    KVCacheError,
    RequestTooLarge,
    SequenceExists,
    Suspended,
    UnknownSequence,
    UnreadableConfig,
)
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec
from kvcache.stats import CacheStats

__all__ = [
    "Allocation",
    "BlockAllocator",
    "BlockRun",
    "CacheClosed",
    "CacheEvent",
    "CacheFull",
    "CacheHeld",
    "CacheStats",
    "CachedBlock",
    "CorruptCacheFile",
    "DecodeBatch",
    "IncompatibleCacheFile",
    "InvalidFree",
    "KVCache",
    "KVCacheError",
    "KVCacheSpec",
    "LayerSpec",
    "PlaneSpec",
    "RequestTooLarge",
    "SequenceExists",
    "Suspended",
    "Tokens",
    "UnknownSequence",
    "UnreadableConfig",
    "__version__",
]

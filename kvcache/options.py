"""What a cache is made with, checked before anything is allocated."""

import math

from kvcache.spec import KVCacheSpec

PLACEMENTS = ("contiguous", "paged")
ORDERS = {"lru": 0, "priority": 0, "lfu": 1, "fifo": 2, "worth": 3}  # as in _policy.pxd
FOREIGN = 4


def spec_of(first, num_kv_heads, head_dim, max_total_tokens, block_size, dtype):
    """The shape: given as such, or made of numbers."""
    shape = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_total_tokens": max_total_tokens}
    options = {"block_size": block_size, "dtype": dtype}
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(first, KVCacheSpec):
        beside = [name for name, value in shape.items() if value is not None] + list(given)
        if beside:
            raise TypeError(f"a spec says it all: {', '.join(beside)} cannot be given beside it")
        return first
    missing = [name for name, value in shape.items() if value is None]
    if missing:
        raise TypeError(f"KVCache needs {', '.join(missing)}, or a KVCacheSpec alone")
    return KVCacheSpec(first, **shape, **given)


def order_of(policy):
    """What the native side calls a policy."""
    return ORDERS[policy] if isinstance(policy, str) else FOREIGN


def check_options(placement, overcommit, prefix_cache, policy, clock, max_move_tokens):
    """Raises `TypeError` or `ValueError` for the first that is none."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}")
    if isinstance(overcommit, (bool, str)) or not hasattr(overcommit, "__float__"):
        raise TypeError(f"overcommit must be a number, not {type(overcommit).__name__}")
    if math.isnan(overcommit) or overcommit < 1:
        raise ValueError(f"overcommit must be at least 1, not {overcommit}")
    if not isinstance(prefix_cache, bool):
        raise TypeError(f"prefix_cache must be a bool, not {type(prefix_cache).__name__}")
    if isinstance(policy, str) and policy not in ORDERS:
        raise ValueError(f"policy must be one of {', '.join(ORDERS)}, or an object, not {policy!r}")
    if not isinstance(policy, str) and not callable(getattr(policy, "score", None)):
        raise TypeError(f"a policy has a method score(block), {type(policy).__name__} has none")
    if clock is not None and not callable(clock):
        raise TypeError(f"clock must be callable, not {type(clock).__name__}")
    if max_move_tokens is not None and as_index(max_move_tokens, "max_move_tokens") < 0:
        raise ValueError(f"max_move_tokens must be at least 0, not {max_move_tokens}")


def check_stores(spec, fingerprint, staging_bytes, store_rate):
    """As `check_options`, of what `save` and `suspend` go by."""
    if fingerprint is not None:
        from kvcache.cache_file import check_fingerprint

        check_fingerprint(fingerprint)
    if staging_bytes is not None:
        from kvcache.suspension import slot_bytes_of

        least = slot_bytes_of(spec)
        if as_index(staging_bytes, "staging_bytes") < least:
            raise ValueError(f"staging_bytes must be at least one chunk, {least} bytes, not {staging_bytes}")
    if store_rate is not None:
        if isinstance(store_rate, (bool, str)) or not hasattr(store_rate, "__float__"):
            raise TypeError(f"store_rate must be a number, not {type(store_rate).__name__}")
        if not store_rate > 0:
            raise ValueError(f"store_rate must be more than 0 bytes a second, not {store_rate}")


def as_index(value, name):
    """An int, whatever int type it came as."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return value.__index__()


def as_number(value, name, least=None):
    """A number, of at least this if it is given."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value


def as_count(value, name, least=0):
    """An int of at least this."""
    if as_index(value, name) < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value.__index__()


def as_callable(value, name):
    """A callable, or None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")
    return value

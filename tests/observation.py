"""Everything that can be seen of a cache from outside, and the claim that a call has changed none of it."""

import io
from contextlib import contextmanager

import numpy as np


def to_numpy(array):
    """Values of a NumPy or MLX array; bfloat16 from MLX comes as float32, which holds it exactly."""
    if isinstance(array, np.ndarray):
        return array
    import mlx.core as mx

    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def dumped(dump, **options):
    file = io.StringIO()
    dump(file, **options)
    return file.getvalue()


def observe(cache):
    """A value that compares equal as long as nothing that a caller can see has changed."""
    seen = {
        "stats": cache.stats(),
        "map": dumped(cache.dump_block_map),
        "dump": dumped(cache.dump_cache_stats),
    }
    for request_id in cache:
        seen[request_id] = (
            cache.used_tokens(request_id),
            cache.limit(request_id),
            cache.capacity(request_id),
            cache.is_contiguous(request_id),
            cache.block_table(request_id).tolist(),
            contents(cache, request_id),
        )
    return seen | {"ids": list(cache)}


def contents(cache, request_id):
    if cache.arena.copier is None:
        return None
    layers = range(len(cache.arena.planes))
    return [to_numpy(view).tobytes() for layer in layers for view in cache.get_views(request_id, layer)]


@contextmanager
def unchanged(cache):
    """What happens inside must leave no trace: counters, map, tables, contents; and the structures hold."""
    before = observe(cache)
    yield
    assert observe(cache) == before
    cache.check()

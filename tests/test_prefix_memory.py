"""What a cached block costs beside its K/V: measured in processes of their own, with ids and without."""

import subprocess
import sys

import pytest

LIMIT = 120  # bytes for each cached block of 16 tokens, ids included

PROBE = """
import numpy as np
from kvcache import KVCache

def resident():
    with open("/proc/self/smaps_rollup") as lines:
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))

def grown(named, blocks=1 << 18, tokens=2048):
    cache = KVCache(1, 1, 1, 16 * blocks, 16, backend="none", placement=PLACEMENT)
    names = range(16 * blocks // tokens)
    before = resident()
    for name in names:
        ids = np.random.default_rng(name).integers(0, 50_000, tokens).astype(np.int32)
        assert cache.allocate_for(name, ids if named else tokens)
        cache.commit(name)
    for name in names:
        cache.free_for(name)
    assert cache.stats().cached_blocks == (blocks if named else 0)
    return (resident() - before) / blocks

grown(True, 1 << 10)
print(grown(NAMED))
"""


def bytes_a_block(placement, named):
    script = f"PLACEMENT, NAMED = {placement!r}, {named}\n{PROBE}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_cached_block_costs_at_most_120_bytes_its_ids_included(placement):
    cost = bytes_a_block(placement, True) - bytes_a_block(placement, False)
    print(f"{placement}: {cost:.1f} bytes")
    assert 64 < cost <= LIMIT

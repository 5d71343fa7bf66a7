"""The native decode loop that the manual shows compiles against the package and does what it says."""

import numpy as np
import pytest

pytest.importorskip("Cython")

from compiled import compiled

from kvcache import KVCache, UnknownSequence


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return compiled("decode_loop", tmp_path_factory.mktemp("decode_loop"))


@pytest.fixture
def cache():
    with KVCache(num_layers=2, num_kv_heads=3, head_dim=4, max_total_tokens=256, block_size=4) as cache:
        yield cache
        cache.check()


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_it_writes_every_token_of_every_plane(loop, backend):
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    with KVCache(2, 3, 4, max_total_tokens=256, block_size=4, backend=backend) as cache:
        for name, prompt in (("a", 1), ("b", 6)):
            cache.allocate_for(name, prompt, max_new_tokens=20)
        assert loop.decode(cache, ["a", "b"], 20) == 40
        for name, prompt in (("a", 1), ("b", 6)):
            for layer in range(2):
                for view in cache.get_kv_views(name, layer):
                    written = np.array(view)[:, prompt:]
                    expected = np.arange(prompt + 1, prompt + 21)[None, :, None]
                    assert (written == np.broadcast_to(expected, (3, 20, 4))).all()
        cache.check()


def test_a_member_at_its_limit_is_left_as_it_is(loop, cache):
    cache.allocate_for("short", 4)
    cache.allocate_for("long", 4, max_new_tokens=8)
    assert loop.decode(cache, ["short", "long"], 8) == 8
    assert [cache.used_tokens(name) for name in ("short", "long")] == [4, 12]


def test_members_that_move_are_followed(loop, cache):
    for name in range(16):  # admitted without room between them, which is wanted later
        cache.allocate_for(name, 4)
    for name in range(16):
        assert cache.set_limit(name, 16)
    assert loop.decode(cache, list(range(16)), 12) == 16 * 12
    assert cache.stats().moves > 0
    for name in range(16):
        assert cache.get_k_view(name, 1)[2, 4:, 3].tolist() == list(range(5, 17))


def test_it_refuses_a_cache_without_storage_and_ids_that_do_not_live(loop, cache):
    with KVCache(1, 1, 1, 16, backend="none") as books, pytest.raises(ValueError, match="storage"):
        loop.decode(books, [], 1)
    with pytest.raises(UnknownSequence):
        loop.decode(cache, ["nobody"], 1)

"""A decode step's share of the cache with MLX: append, write and views of all layers, given to `eval`.

Its floor is the same step with mlx-lm's own `KVCache`, one for each sequence and layer, in turns with it.
"""

import pytest

from kvcache import KVCache

mx = pytest.importorskip("mlx.core")
mlx_lm_cache = pytest.importorskip("mlx_lm.models.cache")

pytestmark = pytest.mark.benchmark(group="a step of 4 layers with MLX")

LAYERS, HEADS, HEAD_DIM, PROMPT, STEPS = 4, 4, 64, 250, 120


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


class Ours:
    """Sequences in one arena: a write a layer for all of them."""

    def __init__(self, prompts):
        n = len(prompts)
        self.cache = KVCache(LAYERS, HEADS, HEAD_DIM, n * 512, backend="mlx")
        self.ids = [f"request-{number}" for number in range(n)]
        for request_id, prompt in zip(self.ids, prompts, strict=True):
            assert self.cache.allocate_for(request_id, PROMPT, max_tokens=PROMPT + STEPS + 1)
            for layer in range(LAYERS):
                self.cache.write(request_id, layer, prompt[layer], -prompt[layer])
        self.batch = self.cache.batch(self.ids)

    def step(self, rows):
        self.got = self.batch.append()
        self.views = []
        for layer, (keys, values) in enumerate(rows()):
            self.batch.write(layer, keys, values)
            self.views.append([self.cache.get_kv_views(request_id, layer) for request_id in self.ids])
        mx.eval(self.views)


class Plain:
    """mlx-lm's caches: an update for each sequence and layer."""

    def __init__(self, prompts):
        self.caches = [[mlx_lm_cache.KVCache() for _ in prompts] for _ in range(LAYERS)]
        for layer, caches in enumerate(self.caches):
            for cache, prompt in zip(caches, prompts, strict=True):
                mx.eval(cache.update_and_fetch(prompt[layer][None], -prompt[layer][None]))

    def step(self, rows):
        self.views = []
        for caches, (keys, values) in zip(self.caches, rows(), strict=True):
            self.views.append(
                [
                    cache.update_and_fetch(keys[number][None, :, None], values[number][None, :, None])
                    for number, cache in enumerate(caches)
                ]
            )
        mx.eval(self.views)


@pytest.mark.parametrize("n", [1, 8, 32])
@pytest.mark.parametrize("rows", ["ready", "lazy"])
def test_step(measure, rows, n):
    """`ready`: K and V are evaluated arrays; `lazy`: they are to be computed yet, as a model leaves them."""
    mx.random.seed(n)
    prompts = [mx.random.normal((LAYERS, HEADS, PROMPT, HEAD_DIM)) for _ in range(n)]
    ours, plain = Ours(prompts), Plain(prompts)
    keys, values = [], []

    def prepare():
        keys[:] = [mx.random.normal((n, HEADS, HEAD_DIM)) for _ in range(LAYERS)]
        values[:] = [-each for each in keys]
        mx.eval(keys, values)

    def rows_of_layers():
        return zip(keys, values if rows == "ready" else [-each for each in keys], strict=True)

    def verify():
        assert ours.got.all()
        for layer in range(LAYERS):
            for mine, theirs in zip(ours.views[layer], plain.views[layer], strict=True):
                assert mx.array_equal(mine[0], theirs[0][0]) and mx.array_equal(mine[1], theirs[1][0])

    measure(
        lambda: ours.step(rows_of_layers),
        verify=verify,
        prepare=prepare,
        rounds=STEPS,
        floor=("mlx-lm's step", lambda: plain.step(rows_of_layers)),
    )
    measure.note(arena_copies=(ours.cache.stats().arena_copies, 0))
    ours.cache.check()

"""Draws the pictures of the page on monitoring: ``python docs/monitoring_pictures.py docs/_static``."""

import io
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imsave
from rich.console import Console

from kvcache import KVCache
from kvcache.status import snapshot
from kvcache.top_view import frame

SEED = 0
WIDTH = 100  # columns
SCALE = 10  # pixels a block
STEPS = 400


def lived_in(placement):
    """A cache with traffic behind it, and a snapshot from a second before the end."""
    random = np.random.default_rng(SEED)
    cache = KVCache(4, 4, 64, 16_384, 16, placement=placement, backend="none")
    last = None
    for step in range(STEPS):
        if step == STEPS - 40:
            last = snapshot(cache)
        prompt = int(random.lognormal(5.5, 0.8)) + 1
        cache.allocate_for(f"req_{step:03}", prompt, max_new_tokens=int(random.integers(32, 512)))
        batch = cache.batch(list(cache))
        for _ in range(8):
            batch.append()
        for name in list(cache):
            if random.random() < 0.045:
                cache.free_for(name)
    return cache, last


def draw_top(file):
    cache, last = lived_in("contiguous")
    now = snapshot(cache) | {"seconds": last["seconds"] + 1.0}  # the steps above took no time
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(frame(now, last, WIDTH))
    svg = console.export_svg(title="$ kvcache top 127.0.0.1:9400", unique_id="kvcache-top")
    file.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def draw_map(file):
    cache, _ = lived_in("paged")
    oldest, second, *_ = cache
    cache.fork(second, "fork")
    prompt = list(range(640))
    cache.allocate_for("known", prompt)
    cache.commit("known")
    cache.free_for("known")
    with cache.hold():
        cache.free_for(oldest)
        image = cache.block_map_image(width=64)
    imsave(file, image.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


if __name__ == "__main__":
    draw_top(Path(sys.argv[1]) / "top.svg")
    draw_map(Path(sys.argv[1]) / "block_map.png")

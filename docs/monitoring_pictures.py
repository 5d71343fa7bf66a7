"""Draws the pictures of the page on monitoring: ``python docs/monitoring_pictures.py docs/_static``."""

import io
import re
import sys
from pathlib import Path

import numpy as np
from dashboard_picture import Service
from matplotlib.image import imsave
from rich.console import Console

from kvcache import KVCache
from kvcache.status import snapshot
from kvcache.top_view import frame

SEED = 0
WIDTH = 100  # columns
SCALE = 10  # pixels a block
STEPS = 400
RUSH = 1900.0  # seconds into the hour of the dashboard


def lived_in():
    """A cache with traffic behind it."""
    random = np.random.default_rng(SEED)
    cache = KVCache(4, 4, 64, 16_384, 16, placement="paged", backend="none")
    for step in range(STEPS):
        prompt = int(random.lognormal(5.5, 0.8)) + 1
        cache.allocate_for(f"req_{step:03}", prompt, max_new_tokens=int(random.integers(32, 512)))
        batch = cache.batch(list(cache))
        for _ in range(8):
            batch.append()
        for name in list(cache):
            if random.random() < 0.045:
                cache.free_for(name)
    return cache


def look_at(service):
    return snapshot(service.cache) | {"seconds": service.now}


def draw_top(file):
    """The service of the dashboard, in its rush, when some wait and something is cached."""
    service = Service()
    service.run(RUSH)
    last = now = look_at(service)
    while now["stats"]["waiting_requests"] < 4 or now["stats"]["cached_blocks"] < 200:
        last = now
        service.run(service.now + 1.0)
        now = look_at(service)
    service.close()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(frame(now, last, WIDTH))
    svg = console.export_svg(title="$ kvcache top 127.0.0.1:9400", unique_id="kvcache-top")
    file.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def draw_map(file):
    cache = lived_in()
    oldest, second, *_ = cache
    cache.fork(second, "fork")
    for name, first in (("kept", 0), ("known", 1000)):
        cache.allocate_for(name, list(range(first, first + 640)))
        cache.commit(name)
        if name == "kept":
            cache.pin(name)
        cache.free_for(name)
    with cache.hold():
        cache.free_for(oldest)
        image = cache.block_map_image(width=64)
    imsave(file, image.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


if __name__ == "__main__":
    draw_top(Path(sys.argv[1]) / "top.svg")
    draw_map(Path(sys.argv[1]) / "block_map.png")

"""Draws the picture of the README, a panel of the demo: ``python docs/picture.py docs/_static/demo.svg``."""

import io
import re
import sys
from pathlib import Path

import mlx.core as mx
from rich.console import Console

from kvcache import demo, demo_view, mlx_lm

REQUESTS, ARENA_TOKENS, SEED = 48, 4096, 0  # what `kvcache demo` runs by default
CORPUS_TOKENS = 65536
WIDTH = 100  # columns
SHOWN = 0.25  # the first frame with so many of the requests finished


class Camera:
    """Watches a run and keeps one frame of it."""

    def __init__(self, view):
        self.view = view
        self.frame = None

    def __call__(self, progress):
        """Draw every frame, since colours are given in order of admission; keep the first late enough."""
        frame = self.view.frame(progress)
        if self.frame is None and progress.finished >= SHOWN * progress.requests:
            self.frame = frame


def photograph():
    """The text of an SVG."""
    mx.disable_compile()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    model = mlx_lm.random_llama(SEED)
    corpus = demo.random_ids(CORPUS_TOKENS, model.args.vocab_size, SEED)
    requests = demo.make_requests(REQUESTS, corpus, ARENA_TOKENS, SEED)
    with mlx_lm.cache_for(model, ARENA_TOKENS) as cache:
        camera = Camera(demo_view.DemoView(console))
        demo.Serving(mlx_lm.Decoder(model, cache), requests).run(camera)
    console.print(camera.frame)
    svg = console.export_svg(title="$ make demo", unique_id="kvcache")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # nothing is loaded from elsewhere


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(photograph(), encoding="utf-8")

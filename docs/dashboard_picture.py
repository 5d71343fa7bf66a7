"""Draws the dashboard with what an hour of traffic has exported: ``python docs/dashboard_picture.py docs/_static``.

The panels, their places, queries and legends are those of ``grafana/kvcache.json``; the queries are evaluated over
scrapes of the Prometheus collector, by `promql.py`. The cache, the queue and their metrics are real, the hour passes
by a clock that is set by hand, and the model is left out. Grafana itself is not involved: it draws more finely.
"""

import asyncio
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter
from prometheus_client import CollectorRegistry
from promql import Query, Scrapes

from kvcache import KVCache, UnknownSequence, metrics
from kvcache.admission import AllocationQueue, Evict, TenantLimit, Wait

DASHBOARD = Path(__file__).parent / "grafana" / "kvcache.json"
SEED = 3
STEP, SCRAPE, HOUR = 0.5, 15.0, 3600.0  # seconds
TOKENS_A_STEP = 12
VOCABULARY = 32_000
SYSTEM_TOKENS = {"free": 384, "paying": 768}  # that the prompts of a tenant begin with
MOST_TOKENS = 6000  # of a conversation
VARIABLES = {"cache": ".*", "__rate_interval": "60s"}
COLOURS = {"green": "#56a64b", "orange": "#ff9830", "red": "#e02f44"}
GROUND, PANEL, INK = "#111217", "#181b1f", "#ccccdc"
LINES = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#c0d8ff")
PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Service:
    """Clients of two tenants who talk in turns before a cache, with a rush in the second half of the hour."""

    def __init__(self):
        self.now = 0.0
        self.random = np.random.default_rng(SEED)
        self.cache = KVCache(2, 2, 64, 65_536, 16, overcommit=1.5, max_move_tokens=2048)
        self.queue = AllocationQueue(
            self.cache,
            Wait(15.0) | Evict("priority"),
            name="chat",
            keep_free=512,
            warn_after=10.0,
            tenants={"free": TenantLimit(share=0.4)},
            clock=lambda: self.now,
        )
        self.loop = asyncio.new_event_loop()
        self.registry, self.scrapes = CollectorRegistry(), Scrapes()
        metrics.register(self.cache, "main", self.registry)
        self.tasks = set()
        self.turns = self.pinned = 0
        self.systems = {tenant: self.ids(tokens) for tenant, tokens in SYSTEM_TOKENS.items()}

    def run(self, until=HOUR):
        """The hour, or what is left of it."""
        while self.now < until:
            for _ in range(self.random.poisson(STEP * self.rate())):
                task = self.loop.create_task(self.client())
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
            self.queue.poke()
            for _ in range(3):
                self.loop.run_until_complete(asyncio.sleep(0))
            if self.now % SCRAPE == 0:
                self.scrapes.take(self.now, self.registry)
            self.now += STEP

    def close(self):
        """All clients go."""
        for task in self.tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        self.cache.close()

    def rate(self):
        """New conversations per second."""
        return 0.6 + 0.15 * np.sin(self.now / 400) + (0.8 if 1900 < self.now < 2500 else 0)

    def ids(self, tokens):
        return self.random.integers(0, VOCABULARY, tokens, dtype=np.int32)

    def some(self, middle, spread, most):
        return int(min(self.random.lognormal(middle, spread), most)) + 1

    async def client(self):
        """Asks, reads the answer, thinks, and asks again, with all that has been said before."""
        tenant, priority = ("free", 0) if self.random.random() < 0.4 else ("paying", 1)
        said = self.systems[tenant]
        for _ in range(int(self.random.geometric(0.3))):
            said = np.concatenate([said, self.ids(self.some(5.0, 0.9, 3000))])
            answer = self.ids(self.some(5.0, 0.7, 1500))
            if len(said) + len(answer) > MOST_TOKENS:
                return
            try:
                if not await self.turn(said, answer, tenant, priority):
                    return
            except UnknownSequence:
                return  # evicted
            said = np.concatenate([said, answer])
            await self.sleep(self.random.exponential(25))

    async def turn(self, prompt, answer, tenant, priority):
        """Whether the client got all of the answer."""
        self.turns += 1
        name = f"req_{self.turns:04}"
        patience, pauses = self.random.exponential(120), self.random.random() < 0.02
        if patience < 60:
            self.loop.call_soon(self.hang_up, asyncio.current_task(), name, self.now + patience)
        limit = len(prompt) + max(len(answer), 512)
        async with self.queue.allocate_async(
            name, prompt, max_tokens=limit, tenant=tenant, priority=priority
        ) as lease:
            if not lease:
                return False
            self.cache.commit(name)
            self.pinned = self.pinned or self.cache.pin(tokens=self.systems["paying"])
            for start in range(0, len(answer), TOKENS_A_STEP):
                await self.sleep(STEP)
                if pauses and start > len(answer) // 2:  # for a tool
                    pauses = await self.pause(name)
                part = answer[start : start + TOKENS_A_STEP]
                if not await self.queue.append_async(name, part):
                    return False
                self.cache.commit(name)
        return True

    async def pause(self, name):
        """The sequence makes way for a while."""
        self.cache.suspend(name).wait()
        await self.sleep(self.random.exponential(30))
        while (transfer := self.cache.resume(name)) is None:
            await self.sleep(STEP)
        transfer.wait()
        return False

    async def sleep(self, seconds):
        """By the clock of the hour."""
        until = self.now + seconds
        while self.now < until:
            await asyncio.sleep(0)

    def hang_up(self, task, name, when):
        """Cancels a client who has waited long enough, if it still waits."""
        if task.done() or name not in self.queue:
            return
        if self.now >= when:
            task.cancel()
        else:
            self.loop.call_soon(self.hang_up, task, name, when)


# ---- the picture


def told(value, unit):
    """A number as the panels have it."""
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s" and value:
        for size, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}"
    end = {"bytes": "B", "Bps": "B/s", "cps": "/s", "s": "s"}.get(unit, "")
    for size, prefix in PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{end}"
    return f"{value:.3g} {end}".strip()


def legend_of(text, labels):
    """What a legend's template becomes."""
    filled = re.sub(r"\{\{(\w+)\}\}", lambda found: dict(labels).get(found[1], ""), text)
    return " ".join(filled.split())


def series_of(panel, scrapes):
    """(legend, values) of everything that a panel shows."""
    for target in panel["targets"]:
        for labels, values in Query(target["expr"], VARIABLES).evaluate(scrapes).items():
            yield legend_of(target["legendFormat"], labels), np.broadcast_to(values, len(scrapes.times))


def draw_number(axes, panel, scrapes):
    """The last value, in the colour of its threshold; of a gauge with a bar."""
    defaults = panel["fieldConfig"]["defaults"]
    ((_, values),) = series_of(panel, scrapes)
    value = values[~np.isnan(values)][-1]
    steps = defaults.get("thresholds", {}).get("steps", [{"color": "green", "value": None}])
    colour = COLOURS[[step["color"] for step in steps if step["value"] is None or value >= step["value"]][-1]]
    axes.text(0.5, 0.55, told(value, defaults["unit"]), ha="center", va="center", fontsize=19, color=colour)
    if panel["type"] == "gauge":
        axes.barh([0.15], [1.0], height=0.12, color="#2c3235")
        axes.barh([0.15], [min(value, 1.0)], height=0.12, color=colour)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[])


def draw_lines(axes, panel, scrapes):
    """Everything over time; what never has a value but 0 is left out of a crowded legend."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    shown = list(series_of(panel, scrapes))
    if len(shown) > 4:
        shown = [each for each in shown if np.nanmax(np.nan_to_num(each[1])) > 0]
    minutes = np.array(scrapes.times) / 60
    for (name, values), colour in zip(shown, LINES * 4, strict=False):
        axes.plot(minutes, values, color=colour, linewidth=1, label=name)
        axes.fill_between(minutes, np.nan_to_num(values), color=colour, alpha=0.08, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlim(minutes[0], minutes[-1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, unit)))
    axes.grid(color="#2c3235", linewidth=0.5)
    if not shown:
        axes.text(0.5, 0.5, "all 0", transform=axes.transAxes, ha="center", fontsize=8, color=INK)
        return
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize=7.5, frameon=False, labelcolor=INK,
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def draw(file, dashboard, scrapes):
    """All panels at their places."""
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = plt.figure(figsize=(15, rows * 0.36), facecolor=GROUND)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, top, width, height = (place[name] for name in "xywh")
        axes = figure.add_axes(
            (
                (left + 1.15) / 24 if panel["type"] == "timeseries" else (left + 0.2) / 24,
                1 - (top + height - (2.1 if panel["type"] == "timeseries" else 0.3)) / rows,
                (width - (1.5 if panel["type"] == "timeseries" else 0.4)) / 24,
                (height - (3.2 if panel["type"] == "timeseries" else 1.5)) / rows,
            ),
            facecolor=PANEL,
        )
        axes.set_title(panel["title"], loc="left", fontsize=9.5, color=INK)
        axes.tick_params(colors=INK, labelsize=7.5, length=0)
        axes.spines[:].set_visible(False)
        (draw_lines if panel["type"] == "timeseries" else draw_number)(axes, panel, scrapes)
    figure.savefig(file, dpi=80, facecolor=GROUND)
    plt.close(figure)


if __name__ == "__main__":
    service = Service()
    service.run()
    service.close()
    draw(
        Path(sys.argv[1]) / "dashboard.png",
        json.loads(DASHBOARD.read_text(encoding="utf-8")),
        service.scrapes,
    )

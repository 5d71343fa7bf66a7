"""Clients of a queue as tasks of a loop that is stepped by hand, and a clock that is set by hand."""

import asyncio

from kvcache.admission import AllocationQueue


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Crowd:
    """Everybody asks by `allocate_async`; `told` has the answers in the order in which they came."""

    def __init__(self, cache, strategy=None, **options):
        self.clock = Clock()
        self.cache = cache
        self.queue = AllocationQueue(cache, strategy, clock=self.clock, **options)
        self.loop = asyncio.new_event_loop()
        self.tasks, self.told, self.all_tasks = {}, {}, []

    def ask(self, request_id, prompt, **options):
        """The answer, or None while it waits."""
        return self.start(request_id, self.queue.allocate_async(request_id, prompt, **options))

    def grow(self, request_id, tokens=1, **options):
        return self.start(("grow", request_id), self.queue.append_async(request_id, tokens, **options))

    def start(self, name, coroutine):
        self.tell(name, coroutine)
        return self.answer(name)

    def tell(self, name, coroutine):
        async def run():
            self.told[name] = await coroutine
            return self.told[name]

        self.tasks[name] = self.loop.create_task(run())
        self.all_tasks.append(self.tasks[name])

    def settle(self):
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    def answer(self, name):
        self.settle()
        task = self.tasks[name]
        return task.result() if task.done() else None

    def free(self, *request_ids):
        for request_id in request_ids:
            assert self.cache.free_for(request_id)
        self.settle()

    def cancel(self, name):
        self.tasks[name].cancel()
        self.settle()
        assert self.tasks[name].cancelled()

    def pass_time(self, seconds):
        self.clock.now += seconds
        self.queue.poke()
        self.settle()

    def granted(self):
        return [name for name, answer in self.told.items() if answer]

    def close(self):
        """Everybody leaves: nothing may be left behind."""
        for task in self.all_tasks:
            task.cancel()
        self.settle()
        self.loop.close()
        assert len(self.queue) == 0
        for request_id in list(self.cache):
            self.cache.free_for(request_id)
        self.queue.poke()
        assert not self.queue._live and not self.queue._ids and not list(self.queue._waiters)
        accounts = self.queue._accounts.values()
        assert [
            (each.blocks, each.sequences, each.waiting) for each in accounts if each.waiting or each.blocks
        ] == []
        stats = self.cache.stats()
        assert (len(self.cache), stats.used_blocks, stats.claimed_blocks) == (0, 0, 0)
        self.cache.check()
        self.queue.close()

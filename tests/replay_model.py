"""The oracle of a replay: lists and dictionaries, every step counted anew, nothing imported from the package.

Spaces answer `room` (blocks that a request takes), `take`, `grow` and `give`. In `Anywhere` only the count of blocks
matters, as in a cache without refusals for fragmentation; `Buddies` looks for powers of two in a map of all blocks.
"""

from fractions import Fraction
from math import ceil, floor


class Anywhere:
    """Blocks have no place. With `whole`, a request takes all that it will ever need."""

    def __init__(self, num_blocks, whole=False):
        self.num_blocks = self.free = num_blocks
        self.largest = num_blocks
        self.whole = whole

    def room(self, prompt_blocks, total_blocks):
        return total_blocks if self.whole else prompt_blocks

    def take(self, blocks):
        self.free -= blocks
        return blocks

    def grow(self, held):
        if self.free == 0:
            return None
        self.free -= 1
        return held + 1

    def give(self, held):
        self.free += held

    def size(self, held):
        return held


class Buddies:
    """A map of blocks. What is free is seen as the largest aligned powers of two that fit into it."""

    def __init__(self, num_blocks):
        self.num_blocks = num_blocks
        self.map = [False] * num_blocks
        self.largest = max(length for _, length in self.runs())
        self.moves = 0

    @property
    def free(self):
        return self.map.count(False)

    def room(self, prompt_blocks, total_blocks):
        length = 1
        while length < prompt_blocks:
            length *= 2
        return length

    def runs(self):
        start = 0
        while start < self.num_blocks:
            length = 1
            while (
                start % (2 * length) == 0
                and start + 2 * length <= self.num_blocks
                and not any(self.map[start : start + 2 * length])
            ):
                length *= 2
            if not self.map[start]:
                yield start, length
            start += length if not self.map[start] else 1

    def take(self, blocks):
        fitting = [(length, start) for start, length in self.runs() if length >= blocks]
        if not fitting:
            return None
        start = min(fitting)[1]
        self.map[start : start + blocks] = [True] * blocks
        return start, blocks

    def grow(self, held):
        start, length = held
        first = start // (2 * length) * 2 * length
        both = self.map[first : first + 2 * length]
        if len(both) == 2 * length and sum(both) == length:
            self.map[first : first + 2 * length] = [True] * (2 * length)
            wider = first, 2 * length
        else:
            wider = self.take(2 * length)
            if wider is not None:
                self.give(held)
        self.moves += wider is not None and wider[0] != start
        return wider

    def give(self, held):
        start, length = held
        self.map[start : start + length] = [False] * length

    def size(self, held):
        return held[1]


def simulate(requests, space, block_size, keep_free=0.1, *, max_share=None, max_requests=None, **options):
    """The figures of a replay of (arrival, prompt, output) triples, means as exact fractions.

    Parameters
    ----------
    requests : list
    space : Anywhere or Buddies
    block_size : int
    keep_free : float
    max_share, max_requests : optional
        As in a replay.
    **options
        Of `Simulation`.
    """
    simulation = Simulation(space, block_size, keep_free, **options)
    for number, (arrival, prompt, output) in enumerate(requests):
        if max_requests is not None and simulation.offered == max_requests:
            break
        if max_share is not None and prompt + output > max_share * space.num_blocks * block_size:
            simulation.skipped += 1
        else:
            simulation.offer(number, arrival, prompt, output)
    return simulation.run()


class Simulation:
    """With a `claims_bound`, blocks held and still promised are kept to that share of all."""

    def __init__(
        self, space, block_size, keep_free, *, timed=False, speed=1.0, step_seconds=0.03, claims_bound=None
    ):
        self.space, self.block_size = space, block_size
        self.bound = floor((1 - Fraction(str(keep_free))) * space.num_blocks)
        self.timed, self.speed, self.step_seconds, self.claims_bound = (
            timed,
            speed,
            step_seconds,
            claims_bound,
        )
        self.queue, self.live, self.steps = [], [], []
        self.offered = self.skipped = self.refused = self.finished = self.preempted = 0
        self.clock = 0.0

    def of(self, tokens):
        return ceil(Fraction(tokens, self.block_size))

    def offer(self, number, arrival, prompt, output):
        total = prompt + output
        self.offered += 1
        first, last = (self.space.room(self.of(tokens), self.of(total)) for tokens in (prompt, total))
        if first > self.bound or last > self.space.largest:
            self.refused += 1
        else:
            at = arrival / self.speed
            self.queue.append({"number": number, "at": at, "prompt": prompt, "total": total, "again": False})

    def run(self):
        measured = None
        while self.queue or self.live:
            blocked = self.admit()
            drains = not self.timed and not self.queue
            if self.live:
                blocked = self.append() or blocked
                self.count(blocked)
            if drains and measured is None:
                measured = self.figures()
            for each in [each for each in self.live if each["tokens"] == each["total"]]:
                self.space.give(each["held"])
                self.live.remove(each)
                self.finished += 1
            self.clock += self.step_seconds
        return {**(measured or self.figures()), "finished": self.finished}

    def admit(self):
        space = self.space
        while self.queue:
            head = self.queue[0]
            if self.timed and not head["again"] and head["at"] > self.clock:
                if self.live:
                    return False
                self.clock = head["at"]
            room = space.room(self.of(head["prompt"]), self.of(head["total"]))
            if space.num_blocks - space.free + room > self.bound and not (head["again"] and not self.live):
                return False
            if self.claims_bound is not None:
                claimed = sum(self.of(each["total"]) for each in [*self.live, head])
                if claimed > self.claims_bound * space.num_blocks:
                    return False
            held = space.take(room)
            if held is None:
                return True
            self.queue.pop(0)
            if head["total"] == head["prompt"]:
                space.give(held)
                self.finished += 1
            else:
                self.live.append({**head, "held": held, "tokens": head["prompt"]})
        return False

    def append(self):
        space, blocked, late = self.space, False, []
        for each in self.live:
            each["before"] = each["tokens"]
        for each in self.live:
            if not grown(space, each, self.block_size):
                late.append(each)
        for each in late:
            while each in self.live and not grown(space, each, self.block_size):
                wanted = space.room(self.of(each["tokens"] + 1), self.of(each["total"])) - space.size(
                    each["held"]
                )
                blocked = blocked or wanted <= space.free
                youngest = self.live.pop()
                space.give(youngest.pop("held"))
                self.queue.insert(0, {**youngest, "prompt": youngest["before"], "again": True})
                self.preempted += 1
        return blocked

    def count(self, blocked):
        tokens, held = sum(each["tokens"] for each in self.live), self.space.num_blocks - self.space.free
        waiting = [each for each in self.queue if each["again"] or not self.timed or each["at"] <= self.clock]
        waste = 1 - Fraction(tokens, held * self.block_size)
        members = len(self.live)
        self.steps.append(
            {
                "tokens": tokens,
                "members": members,
                "waste": waste,
                "waiting": len(waiting),
                "blocked": blocked,
            }
        )

    def figures(self):
        def mean(name):
            return Fraction(sum(each[name] for each in self.steps), max(1, len(self.steps)))

        moves = {"moves": self.space.moves} if isinstance(self.space, Buddies) else {}
        return {
            **moves,
            "requests": self.offered,
            "skipped": self.skipped,
            "refused": self.refused,
            "preempted": self.preempted,
            "steps": len(self.steps),
            "attended_tokens": sum(each["tokens"] for each in self.steps),
            "appended_tokens": sum(each["members"] for each in self.steps),
            "mean_sequences": mean("members"),
            "utilization": mean("tokens") / (self.space.num_blocks * self.block_size),
            "internal_waste": mean("waste"),
            "mean_waiting": mean("waiting"),
            "blocked_by_fragmentation": sum(each["blocked"] for each in self.steps),
        }


def grown(space, each, block_size):
    """Give a sequence its next token, if there is room."""
    if each["tokens"] == space.size(each["held"]) * block_size:
        wider = space.grow(each["held"])
        if wider is None:
            return False
        each["held"] = wider
    each["tokens"] += 1
    return True

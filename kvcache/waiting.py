"""Who waits, and who is next. Nothing here locks, waits or calls: the queue does, and asks here.

A line holds the waiters of one tenant at one priority in order of arrival, with a tree of least needs above them, so
that the first one that fits is found in `O(log n)`. Across lines the choice looks at every line's top only.
"""

import math

NEVER = 2**62  # more blocks than there can be
RETURNING = -math.inf  # level of those who have been admitted once: before every priority


class Tenant:
    """What one tenant holds and may hold, in blocks; negative limits: none."""

    __slots__ = ("blocks", "most_blocks", "most_sequences", "name", "sequences", "tally", "waiting")

    def __init__(self, name, tally, most_blocks=NEVER, most_sequences=NEVER):
        self.name = name
        self.tally = tally
        self.most_blocks, self.most_sequences = most_blocks, most_sequences
        self.blocks = self.sequences = self.waiting = 0

    @property
    def limited(self):
        return self.most_blocks != NEVER or self.most_sequences != NEVER

    @property
    def room(self):
        """Blocks that one more sequence of the tenant may have."""
        return self.most_blocks - self.blocks if self.sequences < self.most_sequences else -1


class Line:
    """Waiters in order of arrival; `waiter.total` and `waiter.first` are the blocks that it needs at least."""

    __slots__ = ("count", "end", "firsts", "head", "level", "places", "tenant", "totals")

    def __init__(self, tenant, level):
        self.tenant = tenant
        self.level = level  # the negative of the priority, or `RETURNING`
        self.clear(8)

    @property
    def room(self):
        """Blocks that its tenant may have for one of them; who returns is on the tenant's account."""
        return NEVER if self.level == RETURNING else self.tenant.room

    def clear(self, capacity):
        self.places = [None] * capacity  # [end] waiters, None where one has left
        self.totals = [NEVER] * (2 * capacity)  # [1:] a binary tree: each node the least of the two below it
        self.firsts = [NEVER] * (2 * capacity)
        self.end = self.count = 0
        self.head = None  # the one that came first

    def add(self, waiter):
        if self.end == len(self.places):
            waiting = [each for each in self.places if each is not None]
            self.clear(max(8, 1 << (2 * len(waiting)).bit_length()))
            for each in waiting:
                self.put(each)
        self.put(waiter)

    def put(self, waiter):
        waiter.place = self.end
        self.places[self.end] = waiter
        self.end += 1
        self.count += 1
        if self.head is None:
            self.head = waiter
        self.update(waiter)

    def update(self, waiter):
        """After its needs have changed."""
        self.climb(self.totals, waiter.place, waiter.total)
        self.climb(self.firsts, waiter.place, waiter.first)

    def remove(self, waiter):
        self.places[waiter.place] = None
        self.climb(self.totals, waiter.place, NEVER)
        self.climb(self.firsts, waiter.place, NEVER)
        self.count -= 1
        if self.head is waiter:
            self.head = self.first_that_fits(NEVER - 1, NEVER - 1)

    def climb(self, tree, place, value):
        node = len(self.places) + place
        while node and tree[node] != value:
            tree[node] = value
            beside = tree[node ^ 1]
            value = min(value, beside)
            node >>= 1

    def first_that_fits(self, total, first):
        """The earliest waiter that is content with so many blocks."""
        totals, firsts, leaves = self.totals, self.firsts, len(self.places)
        nodes = [1]
        while nodes:
            node = nodes.pop()
            if totals[node] <= total and firsts[node] <= first:
                if node >= leaves:
                    return self.places[node - leaves]
                node *= 2
                nodes += (node + 1, node)
        return None

    def first_that_may(self, total, first):
        """The earliest waiter that is content with so many blocks, and with what its tenant may have."""
        waiting = [each for each in self.places if each is not None]
        return next(
            (each for each in waiting if each.total <= min(total, each.room) and each.first <= first), None
        )


class Waiters:
    """All lines, and the few that go before them: growth, and whoever makes room by evicting."""

    def __init__(self, patience, most_overtaken):
        self.patience, self.most_overtaken = patience, most_overtaken
        self.front = {}  # waiter -> None, in order of arrival
        self.lines = {}  # (-priority, tenant) -> Line
        self.old_from = math.inf  # before that, nobody is old
        self.count = 0

    def __iter__(self):
        for line in list(self.lines.values()):
            yield from [each for each in line.places if each is not None]
        yield from [each for each in self.front if each.line is None]

    def oldest(self):
        """When the one that has waited longest came; None where nobody waits. Read without the queue's lock."""
        return min([since for _, _, since in self.by_tally()], default=None)

    def by_tally(self):
        """Name of a tally, how many of its tenants' wait, and since when: a line each, then each of the front."""
        for line in list(self.lines.values()):
            head, count = line.head, line.count
            if head is not None and count:
                yield line.tenant.tally.name, count, head.since
        for each in list(self.front):
            if each.line is None:
                yield each.tally.name, 1, each.since

    def add(self, waiter):
        """At the end of its line."""
        level = waiter.level
        line = self.lines.get((level, waiter.tenant))
        if line is None:
            line = self.lines[level, waiter.tenant] = Line(waiter.tenant, level)
        line.add(waiter)
        waiter.line = line
        waiter.tenant.waiting += 1
        self.count += 1
        self.old_from = min(self.old_from, waiter.since + self.patience if self.most_overtaken else -math.inf)

    def lead(self, waiter):
        """Before all lines, and in its own as well if it is in one."""
        if waiter not in self.front:
            self.front[waiter] = None
            self.count += waiter.line is None

    def follow(self, waiter):
        """No longer before the lines."""
        if waiter in self.front:
            del self.front[waiter]
            self.count -= waiter.line is None

    def remove(self, waiter):
        self.follow(waiter)
        line = waiter.line
        if line is None:
            return
        line.remove(waiter)
        waiter.line = None
        waiter.tenant.waiting -= 1
        self.count -= 1
        if line.count == 0:
            del self.lines[line.level, waiter.tenant]

    def note_grant(self, waiter):
        """Whoever came before it has been overtaken; each line's first one counts that."""
        number, most = waiter.number, self.most_overtaken
        for line in self.lines.values():
            head = line.head
            if head.number < number:
                head.overtaken += 1
                if head.overtaken >= most:
                    self.old_from = -math.inf

    def old_heads(self, now):
        """Those first in their lines that have waited too long or been overtaken too often, in order of arrival."""
        if now < self.old_from:
            return ()
        heads = [line.head for line in self.lines.values()]
        born, most = now - self.patience, self.most_overtaken
        old = [each for each in heads if each.since <= born or each.overtaken >= most]
        if not old:  # the first of a line never gets younger
            self.old_from = min([each.since for each in heads], default=math.inf) + self.patience
        old.sort(key=lambda each: each.number)
        return old

    def choose(self, free, unclaimed, now):
        """Whom to grant now, of those in lines, with so many blocks free for newcomers and unclaimed; or None."""
        fitting = [
            line for line in self.lines.values() if line.totals[1] <= unclaimed and line.firsts[1] <= free
        ]
        if not fitting:
            return None
        closed = set()  # tenants that keep what comes for one of their own
        for waiter in self.old_heads(now):
            if waiter.tenant in closed:
                continue
            if waiter.total > waiter.room:
                closed.add(waiter.tenant)
            elif waiter.total <= unclaimed and waiter.first <= free:
                return waiter
            else:
                return None  # what there is, is kept for it
        while fitting:
            line = self.fairest(fitting, closed)
            found = line and line.first_that_fits(min(unclaimed, line.room), free)
            if found and found.total > found.room:  # its tenant also pays for what it shares
                found = line.first_that_may(unclaimed, free)
            if found or line is None:
                return found
            fitting.remove(line)  # one needs few blocks at once, another one few in all
        return None

    def fairest(self, lines, closed):
        """The line of the highest priority, among these of the tenant that holds least, among these the earliest."""
        best = None
        level = blocks = number = math.inf
        for line in lines:
            tenant = line.tenant
            if line.level > level:
                continue
            if line.level == level and (
                tenant.blocks > blocks or (tenant.blocks == blocks and line.head.number > number)
            ):
                continue
            if line.totals[1] <= line.room and (tenant not in closed or line.level == RETURNING):
                best, level, blocks, number = line, line.level, tenant.blocks, line.head.number
        return best

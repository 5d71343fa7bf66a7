"""Who waits, and who is next. Nothing here locks, waits or calls: the queue does, and asks here.

A line holds the waiters of one tenant at one priority in order of arrival, with a tree of least needs above them, so
that the first one that fits is found in `O(log n)`. Across lines the choice looks at every line's top only.
"""

from bisect import insort

NEVER = 2**62  # more blocks than there can be


class Tenant:
    """What one tenant holds and may hold, in blocks; negative limits: none."""

    __slots__ = ("blocks", "most_blocks", "most_sequences", "name", "sequences", "waiting")

    def __init__(self, name, most_blocks=NEVER, most_sequences=NEVER):
        self.name = name
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

    __slots__ = ("count", "end", "firsts", "head", "places", "tenant", "totals")

    def __init__(self, tenant):
        self.tenant = tenant
        self.clear(8)

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


class Waiters:
    """All lines, and the few that go before them: growth, and whoever makes room by evicting."""

    def __init__(self, patience, most_overtaken):
        self.patience, self.most_overtaken = patience, most_overtaken
        self.front = {}  # waiter -> None, in order of arrival
        self.lines = {}  # (-priority, tenant) -> Line
        self.levels = []  # -priority of the lines, each once, ascending
        self.by_level = {}  # -priority -> tenant -> Line
        self.count = 0

    def __iter__(self):
        for line in list(self.lines.values()):
            yield from [each for each in line.places if each is not None]
        yield from [each for each in self.front if each.line is None]

    def add(self, waiter):
        """At the end of its line."""
        level = -waiter.priority
        line = self.lines.get((level, waiter.tenant))
        if line is None:
            line = self.lines[level, waiter.tenant] = Line(waiter.tenant)
            if level not in self.by_level:
                self.by_level[level] = {}
                insort(self.levels, level)
            self.by_level[level][waiter.tenant] = line
        line.add(waiter)
        waiter.line = line
        waiter.tenant.waiting += 1
        self.count += 1

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
            level = -waiter.priority
            del self.lines[level, waiter.tenant], self.by_level[level][waiter.tenant]
            if not self.by_level[level]:
                del self.by_level[level]
                self.levels.remove(level)

    def note_grant(self, waiter):
        """Whoever came before it has been overtaken; each line's first one counts that."""
        for line in self.lines.values():
            if line.head.number < waiter.number:
                line.head.overtaken += 1

    def is_old(self, waiter, now):
        return waiter.overtaken >= self.most_overtaken or now - waiter.since >= self.patience

    def choose(self, free, unclaimed, now):
        """Whom to grant now, of those in lines, with so many blocks free for newcomers and unclaimed; or None."""
        old = [line.head for line in self.lines.values() if self.is_old(line.head, now)]
        closed = set()  # tenants that keep what comes for one of their own
        for waiter in sorted(old, key=lambda each: each.number):
            if waiter.tenant in closed:
                continue
            if waiter.total > waiter.tenant.room:
                closed.add(waiter.tenant)
            elif waiter.total <= unclaimed and waiter.first <= free:
                return waiter
            else:
                return None  # what there is, is kept for it
        for level in self.levels:
            found = self.fairest(self.by_level[level].values(), free, unclaimed, closed)
            if found is not None:
                return found
        return None

    def fairest(self, lines, free, unclaimed, closed):
        """Of the lines of one priority, the first fitting waiter of the tenant that holds least."""
        fitting = [
            line
            for line in lines
            if line.totals[1] <= unclaimed
            and line.firsts[1] <= free
            and line.totals[1] <= line.tenant.room
            and line.tenant not in closed
        ]
        if len(fitting) > 1:
            fitting.sort(key=lambda line: (line.tenant.blocks, line.head.number))
        for line in fitting:
            found = line.first_that_fits(min(unclaimed, line.tenant.room), free)
            if found is not None:
                return found
        return None

"""Who waits, and who is next. Nothing here locks, waits or calls: the queue does, and asks here.

A line holds the waiters of one tenant at one priority in order of arrival, with a tree of least needs above them, so
that the first one that fits is found in `O(log n)`. A level holds the lines of one priority, the tenant first that has
least, in a tree as well. Who comes is entered there at once; who has left, and what tenants hold now, when somebody is
to be chosen from that level.
"""

import math
from bisect import bisect_left, insort

from kvcache.btree import Counts, Needs
from kvcache.errors import KVCacheError

NEVER = 2**62  # more blocks than there can be
RETURNING = -math.inf  # level of those who have been admitted once: before every priority


class Tenant:
    """What one tenant holds and may hold, in blocks."""

    __slots__ = (
        "_blocks",
        "changed",  # where to say that what it holds has changed, while it has lines
        "contested",  # those of its lines that are not alone at their levels
        "is_closed",  # it has no room for the first of its old ones: what comes for it is kept for that
        "kept_for",  # the first of its old ones, as in `old`, if it has room for that
        "lines",
        "most_blocks",
        "most_sequences",
        "name",
        "old",  # (number, waiter) of the first of its lines that are old, in order of arrival
        "sequences",
        "tally",
        "waiting",
    )

    def __init__(self, name, tally, most_blocks=NEVER, most_sequences=NEVER):
        self.name = name
        self.tally = tally
        self.most_blocks, self.most_sequences = most_blocks, most_sequences
        self._blocks = self.sequences = self.waiting = 0
        self.changed = self.kept_for = None
        self.is_closed = False
        self.lines, self.contested, self.old = {}, {}, []  # dicts as sets, in order

    @property
    def blocks(self):
        """Set at each change of `sequences`, too: this is how the lines come to know."""
        return self._blocks

    @blocks.setter
    def blocks(self, blocks):
        self._blocks = blocks
        if self.lines:
            self.changed[self] = None

    @property
    def limited(self):
        return self.most_blocks != NEVER or self.most_sequences != NEVER

    @property
    def room(self):
        """Blocks that one more sequence of the tenant may have."""
        return self.most_blocks - self._blocks if self.sequences < self.most_sequences else -1


class Line:
    """Waiters in order of arrival; `waiter.total` and `waiter.first` are the blocks that it needs at least."""

    __slots__ = ("count", "end", "entry", "firsts", "head", "is_old", "level", "places", "tenant", "totals")

    def __init__(self, tenant, level):
        self.tenant = tenant
        self.level = level
        self.entry = None  # key and least needs as they are in the level's tree; None: not there
        self.is_old = False  # and so among its tenant's `old`
        self.clear(8)

    @property
    def room(self):
        """Blocks that its tenant may have for one of them; who returns is on the tenant's account."""
        return NEVER if self.level.rank == RETURNING else self.tenant.room

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
        self.level.note(self, waiter)
        if self.is_old and waiter is self.head:
            self.tenant.changed[self.tenant] = None

    def remove(self, waiter):
        self.places[waiter.place] = None
        self.climb(self.totals, waiter.place, NEVER)
        self.climb(self.firsts, waiter.place, NEVER)
        self.count -= 1
        if self.head is waiter:
            after = waiter.place + 1
            self.head = self.places[after] if after < self.end else None
            self.head = self.head or self.first_that_fits(NEVER - 1, NEVER - 1)
        self.level.changed[self] = None

    def climb(self, tree, place, value):
        node = len(self.places) + place
        while node and tree[node] != value:
            tree[node] = value
            beside = tree[node ^ 1]
            value = min(value, beside)
            node >>= 1

    def first_that_fits(self, total, first):
        """The earliest waiter that is content with so many blocks."""
        head = self.head
        if head is not None and head.total <= total and head.first <= first:
            return head
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

    def entry_now(self):
        """What `entry` is to be: None if there is nobody in it whom its tenant leaves room for."""
        total, tenant = self.totals[1], self.tenant
        if self.head is None or total > self.room or (tenant.is_closed and self.level.rank != RETURNING):
            return None
        key = (tenant.blocks, self.head.number) if len(self.level.lines) > 1 else ()
        return key, total, self.firsts[1]

    def check(self):
        """Raises `KVCacheError`, naming what is wrong."""
        waiting = [each for each in self.places[: self.end] if each is not None]
        leaves = len(self.places)
        if self.count != len(waiting) or self.head is not next(iter(waiting), None):
            raise KVCacheError(
                f"{self!r}: {len(waiting)} wait, it counts {self.count}, the first is {self.head}"
            )
        for name, tree in ("total", self.totals), ("first", self.firsts):
            needs = [NEVER if each is None else getattr(each, name) for each in self.places]
            if tree[leaves:] != needs:
                raise KVCacheError(f"{self!r}: {name} of those who wait is {needs}, not {tree[leaves:]}")
            for node in range(1, leaves):
                if tree[node] != min(tree[2 * node], tree[2 * node + 1]):
                    raise KVCacheError(
                        f"{self!r}: node {node} says {tree[node]} of {name}, below it is less or more"
                    )
        for each in waiting:
            if each.line is not self or self.places[each.place] is not each:
                raise KVCacheError(f"{self!r}: {each.request_id!r} is not where it says, at {each.place}")

    def __repr__(self):
        return f"line of {self.tenant.name!r} at {self.level.rank}"


class Level:
    """The lines of one priority: first the tenant that holds least, among these the line whose first waiter came first.

    A line is in the tree while there is one in it whom its tenant leaves room for. The order of one that is alone here
    does not depend on its tenant.
    """

    __slots__ = ("changed", "first", "levels", "lines", "rank", "total", "tree")

    def __init__(self, rank, levels):
        self.rank = rank  # the negative of the priority, or `RETURNING`
        self.levels = levels  # a tree of all by their ranks
        self.lines = {}
        self.changed = {}  # lines that are not in the tree as they are
        self.tree = Needs()
        self.total = self.first = NEVER  # nobody here has ever needed less
        levels.put(rank, self, NEVER, NEVER)

    def add(self, line):
        self.lines[line] = None
        if len(self.lines) > 1:
            line.tenant.contested[line] = None
        if len(self.lines) == 2:  # from now on it matters who holds less
            (other, _) = self.lines
            other.tenant.contested[other] = None
            self.changed[other] = None

    def drop(self, line):
        del self.lines[line]
        self.changed.pop(line, None)
        self.enter_as(line, None)
        line.tenant.contested.pop(line, None)
        if len(self.lines) == 1:
            (other,) = self.lines
            del other.tenant.contested[other]
            self.changed[other] = None

    def note(self, line, waiter):
        """After a change of what one of those in the line needs."""
        self.changed[line] = None
        if waiter.total < self.total or waiter.first < self.first:
            self.total, self.first = min(self.total, waiter.total), min(self.first, waiter.first)
            self.levels.take(self.rank)
            self.levels.put(self.rank, self, self.total, self.first)

    def enter(self, line):
        """After a change of what it is ordered by, or of what is in it."""
        self.changed.pop(line, None)
        entry = line.entry_now()
        if entry != line.entry:
            self.enter_as(line, entry)

    def enter_as(self, line, entry):
        if line.entry:
            self.tree.take(line.entry[0])
        if entry:
            key, total, first = entry
            self.tree.put(key, line, total, first)
        line.entry = entry

    def choose(self, free, unclaimed):
        """The first that is content with that; None if nobody is."""
        while self.changed:
            self.enter(next(iter(self.changed)))
        for line in self.tree.fitting(unclaimed, free):
            found = line.first_that_fits(min(unclaimed, line.room), free)
            if found and found.total > found.room:  # its tenant also pays for what it shares
                found = line.first_that_may(unclaimed, free)
            if found:
                return found  # else one needs few blocks at once, another one few in all
        return None

    def check(self):
        """Raises `KVCacheError`, naming what is wrong."""
        self.tree.check()
        entered = [line for line in self.lines if line.entry]
        if set(self.tree) != {(line.entry[0], line) for line in entered}:
            raise KVCacheError(f"level {self.rank} has {list(self.tree)}, of which its lines know {entered}")
        for line in self.lines:
            line.check()
            if line.totals[1] < self.total or line.firsts[1] < self.first:
                raise KVCacheError(
                    f"{line!r}: one needs less than {self.total} and {self.first}, the least ever"
                )


class Waiters:
    """All lines, and the few that go before them: growth, and whoever makes room by evicting.

    Parameters
    ----------
    patience : float
        Age at which the first of a line is old. Who comes later is not younger.
    most_overtaken : int
        Grants to later ones while it was the first of its line, at which it is old as well.
    """

    def __init__(self, patience, most_overtaken):
        self.patience, self.most_overtaken = patience, most_overtaken
        self.front = {}  # waiter -> None, in order of arrival
        self.lines = {}  # (-priority, tenant) -> Line
        self.levels = Needs()  # by their ranks, with what nobody there has ever needed less than
        self.by_rank = {}
        self.young = Counts()  # lines by the number of their first, not known to be old: overtaken how often
        self.kept_for = []  # what tenants have as `kept_for`, in order of arrival
        self.changed = {}  # tenant -> None: what it holds, or what its first old one needs
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
        line = self.lines.get((waiter.level, waiter.tenant)) or self._open(waiter.level, waiter.tenant)
        line.add(waiter)
        line.level.enter(line)
        if line.head is waiter:
            self.young.add(waiter.number, line)
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
        was_first = line.head is waiter
        line.remove(waiter)
        waiter.line = None
        waiter.tenant.waiting -= 1
        self.count -= 1
        if was_first:
            self._follow_in_line(line, waiter)

    def note_grant(self, waiter):
        """Whoever came before it has been overtaken; each line's first one counts that."""
        self.young.raise_before(waiter.number)

    def choose(self, free, unclaimed, now):
        """Whom to grant now, of those in lines, with so many blocks free for newcomers and unclaimed; or None."""
        self._find_old(now)
        if self.kept_for:
            _, waiter = self.kept_for[0]
            return waiter if waiter.total <= unclaimed and waiter.first <= free else None
        for level in self.levels.fitting(unclaimed, free):
            found = level.choose(free, unclaimed)
            if found:
                return found
        return None

    # ---- lines

    def _open(self, rank, tenant):
        level = self.by_rank.get(rank)
        if level is None:
            level = self.by_rank[rank] = Level(rank, self.levels)
        line = self.lines[rank, tenant] = Line(tenant, level)
        level.add(line)
        tenant.lines[line] = None
        tenant.changed = self.changed
        return line

    def _close(self, line):
        level = line.level
        level.drop(line)
        if not level.lines:
            self.levels.take(level.rank)
            del self.by_rank[level.rank]
        del self.lines[level.rank, line.tenant], line.tenant.lines[line]

    def _follow_in_line(self, line, waiter):
        """Another one is the first of the line, or nobody."""
        if line.is_old:
            line.is_old = False
            old = line.tenant.old
            del old[bisect_left(old, (waiter.number,))]
            self._review(line.tenant)
        else:
            self.young.take(waiter.number)
        if line.head is None:
            self._close(line)
        else:
            self.young.add(line.head.number, line)

    # ---- the old ones

    def _find_old(self, now):
        """In order of arrival, until there is one for which what there is has to be kept: others do not matter then."""
        for tenant in self.changed:
            self._review(tenant)
        self.changed.clear()
        born = now - self.patience
        while self.young:
            line = self.young.first()
            if line.head.since > born:
                if self.young.most() < self.most_overtaken:
                    return
                line = self.young.first_with(self.most_overtaken)
            if self.kept_for and self.kept_for[0][0] < line.head.number:
                return
            self.young.take(line.head.number)
            line.is_old = True
            insort(line.tenant.old, (line.head.number, line.head))
            self._review(line.tenant)

    def _review(self, tenant):
        """After a change of what it holds, or of its old ones."""
        kept_for = oldest = tenant.old[0] if tenant.old else None
        if oldest and oldest[1].total > oldest[1].room:
            kept_for = None
        if kept_for is not tenant.kept_for:
            if tenant.kept_for:
                del self.kept_for[bisect_left(self.kept_for, tenant.kept_for)]
            if kept_for:
                insort(self.kept_for, kept_for)
            tenant.kept_for = kept_for
        tenant.is_closed = oldest is not kept_for
        for line in tenant.lines if tenant.limited else tenant.contested:
            line.level.changed[line] = None

    def check(self):
        """Walks every structure.

        Raises
        ------
        KVCacheError
            Naming the first thing that is wrong.
        """
        self.levels.check()
        self.young.check()
        for level in self.by_rank.values():
            level.check()
        lines = {(rank, line.tenant): line for rank, level in self.levels for line in level.lines}
        if dict(list(self.levels)) != self.by_rank or lines != self.lines:
            raise KVCacheError(f"levels {list(self.levels)} have lines {lines}, there are {self.lines}")
        young = [(line.head.number, line) for line in self.lines.values() if not line.is_old]
        if dict(list(self.young)) != dict(young):
            raise KVCacheError(f"young are {young}, the tree has {list(self.young)}")
        count = sum([line.count for line in self.lines.values()]) + sum(
            [each.line is None for each in self.front]
        )
        if self.count != count:
            raise KVCacheError(f"{count} wait, the count says {self.count}")
        tenants = dict.fromkeys([line.tenant for line in self.lines.values()])
        for tenant in tenants:
            self._check_tenant(tenant)
        kept_for = sorted([tenant.kept_for for tenant in tenants if tenant.kept_for])
        if self.kept_for != kept_for:
            raise KVCacheError(f"blocks are kept for {kept_for}, the list has {self.kept_for}")

    def _check_tenant(self, tenant):
        lines = {line for line in self.lines.values() if line.tenant is tenant}
        waiting = sum([line.count for line in lines])
        contested = {line for line in lines if len(line.level.lines) > 1}
        if set(tenant.contested) != contested:
            raise KVCacheError(
                f"of {tenant.name!r} {contested} are not alone, it says {list(tenant.contested)}"
            )
        if set(tenant.lines) != lines or tenant.waiting != waiting:
            raise KVCacheError(
                f"{waiting} of {tenant.name!r} wait in {lines}, it has {tenant.waiting} in {tenant.lines}"
            )
        old = sorted([(line.head.number, line.head) for line in lines if line.is_old])
        if tenant.old != old:
            raise KVCacheError(f"old ones of {tenant.name!r} are {old}, it has {tenant.old}")
        if tenant in self.changed:
            return
        has_room = bool(old) and old[0][1].total <= old[0][1].room
        if tenant.kept_for != (old[0] if has_room else None) or tenant.is_closed != (
            bool(old) and not has_room
        ):
            raise KVCacheError(
                f"{tenant.name!r} has room of {tenant.room} blocks and old ones {old}, "
                f"and keeps for {tenant.kept_for}, closed: {tenant.is_closed}"
            )
        for line in lines:
            if line not in line.level.changed and line.entry != line.entry_now():
                raise KVCacheError(f"{line!r} is entered as {line.entry}, it is {line.entry_now()}")

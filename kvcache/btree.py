"""B-trees for those who wait: things in order of their keys, with two numbers each that a node sums up for its parent.

What comes, goes and is looked for takes `O(log n)`. A node goes when it is empty, so a tree is as high as its most
needed, until it is empty itself.
"""

from bisect import bisect_left, bisect_right

from kvcache.errors import KVCacheError

WIDTH = 32  # entries of a node, at most


class Tree:
    """A node, and the whole tree if it is the one at the top. Keys are unique."""

    __slots__ = ("columns", "is_leaf", "keys", "things")

    def __init__(self, is_leaf=True, columns=None):
        self._hold(is_leaf, ([], [], [], []) if columns is None else columns)

    def _hold(self, is_leaf, columns):
        self.is_leaf, self.columns = is_leaf, columns
        self.keys, self.things = columns[:2]  # of inner nodes: the least key of each part, and the part

    def __bool__(self):
        return bool(self.keys)

    def __iter__(self):
        """Yields keys and things in order."""
        if self.is_leaf:
            yield from zip(self.keys, self.things, strict=True)
        else:
            for part in self.things:
                yield from part

    def first(self):
        """The thing of the least key."""
        thing = self.things[0]
        return thing if self.is_leaf else thing.first()

    def put(self, key, thing, number, other):
        self._put(key, thing, number, other)
        if len(self.keys) > WIDTH:
            part = type(self)(self.is_leaf, self.columns)
            self._hold(False, ([], [], [], []))
            self._insert(0, key, part, 0, 0)
            self._split(0)

    def take(self, key):
        self._take(key)
        if not self.keys:
            self.is_leaf = True

    def _put(self, key, thing, number, other):
        if self.is_leaf:
            self._insert(bisect_left(self.keys, key), key, thing, number, other)
            return
        at = self._part_of(key)
        part = self.things[at]
        part._put(key, thing, self._inside(at, number), other)
        if len(part.keys) > WIDTH:
            self._split(at)
        else:
            self._renew(at)

    def _take(self, key):
        if self.is_leaf:
            at = bisect_left(self.keys, key)
            if self.keys[at : at + 1] != [key]:
                raise KeyError(key)
            self._delete(at)
            return
        at = self._part_of(key)
        part = self.things[at]
        part._take(key)
        if part.keys:
            self._renew(at)
        else:
            self._delete(at)

    def _part_of(self, key):
        after = bisect_right(self.keys, key)
        return after - 1 if after else 0

    def _insert(self, at, key, thing, number, other):
        keys, things, numbers, others = self.columns
        keys.insert(at, key)
        things.insert(at, thing)
        numbers.insert(at, number)
        others.insert(at, other)

    def _delete(self, at):
        for column in self.columns:
            del column[at]

    def _split(self, at):
        """Makes two of a part that is too wide."""
        part = self.things[at]
        upper = type(self)(part.is_leaf, tuple([column[WIDTH // 2 :] for column in part.columns]))
        for column in part.columns:
            del column[WIDTH // 2 :]
        _, _, numbers, others = self.columns
        self._insert(at + 1, upper.keys[0], upper, numbers[at], others[at])
        self._renew(at)
        self._renew(at + 1)

    def _renew(self, at):
        """After that part has changed."""
        keys, things, numbers, others = self.columns
        keys[at] = things[at].keys[0]
        numbers[at], others[at] = self._sum_up(at)

    def _inside(self, at, number):
        """The number of an entry as it is written in that part."""
        return number

    def _sum_up(self, at):
        """The two numbers of that part."""
        raise NotImplementedError

    def check(self):
        """Raises `KVCacheError`, naming the first node that is wrong."""
        name = f"a {'leaf' if self.is_leaf else 'node'} of {len(self.keys)} from {self.keys[:1]}"
        lengths = [len(column) for column in self.columns]
        if len(set(lengths)) > 1 or len(self.keys) > WIDTH:
            raise KVCacheError(f"{name} has columns of {lengths}")
        if any(key >= after for key, after in zip(self.keys, self.keys[1:], strict=False)):
            raise KVCacheError(f"{name} is not in order: {self.keys}")
        if self.is_leaf:
            return
        for at, part in enumerate(self.things):
            part.check()
            told = tuple([column[at] for column in self.columns])
            if not part.keys or told != (part.keys[0], part, *self._sum_up(at)):
                raise KVCacheError(f"{name} says {told[0], *told[2:]} of a part from {part.keys[:1]}")


class Needs(Tree):
    """With each thing the least that would do for it, in all and at once."""

    __slots__ = ("firsts", "totals")

    def _hold(self, is_leaf, columns):
        super()._hold(is_leaf, columns)
        self.totals, self.firsts = columns[2:]

    def least(self):
        """The least of all, in all and at once."""
        return min(self.totals), min(self.firsts)

    def fitting(self, total, first):
        """Yields the things that may be content with that, in order."""
        for thing, in_all, at_once in zip(self.things, self.totals, self.firsts, strict=True):
            if in_all <= total and at_once <= first:
                if self.is_leaf:
                    yield thing
                else:
                    yield from thing.fitting(total, first)

    def _sum_up(self, at):
        return self.things[at].least()


class Counts(Tree):
    """With each thing a count, which is raised for all things up to a key at once."""

    __slots__ = ("counts", "raised")

    def _hold(self, is_leaf, columns):
        super()._hold(is_leaf, columns)
        self.counts, self.raised = columns[
            2:
        ]  # the most of a part, and what is to be added to all that is in it

    def add(self, key, thing):
        """With a count of 0."""
        self.put(key, thing, 0, 0)

    def raise_before(self, key):
        """Counts one more for each thing of a lower key."""
        before = bisect_left(self.keys, key)
        if not self.is_leaf and before:
            before -= 1  # this part has things of lower keys, and perhaps others
            self.things[before].raise_before(key)
            self._renew(before)
            self.raised[:before] = [each + 1 for each in self.raised[:before]]
        self.counts[:before] = [each + 1 for each in self.counts[:before]]

    def most(self):
        """The highest count; -1 of nothing."""
        return max(self.counts, default=-1)

    def first_with(self, least):
        """The first thing that has counted so many, at most `most`."""
        at = next(index for index, count in enumerate(self.counts) if count >= least)
        thing = self.things[at]
        return thing if self.is_leaf else thing.first_with(least - self.raised[at])

    def _inside(self, at, number):
        return number - self.raised[at]

    def _sum_up(self, at):
        return self.things[at].most() + self.raised[at], self.raised[at]

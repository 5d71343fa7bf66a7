"""A cache and its oracle, driven in step: every answer predicted, every counter and every byte compared."""

from itertools import chain, pairwise

import numpy as np
import pytest
from model import GRANTED, HELD, TOO_LARGE, Model
from observation import to_numpy

from kvcache import CacheFull, CacheHeld, KVCache, RequestTooLarge


def numpy_dtype(name):
    if name == "bfloat16":
        return pytest.importorskip("ml_dtypes").bfloat16
    return np.dtype(name)


def stamp(serial, position, layer, plane, version, shape, dtype):
    """One row that says whose it is: request, position, layer, plane, head, version; exact in every dtype."""
    heads, width = shape
    rows = np.empty(shape, dtype=np.int64)
    for head in range(heads):
        marks = [serial, position, layer, plane, head, version]
        mixed = sum(mark * prime for mark, prime in zip(marks, (31, 7, 101, 61, 17, 43), strict=True))
        rows[head] = [(mixed + 11 * index) % 241 for index in range(width)]
        spelled = min(width, len(marks)) if width >= len(marks) else 0
        rows[head, :spelled] = [mark % 241 for mark in marks[:spelled]]
    return rows.astype(dtype)


class WrongContents(AssertionError):
    """A view does not show what was written."""


class Pair:
    """Calls the cache and the oracle together; `perform` is the seam where faults are injected.

    Parameters
    ----------
    spec : KVCacheSpec
    placement, backend : str
    overcommit : float
    bound : int, optional
        `max_move_tokens`.
    """

    def __init__(self, spec, placement="contiguous", backend="numpy", overcommit=1.0, bound=None):
        self.spec = spec
        self.layers = spec.layers
        self.backend = backend
        self.cache = KVCache(
            spec,
            backend=backend,
            placement=placement,
            overcommit=overcommit,
            prefix_cache=False,
            max_move_tokens=bound,
        )
        self.model = Model(spec.num_blocks, spec.block_size, placement, overcommit, len(spec.layers), bound)
        self.may_move = bound  # tokens that the call in hand may move
        self.version = 0
        self.exact_moves = True  # a batch may move a sequence twice within one call
        self.seen = self.cache.stats()
        self.tokens = {}

    def perform(self, action):
        return action()

    # ---- calls

    def carry_out(self, verdict, action, refusal):
        before = self.cache.stats()
        if verdict is HELD:
            pytest.raises(CacheHeld, self.perform, action)
        elif verdict is TOO_LARGE:
            pytest.raises(RequestTooLarge, self.perform, action)
        elif verdict is GRANTED:
            answer = self.perform(action)
            assert answer, f"refused with {answer!r}, the oracle grants it"
            return answer
        elif refusal is CacheFull:
            pytest.raises(CacheFull, self.perform, action)
        else:
            answer = self.perform(action)
            assert answer is refusal, f"answered {answer!r}, the oracle refuses"
        assert self.cache.stats() == before
        return None

    def allocate(self, request_id, prompt, tokens=None, **limits):
        """`tokens`: the prompt as ids, `prompt` of them, where the count is not given as it is."""
        verdict = self.model.allocate(request_id, prompt, **limits)
        asked = prompt if tokens is None else tokens
        grant = self.carry_out(verdict, lambda: self.cache.allocate_for(request_id, asked, **limits), None)
        if grant is not None:
            told = (grant.request_id, grant.tokens, grant.max_tokens, grant.cached_tokens)
            assert told == (request_id, prompt, self.model.sequences[request_id].limit, 0)
        return verdict

    def fork(self, request_id, new_id):
        verdict = self.model.fork(request_id, new_id)
        grant = self.carry_out(verdict, lambda: self.cache.fork(request_id, new_id), None)
        if grant is not None:
            child = self.model.sequences[new_id]
            told = (grant.request_id, grant.tokens, grant.max_tokens, grant.cached_tokens)
            assert told == (new_id, child.tokens, child.limit, child.committed)
        return verdict

    def append(self, request_id, count=1):
        verdict = self.model.append(request_id, count)
        self.carry_out(verdict, lambda: self.cache.append_tokens(request_id, count), False)
        return verdict

    def append_one(self, request_id):
        verdict = self.model.append(request_id, 1)
        self.carry_out(verdict, lambda: self.cache.append_token(request_id), False)
        return verdict

    def truncate(self, request_id, tokens):
        verdict = self.model.truncate(request_id, tokens)
        self.carry_out(verdict, lambda: self.cache.truncate(request_id, tokens), False)
        return verdict

    def set_limit(self, request_id, limit):
        verdict = self.model.set_limit(request_id, limit)
        self.carry_out(verdict, lambda: self.cache.set_limit(request_id, limit), False)
        return verdict

    def free(self, request_id):
        self.model.free(request_id)
        assert self.perform(lambda: self.cache.free_for(request_id)) is True

    def commit(self, request_id, tokens=None):
        self.model.commit(request_id, tokens)
        self.cache.commit(request_id, tokens)

    def compact(self, budget=None):
        """The pool packed, or what a budget allows; what has been moved is counted by whoever compares."""
        verdict = self.model.compact()

        def compact():
            moved = self.cache.compact(budget)
            assert budget is None or moved <= budget
            return True

        self.exact_moves, self.may_move = False, budget
        self.carry_out(verdict, compact, None)
        if verdict is GRANTED and budget is None and not self.model.paged:
            self.is_packed()

    def is_packed(self):
        """All runs side by side from the first block on, and every sequence one of them, if there is room to turn."""
        tables = [self.cache.block_table(request_id).tolist() for request_id in self.cache]
        assert sorted(chain.from_iterable(tables)) == list(range(sum(map(len, tables))))
        if self.model.free_blocks:
            assert all(table == list(range(table[0], table[0] + len(table))) for table in tables if table)

    def hold(self):
        self.model.hold()
        hold = self.cache.hold()
        hold.__enter__()
        return hold

    def release(self, hold):
        self.model.release()
        hold.__exit__(None, None, None)

    # ---- contents

    def new_rows(self, request_id, layer, start, count):
        """`count` freshly stamped rows for positions from `start` on: a tuple of plane rows each."""
        self.version += 1
        return [self.new_row(self.model.sequences[request_id].serial, start + n, layer) for n in range(count)]

    def new_row(self, serial, position, layer):
        return tuple(
            stamp(
                serial,
                position,
                layer,
                index,
                self.version,
                (plane.heads, plane.width),
                numpy_dtype(plane.dtype),
            )
            for index, plane in enumerate(self.layers[layer].planes)
        )

    def as_planes(self, rows, axis=1):
        """Rows as `write` takes them: `(heads, n, width)` for axis 1, `(n, heads, width)` for axis 0."""
        return [np.stack(plane_rows, axis=axis) for plane_rows in zip(*rows, strict=True)]

    def write(self, request_id, layer, start, count, name_start=True):
        rows = self.new_rows(request_id, layer, start, count)
        planes = self.as_planes(rows)
        where = {"start": start} if name_start else {}
        verdict = self.model.write(request_id, layer, rows, start)
        self.carry_write(verdict, lambda: self.cache.write(request_id, layer, *planes, **where))
        return verdict

    def carry_write(self, verdict, action):
        def write():
            assert action() is None
            return True

        self.carry_out(verdict, write, CacheFull)

    def write_all(self, request_id, start=0):
        """Every layer of a sequence from `start` on."""
        count = self.model.sequences[request_id].tokens - start
        for layer in range(len(self.layers)):
            if count and self.write(request_id, layer, start, count) is not GRANTED:
                return

    # ---- comparing

    def compare(self):
        """Everything the oracle knows against everything the cache says."""
        cache, model = self.cache, self.model
        assert list(cache) == list(model.sequences)
        assert len(cache) == cache.num_allocated_sequences == len(model.sequences)
        moved = model.settle({request_id: cache.block_table(request_id).tolist() for request_id in cache})
        self.compare_counters(moved)
        for request_id, sequence in model.sequences.items():
            self.compare_sequence(request_id, sequence)
        if self.backend != "none":
            self.compare_contents()
        cache.check()

    def compare_counters(self, moved):
        cache, model, stats = self.cache, self.model, self.cache.stats()
        assert stats.num_sequences == len(model.sequences)
        assert stats.total_blocks == model.num_blocks
        assert stats.used_blocks == model.used_blocks
        assert stats.free_blocks == model.free_blocks
        assert stats.claimed_blocks == model.claimed_blocks
        self.compare_cached(stats)
        assert stats.largest_free_run == model.largest_free_run
        assert stats.fragmentation == cache.fragmentation == model.fragmentation
        assert stats.peak_used_blocks == model.peak_used_blocks
        assert stats.copied_tokens == model.copied_tokens
        assert cache.is_full is (model.free_blocks == 0)
        assert cache.free_tokens == model.free_blocks * model.block_size
        assert stats.allocated_bytes == cache.total_allocated == model.used_blocks * self.spec.block_bytes
        assert stats.free_bytes == cache.total_free == model.free_blocks * self.spec.block_bytes
        assert stats.arena_bytes == self.spec.arena_bytes
        self.compare_moves(moved, stats)

    def compare_cached(self, stats):
        assert stats.cached_blocks == 0

    def compare_moves(self, moved, stats):
        moves, moved_tokens = stats.moves - self.seen.moves, stats.moved_tokens - self.seen.moved_tokens
        size = self.model.block_size
        least = sum(min(size, self.tokens[request_id] - index * size) for request_id, index in moved)
        sequences = len({request_id for request_id, _ in moved})
        if self.exact_moves:
            assert moved_tokens == least and (moves >= sequences if self.model.bound else moves == sequences)
            assert stats.longest_pause_tokens >= moved_tokens
        else:
            assert moves >= sequences and moved_tokens >= least
        assert stats.moved_bytes == stats.moved_tokens * self.spec.bytes_per_token
        assert self.may_move is None or moved_tokens <= self.may_move
        self.exact_moves, self.may_move = True, self.model.bound
        self.seen = stats
        self.tokens = {request_id: sequence.tokens for request_id, sequence in self.model.sequences.items()}

    def compare_sequence(self, request_id, sequence):
        cache, size = self.cache, self.model.block_size
        assert request_id in cache
        assert cache.used_tokens(request_id) == sequence.tokens
        assert cache.limit(request_id) == sequence.limit
        assert cache.capacity(request_id) == len(sequence.blocks) * size
        assert cache.token_offset_in_block(request_id) == sequence.tokens % size
        assert cache.is_contiguous(request_id) is self.is_one_run(sequence)

    def is_one_run(self, sequence):
        places = [block.place for block in sequence.blocks]
        return all(after == before + 1 for before, after in pairwise(places))

    def compare_contents(self):
        for request_id, sequence in self.model.sequences.items():
            for layer in range(len(self.layers)):
                views = self.cache.get_views(request_id, layer)
                assert len(views) == len(self.layers[layer].planes)
                for index, view in enumerate(views):
                    self.compare_view(request_id, sequence, layer, index, view)

    def compare_view(self, request_id, sequence, layer, index, view):
        plane = self.layers[layer].planes[index]
        assert view.shape == (plane.heads, sequence.tokens, plane.width)
        assert str(view.dtype).removeprefix("mlx.core.") == plane.dtype
        if self.backend == "numpy" and sequence.blocks and self.is_one_run(sequence):
            assert view.flags.writeable is not any(self.model.is_shared(block) for block in sequence.blocks)
        rows = sequence.rows[layer]
        known = [position for position, row in enumerate(rows) if row is not None]
        if known:
            wanted = np.stack([rows[position][index] for position in known], axis=1)
            got = to_numpy(view)[:, known]
            if not np.array_equal(got, wanted):
                raise WrongContents(
                    f"{request_id!r}, layer {layer}, plane {plane.name}: {got} is not {wanted}"
                )

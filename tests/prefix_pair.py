"""Two caches with prefixes and their oracle, in step: one has a hash of two bits, and nothing else is different."""

import pytest
from model import GRANTED
from pair import Pair
from prefix_oracle import PrefixModel

from kvcache import KVCache

ANSWERS = (ValueError, KeyError, RuntimeError)


class PrefixPair(Pair):
    """A paged cache, its twin with the weak hash, and the oracle.

    Parameters
    ----------
    spec : KVCacheSpec
    overcommit : float
    bits : int
        Of the twin's hash.
    """

    def __init__(self, spec, overcommit=1.0, bits=2):
        super().__init__(spec, "paged", overcommit=overcommit)
        self.cache.close()
        options = {"placement": "paged", "overcommit": overcommit}
        self.cache, self.twin = KVCache(spec, **options), KVCache(spec, **options)
        self.twin._weaken_hash(bits)
        self.model = PrefixModel(spec.num_blocks, spec.block_size, "paged", overcommit, len(spec.layers))
        self.seen = self.cache.stats()

    def perform(self, action):
        """What the one answers or raises, the other does too."""
        answers = []
        for _ in range(2):
            try:
                answers.append(action())
            except ANSWERS as error:
                answers.append(error)
            self.cache, self.twin = self.twin, self.cache
        assert self.told(answers[0]) == self.told(answers[1])
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    def told(self, answer):
        if isinstance(answer, Exception):
            return type(answer), str(answer)
        if hasattr(answer, "cached_tokens"):
            return answer.request_id, answer.tokens, answer.max_tokens, answer.cached_tokens
        return answer.tolist() if hasattr(answer, "tolist") else answer

    # ---- calls

    def allocate(self, request_id, prompt, salt=None, **limits):
        """`prompt` is a count, or ids."""
        found = 0 if isinstance(prompt, int) else self.model.probe(prompt, salt)
        self.probe(prompt, salt)
        verdict = self.model.allocate(request_id, prompt, salt, **limits)
        grant = self.carry_out(
            verdict, lambda: self.cache.allocate_for(request_id, prompt, salt=salt, **limits), None
        )
        if grant is not None:
            sequence = self.model.sequences[request_id]
            told = (grant.request_id, grant.tokens, grant.max_tokens, grant.cached_tokens)
            assert told == (request_id, sequence.tokens, sequence.limit, found)
        return verdict

    def probe(self, prompt, salt=None):
        found = 0 if isinstance(prompt, int) else self.model.probe(prompt, salt)
        tokens = prompt if isinstance(prompt, int) else len(prompt)
        if self.model.blocks_for(tokens) <= self.model.num_blocks:
            assert self.perform(lambda: self.cache.probe(prompt, salt=salt)) == found

    def append_ids(self, request_id, ids):
        verdict = self.model.append(request_id, len(ids), list(ids))
        self.carry_out(verdict, lambda: self.cache.append_tokens(request_id, ids), False)
        return verdict

    def set_tokens(self, request_id, ids, start=None):
        if self.model.set_tokens(request_id, list(ids), start):
            assert self.perform(lambda: self.cache.set_tokens(request_id, ids, start)) is None
        else:
            before = self.cache.stats()
            pytest.raises(ValueError, self.perform, lambda: self.cache.set_tokens(request_id, ids, start))
            assert self.cache.stats() == before

    def commit(self, request_id, tokens=None):
        self.model.commit(request_id, tokens)
        self.perform(lambda: self.cache.commit(request_id, tokens))

    def step(self, members, tokens, named, drop):
        """A decode step of a batch: an append, of ids or of counts that are named later, writes, a cut."""
        with self.model.rehearsal():
            verdicts = [self.model.append(member) for member in members]
        granted = []
        for member, token, verdict in zip(members, tokens, verdicts, strict=True):
            if verdict is GRANTED:
                assert self.model.append(member, 1, [token] if named == "at once" else None) is GRANTED
                granted.append((member, token))
        if named == "later":
            for member, token in granted:
                assert self.model.set_tokens(member, [token], self.model.sequences[member].tokens - 1) or (
                    len(self.model.names[member].known) < self.model.sequences[member].tokens
                )
        rows, writes = [], []
        for layer in range(len(self.layers) if granted else 0):
            self.version += 1
            each = [
                self.new_row(self.model.sequences[m].serial, self.model.sequences[m].tokens - 1, layer)
                for m, _ in granted
            ]
            rows.append(self.as_planes(each, axis=0))
            writes.append(
                [
                    (m, layer, self.model.sequences[m].tokens - 1, [row])
                    for (m, _), row in zip(granted, each, strict=True)
                ]
            )
        for entries in writes:
            assert self.model.write_many(entries) is GRANTED
        cuts = [
            self.model.truncate(member, self.model.sequences[member].tokens - 1) is GRANTED
            for member in (members if drop and all(self.model.sequences[m].tokens for m in members) else ())
        ]

        def steps():
            batch = self.cache.batch(members)
            answers = [batch.append(tokens if named == "at once" else None).tolist()]
            if named == "later":
                batch.set_tokens(tokens)
            for layer, planes in enumerate(rows):
                batch.write(layer, *planes)
            return [*answers, batch.truncate(1).tolist() if cuts else []]

        assert self.perform(steps) == [[verdict is GRANTED for verdict in verdicts], cuts]

    # ---- comparing

    def compare(self):
        super().compare()
        self.twin.check()
        assert self.twin.stats() == self.cache.stats()
        for request_id in self.cache:
            tables = [cache.block_table(request_id).tolist() for cache in (self.cache, self.twin)]
            assert tables[0] == tables[1]

    def compare_cached(self, stats):
        model = self.model
        assert stats.cached_blocks == len(model.cached)
        assert (stats.queries, stats.query_tokens) == (model.queries, model.query_tokens)
        assert stats.hit_tokens == model.hit_tokens
        assert (stats.evictions_room, stats.evictions_duplicate) == (model.evicted, model.doubles)
        assert stats.evicted_blocks == model.evicted
        for salt, tokens in model.prompts():
            self.probe([*tokens, 2], salt)
        assert stats.moves == stats.revived_tokens == stats.moved_cached_tokens == 0

"""The oracle keeps its own word: what the contract promises follows from what it computes."""

import random

import pytest
from model import GRANTED, REFUSED, Model


def give_places(model):
    """Stands in for a cache that slides every run to the left, or in paged placement takes vacant blocks."""
    if model.paged:
        vacant = [place for place in range(model.num_blocks) if place not in model.taken_places()]
        for block in sorted(model.held_by(model.sequences), key=id):
            block.place = vacant.pop() if block.place is None else block.place
    else:
        vacant = [place for place in range(model.num_blocks) if place not in {b.place for b in model.limbo}]
        for sequence in model.sequences.values():
            for block in sequence.blocks:
                block.place = vacant.pop(0)
    model.settle(
        {request_id: [block.place for block in s.blocks] for request_id, s in model.sequences.items()}
    )


def random_step(model, rng):
    live = list(model.sequences)
    request_id = rng.choice(live) if live else None
    action = rng.choice(
        ["allocate", "allocate", "append", "append", "fork", "truncate", "limit", "free", "write"]
    )
    if action == "allocate" or request_id is None:
        prompt = rng.randint(1, 12)
        return model.allocate(model.serial, prompt, prompt + rng.randint(0, 12))
    sequence = model.sequences[request_id]
    if action == "append":
        return model.append(request_id, rng.randint(0, max(0, sequence.limit - sequence.tokens)))
    if action == "fork":
        return model.fork(request_id, ("child", model.serial))
    if action == "truncate":
        return model.truncate(request_id, rng.randint(0, sequence.tokens))
    if action == "limit":
        return model.set_limit(request_id, rng.randint(sequence.tokens, 40))
    if action == "free":
        return model.free(request_id)
    start = rng.randint(0, sequence.tokens)
    return model.write(request_id, 0, [("row",)] * (sequence.tokens - start), start)


@pytest.mark.parametrize("overcommit", [1.0, 1.5, float("inf")])
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("seed", range(6))
def test_no_walk_ever_breaks_the_sum_of_what_is_held_and_claimed(placement, overcommit, seed):
    model, rng = Model(10, 3, placement, overcommit), random.Random(seed)
    for _ in range(150):
        random_step(model, rng)
        give_places(model)
        assert model.used_blocks + model.claimed_blocks <= overcommit * model.num_blocks
        assert 0 <= model.free_blocks <= model.num_blocks
        assert model.claimed_blocks >= 0


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("seed", range(6))
def test_without_overcommit_every_granted_limit_can_be_reached(placement, seed):
    model, rng = Model(10, 3, placement), random.Random(seed)
    for _ in range(150):
        random_step(model, rng)
        give_places(model)
        with model.rehearsal():
            waiting = list(model.sequences)
            rng.shuffle(waiting)
            for request_id in waiting:
                assert (
                    model.append(
                        request_id, model.sequences[request_id].limit - model.sequences[request_id].tokens
                    )
                    is GRANTED
                )


def test_a_fork_of_a_growable_partial_block_claims_one_copy():
    model = Model(4, 4, "paged")
    model.allocate("a", 6, 8)
    model.fork("a", "b")
    assert (model.used_blocks, model.claimed_blocks) == (2, 1)
    assert model.append("b", 1) is GRANTED
    assert (model.used_blocks, model.claimed_blocks) == (3, 0)


def test_a_fork_that_may_not_grow_claims_nothing():
    model = Model(2, 4, "paged")
    model.allocate("a", 6, 6)
    assert model.fork("a", "b") is GRANTED
    assert (model.used_blocks, model.claimed_blocks) == (2, 0)


def test_cutting_a_shared_block_needs_a_claim():
    model = Model(2, 4, "paged")
    model.allocate("a", 8, 8)
    model.fork("a", "b")
    assert model.truncate("b", 6) is REFUSED
    assert model.truncate("b", 4) is REFUSED
    model.free("a")
    assert model.truncate("b", 4) is GRANTED

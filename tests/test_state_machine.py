"""Random walks over a cache: whatever is called in whatever order, it never leaves the oracle."""

import importlib.util

import pytest
from conftest import DEPTH
from hypothesis.stateful import run_state_machine_as_test
from walk import FLOATS, crowded_walk, machine

BACKENDS = ["numpy", "none"] + (["mlx"] if importlib.util.find_spec("mlx") else [])
ON_EACH = pytest.mark.parametrize("backend", BACKENDS)
BOUNDS = (0, 1, 4, 10, 30)  # tokens that one call may move
BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


@BOTH
@ON_EACH
def test_no_walk_leaves_the_oracle(placement, backend):
    run_state_machine_as_test(machine(placement, backend, FLOATS))


@BOTH
@ON_EACH
@pytest.mark.parametrize("overcommit", [1.0, 1.5, float("inf")])
@pytest.mark.parametrize("seed", range(int(2 * DEPTH)))
def test_no_long_walk_through_a_crowded_pool_leaves_the_oracle(placement, backend, overcommit, seed):
    walk = machine(placement, backend, FLOATS)()
    crowded_walk(walk, seed, overcommit)
    assert walk.model.peak_used_blocks == walk.model.num_blocks


@ON_EACH
def test_no_walk_under_a_bound_on_moves_leaves_the_oracle(backend):
    run_state_machine_as_test(machine("contiguous", backend, FLOATS, BOUNDS))


@ON_EACH
@pytest.mark.parametrize("seed", range(int(5 * DEPTH)))
def test_no_long_walk_through_a_crowded_pool_under_a_bound_leaves_the_oracle(backend, seed):
    walk = machine("contiguous", backend, FLOATS, BOUNDS)()
    crowded_walk(walk, seed)
    assert walk.model.peak_used_blocks == walk.model.num_blocks

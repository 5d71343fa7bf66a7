"""Trees of those who wait, against sorted lists."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError
from kvcache.btree import WIDTH, Counts, Needs

SEEDS = st.integers(0, 2**32)


@given(seed=SEEDS, most=st.sampled_from([5, WIDTH, 5 * WIDTH, 40 * WIDTH]))
def test_whoever_fits_is_found_in_order(seed, most):
    chance, tree, there = random.Random(seed), Needs(), {}
    for step in range(4 * most):
        key = chance.randrange(most), chance.randrange(3)
        if there.pop(key, None):
            tree.take(key)
        elif step < 2 * most or chance.random() < 0.2:
            there[key] = chance.randrange(1, 99), chance.randrange(1, 99)
            tree.put(key, ("thing", key), *there[key])
    tree.check()
    assert list(tree) == [(key, ("thing", key)) for key in sorted(there)]
    for total, first in ((3, 99), (99, 3), (10, 10), (50, 50), (100, 100)):
        fitting = [
            ("thing", key) for key, needs in sorted(there.items()) if needs[0] <= total and needs[1] <= first
        ]
        assert list(tree.fitting(total, first)) == fitting
    if there:
        assert tree.least() == tuple(min(needs) for needs in zip(*there.values(), strict=True))


@given(seed=SEEDS, most=st.sampled_from([5, WIDTH, 5 * WIDTH, 20 * WIDTH]))
def test_counts_are_raised_for_those_before(seed, most):
    chance, tree, there = random.Random(seed), Counts(), {}
    for _ in range(4 * most):
        key = chance.randrange(2 * most)
        if chance.random() < 0.4:
            tree.raise_before(key)
            there = {each: count + (each < key) for each, count in there.items()}
        elif there.pop(key, None) is not None:
            tree.take(key)
        else:
            there[key] = 0
            tree.add(key, f"thing {key}")
    tree.check()
    assert tree.most() == max(there.values(), default=-1)
    for least in range(tree.most() + 1):
        found = min(key for key, count in there.items() if count >= least)
        assert tree.first_with(least) == f"thing {found}"
    if there:
        assert tree.first() == f"thing {min(there)}"


@pytest.mark.parametrize("kind", [Needs, Counts])
def test_a_tree_that_has_been_emptied_is_as_new(kind):
    tree = kind()
    for _ in range(2):
        for key in range(WIDTH**2):
            tree.put(key, key, 0, 0)
        assert not tree.is_leaf
        for key in range(WIDTH**2):
            tree.take(key)
        assert (bool(tree), tree.is_leaf, list(tree)) == (False, True, [])


def test_what_is_not_there_is_not_taken():
    tree = Needs()
    for key in range(0, 200, 2):
        tree.put(key, key, 1, 1)
    for key in (-1, 7, 201):
        with pytest.raises(KeyError):
            tree.take(key)
    tree.check()
    assert len(list(tree)) == 100


def test_check_names_a_node_that_says_something_else_of_a_part():
    tree = Needs()
    for key in range(100):
        tree.put(key, key, 5, 5)
    tree.totals[1] = 4
    with pytest.raises(KVCacheError, match=r"node of .* from \[0\] says .* of a part from"):
        tree.check()

"""Labels of axes: whatever stays, equations between them hold; and nothing is tied needlessly."""

import itertools

import numpy as np
import pytest

from jaxcompress.tracing.positions._atoms import Atoms
from jaxcompress.tracing.positions._labels import join, merge, split, unify, whole


def masks(atoms, labels, rng):
    """Which positions of each label stay, for a random choice of atoms."""
    stays = rng.random(atoms.count) < 0.7
    return [stays[atoms.resolve(x)].all(1) | (atoms.resolve(x) == 0).all(1) for x in labels]


def possible(atoms, label):
    """All sets of positions that can stay, by brute force over the atoms that are left."""
    rows = atoms.resolve(label)
    free = [a for a in np.unique(rows).tolist() if a]
    found = set()
    for choice in itertools.product((False, True), repeat=len(free)):
        stays = np.ones(atoms.count, bool)
        stays[free] = choice
        found.add(tuple(stays[rows].all(1).tolist()))
    return found


def products(*dims):
    """All sets of positions of a merged axis that are products of sets, by brute force."""
    sides = [list(itertools.product((False, True), repeat=n)) for n in dims]
    found = set()
    for chosen in itertools.product(*sides):
        mask = np.ones(dims, bool)
        for d, side in enumerate(chosen):
            shape = [1] * len(dims)
            shape[d] = dims[d]
            mask &= np.reshape(side, shape)
        found.add(tuple(mask.reshape(-1).tolist()))
    return found


def test_a_split_axis_can_lose_products_and_nothing_else():
    atoms = Atoms()
    axis = atoms.fresh(6)
    heads, features = split(atoms, axis, (2, 3), "test")
    assert possible(atoms, axis) == products(2, 3)
    assert possible(atoms, heads) == set(itertools.product((False, True), repeat=2))
    rng = np.random.default_rng(0)
    for _ in range(20):
        one, h, d = masks(atoms, [axis, heads, features], rng)
        assert np.array_equal(one, np.outer(h, d).reshape(-1))


def test_heads_in_groups_that_share_keys():
    atoms = Atoms()
    queries, keys = atoms.fresh(24), atoms.fresh(8)
    (heads, features), (groups, others) = (
        split(atoms, x, dims, "test") for x, dims in ((queries, (6, 4)), (keys, (2, 4)))
    )
    repeated = merge([groups, atoms.fresh(3)])
    unify(atoms, heads, repeated, "test")
    unify(atoms, features, others, "test")
    # Groups, queries of a group, features: eight of them would be more than what is allowed.
    assert possible(atoms, queries) == products(2, 3, 4)
    assert possible(atoms, keys) == products(2, 4)


def test_two_ways_to_split_have_the_finest_common_one():
    atoms = Atoms()
    a, b = merge([atoms.fresh(4), atoms.fresh(6)]), merge([atoms.fresh(8), atoms.fresh(3)])
    unify(atoms, a, b, "test")
    assert possible(atoms, a) == products(4, 2, 3) == possible(atoms, b)


def test_two_ways_to_split_that_do_not_fit_leave_what_they_have_in_common():
    """4 of 6 and 3 of 8: every other position of both."""
    atoms = Atoms()
    a, b = merge([atoms.fresh(4), atoms.fresh(6)]), merge([atoms.fresh(3), atoms.fresh(8)])
    unify(atoms, a, b, "test")
    pairs = itertools.product((False, True), repeat=2)
    assert possible(atoms, a) == {pair * 12 for pair in pairs} == possible(atoms, b)


def test_groups_of_an_axis_that_was_joined():
    """Features in 8 groups of 2, the second half of which are in 4 groups of 2 already."""
    atoms = Atoms()
    first, second = atoms.fresh(8), merge([atoms.fresh(4), atoms.fresh(2)])
    groups, within = split(atoms, join([first, second]), (8, 2), "test")
    assert possible(atoms, groups) == set(itertools.product((False, True), repeat=8))
    assert possible(atoms, second) == products(4, 2) == possible(atoms, first)
    assert np.array_equal(atoms.resolve(within), atoms.resolve(second[:2])[:, 1:])


def test_a_merged_axis_that_meets_a_single_one_defines_it():
    atoms = Atoms()
    single = atoms.fresh(6)
    merged = merge([atoms.fresh(3), atoms.fresh(2)])
    unify(atoms, single, merged, "test")
    assert possible(atoms, single) == products(3, 2)


def test_what_meets_a_frozen_axis_is_frozen_for_its_reason():
    atoms = Atoms()
    fixed, axis, later = atoms.fresh(6), atoms.fresh(6), atoms.fresh(6)
    heads, _ = split(atoms, axis, (2, 3), "test")
    atoms.freeze(fixed, "it is a result")
    unify(atoms, axis, fixed, "an addition")
    unify(atoms, later, axis, "another")
    assert atoms.reasons(later) == ["it is a result"] * 6
    assert atoms.reasons(heads) == ["it is a result"] * 2


def test_parts_of_an_axis_are_apart_from_each_other():
    atoms = Atoms()
    a, b = atoms.fresh(2), atoms.fresh(3)
    both = join([a, b, whole(1)])
    unify(atoms, both[:2], b[1:], "test")
    # a0 = b1 and a1 = b2; b0 is free.
    expected = {(x, y, z, x, y, True) for x, y, z in itertools.product((False, True), repeat=3)}
    assert possible(atoms, both) == expected


def test_pairs_of_rotary_embeddings():
    atoms = Atoms()
    features = atoms.fresh(6)
    unify(atoms, features, join([features[3:], features[:3]]), "test")
    assert possible(atoms, features) == {
        (*half, *half) for half in itertools.product((False, True), repeat=3)
    }


def test_an_irregular_split_ties_what_it_has_to():
    atoms = Atoms()
    axis = atoms.fresh(4)
    unify(atoms, axis[:1], axis[3:], "test")
    split(atoms, axis, (2, 2), "an odd reshape")
    assert possible(atoms, axis) == {(True,) * 4, (False,) * 4}


@pytest.mark.parametrize("seed", range(12))
def test_whatever_stays_equations_hold(seed):
    """Random axes, merged, split, cut and made equal: the equations hold for every choice."""
    rng = np.random.default_rng(seed)
    atoms, labels, equations = Atoms(), [], []
    for _ in range(3):
        labels += [atoms.fresh(12), merge([atoms.fresh(n) for n in rng.permutation([2, 3, 2])])]
    for _ in range(8):
        a, b = (labels[i] for i in rng.integers(len(labels), size=2))
        kind = rng.integers(4)
        if kind == 0:
            unify(atoms, a, b, "test")
            equations.append((a, b))
        elif kind == 1:
            parts = split(atoms, a, [(4, 3), (2, 6), (3, 2, 2)][rng.integers(3)], "test")
            equations.append((a, merge(parts)))
        elif kind == 2:
            labels.append(a[rng.permutation(12)])
        else:
            labels.append(join([a[6:], b[:6]]))
    for _ in range(10):
        stays = rng.random(atoms.count) < 0.7
        stays[0] = True
        for a, b in equations:
            one, other = (stays[atoms.resolve(x)].all(1) for x in (a, b))
            assert np.array_equal(one, other)

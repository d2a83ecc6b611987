"""Budgets against RigL's published numbers and its iteration in NumPy; exact totals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import _counts
from tests.conftest import counting_jit

SHAPES = {"a": (3, 3, 1, 8), "b": (3, 3, 8, 16), "c": (64, 10), "d": (10,), "e": ()}
MANY = {f"{i:02d}": (3 + i, 7 + 3 * i) for i in range(12)}


def resnet50():
    """Kernels of ResNet-50 in Flax's layout, each with the side of its output (input 224)."""
    kernels = {"conv1": ((7, 7, 3, 64), 112)}
    inputs, size = 64, 56
    for stage, (width, number) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for i in range(number):
            out = size // 2 if stage and i == 0 else size
            name = f"stage{stage}/block{i}"
            kernels[f"{name}/conv1"] = ((1, 1, inputs, width), size)
            kernels[f"{name}/conv2"] = ((3, 3, width, width), out)
            kernels[f"{name}/conv3"] = ((1, 1, width, 4 * width), out)
            if i == 0:
                kernels[f"{name}/shortcut"] = ((1, 1, inputs, 4 * width), out)
            inputs, size = 4 * width, out
    return kernels | {"head": ((2048, 1000), 1)}


def sizes_of(shapes):
    return {path: math.prod(shape) for path, shape in shapes.items()}


def densities(budget, shapes, density, sizes=None):
    found = budget.densities(shapes, sizes or sizes_of(shapes), jnp.float32(density))
    assert list(found) == list(shapes)
    return {path: float(d) for path, d in found.items()}


def counts(budget, shapes, sparsity):
    total = _counts.kept_count(jnp.float32(sparsity), sum(sizes_of(shapes).values()))
    found = _counts.kept_counts(budget, shapes, sizes_of(shapes), jnp.float32(sparsity), total)
    return {path: int(n) for path, n in found.items()}, int(total)


def iterated(raw, sizes, density):
    """RigL's way: leaves whose probability exceeds one become dense, and again."""
    dense = set()
    while True:
        rest = [p for p in raw if p not in dense]
        full = sum(sizes[p] for p in dense)
        divisor = sum(sizes[p] * raw[p] for p in rest)
        epsilon = (density * sum(sizes.values()) - full) / divisor if rest else 0.0
        over = [p for p in rest if epsilon * raw[p] > 1 + 1e-12]
        if not over:
            return {p: 1.0 if p in dense else epsilon * raw[p] for p in raw}
        dense.add(max(over, key=lambda p: raw[p]))


def erk(shape):
    return sum(shape) / math.prod(shape)


@pytest.mark.parametrize(
    ("sparsity", "megabytes", "operations"),
    [(0.8, 23.683, 0.4138), (0.9, 13.499, 0.2418), (0.95, 8.399, 0.1217)],
)
def test_erk_gives_the_published_sizes_of_resnet_50(sparsity, megabytes, operations):
    kernels = resnet50()
    shapes = {path: shape for path, (shape, _) in kernels.items()}
    sizes = sizes_of(shapes)
    assert len(kernels) == 54
    found = densities(jc.pruning.erdos_renyi(), shapes, 1 - sparsity)
    # Four bytes a weight, a bit for each place of a leaf with a mask, four for each bias.
    weights = sum(4 * found[p] * n + (found[p] < 1) * n / 8 for p, n in sizes.items())
    assert (weights + 4 * 27_560) / 1e6 == pytest.approx(megabytes, abs=1e-3)
    macs = {p: sizes[p] * side**2 for p, (_, side) in kernels.items()}
    kept = sum(found[p] * n for p, n in macs.items()) / sum(macs.values())
    assert kept == pytest.approx(operations, abs=1e-4)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_erk_is_rigls_iteration(shapes, density):
    raw = {p: erk(s) if s else 1.0 for p, s in shapes.items()}
    want = iterated(raw, sizes_of(shapes), density)
    found = densities(jc.pruning.erdos_renyi(), shapes, density)
    for path in shapes:
        assert found[path] == pytest.approx(want[path], rel=1e-4)


def test_plain_erdos_renyi_counts_inputs_and_outputs_alone():
    shapes = {"conv": (5, 5, 8, 16), "dense": (64, 32)}
    found = densities(jc.pruning.erdos_renyi(kernel=False), shapes, 0.1)
    assert found["conv"] / found["dense"] == pytest.approx((24 / 128) / (96 / 2048), rel=1e-5)


@pytest.mark.parametrize(
    "budget",
    [
        jc.pruning.uniform(),
        jc.pruning.uniform(dense=("a", "d")),
        jc.pruning.erdos_renyi(),
        jc.pruning.erdos_renyi(dense=("d",)),
        jc.pruning.balanced(jc.pruning.uniform(), jc.pruning.erdos_renyi(), 0.4),
        jc.pruning.floored(jc.pruning.erdos_renyi(), 0.3),
    ],
    ids=["uniform", "dense", "erk", "erk_dense", "balanced", "floored"],
)
def test_the_total_is_exact(budget):
    for sparsity in (0.0, 0.123, 0.5, 0.61, 0.7):
        found, total = counts(budget, SHAPES, sparsity)
        assert sum(found.values()) == total
        whole = sum(sizes_of(SHAPES).values())
        assert total == whole - round(float(np.float32(sparsity)) * whole)
        want = densities(budget, SHAPES, 1 - np.float32(sparsity))
        for path, size in sizes_of(SHAPES).items():
            assert 0 <= found[path] <= size
            assert abs(found[path] - want[path] * size) <= 1.01


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(0, 1, width=32), st.sampled_from(["uniform", "erk", "floored"]))
def test_totals_of_millions_are_exact(sparsity, name):
    shapes = {path: shape for path, (shape, _) in resnet50().items()}
    shapes |= {"embedding": (50_001, 4_099)}
    budget = {
        "uniform": jc.pruning.uniform(),
        "erk": jc.pruning.erdos_renyi(),
        "floored": jc.pruning.floored(jc.pruning.erdos_renyi(), 0.01),
    }[name]
    found, total = counts(budget, shapes, sparsity)
    assert sum(found.values()) == total
    assert all(0 <= found[p] <= n for p, n in sizes_of(shapes).items())


def test_no_leaf_with_a_share_is_lost_to_rounding():
    shapes = {"big": (64, 64), "small": (8, 4), "none": (0, 4)}
    for budget in (
        jc.pruning.uniform(),
        jc.pruning.erdos_renyi(),
        jc.pruning.floored(jc.pruning.uniform(), 0.001),
    ):
        for sparsity in (0.9, 0.99, 0.999):
            found, total = counts(budget, shapes, sparsity)
            assert sum(found.values()) == total
            assert found["small"] >= 1
            assert found["none"] == 0
        found, total = counts(budget, shapes, 1 - 1 / 4128)
        assert sum(found.values()) == total == 1


def test_the_ends():
    for budget in (jc.pruning.uniform(), jc.pruning.erdos_renyi()):
        assert counts(budget, MANY, 0.0)[0] == sizes_of(MANY)
        assert set(counts(budget, MANY, 1.0)[0].values()) == {0}
        assert counts(budget, {"none": (0, 4), "one": (1, 1)}, 0.0)[0] == {"none": 0, "one": 1}


def test_sparsity_is_traced_and_vmap_equals_a_loop():
    budget = jc.pruning.floored(
        jc.pruning.balanced(jc.pruning.erdos_renyi(), jc.pruning.uniform(), 0.3), 0.02
    )
    sizes = sizes_of(MANY)
    total = sum(sizes.values())

    @counting_jit
    def one(s):
        return _counts.kept_counts(budget, MANY, sizes, s, _counts.kept_count(s, total))

    grid = jnp.linspace(0.0, 1.0, 9)
    mapped = jax.vmap(one)(grid)
    for i, s in enumerate(grid):
        got = {path: int(n[i]) for path, n in mapped.items()}
        assert got == {path: int(n) for path, n in one(s).items()}
    assert one.traces == 1


def test_numbers_of_mixtures_are_traced():
    def kept(weight, floor, share):
        budget = jc.pruning.balanced(
            jc.pruning.erdos_renyi(), jc.pruning.per_path({"a": share}), weight
        )
        return jc.pruning.floored(budget, floor).densities(
            SHAPES, sizes_of(SHAPES), jnp.float32(0.2)
        )

    args = [jnp.linspace(0, 1, 4), jnp.linspace(0, 0.3, 4), jnp.linspace(0.1, 0.9, 4)]
    mapped = jax.jit(jax.vmap(kept))(*args)
    for i in range(4):
        one = kept(*(float(a[i]) for a in args))
        for path in SHAPES:
            assert float(mapped[path][i]) == pytest.approx(float(one[path]), abs=1e-6)


def test_balanced_ends_are_its_members():
    erk_, flat = jc.pruning.erdos_renyi(), jc.pruning.uniform()
    for weight, member in ((0, erk_), (1, flat)):
        mixed = densities(jc.pruning.balanced(erk_, flat, weight), MANY, 0.2)
        assert mixed == pytest.approx(densities(member, MANY, 0.2), abs=1e-6)


def water_filled(d, n, floor):
    """Bisection in float64 for the scale of what lies above the floor."""
    total, low, high = sum(d * n), 0.0, 1.0
    floor = min(floor, total / sum(n))
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sum(np.maximum(floor, middle * d) * n) < total else (low, middle)
        )
    return np.maximum(floor, low * d)


@pytest.mark.parametrize("floor", [0.0, 0.02, 0.1, 0.19, 0.5])
def test_floors_are_water_filling(floor):
    base = densities(jc.pruning.erdos_renyi(), MANY, 0.2)
    found = densities(jc.pruning.floored(jc.pruning.erdos_renyi(), floor), MANY, 0.2)
    n = np.array(list(sizes_of(MANY).values()), float)
    want = water_filled(np.array(list(base.values())), n, floor)
    np.testing.assert_allclose(list(found.values()), want, rtol=1e-4)
    assert min(found.values()) >= min(floor, 0.2) - 1e-6


def test_explicit_sparsities_and_what_is_left():
    found = densities(jc.pruning.per_path({"a": 0.5, "[ab]": 0.9}), SHAPES, 0.2)
    n = sizes_of(SHAPES)
    assert found["a"] == 0.5
    assert found["b"] == pytest.approx(0.1)
    rest = (0.2 * sum(n.values()) - 0.5 * n["a"] - 0.1 * n["b"]) / (n["c"] + n["d"] + n["e"])
    assert found["c"] == found["d"] == found["e"] == pytest.approx(rest, rel=1e-5)
    kept, total = counts(jc.pruning.per_path({"a": 0.5, "[ab]": 0.9}), SHAPES, 0.8)
    assert kept["a"] == n["a"] // 2
    assert kept["b"] == round(0.1 * n["b"])
    assert abs(sum(kept.values()) - total) <= 2
    crowded, _ = counts(jc.pruning.per_path({"a": 0.5, "[ab]": 0.9}), SHAPES, 0.1)
    assert crowded == n | {"a": n["a"] // 2, "b": round(0.1 * n["b"])}
    fixed = densities(jc.pruning.per_path({"a": 0.5}, default=0.25), SHAPES, 0.01)
    assert fixed == pytest.approx(dict.fromkeys(SHAPES, 0.75) | {"a": 0.5})


def test_costs_meet_a_fraction_of_the_operations():
    kernels = resnet50()
    shapes = {path: shape for path, (shape, _) in kernels.items()}
    costs = {path: side**2 for path, (_, side) in kernels.items()}
    found, _ = counts(jc.pruning.cost_weighted(costs), shapes, 0.7)
    paid = sum(found[p] * costs[p] for p in shapes)
    whole = sum(n * costs[p] for p, n in sizes_of(shapes).items())
    assert paid / whole == pytest.approx(0.3, rel=1e-4)
    dense = densities(jc.pruning.cost_weighted(costs), shapes, 0.3)
    partial = {p: d * costs[p] for p, d in dense.items() if d < 1}
    assert max(partial.values()) == pytest.approx(min(partial.values()), rel=1e-5)
    assert dense["head"] == 1


def test_prune_follows_its_budget_leaf_by_leaf():
    rng = np.random.default_rng(0)
    params = {p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in MANY.items()}
    budget = jc.pruning.erdos_renyi()
    find = jax.jit(lambda sparsity: jc.prune(sparsity, budget=budget).find(params))
    for sparsity in (0.5, 0.9):
        want, total = counts(budget, MANY, sparsity)
        masks = find(sparsity)
        for path, mask in masks.items():
            order = np.sort(np.abs(params[path]).ravel())[::-1]
            keep = np.abs(params[path]) >= order[want[path] - 1]
            np.testing.assert_array_equal(mask.keep, keep)
        assert sum(int(m.keep.sum()) for m in masks.values()) == total


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jc.pruning.balanced(jc.pruning.uniform(), jc.pruning.uniform(), 2), "`weight`"),
        (lambda: jc.pruning.floored(jc.pruning.uniform(), -0.1), "`floor`"),
        (lambda: jc.pruning.per_path({"a": 1.5}), "sparsities"),
        (lambda: jc.pruning.per_path({}, default=-1), "`default`"),
        (lambda: jc.pruning.cost_weighted({"a": 0.0}), "above zero, got 0.0 at 'a'"),
        (lambda: counts(jc.pruning.cost_weighted({"a": 1.0}), SHAPES, 0.5), "at 'b'"),
        (lambda: counts(jc.pruning.erdos_renyi(dense=("z*",)), SHAPES, 0.5), "match at least one"),
        (lambda: counts(jc.pruning.per_path({"z": 0.5}), SHAPES, 0.5), "match at least one"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()

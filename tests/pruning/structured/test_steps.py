"""Steps: fractions, removals of removals, totals of the original sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._budget import (
    UnitBudget,
    flop_budget,
    kept_shapes,
    parameter_budget,
)
from jaxcompress.pruning.structured._restrict import composed, remaining
from jaxcompress.pruning.structured._select import select
from jaxcompress.pruning.structured._steps import Shrunk, shrink_in_steps, steps
from jaxcompress.pruning.structured._unit_scores import random_units, unit_scores
from tests.pruning.structured.unit_cases import (
    CASES,
    by_path,
    cut,
    depend,
    group,
    mlp,
    mlp_case,
    shrink,
)

exhaustive = settings(max_examples=40, deadline=None, derandomize=True)


@exhaustive
@given(st.floats(0, 1), st.integers(1, 20), st.sampled_from(["linear", "geometric", "cubic"]))
def test_steps_fall_to_what_was_asked_for(keep, number, spacing):
    found = steps(keep, number, spacing=spacing)
    assert len(found) == number
    assert found[-1] == keep
    assert all(0 <= k <= 1 for k in found)
    assert all(a >= b - 1e-12 for a, b in zip((1.0, *found), found, strict=False))


def test_steps_by_hand():
    np.testing.assert_allclose(steps(0.4, 3), [0.8, 0.6, 0.4])
    np.testing.assert_allclose(steps(0.125, 3, spacing="geometric"), [0.5, 0.25, 0.125])
    np.testing.assert_allclose(steps(0.2, 2, spacing="cubic"), [1 - 0.8 * 0.875, 0.2])
    cubic = jc.schedules.cubic(0.0, 0.7, 0, 4)
    want = [1 - float(cubic(i)) for i in range(1, 5)]
    np.testing.assert_allclose(steps(0.3, 4, spacing="cubic"), want, rtol=1e-6)
    # `linear_scheduler(0.6, 3)` of Torch-Pruning: ratios 0.2, 0.4, 0.6.
    np.testing.assert_allclose([1 - k for k in steps(0.4, 3)], [0.2, 0.4, 0.6])
    with pytest.raises(ValueError, match="`spacing` must be one of"):
        steps(0.5, 2, spacing="square")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at least 1"):
        steps(0.5, 0)


@pytest.mark.parametrize("case", CASES)
def test_two_removals_are_one(case):
    params, deps = CASES[case]()
    first = select(deps, params, keep=0.8, overlap="both")
    small, left = cut(params, first), remaining(first)
    assert {path: x.shape for path, x in left.shapes.items()} == {
        path: x.shape for path, x in by_path(small).items()
    }
    second = select(left, small, keep=0.6, overlap="both")
    total = composed(first, second)
    want = by_path(cut(small, second))
    for path, x in by_path(cut(params, total)).items():
        np.testing.assert_array_equal(x, want[path])
    assert kept_shapes(total) == kept_shapes(second)
    # Nothing removed changes nothing.
    same = remaining(Keep(deps, {}))
    for a, b in zip(same.groups, deps.groups, strict=True):
        assert (a.name, a.size, a.layers) == (b.name, b.size, b.layers)
        for x, y in zip(a.members, b.members, strict=True):
            np.testing.assert_array_equal(x.units, y.units)


def test_scores_of_what_is_left_are_those_of_the_units_that_stay():
    params, deps = CASES["flat"]()
    scores = {k: np.asarray(v) for k, v in unit_scores(deps, params).items()}
    keep = select(deps, params, keep=0.7)
    found = unit_scores(remaining(keep), cut(params, keep))
    for name, one in found.items():
        np.testing.assert_allclose(one, scores[name][keep.masks[name]], rtol=1e-6)


def test_layers_that_can_have_no_common_order_are_refused():
    units = [2, 0, 1]
    deps = depend({"w": jnp.ones((2, 3))}, group("w[1]", 3, ("w", 1, units), layers=(2,)))
    fine = Keep(deps, {"w[1]": np.array([[True, False, True]] * 2)})
    np.testing.assert_array_equal(remaining(fine).groups[0].members[0].units, [1, 0])
    mixed = Keep(deps, {"w[1]": np.array([[False, True, True], [True, True, False]])})
    with pytest.raises(ValueError, match=r"one order in all layers.*'w'"):
        remaining(mixed)


def test_removals_that_do_not_fit_are_refused():
    params, deps = mlp_case()
    first = select(deps, params, keep=0.5)
    with pytest.raises(ValueError, match=r"`second` must have 5 units.*a/kernel"):
        composed(first, select(deps, params, keep=0.5))


def trainer(log):
    def train(fn, params):
        log.append(jax.tree.map(np.shape, params))
        assert fn(params, jnp.ones((2, 8))).shape == (2, 3)
        return jax.tree.map(lambda x: 0.9 * x, params)

    return train


@pytest.mark.parametrize("spacing", ["linear", "geometric", "cubic"])
def test_totals_are_of_the_original_sizes(spacing):
    params, deps = mlp_case(first=10, second=7)
    log = []
    found = shrink_in_steps(
        mlp,
        params,
        jnp.ones((2, 8)),
        keep=0.4,
        number=3,
        spacing=spacing,
        train=trainer(log),
        dependencies=deps,
        shrink=shrink,
    )
    assert isinstance(found, Shrunk)
    want = [[max(int(n * k + 1e-6), 1) for n in (10, 7)] for k in steps(0.4, 3, spacing=spacing)]
    assert [[shapes[n]["bias"][0] for n in "ab"] for shapes in log] == want
    # Trained three times, and exactly the units of the total are left.
    exact = cut(jax.tree.map(lambda x: 0.9 * 0.9 * 0.9 * x, params), found.keep)
    for path, x in by_path(found.params).items():
        np.testing.assert_allclose(x, by_path(exact)[path], rtol=1e-6)
    assert {n: m.sum() for n, m in found.keep.masks.items()} == dict(
        zip(found.keep.masks, want[-1], strict=True)
    )


def test_steps_towards_budgets_and_mappings():
    params, deps = mlp_case()
    whole = jc.tree.size(params)
    sizes = []
    options = {"dependencies": deps, "shrink": shrink, "number": 3}

    def train(fn, params):
        sizes.append(jc.tree.size(params))
        return params

    found = shrink_in_steps(
        mlp, params, jnp.ones((2, 8)), keep=parameter_budget(0.5), train=train, **options
    )
    for size, share in zip(sizes, steps(0.5, 3), strict=True):
        assert share * whole - 38 < size <= share * whole
    assert jc.tree.size(found.params) == sizes[-1]
    sizes.clear()
    shrink_in_steps(
        mlp, params, jnp.ones((2, 8)), keep=parameter_budget(100), train=train, **options
    )
    assert sizes[-1] <= 100
    assert sizes[0] <= whole - (whole - 100) / 3

    def heads_left(keep):
        assert keep.dependencies is deps
        return int(keep.masks.get("a/kernel[1]", np.ones(10)).sum())

    heads = UnitBudget(0.5, heads_left)
    found = shrink_in_steps(
        mlp, params, jnp.ones((2, 8)), keep=heads, train=train, where="a/bias", **options
    )
    assert found.keep.masks["a/kernel[1]"].sum() == 5
    found = shrink_in_steps(
        mlp, params, jnp.ones((2, 8)), keep={"c/kernel": 0.5}, train=train, **options
    )
    assert found.keep.masks["b/kernel[1]"].sum() == 3
    assert "a/kernel[1]" not in found.keep.masks


def test_scores_of_data_see_the_smaller_function():
    params, deps = mlp_case()
    seen = []

    def scores(left, fn, params):
        fn(params, jnp.ones((2, 8)))
        seen.append([g.size for g in left.groups])
        return random_units(left, jax.random.key(0))

    shrink_in_steps(
        mlp,
        params,
        jnp.ones((2, 8)),
        keep=0.5,
        number=2,
        train=lambda fn, p: p,
        scores=scores,
        scope="global",
        dependencies=deps,
        shrink=shrink,
    )
    assert seen[0] == [10, 6]
    assert sum(seen[1]) == 12


def test_training_has_to_keep_the_shapes():
    params, deps = mlp_case()
    options = {"keep": 0.5, "dependencies": deps, "shrink": shrink}
    with pytest.raises(TypeError, match="structure and shapes that it got"):
        shrink_in_steps(mlp, params, jnp.ones((2, 8)), train=lambda fn, p: params, **options)
    with pytest.raises(TypeError, match="structure and shapes that it got"):
        shrink_in_steps(mlp, params, jnp.ones((2, 8)), train=lambda fn, p: None, **options)
    with pytest.raises(TypeError, match="`train` must be a function"):
        shrink_in_steps(mlp, params, jnp.ones((2, 8)), train=3, **options)  # pyright: ignore


def test_the_real_ones_are_the_defaults():
    params, _ = mlp_case(first=8, second=6)
    x = jnp.ones((2, 8))
    found = shrink_in_steps(mlp, params, x, keep=0.5, number=2, train=lambda fn, p: p)
    assert found.params["b"]["kernel"].shape == (4, 3)
    masks = {name: np.float32(mask) for name, mask in found.keep.masks.items()}
    masked = {
        layer: {
            k: np.asarray(w) * masks.get(f"{layer}/kernel[1]", np.float32(1)) for k, w in w.items()
        }
        for layer, w in params.items()
    }
    np.testing.assert_allclose(found.fn(found.params, x), mlp(masked, x), rtol=1e-5, atol=1e-6)
    same = shrink_in_steps(mlp, params, x, keep=1.0, number=2, train=lambda fn, p: p)
    assert jax.tree.map(np.shape, same.params) == jax.tree.map(np.shape, params)
    np.testing.assert_array_equal(same.fn(same.params, x), mlp(params, x))


def test_operations_are_those_of_the_original_without_all_that_went():
    params, deps = mlp_case()
    x = jnp.ones((2, 8))
    budget = flop_budget(0.5, mlp, params, x, shrink=shrink)
    whole, seen = jc.cost(mlp, params, x).flops, []

    def train(fn, params):
        seen.append(jc.cost(fn, params, x).flops)
        return params

    options = {"dependencies": deps, "shrink": shrink, "number": 2, "keep": budget}
    shrink_in_steps(mlp, params, x, train=train, **options)
    assert 0.5 * whole < seen[0] <= 0.75 * whole
    assert 0.3 * whole < seen[1] <= 0.5 * whole

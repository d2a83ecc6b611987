"""Proximal operators against numerical minimisation in float64, and at their edges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import group_lasso, hard_threshold, n_of_m, soft_threshold
from tests.conftest import counting_jit

slices, blocks = jc.pruning.slices, jc.pruning.blocks
OPERATORS = {
    "soft": soft_threshold,
    "hard": hard_threshold,
    "group": group_lasso(slices(-1)),
    "group_plain": group_lasso(blocks(3, 2), by_size=False),
    "n_of_m": n_of_m(2, m=4),
}
operators = pytest.mark.parametrize("name", OPERATORS)
GRID = np.linspace(-4.0, 4.0, 16001)


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def smallest(cost, w, strength):
    """The minimiser over a grid of |v - w|^2 / 2 + strength * cost(v), for one number."""
    return GRID[np.argmin(0.5 * (GRID - w) ** 2 + strength * cost(GRID))]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(-3.0, 3.0), st.floats(0.0, 2.0))
def test_thresholds_minimise_on_a_grid(w, strength):
    w, strength = float(np.float32(w)), float(np.float32(strength))
    soft = float(soft_threshold(jnp.asarray(w, jnp.float32), strength))
    assert soft == pytest.approx(smallest(np.abs, w, strength), abs=6e-4)
    hard = float(hard_threshold(jnp.asarray(w, jnp.float32), strength))
    if abs(abs(w) - np.sqrt(2 * strength)) > 1e-2:  # at the edge both are minimisers
        count = lambda v: (np.abs(v) > 1e-9).astype(float)  # noqa: E731
        assert hard == pytest.approx(smallest(count, w, strength), abs=6e-4)


def groups_of(shape, block):
    starts = [range(0, n, b) for n, b in zip(shape, block, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple(slice(c, c + b) for c, b in zip(corner, block, strict=True))


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize(
    ("groups", "block"),
    [(slices(-1), (6, 1)), (slices(0), (1, 8)), (blocks(4, 3), (4, 3)), (blocks(1, 1), (1, 1))],
)
def test_group_lasso_minimises_in_each_group(groups, block, by_size):
    w = values(6, 8, seed=1) * np.linspace(0.05, 1.5, 8, dtype=np.float32)
    w[:3] *= np.float32(0.2)
    strength = 0.6 if by_size else 0.9
    found = np.asarray(group_lasso(groups, by_size=by_size)(jnp.asarray(w), strength))
    zeros = 0
    rng = np.random.default_rng(2)
    for index in groups_of(w.shape, block):
        x, v = w[index].astype(np.float64), found[index].astype(np.float64)
        scale = strength * (np.sqrt(x.size) if by_size else 1.0)

        def cost(v, x=x, scale=scale):
            return 0.5 * np.sum((v - x) ** 2) + scale * np.sqrt(np.sum(v**2))

        # The minimiser is along x: on a fine grid of lengths it is at the same length.
        lengths = np.linspace(0.0, 1.0, 4001)
        best = lengths[np.argmin([cost(t * x) for t in lengths])]
        np.testing.assert_allclose(v, best * x, atol=1e-3)
        tries = [v + s * rng.normal(size=x.shape) for s in (1e-3, 1e-2, 0.1, 1.0) for _ in range(5)]
        assert cost(v) <= min(map(cost, tries)) + 1e-6
        assert (v == 0).all() == (np.linalg.norm(x) <= scale) == (v == 0).any()
        zeros += (v == 0).all()
    assert zeros > 0
    assert np.any(found)


def n_of_m_by_subsets(x, n, strength):
    """Every choice of the free weights of one group, in float64: the cheapest is the answer."""

    def cost(v):
        return 0.5 * np.sum((v - x) ** 2) + strength * np.sort(np.abs(v))[: len(x) - n].sum()

    best = None
    for free in itertools.combinations(range(len(x)), n):
        v = np.sign(x) * np.maximum(np.abs(x) - strength, 0.0)
        v[list(free)] = x[list(free)]
        if best is None or cost(v) < cost(best) - 1e-12:
            best = v
    return best, cost


@pytest.mark.parametrize("strength", [0.1, 0.7, 5.0])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (0, 2), (3, 3)])
def test_n_of_m_minimises_over_all_choices(n, m, strength):
    w = values(8, 5, seed=3)
    found = np.asarray(n_of_m(n, m=m, axis=0)(jnp.asarray(w), strength))
    rng = np.random.default_rng(4)
    for column in range(5):
        for start in range(0, 8, m):
            x = w[start : start + m, column].astype(np.float64)
            v = found[start : start + m, column].astype(np.float64)
            want, cost = n_of_m_by_subsets(x, min(n, len(x)), strength)
            np.testing.assert_allclose(v, want, atol=1e-6)
            tries = [v + s * rng.normal(size=x.shape) for s in (0.01, 0.1, 1.0) for _ in range(5)]
            assert cost(v) <= min(map(cost, tries)) + 1e-6
    if strength == 5.0:
        hard = jc.compress(jc.prune(nm=(n, m), axis=0), {"w": jnp.asarray(w)})["w"]
        np.testing.assert_array_equal(found, hard)


def test_the_default_axis_of_n_of_m_is_that_of_prune():
    w = jnp.asarray(values(8, 3))
    hard = jc.compress(jc.prune(nm=(2, 4)), {"w": w})["w"]
    np.testing.assert_array_equal(n_of_m(2, m=4)(w, 100.0), hard)
    line = n_of_m(2, m=4)(w[:, 0], 100.0)
    np.testing.assert_array_equal(line, hard[:, 0])


@operators
def test_vmap_over_strength_equals_a_loop_and_compiles_once(name):
    f, w = OPERATORS[name], jnp.asarray(values(8, 6))
    strengths = jnp.array([0.0, 0.2, 0.5, 5.0])
    mapped = jax.jit(jax.vmap(lambda s: f(w, s)))(strengths)
    one = counting_jit(lambda w, s: f(w, s))
    for i in range(4):
        np.testing.assert_allclose(mapped[i], one(w, strengths[i]), atol=2e-7)
    assert one.traces == 1
    np.testing.assert_array_equal(mapped[0], w)
    alive = (np.asarray(mapped) != 0).sum((1, 2))
    assert alive[0] == 48
    assert alive[3] == (24 if name == "n_of_m" else 0)
    assert (np.diff(alive) <= 0).all()


@operators
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_the_rounded_float32_result(name, dtype):
    w = jnp.asarray(values(8, 6), dtype)
    found = OPERATORS[name](w, 0.3)
    assert found.dtype == dtype
    want = OPERATORS[name](w.astype(jnp.float32), 0.3).astype(dtype)
    np.testing.assert_array_equal(
        np.asarray(found, np.float32), np.asarray(want, np.float32), strict=True
    )


@operators
def test_gradients_are_finite_also_at_zero_and_right_elsewhere(name):
    f = OPERATORS[name]
    w = values(8, 6, seed=5)
    w[:4] = 0.0
    w[:, 1] = 0.0
    away = values(8, 6, seed=6)
    loss = lambda w, s: jnp.sum(f(w, s) * away)  # noqa: E731
    for strength in (0.0, 0.3, 2.0):
        by_w, by_s = jax.grad(loss, (0, 1))(jnp.asarray(w), jnp.asarray(strength, jnp.float32))
        assert np.isfinite(by_w).all()
        assert np.isfinite(by_s)
    # Along a direction, away from the edges, against a central difference.
    w, move = values(8, 6, seed=7), values(8, 6, seed=8)
    by_w, by_s = jax.grad(loss, (0, 1))(jnp.asarray(w), 0.3)
    h = 2e-4
    up, down = (float(loss(jnp.asarray(w + s * h * move), 0.3)) for s in (1, -1))
    assert float(jnp.sum(by_w * move)) == pytest.approx((up - down) / (2 * h), abs=0.02)
    up, down = (float(loss(jnp.asarray(w), 0.3 + s * h)) for s in (1, -1))
    assert float(by_s) == pytest.approx((up - down) / (2 * h), abs=0.02)


@operators
def test_zero_equal_empty_and_huge_leaves(name):
    f = OPERATORS[name]
    np.testing.assert_array_equal(f(jnp.zeros((4, 4)), 0.0), 0)
    np.testing.assert_array_equal(f(jnp.zeros((4, 4)), 0.5), 0)
    assert f(jnp.zeros((0, 4)), 0.5).shape == (0, 4)
    assert f(jnp.zeros((4, 0), jnp.bfloat16), 0.5).shape == (4, 0)
    equal = np.asarray(f(jnp.full((4, 4), 2.0), 0.25))
    assert np.isfinite(equal).all()
    assert (equal > 0).all()
    huge = np.asarray(f(jnp.full((4, 4), 1e30), 0.25))
    np.testing.assert_allclose(huge, 1e30, rtol=1e-6)
    tiny = np.asarray(f(jnp.full((4, 4), 1e-30), 1e-32))
    assert np.isfinite(tiny).all()
    at_infinity = np.asarray(f(jnp.full((4, 4), 1e30), jnp.inf))
    np.testing.assert_array_equal(at_infinity[2:], 0)
    assert np.all(at_infinity[:2] == (np.float32(1e30) if name == "n_of_m" else 0))
    # A traced strength below zero counts as zero.
    w = jnp.asarray(values(4, 4))
    np.testing.assert_array_equal(jax.jit(f)(w, -1.0), w)


def test_nan_and_infinity_are_kept_where_they_are():
    w = jnp.array([[jnp.nan, 1.0], [0.1, jnp.inf], [0.1, -2.0]])
    np.testing.assert_array_equal(soft_threshold(w, 0.5), [[np.nan, 0.5], [0, np.inf], [0, -1.5]])
    np.testing.assert_array_equal(hard_threshold(w, 0.5), [[np.nan, 0], [0, np.inf], [0, -2]])
    columns = np.asarray(group_lasso(slices(-1))(w, 0.5))
    assert np.isnan(columns[:, 0]).all()
    np.testing.assert_array_equal(columns[:, 1], [1.0, np.inf, -2.0])
    rows = np.asarray(group_lasso(slices(0))(w, 0.5))
    assert np.isnan(rows[0]).all()
    assert np.isfinite(rows[2]).all()
    kept = n_of_m(1, m=3, axis=0)(w, 0.5)[:, 0]
    np.testing.assert_array_equal(kept, np.float32([np.nan, 0.1, 0.0]))


def test_scalars_are_one_weight_where_groups_need_no_axis():
    assert float(soft_threshold(jnp.asarray(2.0), 0.5)) == 1.5
    assert float(hard_threshold(jnp.asarray(2.0), 0.5)) == 2.0
    with pytest.raises(ValueError, match=r"n_of_m: `w` must have a dimension"):
        n_of_m(1, m=2)(jnp.asarray(2.0), 0.5)


@operators
def test_what_does_not_fit_is_refused(name):
    f = OPERATORS[name]
    with pytest.raises(TypeError, match=r"real floating-point leaves, got int32\[4, 4\]"):
        f(jnp.ones((4, 4), jnp.int32), 0.5)
    with pytest.raises(ValueError, match=r"`strength` must be a real number of at least 0"):
        f(jnp.ones((4, 4)), -0.5)
    with pytest.raises(TypeError, match=r"`strength` must"):
        f(jnp.ones((4, 4)), "much")
    with pytest.raises(ValueError, match=r"`strength` must"):
        jax.jit(f)(jnp.ones((4, 4)), jnp.ones(4))


def test_wrong_factories_are_refused():
    with pytest.raises(TypeError, match=r"group_lasso: `groups` must be a Groups, got int -1"):
        group_lasso(-1)
    with pytest.raises(ValueError, match=r"at 'conv'"):
        group_lasso(slices(3))(jnp.ones((2, 2)), 0.1, path="conv")
    with pytest.raises(ValueError, match=r"n_of_m: `n` must be a real number in \[0, 4\]"):
        n_of_m(5, m=4)
    with pytest.raises(ValueError, match=r"n_of_m: `m` must"):
        n_of_m(0, m=0)
    with pytest.raises(ValueError, match=r"n_of_m: `axis` must be an axis"):
        n_of_m(1, m=2, axis=2)(jnp.ones((2, 2)), 0.1)

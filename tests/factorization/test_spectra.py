"""Spectra of all leaves, ranks under one budget, and what a loss makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.factorization import budgeted_ranks, measured_importance, spectra

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 12)) * np.geomspace(0.1, 3, 12) + np.linspace(-2, 2, 12)
PARAMS = {
    "a": {
        "kernel": jnp.asarray(RNG.normal(size=(12, 20)) * np.geomspace(1, 0.01, 20), jnp.float32)
    },
    "b": {"kernel": jnp.asarray(RNG.normal(size=(20, 2, 6)), jnp.float32), "bias": jnp.zeros(6)},
    "c": jnp.asarray(RNG.normal(size=(12, 12)), jnp.float32),
}
BATCH = (jnp.asarray(X, jnp.float32),)


def fn(p, x):
    h = jax.nn.relu(x @ p["a"]["kernel"])
    return jnp.einsum("nd,dhk->nhk", h, p["b"]["kernel"]) + (x @ p["c"].T).reshape(-1, 2, 6)


STATS = jc.calibrate(fn, PARAMS, [BATCH], gram=True, moments=True)


def outputs(path, w, center=False):
    """What a leaf gives, seen by its last axis, in float64."""
    x, w = np.asarray(X, np.float64), np.asarray(w, np.float64)
    if path == "b/kernel":
        x = np.maximum(x @ np.asarray(PARAMS["a"]["kernel"], np.float64), 0)
    x = x - x.mean(0) if center else x
    if path == "c":
        return w @ x.T
    return np.einsum("nd,d...->n...", x, w).reshape(-1, w.shape[-1])


def by_path(params):
    return {path: w for path, w in jc.tree.leaves_with_paths(params) if path != "b/bias"}


def test_without_statistics():
    found = spectra(PARAMS)
    assert found.keys() == by_path(PARAMS).keys()
    for path, w in by_path(PARAMS).items():
        matrix = np.asarray(w, np.float64).reshape(-1, w.shape[-1])
        wanted = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(found[path], wanted, rtol=2e-4, atol=2e-4 * wanted[0])


@pytest.mark.parametrize("center", [False, True])
def test_with_statistics_of_the_outputs(center):
    found = spectra(PARAMS, stats=STATS, center=center)
    for path, w in by_path(PARAMS).items():
        wanted = np.linalg.svd(outputs(path, w, center), compute_uv=False)
        wanted = wanted[: len(found[path])]
        np.testing.assert_allclose(found[path], wanted, atol=2e-4 * wanted[0])


@pytest.mark.parametrize("stats", [None, STATS], ids=["weights", "outputs"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.9])
def test_the_predicted_loss_is_the_measured_one_and_the_budget_is_kept(fraction, stats):
    found = budgeted_ranks(PARAMS, fraction, stats=stats)
    p = jc.masked(jc.low_rank(found.ranks), jc.tree.is_weight)
    new, structure = jc.compress(p, PARAMS, stats=stats, return_structure=True)
    lost = 0.0
    for path, w in by_path(PARAMS).items():
        change = np.asarray(w, np.float64) - np.asarray(by_path(new)[path], np.float64)
        lost += np.sum((change if stats is None else outputs(path, change)) ** 2)
        if found.dense[path]:
            assert bool((w == by_path(new)[path]).all()), path
    np.testing.assert_allclose(found.loss, lost, rtol=2e-3)
    packed = p.pack(new, structure)
    sizes = {path: w.nbytes // 4 for path, w in by_path(PARAMS).items()}
    kept = 0
    for path, w in jc.tree.leaves_with_paths(packed):
        if path in sizes:
            assert w.nbytes // 4 <= sizes[path]
            assert isinstance(w, jc.arrays.LowRank) == (not found.dense[path])
            kept += w.nbytes // 4
    assert kept <= fraction * sum(sizes.values())
    assert kept == int(found.cost)


def test_the_budget_beats_a_uniform_one():
    found = budgeted_ranks(PARAMS, 0.5)
    values, uniform = spectra(PARAMS), 0.0
    for path, w in by_path(PARAMS).items():
        m, n = w.size // w.shape[-1], w.shape[-1]
        uniform += float(jnp.sum(values[path][int(0.5 * m * n / (m + n)) :] ** 2))
    assert found.loss < 0.9 * uniform


def test_budgets_under_vmap_and_a_trace():
    fractions = jnp.array([0.3, 0.6, 0.9])

    @jax.jit
    def f(params, fraction):
        return budgeted_ranks(params, fraction).ranks

    several = jax.vmap(f, (None, 0))(PARAMS, fractions)
    for i, fraction in enumerate(fractions):
        assert {k: int(v[i]) for k, v in several.items()} == {
            k: int(v) for k, v in budgeted_ranks(PARAMS, float(fraction)).ranks.items()
        }


def test_costs():
    narrow = PARAMS | {"c": PARAMS["c"].astype(jnp.bfloat16)}
    whole = sum(w.nbytes for w in by_path(narrow).values())
    assert float(budgeted_ranks(narrow, 1.0, cost="bytes").cost) == whole
    found = budgeted_ranks(narrow, 0.5, cost="bytes")
    packed = jc.pack(jc.masked(jc.low_rank(found.ranks), jc.tree.is_weight), narrow)
    size = sum(w.nbytes for path, w in jc.tree.leaves_with_paths(packed) if path != "b/bias")
    assert size == int(found.cost) <= 0.5 * whole

    sites = jc.sites(fn, PARAMS, *BATCH)
    assert float(budgeted_ranks(PARAMS, 1.0, cost=sites).cost) == sum(s.flops for s in sites)
    found = budgeted_ranks(PARAMS, 0.5, cost=sites)
    packed = jc.pack(jc.masked(jc.low_rank(found.ranks), jc.tree.is_weight), PARAMS)
    run = jc.cost(jc.lift(fn), packed, *BATCH).flops - jc.cost(fn, PARAMS, *BATCH).flops
    np.testing.assert_allclose(run, float(found.cost) - sum(s.flops for s in sites), rtol=1e-5)


def test_importance_moves_ranks():
    def rank(importance):
        return int(budgeted_ranks(PARAMS, 0.5, importance=importance).ranks["c"])

    assert rank({"c": 1e-4}) < rank(None) < rank({"c": 1e4})


def test_aligned_ranks():
    ranks = budgeted_ranks(PARAMS, 0.7, align=4).ranks
    full = {"a/kernel": 12, "b/kernel": 6, "c": 12}
    assert all(int(r) % 4 == 0 or int(r) == full[path] for path, r in ranks.items())


@pytest.mark.parametrize("stats", [None, STATS], ids=["weights", "outputs"])
def test_importance_is_the_rise_of_the_loss_for_each_unit_of_error(stats):
    weight = {"a/kernel": 2.0, "b/kernel": 0.5, "c": 7.0}

    def loss(p):
        total = jnp.zeros(())
        for path, w in by_path(p).items():
            change = w - by_path(PARAMS)[path]
            if stats is not None:
                x = BATCH[0]
                x = jax.nn.relu(x @ PARAMS["a"]["kernel"]) if path == "b/kernel" else x
                change = jnp.einsum("nd,d...->n...", x, change.T if path == "c" else change)
            total += weight[path] * jnp.sum(change**2)
        return total

    found = measured_importance(loss, PARAMS, stats=stats)
    assert found.keys() == weight.keys()
    for path, a in found.items():
        np.testing.assert_allclose(a, weight[path], rtol=1e-2)


def test_importance_of_leaves_that_the_loss_ignores_or_that_have_no_error():
    flat = {"a": jnp.ones((8, 8)), "b": PARAMS["c"], "c": PARAMS["c"] * 2}
    loss = lambda p: jnp.sum((p["b"] - flat["b"]) ** 2)  # noqa: E731
    found = measured_importance(loss, flat)
    assert found["a"] == found["b"] > 0.9
    assert 0 < found["c"] < 1e-2


def test_center_takes_the_variance_alone_and_the_bias_the_rest():
    params = {"kernel": PARAMS["c"], "bias": jnp.zeros(12)}
    dense = lambda p, x: x @ p["kernel"] + p["bias"][None]  # noqa: E731
    stats = jc.calibrate(dense, params, [BATCH], gram=True, moments=True)
    w, x = np.asarray(params["kernel"], np.float64), X - X.mean(0)
    y = X @ w

    def error(new):
        got = X @ np.asarray(new["kernel"], np.float64) + np.asarray(new["bias"], np.float64)
        return np.linalg.norm(got - y)

    for rank in (1, 3, 6):
        best = np.sqrt(np.sum(np.linalg.svd(x @ w, compute_uv=False)[rank:] ** 2))
        new = jc.compress(jc.low_rank(rank, center=True), params, stats=stats)
        centred = error(jc.solvers.correct_bias(params, new, stats))
        assert best * (1 - 1e-5) <= centred <= best * (1 + 1e-3)
        plain = jc.compress(jc.low_rank(rank), params, stats=stats)
        assert centred < 0.97 * error(jc.solvers.correct_bias(params, plain, stats))


def test_bad_input():
    with pytest.raises(ValueError, match=r"spectra: `stats` must have statistics of each chosen"):
        spectra(PARAMS, stats={})
    with pytest.raises(
        ValueError, match=r"params` must have leaves of two or more.*'b/bias'|b/bias"
    ):
        spectra(PARAMS, where="**/bias")
    with pytest.raises(ValueError, match=r'budgeted_ranks: `cost` must be "parameters", "bytes"'):
        budgeted_ranks(PARAMS, 0.5, cost="flops")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"cost` must have a site of each chosen leaf"):
        budgeted_ranks(PARAMS, 0.5, cost=[])
    with pytest.raises(ValueError, match=r"measured_importance: `fraction` must be above 0 and"):
        measured_importance(lambda p: 0.0, PARAMS, fraction=1.0)
    with pytest.raises(ValueError, match=r"low_rank: `rank` must name the chosen leaves, and only"):
        jc.compress(jc.low_rank({"c": 3}), PARAMS)
    with pytest.raises(
        ValueError, match=r"low_rank: `rank\['c'\]` must be a real number of at least 0"
    ):
        jc.low_rank({"c": -1})
    conv = {"k": jnp.ones((3, 3, 2, 4))}
    apply = lambda p, x: jax.lax.conv_general_dilated(  # noqa: E731
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = jc.calibrate(apply, conv, [(jnp.ones((1, 5, 5, 2)),)], gram=True, moments=True)
    with pytest.raises(ValueError, match=r"one mean for each feature to be centred"):
        jc.compress(jc.low_rank(1, center=True), conv, stats=stats)


def test_from_the_full_rank_on_a_leaf_stays_to_the_last_bit():
    for rank in (6, 12, 40):
        new = jc.compress(jc.masked(jc.low_rank(rank), "b/kernel"), PARAMS)
        assert bool((new["b"]["kernel"] == PARAMS["b"]["kernel"]).all())
    new = jc.compress(jc.low_rank({"a/kernel": 2, "b/kernel": 6, "c": jnp.array(3)}), PARAMS)
    assert np.linalg.matrix_rank(new["a"]["kernel"], tol=1e-4) == 2
    assert np.linalg.matrix_rank(new["c"], tol=1e-4) == 3
    broken = {"c": PARAMS["c"].at[0, 0].set(jnp.nan)}
    assert bool(jnp.isnan(jc.compress(jc.low_rank(12), broken)["c"]).all())

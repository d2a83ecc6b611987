"""Sensitivities against a loop, and the budget made of them against linear programming."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import jaxcompress as jc

GRID = [0.25, 0.5, 0.75, 1.0]
SHAPES = {"a": (8, 8), "b": (40, 4), "c": (5, 7), "none": (0, 3)}
SIZES = {"a": 64, "b": 160, "c": 35, "none": 0}


def curves(seed, convex=True):
    rises = np.random.default_rng(seed).exponential(size=(4, len(GRID)))
    rises = np.sort(rises, axis=1) if convex else rises
    return dict(zip(SHAPES, np.cumsum(rises, axis=1).astype(np.float32), strict=True))


def least(errors, sparsity):
    """The sum of errors of the best allocation, from epigraphs of all segments."""
    paths = [p for p in SHAPES if SIZES[p]]
    n, rows, bounds = len(paths), [], []
    for i, path in enumerate(paths):
        points = [(0.0, 0.0), *zip(GRID, errors[path].tolist(), strict=True)]
        for (s0, e0), (s1, e1) in itertools.pairwise(points):
            slope = (e1 - e0) / (s1 - s0)
            row = np.zeros(2 * n)
            row[i], row[n + i] = slope, -1.0
            rows.append(row)
            bounds.append(slope * s0 - e0)
    weights = [SIZES[p] for p in paths]
    return linprog(
        np.r_[np.zeros(n), np.ones(n)],
        np.array(rows),
        bounds,
        np.r_[weights, np.zeros(n)][None],
        [sparsity * sum(weights)],
        [(0, 1)] * n + [(None, None)] * n,
    ).fun


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83, 0.97])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_linear_program_does_better(seed, sparsity):
    errors = curves(seed)
    found = jc.pruning.least_error(GRID, errors).densities(SHAPES, SIZES, 1 - sparsity)
    mean = sum(SIZES[p] * (1 - float(d)) for p, d in found.items()) / sum(SIZES.values())
    np.testing.assert_allclose(mean, sparsity, atol=1e-6)
    total = sum(
        np.interp(1 - float(found[p]), [0, *GRID], [0, *errors[p]]) for p in SHAPES if SIZES[p]
    )
    np.testing.assert_allclose(total, least(errors, sparsity), rtol=1e-5)


def test_prune_meets_the_total_and_takes_from_where_it_costs_least():
    params = {p: jax.random.normal(jax.random.key(0), s) for p, s in SHAPES.items()}
    errors = {"a": [0, 0, 0, 1e-3], "b": [1, 2, 3, 4], "c": [5, 6, 7, 8], "none": [0, 0, 0, 0]}
    new = jc.compress(jc.prune(0.5, budget=jc.pruning.least_error(GRID, errors)), params)
    kept = {path: int(jnp.sum(w != 0)) for path, w in new.items()}
    assert kept["a"] == 0
    assert kept["c"] == 35
    assert sum(kept.values()) == 259 - round(0.5 * 259)


def test_beyond_what_was_measured_it_is_uniform_and_the_ends_are_exact():
    errors = {p: c[:2] for p, c in curves(0).items()}
    budget = jc.pruning.least_error(GRID[:2], errors)
    for density in (1.0, 0.3, 0.0):
        found = budget.densities(SHAPES, SIZES, density)
        np.testing.assert_allclose([found[p] for p in "abc"], density, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_curves_that_are_noisy_still_meet_the_total(bad):
    errors = curves(3, convex=False)
    errors["b"][1] = bad
    budget = jc.pruning.least_error(GRID, errors)
    for sparsity in np.linspace(0, 1, 7):
        found = budget.densities(SHAPES, SIZES, jnp.float32(1 - sparsity))
        assert all(0 <= float(d) <= 1 for d in found.values())
        mean = sum(SIZES[p] * (1 - float(d)) for p, d in found.items()) / sum(SIZES.values())
        np.testing.assert_allclose(mean, sparsity, atol=1e-6)


def test_errors_and_sparsity_are_traced():
    @jax.jit
    def one(errors, density):
        return jc.pruning.least_error(GRID, errors).densities(SHAPES, SIZES, density)

    several = [curves(seed) for seed in range(3)]
    density = jnp.array([0.2, 0.5, 0.9])
    mapped = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *several), density)
    for i, errors in enumerate(several):
        for path, d in one(errors, density[i]).items():
            np.testing.assert_allclose(mapped[path][i], d, atol=1e-6)


def model(p, x):
    return jnp.tanh(x @ p["layer"]["w"] + p["layer"]["b"][None]) @ p["head"]


def example():
    rng = np.random.default_rng(0)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    params = {"layer": {"w": draw(8, 8), "b": draw(8)}, "head": draw(8, 4), "n": jnp.arange(3)}
    x = draw(20, 8)
    return params, lambda p: jnp.mean((model(p, x) - model(params, x)) ** 2)


def test_sensitivities_are_those_of_a_loop():
    params, loss = example()
    grid = jnp.array(GRID)
    tried = jax.vmap(lambda s: jc.compress(jc.prune(s), params))(grid)
    found = jc.solvers.sensitivities(loss, params, tried)
    assert list(found) == ["head", "layer/w"]
    for i in range(len(GRID)):
        head = params | {"head": tried["head"][i]}
        layer = params | {"layer": params["layer"] | {"w": tried["layer"]["w"][i]}}
        np.testing.assert_allclose(found["head"][i], loss(head), rtol=1e-5)
        np.testing.assert_allclose(found["layer/w"][i], loss(layer), rtol=1e-5)
    jitted = jax.jit(lambda p, t: jc.solvers.sensitivities(loss, p, t))(params, tried)
    assert set(jitted) == {"head", "layer/w", "layer/b"}
    np.testing.assert_allclose(jitted["layer/b"], 0, atol=1e-6)
    np.testing.assert_allclose(jitted["head"], found["head"], rtol=1e-5)


def test_the_measured_budget_beats_the_uniform_one():
    params, _ = example()
    head, w = params["head"], params["layer"]["w"]

    def loss(p):
        return 30 * jnp.sum((p["head"] - head) ** 2) + jnp.sum((p["layer"]["w"] - w) ** 2)

    grid = jnp.linspace(0.1, 0.9, 9)
    tried = jax.vmap(lambda s: jc.compress(jc.prune(s), params))(grid)
    budget = jc.pruning.least_error(grid, jc.solvers.sensitivities(loss, params, tried))
    plain = jc.prune(0.5, budget=jc.pruning.uniform())
    measured = jc.prune(0.5, budget=budget)
    assert loss(jc.compress(measured, params)) < 0.5 * loss(jc.compress(plain, params))


def test_nothing_changed_is_no_sensitivity():
    params, loss = example()
    same = jax.tree.map(lambda w: w[None], params)
    assert jc.solvers.sensitivities(loss, params, same) == {}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: jc.pruning.least_error([0.5, 0.5], {}), "`sparsities` must be a list of numbers"),
        (lambda: jc.pruning.least_error([], {}), "`sparsities`"),
        (lambda: jc.pruning.least_error([0.5, 1.5], {}), "`sparsities` must be at most 1"),
        (lambda: jc.pruning.least_error([0.5], {"a": [1.0, 2.0]}), r"\[1\].*"),
        (
            lambda: jc.compress(
                jc.prune(0.5, budget=jc.pruning.least_error([0.5], {"b": [1.0]})),
                {"a": jnp.ones((2, 2))},
            ),
            "errors of each chosen leaf",
        ),
        (
            lambda: jc.solvers.sensitivities(jnp.sum, jnp.ones(3), jnp.ones(3)),
            "`compressed` must be of shape",
        ),
        (
            lambda: jc.solvers.sensitivities(jnp.sum, {"a": jnp.ones(3)}, jnp.ones((1, 3))),
            "structure of `params`",
        ),
        (
            lambda: jc.solvers.sensitivities(lambda w: 2 * w, jnp.ones(3), jnp.zeros((1, 3))),
            "`loss` must return a scalar",
        ),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()

"""The best weights for a mask, against NumPy's least squares."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcompress.solvers import _refit
from jaxcompress.solvers._refit import refit
from tests.conftest import counting_jit
from tests.solvers import brute_force


def drawn(k, n, seed=0, density=0.5, **options):
    x, w = brute_force.layer(k, n, seed, **options)
    keep = np.random.default_rng(seed + 1).random((k, n)) < density
    return x, w, brute_force.gram_of(x), keep


@pytest.mark.parametrize(("k", "n"), [(1, 1), (6, 4), (20, 7)])
def test_least_squares_on_the_kept_inputs(k, n):
    x, w, gram, keep = drawn(k, n)
    new = refit(w, gram, keep, damping=0.0)
    y = x.astype(np.float64) @ w
    for c in range(n):
        kept = np.flatnonzero(keep[:, c])
        want = np.zeros(k)
        want[kept] = np.linalg.lstsq(x[:, kept].astype(np.float64), y[:, c], rcond=None)[0]
        np.testing.assert_allclose(new[:, c], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.01, 1.0, 100.0])
def test_damped(damping):
    _, w, gram, keep = drawn(12, 5)
    want = brute_force.masked(w, brute_force.damped(gram, damping), keep)
    np.testing.assert_allclose(refit(w, gram, keep, damping=damping), want, rtol=1e-3, atol=1e-4)


def test_admm_comes_to_the_exact_weights():
    _, w, gram, keep = drawn(24, 9, mixing=0.5)
    h = brute_force.damped(gram, 0.01)
    exact = refit(w, gram, keep)
    errors = [
        brute_force.error(h, refit(w, gram, keep, iterations=t), w) for t in [0, 1, 5, 20, 400]
    ]
    assert errors == sorted(errors, reverse=True)
    plain, best = (brute_force.error(h, v, w) for v in (w * keep, exact))
    assert errors[0] == pytest.approx(plain)
    assert errors[3] < best + 0.05 * (plain - best)
    np.testing.assert_allclose(refit(w, gram, keep, iterations=400), exact, rtol=1e-2, atol=1e-3)


def test_admm_does_not_mind_inputs_of_other_scales():
    x, w, _, keep = drawn(24, 9, mixing=0.5)
    x *= np.logspace(-2, 2, 24, dtype=np.float32)
    w /= np.logspace(-2, 2, 24, dtype=np.float32)[:, None]
    gram = brute_force.gram_of(x)
    plain, best, close = (
        brute_force.error(gram, v, w)
        for v in (
            w * keep,
            refit(w, gram, keep, damping=1e-6),
            refit(w, gram, keep, damping=1e-6, iterations=20),
        )
    )
    assert close < best + 0.1 * (plain - best)


@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.1, 0.5, 0.9]),
    damping=st.sampled_from([0.0, 0.01, 10.0]),
    iterations=st.sampled_from([None, 0, 1, 3, 20]),
    samples=st.sampled_from([3, 8, 40]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    dead=st.booleans(),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_never_worse_than_the_plain_mask(seed, density, damping, iterations, samples, dtype, dead):
    _, w, gram, keep = drawn(8, 5, seed, density, samples=samples)
    if dead:
        gram[2], gram[:, 2] = 0.0, 0.0
    w = jnp.asarray(w, dtype)
    new = refit(w, gram, keep, iterations=iterations, damping=damping)
    assert new.dtype == dtype
    assert not np.asarray(new)[~keep].any()
    plain = np.where(keep, np.asarray(w, np.float64), 0.0)
    for c in range(5):
        ours, theirs = (
            brute_force.error(gram, np.asarray(v, np.float64)[:, [c]], np.asarray(w)[:, [c]])
            for v in (new, plain)
        )
        # Both errors are rounded where they are compared.
        assert ours <= theirs + 1e-5 * np.trace(gram) * np.abs(np.asarray(w, np.float64)).max() ** 2


@pytest.mark.parametrize("iterations", [None, 10])
def test_ends_of_the_mask(iterations):
    _, w, gram, _ = drawn(6, 4)
    everything, nothing = np.ones((6, 4), bool), np.zeros((6, 4), bool)
    np.testing.assert_array_equal(refit(w, gram, everything, iterations=iterations), w)
    np.testing.assert_array_equal(refit(w, gram, nothing, iterations=iterations), 0 * w)


@pytest.mark.parametrize("iterations", [None, 10])
def test_dead_inputs_keep_their_weights(iterations):
    x, w, _, keep = drawn(6, 4)
    x[:, 2] = 0.0
    keep[2], keep[0] = True, False
    new = refit(w, brute_force.gram_of(x), keep, iterations=iterations)
    np.testing.assert_allclose(new[2], w[2], rtol=1e-6)


def test_columns_are_solved_together_or_apart():
    _, w, gram, keep = drawn(12, 7)
    h = jnp.asarray(brute_force.damped(gram, 0.01), jnp.float32)
    dropped = jnp.where(keep, 0.0, w)
    whole = np.where(keep, _refit.exact_change(h, dropped, jnp.asarray(keep)), 0)
    for entries in [1, 3 * 144]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_refit, "_ENTRIES", entries)
            parts = _refit.exact_change(h, dropped, jnp.asarray(keep))
        np.testing.assert_allclose(np.where(keep, parts, 0), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("iterations", [None, 5])
def test_layers_and_numbers_under_vmap(iterations):
    drawns = [drawn(8, 5, seed) for seed in range(3)]
    w, gram, keep = (jnp.stack([d[i] for d in drawns]) for i in (1, 2, 3))
    dampings = jnp.array([0.0, 0.1, 1.0])
    f = lambda w, g, m, d: refit(w, g, m, damping=d, iterations=iterations)  # noqa: E731
    together = jax.vmap(f)(w, gram, keep, dampings)
    for i in range(3):
        alone = f(w[i], gram[i], keep[i], dampings[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_iterations_under_vmap_compile_once():
    _, w, gram, keep = drawn(8, 5)
    f = counting_jit(lambda t: refit(w, gram, keep, iterations=t))
    counts = jnp.array([0, 1, 7])
    together = jax.vmap(f)(counts)
    before = f.traces
    for i, t in enumerate(counts):
        np.testing.assert_allclose(together[i], f(t), rtol=1e-5, atol=1e-6)
    assert f.traces <= before + 1


@pytest.mark.parametrize("iterations", [None, 5])
def test_a_nan_stays_in_its_column_and_a_bad_gram_changes_nothing(iterations):
    _, w, gram, keep = drawn(6, 4)
    clean = refit(w, gram, keep, iterations=iterations)
    w[2, 1], keep[2, 1] = np.nan, True
    new = refit(w, gram, keep, iterations=iterations)
    np.testing.assert_array_equal(new[:, [0, 2, 3]], clean[:, [0, 2, 3]])
    gram[1, 1] = np.nan
    new = refit(w, gram, keep, iterations=iterations)
    np.testing.assert_array_equal(new, np.where(keep, w, 0.0))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty(shape):
    new = refit(jnp.zeros(shape), jnp.eye(shape[0]), jnp.zeros(shape, bool))
    assert new.shape == shape


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w": jnp.ones(3)}, ValueError, "`w` must be a kernel"),
        ({"w": jnp.ones((3, 2), jnp.int32)}, TypeError, "`w` must hold real"),
        ({"gram": jnp.eye(2)}, ValueError, r"`gram` must be of shape \[3, 3\]"),
        ({"keep": jnp.ones((3, 2))}, TypeError, "`keep` must be a boolean array"),
        ({"keep": jnp.ones(3, bool)}, ValueError, "`keep` must be a boolean array"),
        ({"keep": None}, TypeError, "`keep` must be a boolean array"),
        ({"damping": -1.0}, ValueError, "`damping` must be a real number"),
        ({"iterations": -1}, ValueError, "`iterations` must be a real number"),
        ({"iterations": "9"}, TypeError, "`iterations` must be a real number"),
    ],
)
def test_bad_input(change, error, words):
    given = {"w": jnp.ones((3, 2)), "gram": jnp.eye(3), "keep": jnp.ones((3, 2), bool)}
    with pytest.raises(error, match="refit: " + words):
        refit(**{**given, **change})

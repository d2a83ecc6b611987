"""Optimal brain surgeon, against trying every candidate with a least-squares solution."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxcompress.solvers import _surgeon
from jaxcompress.solvers._refit import refit
from jaxcompress.solvers._surgeon import removal_trace, surgeon
from tests.conftest import counting_jit
from tests.solvers import brute_force


def rank_of(order):
    return np.argsort(order, axis=0)


@given(
    seed=st.integers(0, 2**32 - 1),
    damping=st.sampled_from([1e-3, 0.01, 1.0]),
    kept=st.integers(0, 18),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_as_trying_every_candidate(seed, damping, kept):
    x, w = brute_force.layer(6, 3, seed)
    gram = brute_force.gram_of(x)
    h = brute_force.damped(gram, damping)
    order, losses = brute_force.greedy(w, h)
    trace = removal_trace(w, gram, damping=damping)
    np.testing.assert_array_equal(trace.rank, rank_of(order))
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-2, atol=1e-3 * losses.max())
    result = surgeon(w, gram, kept, damping=damping)
    keep = rank_of(order) >= brute_force.heads(losses, 18 - kept)[None, :]
    np.testing.assert_array_equal(result.keep, keep)
    np.testing.assert_allclose(result.w, brute_force.masked(w, h, keep), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(
        result.loss, brute_force.error(h, result.w, w), rtol=1e-3, atol=1e-3 * losses.max()
    )


def test_one_removal_is_the_best_of_all():
    for seed in range(5):
        x, w = brute_force.layer(4, 3, seed)
        gram = brute_force.gram_of(x)
        h = brute_force.damped(gram, 0.01)
        result = surgeon(w, gram, 11)
        best = brute_force.best_mask(w, h, 11)
        assert brute_force.error(h, result.w, w) == pytest.approx(best, rel=1e-3)


def test_a_larger_layer_beats_magnitude_with_the_same_refit():
    x, w = brute_force.layer(32, 8)
    gram = brute_force.gram_of(x)
    result = surgeon(w, gram, 128)
    magnitude = np.abs(w) >= np.sort(np.abs(w).ravel())[-128]
    other = refit(w, gram, magnitude)
    assert brute_force.error(gram, result.w, w) < 0.8 * brute_force.error(gram, other, w)


@given(
    seed=st.integers(0, 2**32 - 1),
    removed=st.integers(0, 20),
    values=st.sampled_from(["any", "few", "equal", "infinite"]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_cheapest_head_goes_first(seed, removed, values):
    rng = np.random.default_rng(seed)
    losses = rng.random((5, 4)).astype(np.float32)  # falling too, as no trace of a layer is
    if values == "few":
        losses = np.round(3 * losses)
    if values == "equal":
        losses = np.ones_like(losses)
    if values == "infinite":
        losses[losses > 0.5] = np.inf
    counts = _surgeon._shares(jnp.asarray(losses), jnp.int32(removed))
    np.testing.assert_array_equal(counts, brute_force.heads(losses, removed))


@pytest.mark.parametrize(
    ("kept", "count"),
    [
        (0, 0),
        (-3, 0),
        (1, 1),
        (7.9, 7),
        (np.int8(7), 7),
        (jnp.bfloat16(7), 7),
        (24, 24),
        (10**12, 24),
        (np.float32(np.inf), 24),
    ],
)
def test_the_count_is_exact(kept, count):
    x, w = brute_force.layer(6, 4)
    for result in (
        surgeon(w, brute_force.gram_of(x), kept),
        surgeon(np.ones_like(w), np.eye(6, dtype=np.float32), kept),
    ):
        assert int(result.keep.sum()) == count
        assert not np.asarray(result.w)[~np.asarray(result.keep)].any()
        assert bool(result.info.ok)


def test_everything_kept_changes_nothing():
    x, w = brute_force.layer(6, 4)
    x[:, 2] = 0.0
    result = surgeon(w, brute_force.gram_of(x), 24)
    np.testing.assert_array_equal(result.w, w)
    assert float(result.loss) == 0.0


def test_a_traced_nan_keeps_nothing():
    x, w = brute_force.layer(6, 4)
    result = jax.jit(lambda c: surgeon(w, brute_force.gram_of(x), c))(jnp.nan)
    assert int(result.keep.sum()) == 0


def test_counts_and_dampings_under_vmap_compile_once():
    x, w = brute_force.layer(6, 4)
    gram = brute_force.gram_of(x)
    f = counting_jit(lambda count, damping: surgeon(w, gram, count, damping=damping))
    counts, dampings = jnp.array([0, 5, 12, 24]), jnp.array([0.0, 0.01, 0.1, 1.0])
    together = jax.vmap(f)(counts, dampings)
    np.testing.assert_array_equal(together.keep.sum(axis=(1, 2)), counts)
    before = f.traces
    for i in range(4):
        alone = f(counts[i], dampings[i])
        np.testing.assert_array_equal(together.keep[i], alone.keep)
        np.testing.assert_allclose(together.w[i], alone.w, rtol=1e-3, atol=1e-4)
    assert f.traces <= before + 1


def test_layers_under_vmap():
    layers = [brute_force.layer(6, 4, seed) for seed in range(3)]
    w = jnp.stack([w for _, w in layers])
    gram = jnp.stack([brute_force.gram_of(x) for x, _ in layers])
    together = jax.vmap(lambda w, g: surgeon(w, g, 12))(w, gram)
    for i in range(3):
        alone = surgeon(w[i], gram[i], 12)
        np.testing.assert_array_equal(together.keep[i], alone.keep)
        np.testing.assert_allclose(together.w[i], alone.w, rtol=1e-3, atol=1e-4)


def test_columns_are_worked_on_together_or_apart(monkeypatch):
    x, w = brute_force.layer(9, 7)  # a shape of its own, so that it compiles anew
    gram = brute_force.gram_of(x)
    monkeypatch.setattr(_surgeon, "_ENTRIES", 3 * 81)
    parts = removal_trace(w, gram)
    order, _ = brute_force.greedy(w, brute_force.damped(gram, 0.01))
    np.testing.assert_array_equal(parts.rank, rank_of(order))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes(dtype):
    x, w = brute_force.layer(6, 4)
    w = jnp.asarray(w, dtype)
    gram = brute_force.gram_of(x)
    result = surgeon(w, gram, 12)
    assert result.w.dtype == dtype
    want = surgeon(w.astype(jnp.float32), gram, 12)
    np.testing.assert_array_equal(result.keep, want.keep)
    np.testing.assert_allclose(result.w.astype(jnp.float32), want.w, rtol=0.02, atol=0.02)


def test_nan_weights_and_dead_inputs_go_first():
    x, w = brute_force.layer(6, 4)
    x[:, 1] = 0.0
    w[4, 2] = np.nan
    result = surgeon(w, brute_force.gram_of(x), 24 - 5)
    gone = np.zeros((6, 4), bool)
    gone[1] = True
    gone[4, 2] = True
    np.testing.assert_array_equal(~np.asarray(result.keep), gone)
    assert bool(jnp.isfinite(result.w).all())
    assert float(result.loss) == 0.0


def test_a_singular_gram_is_damped():
    x, w = brute_force.layer(8, 4, samples=3)
    result = surgeon(w, brute_force.gram_of(x), 12, damping=0.0)
    assert bool(result.info.ok)
    assert int(result.info.tries) > 1
    # Three samples: three weights a column are enough for the same outputs.
    error = brute_force.error(brute_force.gram_of(x), result.w, w)
    assert error < 1e-2 * brute_force.error(brute_force.gram_of(x), 0 * w, w)


def test_a_bad_gram_is_reported_and_the_count_is_kept():
    _, w = brute_force.layer(6, 4)
    result = surgeon(w, jnp.full((6, 6), jnp.nan), 12)
    assert not bool(result.info.ok)
    assert int(result.keep.sum()) == 12


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty(shape):
    result = surgeon(jnp.zeros(shape), jnp.eye(shape[0]), 3)
    assert result.w.shape == result.keep.shape == shape
    trace = removal_trace(jnp.zeros(shape), jnp.eye(shape[0]))
    assert trace.losses.shape == trace.rank.shape == shape


def test_equal_weights_go_in_order():
    result = surgeon(jnp.ones((3, 2)), jnp.eye(3), 2)
    np.testing.assert_array_equal(result.keep, [[0, 0], [0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w": jnp.ones(3)}, ValueError, "`w` must be a kernel"),
        ({"w": jnp.ones((3, 2), jnp.int32)}, TypeError, "`w` must hold real"),
        ({"gram": jnp.eye(2)}, ValueError, r"`gram` must be of shape \[3, 3\]"),
        ({"damping": -1.0}, ValueError, "`damping` must be a real number"),
        ({"keep_count": None}, TypeError, "`keep_count` must be a real number"),
        ({"keep_count": float("nan")}, ValueError, "`keep_count` must be a real number"),
    ],
)
def test_bad_input(change, error, words):
    given = {"w": jnp.ones((3, 2)), "gram": jnp.eye(3), "keep_count": 2}
    with pytest.raises(error, match="surgeon: " + words):
        surgeon(**{**given, **change})
    if "keep_count" not in change:
        given.pop("keep_count")
        with pytest.raises(error, match="removal_trace: " + words):
            removal_trace(**{**given, **change})

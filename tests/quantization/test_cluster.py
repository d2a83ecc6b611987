"""k-means against a plain NumPy Lloyd, and its edges."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc


def lloyd(w, k, iterations=20):
    x = np.asarray(w, np.float64).ravel()
    x = x[x != 0]
    centers = np.linspace(x.min(), x.max(), k)
    for _ in range(iterations):
        nearest = np.abs(x[:, None] - centers[None, :]).argmin(1)
        centers = np.array(
            [x[nearest == j].mean() if (nearest == j).any() else centers[j] for j in range(k)]
        )
    return np.sort(centers)


@pytest.mark.parametrize("k", [2, 3, 16])
def test_agrees_with_lloyd(k):
    w = np.random.default_rng(k).normal(size=(16, 8)).astype(np.float32)
    want = lloyd(w, k)
    found = jc.cluster(k).find(jnp.asarray(w))[""].values
    np.testing.assert_allclose(found, want, atol=1e-5)
    out = np.asarray(jc.compress(jc.cluster(k), jnp.asarray(w)), np.float64)
    nearest = want[np.abs(w[..., None] - want).argmin(-1)]
    np.testing.assert_allclose(out, nearest, atol=1e-5)


def test_error_does_not_grow_with_more_values_or_a_warm_start():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    error = lambda p, **kw: float(jnp.sum((p.project(w, p.find(w, **kw)) - w) ** 2))  # noqa: E731
    errors = [error(jc.cluster(k)) for k in (1, 2, 4, 8, 16)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    p = jc.cluster(4, iterations=1)
    held = p.find(w)
    for _ in range(5):
        before, held = held, p.find(w, previous=held)
    assert float(jnp.sum((p.project(w, held) - w) ** 2)) <= float(
        jnp.sum((p.project(w, before) - w) ** 2)
    )


@pytest.mark.parametrize(("k", "bits"), [(1, 1), (2, 1), (3, 2), (16, 4), (17, 5), (256, 8)])
def test_packed_size(k, bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    packed = jc.pack(jc.cluster(k), w)
    np.testing.assert_array_equal(packed.todense(), jc.compress(jc.cluster(k), w))
    assert packed.nbytes == 64 * 64 * bits // 8 + 4 * k


def test_edges():
    same = jnp.full((4, 4), 0.3)
    np.testing.assert_array_equal(jc.compress(jc.cluster(4), same), same)
    w = jnp.array([[jnp.nan, 1.0, -jnp.inf, 0.0, -2.0]])
    out = np.asarray(jc.compress(jc.cluster(2), w))
    np.testing.assert_array_equal(out, [[np.nan, 1.0, -2.0, 0.0, -2.0]])
    with pytest.raises(ValueError, match="NaN"):
        jc.pack(jc.cluster(2), w)
    sparse = jnp.where(jnp.arange(4096).reshape(64, 64) % 3 == 0, 1.0, 0.0)
    packed = jc.pack(jc.cluster(2), sparse)
    np.testing.assert_array_equal(packed.todense(), sparse)


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        ((0,), {}, ValueError, "num_values"),
        ((300,), {}, ValueError, "num_values"),
        ((jnp.asarray(4),), {}, ValueError, "max_values"),
        ((8,), {"max_values": 4}, ValueError, "num_values"),
        ((8,), {"iterations": -1}, ValueError, "iterations"),
    ],
)
def test_bad_input(args, kwargs, kind, text):
    with pytest.raises(kind, match=text):
        jc.cluster(*args, **kwargs)

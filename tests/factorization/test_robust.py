"""Robust PCA: planted parts are recovered, and what is found is the optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.factorization import low_rank_plus, robust_pca


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def planted(m=60, n=40, rank=2, count=80, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
    sparse = np.zeros(m * n)
    sparse[rng.choice(m * n, count, replace=False)] = rng.normal(size=count) * 10
    return low, sparse.reshape(m, n)


@pytest.mark.parametrize("transpose", [False, True])
def test_recovers_a_planted_pair(transpose):
    low, sparse = (x.T if transpose else x for x in planted())
    found = jax.jit(robust_pca)(jnp.asarray(low + sparse, jnp.float32))
    np.testing.assert_allclose(found.low_rank, low, atol=2e-3)
    np.testing.assert_allclose(found.sparse, sparse, atol=2e-3)
    assert np.linalg.matrix_rank(found.low_rank, tol=1e-2) == 2
    assert ((np.abs(found.sparse) > 1e-2) == (np.abs(sparse) > 1e-2)).all()
    assert found.error < 1e-5
    assert found.iterations < 60


def by_fixed_penalty(w, weight, penalty=1.0, steps=3000):
    """The alternating direction method with one penalty, which ends at the optimum."""
    low = sparse = dual = np.zeros_like(w)
    shrunk = lambda x, by: np.sign(x) * np.maximum(np.abs(x) - by, 0)  # noqa: E731
    for _ in range(steps):
        u, s, vt = np.linalg.svd(w - sparse + dual / penalty, full_matrices=False)
        low = (u * shrunk(s, 1 / penalty)) @ vt
        sparse = shrunk(w - low + dual / penalty, weight / penalty)
        dual = dual + penalty * (w - low - sparse)
    return low, sparse


def test_is_the_optimum_of_its_problem():
    w, weight = np.asarray(draw(12, 10), np.float64), 0.4
    found = robust_pca(jnp.asarray(w, jnp.float32), weight)
    np.testing.assert_allclose(found.low_rank + found.sparse, w, atol=1e-5)

    def value(low, sparse):
        return np.linalg.svd(low, compute_uv=False).sum() + weight * np.abs(sparse).sum()

    got = value(np.asarray(found.low_rank, np.float64), np.asarray(found.sparse, np.float64))
    np.testing.assert_allclose(got, value(*by_fixed_penalty(w, weight)), rtol=2e-3)
    assert got < 0.99 * min(value(w, 0 * w), value(0 * w, w))


def test_low_rank_plus_finds_it_too():
    low, sparse = planted()
    w = jnp.asarray(low + sparse, jnp.float32)
    p = low_rank_plus(jc.prune(1 - 80 / w.size), 2, iterations=40)
    left = np.asarray(jax.jit(lambda w: jc.compress(p, w))(w) - w, np.float64)
    assert np.linalg.norm(left) < 0.05 * np.linalg.norm(sparse)


def test_weights_are_mapped_and_move_entries():
    w = draw(12, 10)
    weights = jnp.array([0.05, 0.3, 5.0])
    found = jax.vmap(lambda c: robust_pca(w, c))(weights)
    for i, c in enumerate(weights):
        np.testing.assert_allclose(found.sparse[i], robust_pca(w, c).sparse, atol=1e-3)
    counts = (np.asarray(found.sparse) != 0).sum((1, 2))
    assert counts[0] == 120
    assert counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 3)])
def test_empty_and_zero(shape):
    found = robust_pca(jnp.zeros(shape))
    np.testing.assert_array_equal(found.low_rank, np.zeros(shape))
    np.testing.assert_array_equal(found.sparse, np.zeros(shape))


def test_nan_half_precision_and_scale():
    w = draw(8, 6)
    assert np.isnan(robust_pca(w.at[0, 0].set(jnp.nan)).low_rank).all()
    assert robust_pca(w.astype(jnp.bfloat16)).sparse.dtype == jnp.float32
    small = robust_pca(w * 1e-30)
    np.testing.assert_allclose(small.sparse * 1e30, robust_pca(w).sparse, atol=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match=r"robust_pca: `w` must be a matrix"):
        robust_pca(draw(2, 3, 4))
    with pytest.raises(TypeError, match=r"robust_pca: `w` must hold real floating-point"):
        robust_pca(jnp.ones((2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"robust_pca: `weight` must be"):
        robust_pca(draw(2, 2), -1.0)

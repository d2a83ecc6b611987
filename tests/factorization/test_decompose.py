"""Truncated decompositions against NumPy's in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

svd = jc.factorization.svd
METHODS = ("exact", "gram", "randomized")


def matrix(m, n, spectrum, seed=0):
    rng = np.random.default_rng(seed)
    k = len(spectrum)
    u, v = (np.linalg.qr(rng.normal(size=(d, k)))[0] for d in (m, n))
    return (u * spectrum) @ v.T


FALLING = 1 / np.arange(1, 41) ** 0.5
SHAPES = [(40, 60), (60, 40), (40, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_eckart_young(method, shape):
    """The error is the root of the sum of the squared singular values that are dropped."""
    w = matrix(*shape, FALLING)
    s = np.linalg.svd(w, compute_uv=False)
    best = np.sqrt(np.sum(s[10:] ** 2))
    found = jax.jit(lambda w: svd(w, 10, method=method))(jnp.asarray(w, jnp.float32))
    u, vt = np.asarray(found.u, np.float64), np.asarray(found.vt, np.float64)
    error = np.linalg.norm(w - (u * np.asarray(found.s)) @ vt)
    within = 1.005 if method == "randomized" else 1 + 2e-6
    assert best * (1 - 1e-6) <= error <= within * best
    np.testing.assert_allclose(found.error, error, rtol=1e-5)
    np.testing.assert_allclose(u.T @ u, np.eye(10), atol=2e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(10), atol=2e-5)
    np.testing.assert_allclose(found.s, s[:10], rtol=3e-2 if method == "randomized" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_all_triplets_give_the_matrix_back(method):
    w = matrix(12, 20, np.ones(12))  # all singular values repeat
    found = svd(jnp.asarray(w, jnp.float32), method=method)
    assert found.u.shape == (12, 12)
    np.testing.assert_allclose((found.u * found.s[None]) @ found.vt, w, atol=2e-6)
    assert float(found.error) <= 1e-6
    np.testing.assert_allclose(found.s, np.ones(12), rtol=1e-5)


def test_krylov_beats_power_iterations_at_equal_cost():
    """The excess over the best error: a fifth, as with torch.svd_lowrank, which iterates."""
    k, r = 400, 32
    w = matrix(k, k, 1 / np.arange(1, k + 1) ** 0.5)
    s = np.linalg.svd(w, compute_uv=False)
    best = np.sqrt(np.sum(s[r:] ** 2))
    w = jnp.asarray(w, jnp.float32)

    def excess(**kwargs):
        u = np.asarray(svd(w, r, method="randomized", **kwargs).u, np.float64)
        return np.linalg.norm(w - u @ (u.T @ w)) / best - 1

    # 2 q b + l columns that W is multiplied with: 220 and 192.
    krylov = excess()
    power = excess(krylov=False, oversampling=0, iterations=2)
    assert 0 <= krylov < power / 5
    assert krylov < 0.005
    more = [excess(krylov=False, oversampling=0, iterations=q) for q in (0, 1, 4)]
    assert more[0] > more[1] > power > more[2] > 0
    assert excess(key=jax.random.key(1)) != krylov


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale_keeps_its_digits(method, scale):
    w = matrix(12, 20, FALLING[:12])
    found = svd(jnp.asarray(w * scale, jnp.float32), 3, method=method, oversampling=9)
    np.testing.assert_allclose(np.asarray(found.s, np.float64) / scale, FALLING[:3], rtol=1e-4)
    np.testing.assert_allclose(
        np.float64(found.error) / scale, np.sqrt(np.sum(FALLING[3:12] ** 2)), rtol=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_deficient_rank_is_no_harm(method):
    w = jnp.asarray(matrix(40, 60, FALLING[:3]), jnp.float32)
    found = svd(w, 20, method=method)
    np.testing.assert_allclose((found.u * found.s[None]) @ found.vt, w, atol=2e-6)
    assert float(jnp.max(found.s[3:])) < 1e-3
    zero = svd(jnp.zeros((12, 20)), 5, method=method)
    assert all(bool(jnp.isfinite(x).all()) for x in zero)
    np.testing.assert_array_equal((zero.u * zero.s[None]) @ zero.vt, jnp.zeros((12, 20)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows(method, bad):
    found = svd(jnp.ones((12, 20)).at[3, 4].set(bad), 5, method=method)
    assert all(bool(jnp.isnan(x).all()) for x in found[:3])
    assert not jnp.isfinite(found.error)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (2, 0, 3)])
def test_nothing_has_no_triplets(shape):
    found = svd(jnp.zeros(shape))
    assert found.u.shape == (*shape[:-1], 0)
    assert found.vt.shape == (*shape[:-2], 0, shape[-1])
    np.testing.assert_array_equal(found.error, np.zeros(shape[:-2]))
    assert svd(jnp.ones((3, 4)), 0).u.shape == (3, 0)


@pytest.mark.parametrize("method", METHODS)
def test_stacks_vmap_and_narrow_dtypes(method):
    stack = jnp.stack([jnp.asarray(matrix(40, 60, FALLING, i), jnp.float32) for i in range(2)])
    several = svd(stack, 10, method=method)
    mapped = jax.vmap(lambda w: svd(w, 10, method=method))(stack)
    for i in range(2):
        one = svd(stack[i], 10, method=method)
        for found in (several, mapped):
            np.testing.assert_allclose(found.s[i], one.s, rtol=1e-5)
            np.testing.assert_allclose(found.error[i], one.error, rtol=1e-5)
    narrow = svd(stack[0].astype(jnp.bfloat16), 10, method=method)
    assert narrow.u.dtype == jnp.float32


def test_auto_takes_a_sketch_of_large_matrices_alone():
    def sketches(shape, rank):
        jaxpr = jax.make_jaxpr(lambda w: svd(w, rank))(jax.ShapeDtypeStruct(shape, jnp.float32))
        return "random_bits" in str(jaxpr)

    assert sketches((512, 2048), 64)
    assert not sketches((512, 2048), 128)  # the basis would be more than a third
    assert not sketches((256, 4096), 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((jnp.ones(3),), {}, ValueError, "svd: `w` must have two or more axes"),
        ((jnp.ones((3, 3), int),), {}, TypeError, "svd: `w`"),
        ((jnp.ones((3, 3)), -1), {}, ValueError, "svd: `rank`"),
        ((jnp.ones((3, 3)),), {"method": "fast"}, ValueError, "svd: `method` must be one of"),
        ((jnp.ones((3, 3)),), {"oversampling": -1}, ValueError, "svd: `oversampling`"),
        ((jnp.ones((3, 3)),), {"iterations": -1}, ValueError, "svd: `iterations`"),
        ((jnp.ones((3, 3)),), {"key": 3}, TypeError, "svd: `key`"),
    ],
)
def test_bad_input(args, kwargs, error, text):
    with pytest.raises(error, match=text):
        svd(*args, **kwargs)

"""Factors fitted to the inputs of the compressed model."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.factorization import refit_factors

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 12)) @ RNG.normal(size=(12, 12))


def f32(x):
    return jnp.asarray(x, jnp.float32)


LAYERS = {
    "dense": (lambda p, x: x @ p["w"], (12, 20), lambda w: X @ w),
    "transposed": (lambda p, x: x @ p["w"].T, (20, 12), lambda w: X @ w.T),
    "heads": (
        lambda p, x: jnp.einsum("nd,dhk->nhk", x, p["w"]),
        (12, 3, 6),
        lambda w: np.einsum("nd,dhk->nhk", X, w),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_least_squares_with_the_other_factor_held(name):
    fn, shape, outputs = LAYERS[name]
    w = RNG.normal(size=shape)
    params, p = {"w": f32(w), "b": jnp.ones(3)}, jc.low_rank(4)
    packed = p.pack(params, p.find(params))
    stats = jc.calibrate(fn, params, [(f32(X),)], gram=True)
    new = refit_factors(packed, params, stats)
    u, v = (np.asarray(x, np.float64) for x in (packed["w"].u, packed["w"].v))
    if name == "transposed":
        best = np.linalg.lstsq(X @ v.T, X @ w.T, rcond=None)[0].T @ v
        np.testing.assert_array_equal(new["w"].v, packed["w"].v)
    elif name == "heads":
        a = np.einsum("nd,dhr->nhr", X, u).reshape(-1, 4)
        b = np.einsum("nd,dhk->nhk", X, w).reshape(-1, 6)
        best = u @ np.linalg.lstsq(a, b, rcond=None)[0]
    else:
        best = u @ np.linalg.lstsq(X @ u, X @ w, rcond=None)[0]
        np.testing.assert_array_equal(new["w"].u, packed["w"].u)
    np.testing.assert_allclose(jc.todense(new)["w"], best, atol=2e-4)
    before = np.linalg.norm(outputs(w) - outputs(np.asarray(jc.todense(packed)["w"], np.float64)))
    after = np.linalg.norm(outputs(w) - outputs(np.asarray(jc.todense(new)["w"], np.float64)))
    assert after < 0.95 * before
    assert new["b"] is packed["b"]


def test_inputs_of_a_low_dimension_and_rank_zero():
    w, x = RNG.normal(size=(12, 20)), np.zeros((5, 12))
    x[:, :2] = RNG.normal(size=(5, 2)) * 300
    params = {"w": f32(w)}
    stats = jc.calibrate(lambda p, x: x @ p["w"], params, [(f32(x),)], gram=True)
    packed = {"w": jc.arrays.LowRank(f32(RNG.normal(size=(12, 4))), f32(np.zeros((4, 20))))}
    new = refit_factors(packed, params, stats)["w"]
    np.testing.assert_allclose(x @ np.asarray(new.todense()), x @ w, atol=2e-2)
    # Of all that fit, the smallest.
    best = np.linalg.lstsq(x @ np.asarray(new.u, np.float64), x @ w, rcond=1e-6)[0]
    np.testing.assert_allclose(new.v, best, atol=1e-3)
    none = {"w": jc.arrays.LowRank(jnp.zeros((12, 0)), jnp.zeros((0, 20)))}
    assert refit_factors(none, params, stats)["w"].rank == 0


def test_bad_input():
    params = {"w": jnp.ones((12, 20))}
    packed = jc.pack(jc.low_rank(1), params)
    with pytest.raises(ValueError, match="refit_factors: `stats` must have statistics"):
        refit_factors(packed, params, {})
    with pytest.raises(ValueError, match=r"have a leaf of shape \[12, 20\], as in `packed`"):
        refit_factors(packed, {"w": jnp.ones((3, 3))}, {})
    small = jc.pack(jc.quantize(8), packed)
    with pytest.raises(TypeError, match="have dense factors, got Quantized and"):
        refit_factors(small, params, {})

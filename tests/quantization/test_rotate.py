"""Quantizing in rotated features: outliers go, functions stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.quantization import rotated

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
Q = jc.quantize(4, ranges=jc.quantization.min_max)


def heavy(*shape):
    """Weights whose rows have very different sizes."""
    w = np.random.default_rng(0).normal(size=shape)
    w[::7] *= 30
    return jnp.asarray(w, jnp.float32)


def rotation(signs):
    n = len(signs)
    return scipy.linalg.hadamard(n) / np.sqrt(n) * np.asarray(signs, np.float64)


def by_hand(w, signs, bits=4):
    """Round to nearest in rotated features, in float64."""
    r = rotation(signs)
    v = r @ np.asarray(w, np.float64)
    top = 2 ** (bits - 1) - 1
    step = np.abs(v).max(0) / top
    return r.T @ (np.clip(np.round(v / step), -top, top) * step)


def kurtosis(w):
    w = np.asarray(w, np.float64)
    return float(np.mean(np.mean((w - w.mean(0)) ** 4, 0) / np.var(w, 0) ** 2))


def test_values_agree_with_float64_and_errors_fall():
    params = {"w": heavy(64, 6)}
    p = rotated(Q, KEY)
    structure = p.find(params)
    got, want = p.project(params, structure)["w"], by_hand(params["w"], structure.by_path["w"])
    signs = structure.by_path["w"]
    # A weight on a rounding tie may go the other way in float32: one step in rotated features.
    apart = rotation(signs) @ (np.asarray(got, np.float64) - want)
    assert np.mean(np.abs(apart) > 1e-4) < 0.02
    assert signs.dtype == jnp.int8
    assert set(np.asarray(signs)) == {-1, 1}
    error = lambda p: float(np.abs(jc.compress(p, params)["w"] - params["w"]).mean())  # noqa: E731
    assert error(p) < 0.9 * error(Q)
    turned = rotation(signs) @ np.asarray(params["w"], np.float64)
    assert kurtosis(turned) < 0.4 * kurtosis(params["w"])


def test_function_is_preserved_by_lift():
    params = {"a": {"kernel": heavy(64, 16), "bias": jnp.ones(16)}, "b": heavy(16, 8)}

    def fn(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["b"]

    x = jnp.asarray(RNG.normal(size=(5, 64)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        dense = fn(params, x)
        # Eight bits, so nearly the function itself.
        packed = jc.pack(rotated(jc.quantize(8), KEY), params)
        lifted = jc.lift(fn)(packed, x)
        np.testing.assert_allclose(
            lifted, fn(jc.todense(packed), x), atol=1e-5 * float(np.abs(dense).max())
        )
    assert float(np.abs(lifted - dense).max() / np.abs(dense).max()) < 0.02
    assert isinstance(packed["a"]["kernel"], arrays.Rotated)
    assert packed["a"]["bias"] is params["a"]["bias"]


def test_leaves_that_are_not_chosen_stay_as_they_are():
    params = {"a": heavy(16, 4), "b": heavy(16, 4), "c": jnp.ones(3)}
    for p in (rotated(jc.masked(Q, "a"), KEY), jc.masked(rotated(Q, KEY), "a")):
        new = jc.compress(p, params)
        assert new["b"] is params["b"]
        assert new["c"] is params["c"]
        assert not np.array_equal(new["a"], params["a"])
        assert jc.pack(p, params)["b"] is params["b"]


def test_keys_vmap_and_narrow_dtypes():
    params = {"w": jnp.asarray(heavy(16, 4), jnp.bfloat16)}
    one = lambda key: jc.compress(rotated(Q, key), params)["w"]  # noqa: E731
    keys = jax.random.split(KEY, 2)
    both = jax.vmap(one)(keys)
    assert both.dtype == jnp.bfloat16
    for i in range(2):
        np.testing.assert_array_equal(both[i], one(keys[i]))
    assert not np.array_equal(both[0], both[1])


def test_a_gradient_is_found_in_rotated_features():
    w, g = heavy(16, 4), jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
    seen = []

    def find(params, *, previous=None, grads=None, step=0):
        seen.append(grads)
        return ()

    spy = jc.Projection(find, lambda params, s: params, lambda params, s: params)
    p = rotated(spy, KEY)
    structure = p.find({"w": w}, grads={"w": g})
    want = rotation(structure.by_path["w"]) @ np.asarray(g, np.float64)
    np.testing.assert_allclose(seen[0]["w"], want, atol=1e-5)


def test_bad_arguments():
    for bad, fault in (
        (lambda: rotated(3, KEY), "rotated: `projection` must be a Projection"),
        (lambda: rotated(Q, 3), "rotated: `key` must be one key"),
    ):
        with pytest.raises(TypeError, match=fault):
            bad()
    with pytest.raises(ValueError, match=r"rotated: `order` must divide the 12 .* at 'w'\. The"):
        rotated(Q, KEY, order=8).find({"w": jnp.ones((12, 2))})
    with pytest.raises(ValueError, match="rotated: `axis` must be an axis of a leaf with 2"):
        rotated(Q, KEY, axis=2).find({"w": jnp.ones((12, 2))})

"""Simulated quantization of activations, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from tests.conftest import counting_jit


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def linear(params, x):
    return x @ params["w"]


PARAMS, X = {"w": draw(8, 4)}, draw(5, 8) + 0.5


def rounded(x, low, high, bits, symmetric):
    """Section 2.1 of Jacob et al., entry by entry."""
    x = np.asarray(x, np.float64)
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = np.maximum(-low, high) / top
        return step * np.clip(np.rint(x / step), -top, top)
    top = 2**bits - 1
    step = (high - low) / top
    zero = np.rint(-low / step)
    return step * (np.clip(np.rint(x / step) + zero, 0, top) - zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
class TestAgainstNumpy:
    @pytest.mark.parametrize("per", ["token", "tensor"])
    def test_dynamic(self, bits, symmetric, per):
        options = {"per": per, "symmetric": symmetric}
        y = jax.jit(jc.quantize_activations(linear, bits, **options))(PARAMS, X)
        x, over = np.asarray(X, np.float64), {"axis": 1 if per == "token" else None}
        low, high = x.min(**over, keepdims=True), x.max(**over, keepdims=True)
        want = rounded(x, low, high, bits, symmetric) @ np.asarray(PARAMS["w"], np.float64)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("per", ["tensor", "channel"])
    def test_static(self, bits, symmetric, per):
        observer = jc.observers.min_max(per=per)
        stats = jc.calibrate(linear, PARAMS, [X], ranges=observer)
        fn = jc.quantize_activations(linear, bits, ranges=stats, symmetric=symmetric)
        wide = 2 * X
        x = np.asarray(X, np.float64)
        over = {"axis": 0 if per == "channel" else None}
        want = rounded(wide, x.min(**over), x.max(**over), bits, symmetric)
        want = want @ np.asarray(PARAMS["w"], np.float64)
        np.testing.assert_allclose(jax.jit(fn)(PARAMS, wide), want, rtol=1e-5, atol=1e-5)


def test_bits_are_mapped_and_compiled_once():
    run = counting_jit(lambda bits, x: jc.quantize_activations(linear, bits)(PARAMS, x))
    bits = jnp.array([2.0, 3.0, 8.0])
    mapped = jax.vmap(run, in_axes=(0, None))(bits, X)
    for b, y in zip(bits, mapped, strict=True):
        np.testing.assert_allclose(y, run(b, X), rtol=1e-6, atol=1e-6)
    assert run.traces <= 2


def test_gradient_is_the_identity_within_the_range():
    ranges = {"w": jc.observers.Range(jnp.float32(-1.0), jnp.float32(1.0))}
    x = jnp.array([[0.3, -0.9, 1.5, -7.0, 0.0, 0.5, 0.2, 2.0]])
    run = lambda x: jc.quantize_activations(linear, 4, ranges=ranges)(PARAMS, x).sum()  # noqa: E731
    want = np.where(np.abs(x) <= 1, np.asarray(PARAMS["w"]).sum(1), 0)
    np.testing.assert_allclose(jax.grad(run)(x), want, rtol=1e-6)


def test_gradient_of_the_weights_sees_rounded_activations():
    run = lambda p: jc.quantize_activations(linear, 2)(p, X).sum()  # noqa: E731
    x = np.asarray(X, np.float64)
    largest = np.abs(x).max(1, keepdims=True)
    want = rounded(x, -largest, largest, 2, True).sum(0)
    np.testing.assert_allclose(jax.grad(run)(PARAMS)["w"][:, 0], want, rtol=1e-5)


def test_layers_of_a_scan_have_their_own_ranges():
    blocks = {"w": 2 * draw(3, 8, 8)}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    stats = jc.calibrate(fn, blocks, [X])
    got = jax.jit(jc.quantize_activations(fn, 6, ranges=stats))(blocks, X)
    x = X
    for i in range(3):
        x = rounded(x, float(stats["w"].low[i]), float(stats["w"].high[i]), 6, True)
        x = x @ np.asarray(blocks["w"][i], np.float64)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-3)


def test_only_chosen_sites():
    fn = lambda p, x: linear({"w": p["v"]}, jnp.tanh(linear(p, x)))  # noqa: E731
    params = PARAMS | {"v": draw(4, 4)}
    y = jc.quantize_activations(fn, 2, where="v")(params, X)
    hidden = np.tanh(np.asarray(X, np.float64) @ np.asarray(PARAMS["w"], np.float64))
    largest = np.abs(hidden).max(1, keepdims=True)
    want = rounded(hidden, -largest, largest, 2, True) @ np.asarray(params["v"], np.float64)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_weights_and_activations_together():
    small = jc.pack(jc.quantize(8), PARAMS)
    y = jc.lift(jc.quantize_activations(linear, 8))(small, X)
    integer = jc.lift(linear, activations="dynamic")(small, X)
    np.testing.assert_allclose(y, integer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "p",
    [
        jc.quantize(4),
        jc.quantize(3, group_size=4, symmetric=False),
        jc.quantization.nf4(),
        jc.prune(nm=(2, 4)),
        jc.low_rank(2),
    ],
    ids=["int4", "int3 groups", "nf4", "2:4", "rank 2"],
)
def test_activations_of_any_compressed_weights(p):
    rounded = jc.quantize_activations(linear, 6)
    want = rounded(jc.compress(p, PARAMS), X)
    np.testing.assert_allclose(jc.lift(rounded)(jc.pack(p, PARAMS), X), want, rtol=1e-4, atol=1e-5)


def test_the_other_way_round_says_what_to_do():
    with pytest.raises(ValueError, match=r"jc\.lift\(jc\.quantize_activations"):
        jc.quantize_activations(jc.lift(linear))(jc.pack(jc.quantize(4), PARAMS), X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_keeps_its_dtype(dtype):
    params = {"w": PARAMS["w"].astype(dtype)}
    y = jc.quantize_activations(linear, 8)(params, X.astype(dtype))
    assert y.dtype == dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), linear(PARAMS, X), atol=0.1)


def test_zeros_nan_and_empty():
    fn = jc.quantize_activations(linear, 4)
    np.testing.assert_array_equal(fn(PARAMS, jnp.zeros((2, 8))), 0)
    assert fn(PARAMS, jnp.zeros((0, 8))).shape == (0, 4)
    assert np.isnan(fn(PARAMS, X.at[0, 0].set(jnp.nan))[0]).all()


def test_bad_input():
    with pytest.raises(ValueError, match="quantize_activations: `bits`"):
        jc.quantize_activations(linear, 1)
    with pytest.raises(ValueError, match="quantize_activations: `per` must be 'token' or 'tensor'"):
        jc.quantize_activations(linear, 8, per="row")
    with pytest.raises(ValueError, match=r"quantize_activations: `ranges`.*none for \['w'\]"):
        jc.quantize_activations(linear, 8, ranges={})(PARAMS, X)
    with pytest.raises(ValueError, match=r"quantize_activations: .*'nothing'"):
        jc.quantize_activations(linear, 8, where="nothing")(PARAMS, X)
    with pytest.raises(TypeError, match="quantize_activations: `fn` must be a function"):
        jc.quantize_activations(3)

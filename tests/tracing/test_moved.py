"""Leaves in scaled or rotated features run as the same leaves made dense, on new activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.tracing import _moved

RNG = np.random.default_rng(0)
F32 = np.dtype(np.float32)


def conv(w, x, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


# Name: function, shape of the weight, axis of its input features, shape of the activations, and
# whether the activations are moved, or the weight is decoded.
USES = {
    "dense": (lambda w, x: x @ w, (24, 16), 0, (5, 24), True),
    "transposed": (lambda w, x: x @ w.T, (16, 24), 1, (5, 24), True),
    "split outputs": (
        lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(24, 4, 4)),
        (24, 16),
        0,
        (5, 24),
        True,
    ),
    "cut outputs": (lambda w, x: x @ w[:, 3:9], (24, 16), 0, (5, 24), True),
    "cut inputs": (lambda w, x: x @ w[4:20], (24, 16), 0, (5, 16), None),
    "stacked": (scanned, (2, 16, 16), 1, (5, 16), True),
    "batched": (lambda w, x: jnp.einsum("lbi,lio->lbo", x, w), (2, 16, 8), 1, (2, 5, 16), True),
    "conv": (conv, (3, 3, 8, 4), 2, (2, 5, 5, 8), True),
    "grouped conv": (lambda w, x: conv(w, x, 2), (3, 3, 4, 6), 2, (2, 5, 5, 8), True),
    "other axis": (lambda w, x: x @ w, (24, 16), 1, (5, 24), False),
    "embedding": (lambda w, x: w[jnp.array([1, 5])] + x, (8, 16), 1, (2, 16), False),
    "elementwise": (lambda w, x: w * x, (8, 16), 0, (8, 16), False),
}


def leaf(kind, shape, axis, dtype=F32, inner=None):
    if inner is None:
        steps = RNG.uniform(0.5, 1, [1 if i == axis else n for i, n in enumerate(shape)])
        codes = jnp.asarray(RNG.integers(-127, 128, shape), jnp.int8)
        packed = arrays.Quantized(codes, jnp.asarray(steps, jnp.float32), None, F32)
    else:
        w = RNG.normal(size=shape).astype(np.float32)
        packed = jc.pack(jc.masked(inner, "w"), {"w": jnp.asarray(w)})["w"]
    if kind == "rotated":
        signs = jnp.asarray(RNG.choice([-1, 1], shape[axis]), jnp.int8)
        return arrays.Rotated(packed, signs, axis, arrays.hadamard_order(shape[axis]), dtype)
    sizes = [n if i == axis else 1 for i, n in enumerate(shape)]
    scale = jnp.asarray(np.exp(RNG.normal(size=sizes)), jnp.float32)
    return arrays.Rescaled(packed, scale, dtype)


def near(got, want, tolerance=2e-6):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["rescaled", "rotated"])
def test_lifted_equals_dense(kind, use, monkeypatch):
    fn, shape, axis, inputs, moves = USES[use]
    moved = []
    for name in ("dot_activations", "conv_activations"):
        real = getattr(_moved, name)
        record = lambda *args, real=real: moved.append(real(*args)) or moved[-1]  # noqa: E731
        monkeypatch.setattr(_moved, name, record)
    w, x = leaf(kind, shape, axis), jnp.asarray(RNG.normal(size=inputs), jnp.float32)
    near(jax.jit(jc.lift(fn))(w, x), jax.jit(lambda w, x: fn(w.todense(), x))(w, x))
    did = any(y is not None for y in moved)
    assert did == (moves if moves is not None else kind == "rescaled")


def test_nested_low_rank_grouped_and_narrow():
    x = jnp.asarray(RNG.normal(size=(5, 24)), jnp.float32)
    dense = lambda w, x: x @ w  # noqa: E731
    grouped = jc.quantize(4, group_size=8, ranges=jc.quantization.min_max)
    for kind, inner in (("rotated", jc.low_rank(2)), ("rescaled", grouped)):
        w = leaf(kind, (24, 16), 0, inner=inner)
        twice = arrays.Rescaled(w, jnp.full((24, 1), 2.0), F32)
        near(jax.jit(jc.lift(dense))(twice, x), 2 * dense(w.todense(), x))
    half = leaf("rotated", (24, 16), 0, np.dtype(jnp.bfloat16))
    y = jc.lift(dense)(half, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    near(y.astype(jnp.float32), dense(half.todense().astype(jnp.float32), x), 2e-2)


def rounded(x):
    """Integers of each token, and its step."""
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    return np.rint(x / step), step


@pytest.mark.parametrize("kind", ["rescaled", "rotated"])
def test_integer_products_see_the_new_activations(kind):
    w = leaf(kind, (24, 16), 0)
    x = RNG.normal(size=(5, 24)).astype(np.float32) * np.exp(RNG.normal(size=24)).astype(np.float32)
    got = jc.lift(lambda w, x: x @ w, activations="dynamic")(w, jnp.asarray(x))
    if kind == "rescaled":
        inside = x * np.asarray(w.scale, np.float64)[:, 0]
    else:
        # R, column by column, from what the array says of itself.
        eye = arrays.Rotated(jnp.eye(24), w.signs, 0, w.order, F32).todense()
        inside = x @ np.asarray(eye, np.float64)
    codes, step = rounded(inside)
    want = codes @ np.asarray(w.inner.codes, np.float64) * step * np.asarray(w.inner.scale)
    # A rounding tie may fall the other way in float32.
    near(got, want, 1e-3)


def test_static_ranges_are_refused():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": leaf("rotated", (24, 16), 0)}
    x = jnp.ones((2, 24))
    ranges = jc.calibrate(fn, jc.todense(params), [x])
    with pytest.raises(ValueError, match=r"lift: `activations` must be 'dynamic' .* at 'w'"):
        jc.lift(fn, activations=ranges)(params, x)

"""Which axes of a leaf a product sums over, and in which order: told by the Gram matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv(x, w, **kwargs):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)


def scanned(w, x, step):
    return jax.lax.scan(lambda x, w: (jnp.tanh(step(x, w)), step(x, w)), x, w)[1]


FUNCTIONS = {
    "dense": (lambda w, x: x @ w, (6, 4), (3, 6), (0,)),
    "transposed": (lambda w, x: x @ w.T, (4, 6), (3, 6), (1,)),
    "weight_first": (lambda w, x: w @ x, (4, 6), (6, 3), (1,)),
    "cast": (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (6, 4), (3, 6), (0,)),
    "heads": (lambda w, x: jnp.einsum("ti,ihd->thd", x, w), (6, 2, 3), (5, 6), (0,)),
    "from_heads": (lambda w, x: jnp.einsum("thd,hdo->to", x, w), (2, 3, 6), (5, 2, 3), (0, 1)),
    "crossed_heads": (lambda w, x: jnp.einsum("tdh,hdo->to", x, w), (2, 3, 6), (5, 3, 2), (1, 0)),
    "merged": (lambda w, x: x @ w.reshape(6, 4), (2, 3, 4), (5, 6), (0, 1)),
    "merged_after_transposing": (
        lambda w, x: x @ w.transpose(1, 0, 2).reshape(6, 4),
        (2, 3, 4),
        (5, 6),
        (1, 0),
    ),
    "split": (lambda w, x: x @ w.reshape(6, 2, 2).reshape(6, 4), (6, 4), (3, 6), None),
    "unit_axes": (lambda w, x: x @ w[:, 0, None][:, 0], (6, 1, 4), (3, 6), (0,)),
    "squeezed": (lambda w, x: x @ jnp.squeeze(w, 1), (6, 1, 4), (3, 6), (0,)),
    "conv": (lambda w, x: conv(x, w), (3, 3, 2, 4), (2, 5, 5, 2), (2, 0, 1)),
    "grouped_conv": (
        lambda w, x: conv(x, w, feature_group_count=2),
        (3, 3, 2, 4),
        (2, 5, 5, 4),
        (2, 0, 1),
    ),
    "half": (lambda w, x: x @ w[:, :2], (6, 4), (3, 6), None),
    "reversed": (lambda w, x: x @ w[::-1], (6, 4), (3, 6), None),
    "batched": (lambda w, x: jnp.einsum("bti,bio->bto", x, w), (2, 6, 4), (2, 3, 6), None),
    "branches": (
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w.T, w) @ x.T,
        (6, 4),
        (3, 6),
        (0,),
    ),
    "branches_that_differ": (
        lambda w, x: x @ jax.lax.cond(x[0, 0] > 0, lambda w: w.T, lambda w: w, w),
        (6, 6),
        (3, 6),
        None,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gram_matrix_meets_the_leaf(name):
    fn, shape, inputs, axes = FUNCTIONS[name]
    w, x = draw(*shape), draw(*inputs, seed=1)
    stats = jc.calibrate(lambda p, x: fn(p["w"], x), {"w": w}, [x], gram=True)["w"]
    assert stats.axes == axes == jc.sites(lambda p, x: fn(p["w"], x), {"w": w}, x)[0].axes
    if axes is None:
        return
    # |X W|^2 is tr(W^T X^T X W), in no other order of the features.
    matrix = np.moveaxis(np.asarray(w, np.float64), axes, range(len(axes)))
    gram = np.asarray(stats.gram.matrix, np.float64)
    gram = gram.reshape(-1, gram.shape[-1], gram.shape[-1])
    columns = matrix.reshape(gram.shape[-1], len(gram), -1)
    want = np.einsum("fgo,gfe,ego->", columns, gram, columns)
    out = np.asarray(fn(w, x), np.float64)
    tolerance = 1e-2 if name == "cast" else 1e-5
    np.testing.assert_allclose(np.sum(out**2), want, rtol=tolerance)


@pytest.mark.parametrize(
    ("step", "axes"), [(lambda x, w: x @ w, (1,)), (lambda x, w: x @ w.T, (2,))]
)
def test_layers_of_a_scan_keep_the_axes_of_the_leaf(step, axes):
    w, x = draw(3, 4, 4), draw(5, 4, seed=1)
    stats = jc.calibrate(lambda p, x: scanned(p["w"], x, step), {"w": w}, [x], gram=True)["w"]
    assert (stats.axes, stats.stacked) == (axes, 1)
    out = np.asarray(scanned(w, x, step), np.float64)
    for layer in range(3):
        matrix = np.moveaxis(np.asarray(w[layer], np.float64), axes[0] - 1, 0)
        want = np.trace(matrix.T @ np.asarray(stats.gram.matrix[layer], np.float64) @ matrix)
        np.testing.assert_allclose(np.sum(out[layer] ** 2), want, rtol=1e-5)


def test_statistics_pass_through_jit():
    fn, w, x = lambda p, x: x @ p["w"], draw(6, 4), draw(3, 6)
    stats = jc.calibrate(fn, {"w": w}, [x], gram=True)
    again = jax.jit(lambda s: s)(stats)
    assert again["w"].axes == (0,)
    np.testing.assert_array_equal(again["w"].gram.matrix, stats["w"].gram.matrix)

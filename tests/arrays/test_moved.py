"""Hadamard transforms, and arrays in scaled or rotated features, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.sharding import PartitionSpec as P

import jaxcompress as jc
from jaxcompress import arrays
from jaxcompress.arrays._hadamard import _core, _paley

RNG = np.random.default_rng(0)


def matrix_of(order):
    """The ±1 matrix of an order, as the transform of the identity."""
    return np.rint(np.asarray(arrays.hadamard(jnp.eye(order), axis=0)) * np.sqrt(order))


@pytest.mark.parametrize("order", [1, 2, 12, 28, 32, 48, 344])
def test_matrices_are_hadamard(order):
    h = matrix_of(order)
    assert (np.abs(h) == 1).all()
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


def test_every_core_is_hadamard():
    for order in range(4, 513, 4):
        h = _paley(order)
        if h is not None:
            wide = h.astype(np.int64)
            np.testing.assert_array_equal(wide @ wide.T, order * np.eye(order, dtype=int))
    # Those that neither construction of Paley nor doubling gives.
    missing = [n for n in range(4, 200, 4) if _core(n) is None]
    assert missing == [92, 116, 156, 172, 184, 188]


def test_powers_of_two_are_those_of_scipy():
    x = RNG.normal(size=(3, 64, 2)).astype(np.float32)
    want = np.einsum("ij,ajb->aib", scipy.linalg.hadamard(64).astype(np.float64), x) / 8
    np.testing.assert_allclose(arrays.hadamard(x, axis=1), want, atol=1e-6)
    back = arrays.hadamard(arrays.hadamard(x, axis=1), axis=1, transpose=True)
    np.testing.assert_allclose(back, x, atol=1e-6)
    half = arrays.hadamard(jnp.asarray(x, jnp.bfloat16), axis=-2)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, atol=0.05)


def test_blocks_and_lengths_without_a_matrix():
    x = RNG.normal(size=(2, 12)).astype(np.float32)
    h = scipy.linalg.hadamard(4) / 2
    want = np.einsum("ij,abj->abi", h, x.reshape(2, 3, 4)).reshape(2, 12)
    np.testing.assert_allclose(arrays.hadamard(x, order=4), want, atol=1e-6)
    np.testing.assert_array_equal(arrays.hadamard(x[:, :7]), x[:, :7])
    assert arrays.hadamard(x[:, :0]).shape == (2, 0)
    got = [arrays.hadamard_order(n) for n in (92, 30, 0, 11008)]
    assert got == [4, 2, 1, 11008]
    with pytest.raises(ValueError, match=r"hadamard: `order` must divide the 12 .* largest is 12"):
        arrays.hadamard(x, order=6)
    with pytest.raises(TypeError, match="hadamard: `x` must hold real floating"):
        arrays.hadamard(jnp.arange(4))


def codes(shape, axis=-1):
    scale = np.ones(len(shape), int)
    scale[axis] = shape[axis]
    return arrays.Quantized(
        jnp.asarray(RNG.integers(-127, 128, shape), jnp.int8),
        jnp.asarray(RNG.uniform(0.5, 1, scale), jnp.float32),
        None,
        np.dtype(np.float32),
    )


def rescaled(shape=(3, 8, 5), axis=1, dtype=np.float32):
    scale = np.ones(len(shape), int)
    scale[axis] = shape[axis]
    factor = jnp.asarray(RNG.uniform(0.1, 9, scale), jnp.float32)
    return arrays.Rescaled(codes(shape), factor, np.dtype(dtype))


def rotated(shape=(3, 8, 5), axis=1, order=4, dtype=np.float32):
    signs = jnp.asarray(RNG.choice([-1, 1], shape[axis]), jnp.int8)
    return arrays.Rotated(codes(shape), signs, axis, order, np.dtype(dtype))


def by_hand(x):
    inner = np.asarray(x.inner.codes, np.float64) * np.asarray(x.inner.scale, np.float64)
    if isinstance(x, arrays.Rescaled):
        return inner * np.asarray(x.scale, np.float64)
    n = inner.shape[x.axis]
    h = np.kron(np.eye(n // x.order), scipy.linalg.hadamard(x.order)) / np.sqrt(x.order)
    r = h * np.asarray(x.signs, np.float64)
    return np.moveaxis(np.tensordot(r.T, inner, (1, x.axis)), 0, x.axis)


KINDS = [
    rescaled(),
    rescaled(axis=0),
    rotated(),
    rotated(axis=2, shape=(3, 5, 8)),
    rotated((8, 5), 0),
]


@pytest.mark.parametrize("x", KINDS, ids=repr)
def test_dense_rows_and_bytes(x):
    want = by_hand(x)
    tolerance = 1e-6 * np.abs(want).max()
    np.testing.assert_allclose(x.todense(), want, atol=tolerance)
    parts = 4 * x.scale.size if isinstance(x, arrays.Rescaled) else x.signs.size
    assert (x.shape, x.dtype, x.nbytes) == (want.shape, np.float32, x.inner.nbytes + parts)
    stacked, rebuild = arrays.rows(x)
    for i in (0, want.shape[0] - 1):
        row = rebuild(jax.tree.map(lambda part: part[i], stacked))  # noqa: B023
        np.testing.assert_allclose(jc.todense(row), want[i], atol=tolerance)
    taken = arrays.take_rows(x, jnp.array([[1, 0]]))
    np.testing.assert_allclose(taken, want[[1, 0]][None], atol=tolerance)


def test_cast_jit_vmap_and_gradient():
    for x in (rescaled((2, 4, 3)), rotated((2, 4, 3))):
        half = arrays.cast(x, jnp.bfloat16)
        assert half.dtype == half.todense().dtype == jnp.bfloat16
        np.testing.assert_allclose(jax.jit(jc.todense)(x), x.todense(), rtol=1e-6)
        both = jax.tree.map(lambda part: jnp.stack([part, part]), x)
        np.testing.assert_allclose(jax.vmap(jc.todense)(both)[1], x.todense(), rtol=1e-6)
    x = rescaled((4, 3), 0)
    grad = jax.grad(lambda x: x.todense().sum(), allow_int=True)(x).scale
    np.testing.assert_allclose(grad, np.asarray(x.inner.todense()).sum(1, keepdims=True), rtol=1e-5)


def test_partition_specs():
    specs = arrays.partition_specs(rescaled((4, 8), 0), P("x", "y"))
    assert [tuple(s) for s in (specs.inner.codes, specs.scale)] == [("x", "y"), ("x", None)]
    specs = arrays.partition_specs(rotated((4, 8), 0), P(None, "y"))
    assert [tuple(s) for s in (specs.inner.codes, specs.signs)] == [(None, "y"), ()]
    assert arrays.partition_specs(rotated((4, 8), 0), P("x", None)) is None

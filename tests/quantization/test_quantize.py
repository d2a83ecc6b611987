"""Codes against NumPy float64, error bounds, groups, binary, the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxcompress as jc

floats = st.floats(-1e3, 1e3, width=32)


def over_all(**kwargs):
    return jc.masked(jc.quantize(ranges=jc.quantization.min_max, **kwargs), "w")


def grid_of(w, **kwargs):
    return over_all(**kwargs).find({"w": jnp.asarray(w)})["w"]


def compress(w, **kwargs):
    return jc.compress(over_all(**kwargs), {"w": jnp.asarray(w)})["w"]


def by_hand(run, bits, symmetric):
    """One run of weights in float64, from the formulas of the docstring."""
    run = np.asarray(run, np.float64)
    if symmetric and bits == 1:
        step = np.abs(run).sum() / max((run != 0).sum(), 1)
        return np.sign(run) * step
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = np.abs(run).max() / top or 1.0
        return np.clip(np.round(run / step), -top, top) * step
    low, high = min(run.min(), 0), max(run.max(), 0)
    step = (high - low) / (2**bits - 1) or 1.0
    zero = np.round(-low / step)
    return (np.clip(np.round(run / step) + zero, 0, 2**bits - 1) - zero) * step


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1, 0, (0, 1)])
def test_values_agree_with_float64(bits, symmetric, axis):
    w = np.random.default_rng(bits).normal(size=(16, 8)).astype(np.float32)
    got = np.asarray(compress(w, bits=bits, axis=axis, symmetric=symmetric), np.float64)
    want = np.zeros_like(got)
    runs = {
        None: [np.s_[:, :]],
        -1: [np.s_[:, i] for i in range(8)],
        0: [np.s_[i] for i in range(16)],
    }
    for run in runs.get(axis, [np.s_[i, j] for i in range(16) for j in range(8)]):
        want[run] = by_hand(w[run], bits, symmetric)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("shape", "size", "axis"), [((16, 8), 4, -2), ((7, 3), 4, 0), ((3, 3, 6, 4), 4, -2)]
)
def test_groups_also_where_they_do_not_divide(shape, size, axis, symmetric):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = compress(w, bits=4, group_size=size, group_axis=axis, symmetric=symmetric)
    moved, want = np.moveaxis(w, axis, -1), np.moveaxis(np.zeros(shape), axis, -1)
    for index in np.ndindex(moved.shape[:-1]):
        for start in range(0, moved.shape[-1], size):
            run = np.s_[(*index, slice(start, start + size))]
            want[run] = by_hand(moved[run], 4, symmetric)
    np.testing.assert_allclose(np.moveaxis(np.asarray(got), axis, -1), want, rtol=1e-5, atol=1e-6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, (5, 4), elements=floats), st.integers(2, 8), st.booleans())
def test_error_is_at_most_half_a_step(w, bits, symmetric):
    grid = grid_of(w, bits=bits, symmetric=symmetric)
    out = np.asarray(grid.project(jnp.asarray(w)), np.float64)
    step = np.asarray(grid.scale, np.float64)
    assert (np.abs(out - w) <= 0.5 * step * (1 + 1e-5) + 1e-30).all()
    np.testing.assert_array_equal(out[w == 0], 0)
    again = grid.project(jnp.asarray(out, jnp.float32))
    np.testing.assert_array_equal(again, out.astype(np.float32))


def test_codes_do_not_depend_on_the_transformation():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)
    for bits in (2, 4, 8):
        p = jc.quantize(bits)
        eager = jc.compress(p, w)
        np.testing.assert_array_equal(eager, jax.jit(lambda w: jc.compress(p, w))(w))  # noqa: B023
        np.testing.assert_array_equal(eager, jax.vmap(lambda w: jc.compress(p, w))(w[None])[0])  # noqa: B023
        np.testing.assert_array_equal(eager, jax.vjp(lambda w: jc.compress(p, w), w)[0])  # noqa: B023
        np.testing.assert_array_equal(eager, jc.pack(p, w).todense())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrow_types_pack_exactly(dtype, bits, symmetric):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), dtype)
    p = jc.quantize(bits, symmetric=symmetric)
    packed = jc.pack(p, w)
    assert packed.dtype == dtype
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, w))
    # Packing what is already projected gives the same codes.
    again = p.pack(jc.compress(p, w), p.find(w))
    np.testing.assert_array_equal(again.todense(), packed.todense())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_size(bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    assert jc.pack(jc.quantize(bits), w).nbytes == 64 * 32 * bits // 8 + 32 * 4
    grouped = jc.pack(jc.quantize(bits, group_size=16, symmetric=False), w)
    assert grouped.nbytes == 64 * 32 * bits // 8 + 4 * 32 * (4 + 1)


def test_binary_keeps_zeros_and_is_never_all_zero():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    assert (compress(w, bits=1) != 0).all()
    sparse = jnp.where(w > 0.5, w, 0.0)
    out = compress(sparse, bits=1)
    np.testing.assert_array_equal(out == 0, sparse == 0)
    packed = jc.pack(jc.quantize(1), sparse)
    np.testing.assert_array_equal(packed.todense(), out)


@pytest.mark.parametrize("symmetric", [True, False])
def test_edges(symmetric):
    grid = lambda w, **kw: compress(jnp.asarray(w), bits=4, symmetric=symmetric, **kw)  # noqa: E731
    np.testing.assert_array_equal(grid(np.zeros((3, 2), np.float32)), 0)
    assert grid(np.zeros((0, 2), np.float32)).shape == (0, 2)
    assert grid(np.zeros((0, 2), np.float32), group_size=2).shape == (0, 2)
    np.testing.assert_allclose(grid(np.float32(1.5)), 1.5, rtol=1e-6)
    np.testing.assert_allclose(grid(np.full((4, 2), -0.3, np.float32)), -0.3, rtol=1e-6)
    w = np.array([[np.nan, 1.0, -0.5]], np.float32)
    out = np.asarray(grid(w, axis=None))
    assert np.isnan(out[0, 0])
    assert np.isfinite(out[0, 1:]).all()
    w = np.array([[np.inf, 1.0, -0.5]], np.float32)
    np.testing.assert_allclose(np.asarray(grid(w, axis=None))[0, :2], 1.0, rtol=1e-6)
    tiny = np.full((4, 2), 1e-38, np.float32)
    assert np.isfinite(grid(tiny)).all()
    huge = np.array([[3e38, -3e38]], np.float32)
    assert np.isfinite(grid(huge, axis=None)).all()
    with pytest.raises(ValueError, match="NaN"):
        jc.pack(jc.quantize(4), {"w": jnp.full((64, 64), jnp.nan)})


def test_bits_may_follow_a_schedule():
    p = jc.quantize(lambda step: jnp.where(step < 2, 8, 2))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    assert len(np.unique(jc.compress(p, w, step=3)[:, 0])) <= 3
    assert len(np.unique(jc.compress(p, w, step=1)[:, 0])) > 8


@pytest.mark.parametrize(
    ("kwargs", "kind", "text"),
    [
        ({"bits": 0}, ValueError, "quantize: `bits` must be a real number in \\[1, 8\\], got 0"),
        ({"bits": 16}, ValueError, "bits"),
        ({"bits": None}, TypeError, "bits"),
        ({"axis": 2}, ValueError, "axis of a leaf with 2 dimensions, got 2 at 'w'"),
        ({"axis": 0.5}, TypeError, "axis"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": 4, "group_axis": 3}, ValueError, "group_axis"),
    ],
)
def test_bad_input(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        jc.compress(jc.quantize(**kwargs), {"w": jnp.ones((4, 4))})


def test_small_weights_have_finite_steps_in_groups():
    w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32) * np.float32(1e-3)
    for bits, symmetric in ((2, True), (4, False)):
        p = jc.quantize(bits, group_size=16, symmetric=symmetric)
        params = {"w": jnp.asarray(w)}
        scale = np.asarray(p.find(params)["w"].scale)
        assert np.isfinite(scale).all()
        assert (scale < 1e-2).all()
        out = np.asarray(jc.compress(p, params)["w"])
        assert ((out - w) ** 2).mean() < 0.3 * (w**2).mean()


def test_an_embedding_that_is_selected_is_quantized():
    table = {"embed": {"embedding": jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)))}}
    table = jax.tree.map(lambda x: x.astype(jnp.float32), table)
    p = jc.masked(jc.quantize(8, axis=0), "embed/embedding")
    packed = jc.pack(p, table)
    assert packed["embed"]["embedding"].nbytes == 16 * 8 + 16 * 4
    look_up = lambda params, ids: params["embed"]["embedding"][ids]  # noqa: E731
    ids = jnp.array([3, 0, 3])
    np.testing.assert_array_equal(
        jc.lift(look_up)(packed, ids), look_up(jc.compress(p, table), ids)
    )

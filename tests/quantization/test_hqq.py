"""Half-quadratic quantization against the published iteration in NumPy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

hqq = jc.quantization.hqq


def published(w, bits, p=0.7, beta=10.0, growth=1.01, iterations=20):
    """Badri & Shaji, equations for one group: steps, the best zero point and its error."""
    top = 2**bits - 1
    step = (w.max() - w.min()) / top
    zero, tried = -w.min() / step, []
    for _ in range(iterations + 1):
        codes = np.clip(np.round(w / step + zero), 0, top)
        r = w / step - (codes - zero)
        tried.append((np.sum(np.abs(r) ** p), zero))
        e = np.sign(r) * np.maximum(np.abs(r) - np.maximum(np.abs(r), 1e-30) ** (p - 1) / beta, 0)
        zero, beta = np.mean(codes - w / step + e), beta * growth
    return step, min(tried), tried[0]


def heavy(*shape, seed=0):
    return np.random.default_rng(seed).standard_t(3.0, shape)


@pytest.mark.parametrize(("bits", "p", "iterations"), [(2, 0.7, 20), (4, 0.7, 20), (3, 1.0, 5)])
def test_agrees_with_the_published_iteration(bits, p, iterations):
    w = heavy(64, 8).astype(np.float32)
    made = hqq(bits, group_size=24, p=p, iterations=iterations)
    params = {"w": jnp.asarray(w)}
    grid = made.find(params)["w"]
    new = np.asarray(made.project(params, {"w": grid})["w"], np.float64)
    assert grid.scale.shape == (3, 8)
    gained = same = 0
    for g in range(3):
        rows = slice(24 * g, min(24 * g + 24, 64))
        for j in range(8):
            run = w[rows, j].astype(np.float64)
            step, (least, zero), (first, _) = published(run, bits, p, iterations=iterations)
            np.testing.assert_allclose(grid.scale[g, j], step, rtol=1e-5)
            same += abs(float(grid.zero_point[g, j]) - zero) < 1e-4
            error = np.sum(np.abs((run - new[rows, j]) / step) ** p)
            np.testing.assert_allclose(error, least, rtol=1e-3)
            assert error <= first * (1 + 1e-4)
            gained += error < 0.99 * first
    # The mean magnitude is flat about a median: there many zero points are equally good.
    assert p == 1.0 or same >= 22
    assert gained >= 8


def test_the_error_does_not_depend_on_the_unit_of_the_weights():
    # A power of two changes no bit.
    w = jnp.asarray(heavy(64, 8), jnp.float32)
    one, small = jc.compress(hqq(4), w), jc.compress(hqq(4), w * 2.0**-14)
    np.testing.assert_array_equal(one * 2.0**-14, small)


def test_zeros_equal_runs_and_what_is_not_finite():
    w = heavy(64, 4).astype(np.float32)
    w[::2, 0] = 0.0
    w[:, 1] = 0.3
    w[0, 2], w[1, 3] = np.inf, -np.inf
    p = hqq(3)
    params = {"w": jnp.asarray(w)}
    grids = p.find(params)
    new = np.asarray(p.project(params, grids)["w"])
    assert (new[::2, 0] == 0).all()
    assert (new[1::2, 0] != 0).all()
    np.testing.assert_array_equal(new[:, 1], w[:, 1])
    assert np.isfinite(new).all()
    assert new[0, 2] == new[:, 2].max()
    assert new[1, 3] == new[:, 3].min()
    packed = p.pack(params, grids)["w"]
    np.testing.assert_array_equal(packed.todense(), new)
    assert jc.arrays.is_sparse(packed.codes)
    with pytest.raises(ValueError, match=r"NaN.*at 'w'"):
        p.pack({"w": params["w"].at[0, 0].set(jnp.nan)}, grids)


@pytest.mark.parametrize("bits", [1, 8])
def test_packed_size(bits):
    params = {"w": jnp.asarray(heavy(128, 16), jnp.float32)}
    packed = jc.pack(hqq(bits), params)["w"]
    assert packed.nbytes == 128 * 16 * bits // 8 + 2 * 16 * 8
    np.testing.assert_array_equal(packed.todense(), jc.compress(hqq(bits), params)["w"])


def test_bad_input():
    for options in ({"bits": 9}, {"p": 1.5}, {"growth": 0.5}, {"iterations": -1}, {"beta": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            hqq(**options)

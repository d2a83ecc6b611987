"""A sweep equals a Python loop, whatever the mode, and is traced once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

MODES = [("vmap", None), ("map", None), ("map", 4)]
GRID = {"bits": [2, 3, 8], "clip": np.array([0.5, 1.0], np.float32)}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def counted(f):
    def called(*args, **kwargs):
        called.traces += 1
        return f(*args, **kwargs)

    called.traces = 0
    return called


def study(params, x, *, bits, clip):
    p = jc.quantize(bits, clip=clip, ranges=jc.quantization.min_max)
    small = jc.compress(p, params)
    return {"loss": jnp.mean((x @ (small["w"] - params["w"])) ** 2), "row": small["w"][0]}


@pytest.mark.parametrize(("mode", "batch_size"), MODES)
def test_equals_a_loop_and_is_traced_once(mode, batch_size):
    params, x = {"w": draw(16, 8)}, draw(4, 16, seed=1)
    f = counted(study)
    got = jc.sweep(f, GRID, params, x, mode=mode, batch_size=batch_size)
    jc.sweep(f, GRID, {"w": params["w"] + 1.0}, x, mode=mode, batch_size=batch_size)
    assert f.traces == 1
    assert got["loss"].shape == (3, 2)
    assert got["row"].shape == (3, 2, 8)
    alone = jax.jit(study)
    for (i, bits), (j, clip) in itertools.product(*(enumerate(v) for v in GRID.values())):
        want = alone(params, x, bits=jnp.asarray(bits), clip=jnp.asarray(clip))
        np.testing.assert_allclose(got["loss"][i, j], want["loss"], rtol=1e-5)
        np.testing.assert_array_equal(got["row"][i, j], want["row"])


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_zipped_values_and_the_order_of_the_axes(mode):
    f = lambda *, b, a: 10 * a + b  # noqa: E731
    np.testing.assert_array_equal(
        jc.sweep(f, {"b": [1, 2, 3], "a": [4, 5, 6]}, mode=mode, zipped=True), [41, 52, 63]
    )
    np.testing.assert_array_equal(
        jc.sweep(f, {"b": [1, 2, 3], "a": [4, 5]}, mode=mode), [[41, 51], [42, 52], [43, 53]]
    )


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_keys_and_gradients(mode):
    keys = jax.random.split(jax.random.key(0), 3)
    f = lambda w, *, key, scale: w * scale * jax.random.normal(key)  # noqa: E731
    got = jc.sweep(f, {"key": keys, "scale": [1.0, 2.0]}, jnp.float32(2.0), mode=mode)
    want = [[2.0 * s * jax.random.normal(k) for s in (1.0, 2.0)] for k in keys]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    total = lambda w: jnp.sum(jc.sweep(f, {"key": keys, "scale": [1.0]}, w, mode=mode))  # noqa: E731
    want = sum(jax.random.normal(k) for k in keys)
    np.testing.assert_allclose(jax.grad(total)(jnp.float32(2.0)), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("grid", "options", "kind", "text"),
    [
        ([1, 2], {}, TypeError, "grid"),
        ({}, {}, ValueError, "at least one keyword"),
        ({"a": 1.0}, {}, ValueError, "one dimension.* for 'a'"),
        ({"a": []}, {}, ValueError, "at least one value"),
        ({"a": [1, 2], "b": [1]}, {"zipped": True}, ValueError, "'a': 2, 'b': 1"),
        ({"a": [1]}, {"mode": "loop"}, ValueError, "mode"),
        ({"a": [1]}, {"batch_size": 2}, ValueError, "batch_size.*mode='map'"),
        ({"a": [1]}, {"mode": "map", "batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_input(grid, options, kind, text):
    with pytest.raises(kind, match=text):
        jc.sweep(lambda a, b=0: a, grid, **options)
    with pytest.raises(TypeError, match="function"):
        jc.sweep(None, grid)

"""To and from the installed qwix: values to the last bit, against qwix.dequantize."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

qwix = pytest.importorskip("qwix")
to_qwix, from_qwix = jc.quantization.to_qwix, jc.quantization.from_qwix
MIN_MAX = jc.quantization.min_max


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dequantized(array):
    with jax.numpy_dtype_promotion("standard"):
        return qwix.dequantize(array)


OURS = {
    "int8-channel": jc.quantize(8, ranges=MIN_MAX),
    "int4-groups": jc.quantize(4, group_size=16, ranges=MIN_MAX),
    "int3-leaf": jc.quantize(3, axis=None, ranges=MIN_MAX),
    "uint4-groups": jc.quantize(4, group_size=16, symmetric=False, ranges=MIN_MAX),
    "uint8-channel": jc.quantize(8, symmetric=False, ranges=MIN_MAX),
    "blocks": jc.quantize(4, blocks={0: 16, 1: 4}, ranges=MIN_MAX),
    "binary": jc.quantize(1, ranges=MIN_MAX),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", OURS)
def test_ours_as_theirs_and_back(kind, dtype):
    params = {"a": {"w": draw(32, 8, dtype=dtype)}, "b": draw(8, dtype=dtype)}
    packed = jc.pack(OURS[kind], params)
    theirs = to_qwix(packed)
    array = theirs["a"]["w"]
    assert isinstance(array, qwix.QArray)
    want = packed["a"]["w"].todense()
    np.testing.assert_array_equal(dequantized(array).astype(dtype), want)
    np.testing.assert_array_equal(theirs["b"], params["b"])
    back = from_qwix(theirs)["a"]["w"]
    assert isinstance(back, jc.arrays.Quantized)
    np.testing.assert_array_equal(back.todense().astype(dtype), want)
    if kind != "binary":
        assert back.nbytes == packed["a"]["w"].nbytes


THEIRS = {
    "int8": (jnp.int8, {"channelwise_axes": (1,)}),
    "int4": (jnp.int4, {"tiled_axes": {0: 8}, "channelwise_axes": (1,)}),
    "int4-tiles": (jnp.int4, {"tiled_axes": {0: 8, 1: 4}}),
    "int4-minmax": (jnp.int4, {"tiled_axes": {0: 8}, "calibration_method": "minmax"}),
    "int8-minmax": (jnp.int8, {"calibration_method": "minmax"}),
    "int3": ("int3", {"channelwise_axes": (0,)}),
    "float8": (jnp.float8_e4m3fn, {"channelwise_axes": (1,)}),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_as_ours_and_back(kind, dtype):
    qtype, options = THEIRS[kind]
    w = draw(32, 8, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):
        array = qwix.quantize(w, qtype, **options)
    ours = from_qwix({"w": [array, None]})["w"][0]
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.todense(), dequantized(array))
    back = to_qwix(ours)
    assert back.qtype == array.qtype
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(array), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_a_zero_point_of_another_shape_than_the_scale():
    array = qwix.QArray(
        jnp.arange(-16, 16, dtype=jnp.int8).reshape(8, 4),
        jnp.array([[0.5], [2.0]]),
        jnp.array([[1, 2, 3, 4]], jnp.int8),
    )
    np.testing.assert_array_equal(from_qwix(array).todense(), dequantized(array))


def test_lift_runs_what_came_from_qwix():
    params = {"w": qwix.quantize(draw(32, 8), jnp.int8, channelwise_axes=(1,))}
    x = draw(4, 32, seed=1)
    got = jc.lift(lambda p, x: x @ p["w"])(from_qwix(params), x)
    np.testing.assert_allclose(got, x @ dequantized(params["w"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jc.pack(jc.low_rank(1), {"a": {"w": draw(32, 8)}}), "LowRank.* at 'a/w'"),
        (
            lambda: jc.pack(
                jc.quantize(4, group_size=24, ranges=MIN_MAX), {"a": {"w": draw(32, 8)}}
            ),
            "groups of 24.* at 'a/w'",
        ),
        (
            lambda: jc.pack(jc.quantization.hqq(4, group_size=32), {"a": {"w": draw(32, 8)}}),
            "zero points.* at 'a/w'",
        ),
        (
            lambda: jc.pack(
                jc.chain(jc.prune(0.9), jc.quantize(4, ranges=MIN_MAX)), {"a": {"w": draw(32, 8)}}
            ),
            "BitMasked.* at 'a/w'",
        ),
    ],
    ids=["low-rank", "ragged", "hqq", "sparse"],
)
def test_what_qwix_cannot_express(make, text):
    with pytest.raises(ValueError, match=text):
        to_qwix(make())


def test_what_we_cannot_express():
    array = qwix.quantize(draw(32, 8), "nf4", channelwise_axes=(1,))
    with pytest.raises(ValueError, match="nf4 at 'w'"):
        from_qwix({"w": array})
    with pytest.raises(TypeError, match="traced"):
        jax.jit(from_qwix)(qwix.quantize(draw(8, 8), jnp.int8))


@pytest.mark.parametrize("convert", [to_qwix, from_qwix])
def test_without_qwix(convert, monkeypatch):
    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install qwix"):
        convert({})

"""Codes and steps of other libraries, as installed, and AQT's from its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

CONVENTIONS = {
    "ours": jc.quantization.OURS,
    "qwix": jc.quantization.QWIX,
    "torchao": jc.quantization.TORCHAO,
    "aqt": jc.quantization.AQT,
}


def normal(shape=(64, 32), std=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * std).astype(np.float32)


def found(w, convention, **kwargs):
    """The step, the zero point and the integer codes of the packed array."""
    ranges = jc.quantization.min_max
    p = jc.quantize(convention=CONVENTIONS[convention], ranges=ranges, **kwargs)
    packed = jc.pack(p, {"w": jnp.asarray(w)})["w"]
    np.testing.assert_array_equal(packed.todense(), jc.compress(p, {"w": jnp.asarray(w)})["w"])
    return packed.scale, packed.zero_point, np.asarray(jc.todense(packed.codes))


def same_steps(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs, np.float32).reshape(ours.shape)
    np.testing.assert_array_less(np.abs(ours - theirs), 2.01 * np.spacing(theirs))


def same_codes(ours, theirs, w, scale):
    """Exactly, but where a weight lies within 1e-5 of the middle between two codes."""
    steps = np.asarray(w, np.float64) / np.asarray(scale, np.float64)
    clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-5
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours[clear], theirs[clear])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("std", [1.0, 1e-3])
def test_qwix_symmetric(bits, std):
    qwix = pytest.importorskip("qwix")
    w = normal(std=std)
    kind = {8: jnp.int8, 4: jnp.int4}.get(bits, f"int{bits}")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qwix.quantize(jnp.asarray(w), kind, channelwise_axes=[1])
        groups = qwix.quantize(jnp.asarray(w), kind, channelwise_axes=[1], tiled_axes={0: 16})
    scale, _, codes = found(w, "qwix", bits=bits)
    same_steps(scale, theirs.scale)
    same_codes(codes, np.asarray(theirs.qvalue.astype(jnp.int32)), w, scale)
    scale, _, codes = found(w, "qwix", bits=bits, group_size=16)
    same_steps(scale, groups.scale)
    spread = np.repeat(np.asarray(scale), 16, 0)
    same_codes(codes, np.asarray(groups.qvalue.astype(jnp.int32)), w, spread)


@pytest.mark.parametrize("bits", [4, 8])
def test_qwix_asymmetric(bits):
    qwix = pytest.importorskip("qwix")
    w = normal() + 0.5
    kind = {8: jnp.int8, 4: jnp.int4}[bits]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = qwix.quantize(
            jnp.asarray(w), kind, channelwise_axes=[1], calibration_method="minmax"
        )
    scale, zero, codes = found(w, "qwix", bits=bits, symmetric=False)
    shift = 2 ** (bits - 1)
    same_steps(scale, theirs.scale)
    np.testing.assert_array_equal(
        zero.astype(jnp.int32) - shift, theirs.zero_point.astype(jnp.int32)
    )
    same_codes(codes.astype(int) - shift, np.asarray(theirs.qvalue.astype(jnp.int32)), w, scale)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("std", [1.0, 1e-8])
@pytest.mark.filterwarnings("ignore")
def test_torchao(bits, symmetric, std):
    torch = pytest.importorskip("torch")
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = normal(std=std) + np.float32(0 if symmetric else 0.4 * std)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    kind = torchao.MappingType.SYMMETRIC if symmetric else torchao.MappingType.ASYMMETRIC
    given = torch.tensor(w)
    scale, zero = torchao.choose_qparams_affine(
        given, kind, (64, 1), torch.int32, quant_min=low, quant_max=high, keepdim=True
    )
    theirs = torchao.quantize_affine(
        given, (64, 1), scale, zero, torch.int32, quant_min=low, quant_max=high
    ).numpy()
    ours, point, codes = found(w, "torchao", bits=bits, symmetric=symmetric)
    same_steps(ours, scale.numpy())
    if not symmetric:
        np.testing.assert_array_equal(np.asarray(point).ravel(), zero.numpy().ravel())
    same_codes(codes, theirs, w, scale.numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_aqt(bits):
    w = normal()
    scale, _, codes = found(w, "aqt", bits=bits)
    top = 2 ** (bits - 1) - 1
    exact = np.abs(w.astype(np.float64)).max(0, keepdims=True) / (top + 0.5)
    np.testing.assert_allclose(scale, exact, rtol=3e-7)
    # Clipped before it is rounded: no code is -top - 1.
    want = np.rint(np.clip(w / exact, -top, top))
    same_codes(codes, want, w, exact)
    assert np.abs(codes).max() == top


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_do_not_depend_on_the_transformation(convention, symmetric):
    w = jnp.asarray(normal((256, 64)))
    p = jc.quantize(4, convention=CONVENTIONS[convention], symmetric=symmetric)
    eager = jc.compress(p, w)
    np.testing.assert_array_equal(eager, jax.jit(lambda w: jc.compress(p, w))(w))
    np.testing.assert_array_equal(eager, jax.vjp(lambda w: jc.compress(p, w), w)[0])
    np.testing.assert_array_equal(eager, p.project(eager, p.find(w)))


def test_ours_has_no_tie_at_the_largest_weight():
    w = normal((4096, 8))
    for bits in range(2, 9):
        _, _, codes = found(w, "ours", bits=bits)
        largest = np.take_along_axis(codes, np.abs(w).argmax(0)[None], 0)
        np.testing.assert_array_equal(np.abs(largest), 2 ** (bits - 1) - 1)


def test_bad_input():
    with pytest.raises(TypeError, match="quantize: `convention` must be a Convention"):
        jc.quantize(4, convention="qwix")

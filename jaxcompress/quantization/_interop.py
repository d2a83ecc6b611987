"""Arrays of qwix from ours, and ours from those of qwix."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree

_FLOATS = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))


def to_qwix(params: PyTree) -> PyTree:
    r"""Packed leaves as `qwix.QArray`, with the same values.

    What both can express: integers of 1 to 8 bits and float8, with or without zero points, and
    one scale for the leaf, a channel, a group that divides its axis, or a block of such groups.

    Args:
        params: what `jc.pack` gave, or one leaf of it. Dense leaves are left as they are.

    Returns:
        The same tree with `qwix.QArray`s. `qwix.dequantize` of one, cast to the dtype of the
        leaf, is `jc.todense` of ours to the last bit. Its scale, which gives it its own dtype, has
        the dtype of the leaf where that holds the scale exactly, else float32. With a zero point
        codes and zero points become signed, as those of qwix are; a sign is stored in 2 bits.

    Raises:
        ValueError: a compressed leaf that qwix cannot express; its path is named.
        TypeError: a leaf is traced.
        ImportError: qwix is not installed.

    Cost: one pass over the codes, on the host.

    Examples:
        >>> packed = jc.pack(jc.quantize(4, group_size=8), {"w": jnp.eye(16, 4)})
        >>> array = jc.quantization.to_qwix(packed)["w"]
        >>> array.qvalue.dtype, array.scale_tile_shape
        (dtype(int4), (8, 1))

    Source: `qwix.QArray` of qwix 0.1.8, github.com/google/qwix.
    """
    qwix = _qwix("to_qwix")

    def leaf(path: str, x: Any) -> Any:
        if not arrays.is_compressed(x):
            return x
        if any(_check.is_traced(part) for part in jax.tree.leaves(x)):
            rule, got = "be concrete, since packed codes depend on values", "a traced leaf"
            raise TypeError(_check.message("to_qwix", "params", rule, got, path=path))
        return _to_array(qwix, path, x)

    return tree.map_with_path(leaf, params)


def from_qwix(params: PyTree) -> PyTree:
    """`qwix.QArray`s as packed leaves, with the same values: `jc.lift` runs them.

    Args:
        params: any pytree, or one array. What is no `QArray` is left as it is.

    Returns:
        The same tree with `jc.arrays.Quantized` leaves of the dtype of the scales. Integers of
        less than 8 bits are stored in as many; codes with zero points become unsigned.

    Raises:
        ValueError: a type of values other than integers of 2 to 8 bits and float8; the path of
            the leaf is named.
        TypeError: an array is traced.
        ImportError: qwix is not installed.

    Cost: one pass over the codes, on the host.

    Examples:
        >>> import qwix
        >>> array = qwix.quantize(jnp.eye(16, 4), jnp.int4, tiled_axes={0: 8})
        >>> ours = jc.quantization.from_qwix({"w": array})["w"]
        >>> ours.nbytes, bool((ours.todense() == qwix.dequantize(array)).all())
        (40, True)

    Source: as `to_qwix`.
    """
    qwix = _qwix("from_qwix")
    is_one = lambda x: isinstance(x, qwix.QArray)  # noqa: E731

    def leaf(path: str, x: Any) -> Any:
        return _from_array(path, x) if is_one(x) else x

    return tree.map_with_path(leaf, params, is_leaf=is_one)


def _qwix(function: str) -> Any:
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ImportError(
            f"{function}: `qwix` must be installed, got {error!r}. Run pip install qwix."
        ) from error


def _to_array(qwix: Any, path: str, leaf: Any) -> Any:
    def refuse(got: str, fix: str = "Leave this leaf out, or make it dense.") -> ValueError:
        rule = "hold what a qwix.QArray can express"
        return ValueError(_check.message("to_qwix", "params", rule, got, fix, path=path))

    if not isinstance(leaf, arrays.Quantized):
        raise refuse(f"a {type(leaf).__name__}")
    plain = isinstance(leaf.codes, arrays.Packed) or not arrays.is_compressed(leaf.codes)
    if not plain:
        raise refuse(f"codes that are a {type(leaf.codes).__name__}")
    for axis, size in arrays.group_pairs(leaf.group):
        if leaf.shape[axis] % size:
            raise refuse(f"groups of {size} of {leaf.shape[axis]} entries along axis {axis}")
    scale = np.asarray(arrays.todense(leaf.scale)).astype(np.float32)
    narrow = scale.astype(leaf.dtype)
    scale = narrow if (narrow.astype(np.float32) == scale).all() else scale
    codes = np.asarray(arrays.todense(leaf.codes))
    if codes.dtype in _FLOATS:
        return qwix.QArray(jnp.asarray(codes), jnp.asarray(scale), None, codes.dtype)
    bits = leaf.codes.bits if isinstance(leaf.codes, arrays.Packed) else 8
    codes, zero_point = codes.astype(np.int32), None
    if leaf.binary:
        bits, codes = 2, 2 * codes - 1
    elif leaf.zero_point is not None:
        zero_point = np.asarray(leaf.zero_point).astype(np.float32)
        shift = 0 if _signed(leaf.codes) else 1 << (bits - 1)
        codes, zero_point = codes - shift, zero_point - shift
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        whole = (zero_point == np.round(zero_point)).all()
        if not whole or not ((low <= zero_point) & (zero_point <= high)).all():
            raise refuse("zero points that are no integers of the width of the codes")
    elif not _signed(leaf.codes):
        # Unsigned without a zero point: qwix has types for whole bytes and halves of them.
        wide = jnp.uint8 if bits > 4 else jnp.uint4
        return qwix.QArray(jnp.asarray(codes).astype(wide), jnp.asarray(scale), None, wide)
    bits = max(bits, 2)
    stored = jnp.int4 if bits <= 4 else jnp.int8
    kind = stored if bits in (4, 8) else f"int{bits}"
    if zero_point is not None:
        zero_point = jnp.asarray(zero_point.astype(np.int32)).astype(stored)
    return qwix.QArray(jnp.asarray(codes).astype(stored), jnp.asarray(scale), zero_point, kind)


def _from_array(path: str, x: Any) -> arrays.Quantized:
    if any(_check.is_traced(part) for part in jax.tree.leaves(x)):
        rule, got = "be concrete, since packed shapes depend on values", "a traced array"
        raise TypeError(_check.message("from_qwix", "params", rule, got, path=path))
    shape, dtype = tuple(x.qvalue.shape), np.dtype(x.scale.dtype)
    sizes = x.scale.shape
    if x.zero_point is not None:
        sizes = tuple(map(math.lcm, sizes, x.zero_point.shape))
    pairs = []
    for axis, (length, count) in enumerate(zip(shape, sizes, strict=True)):
        if count not in (1, length):
            pairs.append((axis, length // count))
    group = None if not pairs else pairs[0] if len(pairs) == 1 else tuple(pairs)
    scale = jnp.asarray(_repeated(np.asarray(x.scale).astype(np.float32), sizes))
    kind = x.qtype if isinstance(x.qtype, str) else np.dtype(x.qtype)
    if kind in _FLOATS or kind == "mxfp8":
        return arrays.Quantized(x.qvalue, scale, None, dtype, group)
    bits, signed = _width(path, kind)
    codes = np.asarray(x.qvalue.astype(jnp.int32))
    zero_point = None
    if x.zero_point is not None:
        shift = 1 << (bits - 1) if signed else 0
        zero_point = _repeated(np.asarray(x.zero_point.astype(jnp.int32)), sizes) + shift
        codes, zero_point, signed = codes + shift, jnp.asarray(zero_point.astype(np.uint8)), False
    codes = codes.astype(np.int8 if signed else np.uint8)
    codes = jnp.asarray(codes) if bits == 8 else arrays.pack_bits(codes, bits, signed=signed)
    return arrays.Quantized(codes, scale, zero_point, dtype, group)


def _width(path: str, kind: Any) -> tuple[int, bool]:
    """Bits of the codes and whether they are signed."""
    name = kind if isinstance(kind, str) else kind.name
    bits = name.removeprefix("u").removeprefix("int")
    if bits not in "2 3 4 5 6 7 8".split() or "int" not in name:
        rule, fix = "hold integers of 2 to 8 bits or float8", "Call qwix.dequantize for this leaf."
        raise ValueError(_check.message("from_qwix", "params", rule, name, fix, path=path))
    return int(bits), not name.startswith("u")


def _signed(codes: Any) -> bool:
    return codes.dtype == np.int8


def _repeated(x: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """`x` with each entry repeated until it has these sizes."""
    for axis, size in enumerate(sizes):
        # A size of one is broadcast over the leaf; there is nothing to repeat.
        if x.shape[axis] != size:
            x = np.repeat(x, size // x.shape[axis], axis=axis)
    return x

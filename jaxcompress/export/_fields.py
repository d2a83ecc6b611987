"""The fields of compressed arrays: which there are, and what must hold between them.

Saving and loading check the same rules, on arrays whose parts are NumPy arrays: a file that
could not be loaded is never written, and a crafted one never becomes an array.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays import (
    NM,
    BitMasked,
    BlockSparse,
    Codebook,
    ConvChain,
    LowRank,
    Packed,
    Quantized,
    Rescaled,
    Rotated,
    Sum,
    group_pairs,
    hadamard_order,
    is_sparse,
)
from jaxcompress.arrays._convolutions import broken_rule

# Class, parts (arrays or nested compressed arrays) and static fields of each kind in a file.
KINDS: dict[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "packed": (Packed, ("planes",), ("shape", "signed")),
    "bit_masked": (BitMasked, ("values", "mask"), ("shape",)),
    "block_sparse": (BlockSparse, ("values", "mask"), ("block", "shape")),
    "nm": (NM, ("values", "indices"), ("n", "m", "axis", "shape")),
    "quantized": (Quantized, ("codes", "scale", "zero_point"), ("dtype", "group", "binary")),
    "low_rank": (LowRank, ("u", "v"), ()),
    "conv_chain": (ConvChain, ("stages",), ("groups",)),
    "codebook": (Codebook, ("codes", "values"), ("dtype",)),
    "rescaled": (Rescaled, ("inner", "scale"), ("dtype",)),
    "rotated": (Rotated, ("inner", "signs"), ("axis", "order", "dtype")),
    "sum": (Sum, ("parts",), ()),
}

# What codes and scales of a quantized array may be besides integers and float32.
_NARROW = tuple(np.dtype(x) for x in (jnp.float8_e4m3fn, jnp.float8_e5m2))
_SCALES = tuple(np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float8_e8m0fnu))

# No array of this many entries exists; larger sizes overflow in the compiler.
_MOST_ENTRIES = 1 << 40

_NAMES = (
    "bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 float16 float32"
    " float64 bfloat16 complex64 complex128 float8_e3m4 float8_e4m3 float8_e4m3b11fnuz"
    " float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn"
)
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name if hasattr(np, name) else getattr(jnp, name))
    for name in _NAMES.split()
    if hasattr(np, name) or hasattr(jnp, name)
}


def require(holds: Any, rule: str) -> None:
    """Refuses a file or an array by its rule; the caller adds the path."""
    if not holds:
        raise ValueError(rule)


def static_to_json(name: str, value: Any) -> Any:
    """A static field as JSON."""
    if name in ("shape", "block", "groups"):
        return [int(v) for v in value]
    if name == "group":
        several = value is not None and any(isinstance(v, tuple) for v in value)
        one = lambda pair: [int(v) for v in pair]  # noqa: E731
        return None if value is None else [one(v) for v in value] if several else one(value)
    if name == "dtype":
        return np.dtype(value).name
    return bool(value) if name in ("signed", "binary") else int(value)


def static_from_json(name: str, value: Any) -> Any:
    """A static field back from JSON, its type checked."""
    if name in ("shape", "group", "block", "groups"):
        if name == "group" and value is None:
            return None
        if name == "group" and isinstance(value, list) and value and isinstance(value[0], list):
            return tuple(static_from_json(name, pair) for pair in value)
        natural = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
        require(natural, f"`{name}` must be a list of natural numbers")
        return tuple(value)
    if name == "dtype":
        return dtype(value)
    expected = bool if name in ("signed", "binary") else int
    require(type(value) is expected, f"`{name}` must be {expected.__name__}")
    return value


def dtype(name: Any) -> np.dtype:
    """The dtype of a name; refuses what no array of ours has."""
    require(isinstance(name, str) and name in DTYPES, f"`dtype` must be known, got {name!r}")
    return DTYPES[name]


def check(x: Any) -> None:
    """Refuses a compressed array whose fields contradict each other.

    Args:
        x: a compressed array with parts that are NumPy arrays or checked compressed arrays.
    """
    _CHECKS[type(x)](x)
    shape = x.shape
    most = max(math.prod(shape), *shape, 0)
    require(most <= _MOST_ENTRIES, f"the shape must have at most 2**40 entries, got {shape}")


def _check_packed(x: Packed) -> None:
    require(_plain(x.planes) and x.planes.dtype == np.uint8, "`planes` must be uint8")
    bits = len(x.planes) if x.planes.ndim else 0
    require(1 <= bits <= 8, "`planes` must have 1 to 8 rows")
    expected = (bits, -(-math.prod(x.shape) // 8))
    require(x.planes.shape == expected, f"`planes` must have the shape {expected}")


def _check_bit_masked(x: BitMasked) -> None:
    _require_entries(x.values)
    _require_packed("mask", x.mask, x.shape)
    require(len(x.mask.planes) == 1, "`mask` must have one bit")
    kept = int(np.unpackbits(x.mask.planes[0], count=math.prod(x.shape)).sum())
    require(x.values.shape == (kept,), f"`values` must have one entry per kept one, {kept}")


def _check_block_sparse(x: BlockSparse) -> None:
    require(1 <= len(x.block) <= len(x.shape), "`block` must have sizes for axes of `shape`")
    lead = len(x.shape) - len(x.block)
    fits = all(1 <= b <= max(n, 1) for b, n in zip(x.block, x.shape[lead:], strict=True))
    require(fits, f"`block` must have sizes from 1 to those of {x.shape[lead:]}")
    _require_entries(x.values)
    grid = tuple(-(-n // b) for n, b in zip(x.shape, (1,) * lead + x.block, strict=True))
    _require_packed("mask", x.mask, grid)
    require(len(x.mask.planes) == 1, "`mask` must have one bit")
    kept = int(np.unpackbits(x.mask.planes[0], count=math.prod(grid)).sum())
    expected = (kept, *x.block)
    require(x.values.shape == expected, f"`values` must have the shape {expected}")


def _check_nm(x: NM) -> None:
    require(1 <= x.m <= 256 and 0 <= x.n <= x.m, "`n` and `m` must have 0 <= n <= m <= 256")
    require(0 <= x.axis < len(x.shape), "`axis` must be an axis of `shape`")
    rest = math.prod(x.shape[: x.axis] + x.shape[x.axis + 1 :])
    groups = rest * -(-x.shape[x.axis] // x.m)
    slots = groups * x.n
    _require_entries(x.values)
    require(x.values.shape == (slots,), f"`values` must have one entry per slot, {slots}")
    _require_packed("indices", x.indices, (slots,))
    bits = max(1, (x.m - 1).bit_length())
    require(len(x.indices.planes) == bits, f"`indices` must have {bits} bits")
    if not slots:
        return
    place = np.sort(_integers(x.indices).reshape(groups, x.n), axis=1)
    require(place.max() < x.m, f"`indices` must be below m = {x.m}")
    require((np.diff(place, axis=1) > 0).all(), "`indices` must be distinct in each group")


def _check_quantized(x: Quantized) -> None:
    require(jnp.issubdtype(x.dtype, jnp.floating), "`dtype` must be floating point")
    if isinstance(x.codes, Codebook):
        require(x.codes.dtype == np.float32, "`codes` that are a codebook must be float32")
        alone = x.zero_point is None and not x.binary
        require(alone, "`zero_point` must be None for codes that are a codebook")
    else:
        _require_codes(x.codes, _NARROW)
    floats = jnp.issubdtype(x.codes.dtype, jnp.floating)
    require(not (x.binary and floats), "`binary` codes must be integer")
    shape, grouped = list(x.codes.shape), _require_groups(x.group, len(x.codes.shape))
    for axis, size in grouped.items():
        shape[axis] = -(-shape[axis] // size)
    nested = isinstance(x.scale, Quantized) and x.scale.dtype == np.float32
    plain = _plain(x.scale) and x.scale.dtype in _SCALES
    require(nested or plain, "`scale` must be float32, a narrower float or float32 `Quantized`")
    fits = len(x.scale.shape) == len(shape) and all(
        s == full or (s == 1 and i not in grouped)
        for i, (s, full) in enumerate(zip(x.scale.shape, shape, strict=True))
    )
    require(fits, f"`scale` must have 1 or all entries along each axis of {tuple(shape)}")
    if x.zero_point is not None:
        real = _plain(x.zero_point) and (
            jnp.issubdtype(x.zero_point.dtype, jnp.integer) or x.zero_point.dtype == np.float32
        )
        require(real, "`zero_point` must be integer or float32")
        require(x.zero_point.shape == x.scale.shape, "`zero_point` must have the shape of `scale`")


def _require_groups(group: Any, ndim: int) -> dict[int, int]:
    """The sizes of groups by their axes."""
    rule = "`group` must have an axis of the codes and a size of at least 1 in each pair"
    pairs = group_pairs(group)
    require(all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs), rule)
    fits = all(isinstance(v, (int, np.integer)) for pair in pairs for v in pair)
    require(fits and all(0 <= axis < ndim and size >= 1 for axis, size in pairs), rule)
    require(len(dict(pairs)) == len(pairs), "`group` must have distinct axes")
    return dict(pairs)


def _check_low_rank(x: LowRank) -> None:
    for name, part in (("u", x.u), ("v", x.v)):
        real = hasattr(part, "dtype") and jnp.issubdtype(part.dtype, jnp.floating)
        require(real, f"`{name}` must be floating point")
    require(len(x.u.shape) >= 1 and len(x.v.shape) == 2, "`u` must have axes, `v` two of them")
    require(x.u.shape[-1] == x.v.shape[0], "`u` and `v` must have the same rank")


def _check_conv_chain(x: ConvChain) -> None:
    require(isinstance(x.stages, tuple) and len(x.stages) > 0, "`stages` must be one or more")
    real = all(hasattr(s, "dtype") and jnp.issubdtype(s.dtype, jnp.floating) for s in x.stages)
    require(real, "`stages` must be floating point")
    fault = broken_rule(x.stages, x.groups)
    require(fault is None, f"`stages` must {fault}")


def _check_codebook(x: Codebook) -> None:
    _require_codes(x.codes)
    vector = _plain(x.values) and x.values.dtype == np.float32 and x.values.ndim == 1
    require(vector, "`values` must be float32 of one dimension")
    require(jnp.issubdtype(x.dtype, jnp.floating), "`dtype` must be floating point")
    codes = x.codes.values if is_sparse(x.codes) else x.codes
    codes = _integers(codes) if isinstance(codes, Packed) else codes
    # Without any value all is zero, and the slots that NM and blocks leave over hold code 0.
    within = codes.size == 0 or (codes.min() >= 0 and codes.max() < max(1, len(x.values)))
    require(within, f"`codes` must be indices into {len(x.values)} values")


def _check_rescaled(x: Rescaled) -> None:
    _require_inner(x)
    require(_plain(x.scale) and x.scale.dtype == np.float32, "`scale` must be float32")
    shape = x.inner.shape
    fits = len(x.scale.shape) == len(shape) and all(
        s in (1, full) for s, full in zip(x.scale.shape, shape, strict=True)
    )
    require(fits, f"`scale` must have 1 or all entries along each axis of {shape}")


def _check_rotated(x: Rotated) -> None:
    _require_inner(x)
    shape = x.inner.shape
    require(0 <= x.axis < len(shape), "`axis` must be an axis of `inner`")
    require(_plain(x.signs) and x.signs.dtype == np.int8, "`signs` must be int8")
    length = shape[x.axis]
    require(x.signs.shape == (length,), f"`signs` must have {length} entries")
    require((np.abs(x.signs) == 1).all(), "`signs` must be 1 and -1")
    # Of large orders there is none beyond the sizes of arrays, whose divisors are many.
    known = 1 <= x.order <= max(length, 1) and length % x.order == 0
    known = known and x.order < 1 << 24 and hadamard_order(x.order) == x.order
    require(known, f"`order` must divide {length} and be that of a known Hadamard matrix")


def _check_sum(x: Sum) -> None:
    several = isinstance(x.parts, tuple) and len(x.parts) >= 2
    require(several, "`parts` must be two or more")
    real = all(hasattr(p, "dtype") and jnp.issubdtype(p.dtype, jnp.floating) for p in x.parts)
    require(real, "`parts` must be floating point")
    same = len({(tuple(p.shape), p.dtype) for p in x.parts}) == 1
    require(same, "`parts` must have one shape and dtype")


def _require_inner(x: Any) -> None:
    require(jnp.issubdtype(x.dtype, jnp.floating), "`dtype` must be floating point")
    real = hasattr(x.inner, "dtype") and jnp.issubdtype(x.inner.dtype, jnp.floating)
    require(real, "`inner` must be floating point")


_CHECKS = {
    Packed: _check_packed,
    BitMasked: _check_bit_masked,
    BlockSparse: _check_block_sparse,
    NM: _check_nm,
    Quantized: _check_quantized,
    LowRank: _check_low_rank,
    Codebook: _check_codebook,
    ConvChain: _check_conv_chain,
    Rescaled: _check_rescaled,
    Rotated: _check_rotated,
    Sum: _check_sum,
}


def _plain(x: Any) -> bool:
    return isinstance(x, np.ndarray)


def _require_packed(name: str, x: Any, shape: tuple[int, ...]) -> None:
    fits = isinstance(x, Packed) and x.shape == shape and not x.signed
    require(fits, f"`{name}` must be unsigned packed bits of shape {shape}")


def _require_entries(x: Any) -> None:
    require(_plain(x) or isinstance(x, Packed), "`values` must be an array or packed bits")


def _require_codes(x: Any, floats: tuple[np.dtype, ...] = ()) -> None:
    known = _plain(x) or isinstance(x, Packed) or is_sparse(x)
    require(known, "`codes` must be an array, packed bits or a sparse array")
    fits = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype in floats
    require(fits, f"`codes` must be integer{' or float8' if floats else ''}")


def _integers(x: Packed) -> np.ndarray:
    """The integers of packed bits, flat, computed apart from `todense`."""
    planes = np.unpackbits(x.planes, axis=1, count=math.prod(x.shape)).astype(np.int16)
    weights = [1 << j for j in range(len(planes))]
    weights[-1] *= -1 if x.signed else 1
    return sum(
        (plane * np.int16(w) for plane, w in zip(planes, weights, strict=True)),
        np.zeros(math.prod(x.shape), np.int16),
    )

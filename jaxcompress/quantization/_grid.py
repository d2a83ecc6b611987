"""The grid of a leaf: the structure that integer quantization finds."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check, arrays
from jaxcompress._sharding import automatic
from jaxcompress.projections import RowRule


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point", "bits"],
    meta_fields=["group"],
)
@dataclasses.dataclass(frozen=True)
class Grid:
    r"""Uniform steps: :math:`\hat w = (c - z)\,\Delta` with integer codes :math:`c`.

    Attributes:
        scale: :math:`\Delta`, float32, of the rank of the leaf (size 1 along shared axes).
        zero_point: :math:`z`, float32 holding integers, of the shape of `scale`; None for a
            symmetric grid.
        bits: :math:`b`, int32 scalar.
        group: static. `(axis, size)` where a step is shared by runs along an axis, or None.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    bits: jax.Array
    group: tuple[int, int] | None = None

    def project(self, w: jax.Array) -> jax.Array:
        """The nearest point of the grid; an exact zero stays zero and NaN stays NaN."""
        scale, zero_point = self._expanded(w)
        codes = self._codes(w, scale, zero_point)
        shifted = codes if zero_point is None else codes - zero_point
        return (shifted * scale).astype(w.dtype)

    def pack(self, w: Any, path: str) -> arrays.Quantized:
        """Integer codes at the width of the grid, sparse where `w` is sparse."""
        dense = arrays.todense(w)
        refuse_nan(dense, path)
        bits, symmetric = int(self.bits), self.zero_point is None
        scale, zero_point = self._expanded(dense)
        codes = self._codes(dense, scale, zero_point)
        binary = symmetric and bits == 1
        pattern = pattern_without_zeros(w, dense) if binary else pattern_of(w)
        if binary:
            codes = codes > 0
        signed = symmetric and not binary
        codes = codes.astype(jnp.int8 if signed else jnp.uint8)
        if pattern is not None:
            codes = arrays.with_entries(
                pattern, codes, bits=bits if bits < 8 else None, signed=signed
            )
        elif bits < 8:
            codes = arrays.pack_bits(codes, bits, signed=signed)
        zero = None if self.zero_point is None else self.zero_point.astype(jnp.uint8)
        return arrays.Quantized(
            codes, self.scale, zero, dtype=np.dtype(dense.dtype), group=self.group, binary=binary
        )

    def _codes(self, w: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        # A product with 1/scale, for XLA may or may not turn a quotient into one: the codes
        # must not depend on whether the call is jitted.
        steps = w.astype(jnp.float32) * (1.0 / scale)
        levels = _levels(self.bits)
        if zero_point is not None:
            return jnp.clip(jnp.round(steps) + zero_point, 0.0, levels)
        top = _levels(self.bits - 1)
        return jnp.where(self.bits == 1, jnp.sign(steps), jnp.clip(jnp.round(steps), -top, top))

    def _expanded(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        expand = functools.partial(arrays.expand_groups, shape=w.shape, group=self.group)
        zero_point = None if self.zero_point is None else expand(self.zero_point)
        return expand(self.scale), zero_point


def fit_grid(
    w: jax.Array,
    bits: jax.Array,
    *,
    shared: tuple[int, ...],
    group: tuple[int, int] | None,
    symmetric: bool,
) -> Grid:
    """The grid that just covers the finite entries of `w` and has a point at zero.

    Args:
        w: any shape, any float dtype; the statistics are taken in float32.
        bits: int32 scalar, 1 to 8; may be traced.
        shared: static. The axes along which one step serves all.
        group: static. `(axis, size)` of runs that share a step, or None.
        symmetric: static. Whether the zero point is zero.

    Returns:
        The `Grid`. All-zero, empty and non-finite runs get the step 1.
    """
    if group is None:
        return _fit(w, bits, shared, group, symmetric)
    return automatic(
        lambda w, bits: _fit(w, bits, shared, group, symmetric), w, bits, like_first=False
    )


def _fit(w, bits, shared, group, symmetric) -> Grid:
    x = w.astype(jnp.float32)
    x = jnp.where(jnp.isfinite(x), x, 0.0)
    if group is not None:
        x, shared = _split_groups(x, *group), _shift(shared, group[0]) + (group[0] + 1,)
    reduce = functools.partial(_reduce, axes=shared, group=group)
    if symmetric:
        magnitude = jnp.abs(x)
        absmax = reduce(jnp.max, magnitude)
        mean = reduce(jnp.sum, magnitude) * (
            1.0 / jnp.maximum(reduce(jnp.sum, (x != 0).astype(jnp.float32)), 1.0)
        )
        scale = jnp.where(bits == 1, mean, absmax * (1.0 / jnp.maximum(_levels(bits - 1), 1.0)))
        return Grid(_safe(scale), None, bits, group)
    inverse = 1.0 / _levels(bits)
    low, high = reduce(jnp.min, x), reduce(jnp.max, x)
    scale = _safe(high * inverse - low * inverse)
    zero_point = jnp.clip(jnp.round(-low * (1.0 / scale)), 0.0, _levels(bits))
    return Grid(scale, zero_point, bits, group)


def _levels(bits: jax.Array) -> jax.Array:
    """2^bits - 1 in float32, exactly."""
    return (jnp.left_shift(jnp.int32(1), bits) - 1).astype(jnp.float32)


def _safe(scale: jax.Array) -> jax.Array:
    smallest = float(np.finfo(np.float32).tiny)
    return jnp.where(scale > 0, jnp.maximum(scale, smallest), 1.0)


def _reduce(f, x: jax.Array, *, axes: tuple[int, ...], group: tuple[int, int] | None) -> jax.Array:
    # The range always holds zero, which also serves for empty runs.
    out = f(x, axis=axes, keepdims=True, initial=0.0)
    return out if group is None else jnp.squeeze(out, group[0] + 1)


def _shift(axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(a if a <= axis else a + 1 for a in axes)


def _split_groups(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`[.., length, ..]` as `[.., groups, size, ..]`, filled up with zeros."""
    groups = -(-x.shape[axis] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, groups * size - x.shape[axis])
    return jnp.pad(x, padding).reshape(x.shape[:axis] + (groups, size) + x.shape[axis + 1 :])


def pattern_of(w: Any) -> Any:
    """The sparse array that holds the entries of `w`, or None for a dense leaf."""
    inner = w.codes if isinstance(w, (arrays.Quantized, arrays.Codebook)) else w
    return inner if arrays.is_sparse(inner) else None


def pattern_without_zeros(w: Any, dense: jax.Array) -> Any:
    """A pattern that leaves out every exact zero, for codes that have none for it."""
    pattern, present = pattern_of(w), dense != 0
    if pattern is not None:
        return arrays.restrict(pattern, present)
    return None if bool(present.all()) else arrays.bit_mask(dense, present)


def refuse_nan(dense: jax.Array, path: str) -> None:
    """Refuses to store NaN as an integer: no code stands for it."""
    if bool(jnp.isnan(dense).any()):
        raise ValueError(
            _check.message(
                "pack",
                "params",
                "be free of NaN to be stored as codes",
                _check.describe(dense) + " with NaN",
                "The run diverged.",
                path=path,
            )
        )


def grid_rows(w: jax.Array, grid: Grid) -> dict[str, jax.Array]:
    """The grid of every entry of `w`, for `row_rule`."""
    scale, zero_point = grid._expanded(w)
    data = {"scale": jnp.broadcast_to(scale, w.shape), "bits": grid.bits}
    if zero_point is not None:
        data["zero_point"] = jnp.broadcast_to(zero_point, w.shape)
    return data


def _choose_grid(data, rows, diagonal, start, features):
    del diagonal, features
    cut = lambda x: x if x.ndim == 0 else lax.dynamic_slice_in_dim(x, start, rows.shape[0])  # noqa: E731
    return jax.tree.map(cut, data)


def _round_row(row: jax.Array, data: dict[str, jax.Array], i: jax.Array) -> jax.Array:
    mine = {k: x if x.ndim == 0 else x[i] for k, x in data.items()}
    # A row that fills up the last block has the scale zero.
    scale = jnp.where(mine["scale"] > 0, mine["scale"], 1.0)
    return Grid(scale, mine.get("zero_point"), mine["bits"]).project(row)


row_rule = RowRule(_choose_grid, _round_row)
"""Each row on the grid that was fitted before any was changed: GPTQ with fixed steps."""

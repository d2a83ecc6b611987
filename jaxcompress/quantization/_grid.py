"""The grid of a leaf: the structure that integer quantization finds."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import arrays
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.quantization._conventions import (
    OURS,
    Convention,
    codes_of,
    step_of,
    zero_point_of,
)
from jaxcompress.quantization._formats import Format
from jaxcompress.quantization._pack import (
    packed_codes,
    pattern_of,
    pattern_without_zeros,
    refuse_nan,
)
from jaxcompress.quantization._ranges import Ranges, SmallestError, absmax, min_max, mse
from jaxcompress.quantization._runs import Runs, split, squeezed
from jaxcompress.quantization._scales import packed_steps, rounded_steps


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point", "bits", "second"],
    meta_fields=["group", "convention", "scales"],
)
@dataclasses.dataclass(frozen=True)
class Grid:
    r"""Uniform steps: :math:`\hat w = (c - z)\,\Delta` with integer codes :math:`c`.

    Attributes:
        scale: :math:`\Delta`, float32, of the rank of the leaf (size 1 along shared axes).
        zero_point: :math:`z`, float32 holding integers, of the shape of `scale`; None for a
            symmetric grid.
        bits: :math:`b`, int32 scalar.
        second: what the steps are multiples of, float32 of size 1; None where they are not.
        group: static. `(axis, size)` where a step is shared by runs along an axis, several of
            those for blocks, or None.
        convention: static. How it rounds.
        scales: static. The format that steps are stored in; None for float32.
    """

    scale: jax.Array
    zero_point: jax.Array | None
    bits: jax.Array
    second: jax.Array | None = None
    group: arrays.Groups = None
    convention: Convention = OURS
    scales: Format | None = None

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
        codes = packed_codes(codes, pattern, bits, signed=signed)
        zero = None if self.zero_point is None else self.zero_point.astype(jnp.uint8)
        scale = packed_steps(self.scale, self.second, self.scales)
        return arrays.Quantized(codes, scale, zero, np.dtype(dense.dtype), self.group, binary)

    def _codes(self, w: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        return codes_of(w, scale, zero_point, self.bits, self.convention)

    def _expanded(self, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        expand = functools.partial(arrays.expand_groups, shape=w.shape, group=self.group)
        zero_point = None if self.zero_point is None else expand(self.zero_point)
        return expand(self.scale), zero_point


class Fit(NamedTuple):
    """How a grid is fitted to a run of weights.

    Attributes:
        symmetric: static. Whether the zero point is zero.
        clip: the factor on the range; may be traced.
        ranges: static. See `_ranges`; None: the smallest squared error up to 4 bits, all of the
            weights above.
        convention: static.
        scales: static. The format of the steps; None for float32.
    """

    symmetric: bool = True
    clip: ArrayLike = 1.0
    ranges: Ranges | None = None
    convention: Convention = OURS
    scales: Format | None = None


def fit_grid(w: jax.Array, bits: int | jax.Array, runs: Runs, fit: Fit) -> Grid:
    """The grid of the finite entries of `w`, which has a point at zero.

    Args:
        w: any shape, any float dtype; the statistics are taken in float32.
        bits: an integer, 1 to 8, or an int32 scalar; may be traced.
        runs: static. Which weights share a step.
        fit: how.

    Returns:
        The `Grid`. All-zero, empty and non-finite runs get the step 1.
    """
    ranges = fit.ranges
    if ranges is None and isinstance(bits, int):
        ranges = mse() if bits <= 4 else min_max
    given = w, jnp.asarray(bits, jnp.int32), jnp.asarray(fit.clip, jnp.float32)
    static = fit._replace(clip=1.0, ranges=ranges)
    # A range of the user's own may close over traced values.
    ours = ranges in (None, min_max, absmax) or isinstance(ranges, SmallestError)
    return (_compiled if ours else _fit)(*given, runs, static)


def _fit(w: jax.Array, bits: jax.Array, clip: jax.Array, runs: Runs, fit: Fit) -> Grid:
    def alone(w, bits, clip):
        return _grid(w, bits, clip, runs, fit)

    if runs.group is None and fit.ranges in (min_max, absmax):
        return alone(w, bits, clip)
    return automatic(alone, w, bits, clip, like_first=False)


_compiled = jax.jit(_fit, static_argnums=(3, 4))


def _grid(w: jax.Array, width: jax.Array, clip: jax.Array, runs: Runs, fit: Fit) -> Grid:
    x = w.astype(jnp.float32)
    x = jnp.where(jnp.isfinite(x), x, jnp.nan)
    x, axes = split(x, runs)

    def error(low, high):
        scale = step_of(low, high, width, fit.symmetric, fit.convention)
        zero_point = None if fit.symmetric else zero_point_of(low, scale, width)
        codes = codes_of(x, scale, zero_point, width, fit.convention)
        codes = codes if zero_point is None else codes - zero_point
        squares = (codes * scale - x) ** 2
        return jnp.sum(jnp.where(jnp.isnan(x), 0.0, squares), axis=axes, keepdims=True)

    low, high = _range(x, axes, error, width, fit.ranges)
    low, high = low * clip, high * clip
    scale = step_of(low, high, width, fit.symmetric, fit.convention)
    if fit.symmetric:
        sizes = {"axis": axes, "keepdims": True, "where": ~jnp.isnan(x)}
        total = jnp.sum(jnp.abs(x), **sizes)
        present = jnp.sum((x != 0).astype(jnp.float32), **sizes)
        mean = total * (1.0 / jnp.maximum(present, 1.0)) * clip
        scale = jnp.where(width == 1, jnp.where(mean > 0, mean, 1.0), scale)
    scale, second = rounded_steps(scale, fit.scales)
    zero_point = None if fit.symmetric else squeezed(zero_point_of(low, scale, width), runs)
    second = None if second is None else squeezed(second, runs)
    scale = squeezed(scale, runs)
    return Grid(scale, zero_point, width, second, runs.group, fit.convention, fit.scales)


def _range(x, axes, error, bits: jax.Array, ranges: Ranges | None):
    if ranges is not None:
        return ranges(x, axes, error)
    return lax.cond(bits <= 4, lambda: mse()(x, axes, error), lambda: min_max(x, axes, error))

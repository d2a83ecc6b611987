"""The grid of a leaf whose codes are narrow floats or indices into a table."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import arrays, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import RowRule, Rows
from jaxcompress.quantization._formats import E8M0, Format
from jaxcompress.quantization._pack import (
    packed_codes,
    pattern_of,
    pattern_without_zeros,
    refuse_nan,
)
from jaxcompress.quantization._ranges import Ranges
from jaxcompress.quantization._runs import Runs, split, squeezed
from jaxcompress.quantization._scales import TINY, in_two, pack_scales

# Its inverse is the smallest normal float32: a denormal one would count as zero.
_LARGEST = 2.0**126


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "second"],
    meta_fields=["format", "scales", "group"],
)
@dataclasses.dataclass(frozen=True)
class FloatGrid:
    r"""Values of a format times scales: :math:`\hat w = v\,s`, or :math:`v\,s\,s_2`.

    Attributes:
        scale: :math:`s`, float32, of the rank of the leaf (size 1 along shared axes), holding
            values of `scales`.
        second: :math:`s_2`, float32 of size 1, or None for 1.
        format: static. That of the codes.
        scales: static. That of `scale`; None for any float32.
        group: static. `(axis, size)` where a scale is shared by runs along an axis, several of
            those for blocks, or None.
    """

    scale: jax.Array
    second: jax.Array | None
    format: Format
    scales: Format | None = None
    group: arrays.Groups = None

    def project(self, w: jax.Array) -> jax.Array:
        """The nearest value; an exact zero stays zero and NaN stays NaN."""
        scale = self._expanded(w)
        return (self._values(w, scale) * scale).astype(w.dtype)

    def pack(self, w: Any, path: str) -> arrays.Quantized:
        """Codes as a float8 array or as packed indices, sparse where `w` is sparse."""
        dense, kind = arrays.todense(w), self.format
        refuse_nan(dense, path)
        values = np.asarray(self._values(dense, self._expanded(dense)))
        pattern = pattern_of(w) if 0.0 in kind.values else pattern_without_zeros(w, dense)
        if kind.dtype is not None:
            codes = jnp.asarray(values).astype(kind.dtype)
            codes = codes if pattern is None else arrays.with_entries(pattern, codes)
        else:
            codes = packed_codes(kind.codes(values), pattern, kind.bits, signed=False)
            book = jnp.asarray(kind.codebook())
            codes = arrays.Codebook(codes, book, np.dtype(np.float32))
        scale = pack_scales(self.scale, self.second, self.scales)
        return arrays.Quantized(codes, scale, None, np.dtype(dense.dtype), self.group)

    def _values(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        # A product with 1/scale, as in `Grid`: the same with and without jit.
        x = w.astype(jnp.float32)
        values = self.format.round(x * (1.0 / scale))
        return values if 0.0 in self.format.values else jnp.where(x == 0, 0.0, values)

    def _expanded(self, w: jax.Array) -> jax.Array:
        scale = self.scale if self.second is None else self.scale * self.second
        return arrays.expand_groups(scale, shape=w.shape, group=self.group)


def fit_float_grid(
    w: jax.Array,
    clip: ArrayLike,
    runs: Runs,
    kind: Format,
    scales: Format | None,
    ranges: Ranges,
) -> FloatGrid:
    """The grid of the finite entries of `w`.

    Args:
        w: any shape, any float dtype; the statistics are taken in float32.
        clip: the factor on the range; may be traced.
        runs: static. Which weights share a scale.
        kind: static. The format of the codes.
        scales: static. The format of the scales, or None.
        ranges: static. See `_ranges`.

    Returns:
        The `FloatGrid`. All-zero, empty and non-finite runs get the scale 1.
    """

    def fit(w, clip):
        x = w.astype(jnp.float32)
        x, axes = split(jnp.where(jnp.isfinite(x), x, jnp.nan), runs)

        def error(low, high):
            grid = FloatGrid(*round_scales(jnp.maximum(-low, high), kind, scales), kind)
            squares = (grid.project(x) - x) ** 2
            return jnp.sum(jnp.where(jnp.isnan(x), 0.0, squares), axis=axes, keepdims=True)

        low, high = ranges(x, axes, error)
        scale, second = round_scales(jnp.maximum(-low, high), kind, scales, clip)
        second = None if second is None else squeezed(second, runs)
        return FloatGrid(squeezed(scale, runs), second, kind, scales, runs.group)

    return automatic(fit, w, jnp.asarray(clip, jnp.float32), like_first=False)


def round_scales(
    largest: jax.Array, kind: Format, scales: Format | None, clip: ArrayLike = 1.0
) -> tuple[jax.Array, jax.Array | None]:
    r"""Scales in a format of their own: what takes the largest weights to that of the codes.

    .. math:: s = \mathrm{clip} \cdot \max|w| / v_{\max}

    In `E8M0` :math:`\log_2 s = \lfloor\log_2(\mathrm{clip} \max|w|)\rfloor -
    \lfloor\log_2 v_{\max}\rfloor`; in another format to the nearest of :math:`s / s_2`, where
    :math:`s_2 = \max s / s_{\max}` makes the largest of them the largest of the format.

    Args:
        largest: the largest magnitude of each run, float32.
        kind: static. The format of the codes.
        scales: static. The format of the scales; None for float32.
        clip: a scalar.

    Returns:
        Scales of the shape of `largest`, 1 where that is zero; and the second one, of size 1, or
        None.
    """
    clip = jnp.asarray(clip, jnp.float32)
    powers = scales == E8M0
    top = 2.0 ** math.floor(math.log2(kind.max)) if powers else kind.max
    # The scalars first: constants that XLA could join must not change the rounding.
    scale = jnp.minimum(largest * (clip * np.float32(1.0 / top)), _LARGEST)
    if scales is None or powers:
        scale = jnp.maximum(scales.round(scale) if scales else scale, TINY)
        return jnp.where(largest > 0, scale, 1.0), None
    scale, second = in_two(scale, scales)
    return jnp.where(largest > 0, scale, 1.0), second


def float_rows(kind: Format, params: PyTree, grids: PyTree) -> Rows:
    """Each row on the grid that was fitted before any was changed: GPTQ with static groups."""
    data, held = {}, {}

    def leaf(path, w, grid):
        held[path] = grid
        data[path] = jnp.broadcast_to(grid._expanded(w), w.shape)

    tree.map_arrays_with_path(leaf, params, grids)
    return Rows(_row_rule(kind), data, {}, structure=lambda path, chosen: held[path])


@functools.lru_cache(maxsize=128)
def _row_rule(kind: Format) -> RowRule:
    """One object for each format, so that layers of one shape share a compiled loop."""

    def choose(scale, rows, diagonal, start, features):
        del diagonal, features
        return lax.dynamic_slice_in_dim(scale, start, rows.shape[0])

    def project(row, scale, i):
        # A row that fills up the last block has the scale zero.
        return FloatGrid(jnp.where(scale[i] > 0, scale[i], 1.0), None, kind).project(row)

    return RowRule(choose, project)

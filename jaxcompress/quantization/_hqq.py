"""Half-quadratic quantization: zero points fitted to a norm that forgives outliers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check, arrays, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, number_at, of_leaves
from jaxcompress.quantization._conventions import levels
from jaxcompress.quantization._pack import (
    packed_codes,
    pattern_of,
    pattern_without_zeros,
    refuse_nan,
)
from jaxcompress.quantization._runs import Granularity, Runs, split, squeezed


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scale", "zero_point", "bits"],
    meta_fields=["group"],
)
@dataclasses.dataclass(frozen=True)
class OffsetGrid:
    r"""Uniform steps from any offset: :math:`\hat w = (c - z)\,\Delta`, z not an integer.

    Zero is no point of such a grid, but an exact zero stays zero: it is stored as absent.

    Attributes:
        scale: :math:`\Delta`, float32, of the rank of the leaf (size 1 along shared axes).
        zero_point: :math:`z`, float32, of the shape of `scale`.
        bits: :math:`b`, int32 scalar.
        group: static. As in `Grid`.
    """

    scale: jax.Array
    zero_point: jax.Array
    bits: jax.Array
    group: arrays.Groups = None

    def project(self, w: jax.Array) -> jax.Array:
        """The nearest point of the grid; an exact zero stays zero and NaN stays NaN."""
        x = w.astype(jnp.float32)
        scale, zero_point = self._expanded(w)
        value = (_codes(x, scale, zero_point, self.bits) - zero_point) * scale
        return jnp.where(x == 0, x, value).astype(w.dtype)

    def pack(self, w: Any, path: str) -> arrays.Quantized:
        """Unsigned codes and float32 zero points, sparse where exact zeros are off the grid."""
        dense = arrays.todense(w)
        refuse_nan(dense, path)
        x, bits = dense.astype(jnp.float32), int(self.bits)
        scale, zero_point = self._expanded(dense)
        codes = _codes(x, scale, zero_point, self.bits)
        # A zero that a code stands for needs no place of its own.
        on_grid = jnp.where((codes == zero_point) & (x == 0), jnp.ones_like(x), x)
        if pattern_of(w) is not None or bool((on_grid == 0).any()):
            pattern = pattern_without_zeros(w, on_grid)
        else:
            pattern = None
        codes = codes.astype(jnp.uint8)
        codes = packed_codes(codes, pattern, bits, signed=False)
        dtype = np.dtype(dense.dtype)
        return arrays.Quantized(codes, self.scale, self.zero_point, dtype=dtype, group=self.group)

    def _expanded(self, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        expand = functools.partial(arrays.expand_groups, shape=w.shape, group=self.group)
        return expand(self.scale), expand(self.zero_point)


def hqq(
    bits: Numeric = 4,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = 64,
    group_axis: int = -2,
    p: Numeric = 0.7,
    beta: Numeric = 10.0,
    growth: Numeric = 1.01,
    iterations: int = 20,
) -> Projection:
    r"""Integers with zero points that minimize a p-norm of the error, without any data.

    .. math:: \min_z \sum_i |w_i - (c_i - z)\,\Delta|^p, \qquad
        c = \mathrm{clip}(\lfloor w / \Delta + z \rceil,\ 0,\ 2^b - 1)

    With p below 1 large errors count for little: outliers may be clipped or lie off the grid where
    the others gain. :math:`\Delta = (\max w - \min w) / (2^b - 1)` stays, and from
    :math:`z = -\min w / \Delta` on, the residual r, in steps, is split from its
    outliers e:

    .. math:: r = w / \Delta - (c - z), \qquad
        e = \mathrm{sign}(r) \max\left(|r| - |r|^{p-1} / \beta,\ 0\right), \qquad
        z \leftarrow \overline{c - w / \Delta + e}, \qquad \beta \leftarrow \kappa \beta

    Of all the zero points on the way each run of weights keeps the one with the least error.

    Args:
        bits: :math:`b`, 1 to 8. A number, a JAX scalar or an Optax schedule; may be traced.
        axis: static. As in `jc.quantize`, where `group_size` is None.
        group_size: static. As in `jc.quantize`.
        group_axis: static. As in `jc.quantize`.
        p: in (0, 1]. May be traced.
        beta: :math:`\beta`, above 0. The larger, the more residuals count as outliers: those
            above :math:`\beta^{-1/(2-p)}` steps. May be traced.
        growth: :math:`\kappa`, at least 1. May be traced.
        iterations: static. 0 is rounding to nearest on the range of the weights.

    Returns:
        A projection whose structure has an `OffsetGrid` for each leaf. The p-norm of the error
        of no run is larger than with the first zero point. Ranges and means are of the finite
        weights that are not exactly zero: those stay zero, whatever the grid, and are stored as
        absent. NaN stays NaN and is refused by `pack`; an infinite weight goes to the end of the
        grid. A run of equal weights stays as it is. Where all weights of a run are far from zero,
        next to their range, the grid is as fine as the leaf's dtype lets it be.

    Raises:
        ValueError: a number out of range; an axis that a leaf does not have.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` is two elementwise passes and reductions an iteration, with powers; `project` is
    one elementwise pass.

    Examples:
        >>> w = jax.random.t(jax.random.key(0), 3.0, (256, 8))
        >>> loss = lambda p: float(jnp.mean(jnp.abs(jc.compress(p, w) - w) ** 0.7))
        >>> plain = jc.quantization.hqq(3, iterations=0)
        >>> loss(jc.quantization.hqq(3)) < loss(plain)
        True
        >>> jc.pack(jc.quantization.hqq(4), w).zero_point.dtype
        dtype('float32')

    Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models",
    mobiusml.github.io/hqq_blog. Differs: residuals are in steps, where the authors'
    :math:`\beta` has the unit of the weights and takes small ones for no outliers ever; the
    number of iterations is fixed and each run keeps its best zero point, where they stop when
    the mean error of the leaf grows; the first zero point is never rounded; zeros stay zero.
    """
    _check.numeric("hqq", "bits", bits, 1, 8)
    _check.numeric("hqq", "p", p, 0, 1)
    _check.numeric("hqq", "beta", beta, 0)
    _check.numeric("hqq", "growth", growth, 1)
    _check.integer("hqq", "iterations", iterations, 0)
    granularity = Granularity(axis, group_size, group_axis, None)
    granularity.check("hqq")

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        width = jnp.clip(jnp.round(number_at(bits, step).astype(jnp.float32)), 1, 8)
        numbers = [number_at(x, step).astype(jnp.float32) for x in (p, beta, growth)]

        def leaf(path, w) -> OffsetGrid:
            _check.floating("hqq", "params", w, path)
            runs = granularity.of("hqq", w, path)
            fit = functools.partial(_fit, runs=runs, iterations=iterations)
            return automatic(fit, w, width.astype(jnp.int32), *numbers, like_first=False)

        return tree.map_arrays_with_path(leaf, params)

    return of_leaves(find)


def _codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array, bits: jax.Array) -> jax.Array:
    # A product with 1/scale, so that codes do not depend on whether the call is jitted.
    return jnp.clip(jnp.round(x * (1.0 / scale) + zero_point), 0.0, levels(bits))


@functools.partial(jax.jit, static_argnames=("runs", "iterations"))
def _fit(
    w: jax.Array,
    bits: jax.Array,
    p: jax.Array,
    beta: jax.Array,
    growth: jax.Array,
    *,
    runs: Runs,
    iterations: int,
) -> OffsetGrid:
    x, axes = split(w.astype(jnp.float32), runs)
    used = jnp.isfinite(x) & (x != 0)
    x = jnp.where(used, x, 0.0)
    over = functools.partial(jnp.sum, axis=axes, keepdims=True)
    count = jnp.maximum(over(used.astype(jnp.float32)), 1.0)
    low = jnp.min(x, axis=axes, keepdims=True, where=used, initial=jnp.inf)
    high = jnp.max(x, axis=axes, keepdims=True, where=used, initial=-jnp.inf)
    low, high = (jnp.where(low > high, 0.0, end) for end in (low, high))
    inverse = 1.0 / levels(bits)
    scale = high * inverse - low * inverse
    smallest = float(np.finfo(np.float32).tiny)
    # A run of equal weights: code 0 is their value.
    scale = jnp.where(scale > 0, jnp.maximum(scale, smallest), 1.0)
    steps = x * (1.0 / scale)
    start = -low * (1.0 / scale)

    def residual(zero_point):
        codes = _codes(x, scale, zero_point, bits)
        return codes, steps - (codes - zero_point)

    def error(residuals):
        size = jnp.abs(residuals)
        return over(jnp.where(used & (size > 0), jnp.where(size > 0, size, 1.0) ** p, 0.0))

    def iterate(carry, _):
        zero_point, beta, best, least = carry
        codes, left = residual(zero_point)
        now = error(left)
        best, least = jnp.where(now < least, zero_point, best), jnp.minimum(now, least)
        size = jnp.abs(left)
        root = jnp.where(size > 0, size, 1.0) ** (p - 1.0)
        shrunk = jnp.sign(left) * jnp.maximum(size - root / beta, 0.0)
        ideal = jnp.where(used, codes - steps + shrunk, 0.0)
        return (over(ideal) / count, beta * growth, best, least), None

    carry = (start, beta, start, jnp.full_like(start, jnp.inf))
    (last, _, best, least), _ = lax.scan(iterate, carry, length=iterations)
    better = error(residual(last)[1]) < least
    zero_point = jnp.where(better & (high > low), last, best)
    return OffsetGrid(squeezed(scale, runs), squeezed(zero_point, runs), bits, runs.group)

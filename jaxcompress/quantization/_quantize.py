"""Integer quantization as a projection."""

import numbers
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import Projection, by_leaf, number_at, of_leaves
from jaxcompress.quantization._conventions import OURS, Convention
from jaxcompress.quantization._formats import Format
from jaxcompress.quantization._grid import Fit, Grid, fit_grid
from jaxcompress.quantization._ranges import Ranges
from jaxcompress.quantization._row_rules import rows_by
from jaxcompress.quantization._runs import Granularity, Runs


def quantize(
    bits: Numeric | Mapping[str, Numeric] = 8,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    group_axis: int = -2,
    blocks: Mapping[int, int] | None = None,
    symmetric: bool = True,
    clip: Numeric = 1.0,
    ranges: Ranges | None = None,
    convention: Convention = OURS,
    scales: Format | None = None,
) -> Projection:
    r"""Rounds weights to a uniform grid of :math:`2^b` points or fewer.

    .. math:: \hat w = (c - z)\,\Delta, \qquad c = \mathrm{clip}(\lfloor w / \Delta \rceil + z)

    over a range [low, high] that holds zero. Symmetric: :math:`z = 0`,
    :math:`\Delta = \max(-low, high) / (2^{b-1} - 1)`, codes in :math:`\pm(2^{b-1} - 1)`.
    Asymmetric: :math:`\Delta = (high - low) / (2^b - 1)`,
    :math:`z = \lfloor -low / \Delta \rceil`, codes in :math:`[0, 2^b - 1]`. Rounding is
    half to even. One bit, symmetric, is binary: :math:`\hat w = \mathrm{sign}(w)\,\Delta` with
    :math:`\Delta` the mean magnitude of the non-zero weights; two bits are ternary. Zero is
    always a point of the grid, so sparse leaves stay sparse. `jaxcompress.quantization` has the
    whole specification.

    Args:
        bits: :math:`b`, width of the stored integers, 1 to 8. A number, a JAX scalar or an
            Optax schedule; may be traced. Rounded to an integer; a traced value outside of
            [1, 8] counts as the nearer end. Or a mapping from the path of each chosen leaf to
            one of these: mixed precision.
        axis: static. One step for each index of this axis or these axes (the default is the
            output channel of Flax's layouts); None: one for the whole leaf. A leaf with fewer
            than two dimensions has one.
        group_size: static. One step for each run of this many weights along `group_axis`, for
            each index of all other axes; `axis` is then not used. The last run is shorter
            where the size does not divide.
        group_axis: static. The default is the axis that is summed over in Flax's layouts.
        blocks: static. From an axis to the number of consecutive entries along it that share a
            step, whatever `axis` says of it: `{-2: 128, -1: 128}` for square blocks,
            `{-1: outputs // groups}` for the groups of a convolution. Ragged ones are as above.
        symmetric: static.
        clip: a factor on the range, above 0. May be a schedule, may be traced.
        ranges: static. Which range is covered: `jc.quantization.min_max`, `absmax`,
            `percentile(q)`, `mse()`, or a function of your own of that form. None: `mse()` at
            4 bits and below, `min_max` above; where `bits` is traced both are in the program.
        convention: static. `jc.quantization.QWIX`, `TORCHAO` or `AQT` for their codes.
        scales: static. The format that steps are rounded to and stored in, 8 bits each:
            `jc.quantization.E8M0` for powers of two, `E4M3` for multiples of one float32
            (double quantization). None: float32.

    Returns:
        A projection whose structure has a `Grid` per leaf, with
        :math:`|\hat w - w| \le \Delta / 2` within the range, up to rounding (not for one bit).
        Ranges come from finite entries; an infinite one goes to the end of the range; NaN stays
        NaN, and `pack` refuses it. An all-zero leaf stays zero. Empty leaves and scalars are fine.

    Raises:
        ValueError: `bits` or `clip` is a number out of range; an axis that a leaf does not have;
            both of `group_size` and `blocks`; a mapping that lacks a leaf or names one that is
            not chosen.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` is one reduction, or with `mse` 20 of them in a loop; `project` is one
    elementwise pass, in float32. In training hold the grid with `jc.every`, or use `min_max`.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -0.6], [0.2, 0.4]])}
        >>> jc.compress(jc.quantize(bits=2, ranges=jc.quantization.min_max), params)["w"]
        Array([[ 1. , -0.6],
               [ 0. ,  0.6]], dtype=float32)
        >>> jax.vmap(lambda b: jc.compress(jc.quantize(b), params)["w"])(jnp.arange(1, 9)).shape
        (8, 2, 2)

    Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.1 and 2.2; one bit from
    Rastegari et al. 2016, arXiv:1603.05279, section 3.1. Differs: an exact zero stays zero at
    one bit, and the mean is taken without it.
    """
    _require_bits(bits)
    _check.numeric("quantize", "clip", clip, 0)
    granularity = Granularity(axis, group_size, group_axis, blocks)
    granularity.check("quantize")
    if ranges is not None and not callable(ranges):
        rule, got = "be a range function or None", _check.describe(ranges)
        fix = "Pass jc.quantization.min_max, absmax, percentile(q) or mse()."
        raise TypeError(_check.message("quantize", "ranges", rule, got, fix))
    if not isinstance(convention, Convention):
        rule, got = "be a Convention", _check.describe(convention)
        fix = "Pass jc.quantization.OURS, QWIX, TORCHAO or AQT."
        raise TypeError(_check.message("quantize", "convention", rule, got, fix))
    if scales is not None and (not isinstance(scales, Format) or scales.dtype is None):
        rule, got = "be a format of 8 bits or None", _check.describe(scales)
        fix = "Pass jc.quantization.E8M0 or E4M3."
        raise TypeError(_check.message("quantize", "scales", rule, got, fix))

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        fit = Fit(symmetric, number_at(clip, step), ranges, convention, scales)
        widths = _widths(bits, params, step)

        def leaf(path, w) -> Grid:
            _check.floating("quantize", "params", w, path)
            return fit_grid(w, widths[path], granularity.of("quantize", w, path), fit)

        return tree.map_arrays_with_path(leaf, params)

    def rows(params, *, step=0):
        runs: dict[str, Runs] = {}
        along = lambda path, w: runs.update({path: granularity.of("quantize", w, path)})  # noqa: E731
        tree.map_arrays_with_path(along, params)
        fit = Fit(symmetric, number_at(clip, step), ranges, convention, scales)
        return rows_by(params, _widths(bits, params, step), runs, fit)

    return of_leaves(find, rows=rows)


def _require_bits(bits: Numeric | Mapping[str, Numeric]) -> None:
    if isinstance(bits, Mapping):
        for path, each in bits.items():
            _check.numeric("quantize", f"bits[{path!r}]", each, 1, 8)
    else:
        _check.numeric("quantize", "bits", bits, 1, 8)


def _widths(bits, params: PyTree, step) -> dict[str, int | jax.Array]:
    """The width of each leaf by its path: an integer where it is known before tracing."""

    def width(each: Numeric) -> int | jax.Array:
        if isinstance(each, numbers.Real):
            return round(float(each))
        rounded = jnp.round(number_at(each, step).astype(jnp.float32))
        return jnp.clip(rounded, 1, 8).astype(jnp.int32)

    given = by_leaf("quantize", "bits", bits, params)
    if not isinstance(bits, Mapping):
        return dict.fromkeys(given, width(bits))
    return {path: width(each) for path, each in given.items()}

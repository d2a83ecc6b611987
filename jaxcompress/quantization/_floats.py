"""Narrow floats and tables of values, with scales per channel, group or block."""

from collections.abc import Mapping
from typing import Any

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, number_at, of_leaves
from jaxcompress.quantization._float_grid import (
    FloatGrid,
    fit_float_grid,
    float_rows,
)
from jaxcompress.quantization._formats import E2M1, E4M3, E5M2, E8M0, NF4, Format
from jaxcompress.quantization._ranges import Ranges, absmax
from jaxcompress.quantization._runs import Granularity


def floats(
    format: Format,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    group_axis: int = -2,
    blocks: Mapping[int, int] | None = None,
    scales: Format | None = None,
    clip: Numeric = 1.0,
    ranges: Ranges = absmax,
) -> Projection:
    r"""Rounds weights to the values of a format, times a scale for each run of them.

    .. math:: \hat w = s\,v, \qquad v = \mathrm{round}(w / s), \qquad
        s = \mathrm{clip} \cdot \max|w| / v_{\max}

    to the nearest value of the format, of two equally near ones to the even code, and to the
    last one beyond the ends. Scales may be rounded to a format themselves:

    - `E8M0`, a power of two: :math:`\log_2 s = \lfloor\log_2(\mathrm{clip}\max|w|)\rfloor -
      \lfloor\log_2 v_{\max}\rfloor`, so that the largest weights of a run may be clipped;
    - `E4M3` or `E5M2`: a second scale in float32 serves the whole leaf and takes the largest to
      the end of the format (double quantization).

    Zero stays zero, so sparse leaves stay sparse.

    Args:
        format: static. `E4M3`, `E5M2`, `E2M3`, `E3M2`, `E2M1` or `NF4` of `jc.quantization`, or
            what `jc.quantization.table` makes.
        axis: static. As in `jc.quantize`: one scale for each index of it; None: one in all.
        group_size: static. As in `jc.quantize`: one scale for each run of this many weights.
        group_axis: static. The axis of those runs.
        blocks: static. As in `jc.quantize`: `{-2: 128, -1: 128}` for square blocks.
        scales: static. `E8M0`, `E4M3`, `E5M2`; None: float32.
        clip: a factor on the range, above 0. May be a schedule, may be traced.
        ranges: static. Which range is covered, to both sides, as in `jc.quantize`.

    Returns:
        A projection whose structure has a `FloatGrid` per leaf. An infinite weight goes to the
        end of the range, which finite ones set; NaN stays NaN, and `pack` refuses it. All-zero,
        empty and scalar leaves are fine. `pack` gives float8 arrays for the 8-bit floats and
        else packed indices into a codebook; for a float these are its bits, sign first.

    Raises:
        TypeError: `format` or `scales` is no such format; a chosen leaf is not real floating
            point; raised while tracing.
        ValueError: `clip` is a number below 0; an axis that a leaf does not have; both of
            `group_size` and `blocks`.

    Cost: `find` is one reduction (more by `ranges`), `project` one elementwise pass, in float32.

    Examples:
        >>> params = {"w": jnp.array([[6.0, -2.4], [0.7, 0.1]])}
        >>> jc.compress(jc.quantization.floats(jc.quantization.E2M1, axis=None), params)["w"]
        Array([[ 6. , -2. ],
               [ 0.5,  0. ]], dtype=float32)

    Source: Micikevicius et al. 2022, arXiv:2209.05433; Rouhani et al. 2023, arXiv:2310.10537;
    Dettmers et al. 2023, arXiv:2305.14314. Differs: a run of zeros has the scale 1.
    """
    return _floats("floats", format, (axis, group_size, group_axis, blocks), scales, clip, ranges)


def fp8(
    format: Format = E4M3,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    group_axis: int = -2,
    blocks: Mapping[int, int] | None = None,
    clip: Numeric = 1.0,
) -> Projection:
    r"""8-bit floats with a float32 scale: `floats` of `E4M3` or `E5M2`.

    Args:
        format: static. `jc.quantization.E4M3` or `E5M2`.
        axis: static. As in `floats`; None for one scale per leaf.
        group_size: static. As in `floats`.
        group_axis: static. As in `floats`.
        blocks: static. As in `floats`; `{-2: 128, -1: 128}` are those of DeepSeek-V3.
        clip: as in `floats`.

    Returns:
        The projection; `pack` gives `arrays.Quantized` with a float8 array.

    Raises:
        TypeError: `format` is not one of the two.
        ValueError: as `floats`.

    Cost: as `floats`.

    Examples:
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 256).reshape(16, 16)}
        >>> jc.pack(jc.quantization.fp8(), params)["w"].codes.dtype
        dtype(float8_e4m3fn)

    Source: Micikevicius et al. 2022, arXiv:2209.05433; blocks from DeepSeek-AI 2024,
    arXiv:2412.19437, section 3.3.
    """
    if format not in (E4M3, E5M2):
        rule = "be jc.quantization.E4M3 or E5M2"
        raise TypeError(_check.message("fp8", "format", rule, _check.describe(format)))
    return _floats("fp8", format, (axis, group_size, group_axis, blocks), None, clip, absmax)


def mx(
    format: Format = E2M1, *, block_size: int = 32, group_axis: int = -2, clip: Numeric = 1.0
) -> Projection:
    r"""Microscaling (MX): blocks of 32 narrow floats that share a power of two.

    Args:
        format: static. `E2M1` for MXFP4, 4.25 bits per weight; `E2M3` or `E3M2` for MXFP6;
            `E4M3` or `E5M2` for MXFP8.
        block_size: static. 32 in the specification; a last block is shorter where that does not
            divide the axis.
        group_axis: static. The axis that blocks lie along, by default the one that is summed
            over in Flax's layouts.
        clip: as in `floats`.

    Returns:
        The projection; `pack` gives `arrays.Quantized` with float8_e8m0fnu scales.

    Raises:
        TypeError: `format` is no `Format`, or that of scales alone.
        ValueError: as `floats`.

    Cost: as `floats`.

    Examples:
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)}
        >>> packed = jc.pack(jc.quantization.mx(), params)["w"]
        >>> packed.codes.nbytes + packed.scale.nbytes == 4096 * 4.25 / 8 + 64
        True

    Source: OCP microscaling formats (MX) specification v1.0; Rouhani et al. 2023,
    arXiv:2310.10537, section 3. The scale is that of the specification, section 6.3. Differs: a
    block of zeros has the scale 1, and scales end at 2^-126 and 2^126.
    """
    return _floats("mx", format, (None, block_size, group_axis, None), E8M0, clip, absmax)


def nvfp4(*, group_axis: int = -2, clip: Numeric = 1.0) -> Projection:
    r"""NVFP4: blocks of 16 `E2M1` floats with an `E4M3` scale each, and a float32 one for all.

    .. math:: s_2 = \max|w| / (448 \cdot 6), \qquad
        s = \mathrm{round}_{E4M3}(\max_{\mathrm{block}}|w| / (6\,s_2))

    The second scale makes the error follow the weights, however small these are. 4.5 bits per
    weight.

    Args:
        group_axis: static. The axis that blocks lie along, by default the one that is summed
            over in Flax's layouts.
        clip: as in `floats`.

    Returns:
        The projection; in `pack` the scale of `arrays.Quantized` is itself such an array.

    Raises:
        ValueError: as `floats`.

    Cost: as `floats`.

    Examples:
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)}
        >>> packed = jc.pack(jc.quantization.nvfp4(), params)["w"]
        >>> packed.codes.nbytes + packed.scale.nbytes == 4096 * 4.5 / 8 + 64 + 4
        True

    Source: NVIDIA 2025, arXiv:2509.25149, appendix B. Differs: the scale of a block that is too
    small for `E4M3` is its smallest positive value, so that nothing is divided by zero.
    """
    return _floats("nvfp4", E2M1, (None, 16, group_axis, None), E4M3, clip, absmax)


def nf4(
    *,
    group_size: int = 64,
    group_axis: int = -2,
    double: bool = False,
    clip: Numeric = 1.0,
) -> Projection:
    r"""NormalFloat: 16 quantiles of the normal distribution, in groups of 64.

    Args:
        group_size: static. Weights along `group_axis` that share a scale.
        group_axis: static. As in `floats`.
        double: static. Whether the scales are `E4M3` with a float32 one for all: 4.13 bits per
            weight in place of 4.5.
        clip: as in `floats`.

    Returns:
        The projection; `pack` gives `arrays.Quantized` with a 4-bit `arrays.Codebook`.

    Raises:
        ValueError: as `floats`.

    Cost: as `floats`.

    Examples:
        >>> params = {"w": jnp.linspace(-1.0, 1.0, 4096).reshape(64, 64)}
        >>> jc.pack(jc.quantization.nf4(), params)["w"].codes.codes.bits
        4

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3. Differs: groups lie along an
    axis, not in the order of memory; doubly quantized scales are floats with one second scale,
    not blocks of 256 around their mean.
    """
    scales = E4M3 if double else None
    return _floats("nf4", NF4, (None, group_size, group_axis, None), scales, clip, absmax)


def _floats(
    function: str,
    kind: Any,
    granularity: tuple[Any, ...],
    scales: Format | None,
    clip: Numeric,
    ranges: Ranges,
) -> Projection:
    if not isinstance(kind, Format) or kind == E8M0:
        rule, got = "be a Format for weights", _check.describe(kind)
        fix = "Pass jc.quantization.E2M1 or another, or jc.quantization.table(values)."
        raise TypeError(_check.message(function, "format", rule, got, fix))
    if scales not in (None, E8M0, E4M3, E5M2):
        rule, got = "be None, E8M0, E4M3 or E5M2", _check.describe(scales)
        raise TypeError(_check.message(function, "scales", rule, got))
    if not callable(ranges):
        rule, got = "be a range function", _check.describe(ranges)
        fix = "Pass jc.quantization.absmax, percentile(q) or mse()."
        raise TypeError(_check.message(function, "ranges", rule, got, fix))
    _check.numeric(function, "clip", clip, 0)
    wanted = Granularity(*granularity)
    wanted.check(function)

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        factor = number_at(clip, step)

        def leaf(path, w) -> FloatGrid:
            _check.floating(function, "params", w, path)
            return fit_float_grid(w, factor, wanted.of(function, w, path), kind, scales, ranges)

        return tree.map_arrays_with_path(leaf, params)

    def rows(params, *, step=0):
        return float_rows(kind, params, find(params, step=step))

    return of_leaves(find, rows=rows)

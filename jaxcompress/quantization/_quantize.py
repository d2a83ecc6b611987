"""Integer quantization as a projection."""

import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, Rows, number_at, of_leaves
from jaxcompress.quantization._grid import Grid, fit_grid, grid_rows, row_rule


def quantize(
    bits: Numeric = 8,
    *,
    axis: int | tuple[int, ...] | None = -1,
    group_size: int | None = None,
    group_axis: int = -2,
    symmetric: bool = True,
) -> Projection:
    r"""Rounds weights to a uniform grid of :math:`2^b` points or fewer.

    .. math:: \hat w = (c - z)\,\Delta, \qquad c = \mathrm{clip}(\lfloor w / \Delta \rceil + z)

    Symmetric: :math:`z = 0`, :math:`\Delta = \max|w| / (2^{b-1} - 1)`, codes in
    :math:`\pm(2^{b-1} - 1)`. Asymmetric: :math:`\Delta = (\max(w, 0) - \min(w, 0)) / (2^b - 1)`,
    :math:`z = \lfloor -\min(w, 0) / \Delta \rceil`, codes in :math:`[0, 2^b - 1]`. Rounding is
    half to even. One bit, symmetric, is binary: :math:`\hat w = \mathrm{sign}(w)\,\Delta` with
    :math:`\Delta` the mean magnitude of the non-zero weights. Zero is always a point of the
    grid, so sparse leaves stay sparse.

    Args:
        bits: :math:`b`, width of the stored integers, 1 to 8. A number, a JAX scalar or an
            Optax schedule; may be traced. Rounded to an integer; a traced value outside of
            [1, 8] counts as the nearer end.
        axis: static. One step for each index of this axis or these axes (the default is the
            output channel of Flax's layouts); None: one for the whole leaf. A leaf with fewer
            than two dimensions has one.
        group_size: static. One step for each run of this many weights along `group_axis`, for
            each index of all other axes; `axis` is then not used. The last run is shorter
            where the size does not divide.
        group_axis: static. The default is the axis that is summed over in Flax's layouts.
        symmetric: static.

    Returns:
        A projection whose structure has a `Grid` per leaf, with
        :math:`|\hat w - w| \le \Delta / 2` up to rounding (not for one bit). Ranges come from
        finite entries; an infinite one goes to the end of the range; NaN stays NaN, and `pack`
        refuses it. An all-zero leaf stays zero. Empty leaves and scalars are fine.

    Raises:
        ValueError: `bits` is a number outside of [1, 8]; an axis that a leaf does not have.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` is one reduction, `project` one elementwise pass, both in float32.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -0.6], [0.2, 0.4]])}
        >>> jc.compress(jc.quantize(bits=2), params)["w"]
        Array([[ 1. , -0.6],
               [ 0. ,  0.6]], dtype=float32)
        >>> jax.vmap(lambda b: jc.compress(jc.quantize(b), params)["w"])(jnp.arange(1, 9)).shape
        (8, 2, 2)

    Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.1 and 2.2; one bit from
    Rastegari et al. 2016, arXiv:1603.05279, section 3.1. Differs: an exact zero stays zero at
    one bit, and the mean is taken without it.
    """
    _check.numeric("quantize", "bits", bits, 1, 8)
    if group_size is not None:
        _check.integer("quantize", "group_size", group_size, 1)
    _check.integer("quantize", "group_axis", group_axis, -64)
    for each in axis if isinstance(axis, tuple) else () if axis is None else (axis,):
        _check.integer("quantize", "axis", each, -64)

    def leaf_grid(path, w, width) -> Grid:
        _check.floating("quantize", "params", w, path)
        shared, group = tuple(range(w.ndim)), None
        if group_size is not None and w.ndim > 0:
            along = (
                0
                if w.ndim == 1
                else _check.axis("quantize", "group_axis", group_axis, w.ndim, path)
            )
            shared, group = (), (along, group_size)
        elif axis is not None and w.ndim > 1:
            wanted = axis if isinstance(axis, tuple) else (axis,)
            own = {_check.axis("quantize", "axis", a, w.ndim, path) for a in wanted}
            shared = tuple(a for a in shared if a not in own)
        return fit_grid(w, width, shared=shared, group=group, symmetric=symmetric)

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        width = jnp.clip(jnp.round(number_at(bits, step).astype(jnp.float32)), 1, 8)
        width = width.astype(jnp.int32)
        return tree.map_arrays_with_path(lambda path, w: leaf_grid(path, w, width), params)

    def rows(params, *, step=0):
        grids, data = find(params, step=step), {}
        tree.map_arrays_with_path(
            lambda path, w, grid: data.update({path: grid_rows(w, grid)}), params, grids
        )
        return [Rows(row_rule, data, {})]

    return of_leaves(find, rows=rows)

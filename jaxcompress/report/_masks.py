"""Pictures of masks: which weights of each leaf live."""

import math
from typing import TYPE_CHECKING

import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.report._leaves import require
from jaxcompress.report._panels import concrete, largest_chosen
from jaxcompress.report._pattern import pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def masks(
    params: PyTree, *, where: tree.Where = tree.is_weight, limit: int = 12, pixels: int = 128
) -> "Figure":
    """The entries of each chosen leaf that are not zero, as a picture.

    Rows are all axes but the last joined, columns the last. A leaf with more than `pixels` of
    either is shown in cells of equal size: how dark a cell is says which part of it lives. The
    words above name the leaf, the part of it that lives and the pattern found, as `summary`.

    Args:
        params: any pytree, dense or compressed; a tree of `bool` masks with `where="**"`.
        where: which leaves, as in `jaxcompress.tree.select`; those without axes are left out.
        limit: static. Most panels; the largest leaves are taken and a note says so.
        pixels: static. Most rows and columns of a picture.

    Returns:
        A `matplotlib.figure.Figure` with one axes per leaf; see `figure`.

    Raises:
        ValueError: nothing is chosen.
        TypeError: a leaf is traced or abstract.
        ImportError: matplotlib is not installed.

    Cost: each drawn leaf is pulled to the host once.

    Examples:
        >>> made = masks({"w": np.tri(8)})
        >>> made.axes[0].get_title(loc="left")
        'w: 56% live, unstructured'
        >>> made.axes[0].images[0].get_array().shape
        (8, 8)
    """
    require("masks", "matplotlib")
    from jaxcompress.report._canvas import dress, new_figure, remark, short

    _check.integer("masks", "limit", limit, 1)
    _check.integer("masks", "pixels", pixels, 1)
    leaves, remarks = largest_chosen("masks", params, None, where, limit, least=1)
    columns = min(3, len(leaves))
    lines = math.ceil(len(leaves) / columns)
    made = new_figure(max(4.6, 3.6 * columns), 0.4 + 2.8 * lines)
    for place, (path, leaf, _) in enumerate(leaves):
        dense = concrete("masks", path, leaf)
        axes = made.add_subplot(lines, columns, place + 1)
        found = pattern(dense)
        live = np.count_nonzero(dense) / max(dense.size, 1)
        title = f"{short(path, 30)}: {100 * live:.0f}% live" + (f", {found}" if found else "")
        dress(axes, title)
        axes.grid(False)
        rows, length = math.prod(dense.shape[:-1]), dense.shape[-1]
        cells = density(dense.reshape(rows, length) != 0, pixels)
        extent = (0, length, rows, 0)
        axes.imshow(
            cells, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
            extent=extent if cells.size else None,
        )  # fmt: skip
    remark(made, remarks)
    return made


def density(alive: np.ndarray, pixels: int) -> np.ndarray:
    """The part that lives of each cell, at most `pixels` of them on a side."""
    out = alive.astype(np.float64)
    for axis in (0, 1):
        length = out.shape[axis]
        if length > pixels:
            step = -(-length // pixels)
            starts = np.arange(0, length, step)
            counts = np.diff(np.append(starts, length))
            shape = (-1, 1) if axis == 0 else (1, -1)
            out = np.add.reduceat(out, starts, axis=axis) / counts.reshape(shape)
    return out

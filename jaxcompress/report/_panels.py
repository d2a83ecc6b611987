"""Figures of the weights themselves: histograms and singular values."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.report._leaves import host, paired_leaves, require, unit_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW, _MANY = 64, 256  # distinct values: drawn one by one up to here, as a curve up to there


def histograms(
    params: PyTree,
    after: PyTree | None = None,
    *,
    where: tree.Where = tree.is_weight,
    bins: int = 60,
    limit: int = 12,
) -> "Figure":
    """The distribution of the values of each chosen leaf, before and after.

    Heights are densities over all entries of the leaf. Exact zeros are told in words ("90%
    zeros") and not drawn: a spike would flatten the rest, and what is drawn of a pruned leaf
    then lies on the dense curve wherever weights were kept. A leaf of at most 64 distinct
    values that repeat (quantized, clustered) is drawn as one line per value, of height
    share / spacing, where the spacing reaches half-way to the values beside it: it too
    follows the curve. Up to 256 values the same heights are joined, since bins would hold
    one value or two.

    Args:
        params: any pytree; compressed leaves are densified.
        after: None, or a tree with the same paths and dense shapes, drawn over `params`.
        where: which leaves, as in `jaxcompress.tree.select`.
        bins: static. Number of bins between the smallest and the largest finite value.
        limit: static. Most panels; the largest leaves are taken and a note says so.

    Returns:
        A `matplotlib.figure.Figure` with one axes per leaf; see `figure`.

    Raises:
        ValueError: nothing is chosen, or the trees do not match.
        TypeError: a leaf is traced or abstract.
        ImportError: matplotlib is not installed.

    Cost: each drawn leaf is pulled to the host once and sorted there.

    Examples:
        >>> made = histograms({"w": np.eye(8)}, limit=4)
        >>> made.axes[0].get_title(loc="left"), made.axes[0].texts[0].get_text()
        ('w', '88% zeros')
    """
    require("histograms", "matplotlib")
    from jaxcompress.report._canvas import AFTER, BEFORE, dress, new_figure, remark, short

    _check.integer("histograms", "bins", bins, 1)
    _check.integer("histograms", "limit", limit, 1)
    leaves, remarks = largest_chosen("histograms", params, after, where, limit)
    columns = 2 if len(leaves) == 4 else min(3, len(leaves))
    lines = math.ceil(len(leaves) / columns)
    made = new_figure(max(4.6, 3.6 * columns), 0.5 + 2.4 * lines)
    for place, (path, first, second) in enumerate(leaves):
        axes = made.add_subplot(lines, columns, place + 1)
        one = concrete("histograms", path, first).reshape(-1)
        two = None if second is None else concrete("histograms", path, second).reshape(-1)
        edges = _edges([one] if two is None else [one, two], bins)
        dress(axes, short(path, 40), ylabel="density" if place % columns == 0 else "")
        axes.axvline(0.0, color="#cccccc", linewidth=0.8, zorder=0)
        said = []
        for values, color, name in (
            (one, AFTER if two is None else BEFORE, "before"),
            (two, AFTER, "after"),
        ):
            if values is not None:
                _distribution(axes, values, edges, color, name, filled=name == "before")
                said += [text if two is None else f"{name}: {text}" for text in _remarks(values)]
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.locator_params(nbins=5)
        if said:
            axes.text(
                0.98, 0.96, "\n".join(said), transform=axes.transAxes, ha="right", va="top",
                fontsize=8, color="#222222",
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
            )  # fmt: skip
    if after is not None:
        handles = [made.axes[0].plot([], [], color=c, linewidth=4)[0] for c in (BEFORE, AFTER)]
        _legend(made, handles, ["before", "after"], 2)
    remark(made, remarks)
    return made


def spectra(
    params: PyTree,
    after: PyTree | None = None,
    *,
    where: tree.Where = tree.is_weight,
    limit: int = 8,
) -> "Figure":
    r"""Singular values of the chosen leaves, and how much energy the first of them hold.

    On the left :math:`\sigma_k / \sigma_1` on a log scale, on the right
    :math:`\sum_{j \le k} \sigma_j^2 / \sum_j \sigma_j^2`, both against
    :math:`k / \min(m, n)`, for the 2-D view that joins all axes but the last. A line ends at
    the numerical rank (see `summary`), in a dot when that is not full. With two trees
    `params` is dashed.

    Args:
        params: any pytree; compressed leaves are densified.
        after: None, or a tree with the same paths and dense shapes.
        where: which leaves, as in `jaxcompress.tree.select`; those below two dimensions are
            left out.
        limit: static, at most 8 (colours that can be told apart). Most leaves shown: the
            largest; a note says so.

    Returns:
        A `matplotlib.figure.Figure` with two axes; see `figure`. A leaf that is empty, all
        zero or not finite has no line but is named in a note.

    Raises:
        ValueError: nothing is chosen, or the trees do not match.
        TypeError: a leaf is traced or abstract.
        ImportError: matplotlib is not installed.

    Cost: one SVD per drawn leaf on the host, :math:`O(mn \min(m, n))`.

    Examples:
        >>> made = spectra({"w": np.diag([2.0, 1.0, 0.0])})
        >>> made.axes[0].lines[0].get_ydata()
        array([1. , 0.5])
    """
    require("spectra", "matplotlib")
    from matplotlib.lines import Line2D

    from jaxcompress.report._canvas import COLORS, dress, new_figure, remark, short

    _check.integer("spectra", "limit", limit, 1, len(COLORS))
    leaves, remarks = largest_chosen("spectra", params, after, where, limit, least=2)
    made = new_figure(9.0, 3.7 + 0.2 * math.ceil(len(leaves) / 2))
    decay, energy = made.subplots(1, 2)
    handles, names = [], []
    for color, (path, first, second) in zip(COLORS, leaves, strict=False):
        drawn = False
        for leaf, dashed in ((first, second is not None), (second, False)):
            if leaf is None:
                continue
            dense = concrete("spectra", path, leaf)
            reason = _undrawable(dense)
            if reason:
                which = "" if second is None else " before" if dashed else " after"
                remarks.append(f"Not drawn: {path or '(root)'}{which}, {reason}.")
                continue
            drawn = True
            _spectrum(decay, energy, unit_matrix(dense), color, dashed)
        if drawn:
            handles.append(Line2D([], [], color=color, linewidth=2))
            names.append(short(path))
    dress(decay, "singular values", "index / full rank", "relative to the largest")
    dress(energy, "cumulative energy", "index / full rank", "share of the squared norm")
    decay.set_yscale("log")
    energy.set_ylim(0, 1.03)
    for axes in (decay, energy):
        axes.set_xlim(0, 1.02)
    if after is not None and handles:
        handles += [Line2D([], [], color="#555555", linestyle=s) for s in ("--", "-")]
        names += ["before", "after"]
    if handles:
        _legend(made, handles, names, 2)
    remark(made, remarks)
    return made


def largest_chosen(
    function: str, params: PyTree, after: PyTree | None, where: Any, limit: int, least: int = 0
) -> tuple[list[tuple[str, Any, Any]], list[str]]:
    """The `limit` largest chosen leaves in tree order, and a note on the others."""
    hits = tree.select(params, where, function=function)
    paths = [path for path, hit in tree.leaves_with_paths(hits) if hit]
    pairs = [row for row in paired_leaves(function, params, after) if row[0] in set(paths)]
    pairs = [row for row in pairs if len(row[1].shape) >= least]
    if not pairs:
        rule = f"choose an array of at least {least} dimensions"
        raise ValueError(_check.message(function, "where", rule, repr(where)))
    order = sorted(range(len(pairs)), key=lambda i: -math.prod(pairs[i][1].shape))
    kept = [pairs[i] for i in sorted(order[:limit])]
    others = len(pairs) - len(kept)
    text = f"The {len(kept)} largest of {len(pairs)} chosen leaves; choose others with `where`."
    return kept, [text] if others else []


def concrete(function: str, path: str, leaf: Any) -> np.ndarray:
    dense = host(function, path, leaf)
    if dense is None:
        rule, got = "hold concrete arrays", f"an abstract {_check.describe(leaf)}"
        raise TypeError(_check.message(function, "params", rule, got, path=path))
    return np.abs(dense) if np.iscomplexobj(dense) and function == "histograms" else dense


def _edges(parts: list[np.ndarray], bins: int) -> np.ndarray:
    """Bin edges in float64 over all finite values that are not zero."""
    ends = [f(x) for x in map(_drawn, parts) if x.size for f in (np.min, np.max)]
    low, high = (min(ends), max(ends)) if ends else (-1.0, 1.0)
    width = high - low
    if not width > 1e-6 * max(abs(low), abs(high)):  # all equal
        pad = 0.5 * max(abs(low), abs(high)) / max(bins, 1) ** 0.5
        low, high = low - pad, high + pad
    return np.linspace(low, high, bins + 1)


def _drawn(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values[np.isfinite(values) & (values != 0)]


def _distribution(
    axes: Any, values: np.ndarray, edges: np.ndarray, color: str, name: str, *, filled: bool
) -> None:
    drawn = _drawn(values)
    if not drawn.size:
        return
    levels = np.unique(values[np.isfinite(values)]).astype(np.float64)
    if 2 <= levels.size <= _MANY and drawn.size >= 4 * np.count_nonzero(levels):
        gaps = np.diff(levels)
        cells = np.convolve(np.concatenate([gaps[:1], gaps, gaps[-1:]]), [0.5, 0.5], "valid")
        counts = np.array([np.count_nonzero(drawn == level) for level in levels])
        heights = counts / values.size / cells
        if levels.size > _FEW:
            heights[levels == 0] = np.nan  # a gap in the curve
            axes.plot(levels, heights, color=color, linewidth=1.5, label=name)
            return
        shown = levels != 0
        levels, heights = levels[shown], heights[shown]
        axes.vlines(levels, 0, heights, color=color, linewidth=1.6, label=name)
        axes.plot(levels, heights, "o", color=color, markersize=3.2)
        return
    counts, _ = np.histogram(drawn, edges)
    heights = counts / values.size / np.diff(edges)
    style = {"fill": True} if filled else {"fill": False, "linewidth": 1.5}
    axes.stairs(heights, edges, color=color, label=name, **style)


def _remarks(values: np.ndarray) -> list[str]:
    """What the drawing leaves out, in words."""
    if not values.size:
        return ["empty"]
    zeros, odd = np.count_nonzero(values == 0), np.count_nonzero(~np.isfinite(values))
    said = []
    if zeros:
        share = 100 * zeros / values.size
        said.append(f"{share:.0f}% zeros" if share >= 0.5 else "<0.5% zeros")
        if 99.5 <= share < 100:
            said[-1] = f"{math.floor(share * 100) / 100:.2f}% zeros"
    return said + ([f"{odd} not finite"] if odd else [])


def _spectrum(decay: Any, energy: Any, dense: np.ndarray, color: str, dashed: bool) -> None:
    sigma = np.linalg.svd(dense, compute_uv=False)
    floor = sigma[0] * max(dense.shape) * np.finfo(sigma.dtype).eps
    rank = max(1, int(np.count_nonzero(sigma > floor)))
    x = np.arange(1, sigma.size + 1) / sigma.size
    power = np.square(sigma.astype(np.float64) / float(sigma[0]))
    dot = {"marker": "o", "markevery": [-1], "markersize": 4.5} if rank < sigma.size else {}
    style: dict[str, Any] = {"color": color, "linestyle": "--" if dashed else "-"}
    style["linewidth"], style["alpha"] = (1.3, 0.75) if dashed else (1.8, 1.0)
    decay.plot(x[:rank], np.sqrt(power)[:rank], **style, **dot)
    total = np.cumsum(power) / np.sum(power)
    energy.plot(np.r_[0.0, x[:rank]], np.r_[0.0, total[:rank]], **style, **dot)


def _undrawable(dense: np.ndarray) -> str:
    if not dense.size:
        return "it is empty"
    if not np.all(np.isfinite(dense)):
        return "a value is not finite"
    return "" if np.any(dense) else "all values are zero"


def _legend(figure: Any, handles: list[Any], names: list[str], columns: int) -> None:
    legend = figure.legend(
        handles, names, loc="outside upper center", ncols=columns, fontsize=8, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)

"""A figure of ranks: the spectra with what is kept of each, and what estimates say."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress import _check
from jaxcompress.report._leaves import require
from jaxcompress.report._panels import _legend
from jaxcompress.report._ranks import RankRow, Ranks
from jaxcompress.report._table import path_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_figure(ranks: Ranks, *, limit: int = 8) -> "Figure":
    r"""Spectra with the chosen rank of each leaf marked, and the estimates beside it.

    On the left :math:`\sigma_k / \sigma_1` on a log scale, in the middle the share of the squared
    norm that the first k hold, both against k / min(m, n): bold up to the chosen rank, which
    is a dot, pale beyond; bold to the end for a leaf of full rank. A line ends at the numerical
    rank. On the right a bar as long as the chosen rank, and a mark for each estimate.

    Args:
        ranks: from `jaxcompress.report.ranks`.
        limit: static, at most 8 (colours that can be told apart). Most leaves shown: the
            largest; a note says so.

    Returns:
        A `matplotlib.figure.Figure` with three axes; see `figure`. A leaf that is empty, all
        zero or not finite is not drawn but named in a note.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> made = jc.report.ranks({"w": jnp.diag(jnp.array([4.0, 2.0, 1.0, 0.0]))}, {"w": 2})
        >>> decay, energy, estimates = jc.report.rank_figure(made).axes
        >>> decay.lines[0].get_ydata(), decay.lines[1].get_ydata()
        (array([1. , 0.5]), array([0.5 , 0.25]))
    """
    require("rank_figure", "matplotlib")
    from matplotlib.lines import Line2D

    from jaxcompress.report._canvas import COLORS, dress, new_figure, remark, short

    _check.integer("rank_figure", "limit", limit, 1, len(COLORS))
    remarks, drawn = [], []
    for row in ranks.rows:
        reason = _undrawable(row)
        if reason:
            remarks.append(f"Not drawn: {path_name(row.path)}, {reason}.")
        else:
            drawn.append(row)
    order = sorted(range(len(drawn)), key=lambda i: -drawn[i].before)
    rows = [drawn[i] for i in sorted(order[:limit])]
    if len(rows) < len(drawn):
        remarks.insert(0, f"The {len(rows)} largest of {len(drawn)} leaves.")
    made = new_figure(12.0, 3.7 + 0.2 * math.ceil(len(rows) / 4))
    decay, energy, estimates = made.subplots(1, 3)
    for place, (color, row) in enumerate(zip(COLORS, rows, strict=False)):
        _spectrum(decay, energy, row, color)
        _marks(estimates, place, row, color)
    dress(decay, "singular values", "rank / full rank", "relative to the largest")
    dress(energy, "cumulative energy", "rank / full rank", "share of the squared norm")
    dress(estimates, "chosen ranks and estimates", "rank / full rank")
    decay.set_yscale("log")
    energy.set_ylim(0, 1.03)
    for axes in (decay, energy, estimates):
        axes.set_xlim(0, 1.02)
    estimates.set_yticks(range(len(rows)), [short(row.path, 24) for row in rows], parse_math=False)
    estimates.set_ylim(len(rows) - 0.4, -0.6)
    estimates.grid(False, axis="y")
    handles: list[Any] = [
        Line2D([], [], color=c, linewidth=2) for c, _ in zip(COLORS, rows, strict=False)
    ]
    names = [short(row.path) for row in rows]
    handles.append(Line2D([], [], color="#555555", marker="o", linestyle=""))
    names.append("chosen rank")
    for (name, _), marker in zip(_estimates(rows[0] if rows else None), "v^sD", strict=True):
        handles.append(Line2D([], [], **_style(marker)))
        names.append(f"{100 * ranks.energy:.3g}% energy" if name == "energy" else name)
    _legend(made, handles, names, 4)
    remark(made, remarks)
    return made


def _estimates(row: RankRow | None) -> list[tuple[str, float | None]]:
    values = (row.energy, row.evbmf, row.gavish_donoho, row.stable) if row else (None,) * 4
    return list(zip(("energy", "EVBMF", "Gavish–Donoho", "stable rank"), values, strict=True))


def _style(marker: str) -> dict[str, Any]:
    return {
        "marker": marker,
        "linestyle": "",
        "color": "#222222",
        "markerfacecolor": "white",
        "markersize": 5.0,
        "clip_on": False,
    }


def _spectrum(decay: Any, energy: Any, row: RankRow, color: str) -> None:
    """Two lines in each axes, up to the rank and beyond, and a dot between them."""
    s = np.asarray(row.spectrum)
    floor = s[0] * max(row.before // row.full, row.full) * np.finfo(np.float32).eps
    end = max(1, int(np.count_nonzero(s > floor)))
    cut = end if row.rank == row.full else min(row.rank, end)
    x, power = np.arange(row.full + 1) / row.full, np.square(s / s[0])
    total = np.r_[0.0, np.cumsum(power) / np.sum(power)]
    for axes, y, first in ((decay, np.r_[np.nan, np.sqrt(power)], 1), (energy, total, 0)):
        axes.plot(x[first : cut + 1], y[first : cut + 1], color=color, linewidth=1.8)
        start = max(cut, first)
        axes.plot(x[start : end + 1], y[start : end + 1], color=color, linewidth=1.2, alpha=0.35)
        if row.rank < row.full:
            axes.plot(x[cut], y[cut], "o", color=color, markersize=5)


def _marks(axes: Any, place: int, row: RankRow, color: str) -> None:
    """The chosen rank as a bar and the estimates on it, over the full rank."""
    axes.barh([place], [row.rank / row.full], height=0.5, color=color, alpha=0.35)
    for i, ((_, value), marker) in enumerate(zip(_estimates(row), "v^sD", strict=True)):
        # One above the other, since estimates often agree.
        axes.plot([(value or 0.0) / row.full], [place + 0.12 * (i - 1.5)], **_style(marker))


def _undrawable(row: RankRow) -> str:
    if not row.full:
        return "it is empty"
    if row.spectrum is None:
        return "a value is not finite"
    return "" if np.any(row.spectrum) else "all values are zero"

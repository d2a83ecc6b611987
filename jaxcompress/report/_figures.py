"""Figures of a summary and of a trade-off between size and accuracy."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from jaxcompress import _check
from jaxcompress.report._leaves import require
from jaxcompress.report._summary import LeafRow, Summary
from jaxcompress.report._table import human_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(summary: Summary, *, limit: int = 40) -> "Figure":
    """One bar per leaf: bytes, fraction of zeros and, with two trees, relative error.

    With two trees the gray bar behind is the leaf before. A fact that is not known (an
    abstract leaf, an error that is not finite) has no bar but says so.

    Args:
        summary: from `jaxcompress.report.summary`.
        limit: static. Most leaves shown: the largest (before, when there are two trees), in
            tree order. A note tells how many bytes the others hold.

    Returns:
        A `matplotlib.figure.Figure` that pyplot does not know: nothing pops up or stays
        open. Notebooks show it; `figure.savefig("bars.png")` writes it.

    Raises:
        ImportError: matplotlib is not installed.

    Examples:
        >>> from jaxcompress.report import summary
        >>> len(figure(summary({"w": np.eye(3)})).axes)
        2
    """
    require("figure", "matplotlib")
    from matplotlib.ticker import EngFormatter

    from jaxcompress.report._canvas import ACCENT, AFTER, BEFORE, dress, new_figure, remark, short

    _check.integer("figure", "limit", limit, 1)
    two = summary.total.ratio is not None
    rows = _largest(summary.rows, limit)
    made = new_figure(10.0 if two else 8.0, 1.3 + 0.27 * max(len(rows), 1))
    axes = made.subplots(1, 3 if two else 2, sharey=True, squeeze=False)[0]
    places = range(len(rows))
    if two:
        before = [row.before_nbytes or 0 for row in rows]
        axes[0].barh(places, before, height=0.82, color=BEFORE, label="before")
    stored = [row.nbytes for row in rows]
    axes[0].barh(places, stored, height=0.5, color=AFTER, label="after" if two else "bytes")
    _bars(axes[1], [row.sparsity for row in rows], "#009E73", lambda x: f"{100 * x:.3g}%")
    if two:
        _bars(axes[2], [row.error for row in rows], ACCENT, lambda x: f"{x:.2g}")
        axes[0].legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    total = summary.total
    for place, row in zip(places, rows, strict=True):
        end = max(row.nbytes, row.before_nbytes or 0)
        said = human_bytes(row.nbytes)
        if row.before_nbytes is not None and row.before_nbytes != row.nbytes:
            said = f"{human_bytes(row.before_nbytes)} → {said}"
        _say(axes[0], end, place, said)
    dress(axes[0], xlabel=f"bytes ({_change(total)})")
    dress(axes[1], xlabel=f"zeros ({_known(total.sparsity, lambda x: f'{100 * x:.3g}%')} of all)")
    if two:
        known = _known(total.error, lambda x: f"{x:.2g}")
        dress(axes[2], xlabel=f"relative error ({known} overall)")
    longest = max([max(row.nbytes, row.before_nbytes or 0) for row in rows], default=0) or 1
    axes[0].set_xlim(0, longest * (1.62 if two else 1.3))
    axes[0].xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes[0].locator_params(axis="x", nbins=4)
    axes[1].set_xlim(0, 1.28)
    axes[1].set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes[0].set_yticks(places, [short(row.path) for row in rows], parse_math=False)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    for each in axes:
        each.grid(False, axis="y")
        each.spines["left"].set_visible(False)
    others = len(summary.rows) - len(rows)
    if others:
        rest = human_bytes(total.nbytes - sum(row.nbytes for row in rows))
        remark(made, [f"The {len(rows)} largest leaves; {others} more hold {rest}."])
    return made


def tradeoff(
    points: Sequence[tuple[str, float, float]],
    *,
    xlabel: str = "size",
    ylabel: str = "accuracy",
    unit: str = "B",
) -> "Figure":
    """Accuracy against size, each point with its name, the best ones joined.

    A point is one of the best when no other is as small and as accurate (and better in one
    of the two): the Pareto front, drawn filled and joined by steps. The others are hollow.

    Args:
        points: `(label, size, accuracy)` of each model; sizes positive, on a log scale.
        xlabel: static. What the size is.
        ylabel: static. What is good when high.
        unit: static. Unit of the size, put behind a metric prefix; "" for none.

    Returns:
        A `matplotlib.figure.Figure` with one axes; see `figure`.

    Raises:
        ValueError: no point, a size that is not positive, a number that is not finite.
        ImportError: matplotlib is not installed.

    Cost: label placement tries 24 places for each label, against all others.

    Examples:
        >>> made = tradeoff([("dense", 4e6, 0.98), ("int8", 1e6, 0.979)])
        >>> [text.get_text() for text in made.axes[0].texts]
        ['dense', 'int8']
    """
    require("tradeoff", "matplotlib")
    from jaxcompress.report._canvas import AFTER, dress, new_figure
    from jaxcompress.report._labels import place_labels

    named = [_point(entry) for entry in points]
    if not named:
        raise ValueError(_check.message("tradeoff", "points", "hold a point", "none"))
    front = _front(named)
    made = new_figure(7.5, 4.8)
    axes = made.subplots()
    axes.set_xscale("log")
    axes.step(
        [named[i][1] for i in front],
        [named[i][2] for i in front],
        where="post",
        color=AFTER,
        alpha=0.35,
        linewidth=1.5,
        label="best",
    )
    axes.scatter(
        [x for _, x, _ in named],
        [y for _, _, y in named],
        s=42,
        facecolors=[AFTER if i in set(front) else "white" for i in range(len(named))],
        edgecolors=AFTER,
        linewidths=1.3,
        zorder=3,
    )
    dress(axes, xlabel=f"{xlabel} (log scale)", ylabel=ylabel)
    _log_axis(axes, [x for _, x, _ in named], unit)
    axes.margins(y=0.12)
    if len(named) > len(front):
        axes.set_title(
            "filled: no other is both as small and as good",
            fontsize=8,
            color="#555555",
            loc="right",
        )
    place_labels(made, axes, named, [named[i][1:] for i in front])
    return made


def _largest(rows: list[LeafRow], limit: int) -> list[LeafRow]:
    """At most `limit` rows with the most bytes before, else now; in their order."""
    order = sorted(range(len(rows)), key=lambda i: -(rows[i].before_nbytes or rows[i].nbytes))
    return [rows[i] for i in sorted(order[:limit])]


def _bars(
    axes: Any, values: Sequence[float | None], color: str, say: Callable[[float], str]
) -> None:
    """Bars with their values at the ends; nothing drawn for what is not finite."""
    finite = [v if v is not None and math.isfinite(v) else 0.0 for v in values]
    axes.barh(range(len(values)), finite, height=0.5, color=color)
    axes.set_xlim(0, (max(finite, default=0.0) or 1.0) * 1.3)
    for place, (value, drawn) in enumerate(zip(values, finite, strict=True)):
        _say(axes, drawn, place, _known(value, say))


def _say(axes: Any, x: float, y: float, text: str) -> None:
    offset = {"xytext": (3, 0), "textcoords": "offset points"}
    axes.annotate(text, (x, y), va="center", fontsize=8, color="#333333", **offset)


def _known(value: float | None, say: Callable[[float], str]) -> str:
    return "unknown" if value is None else say(value) if math.isfinite(value) else str(value)


def _change(total: LeafRow) -> str:
    if total.before_nbytes is None:
        return f"{human_bytes(total.nbytes)} in all"
    return f"{human_bytes(total.before_nbytes)} → {human_bytes(total.nbytes)} in all"


def _point(entry: Any) -> tuple[str, float, float]:
    try:
        label, x, y = entry
        x, y = float(x), float(y)
    except (TypeError, ValueError):
        rule = "hold triples (label, size, accuracy)"
        raise ValueError(_check.message("tradeoff", "points", rule, repr(entry))) from None
    if not (0 < x < math.inf and math.isfinite(y)):
        rule = "hold positive sizes and finite numbers"
        raise ValueError(_check.message("tradeoff", "points", rule, repr(entry)))
    return str(label), x, y


def _front(named: Sequence[tuple[str, float, float]]) -> list[int]:
    """Indices of the Pareto front, small to large; of equal points all."""
    best, front = -math.inf, []
    order = sorted(range(len(named)), key=lambda i: (named[i][1], -named[i][2]))
    for i in order:
        _, x, y = named[i]
        if y > best or (front and (x, y) == named[front[-1]][1:]):
            front.append(i)
            best = y
    return front


def _log_axis(axes: Any, sizes: Sequence[float], unit: str) -> None:
    """Limits with room for names; more ticks where there are few decades."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = min(sizes), max(sizes)
    room = max((high / low) ** 0.12, 1.35)
    axes.set_xlim(low / room, high * room)
    decades = math.log10(high / low) if high > low else 0.0
    subs = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(EngFormatter(unit=unit))
    axes.xaxis.set_minor_formatter(NullFormatter())

"""A picture of a network: a box as wide as each layer, before and after."""

from typing import TYPE_CHECKING, Any

from jaxcompress import _check
from jaxcompress.report._leaves import require
from jaxcompress.report._network import Network
from jaxcompress.report._network_plan import BOX, HIGH, LANE, MARGIN, TOP, Plan, plans
from jaxcompress.report._network_rows import Picture, Row, columns_of, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGNS = {"add": "+", "mul": "×", "matmul": "@"}
_TEXT = 7.5


def network_figure(
    before: Network, after: Network | None = None, *, fold: bool = True, rows: int = 48
) -> "Figure":
    """Draws a network, from top to bottom: a box for each layer, as wide as it has channels.

    The widths before are grey, those after lie over them in blue; what is gone is an empty
    frame. A line down goes to the next row, a wire at the side to one further down; wires that
    leave a column end in a letter, and go on where it stands again. The dashed ones go to the
    next trip of a loop. A bracket is around what runs or stands there several times.

    Args:
        before: from `jc.report.network`.
        after: None, or the network of the small function: its nodes have the same names.
        fold: static. Whether three or more equal parts in a row (the layers of a transformer,
            if they are equally wide before and after) are drawn once.
        rows: static, at least 12. Most rows in a column.

    Returns:
        A `matplotlib.figure.Figure`; see `jc.report.figure`. It grows with the network.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: an argument is no `Network`.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> wide = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
        >>> narrow = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2))}
        >>> before, after = (jc.report.network(fn, p, jnp.ones((1, 4))) for p in (wide, narrow))
        >>> figure = jc.report.network_figure(before, after)
        >>> [text.get_text() for text in figure.axes[0].texts if "→" in text.get_text()]
        ['48 → 36 parameters', '4 → 8', '4 → 6', '8 → 2', '6 → 2']
    """
    require("network_figure", "matplotlib")
    from jaxcompress.report._canvas import new_figure

    for name, value in (("before", before), ("after", after)):
        if not isinstance(value, Network) and (name == "before" or value is not None):
            rule, got = "be a Network", _check.describe(value)
            fix = "Call jc.report.network(fn, params, *args)."
            raise TypeError(_check.message("network_figure", name, rule, got, fix))
    _check.integer("network_figure", "rows", rows, 12)
    drawn = picture(before, after, fold)
    made = new_figure(4.6, 4.6)
    made.set_layout_engine("none")
    columns = plans(drawn, columns_of(drawn, rows), lambda text: _length(made, text))
    width = max(MARGIN + sum(column.width for column in columns), 4.6)
    high = TOP + HIGH * (2 + max(len(column.rows) for column in columns))
    made.set_size_inches(width, high)
    axes = made.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, width)
    axes.set_ylim(high, 0)
    axes.set_axis_off()
    _head(axes, before, after)
    x = MARGIN
    for column in columns:
        _brackets(axes, drawn, column, x)
        _wires(axes, drawn, column, x)
        for i in column.rows:
            _row(axes, drawn.rows[i], column, i, x)
        x += column.width
    return made


def _length(figure: Any, text: str) -> float:
    """Of a text, in inches."""
    from matplotlib.font_manager import FontProperties

    renderer = figure.canvas.get_renderer()
    font = FontProperties(size=_TEXT)
    return renderer.get_text_width_height_descent(text, font, ismath=False)[0] / figure.dpi


def _write(axes: Any, x: float, y: float, text: str, color: str = "#222222", **how: Any) -> None:
    if text:
        look = {"fontsize": _TEXT, "va": "center", "parse_math": False} | how
        axes.text(x, y, text, color=color, **look)


def _head(axes: Any, before: Network, after: Network | None) -> None:
    """Parameters in total, and what the colours mean."""
    from jaxcompress.report._canvas import AFTER, BEFORE

    now = "" if after is None else f" → {after.parameters:,}"
    _write(axes, MARGIN, 0.16, f"{before.parameters:,}{now} parameters", fontsize=9)
    if after is not None:
        for x, color, text in ((0.0, BEFORE, "width before"), (1.1, AFTER, "after")):
            _box(axes, MARGIN + x, 0.37, 0.2, facecolor=color)
            _write(axes, MARGIN + x + 0.26, 0.37, text)


def _box(axes: Any, x: float, y: float, width: float, high: float = 0.14, **look: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y - high / 2), width, high, linewidth=0.8, **look))


def _row(axes: Any, row: Row, column: Plan, i: int, x: float) -> None:
    """The box and the texts of a node."""
    from jaxcompress.report._canvas import AFTER, BEFORE

    node, y, middle = row.node, column.y(i), x + column.boxes + BOX / 2
    name, what, widths, now = column.texts[i]
    if node.width is not None and (node.paths or node.kind == "concat"):
        size = max(node.width * column.scale, 0.03)
        high = 0.14 if node.kind in ("layer", "lookup") else 0.07
        pale = node.kind not in ("layer", "lookup")
        if row.gone:
            _box(axes, middle - size / 2, y, size, high, facecolor="white", edgecolor=BEFORE)
        else:
            shade = "#dcdcdc" if pale else BEFORE
            _box(axes, middle - size / 2, y, size, high, facecolor=shade)
        if row.later is not None and row.later.width is not None:
            small = max(row.later.width * column.scale, 0.03)
            shade = "#8fbcdc" if pale else AFTER
            _box(axes, middle - small / 2, y, small, high, facecolor=shade)
    elif node.kind in _SIGNS:
        # A disc with the sign, which the lines end at.
        axes.plot([middle], [y], "o", color="white", markeredgecolor="#555555", markersize=8.5)
        _write(axes, middle, y, _SIGNS[node.kind], ha="center")
    else:
        axes.plot([middle], [y], "o", color="#555555", markersize=4)
    _write(axes, x + column.names, y, name, BEFORE if row.gone else "#222222", ha="right")
    for place, text, color in zip(
        column.facts, (what, widths, now), ("#555555", "#222222", AFTER), strict=True
    ):
        _write(axes, x + place, y, text, BEFORE if row.gone else color)


def _half(row: Row, column: Plan) -> float:
    """From the middle of a row to where its lines begin at the side."""
    if row.node.width is None or not (row.node.paths or row.node.kind == "concat"):
        return 0.07
    sizes = [n.width for n in (row.node, row.later) if n is not None and n.width]
    return max(max(sizes, default=0) * column.scale / 2, 0.015)


def _wires(axes: Any, drawn: Picture, column: Plan, x: float) -> None:
    """Lines down to the next row, and wires in the lanes."""
    middle, right = x + column.boxes + BOX / 2, x + column.boxes + BOX
    for i in (column.rows.start - 1, *column.rows):
        if i in drawn.steps:
            # Into and out of a column it is as long as elsewhere.
            axes.plot(
                [middle, middle], [column.y(i), column.y(i + 1)], color="#999999", lw=0.9, zorder=0
            )
    for part in column.parts:
        lane = right + LANE * (1 + part.lane)
        color = "#D55E00" if any(_is_sum(drawn, t) for t in part.targets) else "#777777"
        look = {"color": color, "lw": 0.8, "zorder": 0, "ls": "--" if part.loop else "-"}
        ends = []
        if part.source in column.rows:
            # A wire leaves below the middle and comes in above it.
            y = column.y(part.source) + 0.025
            axes.plot([middle + _half(drawn.rows[part.source], column), lane], [y, y], **look)
            ends.append(y)
        for target in part.targets:
            if target in column.rows:
                y = column.y(target) - 0.025
                tip = middle + _half(drawn.rows[target], column)
                axes.plot([lane, tip], [y, y], **look)
                axes.plot([tip + 0.02], [y], marker=4, color=color, markersize=4, zorder=1)
                ends.append(y)
        for row, away in ((part.low, -0.06), (part.high, 0.06)):
            if row not in column.rows:
                ends.append(column.y(row))
                _write(
                    axes, lane, column.y(row) + away, part.letter, color, ha="center", fontsize=6.5
                )
        axes.plot([lane, lane], [min(ends), max(ends)], **look)


def _is_sum(drawn: Picture, row: int) -> bool:
    return drawn.rows[row].node.kind == "add"


def _brackets(axes: Any, drawn: Picture, column: Plan, x: float) -> None:
    """Around what is there several times, at the left of the names."""
    for k, (first, last, label) in enumerate(drawn.brackets):
        low, high = max(first, column.rows.start), min(last, column.rows.stop - 1)
        if low > high:
            continue
        at = x + 0.2 + 0.07 * (k % 3)
        top, end = column.y(low) - 0.08, column.y(high) + 0.08
        axes.plot([at + 0.06, at, at, at + 0.06], [top, top, end, end], color="#009E73", lw=1.2)
        _write(axes, at - 0.1, (top + end) / 2, label, "#009E73", ha="center", rotation=90)

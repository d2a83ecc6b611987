"""A comparison of two networks as tables of rich."""

from typing import Any

from jaxcompress.report._leaves import require
from jaxcompress.report._shrunk import Shrunk, ShrunkRow
from jaxcompress.report._table import human_bytes, path_name


def shrunk_table(shrunk: Shrunk) -> Any:
    """The leaves, and below the totals with FLOPs and latency."""
    require("shrunk", "rich")
    from rich.console import Group

    return Group(_leaves(shrunk), _totals(shrunk))


def _leaves(shrunk: Shrunk) -> Any:
    total = ShrunkRow("total", (), (), shrunk.parameters, shrunk.nbytes)
    heads = ("leaf", "before", "after", "params", "after", "kept")
    made = _table(heads, 3)
    ends = ("total", "", "", *_counts(total))
    for column, end in zip(made.columns, ends, strict=True):
        column.footer = end
    made.show_footer = True
    made.columns[0].no_wrap = False
    made.columns[0].overflow = "fold"
    for row in shrunk.rows:
        _add(made, (path_name(row.path), _shape(row.before), _shape(row.after), *_counts(row)))
    return made


def _totals(shrunk: Shrunk) -> Any:
    made = _table(("", "before", "after", "ratio"), 1)
    rows: list[tuple[str, Any, Any]] = [
        ("parameters", shrunk.parameters, "{:,}".format),
        ("bytes", shrunk.nbytes, human_bytes),
        ("FLOPs", shrunk.flops, _short),
    ]
    if shrunk.seconds is not None:
        rows.append(("latency", shrunk.seconds, _seconds))
    for name, (before, after), show in rows:
        ratio = f"{before / after:.2f}×" if after else "–"
        _add(made, (name, show(before), show(after), ratio))
    return made


def _table(heads: tuple[str, ...], left: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for i, head in enumerate(heads):
        justify = "left" if i < left else "right"
        made.add_column(Text(head), justify=justify, no_wrap=True, footer_style="bold")
    return made


def _add(made: Any, cells: tuple[str, ...]) -> None:
    from rich.text import Text

    # As they are: a path may hold the brackets of rich's markup.
    made.add_row(*map(Text, cells))


def _counts(row: ShrunkRow) -> tuple[str, str, str]:
    before, after = row.parameters
    kept = f"{100 * after / before:.1f}%" if before else "–"
    return f"{before:,}", f"{after:,}", kept


def _shape(shape: tuple[int, ...] | None) -> str:
    return "–" if shape is None else "×".join(map(str, shape)) or "scalar"


def _short(n: int) -> str:
    """`1.25 G`: three digits."""
    value, units = float(n), ["", " k", " M", " G", " T", " P"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{n:,}" if n < 1000 else f"{value:.3g}{units[0]}"


def _seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"

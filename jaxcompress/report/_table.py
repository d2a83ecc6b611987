"""The summary as a table of rich, and as text."""

import io
import math
import re
from typing import TYPE_CHECKING, Any

from jaxcompress.report._leaves import require
from jaxcompress.report._summary import LeafRow, Summary

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 120
BLANK = "–"


def table(summary: Summary) -> "Table":
    """The summary as a `rich.table.Table`, for a rich console, panel or live display.

    A column is there only when it tells something: zeros when there are some, bits per
    parameter when a leaf is stored compressed, values when a matrix has at most 256 distinct ones,
    rank when it is below full somewhere, before, ratio and error with two trees.

    Args:
        summary: from `jaxcompress.report.summary`.

    Returns:
        A table with one row per leaf and the total below. `8/64` in the column rank is a
        rank of 8 out of 64 at most.

    Raises:
        ImportError: rich is not installed.

    Examples:
        >>> from jaxcompress.report import summary
        >>> facts = summary({"w": np.eye(3)})
        >>> table(facts).row_count
        1
    """
    require("table", "rich")
    return _table(summary)


def text(summary: Summary) -> str:
    """The table as plain text, at most 120 wide.

    Paths that do not fit break after a slash. Where that leaves them too little room, the
    bytes before (the ratio tells them) and then the number of values are left out.
    """
    require("summary", "rich")
    console = plain_console()
    wide = console.options.update(max_width=10**4)
    longest = max((len(path_name(row.path)) for row in summary.rows), default=0)
    choices = ((), ("before",), ("before", "values"))
    rooms = [
        WIDTH + longest - console.measure(_table(summary, choice), options=wide).maximum
        for choice in choices
    ]
    i = next((i for i, room in enumerate(rooms) if room >= min(longest, 32)), len(rooms) - 1)
    made = _table(summary, choices[i], None if rooms[i] >= longest else max(16, rooms[i]))
    return printed(console, made)


def plain_console() -> Any:
    """A `rich.console.Console` of 120 columns without colours, wherever it runs."""
    from rich.console import Console

    return Console(
        file=io.StringIO(),
        width=WIDTH,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        legacy_windows=False,
    )


def printed(console: Any, made: Any) -> str:
    """What the console prints, without blank lines and spaces at ends."""
    with console.capture() as capture:
        console.print(made)
    lines = (line.rstrip() for line in capture.get().splitlines())
    return "\n".join(line for line in lines if line)


def human_bytes(n: int) -> str:
    """`1.20 MB`: decimal units, three digits."""
    if n < 1000:
        return f"{n} B"
    units = ["kB", "MB", "GB", "TB"]
    value, unit = n / 1000, units.pop(0)
    while value >= 999.5 and units:
        value, unit = value / 1000, units.pop(0)
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def path_name(path: str) -> str:
    """The path, or a name for a tree that is one leaf."""
    return path or "(root)"


def _table(
    summary: Summary, left_out: tuple[str, ...] = (), path_width: int | None = None
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [column for column in _columns(summary) if column[0] not in left_out]
    made = Table(box=box.SIMPLE, show_footer=True, padding=(0, 1, 0, 0))
    for name, cell in columns:
        left = name in ("leaf", "stored as")
        made.add_column(
            Text(name),
            footer=Text(cell(summary.total)),
            justify="left" if left else "right",
            no_wrap=name != "leaf",
            overflow="fold" if name == "leaf" else "ellipsis",
            style="cyan" if name == "leaf" else "",
            footer_style="bold",
        )
    for row in summary.rows:
        first, *others = (cell(row) for _, cell in columns)
        made.add_row(Text(_broken(first, path_width)), *map(Text, others))
    return made


def _broken(path: str, width: int | None) -> str:
    """The path on several lines, broken after slashes, each at most `width` if it can be."""
    lines = [""]
    for part in re.split("(?<=/)", path):
        if width is not None and lines[-1] and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _columns(summary: Summary) -> list[tuple[str, Any]]:
    rows, two = summary.rows, summary.total.ratio is not None
    packed = any(row.kind != "dense" for row in rows)
    few = any(
        row.distinct is not None and row.distinct <= min(256, row.parameters // 2) and _full(row)
        for row in rows
    )
    deficient = any(row.rank is not None and row.rank < _full(row) for row in rows)
    patterned = any(row.pattern and row.pattern != "unstructured" for row in rows)
    # Where nothing was zero before, the overlap only repeats what lives.
    sparse = any(
        row.overlap is not None and abs(row.overlap - (1 - (row.sparsity or 0))) > 1e-9
        for row in rows
    )
    columns = [
        ("leaf", lambda row: path_name(row.path), True),
        ("shape", _shape, True),
        ("stored as", lambda row: row.dtype if row.kind == "dense" else row.kind, True),
        ("params", lambda row: f"{row.parameters:,}", True),
        ("zeros", lambda row: _percent(row.sparsity), any(row.sparsity for row in rows)),
        ("pattern", lambda row: BLANK if row.pattern is None else row.pattern, patterned),
        ("overlap", lambda row: _percent(row.overlap), two and sparse),
        ("bits", lambda row: f"{row.bits:.2f}".rstrip("0").rstrip("."), packed),
        ("values", _values, few),
        ("rank", _rank, deficient),
        ("before", lambda row: human_bytes(row.before_nbytes), two),
        ("bytes", lambda row: human_bytes(row.nbytes), True),
        ("ratio", lambda row: _times(row.ratio), two),
        ("error", lambda row: _error(row.error), two),
    ]
    return [(name, cell) for name, cell, shown in columns if shown]


def _full(row: LeafRow) -> int:
    """The largest rank that the leaf may have; 0 below two dimensions and when empty."""
    if row.shape is None or len(row.shape) < 2:
        return 0
    return min(math.prod(row.shape[:-1]), row.shape[-1])


def _shape(row: LeafRow) -> str:
    return "" if row.shape is None else "×".join(map(str, row.shape)) or "scalar"


def _values(row: LeafRow) -> str:
    return "" if not row.dtype else BLANK if row.distinct is None else f"{row.distinct:,}"


def _rank(row: LeafRow) -> str:
    return "" if row.rank is None else f"{row.rank}/{_full(row)}"


def _percent(fraction: float | None) -> str:
    return BLANK if fraction is None else f"{100 * fraction:.1f}%"


def _times(ratio: float | None) -> str:
    return BLANK if ratio is None else f"{ratio:.1f}×" if ratio < 1000 else f"{ratio:.0f}×"


def _error(error: float | None) -> str:
    return BLANK if error is None else f"{error:.2g}" if error else "0"

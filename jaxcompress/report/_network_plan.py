"""Where the parts of a picture of a network go, in inches."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxcompress.report._network_graph import kind_of
from jaxcompress.report._network_rows import Picture, Row, lanes

HIGH, BOX, LANE, GAP, MARGIN, TOP, BRACKET = 0.21, 1.5, 0.1, 0.14, 0.2, 0.5, 0.42
Length = Callable[[str], float]
"""How long a text is."""


class Part(NamedTuple):
    """What a column shows of a wire.

    Attributes:
        low: first row; the one before the column where it comes from another one.
        high: last row; the one after the column where it goes on in another one.
        source: row.
        targets: rows.
        loop: whether it goes to the next trip of a loop.
        letter: of a wire that is in several columns.
        lane: which of the lanes beside the boxes.
    """

    low: int
    high: int
    source: int
    targets: tuple[int, ...]
    loop: bool
    letter: str
    lane: int


class Plan(NamedTuple):
    """A column.

    Attributes:
        rows: of the picture.
        texts: of each row: name, what it is, widths before, widths after.
        names: where names end, from the left of the column.
        boxes: where the widest box begins.
        facts: where the other three texts begin.
        width: of all.
        parts: of the wires.
        scale: inches of a channel.
    """

    rows: range
    texts: dict[int, tuple[str, str, str, str]]
    names: float
    boxes: float
    facts: tuple[float, float, float]
    width: float
    parts: list[Part]
    scale: float

    def y(self, row: int) -> float:
        """The middle of a row, from the top of the figure."""
        return TOP + HIGH * (1 + row - self.rows.start)


def plans(picture: Picture, columns: Sequence[range], length: Length) -> list[Plan]:
    """All columns; the boxes of all have one scale."""
    letters = _letters(picture, columns)
    widest = max((n for row in picture.rows for n in _widths(row)), default=1)
    return [_plan(picture, column, letters, length, BOX / widest) for column in columns]


def _plan(
    picture: Picture, column: range, letters: Mapping[int, str], length: Length, scale: float
) -> Plan:
    texts = {i: _texts(picture.rows[i]) for i in column}

    def longest(k: int) -> float:
        return max((length(text[k]) for text in texts.values()), default=0.0)

    parts = _parts(picture, column, letters)
    bracketed = any(a < column.stop and b >= column.start for a, b, _ in picture.brackets)
    names = (BRACKET if bracketed else 0.0) + longest(0)
    boxes = names + GAP
    first = boxes + BOX + LANE * (2 + max((part.lane for part in parts), default=-1)) + GAP
    second = first + longest(1) + GAP
    third = second + longest(2) + GAP
    width = third + longest(3) + GAP
    return Plan(column, texts, names, boxes, (first, second, third), width, parts, scale)


def _widths(row: Row) -> list[int]:
    return [node.width for node in (row.node, row.later) if node is not None and node.width]


def _texts(row: Row) -> tuple[str, str, str, str]:
    from jaxcompress.report._canvas import short

    node = row.node
    name = row.name if node.paths or node.kind in ("input", "output") else ""
    for end in ("/kernel", "/weight", "/w"):
        name = name.removesuffix(end)
    what = kind_of(node) if node.paths or node.kind not in ("input", "output", "concat") else ""
    what = "" if what in ("add", "mul", "matmul") else what
    what = ", ".join(part for part in (what, node.after) if part)
    if node.kind in ("input", "output"):
        return short(name, 34), "×".join(map(str, node.output)) or "scalar", "", ""
    if not node.paths and node.kind != "concat":
        return "", what, "", ""
    before = _arrow(node.width_in, node.width)
    after = "" if row.later is None else _arrow(row.later.width_in, row.later.width)
    if row.gone:
        after = "gone"
    # Fonts have no glyphs for line breaks and the like.
    name = "".join(sign if sign.isprintable() else " " for sign in name)
    name, what = (short(text, most) if text else "" for text, most in ((name, 34), (what, 40)))
    return name, what, before, "" if after == before else after


def _arrow(*widths: int | None) -> str:
    return " → ".join(f"{n:,}" for n in widths if n is not None)


def _letters(picture: Picture, columns: Sequence[range]) -> dict[int, str]:
    """Names of the wires that are in several columns."""
    found: dict[int, str] = {}
    for k, wire in enumerate(picture.wires):
        ends = (wire.source, *wire.targets)
        if not any(min(ends) in column and max(ends) in column for column in columns):
            n = len(found)
            found[k] = chr(ord("a") + n % 26) + (str(n // 26) if n >= 26 else "")
    return found


def _parts(picture: Picture, column: range, letters: Mapping[int, str]) -> list[Part]:
    """The wires of a column, each in a lane of its own."""
    found = []
    for k, wire in enumerate(picture.wires):
        ends = (wire.source, *wire.targets)
        inside = [i for i in ends if i in column]
        if inside:
            low = min(inside) if min(ends) in column else column.start - 1
            high = max(inside) if max(ends) in column else column.stop
            letter = letters.get(k, "")
            found.append(Part(low, high, wire.source, wire.targets, wire.loop, letter, 0))
    chosen = lanes([(part.low, part.high) for part in found])
    return [part._replace(lane=lane) for part, lane in zip(found, chosen, strict=True)]

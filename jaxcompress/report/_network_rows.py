"""A network as rows in columns: what repeats is folded, what skips rows gets a lane."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxcompress.report._network import Network, Node
from jaxcompress.report._network_graph import matched, times


class Row(NamedTuple):
    """One row of the picture.

    Attributes:
        name: of the node, of several that are folded `layers/0…11/up`.
        node: before.
        later: after; None where there is none, or it is gone.
        gone: whether the network after has no such node.
    """

    name: str
    node: Node
    later: Node | None
    gone: bool


class Wire(NamedTuple):
    """What flows from a row to others that are not the next.

    Attributes:
        source: row.
        targets: rows.
        loop: whether it goes to the next trip of a loop.
    """

    source: int
    targets: tuple[int, ...]
    loop: bool


class Picture(NamedTuple):
    """What is to be drawn.

    Attributes:
        rows: from the first to the last.
        steps: rows whose result flows into the next row.
        wires: all else that flows.
        brackets: `(first row, last row, label)` of loops and of what is folded.
    """

    rows: list[Row]
    steps: set[int]
    wires: list[Wire]
    brackets: list[tuple[int, int, str]]


def picture(network: Network, after: Network | None, fold: bool) -> Picture:
    """The rows of a network, and what flows between them."""
    nodes = network.nodes
    later = matched(network, after)
    place = {node.name: i for i, node in enumerate(nodes)}
    edges = [(place[e.source], place[e.target], e.loop) for e in network.edges]
    signs = _signatures(network, later, after is not None, edges)
    repeats = _repeats(signs, edges) if fold else []
    stands: dict[int, int] = {}
    for i in range(len(nodes)):
        repeat = next((r for r in repeats if r[0] <= i < r[0] + r[1] * r[2]), None)
        stands[i] = i if repeat is None else repeat[0] + (i - repeat[0]) % repeat[1]
    shown = [i for i in range(len(nodes)) if stands[i] == i]
    row_of = {i: shown.index(stands[i]) for i in range(len(nodes))}
    last = {stands[i]: i for i in range(len(nodes))}
    rows = []
    for i in shown:
        node = nodes[i]
        name = _between(node.name, nodes[last[i]].name)
        gone = after is not None and node.name not in later
        rows.append(Row(name, node, later.get(node.name), gone))
    flows: dict[tuple[int, bool], dict[int, None]] = {}
    for source, target, loop in edges:
        if stands[target] == target:
            flows.setdefault((row_of[source], loop), {})[row_of[target]] = None
    steps = {s for (s, loop), targets in flows.items() if not loop and s + 1 in targets}
    wires = []
    for (source, loop), targets in flows.items():
        rest = tuple(t for t in targets if loop or t != source + 1)
        if rest:
            wires.append(Wire(source, rest, loop))
    brackets = [(row_of[i], row_of[i + p - 1], f"× {r}") for i, p, r in repeats]
    return Picture(rows, steps, wires, brackets + _loops(network, rows))


def _signatures(network: Network, later: Mapping[str, Node], two: bool, edges: Any) -> list[Any]:
    """What nodes that are folded have in common: all but the numbers in their names."""
    into: dict[int, list[tuple[int, bool]]] = {}
    for source, target, loop in edges:
        into.setdefault(target, []).append((target - source, loop))
    made = []
    for i, node in enumerate(network.nodes):
        small = later.get(node.name)
        now = None if small is None else (small.width_in, small.width)
        name = re.sub(r"\d+", "#", re.sub(r":\d+$", "", node.name))
        facts = (node.kind, node.op, node.window, node.width_in, node.width, node.loops, node.after)
        made.append((name, facts, now, two and small is None, tuple(sorted(into.get(i, ())))))
    return made


def _repeats(signs: Sequence[Any], edges: Any) -> list[tuple[int, int, int]]:
    """`(first, period, how often)` of three and more equal runs, from the front."""
    found, i, n = [], 0, len(signs)
    while i < n:
        best = (0, 0, 0)
        for period in range(1, (n - i) // 3 + 1):
            if signs[i] != signs[i + period]:
                continue
            first, count = signs[i : i + period], 1
            while list(signs[i + count * period : i + (count + 1) * period]) == list(first):
                count += 1
            saved = (count - 1) * period
            if count >= 3 and saved > best[0] and _closed(i, period, count, edges):
                best = (saved, period, count)
        if best[0]:
            found.append((i, best[1], best[2]))
            i += best[1] * best[2]
        else:
            i += 1
    return found


def _closed(first: int, period: int, count: int, edges: Any) -> bool:
    """Whether only the last run flows out, and all is the same within."""
    end, last = first + period * count, first + period * (count - 1)
    return all(s >= last for s, t, _ in edges if first <= s < end <= t)


def _between(first: str, last: str) -> str:
    """`layers/0…11/up` for what stands for several."""
    a, b = first.split("/"), last.split("/")
    if first == last or len(a) != len(b):
        return first
    return "/".join(x if x == y else f"{x}…{_number(y)}" for x, y in zip(a, b, strict=True))


def _number(part: str) -> str:
    numbers = re.findall(r"\d+", part)
    return numbers[-1] if numbers else part


def _loops(network: Network, rows: Sequence[Row]) -> list[tuple[int, int, str]]:
    places: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if row.node.loops:
            places.setdefault(row.node.loops, []).append(i)
    return [(found[0], found[-1], times(rows[found[0]].node, network)) for found in places.values()]


def columns_of(picture: Picture, most: int) -> list[range]:
    """Rows cut into columns of at most `most`, where little flows across."""
    n, made, start = len(picture.rows), [], 0
    count = -(-n // most)
    # Even columns look better than full ones and a rest.
    wanted = -(-n // max(1, count))
    while n - start > most:
        low = start + max(1, wanted - 8)
        choices = range(low, min(start + most, n - 1) + 1)
        cut = min(choices, key=lambda c: (_across(picture, c), abs(c - start - wanted)))
        made.append(range(start, cut))
        start = cut
    return [*made, range(start, n)]


def _across(picture: Picture, cut: int) -> int:
    wires = sum(min(w.source, *w.targets) < cut <= max(w.source, *w.targets) for w in picture.wires)
    return wires + sum(first < cut <= last for first, last, _ in picture.brackets)


def lanes(spans: Sequence[tuple[int, int]]) -> list[int]:
    """For each span of rows a lane in which no other one overlaps; short ones inside."""
    order = sorted(range(len(spans)), key=lambda i: (spans[i][1] - spans[i][0], spans[i]))
    taken: list[list[tuple[int, int]]] = []
    chosen = [0] * len(spans)
    for i in order:
        low, high = spans[i]
        lane = next(
            (k for k, used in enumerate(taken) if all(high < a or b < low for a, b in used)),
            len(taken),
        )
        if lane == len(taken):
            taken.append([])
        taken[lane].append((low, high))
        chosen[i] = lane
    return chosen

"""A network as a table, and in the language of Graphviz."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxcompress.report._leaves import require
from jaxcompress.report._network import Network, Node

if TYPE_CHECKING:
    from rich.table import Table

_SIGNS = {"add": "+", "mul": "×", "matmul": "@", "concat": "concat"}
GREY, BLUE, PALE = "#b3b3b3", "#0072B2", "#f2f2f2"


def network_table(network: Network) -> "Table":
    """The nodes as a `rich.table.Table`, with what flows into each."""
    require("network", "rich")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE, show_footer=True, padding=(0, 1, 0, 0))
    flops = sum(node.flops for node in network.nodes)
    heads = ("layer", "kind", "output", "params", "flops", "from")
    ends = ("total", "", "", f"{network.parameters:,}", f"{flops:,}", "")
    for head, end in zip(heads, ends, strict=True):
        right = head in ("params", "flops")
        made.add_column(
            Text(head),
            footer=Text(end),
            justify="right" if right else "left",
            no_wrap=head not in ("layer", "from"),
            overflow="fold",
            footer_style="bold",
        )
    for node in network.nodes:
        made.add_row(*map(Text, _cells(node, network)))
    return made


def network_text(network: Network) -> str:
    """The table as plain text, at most 120 wide."""
    from jaxcompress.report._table import plain_console, printed

    require("network", "rich")
    return printed(plain_console(), network_table(network))


def _cells(node: Node, network: Network) -> tuple[str, ...]:
    sources = []
    for edge in network.edges:
        if edge.target == node.name:
            how = ", ".join(part for part in (edge.label, "before" if edge.loop else "") if part)
            sources.append(f"{edge.source} ({how})" if how else edge.source)
    trips = times(node, network)
    return (
        node.name,
        kind_of(node) + (f" {trips}" if trips else ""),
        "×".join(map(str, node.output)) or "scalar",
        f"{node.parameters:,}" if node.paths else "",
        f"{node.flops:,}" if node.flops else "",
        ", ".join(sources),
    )


def kind_of(node: Node) -> str:
    """What a node is, in words: `3×3 conv`, `dense`, `norm`, …"""
    if node.op == "conv_general_dilated":
        return "×".join(map(str, node.window)) + " conv"
    return "dense" if node.kind == "layer" else node.kind


def times(node: Node, network: Network) -> str:
    """`× 12` for what runs in a loop of twelve trips; `× n` where values decide."""
    trips = [network.loops.get(loop) for loop in node.loops]
    if not trips:
        return ""
    return "× n" if None in trips else f"× {math.prod(n or 0 for n in trips)}"


def network_dot(network: Network, after: Network | None = None) -> str:
    """The graph as text for Graphviz, which draws it: `dot -Tsvg network.dot`.

    Args:
        network: from `jc.report.network`.
        after: None, or that of a smaller one: widths are written as `64 → 32`, what is gone
            is grey.

    Examples:
        >>> net = jc.report.network(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones(2))
        >>> print(network_dot(net))
        digraph network {
          rankdir=TB;
          node [shape=box, style="rounded,filled", fillcolor="#f2f2f2", fontname="sans-serif"];
          n0 [label="input\\n2", shape=oval];
          n1 [label="w\\ndense 2 → 3\\n6 parameters", fillcolor="#cfe3f1"];
          n2 [label="output\\n3", shape=oval];
          n0 -> n1;
          n1 -> n2;
        }
    """
    later = matched(network, after)
    ids = {node.name: f"n{i}" for i, node in enumerate(network.nodes)}
    lines = [
        "digraph network {",
        "  rankdir=TB;",
        f'  node [shape=box, style="rounded,filled", fillcolor="{PALE}", fontname="sans-serif"];',
    ]
    clusters: dict[Any, list[str]] = {}
    for node in network.nodes:
        gone = after is not None and node.name not in later
        line = f"{ids[node.name]} [{_look(node, later.get(node.name), gone)}];"
        clusters.setdefault(node.loops[:1], []).append(line)
    for loops, inside in clusters.items():
        if loops:
            trips = network.loops.get(loops[0])
            name = "_".join(map(str, loops[0]))
            lines += [f"  subgraph cluster_{name} {{", f'    label="× {trips or "n"}";']
            lines += [f"    {line}" for line in inside] + ["  }"]
        else:
            lines += [f"  {line}" for line in inside]
    for edge in network.edges:
        look = [f"label={quoted(edge.label)}"] if edge.label else []
        # A dashed edge goes to the next trip of a loop and does not order the picture.
        look += ["style=dashed", "constraint=false"] if edge.loop else []
        end = f" [{', '.join(look)}]" if look else ""
        lines.append(f"  {ids[edge.source]} -> {ids[edge.target]}{end};")
    return "\n".join([*lines, "}"])


def matched(before: Network, after: Network | None) -> dict[str, Node]:
    """By the name of each node the one of the network after that does the same, if one does.

    What has no parameters has no name that lasts: it is known by the layers that flow into it.
    """
    if after is None:
        return {}
    later = {key: node for node, key in zip(after.nodes, _keys(after), strict=True)}
    pairs = zip(before.nodes, _keys(before), strict=True)
    return {node.name: later[key] for node, key in pairs if key in later}


def _keys(network: Network) -> list[Any]:
    named = {n.name for n in network.nodes if n.paths or n.kind in ("input", "output")}
    into: dict[str, set[str]] = {}
    for edge in network.edges:
        if edge.source in named:
            into.setdefault(edge.target, set()).add(edge.source)
    keys, taken = [], {}
    for node in network.nodes:
        layers = frozenset(into.get(node.name, ()))
        key = node.name if node.name in named else (node.kind, layers)
        taken[key] = taken.get(key, -1) + 1
        keys.append((key, taken[key]))
    return keys


def _look(node: Node, later: Node | None, gone: bool) -> str:
    if node.kind in ("input", "output"):
        return f"label={quoted(node.name, '×'.join(map(str, node.output)))}, shape=oval"
    if not node.paths:
        sign = _SIGNS.get(node.kind, node.kind)
        return f"label={quoted(sign)}, shape=oval, tooltip={quoted(node.name)}"
    parts = [node.name, f"{kind_of(node)} {widths(node, later)}".strip()]
    parts.append(
        f"{node.parameters:,} parameters"
        if later is None or later.parameters == node.parameters
        else f"{node.parameters:,} → {later.parameters:,} parameters"
    )
    color = GREY if gone else "#cfe3f1" if node.kind in ("layer", "lookup") else PALE
    if gone:
        parts.append("gone")
    return f'label={quoted(*parts)}, fillcolor="{color}"'


def widths(node: Node, later: Node | None = None) -> str:
    """`64 → 128` of one network; of two `64 → 128, now 32 → 64`."""

    def of(node: Node) -> str:
        known = [n for n in (node.width_in, node.width) if n is not None]
        return " → ".join(map(str, known))

    now = "" if later is None or of(later) == of(node) else f", now {of(later)}"
    return of(node) + now


def quoted(*lines: str) -> str:
    """A string of Graphviz, whose lines are these; paths may hold any signs."""
    made: Sequence[str] = [
        line.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") for line in lines
    ]
    return '"' + "\\n".join(made) + '"'

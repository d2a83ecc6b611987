"""Residual blocks by name: what they are called, what goes with them, which are one layer."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxcompress.tracing._jaxprs import Location, Traced
from jaxcompress.tracing._residual_layers import find_layers, previous
from jaxcompress.tracing._residuals import Residual, Search, alive, search
from jaxcompress.tracing._values import Value


class ResidualBlock(NamedTuple):
    """A part `f` of a function, in a sum `y = x + f(x)`, that can be left out: `y = x`.

    Attributes:
        name: what the paths of its leaves begin with, or the path of one; unique.
        leaves: paths of the leaves that nothing else uses: they go with it. Of a scan over layers
            those that get shorter.
        layers: how many layers a scan has, each of which can be left out; 0: it is no scan.
        shape: of `x`, where it is added, and of `y`.
        dtype: of them.
        contains: names of the blocks inside of `f`, which go with it.
        parts: names of the blocks that it is made of, which are left out together.
        location: of the addition, or of the scan, in the traced function.
    """

    name: str
    leaves: tuple[str, ...]
    layers: int
    shape: tuple[int, ...]
    dtype: Any
    contains: tuple[str, ...]
    parts: tuple[str, ...]
    location: Location


class Blocks(NamedTuple):
    """The residual blocks of a traced function.

    Attributes:
        traced: the function.
        state: its graph.
        residuals: the blocks by name.
        listed: what users get to know of them, in the order of the program.
    """

    traced: Traced
    state: Search
    residuals: dict[str, Residual]
    listed: tuple[ResidualBlock, ...]


def blocks_of(traced: Traced) -> Blocks:
    """Finds and names the blocks of a traced function."""
    state = search(traced)
    find_layers(state)
    before = alive(state)
    found = [block for block in state.found if block.y in before or block.loop is not None]
    lives = [alive(state, block.edges, [block.loop] if block.loop else []) for block in found]
    leaves = [
        [traced.paths[i] for i in block.leaves]
        if block.loop is not None
        else _paths(state, traced, before - live)
        for block, live in zip(found, lives, strict=True)
    ]
    names = _names(
        [
            own or _paths(state, traced, state.graph.before([b.branch], stop=b.root))
            for own, b in zip(leaves, found, strict=True)
        ],
        traced,
    )
    listed = []
    for name, block, own, live in zip(names, found, leaves, lives, strict=True):
        inside = tuple(
            other
            for other, b in zip(names, found, strict=True)
            if b is not block and (b.y not in live if b.loop is None else _unused(b, live))
        )
        aval = state.graph.avals[block.y]
        layers = 0 if block.loop is None else block.loop.body.trips or 0
        listed.append(
            ResidualBlock(
                name, tuple(own), layers, aval.shape, aval.dtype, inside, (name,), block.location
            )
        )
    return Blocks(traced, state, dict(zip(names, found, strict=True)), tuple(listed))


def layers_of(blocks: Blocks) -> tuple[ResidualBlock, ...]:
    """Blocks that follow each other in one layer as one: attention and the network after it."""
    state, ends = blocks.state, {}
    joined: list[list[ResidualBlock]] = []
    for block in blocks.listed:
        residual = blocks.residuals[block.name]
        before = None if block.layers else previous(state, residual.kept)
        row = None if before is None else ends.get(before)
        parallel = residual.kept is None and residual.y in ends
        row = ends[residual.y] if parallel else row
        if row is not None and _one_layer(row[-1], block):
            row.append(block)
        else:
            row = [block]
            joined.append(row)
        ends[residual.y] = row
    return tuple(row[0] if len(row) == 1 else _joined(blocks, row) for row in joined)


def _joined(blocks: Blocks, row: Sequence[ResidualBlock]) -> ResidualBlock:
    state, traced = blocks.state, blocks.traced
    edges = [edge for block in row for edge in blocks.residuals[block.name].edges]
    own = _paths(state, traced, alive(state) - alive(state, edges))
    names = {block.name for block in row}
    inside = dict.fromkeys(name for block in row for name in block.contains)
    return row[0]._replace(
        name="/".join(_prefix([_parts(path) for block in row for path in block.leaves])),
        leaves=tuple(own),
        contains=tuple(name for name in inside if name not in names),
        parts=tuple(block.name for block in row),
    )


def _one_layer(a: ResidualBlock, b: ResidualBlock) -> bool:
    """Whether two blocks are parts of one layer, by their leaves: `layers/3/attn`, `…/mlp`."""
    if not (a.leaves and b.leaves) or b.layers or a.layers:
        return False
    mine, others = (_prefix([_parts(path) for path in block.leaves]) for block in (a, b))
    common = _prefix([mine, others])
    if not common or not re.search(r"\d", common[-1]):
        return False
    # Numbered things of one kind are layers themselves: `stage1/0`, `stage1/1`.
    kinds = [
        re.sub(r"\d+", "", prefix[len(common)]) for prefix in (mine, others) if prefix != common
    ]
    return len(kinds) < 2 or kinds[0] != kinds[1]


def _paths(state: Search, traced: Traced, values: set[Value]) -> list[str]:
    return [
        path
        for path, leaf in zip(traced.paths, state.graph.leaves, strict=True)
        if leaf in values and state.graph.weights[leaf]
    ]


def _unused(block: Residual, live: set[Value]) -> bool:
    return block.loop is not None and not any(r in live for r in block.loop.results)


def _names(leaves: Sequence[Sequence[str]], traced: Traced) -> list[str]:
    """What the paths of each have in common; else the path of the leaf with most axes."""
    ndims = {path: len(leaf.shape) for path, leaf in zip(traced.paths, traced.leaves, strict=True)}
    first = ["/".join(_prefix([_parts(path) for path in paths])) for paths in leaves]
    names, taken = [], {}
    for name, paths in zip(first, leaves, strict=True):
        if not name or first.count(name) > 1:
            name = max(paths, key=ndims.__getitem__, default="block")
        use = taken[name] = taken.get(name, -1) + 1
        names.append(name if use == 0 else f"{name}:{use}")
    return names


def _parts(path: str) -> list[str]:
    return path.split("/")


def _prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    found = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return found

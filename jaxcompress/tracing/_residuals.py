"""Residual blocks of a function: sums `y = x + f(x)` that are `y = x` without `f`."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jaxcompress.tracing._jaxprs import Location, Traced
from jaxcompress.tracing._sites import OPS, param_paths
from jaxcompress.tracing._values import Graph, Loop, Op, Value, graph_of

Edge = tuple[Location, int]
"""An operand of an addition that is left out: the location of the equation, and the index."""

# What hands on the value of its first operand.
SAME = frozenset(
    "convert_element_type copy copy_p name sharding_constraint reshard mesh_cast reduce_precision"
    " stop_gradient optimization_barrier pvary pcast pbroadcast device_put".split()
)
_SPREADS = SAME | {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


class Residual(NamedTuple):
    """A residual block in the graph of a function.

    Attributes:
        edges: what is left out of which additions.
        root: the value `x` that `f` is computed from.
        kept: what the first addition is left with; None where that is no part of the stream.
        y: the sum.
        branch: the value of `f`, the operand of the first addition.
        loop: of a scan over layers, whose trips are the blocks; it has no edges.
        carry: the invar of the loop's body that is the stream.
        leaves: the leaves whose rows the trips get, and nothing else uses.
    """

    edges: tuple[Edge, ...]
    root: Value
    kept: Value | None
    y: Value
    branch: Value
    loop: Loop | None = None
    carry: int = 0
    leaves: tuple[int, ...] = ()

    @property
    def location(self) -> Location:
        """Of the first addition, or of the scan."""
        return self.edges[0][0] if self.loop is None else self.loop.location


@dataclasses.dataclass
class Search:
    """The graph of a function, with the residual blocks found so far.

    Attributes:
        graph: of the function.
        children: for each value those that are computed from it.
        returned: what the function returns.
        sums: from the sum at the end of a block to the block.
        found: all blocks, in the order of the program.
    """

    graph: Graph
    children: list[list[Value]]
    returned: frozenset[Value]
    sums: dict[Value, Residual] = dataclasses.field(default_factory=dict)
    found: list[Residual] = dataclasses.field(default_factory=list)

    def consumer(self, value: Value) -> Op | None:
        """The only equation that uses a value; None if there are several, or another use."""
        ops = [self.graph.producers[child] for child in self.children[value]]
        if value in self.returned or not ops or any(op is not ops[0] for op in ops):
            return None
        return ops[0]


def search(traced: Traced) -> Search:
    """Finds the residual blocks of a traced function.

    Values that are the same number in the graph are the same array, so that a block is found
    whether its parts are in one jaxpr or in several.
    """
    graph = graph_of(traced.jaxpr, param_paths(traced))
    children: list[list[Value]] = [[] for _ in graph.parents]
    for value, parents in enumerate(graph.parents):
        for parent in parents:
            children[parent].append(value)
    state = Search(graph, children, frozenset(v for v in graph.outs if v is not None))
    for op in graph.ops:
        if op.eqn.primitive.name == "add" and op.outs[0] not in state.sums:
            _find(state, op)
    return state


def _find(state: Search, op: Op) -> None:
    """The block that ends with this addition, if there is one, or the blocks side by side."""
    graph, (a, b) = state.graph, op.ins
    if a is None or b is None or not jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.inexact):
        return
    shapes = [v.aval.shape for v in op.eqn.invars]
    if not shapes[0] or shapes[0] != shapes[1]:
        return
    for skip, k in ((a, 1), (b, 0)):
        branch = op.ins[k]
        if branch is None or not graph.inputs[branch]:
            continue
        for root, biases in _skipped(state, skip):
            if graph.frames[root] != graph.frames[branch] or not graph.inputs[root]:
                break
            if _reaches(graph, root, branch) is None:
                continue
            edges = ((op.location, k), *biases)
            block = Residual(edges, root, root if biases else skip, op.outs[0], branch)
            parts = _side_by_side(state, root, (op.location, k), branch)
            if len(parts) > 1 and not biases:
                for edge, value in parts:
                    state.found.append(block._replace(edges=(edge,), kept=None, branch=value))
            else:
                block = _with_bias(state, block)
                state.found.append(block)
            state.sums[block.y] = block
            return


def _skipped(state: Search, value: Value) -> Iterator[tuple[Value, tuple[Edge, ...]]]:
    """The values that a value is, but for biases and residual blocks that were added to it."""
    graph, biases = state.graph, ()
    at: Value | None = value
    while at is not None:
        value = at
        yield value, biases
        op = graph.producers[value]
        if value in state.sums:
            at = state.sums[value].root
        elif op is not None and op.eqn.primitive.name in SAME:
            at = op.ins[op.outs.index(value)] if len(op.outs) > 1 else op.ins[0]
        elif op is not None and (k := _bias_of(graph, op)) is not None:
            if state.consumer(value) is None:
                return
            biases, at = (*biases, (op.location, k)), op.ins[1 - k]
        else:
            return


def _bias_of(graph: Graph, op: Op) -> int | None:
    """The operand of an addition that is one number a channel, of a parameter."""
    if op.eqn.primitive.name != "add" or None in op.ins:
        return None
    for k, value in enumerate(op.ins):
        while value is not None and graph.is_weight(value):
            if sum(size > 1 for size in graph.avals[value].shape) <= 1:
                return k
            producer = graph.producers[value]
            if producer is None or producer.eqn.primitive.name not in _SPREADS:
                break
            value = producer.ins[0]
    return None


def _with_bias(state: Search, block: Residual) -> Residual:
    """With the bias that is added after the sum: `x + h @ w + b`."""
    op = state.consumer(block.y)
    if op is None or (k := _bias_of(state.graph, op)) is None or op.ins[1 - k] != block.y:
        return block
    return block._replace(edges=(*block.edges, (op.location, k)), y=op.outs[0])


def _reaches(graph: Graph, root: Value, end: Value) -> set[Value] | None:
    """What is computed between two values; None if no parameter acts on the way."""
    if end <= root:
        return None
    region = graph.before([end], stop=root)
    if root not in region:
        return None
    way, acts = {root}, False
    for value in sorted(v for v in region if v > root):
        if any(p in way for p in graph.parents[value]):
            way.add(value)
            acts = acts or any(graph.is_weight(p) for p in graph.parents[value])
    return region if acts and end in way else None


def _side_by_side(state: Search, root: Value, edge: Edge, value: Value) -> list[tuple[Edge, Value]]:
    """The terms of a sum that are computed apart from each other: `attention(x) + mlp(x)`."""
    graph, whole = state.graph, [(edge, value)]
    op = graph.producers[value]
    while op is not None and op.eqn.primitive.name in SAME and len(op.outs) == 1:
        if state.consumer(value) is None or op.ins[0] is None:
            return whole
        value = op.ins[0]
        op = graph.producers[value]
    if op is None or op.eqn.primitive.name != "add" or None in op.ins:
        return whole
    if state.consumer(value) is None:
        return whole
    regions = [_reaches(graph, root, v) for v in op.ins if v is not None]
    if any(region is None for region in regions):
        return whole
    if regions[0] and regions[1] and _products(graph, regions[0] & regions[1], root):
        return whole
    return [
        part
        for k, v in enumerate(op.ins)
        if v is not None
        for part in _side_by_side(state, root, (op.location, k), v)
    ]


def _products(graph: Graph, values: Iterable[Value], root: Value = -1) -> bool:
    """Whether one of the values is a product with a parameter."""
    return any(
        (op := graph.producers[v]) is not None
        and op.eqn.primitive.name in OPS
        and any(graph.is_weight(p) for p in graph.parents[v])
        for v in values
        if v > root
    )


def alive(state: Search, edges: Iterable[Edge] = (), skipped: Iterable[Loop] = ()) -> set[Value]:
    """The values that are needed where some operands of additions are left out.

    Args:
        state: of the function.
        edges: what is left out.
        skipped: scans none of whose trips are run.
    """
    graph = state.graph
    kept: dict[Value, list[Value]] = {}
    for loop in skipped:
        for j, k in loop.body.carried.items():
            operand = loop.operands[loop.body.inputs[j]]
            kept[loop.results[k]] = [] if operand is None else [operand]
    for location, k in closed(state, edges):
        value = graph.results[location][0]
        operands = kept.get(value, graph.parents[value])
        op = graph.producers[value]
        left_out = None if op is None else op.ins[k]
        kept[value] = [v for v in operands if v != left_out]

    def needed(roots: Iterable[Value]) -> set[Value]:
        found, todo = set(), list(roots)
        while todo:
            value = todo.pop()
            if value not in found:
                found.add(value)
                todo += kept.get(value, graph.parents[value])
        return found

    live = needed(state.returned)
    if graph.effects:
        lost = graph.before(state.returned) - live
        roots = [
            v
            for operands in graph.effects.values()
            if not lost & graph.before(operands)
            for v in operands
        ]
        live |= needed(roots)
    return live


def closed(state: Search, edges: Iterable[Edge]) -> frozenset[Edge]:
    """With the sums of which nothing is left."""
    found, todo = set(), list(edges)
    while todo:
        location, k = todo.pop()
        if (location, k) not in found:
            found.add((location, k))
            outer = sum_of(state, location) if (location, 1 - k) in found else None
            todo += [] if outer is None else [outer]
    return frozenset(found)


def sum_of(state: Search, location: Location) -> Edge | None:
    """The operand of the addition that the result of an addition goes to."""
    value = state.graph.results[location][0]
    op = state.consumer(value)
    while op is not None and op.eqn.primitive.name in SAME:
        value = op.outs[0]
        op = state.consumer(value)
    if op is None or op.eqn.primitive.name != "add":
        return None
    return op.location, op.ins.index(value)

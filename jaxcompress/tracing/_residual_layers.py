"""Scans over layers of which some can be left out, and what a stream was before."""

from jaxcompress.tracing._residuals import SAME, Residual, Search, alive
from jaxcompress.tracing._sites import OPS
from jaxcompress.tracing._values import Graph, Loop, Value


def find_layers(state: Search) -> None:
    """Scans over layers of which trips can be left out, in place of the blocks inside."""
    graph = state.graph
    live = alive(state)
    for loop in graph.loops:
        if loop.body.label != "scan" or loop.frame or loop.sharded:
            continue
        carries = loop.body.carried
        apart = [r for k, r in enumerate(loop.results) if k not in carries.values()]
        if any(r in live for r in apart):
            continue
        streams = []
        for j, k in carries.items():
            blocks = _passes(state, loop.ends[k], loop.entries[j])
            if blocks is None:
                break
            streams += [(j, k)] if blocks else []
        else:
            leaves = tuple(i for i, leaf in enumerate(graph.leaves) if _rows_of(state, leaf, loop))
            sliced = [loop.operands[loop.body.inputs[j]] for j in loop.body.sliced]
            if streams and any(v is not None and graph.is_weight(v) for v in sliced):
                (j, k), frame = streams[0], (*loop.location, 0)
                state.found = [b for b in state.found if graph.frames[b.y][: len(frame)] != frame]
                entry, end = loop.entries[j], loop.ends[k]
                assert end is not None
                state.found.append(Residual((), entry, entry, end, end, loop, j, leaves))
    state.found.sort(key=lambda block: block.location)


def _passes(state: Search, value: Value | None, entry: Value) -> int | None:
    """How many residual blocks are between what a trip gets and what it leaves.

    None if it does not pass on, but for blocks, norms and activations, what it got.
    """
    blocks, changed = 0, False
    while value is not None and value != entry:
        before = _step(state, value, entry)
        if before is None:
            before, changed = (_normalized(state, value, entry), 0), True
        value, passed = before
        blocks += passed
    # A counter or a key that is only changed is none of a stream.
    return None if value is None or (changed and not blocks) else blocks


def _step(state: Search, value: Value, entry: Value) -> tuple[Value | None, int] | None:
    """What a value was before the last block or loop; None if it is of neither."""
    graph = state.graph
    if value in state.sums:
        return state.sums[value].root, 1
    for loop in graph.loops:
        if value in loop.results:
            inner = {k: j for j, k in loop.body.carried.items()}
            k = loop.results.index(value)
            if k not in inner:
                return None, 0
            blocks = _passes(state, loop.ends[k], loop.entries[inner[k]])
            operand = loop.operands[loop.body.inputs[inner[k]]]
            return (None, 0) if blocks is None else (operand, blocks)
    return (entry, 0) if _summed(graph, value, entry) else None


def _summed(graph: Graph, value: Value | None, entry: Value) -> bool:
    """Whether a value is what layers add up, as a loss of each."""
    op = None if value is None else graph.producers[value]
    if op is None or op.eqn.primitive.name != "add":
        return value == entry
    return any(
        other is not None
        and (graph.inputs[other] or graph.weights[other])
        and _summed(graph, skip, entry)
        for skip, other in (op.ins, op.ins[::-1])
    )


def _normalized(state: Search, value: Value, entry: Value) -> Value | None:
    """The one value that a norm or an activation is computed from."""
    graph, ends, todo, seen = state.graph, set(), [value], set()
    results = {r for loop in graph.loops for r in loop.results}
    while todo:
        v = todo.pop()
        if v in seen or not graph.inputs[v]:
            continue
        seen.add(v)
        op = graph.producers[v]
        if v != value and (v == entry or v in state.sums or v in results):
            ends.add(v)
        elif op is None or op.eqn.primitive.name in OPS:
            return None
        else:
            todo += graph.parents[v]
    if len(ends) != 1:
        return None
    (end,) = ends
    return end if graph.avals[end].shape == graph.avals[value].shape else None


def _rows_of(state: Search, leaf: Value, loop: Loop) -> bool:
    """Whether nothing is done with a leaf, but that the trips of a scan get its rows."""
    graph, todo, used = state.graph, [leaf], False
    entries = {loop.entries[j] for j in loop.body.sliced}
    while todo:
        value = todo.pop()
        if value in state.returned:
            return False
        for child in state.children[value]:
            op = graph.producers[child]
            if child in entries:
                used = True
            elif op is not None and op.eqn.primitive.name in SAME:
                todo.append(child)
            else:
                return False
    return used and graph.is_weight(leaf)


def previous(state: Search, value: Value | None) -> Value | None:
    """The last sum that a value is of, through norms and activations."""
    for _ in range(3):
        if value is None or value in state.sums:
            return value
        op = state.graph.producers[value]
        if op is not None and op.eqn.primitive.name in SAME:
            value = op.ins[0]
        else:
            value = _normalized(state, value, -1)
    return None

"""What sums over, moves, cuts or joins axes does to one that turns."""

from jaxcompress.tracing._dot import read_dot
from jaxcompress.tracing._stream_graph import Axis, Graph, State
from jaxcompress.tracing._stream_pointwise import each, forbid, other, united
from jaxcompress.tracing._views import runs


def reduced(eqn, states, graph, why) -> State:
    summed, (state,) = eqn.params["axes"], states
    for d in summed:
        axis = state.axes.get(d)
        if axis is not None and axis.gains:
            graph.refuse(axis, why)
        elif axis is not None:
            graph.value(axis)
    left = [d for d in range(len(eqn.invars[0].aval.shape)) if d not in summed]
    axes = {i: graph.value(state.axes[d]) for i, d in enumerate(left) if d in state.axes}
    return State(axes, frozenset(i for i, d in enumerate(left) if d in state.flat))


def _moved(state: State, places: dict[int, int], flat=()) -> State:
    """Axis d of the operand is `places[d]` of the result."""
    axes = {places[d]: axis for d, axis in state.axes.items() if d in places}
    return State(axes, frozenset(places[d] for d in state.flat if d in places) | frozenset(flat))


def transposed(eqn, states, graph, why) -> State:
    return _moved(states[0], {d: i for i, d in enumerate(eqn.params["permutation"])})


def broadcast(eqn, states, graph, why) -> State:
    places = dict(enumerate(eqn.params["broadcast_dimensions"]))
    shape = eqn.invars[0].aval.shape
    kept = {places[d] for d in places if shape[d] != 1}
    return _moved(states[0], places, set(range(len(eqn.outvars[0].aval.shape))) - kept)


def reshaped(eqn, states, graph, why) -> State:
    state = states[0]
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    places, flat, i, j = {}, set(), 0, 0
    if 0 in (*old, *new):
        return other(eqn, states, graph, why)
    for before, after in runs(old, new):
        own = [d for d in range(i, i + before) if old[d] > 1]
        theirs = [d for d in range(j, j + after) if new[d] > 1]
        if len(own) == len(theirs) == 1:
            places[own[0]] = theirs[0]
        else:
            forbid([state.axes.get(d) for d in own], graph, why)
            if all(d in state.flat for d in own):
                flat.update(theirs)
        i, j = i + before, j + after
    return _moved(state, places, flat)


def squeezed(eqn, states, graph, why) -> State:
    gone = [d % len(eqn.invars[0].aval.shape) for d in eqn.params["dimensions"]]
    left = [d for d in range(len(eqn.invars[0].aval.shape)) if d not in gone]
    return _moved(states[0], {d: i for i, d in enumerate(left)})


def cut(eqn, states, graph, why) -> State:
    """Slices and paddings: whole along what turns."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    state, kept = states[0], {}
    for d in range(len(old)):
        if old[d] == new[d] and not (eqn.primitive.name == "rev" and d in eqn.params["dimensions"]):
            kept[d] = d
        else:
            graph.refuse(state.axes.get(d), why)
    values = {d: graph.value(axis) for d, axis in state.axes.items()}
    flat = state.flat if eqn.primitive.name != "pad" else frozenset()
    return _moved(State(values, flat), kept)


def joined(eqn, states, graph, why) -> State:
    across = eqn.params["dimension"]

    def one(found, d):
        return None if d == across else united([axis for axis in found if axis], graph)

    joined = each(eqn, states, graph, why, one)
    return joined._replace(flat=joined.flat - {across})


def gathered(eqn, states, graph, why) -> State:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    left = [
        d
        for d in range(len(shape))
        if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    ]
    places = {
        d: out
        for d, out in zip(left, numbers.offset_dims, strict=True)
        if sizes[d] == shape[d] and d not in numbers.start_index_map
    }
    forbid([axis for d, axis in states[0].axes.items() if d not in places], graph, why)
    forbid(list(states[1].axes.values()), graph, why)
    moved = _moved(states[0], places)
    return State({d: graph.value(axis) for d, axis in moved.axes.items()}, moved.flat)


def dot(eqn, states, graph, why) -> State:
    contract, batch = eqn.params["dimension_numbers"]
    for i, j in zip(*contract, strict=True):
        _summed(states[0].axes.get(i), states[1].axes.get(j), graph, why)
    for side, state in enumerate(states):
        forbid([state.axes.get(d) for d in batch[side]], graph, why)
    labels = read_dot(eqn, 1)
    axes = {}
    for state, side in zip(states, (labels.x, labels.w), strict=True):
        for d, axis in state.axes.items():
            if side[d] not in labels.out or (side[d] in labels.x and side[d] in labels.w):
                continue
            axes[labels.out.index(side[d])] = graph.value(axis)
    return State(axes)


def _summed(a: Axis | None, b: Axis | None, graph: Graph, why: str) -> None:
    if a is None or b is None or a.square or b.square or (a.gains and b.gains):
        forbid([a, b], graph, why)
        return
    for weight, stream in ((b, a), (a, b)):
        if weight.leaf is not None:
            graph.reads(weight, stream)
            return
    if a.gains or b.gains:
        forbid([a, b], graph, why)
    else:
        graph.unite(a.node, b.node)

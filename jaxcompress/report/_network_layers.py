"""Reading a jaxpr as layers: what has parameters, what joins, and which flows into which."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jec

from jaxcompress.report._network_marks import mark, marks_of_call
from jaxcompress.report._network_widths import widths_of
from jaxcompress.tracing._flops import flops
from jaxcompress.tracing._jaxprs import Body, Location, bodies, constant, scope_of
from jaxcompress.tracing._walk import join

_JOINS: dict[str, str] = {
    "add": "add",
    "add_any": "add",
    "sub": "add",
    "mul": "mul",
    "concatenate": "concat",
}
_PRODUCTS = frozenset("dot_general conv_general_dilated ragged_dot_general ragged_dot".split())
# Their other operands only say where, or whether.
_INDEXED = frozenset("gather dynamic_slice select_n".split())
# The values of an affine map of each channel, as that of a norm.
_AFFINE = frozenset("mul sub div add add_any".split())


class Value(NamedTuple):
    """What is known of a value: where it comes from.

    Attributes:
        source: index of a node, or of a port (negative); None: of none.
        paths: of the parameters that it was made of, if of nothing else.
        marks: what was done since: activations and norms.
    """

    source: int | None = None
    paths: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


CONSTANT = Value()


@dataclasses.dataclass
class Box:
    """A node while the program is read; `Node` tells what the fields are."""

    kind: str
    op: str
    scope: str
    paths: list[str]
    shape: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    width: int | None = None
    width_in: int | None = None
    window: tuple[int, ...] = ()
    flops: int = 0
    loops: tuple[Location, ...] = ()
    normed: bool = False
    weights: int = 0


class Link(NamedTuple):
    """An edge while the program is read."""

    source: int
    target: int
    marks: tuple[str, ...]


class Around(NamedTuple):
    """Where a jaxpr stands."""

    location: Location = ()
    scope: str = ""
    trips: int = 1
    loops: tuple[Location, ...] = ()


class Reading:
    """Nodes and links, filled while a program is read.

    Attributes:
        boxes: the nodes.
        links: the edges; their sources may be ports.
        ports: of what a loop carries, `(before the loop, after a trip)`.
        loops: how often each loop runs; None where that depends on values.
    """

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.links: list[Link] = []
        self.ports: dict[int, tuple[Value, Value]] = {}
        self.loops: dict[Location, int | None] = {}

    def add(self, box: Box, given: Sequence[Value] = ()) -> Value:
        """A node and the edges into it."""
        self.boxes.append(box)
        target = len(self.boxes) - 1
        for value in given:
            if value.source is not None:
                self.links.append(Link(value.source, target, value.marks))
        if box.width is None:
            box.width = next((w for v in given if (w := self._width(v)) is not None), None)
        return Value(target)

    def _width(self, value: Value) -> int | None:
        source = value.source
        while source is not None and source < 0:
            source = self.ports[source][0].source
        return None if source is None else self.boxes[source].width

    def only_input(self, source: int) -> int | None:
        """The node that alone flows into `source`."""
        found = {link.source for link in self.links if link.target == source}
        return found.pop() if len(found) == 1 else None


def read(jaxpr: Any, given: Sequence[Value], reading: Reading, around: Around) -> list[Value]:
    """The values of the results; adds what is found on the way."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def value(v):
        return CONSTANT if isinstance(v, jec.Literal) else known.get(v, CONSTANT)

    for i, eqn in enumerate(jaxpr.eqns):
        values = [value(v) for v in eqn.invars]
        here = around._replace(
            location=(*around.location, i), scope=join(around.scope, scope_of(eqn))
        )
        inside = bodies(eqn)
        if inside:
            results = _enter(eqn, inside, values, reading, here)
        else:
            results = [_result(eqn, values, reading, here)] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _result(eqn: Any, values: list[Value], reading: Reading, here: Around) -> Value:
    name: str = eqn.primitive.name
    if name.startswith(("random_", "threefry")):
        return CONSTANT
    if name in _PRODUCTS or name == "gather":
        made = _product(eqn, values, reading, here)
        if made is not None:
            return made
    if name in _INDEXED:
        values = _whole(name, values)
    sources = list(dict.fromkeys(v.source for v in values if v.source is not None))
    paths = tuple(dict.fromkeys(p for v in values for p in v.paths))
    marks = tuple(dict.fromkeys(m for v in values for m in v.marks))
    if not sources:
        return Value(None, paths, mark(eqn, marks))
    if len(sources) == 2 and name in _AFFINE - {"add", "add_any"}:
        sources = _absorbed(sources, reading)
    if len(sources) > 1:
        kind: str = _JOINS.get(name, name)
        box = Box(kind, name, here.scope, list(paths), _shape(eqn), loops=here.loops)
        if kind == "concat":
            box.width = _joined_width(eqn, values, reading)
        box.flops = here.trips * flops(eqn)
        return reading.add(box, [v for v in values if v.source is not None])
    source = sources[0]
    if len({v.source for v in values if v.source is not None}) > 1:
        reading.boxes[source].shape = _shape(eqn)
    if paths:
        return _touched(eqn, source, paths, marks, reading, here)
    return Value(source, (), mark(eqn, marks))


def _whole(name: str, values: list[Value]) -> list[Value]:
    """Without the operands that are indices or conditions, unless all else is constant."""
    rest = values[1:] if name == "select_n" else values[:1]
    return rest if any(v.source is not None or v.paths for v in rest) else values


def _absorbed(sources: list[int], reading: Reading) -> list[int]:
    """`x` and a norm's factor for `x` are the norm of `x`."""
    for norm, before in (sources, sources[::-1]):
        if norm >= 0 and reading.boxes[norm].kind == "affine":
            inner: int | None = norm
            while inner is not None and inner >= 0 and reading.boxes[inner].kind == "affine":
                inner = reading.only_input(inner)
            if inner == before:
                return [norm]
    return sources


def _touched(
    eqn: Any, source: int, paths: tuple[str, ...], marks: tuple[str, ...], reading: Reading, here
) -> Value:
    """A value meets parameters outside of a product: a bias, a norm's scale, a position."""
    name: str = eqn.primitive.name
    box = reading.boxes[source] if source >= 0 else None
    adds = name in ("add", "add_any")
    normed = "norm" in marks
    rest = tuple(m for m in marks if m != "norm")
    if box is not None and here.loops == box.loops and not rest:
        biased = box.kind == "layer" and adds and not normed and len(box.paths) == box.weights
        if biased or (box.kind == "affine" and _goes_on(box, paths, adds, normed)):
            box.paths += [p for p in paths if p not in box.paths]
            box.normed |= normed
            box.shape = _shape(eqn)
            return Value(source)
    kind: str = "affine" if name in _AFFINE else _JOINS.get(name, name)
    made = Box(kind, name, here.scope, list(paths), _shape(eqn), loops=here.loops, normed=normed)
    return reading.add(made, [Value(source, (), rest)])


def _goes_on(box: Box, paths: tuple[str, ...], adds: bool, normed: bool) -> bool:
    """Whether parameters belong to the norm before: of one module, and no second norm."""
    # Of Linen the statistics of a norm are in another collection than its scale.
    modules = {tuple(path.split("/")[-2:-1]) for path in (*box.paths, *paths)}
    first_adds = box.op in ("add", "add_any")
    return len(modules) == 1 and not (normed and box.normed) and (adds or not first_adds)


def _product(eqn: Any, values: list[Value], reading: Reading, here: Around) -> Value | None:
    """A layer, or a product of two values; None where it is neither."""
    name: str = eqn.primitive.name
    left, right = values[0], values[1]
    if name == "gather":
        if not left.paths or left.source is not None:
            return None
        weight, other = 0, right
    elif left.source is not None and right.source is not None:
        box = Box("matmul", name, here.scope, [], _shape(eqn), loops=here.loops)
        box.flops = here.trips * flops(eqn)
        box.inputs = tuple(eqn.invars[0].aval.shape)
        return reading.add(box, [left, right])
    elif right.paths and not left.paths:
        weight, other = 1, left
    elif left.paths and not right.paths and name == "dot_general":
        weight, other = 0, right
    else:
        return None
    width_in, width, window = widths_of(eqn, weight)
    box = Box(
        "layer",
        name,
        here.scope,
        list(values[weight].paths),
        _shape(eqn),
        tuple(eqn.invars[1 - weight].aval.shape),
        width,
        width_in,
        window,
        here.trips * flops(eqn),
        here.loops,
        weights=len(values[weight].paths),
    )
    return reading.add(box, [other])


def _joined_width(eqn: Any, values: list[Value], reading: Reading) -> int | None:
    """The channels of a concatenation along channels."""
    across = eqn.params["dimension"]
    own = [reading._width(v) for v in values]
    sizes = [v.aval.shape[across] for v in eqn.invars]
    return sum(sizes) if own == sizes else None


def _enter(
    eqn: Any, inside: list[Body], values: list[Value], reading: Reading, here: Around
) -> list[Value]:
    found: list[list[Value]] = [[] for _ in eqn.outvars]
    before = len(reading.boxes)
    for k, body in enumerate(inside):
        if body.label == "test":
            continue
        loops = body.label in ("scan", "while")
        if loops:
            reading.loops[here.location] = body.trips
        around = Around(
            (*here.location, k),
            here.scope,
            here.trips * (body.trips or 1),
            (*here.loops, here.location) if loops else here.loops,
        )
        given = [values[i] for i in body.inputs]
        ports = {}
        for j in body.carried if loops else ():
            if not constant(body, j):
                port = ports[j] = -1 - len(reading.ports)
                reading.ports[port] = (given[j], CONSTANT)
                given[j] = Value(port)
        results = read(body.jaxpr, given, reading, around)
        for j, port in ports.items():
            reading.ports[port] = (reading.ports[port][0], results[body.carried[j]])
        for j, result in zip(body.outputs, results, strict=True):
            if j is not None:
                found[j].append(_outside(result, ports.values(), reading))
    label = marks_of_call(eqn) if before == len(reading.boxes) else ()
    joined = [_one(eqn, k, several, reading, here) for k, several in enumerate(found)]
    return [_called(value, values, label) for value in joined]


def _outside(value: Value, ports: Collection[int], reading: Reading) -> Value:
    """What a loop gives on as it came in is what came in."""
    while value.source is not None and value.source in ports:
        value = reading.ports[value.source][0]
    return value


def _one(eqn: Any, k: int, several: list[Value], reading: Reading, here: Around) -> Value:
    """The value of a result, which may come from several branches."""
    sources = list(dict.fromkeys(v.source for v in several if v.source is not None))
    if len(sources) > 1:
        box = Box("cond", eqn.primitive.name, here.scope, [], eqn.outvars[k].aval.shape)
        box.loops = here.loops
        return reading.add(box, several)
    return next((v for v in several if v.source is not None), (*several, CONSTANT)[0])


def _called(value: Value, given: list[Value], label: tuple[str, ...]) -> Value:
    """What a call is known as says more than what it is made of."""
    if not label:
        return value
    before = [m for v in given if v.source == value.source for m in v.marks]
    return value._replace(marks=tuple(dict.fromkeys((*before, *label))))


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(eqn.outvars[0].aval.shape)

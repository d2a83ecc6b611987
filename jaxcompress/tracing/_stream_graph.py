"""Axes that have to be rotated alike, and what stands against it."""

from typing import Any, NamedTuple

from jaxcompress.tracing._jaxprs import Location

Node = tuple[str, int]
"""An axis of a leaf, `(path, axis)`."""


class Leaf(NamedTuple):
    """That a value is still a parameter: `shift + leaf`, times a number if it is `scaled`.

    Attributes:
        shift: what was added.
        scaled: whether it was multiplied by something that does not vary along the axis.
        vector: whether the parameter has one axis, beside axes of size 1.
        stack: locations of the scans that give one slice of the leaf to each trip.
    """

    shift: float = 0.0
    scaled: bool = False
    vector: bool = False
    stack: tuple[Location, ...] = ()


class Axis(NamedTuple):
    """An axis of a value that turns with a stream.

    Attributes:
        node: one of those that it turns with.
        leaf: given where the value is a parameter, not used yet.
        gains: the parameters that a stream was multiplied by, entry by entry.
        square: whether it is the square of one, whose sum does not change.
    """

    node: Node
    leaf: Leaf | None = None
    gains: tuple[Node, ...] = ()
    square: bool = False

    @property
    def plain(self) -> bool:
        """Whether it turns as a stream does."""
        return not self.gains and not self.square


class State(NamedTuple):
    """What is known of a value.

    Attributes:
        axes: those that turn with a stream.
        flat: those along which it does not vary, beside axes of size 1.
    """

    axes: dict[int, Axis]
    flat: frozenset[int] = frozenset()


NOTHING = State({})


def parameter(path: str, shape: tuple[int, ...]) -> State:
    """That of a leaf: each of its axes is a node."""
    sizes = {d: n for d, n in enumerate(shape) if n != 1}
    leaf = Leaf(vector=len(sizes) == 1)
    return State({d: Axis((path, d), leaf) for d in sizes})


class Graph:
    """Sets of nodes that turn together, by union; filled while a program is read.

    Attributes:
        reasons: from the first node of a set to why it can't be turned.
        roles: what each node does: `("weight", gains)`, `("gain", shift)`, `("offset", gains)`.
        readers: nodes that a product sums over with a stream.
        writers: nodes that give a stream its values.
        stacks: from a node to the scans that cut its leaf.
    """

    def __init__(self) -> None:
        self.reasons: dict[Node, str] = {}
        self.roles: dict[Node, dict[tuple[Any, ...], None]] = {}
        self.readers: dict[Node, None] = {}
        self.writers: dict[Node, None] = {}
        self.stacks: dict[Node, tuple[Location, ...]] = {}
        self._above: dict[Node, Node] = {}

    def root(self, node: Node) -> Node:
        """The first node of its set."""
        while node in self._above:
            node = self._above[node]
        return node

    def unite(self, a: Node, b: Node) -> None:
        """Both have to turn alike."""
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        self._above[b] = a
        reason = self.reasons.pop(b, None)
        if reason is not None:
            self.reasons.setdefault(a, reason)

    def refuse(self, axis: Axis | None, reason: str) -> None:
        """What turns with `axis` can't be turned."""
        for node in () if axis is None else (axis.node, *axis.gains):
            self.reasons.setdefault(self.root(node), reason)

    def used(self, axis: Axis, role: tuple[Any, ...], partner: Node | None = None) -> None:
        """A parameter does `role` for the stream of `partner`."""
        assert axis.leaf is not None
        self.roles.setdefault(axis.node, {})[role] = None
        self.stacks[axis.node] = axis.leaf.stack
        if partner is not None:
            self.unite(partner, axis.node)

    def value(self, axis: Axis) -> Axis:
        """The axis as that of a value: a parameter becomes one that writes into a stream."""
        if axis.leaf is None:
            return axis
        if axis.leaf.shift:
            self.refuse(axis, "a parameter is shifted")
        self.used(axis, ("weight", ()))
        self.writers[axis.node] = None
        return axis._replace(leaf=None)

    def reads(self, weight: Axis, stream: Axis) -> None:
        """A product sums over an axis of a parameter, with a stream."""
        stream = self.value(stream)
        self.used(weight, ("weight", stream.gains), stream.node)
        self.readers[weight.node] = None
        if weight.leaf is not None and weight.leaf.shift:
            self.refuse(weight, "a parameter is shifted")

    def sets(self) -> dict[Node, list[Node]]:
        """The nodes that do something, by the first one of each set."""
        found: dict[Node, list[Node]] = {}
        for node in self.roles:
            found.setdefault(self.root(node), []).append(node)
        return found

    def check(self) -> None:
        """Refuses sets in which a parameter would have to be two things at once."""
        for node, roles in self.roles.items():
            path = node[0]
            if len(roles) > 1:
                self.refuse(Axis(node), f"{path!r} is used in several ways (tied weights)")
            for role in roles:
                gains = role[1] if role[0] != "gain" else ()
                if any(self.stacks[g] not in ((), self.stacks[node]) for g in gains):
                    self.refuse(Axis(node), f"{path!r} meets gains of other layers of a scan")

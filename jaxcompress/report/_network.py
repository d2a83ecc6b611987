"""A network as a graph of its layers, with their widths."""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcompress import tree
from jaxcompress._types import PyTree
from jaxcompress.report._network_layers import Around as _Around
from jaxcompress.report._network_layers import Box, Link, Reading, Value, read
from jaxcompress.report._network_links import resolved
from jaxcompress.report._network_marks import shown
from jaxcompress.tracing._jaxprs import Location, Traced, trace
from jaxcompress.tracing._sites import is_extra, require_function
from jaxcompress.tracing._walk import join

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Node(NamedTuple):
    """A layer, or a place where several values meet.

    Attributes:
        name: the path of the weight of a layer, `path:1` for its second use; else what it is,
            after the name of its scope. Unique.
        kind: `layer` (a product with parameters), `norm`, `scale`, `bias` and `lookup` (other uses
            of parameters), `add`, `mul`, `concat`, `matmul` (of two values), `cond`, another
            primitive's name, `input` or `output`.
        op: the primitive; empty for inputs and outputs.
        paths: of all parameters that it uses.
        inputs: shape of the activations of a layer, else None.
        output: shape of the result.
        width_in: features that a layer sums over; None for others.
        width: features or channels of the result; None where it isn't known which axis they are.
        window: of a convolution.
        parameters: entries of the leaves that it uses.
        flops: floating-point operations of a product or a sum, in all trips.
        loops: locations of the scans and whiles it runs in, the outermost first.
        after: activations and pools between it and what comes next.
    """

    name: str
    kind: str
    op: str
    paths: tuple[str, ...]
    inputs: tuple[int, ...] | None
    output: tuple[int, ...]
    width_in: int | None
    width: int | None
    window: tuple[int, ...]
    parameters: int
    flops: int
    loops: tuple[Location, ...]
    after: str


class Edge(NamedTuple):
    """That the result of a node flows into another.

    Attributes:
        source: name of a node.
        target: name of a node.
        label: activations, norms without parameters and pools on the way.
        loop: whether it flows there in the next trip of a loop.
    """

    source: str
    target: str
    label: str
    loop: bool


class Network(NamedTuple):
    """Layers in the order of the program, and what flows into which; prints as a table.

    Attributes:
        nodes: inputs first, outputs last.
        edges: in the order of their targets.
        loops: how often each loop runs; None where that depends on values.
        parameters: entries of all parameters, those included that no node uses.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    loops: dict[Location, int | None]
    parameters: int

    def __getitem__(self, name: Any) -> Any:
        """The node of this name."""
        if isinstance(name, str):
            return {node.name: node for node in self.nodes}[name]
        return tuple(self)[name]

    def dot(self, after: "Network | None" = None) -> str:
        """The graph in the language of Graphviz; see `jc.report.network_dot`."""
        from jaxcompress.report._network_graph import network_dot

        return network_dot(self, after)

    def figure(self, after: "Network | None" = None, **options: Any) -> "Figure":
        """A picture of the widths; see `jc.report.network_figure`."""
        from jaxcompress.report._network_figure import network_figure

        return network_figure(self, after, **options)

    def __str__(self) -> str:
        from jaxcompress.report._network_graph import network_text

        return network_text(self)

    def __rich__(self) -> Any:
        from jaxcompress.report._network_graph import network_table

        return network_table(self)


def network(fn: Callable[..., PyTree], params: PyTree, *args: Any, **kwargs: Any) -> Network:
    """The graph of the layers of any function: what flows into which, and how wide it is.

    A layer is a product with parameters, named by their path; a bias that is added at once is
    part of it. Norms and other uses of parameters, sums and products of values from different
    layers (residual connections, gates, attention) and concatenations are nodes of their own.
    What has one source and no parameters (activations, pools, reshapes) is a label. The body of
    a `scan` is there once. What is computed from random keys has no source, conditions and
    indices are no sources, and new values of parameters (running statistics) are no outputs.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        **kwargs: the same.

    Returns:
        A `Network`. `str()` is a table, `.dot()` is text for Graphviz, `.figure()` a picture.

    Raises:
        TypeError: `fn` can't be called.

    Cost: one trace.

    Examples:
        >>> def mlp(params, x):
        ...     x = x + jax.nn.relu(x @ params["up"]) @ params["down"]
        ...     return x @ params["head"]
        >>> shapes = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4)), "head": jnp.ones((4, 2))}
        >>> net = jc.report.network(mlp, shapes, jnp.ones((1, 4)))
        >>> for edge in net.edges:
        ...     print(edge.source, "->", edge.target, edge.label)
        input -> up
        up -> down relu
        input -> add
        down -> add
        add -> head
        head -> output
    """
    require_function("network", fn)
    traced = trace(fn, (params, *args), kwargs, parts=True)
    reading = Reading()
    given = []
    extras = [path for path in traced.paths if is_extra(path)]
    for path, v in zip(traced.paths, traced.jaxpr.invars, strict=True):
        if is_extra(path):
            made = Box("input", "", _input_name(path, extras), [], tuple(v.aval.shape))
            given.append(reading.add(made))
        else:
            given.append(Value(None, (path,)))
    results = read(traced.jaxpr, given, reading, _Around())
    for name, value, shape in _outputs(traced, results):
        reading.add(Box("output", "", name, [], shape), [value])
    return _finished(reading, traced)


def _input_name(path: str, extras: Sequence[str]) -> str:
    if len(extras) == 1:
        return "input"
    head, _, rest = path.partition("/")
    head = head.strip("[]")
    return join(f"input {head}" if head.isdigit() else head, rest)


def _outputs(traced: Traced, results: Sequence[Value]) -> list[tuple[str, Value, tuple[int, ...]]]:
    """Results that are no new values of parameters."""
    shapes = dict(
        zip(traced.paths, (tuple(v.aval.shape) for v in traced.jaxpr.invars), strict=True)
    )
    places = tree.leaves_with_paths(traced.results([_Place(i) for i in range(len(results))]))
    found = []
    for path, place in places:
        if not isinstance(place, _Place):
            continue
        shape = tuple(traced.jaxpr.outvars[place.index].aval.shape)
        parts = path.split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        if not any(end and shapes.get(end) == shape for end in ends):
            found.append((path, results[place.index], shape))
    names = ["output"] if len(found) == 1 else [f"output {path}".strip() for path, _, _ in found]
    return [(name, value, shape) for name, (_, value, shape) in zip(names, found, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a result: a leaf, which a NamedTuple would not be."""

    index: int


def _finished(reading: Reading, traced: Traced) -> Network:
    """Ports and joins that turned out to have one source are seen through; names are given."""
    links = resolved(reading)
    used = {i for link, _ in links for i in (link.source, link.target)}
    boxes = reading.boxes
    kept = sorted(used)
    # Inputs come first already; an output may be written before the last layer is.
    kept.sort(key=lambda i: (boxes[i].kind == "output", i))
    sizes = {
        path: math.prod(v.aval.shape)
        for path, v in zip(traced.paths, traced.jaxpr.invars, strict=True)
        if not is_extra(path)
    }
    names = _names(boxes, kept)
    after: dict[int, dict[str, None]] = {}
    for link, _ in links:
        if label := _label(link, boxes):
            after.setdefault(link.source, {})[label] = None
    nodes = [_node(boxes[i], names[i], sizes, _either(after.get(i, {}))) for i in kept]
    edges = [
        Edge(names[link.source], names[link.target], _label(link, boxes), loop)
        for link, loop in sorted(links, key=lambda one: (kept.index(one[0].target), one[1]))
    ]
    return Network(tuple(nodes), tuple(edges), dict(reading.loops), sum(sizes.values()))


def _either(labels: Collection[str]) -> str:
    """`relu, max pool`, where one way has only the relu; `a / b` of what differs."""
    longest = [x for x in labels if not any(y.startswith(f"{x}, ") for y in labels)]
    return " / ".join(longest)


def _label(link: Link, boxes: Sequence[Box]) -> str:
    return shown(link.marks, normed=boxes[link.target].normed)


def _names(boxes: Sequence[Box], kept: Sequence[int]) -> dict[int, str]:
    taken: dict[str, int] = {}
    names = {}
    for i in kept:
        box = boxes[i]
        if box.kind in ("input", "output"):
            name = box.scope
        elif box.kind == "layer":
            # The others are biases.
            name = " + ".join(box.paths[: box.weights])
        elif box.paths:
            name = _common(box.paths) or box.paths[0]
        else:
            # An einsum's scope is its formula.
            scope = "/".join(part for part in box.scope.split("/") if "->" not in part)
            name = join(scope, box.kind)
        use = taken[name] = taken.get(name, -1) + 1
        names[i] = name if use == 0 else f"{name}:{use}"
    return names


def _common(paths: Sequence[str]) -> str:
    """The path that several leaves have in common: that of their module."""
    if len(paths) == 1:
        return paths[0]
    top = paths[-1].split("/")[0]
    # Of several collections (running statistics, params) the last one names the module.
    split = [path.split("/") for path in paths if path.split("/")[0] == top]
    parts = []
    for several in zip(*(path[:-1] for path in split), strict=False):
        if len(set(several)) > 1:
            break
        parts.append(several[0])
    return "/".join(parts)


def _node(box: Box, name: str, sizes: dict[str, int], after: str) -> Node:
    kind = box.kind
    if kind == "affine":
        kind = "norm" if box.normed else "bias" if box.op in ("add", "add_any") else "scale"
    elif kind == "layer" and box.op == "gather":
        kind = "lookup"
    return Node(
        name,
        kind,
        box.op,
        tuple(box.paths),
        box.inputs if box.kind in ("layer", "matmul") else None,
        box.shape,
        box.width_in,
        box.width,
        box.window,
        sum(sizes.get(path, 0) for path in box.paths),
        box.flops,
        box.loops,
        after,
    )

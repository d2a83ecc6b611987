"""Following parameters through a jaxpr: which equation uses which leaf."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.extend.core as jec

from jaxcompress.tracing._axes import Axes, leaf_axes, slice_axes, viewed_axes
from jaxcompress.tracing._jaxprs import Body, Location, bodies, constant, scope_of

# What only moves, copies, casts or cuts a parameter: the result is still the parameter.
VIEWS = frozenset(
    "transpose reshape convert_element_type broadcast_in_dim squeeze expand_dims slice rev"
    " dynamic_slice copy copy_p reduce_precision stop_gradient sharding_constraint reshard"
    " mesh_cast pvary pcast pbroadcast name concatenate optimization_barrier device_put".split()
)


class Origin(NamedTuple):
    """The parameter that a variable is a view of, or several that were concatenated.

    Attributes:
        paths: of the leaves.
        stack: locations of the scans that give one slice of the leaf to each trip.
        axes: where the axes of the leaf are; None where the view is not all of one leaf.
    """

    paths: tuple[str, ...]
    stack: tuple[Location, ...] = ()
    axes: Axes | None = None

    @property
    def path(self) -> str:
        """All paths as one name."""
        return " + ".join(self.paths)


class Step(NamedTuple):
    """An equation, with what is known of it without running it.

    Attributes:
        location: where it is.
        eqn: the equation.
        scope: its name stack, from the outermost function on.
        origins: for each operand the parameter that it is a view of, or None.
        trips: how often it runs; None where that depends on values.
        loops: locations of the scans and whiles it runs in.
        branches: `(location of the cond, index)` for each cond it runs in a branch of.
        testing: whether it only decides if a while goes on.
    """

    location: Location
    eqn: Any
    scope: str
    origins: tuple[Origin | None, ...]
    trips: int | None
    loops: tuple[Location, ...]
    branches: tuple[tuple[Location, int], ...]
    testing: bool


class _Around(NamedTuple):
    location: Location = ()
    scope: str = ""
    trips: int | None = 1
    loops: tuple[Location, ...] = ()
    branches: tuple[tuple[Location, int], ...] = ()
    testing: bool = False


def walk(jaxpr: Any, paths: Sequence[str | None]) -> list[Step]:
    """Every equation of the jaxpr and of those inside of it, in order; outer ones first.

    Args:
        jaxpr: open.
        paths: for each invar the path of the parameter leaf that it is, or None.
    """
    steps: list[Step] = []
    origins = [
        None if path is None else Origin((path,), axes=leaf_axes(v.aval.shape))
        for path, v in zip(paths, jaxpr.invars, strict=True)
    ]
    _walk(jaxpr, origins, _Around(), steps)
    return steps


def _walk(jaxpr, origins, around: _Around, steps: list[Step]) -> list[Origin | None]:
    known: dict[Any, Origin | None] = dict(zip(jaxpr.invars, origins, strict=True))

    def origin(v):
        return None if isinstance(v, jec.Literal) else known.get(v)

    for i, eqn in enumerate(jaxpr.eqns):
        location = (*around.location, i)
        scope = join(around.scope, scope_of(eqn))
        given = tuple(origin(v) for v in eqn.invars)
        steps.append(Step(location, eqn, scope, given, *around[2:]))
        inside = bodies(eqn)
        if inside:
            results = _enter(inside, given, location, scope, around, steps)
        elif eqn.primitive.name in VIEWS:
            results = _viewed(eqn, given)
        else:
            results = [None] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [origin(v) for v in jaxpr.outvars]


def _viewed(eqn, given) -> list[Origin | None]:
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return list(given)
    if name == "concatenate":
        return [_concatenated(given)]
    if given[0] is None:
        return [None] * len(eqn.outvars)
    return [given[0]._replace(axes=viewed_axes(eqn, given[0].axes))] * len(eqn.outvars)


def _concatenated(given: Sequence[Origin | None]) -> Origin | None:
    """Leaves side by side, as the kernels of the gates of an LSTM; None if not all are leaves."""
    known = [origin for origin in given if origin is not None]
    if len(known) < len(given) or len({origin.stack for origin in known}) > 1:
        return None
    return Origin(tuple(dict.fromkeys(p for o in known for p in o.paths)), known[0].stack)


def _enter(inside: list[Body], given, location, scope, around, steps) -> list[Origin | None]:
    found: dict[int, list[Origin | None]] = {}
    for k, body in enumerate(inside):
        looped = body.label in ("scan", "while", "test")
        origins = [_entering(body, j, given, location) for j in range(len(body.jaxpr.invars))]
        trips = None if around.trips is None or body.trips is None else around.trips * body.trips
        inner = _Around(
            (*location, k),
            scope,
            trips,
            (*around.loops, location) if looped else around.loops,
            (*around.branches, (location, k)) if body.label == "branch" else around.branches,
            around.testing or body.label == "test",
        )
        results = _walk(body.jaxpr, origins, inner, steps)
        for j, result in zip(body.outputs, results, strict=True):
            if j is not None:
                leaves_loop = not looped or _whichever(result) in map(_whichever, origins)
                found.setdefault(j, []).append(result if leaves_loop else None)
    count = 1 + max(found, default=-1)
    return [_one(found[j]) for j in range(count)]


def _one(origins: Sequence[Origin | None]) -> Origin | None:
    """What several branches agree on."""
    if len({_whichever(origin) for origin in origins}) > 1:
        return None
    return origins[0] if len(set(origins)) == 1 else _whichever(origins[0])


def _whichever(origin: Origin | None) -> Origin | None:
    """The parameter, however it is viewed."""
    return None if origin is None else origin._replace(axes=None)


def _entering(body: Body, j: int, given, location) -> Origin | None:
    origin = given[body.inputs[j]]
    if origin is None:
        return None
    if j in body.sliced:
        axes = slice_axes(origin.axes, len(origin.stack))
        return origin._replace(stack=(*origin.stack, location), axes=axes)
    return origin if constant(body, j) else None


def join(outer: str, inner: str) -> str:
    """Two parts of a name stack as one."""
    return "/".join(part for part in (outer, inner) if part)

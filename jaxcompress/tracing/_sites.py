"""Sites: the equations that consume parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.tracing._axes import contracted_axes
from jaxcompress.tracing._flops import flops, moved_bytes
from jaxcompress.tracing._jaxprs import Location, Traced, trace
from jaxcompress.tracing._walk import Step, walk

# The operand that may be a weight.
OPS = {
    "dot_general": (0, 1),
    "conv_general_dilated": (1,),
    "gather": (0,),
    "ragged_dot_general": (1,),
    "ragged_dot": (1,),
}


class Site(NamedTuple):
    """An equation that consumes a parameter leaf.

    Attributes:
        name: the path; `path:1`, `path:2`, … for further sites of the same leaf.
        path: of the leaf, as in `jaxcompress.tree`; of leaves that were concatenated (the gates
            of an LSTM) all paths, joined by `" + "`.
        op: the primitive: `dot_general`, `conv_general_dilated`, `gather`, `ragged_dot_general`.
        weight: dtype and shape of the weight as the equation gets it, as `float32[8, 4]`.
        inputs: those of the other operand: the activations, or the indices.
        output: those of the result.
        flops: floating-point operations of all trips, a multiplication and an addition being
            two. Counted once where the number of trips depends on values.
        bytes: read and written by the equation in all trips.
        trips: how often it runs; None where that depends on values.
        scope: name stack, of `jax.named_scope` and Flax Linen modules.
        stacked: how many scans give it one slice of the leaf per trip. Its statistics have
            as many leading axes.
        axes: of the leaf, those that the equation sums over, in the order of the features of
            its statistics; without axes of size 1. None where the equation gets only a part of
            the leaf, or has a weight for each index of a batch.
        location: of the equation.
        operand: index of the weight among the operands.
        stack: locations of those scans.
    """

    name: str
    path: str
    op: str
    weight: str
    inputs: str
    output: str
    flops: int
    bytes: int
    trips: int | None
    scope: str
    stacked: int
    axes: tuple[int, ...] | None
    location: Location
    operand: int
    stack: tuple[Location, ...]


def sites(fn: Callable[..., PyTree], params: PyTree, *args: Any, **kwargs: Any) -> list[Site]:
    """What consumes which parameter of `fn`, in the order of the program.

    A leaf is followed through `jit`, `scan`, `cond`, `while`, `checkpoint`, custom derivatives
    and `shard_map`, and through transposes, reshapes, casts, broadcasts and slices. A leaf
    that is used twice (tied embeddings) has two sites of one path.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. It is traced, not run.
        params: any pytree. Arrays, or `jax.ShapeDtypeStruct`s. Compressed leaves need a `fn`
            that takes them, as `jc.lift(fn)`: their parts have the sites then.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        **kwargs: the same.

    Returns:
        A list of `Site`s: of matrix products (any dimension numbers), convolutions and
        gathers. Elementwise uses (biases, norms) are none.

    Raises:
        TypeError: `fn` can't be called.

    Examples:
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"].T
        >>> params = {"w1": jnp.ones((8, 4)), "w2": jnp.ones((2, 4))}
        >>> for site in jc.sites(mlp, params, jnp.ones((16, 8))):
        ...     print(site.path, site.op, site.weight, site.flops)
        w1 dot_general float32[8, 4] 1024
        w2 dot_general float32[4, 2] 256
    """
    require_function("sites", fn)
    return sites_of(trace(fn, (params, *args), kwargs, parts=True))


def sites_of(traced: Traced) -> list[Site]:
    """The sites of the first argument's leaves."""
    return list(sites_among(walk(traced.jaxpr, param_paths(traced))))


def sites_among(steps: Sequence[Step]):
    """The sites among the equations of a walk."""
    uses: dict[str, int] = {}
    for step in steps:
        for operand in OPS.get(step.eqn.primitive.name, ()):
            origin = step.origins[operand]
            if origin is None:
                continue
            use = uses[origin.path] = uses.get(origin.path, -1) + 1
            operands = step.eqn.invars
            other = operands[1 - operand] if operand < 2 else operands[0]
            trips = 1 if step.trips is None else step.trips
            yield Site(
                name=origin.path if use == 0 else f"{origin.path}:{use}",
                path=origin.path,
                op=step.eqn.primitive.name,
                weight=_check.describe(operands[operand].aval),
                inputs=_check.describe(other.aval),
                output=_check.describe(step.eqn.outvars[0].aval),
                flops=trips * flops(step.eqn),
                bytes=trips * moved_bytes(step.eqn),
                trips=step.trips,
                scope=step.scope,
                stacked=len(origin.stack),
                axes=contracted_axes(step.eqn, operand, origin.axes),
                location=step.location,
                operand=operand,
                stack=origin.stack,
            )


def param_paths(traced: Traced) -> list[str | None]:
    """For each invar its path, if it is a leaf of the first argument."""
    return [None if is_extra(path) else path for path in traced.paths]


def is_extra(path: str) -> bool:
    """Whether a path of `Traced` is that of an argument after the first."""
    return path.startswith("[")


def require_function(function: str, fn: Any) -> None:
    """Refuses what can't be called."""
    if not callable(fn):
        raise TypeError(
            _check.message(
                function,
                "fn",
                "be a function of the params",
                _check.describe(fn),
                "Pass the function first and the params second.",
            )
        )

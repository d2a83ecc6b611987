"""Running a function on params of which some axes have another size."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jec

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._custom import CUSTOM, rebind
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import (
    Body,
    Location,
    Traced,
    bodies,
    is_array,
    run_equation,
    scope_of,
    trace,
)
from jaxcompress.tracing._sites import require_function
from jaxcompress.tracing._size_rules import new_params, relate
from jaxcompress.tracing._sizes import Axes, Sizes
from jaxcompress.tracing._stand_ins import shapes_of, stand_ins
from jaxcompress.tracing._walk import join

# From the location of an equation to the axes of its operands and of its results.
_Plan = dict[Location, tuple[list[Axes], list[Axes]]]


def resized(fn: Callable[..., PyTree], like: PyTree) -> Callable[..., PyTree]:
    """`fn` for params of which some axes are shorter, or longer, than those of `like`.

    `fn` is traced with the shapes that it is made for, so that checks in it pass, and then run
    with each size that follows from the params: those of broadcasts, reshapes, slices, loops,
    zeros that a loop starts with, …, in all jaxprs inside and in custom derivatives. Numbers
    stay as they are: a mean over an axis that was cut divides by the old size, and attention is
    scaled by the old one, as if the entries that are gone were zeros.

    Args:
        fn: any function `fn(params, *args, **kwargs)`. Sizes of `args` are what they are: a
            batch of another size is traced anew. Arrays that it closes over keep their sizes.
        like: params that `fn` takes, or the `jax.ShapeDtypeStruct`s of them; shapes alone are
            held on to.

    Returns:
        A function of the same arguments, with params of the same structure, whose leaves have
        as many axes. It can be jitted, mapped and differentiated. With the shapes of `like` it
        calls `fn` itself. Without `jit` it is traced anew at each call.

    Raises:
        TypeError: `fn` can't be called.
        ValueError: when called: other structures or numbers of axes; sizes that don't fit
            together, or an operation that can't run with another size, or for which there is no
            rule. The message names the axes and the equation.

    Cost: that of the smaller operations. A custom derivative of `jax.custom_vjp` computes its
    forward pass again.

    Examples:
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> params = {"up": jnp.ones((8, 6)), "bias": jnp.zeros(6), "down": jnp.ones((6, 8))}
        >>> small = {"up": jnp.ones((8, 2)), "bias": jnp.zeros(2), "down": jnp.ones((2, 8))}
        >>> jc.tracing.resized(mlp, params)(small, jnp.ones((1, 8)))[0, 0]
        Array(16., dtype=float32)
    """
    require_function("resized", fn)
    old = shapes_of(like)

    def run(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        before, after = _named(old), _named(params)
        _require_alike(before, after)
        if all(not is_array(w) or w.shape == before[path].shape for path, w in after.items()):
            return fn(params, *args, **kwargs)
        traced = trace(fn, (stand_ins(old, params), *args), kwargs, parts=True)
        arrays = [w for w in after.values() if is_array(w)]
        values = [*arrays, *traced.leaves[len(arrays) :]]
        return traced.results(_run(traced, values))

    return run


def _named(params: PyTree) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {tree.path_string(path): leaf for path, leaf in flat}


def _require_alike(before: dict[str, Any], after: dict[str, Any]) -> None:
    rule = "have the leaves of `like`, with as many axes"
    for path in dict.fromkeys((*before, *after)):
        w: Any = after.get(path)
        v: Any = before.get(path)
        if (path in before) != (path in after) or is_array(w) != is_array(v):
            got = "none" if path not in after else _check.describe(w)
        elif is_array(w) and len(w.shape) != len(v.shape):
            got = f"{_check.describe(w)} in place of {_check.describe(v)}"
        else:
            continue
        raise ValueError(_check.message("resized", "params", rule, got, path=path))


def _run(
    traced: Traced, values: Sequence[Any], results: Sequence[tuple[int, ...]] | None = None
) -> list[Any]:
    """The results of a jaxpr for values of other shapes; the shapes of these may be known."""
    sizes, plan = Sizes(), {}
    ins = [sizes.axes(v.aval.shape) for v in traced.jaxpr.invars]
    for axes, value, path in zip(ins, values, traced.paths, strict=True):
        for d, axis in enumerate(axes):
            sizes.give(axis, value.shape[d], f"axis {d} of {path!r}")
    outs = _read(traced.jaxpr, ins, sizes, (), "", plan)
    for axes, shape in zip(outs, results or [()] * len(outs), strict=True):
        for axis, size in zip(axes, shape, strict=False):
            sizes.give(axis, size, "a result")
    sizes.solve()
    touched = frozenset(
        at for at, sides in plan.items() if any(sizes.changed(axes) for s in sides for axes in s)
    )

    def equation(location, eqn, operands, given, run) -> Any:
        ins, outs = ([sizes.shape(axes) for axes in side] for side in plan[location])
        if eqn.primitive.name in CUSTOM:
            return _custom(traced.jaxpr, eqn, operands, outs), {}
        changes = {} if bodies(eqn) else new_params(eqn, ins, outs[0])
        if not changes:
            return run(operands)
        changed = eqn.replace(params={**eqn.params, **changes})
        return run_equation(traced.jaxpr, changed, operands), {}

    return interpret(traced, values, Hooks(touched, equation, scoped=False))[0]


def _read(
    jaxpr: Any, ins: Sequence[Axes], sizes: Sizes, here: Location, scope: str, plan: _Plan
) -> list[Axes]:
    """The axes of the results; what the equations ask of all axes goes to `sizes`."""
    known = dict(zip(jaxpr.invars, ins, strict=True))

    def axes_of(v: Any) -> Axes:
        if isinstance(v, jec.Literal) or v not in known:
            aval: Any = v.aval
            fixed = sizes.axes(aval.shape)
            sizes.keep(fixed, "a constant")
            return fixed
        return known[v]

    known.update({v: axes_of(v) for v in jaxpr.constvars})
    for i, eqn in enumerate(jaxpr.eqns):
        given = [axes_of(v) for v in eqn.invars]
        outs = [sizes.axes(v.aval.shape) for v in eqn.outvars]
        at, location = join(scope, scope_of(eqn)), (*here, i)
        why = f"`{eqn.primitive.name}` at {at}" if at else f"`{eqn.primitive.name}`"
        plan[location] = given, outs
        inside = bodies(eqn)
        for k, body in enumerate(inside):
            _enter(eqn, body, given, outs, sizes, (*location, k), at, plan, why)
        if not inside:
            relate(eqn, given, outs, sizes, why)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [axes_of(v) for v in jaxpr.outvars]


def _enter(eqn, body: Body, given, outs, sizes: Sizes, here, scope, plan, why) -> None:
    specs = body.label == "shard_map"
    entering = []
    for j in range(len(body.jaxpr.invars)):
        axes, inner = given[body.inputs[j]], sizes.axes(body.jaxpr.invars[j].aval.shape)
        spec = eqn.params["in_specs"][body.inputs[j]] if specs else ()
        _through(axes, inner, spec, sizes, why)
        entering.append(inner)
    leaving = _read(body.jaxpr, entering, sizes, here, scope, plan)
    for j, k in body.carried.items():
        sizes.unite(entering[j], leaving[k], why)
    for axes, k in zip(leaving, body.outputs, strict=True):
        if k is not None:
            _through(outs[k], axes, eqn.params["out_specs"][k] if specs else (), sizes, why)


def _through(outer: Axes, inner: Axes, spec: Sequence[Any], sizes: Sizes, why: str) -> None:
    """The axes of a value outside and inside of an equation."""
    # A scan gives each trip one slice; a sharded map gives each device one part.
    extra = len(outer) - len(inner)
    sizes.keep(outer[:extra], why)
    for d, (a, b) in enumerate(zip(outer[extra:], inner, strict=True)):
        if d < len(spec) and spec[d] is not None:
            sizes.keep((a, b), why)
        else:
            sizes.unite((a,), (b,), why)


def _custom(jaxpr: Any, eqn: Any, values: Sequence[Any], shapes: Sequence[tuple[int, ...]]):
    """An equation with a derivative of its own, whose rule is resized too."""
    (body,) = bodies(eqn)

    def forward(*xs):
        return _run(_part(body.jaxpr, body.consts), xs, shapes)

    def run(closed, inner, ins, outs):
        del ins
        ends = [values[side.index].shape if side.operand else shapes[side.index] for side in outs]
        return _run(_part(closed.jaxpr, closed.consts), inner, ends)

    return rebind(jaxpr, eqn, values, forward, run)


def _part(jaxpr: Any, consts: Sequence[Any]) -> Traced:
    """A jaxpr that is not a whole function."""
    return Traced(jaxpr, consts, [], ["" for _ in jaxpr.invars], lambda values: values)

"""Returning the values inside of a function beside its result."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing._names import named_values
from jaxcompress.tracing._sites import param_paths, require_function
from jaxcompress.tracing._walk import walk


def capture(
    fn: Callable[..., PyTree], where: tree.Where
) -> Callable[..., tuple[PyTree, dict[str, jax.Array]]]:
    """`fn`, returning also the values inside of it that `where` chooses by name.

    Names are

    - tags of `jc.name(x, "tag")`;
    - scopes: `jax.named_scope("encoder")`, Linen and Haiku modules (`Model/blocks_0/attn`).
      The value is what is computed in the scope and used outside;
    - paths of parameters, as in `jc.sites`: the value is the result of the product,
      convolution or lookup that consumes the leaf (before any bias).

    Further values of one name are called `name:1`, `name:2`, …. Use `jc.capture_names` to see
    them all.

    Args:
        fn: any function `fn(params, *args, **kwargs)`.
        where: static. As for `jaxcompress.tree.select`, on the names: a glob as
            `"**/blocks_*/attn"`, a regular expression, a predicate `(name, value)`.

    Returns:
        A function that returns `(fn(…), {name: value})`. The result of `fn` is computed once
        and is the same. Inside of `scan` a value gets a leading axis of steps, inside of
        `shard_map` one of shards; of a `while` the last step's is kept and of a `cond` the
        chosen branch's, zeros if there was none. Values are differentiable, and with
        `jax.eval_shape` only shapes are computed.

    Raises:
        ValueError: nothing has such a name; the message lists the names there are.
        TypeError: `fn` can't be called.

    Cost: the values are kept in memory; nothing is computed twice.

    Examples:
        >>> def mlp(params, x):
        ...     with jax.named_scope("hidden"):
        ...         x = jax.nn.relu(x @ params["w1"])
        ...     return x @ params["w2"]
        >>> params = {"w1": jnp.ones((4, 8)), "w2": jnp.ones((8, 2))}
        >>> y, values = jax.jit(jc.capture(mlp, "hidden"))(params, jnp.ones((3, 4)))
        >>> values["hidden"].shape
        (3, 8)
    """
    require_function("capture", fn)

    def capturing(*args: Any, **kwargs: Any):
        traced = trace(fn, args, kwargs, parts=True)
        steps = walk(traced.jaxpr, param_paths(traced))
        named = {value.name: value for value in named_values(traced.jaxpr, steps)}
        chosen = tree.select(
            {name: jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for name, v in named.items()},
            where,
            function="capture",
        )
        wanted: dict[Any, list[tuple[str, int]]] = {}
        for name, value in named.items():
            if chosen[name]:
                wanted.setdefault(value.location, []).append((name, value.result))

        def equation(location, eqn, values, given, run):
            results, records = run(values)
            return results, records | {name: results[k] for name, k in wanted[location]}

        hooks = Hooks(
            frozenset(wanted),
            equation,
            stacks=lambda name, location: True,
            identity=lambda name, shape: jnp.zeros(shape.shape, shape.dtype),
            merge=lambda name, old, new: new,
        )
        results, records = interpret(traced, traced.leaves, hooks)
        return traced.results(results), {name: records[name] for name in named if chosen[name]}

    return capturing


def capture_names(
    fn: Callable[..., PyTree], *args: Any, **kwargs: Any
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The names that `jc.capture` knows in `fn`, with the shape of one value of each.

    Args:
        fn: any function. It is traced, not run.
        *args: of `fn`; arrays, `jax.ShapeDtypeStruct`s, or static values.
        **kwargs: the same.

    Returns:
        Shapes by name, in the order of the program; those of one step or shard where the
        value is inside of a `scan` or `shard_map`.

    Raises:
        TypeError: `fn` can't be called.

    Examples:
        >>> fn = lambda p, x: jc.name(x @ p["w"], "hidden").sum()
        >>> list(jc.capture_names(fn, {"w": jnp.ones((2, 3))}, jnp.ones((1, 2))))
        ['hidden', 'w']
    """
    require_function("capture_names", fn)
    traced = trace(fn, args, kwargs, parts=True)
    steps = walk(traced.jaxpr, param_paths(traced))
    return {
        value.name: jax.ShapeDtypeStruct(value.aval.shape, value.aval.dtype)
        for value in named_values(traced.jaxpr, steps)
    }

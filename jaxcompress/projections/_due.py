"""Finding a structure only when it is due, also under `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxcompress._types import PyTree


def found_when(due: jax.Array, find: Callable[[], PyTree], previous: PyTree) -> PyTree:
    """`find()` where `due`, else `previous`: a `lax.cond` that stays one under `vmap`.

    A `lax.cond` whose predicate is batched becomes a selection, and `find` runs in every step.
    This one runs if any of the batch is due. No gradient flows through it.

    Args:
        due: a `bool` scalar.
        find: may close over traced values; returns what has the type of `previous`.
        previous: the structure held.
    """
    held, treedef = jax.tree.flatten(lax.stop_gradient(previous))
    closed = jax.make_jaxpr(lambda: jax.tree.leaves(find()))()

    def run(constants, held):
        del held
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, constants))()

    out = _lazily(run)(due, lax.stop_gradient(list(closed.consts)), held)
    return jax.tree.unflatten(treedef, out)


def _lazily(run: Callable[[Any, list[jax.Array]], list[jax.Array]]):
    """`(due, given, held) -> run(given, held) where due, else held`."""

    @custom_vmap
    def call(due, given, held):
        return lax.cond(due, run, lambda given, held: held, given, held)

    @call.def_vmap
    def batch(size, is_batched, due, given, held):
        due_is, given_is, held_is = is_batched
        held = [
            x if already else jnp.broadcast_to(x, (size, *x.shape))
            for x, already in zip(held, held_is, strict=True)
        ]
        axes = jax.tree.map(lambda already: 0 if already else None, given_is)
        run_each = jax.vmap(run, (axes, 0))

        def run_where_due(given, held):
            due, inner = given
            return _where_each(due, run_each(inner, held), held)

        if due_is:
            out = _lazily(run_where_due)(jnp.any(due), (due, given), held)
        else:
            out = _lazily(run_each)(due, given, held)
        return out, [True] * len(out)

    return call


@jax.vmap
def _where_each(due, new, old):
    return jax.tree.map(lambda n, o: jnp.where(due, n, o), new, old)

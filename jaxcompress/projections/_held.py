"""A step that says beforehand whether it holds its structure: it costs what a plain one does."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress._types import PyTree
from jaxcompress.projections import _moments
from jaxcompress.projections._base import Projection, kept_by, observed
from jaxcompress.projections._due import found_when
from jaxcompress.projections._land import apply


def held_step(
    optimizer: optax.GradientTransformationExtraArgs,
    projection: Projection,
    grads: PyTree,
    updates: PyTree,
    state: Any,
    params: PyTree,
    extra: Mapping[str, Any],
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """The optimizer's step on what lives, under a structure that is found first when it is due.

    A mask that is found after the optimizer's update, and moments that are cleared after it,
    are further passes over the weights in every step. Here the rare find makes an update of
    its own. Dropped weights have no moments and the optimizer gets no gradient for them, so
    they stay without any, and all that a held step adds is the reading of the mask.

    Args:
        optimizer: the inner one.
        projection: one with `due`.
        grads: what `find` sees.
        updates: what the optimizer gets.
        state: the `ProjectedState` before.
        params: the parameters before.
        extra: arguments of the optimizer.

    Returns:
        The updates and the inner state after the optimizer, the structure, and what of it
        lives by `alive_now`.
    """
    previous = observed(projection, params, state.structure, grads, state.step)

    def find():
        moves, _ = optimizer.update(updates, state.inner, params, **extra)
        moved = apply(params, moves)
        return projection.find(moved, previous=previous, grads=grads, step=state.step)

    assert projection.due is not None
    structure = found_when(projection.due(state.step), find, previous)
    alive = alive_now(projection, params, state.structure, structure)
    inner = _moments.clear(state.inner, params, alive)
    updates, inner = optimizer.update(_living(updates, alive), inner, params, **extra)
    return updates, inner, structure, alive


def alive_now(projection: Projection, params: PyTree, before: PyTree, now: PyTree) -> PyTree:
    """What keeps its moments: what lives now, and did before where weights start from zero."""
    kept = kept_by(projection, params, now)
    if not projection.from_zero:
        return kept
    return _moments.alive(kept, kept_by(projection, params, before))


def _living(updates: PyTree, alive: PyTree) -> PyTree:
    def leaf(u, keep):
        return u if u is None or keep is True else jnp.where(keep, u, jnp.zeros_like(u))

    return jax.tree.map(leaf, updates, alive, is_leaf=lambda x: x is None)

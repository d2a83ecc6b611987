"""Clearing the moments of dropped and regrown weights in the state of any optimizer."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import tree
from jaxcompress._types import PyTree
from jaxcompress.projections._base import is_masked_node


def clear(state: PyTree, params: PyTree, alive: PyTree) -> PyTree:
    """Zeroes the entries of every parameter-shaped part of `state` where `alive` is False.

    A part is parameter-shaped when it has the structure of `params` (with
    `optax.MaskedNode()` allowed for any leaf). Of its leaves those are cleared that are
    floating point and have the shape of their parameter: factored moments have nothing
    elementwise to clear. No state class is named, so this holds for any optimizer, and inside
    `chain`, `masked`, `partition`, `inject_hyperparams` and `MultiSteps`.
    """
    leaf_test = lambda x: is_masked_node(x)  # noqa: E731
    like_params = jax.tree.structure(params, is_leaf=leaf_test)
    shapes = jax.tree.leaves(params, is_leaf=leaf_test)
    keeps = jax.tree.leaves(alive, is_leaf=leaf_test)
    if all(keep is True or is_masked_node(keep) for keep in keeps):
        return state

    def is_part(x: Any) -> bool:
        if type(x) is not type(params) and not hasattr(params, "shape"):
            return False
        return jax.tree.structure(x, is_leaf=leaf_test) == like_params

    def clear_part(part):
        if not is_part(part):
            return part
        leaves = jax.tree.leaves(part, is_leaf=leaf_test)
        cleared = [_clear(*each) for each in zip(leaves, shapes, keeps, strict=True)]
        return jax.tree.unflatten(like_params, cleared)

    return jax.tree.map(clear_part, state, is_leaf=is_part)


def _clear(moment: Any, weight: Any, keep: Any) -> Any:
    elementwise = (
        hasattr(moment, "dtype")
        and hasattr(weight, "shape")
        and moment.shape == weight.shape
        and jnp.issubdtype(moment.dtype, jnp.inexact)
    )
    if keep is True or is_masked_node(keep) or not elementwise:
        return moment
    return jnp.where(keep, moment, jnp.zeros_like(moment))


def alive(kept: PyTree, kept_before: PyTree) -> PyTree:
    """Entries that are neither dropped now nor regrown now."""

    def leaf(_, now, before):
        if is_masked_node(now):
            return now
        if now is True and before is True:
            return True
        if now is True or before is True:
            return before if now is True else now
        return now & before

    return tree.map_with_path(leaf, kept, kept_before, is_leaf=is_masked_node)

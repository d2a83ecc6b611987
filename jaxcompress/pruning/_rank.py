"""Reading a score of any form into a tree of scores, and its statistics next to the masks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._scores import RunningScore, Score


def scores_of(
    score: Score, params: PyTree, previous: PyTree, grads: PyTree, step: Any
) -> tuple[PyTree, PyTree]:
    """The scores of the leaves, and the statistics that the masks hold (None without one).

    Raises:
        TypeError: a leaf or its scores are not real floating point.
        ValueError: scores are missing for a leaf or have another shape, or a running score
            has nothing to run on.
    """
    nothing = jax.tree.map(lambda _: None, params)
    if isinstance(score, RunningScore):
        statistics = _statistics(score, params, previous, grads)
        scores = jax.tree.map(lambda w, s: score.score(s, w), params, statistics)
    elif callable(score):
        scores, statistics = score(params, grads=grads, step=step), nothing
    else:
        scores, statistics = _by_path(score, params), nothing
    tree.map_arrays_with_path(_check_scores, params, scores)
    return scores, statistics


def observer_of(score: Score):
    """What `Projection.observe` does for a running score; None for the others."""
    if not isinstance(score, RunningScore):
        return None

    def observe(params, masks, *, grads=None, step=0):
        if grads is None:
            _refuse_without_gradients()

        def leaf(w, g, mask: Mask):
            return dataclasses.replace(mask, statistic=score.update(mask.statistic, w, g, step))

        return jax.tree.map(leaf, params, grads, masks)

    return observe


def _statistics(score: RunningScore, params: PyTree, previous: PyTree, grads: PyTree) -> PyTree:
    if previous is not None:
        return jax.tree.map(lambda w, mask: mask.statistic, params, previous)
    if grads is None:
        _refuse_without_gradients()

    def leaf(path, w):
        _check.floating("prune", "params", w, path)
        return score.init(w)

    return tree.map_arrays_with_path(leaf, params)


def _refuse_without_gradients():
    raise ValueError(
        _check.message(
            "prune",
            "score",
            "see the gradients of a training when it is a RunningScore",
            "no gradients",
            "Use it in jc.projected or jc.straight_through.",
        )
    )


def _by_path(score: PyTree, params: PyTree) -> PyTree:
    given = dict(tree.leaves_with_paths(score))

    def leaf(path, w):
        if path not in given:
            raise ValueError(
                _check.message(
                    "prune",
                    "score",
                    "be a function, a RunningScore or a tree with an array for each leaf",
                    f"none among {sorted(given)}",
                    path=path,
                )
            )
        return jnp.asarray(given[path])

    return tree.map_arrays_with_path(leaf, params)


def _check_scores(path: str, w: jax.Array, scores: jax.Array) -> None:
    _check.floating("prune", "params", w, path)
    _check.floating("prune", "score", scores, path)
    if scores.shape != w.shape:
        rule = f"give scores of shape {list(w.shape)}"
        got = _check.describe(scores)
        raise ValueError(_check.message("prune", "score", rule, got, path=path))

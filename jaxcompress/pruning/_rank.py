"""Reading a score of any form into a tree of scores, and its statistics next to the masks."""

import dataclasses
import inspect
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
    elif _is_function(score):
        scores, statistics = score(params, grads=grads, step=step), nothing
        _check_structure(params, scores)
    else:
        scores, statistics = _by_path(score, params), nothing
    tree.map_arrays_with_path(_check_scores, params, scores)
    return jax.tree.map(_wide, scores), statistics


def _wide(scores: jax.Array) -> jax.Array:
    """float32 for the formats of one byte, of which some have no infinity to rank by."""
    return scores.astype(jnp.float32) if scores.dtype.itemsize == 1 else scores


def _is_function(score: Any) -> bool:
    """Whether it is to be called. A tree of scores may be callable too, as Equinox's are."""
    return callable(score) and jax.tree_util.treedef_is_leaf(jax.tree.structure(score))


def require_score(function: str, argument: str, score: Any) -> None:
    """Refuses a function that can't be called as a score, as a maker of one not yet called."""
    if isinstance(score, RunningScore) or not _is_function(score):
        return
    try:
        inspect.signature(score).bind(None, grads=None, step=0)
    except TypeError:
        rule = "be called as score(params, grads=…, step=…)"
        fix = "Makers of scores are called first: jc.pruning.movement(), jc.pruning.random(key)."
        got = _check.describe(score)
        raise TypeError(_check.message(function, argument, rule, got, fix)) from None
    except ValueError:
        pass  # a builtin without a signature


def _check_structure(params: PyTree, scores: PyTree) -> None:
    have = [path for path, _ in tree.leaves_with_paths(scores)]
    want = [path for path, _ in tree.leaves_with_paths(params)]
    if have != want:
        rule, got = f"give an array for each of {want}", f"arrays at {have}"
        raise ValueError(_check.message("prune", "score", rule, got))


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
    if w.dtype == jnp.float8_e8m0fnu:
        rule, got = "have a zero", _check.describe(w)
        raise TypeError(_check.message("prune", "params", rule, got, path=path))
    _check.floating("prune", "score", scores, path)
    if scores.shape != w.shape:
        rule = f"give scores of shape {list(w.shape)}"
        got = _check.describe(scores)
        raise ValueError(_check.message("prune", "score", rule, got, path=path))

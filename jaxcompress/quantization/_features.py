"""A projection taken in other input features, which are undone on the activations."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.projections import Features, Projection, Rows, kept_by, observed, rows_of


class Moved(NamedTuple):
    """Structure of `rescaled` and `rotated`.

    Attributes:
        by_path: the scales or signs of each leaf that is moved.
        inner: the structure of the projection, found on the moved leaves.
    """

    by_path: dict[str, jax.Array]
    inner: PyTree


class Move(NamedTuple):
    r"""An invertible map T of the input features of one leaf, given by an array.

    Attributes:
        there: `(w, data) -> T w`, in float32 or wider.
        back: `(v, data) -> T^-1 v`.
        cotangent: `(grad, data) ->` the gradient with respect to `T w`.
        wrap: `(packed, data, dtype) ->` the compressed array that stands for `T^-1 packed`.
        gram: `(gram, data, layout) -> T^-T gram T^-1`, see `jc.projections.Features`.
        keeps_zeros: static. Whether a zero of `T w` is one of `w`.
    """

    there: Callable[[jax.Array, jax.Array], jax.Array]
    back: Callable[[jax.Array, jax.Array], jax.Array]
    cotangent: Callable[[jax.Array, jax.Array], jax.Array]
    wrap: Callable[[Any, jax.Array, Any], Any]
    gram: Callable[[jax.Array, jax.Array, Any], jax.Array]
    keeps_zeros: bool = False


def in_features(
    projection: Projection, data_of: Callable[[PyTree, bool], Mapping[str, jax.Array]], move: Move
) -> Projection:
    """`projection` of the moved leaves.

    Args:
        projection: any. A leaf that it gives back as it came stays as it is.
        data_of: `(params, everywhere) -> arrays by path`: of the leaves to move, what moves
            them. `everywhere`: all leaves were chosen by the user.
        move: the map.
    """
    raw = projection.everywhere or projection
    everywhere = _in_features(raw, lambda params: data_of(params, True), move)
    chosen = _in_features(projection, lambda params: data_of(params, False), move)
    return chosen._replace(everywhere=everywhere)


def _in_features(projection: Projection, data_of: Callable, move: Move) -> Projection:
    def moved(params: PyTree, data: Mapping[str, jax.Array], f: Callable) -> PyTree:
        def leaf(path, w):
            return f(arrays.todense(w), data[path]) if path in data else w

        return tree.map_with_path(leaf, params)

    def find(params, *, previous=None, grads=None, step=0):
        data = dict(data_of(params))
        held = None if previous is None else previous.inner
        slopes = None if grads is None else moved(grads, data, move.cotangent)
        there = moved(params, data, move.there)
        return Moved(data, projection.find(there, previous=held, grads=slopes, step=step))

    def project(params, structure):
        data = structure.by_path
        there = moved(params, data, move.there)
        new = projection.project(there, structure.inner)

        def leaf(path, w, v, projected):
            return _returned(w, v, projected, data.get(path), move)

        return tree.map_with_path(leaf, params, there, new)

    def pack(params, structure):
        data = structure.by_path
        there = moved(params, data, move.there)
        new = projection.project(there, structure.inner)
        packed = projection.pack(there, structure.inner)

        def leaf(path, w, v, projected, small):
            dense = _returned(w, v, projected, data.get(path), move)
            if path not in data:
                return small
            if projected is v or not arrays.is_compressed(small):
                return dense
            whole = move.wrap(small, data[path], w.dtype)
            return whole if whole.nbytes < w.nbytes else dense

        return tree.map_with_path(leaf, params, there, new, packed)

    def kept(params, structure):
        there = moved(params, structure.by_path, move.there)
        return kept_by(projection, there, structure.inner)

    def observe(params, structure, *, grads=None, step=0):
        data = structure.by_path
        slopes = None if grads is None else moved(grads, data, move.cotangent)
        there = moved(params, data, move.there)
        return Moved(data, observed(projection, there, structure.inner, slopes, step))

    def rows(params, *, step=0):
        data = dict(data_of(params))
        found = rows_of(projection, moved(params, data, move.there), step)
        leaves = {path: w for path, w in tree.leaves_with_paths(params) if path in data}
        features = {path: _features_of(w, data[path], move) for path, w in leaves.items()}
        # One object for each leaf and what it was joined of, by which the solver knows it again.
        known: dict[tuple[str, int], Features] = {}

        def one(rows):
            inner, joined = rows.features or {}, {}
            for path in features:
                key = path, id(inner.get(path))
                known.setdefault(key, _after(features[path], inner.get(path)))
                joined[path] = known[key]
            otherwise = rows.otherwise
            return rows._replace(
                features={**inner, **joined},
                otherwise=None if otherwise is None else lambda: one(otherwise()),
            )

        is_rows = lambda x: isinstance(x, Rows)  # noqa: E731
        return Moved(
            data, jax.tree.map(lambda x: one(x) if is_rows(x) else x, found, is_leaf=is_rows)
        )

    return Projection(find, project, pack)._replace(
        rows=None if projection.rows is None else rows,
        kept=kept if move.keeps_zeros and projection.kept is not None else None,
        observe=None if projection.observe is None else observe,
        from_zero=projection.from_zero and move.keeps_zeros,
        due=projection.due,
    )


def _features_of(w: jax.Array, data: jax.Array, move: Move) -> Features:
    return Features(
        there=lambda w: move.there(w, data),
        back=lambda v: move.back(v, data).astype(w.dtype),
        gram=lambda gram, layout: move.gram(gram, data, layout),
    )


def _after(first: Features, second: Features | None) -> Features:
    """Both maps, one after the other."""
    if second is None:
        return first
    return Features(
        there=lambda w: second.there(first.there(w)),
        back=lambda v: first.back(second.back(v)),
        gram=lambda gram, layout: second.gram(first.gram(gram, layout), layout),
    )


def _returned(w: Any, there: Any, new: Any, data: jax.Array | None, move: Move) -> Any:
    """The projected leaf in its own features; the very leaf where the projection let it be."""
    if data is None:
        return new
    if new is there:
        return w
    return move.back(new, data).astype(w.dtype)


def require_projection(function: str, projection: Any) -> None:
    """Refuses what is no `Projection`."""
    if not isinstance(projection, Projection):
        rule, got = "be a Projection", _check.describe(projection)
        fix = "Pass one as jc.quantize(8)."
        raise TypeError(_check.message(function, "projection", rule, got, fix))

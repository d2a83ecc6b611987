"""Combinators over leaves and projections: chain, masked, partition."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.projections._base import (
    Projection,
    any_due,
    choose,
    hide,
    kept_by,
    observed,
    rows_of,
    show,
)


class Chained(NamedTuple):
    """Structure of `chain`: the structures of its members, in order."""

    parts: tuple[PyTree, ...]


class Partitioned(NamedTuple):
    """Structure of `partition`: the structure of each label's leaves."""

    parts: dict[str, PyTree]


def chain(*projections: Projection) -> Projection:
    """Projects by the first, then by the second on what the first gave, and so on.

    The last one has the last word. An exact zero stays an exact zero under `quantize`,
    `cluster` and `prune`, so that `chain(prune(0.5), quantize(4))` is sparse and quantized,
    and `pack` gives codes of the kept weights alone. What the last projection can't keep is
    not in the packed form either: after `chain(low_rank(8), quantize(8))` the leaf is
    quantized but of full rank. To quantize the factors themselves, pack twice:
    `pack(quantize(8), pack(low_rank(8), params))`.

    Args:
        *projections: one or more.

    Returns:
        The projection whose structure is `Chained(parts)`.

    Raises:
        TypeError: a member is not a `Projection`.

    Examples:
        >>> p = jc.chain(jc.prune(0.5), jc.quantize(8))
        >>> jc.compress(p, {"w": jnp.array([[1.0, 0.2], [-0.3, 0.5]])})["w"]
        Array([[1. , 0. ],
               [0. , 0.5]], dtype=float32)
    """
    for p in projections:
        _require_projection("chain", p)

    def find(params, *, previous=None, grads=None, step=0):
        parts = []
        held = [None] * len(projections) if previous is None else previous.parts
        for p, before in zip(projections, held, strict=True):
            parts.append(p.find(params, previous=before, grads=grads, step=step))
            params = p.project(params, parts[-1])
        return Chained(tuple(parts))

    def project(params, structure):
        for p, part in zip(projections, structure.parts, strict=True):
            params = p.project(params, part)
        return params

    def pack(params, structure):
        for p, part in zip(projections, structure.parts, strict=True):
            params = p.pack(params, part)
        return params

    def kept(params, structure):
        return _all_kept(
            [kept_by(p, params, s) for p, s in zip(projections, structure.parts, strict=True)],
            params,
        )

    def observe(params, structure, *, grads=None, step=0):
        pairs = zip(projections, structure.parts, strict=True)
        return Chained(tuple(observed(p, params, part, grads, step) for p, part in pairs))

    def rows(params, *, step=0):
        parts = []
        for p in projections:
            parts.append(rows_of(p, params, step))
            params = p.project(params, p.find(params, step=step))
        return Chained(tuple(parts))

    everywhere = None
    if any(p.everywhere is not None for p in projections):
        everywhere = chain(*(p.everywhere or p for p in projections))
    return Projection(find, project, pack, kept, everywhere)._replace(
        observe=observe if any(p.observe for p in projections) else None,
        from_zero=any(p.from_zero for p in projections),
        due=any_due(projections),
        rows=rows,
    )


def masked(projection: Projection, where: tree.Where) -> Projection:
    """`projection` on the leaves that `where` chooses, and only on those.

    Args:
        projection: any. The library's default choice (floating-point leaves with two or more
            dimensions) does not apply inside: `where` has the last word.
        where: static. A path pattern, predicate, mask tree or a combination of them, see
            `jaxcompress.tree.select`.

    Returns:
        The projection. Its structure is that of `projection`, for the chosen leaves alone.

    Raises:
        TypeError: `projection` is not a `Projection`.
        ValueError: `where` matches no leaf of the params; the message lists their paths.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> jc.compress(jc.masked(jc.prune(0.5), "**/bias"), params)["dense"]["bias"]
        Array([1., 0.], dtype=float32)
    """
    _require_projection("masked", projection)
    return choose(projection.everywhere or projection, where)


def partition(
    projections: Mapping[str, Projection],
    labels: PyTree | Callable[[str, Any], str | None] | None = None,
) -> Projection:
    """A projection for each group of leaves.

    Args:
        projections: from a label to its projection.
        labels: static. A tree of labels with the structure of the params, a function
            `(path, leaf) -> label`, or None: then the keys of `projections` are path globs,
            and a leaf belongs to the first one that matches. A leaf whose label is None is
            not touched.

    Returns:
        The projection whose structure is `Partitioned(parts)`, a dict by label.

    Raises:
        ValueError: a leaf's label has no projection, or a label has no leaf.

    Examples:
        >>> p = jc.partition({"conv*/**": jc.prune(0.5), "head/**": jc.quantize(8)})
        >>> params = {"conv1": {"w": jnp.ones((2, 2))}, "head": {"w": jnp.ones((2, 2))}}
        >>> float(jc.compress(p, params)["conv1"]["w"].sum())
        2.0
    """
    for p in projections.values():
        _require_projection("partition", p)
    members = {label: p.everywhere or p for label, p in projections.items()}

    def masks(params):
        if labels is None:
            names = list(members)
            globs = [tree.select(params, name, function="partition") for name in names]
            label_tree = jax.tree.map(
                lambda *hits: next((n for n, hit in zip(names, hits, strict=True) if hit), None),
                *globs,
            )
        elif callable(labels):
            label_tree = tree.map_with_path(labels, params)
        else:
            label_tree = labels
        treedef = jax.tree.structure(tree.map_with_path(lambda _, w: 0, params))
        flat = treedef.flatten_up_to(label_tree)
        for label in flat:
            if label is not None and label not in members:
                raise ValueError(
                    _check.message(
                        "partition", "labels", f"be one of {sorted(members)} or None", repr(label)
                    )
                )
        return {
            label: tree.select(
                params,
                jax.tree.unflatten(treedef, [x == label for x in flat]),
                function="partition",
            )
            for label in members
        }

    def find(params, *, previous=None, grads=None, step=0):
        parts = {}
        for label, mask in masks(params).items():
            parts[label] = members[label].find(
                hide(params, mask),
                previous=None if previous is None else previous.parts[label],
                grads=None if grads is None else hide(grads, mask),
                step=step,
            )
        return Partitioned(parts)

    def project(params, structure):
        for label, mask in masks(params).items():
            part = members[label].project(hide(params, mask), structure.parts[label])
            params = show(params, part)
        return params

    def pack(params, structure):
        for label, mask in masks(params).items():
            part = members[label].pack(hide(params, mask), structure.parts[label])
            params = show(params, part)
        return params

    def kept(params, structure):
        out = tree.map_with_path(lambda _, w: True, params)
        for label, mask in masks(params).items():
            out = show(out, kept_by(members[label], hide(params, mask), structure.parts[label]))
        return out

    def observe(params, structure, *, grads=None, step=0):
        parts = {}
        for label, mask in masks(params).items():
            hidden_grads = None if grads is None else hide(grads, mask)
            hidden = hide(params, mask)
            parts[label] = observed(
                members[label], hidden, structure.parts[label], hidden_grads, step
            )
        return Partitioned(parts)

    def rows(params, *, step=0):
        hidden = {label: hide(params, mask) for label, mask in masks(params).items()}
        return Partitioned({n: rows_of(members[n], hidden[n], step) for n in hidden})

    return Projection(find, project, pack, kept)._replace(
        observe=observe if any(p.observe for p in members.values()) else None,
        from_zero=any(p.from_zero for p in members.values()),
        due=any_due(members.values()),
        rows=rows,
    )


def _all_kept(trees: list[PyTree], params: PyTree) -> PyTree:
    def both(*keeps):
        arrays = [k for k in keeps if k is not True]
        if not arrays:
            return True
        out = arrays[0]
        for k in arrays[1:]:
            out = jnp.logical_and(out, k)
        return out

    return jax.tree.map(lambda w, *keeps: both(*keeps), params, *trees)


def _require_projection(function: str, p: Any) -> None:
    if not isinstance(p, Projection):
        raise TypeError(
            _check.message(
                function,
                "projection",
                "be a jaxcompress Projection",
                _check.describe(p),
                "Make one with jc.prune, jc.quantize, jc.low_rank, jc.cluster or jc.Projection.",
            )
        )

"""The Projection: find a structure, project on it, pack by it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxcompress import _check, tree
from jaxcompress._types import PyTree


class Projection(NamedTuple):
    """A way to compress parameters: to them what an Optax transformation is to gradients.

    Laws, which the tests check for every projection of the library:

    - `project(params, s)` has the structure, shapes and dtypes of `params`;
    - it is idempotent: `project(project(params, s), s) == project(params, s)`;
    - `tree.todense(pack(params, s)) == project(params, s)`, and `pack` never makes a leaf bigger;
    - `find` returns the same shapes and dtypes whatever the values, so that it may be carried
      through `jax.lax.scan`.

    Attributes:
        find: `(params, *, previous=None, grads=None, step=0) -> structure`, the expensive
            part: ranks weights, fits scales, takes an SVD. `previous` is the structure held
            so far, `grads` the raw gradients where the adapter has them, `step` the
            adapter's count of applied updates.
        project: `(params, structure) -> params`, the cheap part.
        pack: `(params, structure) -> params` with compressed leaves. Runs eagerly.
        kept: `(params, structure) -> tree` of `bool` arrays (or `True`): the entries that the
            structure does not force to zero. None means that nothing is dropped. It tells
            `projected` whose moments to clear.
        everywhere: the same projection for every leaf that it is given. None means that it
            already is. Only `masked` and `partition` read it: the library's own projections
            keep to floating-point leaves of two or more dimensions until one of those two
            says otherwise.

    Examples:
        A projection of your own, which rounds to one decimal:

        >>> rounding = jc.Projection(
        ...     find=lambda params, *, previous=None, grads=None, step=0: (),
        ...     project=lambda params, structure: jax.tree.map(lambda w: jnp.round(w, 1), params),
        ...     pack=lambda params, structure: params,
        ... )
        >>> jc.compress(rounding, {"w": jnp.array([0.12, 0.98])})
        {'w': Array([0.1, 1. ], dtype=float32)}
    """

    find: Callable[..., PyTree]
    project: Callable[[PyTree, PyTree], PyTree]
    pack: Callable[[PyTree, PyTree], PyTree]
    kept: Callable[[PyTree, PyTree], PyTree] | None = None
    everywhere: "Projection | None" = None


def of_leaves(find: Callable[..., PyTree]) -> Projection:
    """A projection whose structure holds, per leaf, an object with `project` and `pack`.

    Args:
        find: as in `Projection`, for every leaf of the params that it is given. Each leaf's
            structure is a registered dataclass with `project(w) -> w` and `pack(w)`, and
            with a field `keep` where it drops entries.
    """
    raw = Projection(find, _project_leaves, pack_leaves, kept=_kept_leaves)
    return choose(raw, tree.is_weight)._replace(everywhere=raw)


def choose(projection: Projection, where: tree.Where, *, function: str = "masked") -> Projection:
    """`projection` on the leaves that `where` chooses; the others are not touched."""

    def chosen(params: PyTree) -> PyTree:
        return tree.select(params, where, function=function)

    def find(params, *, previous=None, grads=None, step=0):
        mask = chosen(params)
        hidden_grads = None if grads is None else hide(grads, mask)
        return projection.find(hide(params, mask), previous=previous, grads=hidden_grads, step=step)

    def project(params, structure):
        mask = chosen(params)
        return show(params, projection.project(hide(params, mask), structure))

    def pack(params, structure):
        mask = chosen(params)
        return show(params, projection.pack(hide(params, mask), structure))

    def kept(params, structure):
        mask = chosen(params)
        nothing = tree.map_with_path(lambda _, w: True, params)
        return show(nothing, kept_by(projection, hide(params, mask), structure))

    return Projection(find, project, pack, kept)


def kept_by(projection: Projection, params: PyTree, structure: PyTree) -> PyTree:
    """What the structure lets live: `True` at each leaf for a projection that drops nothing."""
    if projection.kept is None:
        return tree.map_with_path(lambda _, w: True, params)
    return projection.kept(params, structure)


def is_masked_node(x: Any) -> bool:
    """Whether `x` is Optax's stand-in for a leaf that was not chosen."""
    return isinstance(x, optax.MaskedNode)


def hide(params: PyTree, mask: PyTree) -> PyTree:
    """`params` with `optax.MaskedNode()` where `mask` is False."""
    return tree.map_with_path(lambda _, w, m: w if m else optax.MaskedNode(), params, mask)


def show(params: PyTree, chosen: PyTree) -> PyTree:
    """`chosen` with its `optax.MaskedNode()`s filled in from `params`."""
    is_leaf = lambda x: is_masked_node(x) or tree.is_array_like(x)  # noqa: E731
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_leaf)
    filled = [
        old if is_masked_node(new) else new
        for old, new in zip(leaves, jax.tree.leaves(chosen, is_leaf=is_leaf), strict=True)
    ]
    return jax.tree.unflatten(treedef, filled)


def is_leaf_structure(x: Any) -> bool:
    """Whether `x` is what `of_leaves` holds for a leaf, or stands for a leaf not chosen."""
    # Of the class: a Flax variable hands on the attributes of what it holds.
    return is_masked_node(x) or (hasattr(type(x), "pack") and hasattr(type(x), "project"))


def pack_leaves(params: PyTree, structure: PyTree) -> PyTree:
    """Packs each leaf that has a structure, and leaves it as it is where packed is bigger."""

    def leaf(path, s, w):
        if is_masked_node(s):
            return w
        if any(_check.is_traced(x) for x in jax.tree.leaves((s, w))):
            raise TypeError(
                _check.message(
                    "pack",
                    "params",
                    "be concrete, since packed shapes depend on values",
                    "a traced leaf",
                    "Call jc.pack outside of jit, vmap and grad.",
                    path=path,
                )
            )
        packed = s.pack(w, path)
        return packed if packed.nbytes < w.nbytes else w

    flat, treedef = jax.tree_util.tree_flatten_with_path(structure, is_leaf=is_leaf_structure)
    leaves = treedef.flatten_up_to(params)
    packed = [leaf(tree.path_string(path), s, w) for (path, s), w in zip(flat, leaves, strict=True)]
    return jax.tree.unflatten(treedef, packed)


def _project_leaves(params: PyTree, structure: PyTree) -> PyTree:
    return jax.tree.map(lambda w, s: s.project(w), params, structure)


def _kept_leaves(params: PyTree, structure: PyTree) -> PyTree:
    return jax.tree.map(lambda w, s: getattr(s, "keep", True), params, structure)

"""The Projection: find a structure, project on it, pack by it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, arrays, tree
from jaxcompress._sharding import place_like
from jaxcompress._types import PyTree
from jaxcompress.projections._rows import Rows


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
            so far, `grads` the raw gradients where the adapter has them (zeros at its `init`),
            `step` the adapter's count of applied updates.
        project: `(params, structure) -> params`, the cheap part.
        pack: `(params, structure) -> params` with compressed leaves. Runs eagerly.
        kept: `(params, structure) -> tree` of `bool` arrays (or `True`): the entries that the
            structure does not force to zero. None means that nothing is dropped. It tells
            `projected` whose moments to clear.
        everywhere: the same projection for every leaf that it is given. None means that it
            already is. Only `masked` and `partition` read it: the library's own projections
            keep to floating-point leaves of two or more dimensions until one of those two
            says otherwise.
        observe: `(params, structure, *, grads=None, step=0) -> structure`, what the adapters run
            at every applied update before `find`, also while `every` holds the structure.
            `params` and `grads` are those before the update. It gathers what a later `find`
            reads from `previous`. None gathers nothing.
        from_zero: static. Whether an entry that comes back after it was dropped starts from
            zero in `project_params` and `projected`. Otherwise it starts from its update.
        due: `(step) -> bool` scalar: whether `find` may give another structure at this step than
            the `previous` one. With it `projected` knows what lives before it updates. None:
            always.
        rows: `(params, *, step=0) -> tree of Rows`: how the rows of a layer are projected one
            after the other, for `jc.compress(…, stats=…)`. The tree of the structure, with a
            `Rows` for each dict of leaves. None: it can't.

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
    observe: Callable[..., PyTree] | None = None
    from_zero: bool = False
    due: Callable[[Any], Any] | None = None
    rows: Callable[..., PyTree] | None = None


def of_leaves(
    find: Callable[..., PyTree],
    observe: Callable[..., PyTree] | None = None,
    *,
    from_zero: bool = False,
    rows: Callable[..., Rows] | None = None,
) -> Projection:
    """A projection whose structure is a dict from a leaf's path to what was found for it.

    The dict is flat, whatever holds the params, so that a structure never lies inside of a
    container with rules of its own, such as the variables of `flax.nnx.Optimizer`.

    Args:
        find: as in `Projection`, for every leaf of the params that it is given, returning
            (and taking as `previous`) their tree with a registered dataclass at each leaf,
            which has `project(w) -> w`, `pack(w, path)`, and a field `keep` where it drops
            entries.
        observe: as in `Projection`, on the same trees.
        from_zero: as in `Projection`.
        rows: `(params, *, step=0) -> Rows`, as in `Projection`.
    """

    def find_flat(params, *, previous=None, grads=None, step=0):
        held = None if previous is None else _unflat(params, previous)
        found = find(params, previous=held, grads=grads, step=step)
        paths, treedef = _paths(params)
        return dict(zip(paths, treedef.flatten_up_to(found), strict=True))

    def project(params, structure):
        return jax.tree.map(lambda w, s: s.project(w), params, _unflat(params, structure))

    def kept(params, structure):
        def leaf(w, s):
            keep = getattr(s, "keep", None)
            return True if keep is None else place_like(keep, w)

        return jax.tree.map(leaf, params, _unflat(params, structure))

    def observe_flat(params, structure, *, grads=None, step=0):
        seen = observe(params, _unflat(params, structure), grads=grads, step=step)  # pyright: ignore[reportOptionalCall]
        paths, treedef = _paths(params)
        return dict(zip(paths, treedef.flatten_up_to(seen), strict=True))

    raw = Projection(
        find_flat,
        project,
        pack_leaves,
        kept,
        observe=None if observe is None else observe_flat,
        from_zero=from_zero,
        rows=rows,
    )
    return choose(raw, tree.is_weight, function="find")._replace(everywhere=raw)


def _paths(params: PyTree) -> tuple[list[str], Any]:
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [tree.path_string(path) for path, _ in flat]
    tree.require_distinct("find", "params", paths)
    return paths, treedef


def _unflat(params: PyTree, structure: dict[str, Any]) -> PyTree:
    paths, treedef = _paths(params)
    return jax.tree.unflatten(treedef, [structure[path] for path in paths])


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

    def observe(params, structure, *, grads=None, step=0):
        mask = chosen(params)
        hidden_grads = None if grads is None else hide(grads, mask)
        return observed(projection, hide(params, mask), structure, hidden_grads, step)

    def rows(params, *, step=0):
        return rows_of(projection, hide(params, chosen(params)), step)

    return Projection(find, project, pack, kept)._replace(
        observe=None if projection.observe is None else observe,
        from_zero=projection.from_zero,
        due=projection.due,
        rows=None if projection.rows is None else rows,
    )


def kept_by(projection: Projection, params: PyTree, structure: PyTree) -> PyTree:
    """What the structure lets live: `True` at each leaf for a projection that drops nothing."""
    if projection.kept is None:
        return tree.map_with_path(lambda _, w: True, params)
    return projection.kept(params, structure)


def observed(
    projection: Projection, params: PyTree, structure: PyTree, grads: PyTree, step: Any
) -> PyTree:
    """The structure after one more update: itself for a projection that gathers nothing."""
    if projection.observe is None:
        return structure
    return projection.observe(params, structure, grads=grads, step=step)


def any_due(projections: Iterable[Projection]) -> Callable[[Any], Any] | None:
    """When a find of any of them is due; None where one of them doesn't say."""
    whens = [p.due for p in projections]
    if not whens or None in whens:
        return None

    def due(step):
        return jnp.any(jnp.stack([jnp.asarray(when(step)) for when in whens if when]))

    return due


def rows_of(projection: Projection, params: PyTree, step: Any) -> PyTree:
    """The rules of a projection; refuses one without."""
    if projection.rows is None:
        raise ValueError(
            _check.message(
                "compress",
                "projection",
                "project rows one by one to be taken with `stats`",
                "one that can't",
                "jc.prune, jc.quantize, jc.low_rank, jc.pruning.from_masks and jc.chain, "
                "jc.masked, jc.partition and jc.scheduled of them can. Take them out of jc.every.",
            )
        )
    return projection.rows(params, step=step)


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
    """Whether `x` is what `of_leaves` holds for a leaf."""
    return hasattr(type(x), "pack") and hasattr(type(x), "project")


def pack_leaves(params: PyTree, structure: dict[str, Any]) -> PyTree:
    """Packs each leaf that has a structure; one that would be bigger is projected, and dense."""

    def leaf(path, w):
        if path not in structure:
            parts = {name for name in structure if name.startswith(f"{path}/" if path else "")}
            # A compressed array whose own parts were projected, as the factors of a low rank.
            return w if not parts else _pack_parts(path, w)
        s = structure[path]
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
        smaller = packed.nbytes < w.nbytes or arrays.is_compressed(w)
        return packed if smaller else s.project(w)

    def _pack_parts(path, w):
        flat, treedef = jax.tree_util.tree_flatten_with_path(w)
        names = [tree.path_string(part) for part, _ in flat]
        names = [f"{path}/{name}" if path else name for name in names]
        parts = [leaf(name, x) for name, (_, x) in zip(names, flat, strict=True)]
        return jax.tree.unflatten(treedef, parts)

    return tree.map_with_path(leaf, params)

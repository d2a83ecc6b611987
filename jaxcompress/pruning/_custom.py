"""Masks that come from elsewhere, and masks read out of what there is."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.projections import Projection, masked, of_leaves
from jaxcompress.pruning import _row_rules
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._nm import axis_of_groups, require_nm


def nonzero(params: PyTree, where: tree.Where = tree.is_weight) -> PyTree:
    """The masks that params have already: True where a weight is not zero.

    Args:
        params: any pytree.
        where: static. Which leaves, as in `jc.masked`.

    Returns:
        The tree of params with a `bool` array at each chosen leaf, None at the others. NaN
        counts as not zero.

    Raises:
        TypeError: a chosen leaf is packed.
        ValueError: `where` matches no leaf.

    Examples:
        >>> jc.pruning.nonzero({"w": jnp.array([[0.0, -1.0]]), "b": jnp.zeros(2)})
        {'b': None, 'w': Array([[False,  True]], dtype=bool)}
    """
    chosen = tree.select(params, where, function="nonzero")

    def leaf(path, w, hit):
        if hit and arrays.is_compressed(w):
            rule, fix = "be dense", "Call jc.todense first."
            text = _check.message("nonzero", "params", rule, type(w).__name__, fix, path=path)
            raise TypeError(text)
        return w != 0 if hit else None

    return tree.map_with_path(leaf, params, chosen)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Zeros where a mask is False, also in the place of NaN and infinities.

    Args:
        params: any pytree.
        masks: a tree of `bool` arrays with the paths of the params; leaves without a mask, or
            with None, stay as they are.

    Returns:
        Params of the same structure, shapes and dtypes.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: a mask has no leaf, or another shape.

    Examples:
        >>> jc.pruning.apply_masks({"w": jnp.ones(2)}, {"w": jnp.array([True, False])})
        {'w': Array([1., 0.], dtype=float32)}
    """
    given = _read("apply_masks", params, masks)

    def leaf(path, w):
        return w if path not in given else jnp.where(given[path], w, jnp.zeros((), w.dtype))

    return tree.map_with_path(leaf, params)


def from_masks(
    masks: PyTree, *, nm: tuple[int, int] | None = None, axis: int | Mapping[str, int] = -2
) -> Projection:
    """Fixed masks of your own as a projection.

    Args:
        masks: a tree of `bool` arrays with the paths of the params; leaves without a mask, or
            with None, are not touched. The arrays may be traced: pass them through `jit` and
            make the projection inside, and a new mask compiles nothing anew.
        nm: static. `(n, m)` when the masks keep at most n of each m along `axis`, so that
            `jc.pack` stores them as such.
        axis: static. Of `nm`, as in `jc.prune`.

    Returns:
        A projection for every use there is: `jc.projected` trains with the masks held,
        `jc.compress` makes them permanent, `jc.pack` stores what lives.

    Raises:
        TypeError: a mask is not boolean.
        ValueError: a mask has no leaf, or another shape; raised when it meets the params.

    Cost: one elementwise pass.

    Examples:
        >>> masks = {"w": jnp.array([[True, False]])}
        >>> jc.compress(jc.pruning.from_masks(masks), {"w": jnp.ones((1, 2)), "b": jnp.ones(2)})
        {'b': Array([1., 1.], dtype=float32), 'w': Array([[1., 0.]], dtype=float32)}
    """
    # The caller's arrays may change afterwards.
    masks = jax.tree.map(lambda m: m.copy() if isinstance(m, np.ndarray) else m, masks)
    if nm is not None:
        require_nm("from_masks", nm)
        if not isinstance(axis, Mapping):
            _check.integer("from_masks", "axis", axis, -64)

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads, step
        given = _read("from_masks", params, masks)

        def leaf(path, w):
            fields = {}
            if nm is not None:
                fields = {"nm": nm, "axis": axis_of_groups("from_masks", axis, path, w)}
            if _check.is_traced(given[path]):
                return Mask.of(given[path], **fields)
            # XLA would take seconds to fold the packing of a large constant.
            with jax.ensure_compile_time_eval():
                return Mask.of(given[path], **fields)

        return tree.map_arrays_with_path(leaf, params)

    def rows(params, *, step=0):
        return _row_rules.mask_rows(_row_rules.given, params, find(params, step=step), {})

    wanted = {path for path, mask in _given(masks).items() if mask is not None}
    return masked(of_leaves(find, rows=rows), lambda path, w: path in wanted)


def as_is() -> Projection:
    """The mask of what is not zero now: to pack a model that was made sparse elsewhere.

    Returns:
        A projection that changes nothing but -0, which becomes 0. To train such a model on, and
        keep its zeros: `jc.restricted(optimizer, jc.every(1, jc.pruning.as_is(), end=0))`;
        `jc.projected` finds after the update, when nothing is zero any more.

    Examples:
        >>> packed = jc.pack(jc.pruning.as_is(), {"w": jnp.eye(16)})
        >>> packed["w"].nbytes
        96
    """

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads, step

        def leaf(path, w):
            _check.floating("as_is", "params", w, path)
            return Mask.of(w != 0)

        return tree.map_arrays_with_path(leaf, params)

    return of_leaves(find)


def _given(masks: PyTree) -> dict[str, Any]:
    return dict(tree.leaves_with_paths(masks, is_leaf=lambda x: x is None))


def _read(function: str, params: PyTree, masks: PyTree) -> dict[str, jax.Array]:
    """The masks by path, each checked against its leaf."""
    leaves = tree.by_path(function, "params", params)
    out = {}
    for path, mask in _given(masks).items():
        if mask is None:
            continue
        if path not in leaves:
            rule, got = "hold masks for leaves of the params alone", f"one at {path!r}"
            fix = f"The leaves there are: {sorted(leaves)}."
            raise ValueError(_check.message(function, "masks", rule, got, fix))
        if not hasattr(mask, "dtype") or mask.dtype != bool:
            got = _check.describe(mask)
            raise TypeError(_check.message(function, "masks", "be boolean", got, path=path))
        shape = getattr(leaves[path], "shape", None)
        if shape is None or arrays.is_compressed(leaves[path]):
            rule, got = "hold an array for each mask", _check.describe(leaves[path])
            fix = "Make packed leaves dense with jc.todense."
            raise TypeError(_check.message(function, "params", rule, got, fix, path=path))
        if mask.shape != shape:
            rule = f"have the shape {list(shape)} of the leaf"
            got = _check.describe(mask)
            raise ValueError(_check.message(function, "masks", rule, got, path=path))
        # A concrete mask stays concrete while params are traced.
        with jax.ensure_compile_time_eval():
            out[path] = jnp.asarray(mask)
    return out

"""Optimizer states, averages and gradients cut as the params are."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._cut import Cut, cut_leaf, cuts_of, reading

_FIX = "Make it anew for the small params, as `optimizer.init(small_params)` does."


def shrink_like(state: PyTree, keep: Keep, *, params: PyTree | None = None) -> PyTree:
    r"""An optimizer state, or any tree that holds copies of the params, cut as `jc.shrink` cuts.

    A leaf is that of a parameter where its path ends in the parameter's whole path, as
    `0/mu/dense/kernel` does in that of `dense/kernel`. It is cut by its shape:

    - the parameter's shape, or that after further axes (histories, a sweep's copies): the same
      positions stay. Moments, accumulated gradients, averages, latent weights, masks.
    - axes of size 1 where the parameter has more (scales): the other axes are cut.
    - some of the parameter's axes (factored second moments, as Adafactor's rows and columns):
      these are cut. A factor that was averaged over what leaves keeps its average.
    - one number: it stays.

    All other leaves (counters, keys, rates) stay. With a step of an optimizer that acts on
    each entry alone, training goes on as that of the masked params would.

    Args:
        state: any pytree: the state of any Optax transformation, nested as it likes, that of
            `nnx.Optimizer`, of `jc.projected`, `jc.straight_through`, an average, gradients.
            Leaves are JAX's or NumPy's arrays or `jax.ShapeDtypeStruct`s; they may be traced.
        keep: static. What stays, from `jc.select`.
        params: None, or the params before (or their shapes). Subtrees of exactly their structure
            are then recognised as such, whatever their paths: for params whose paths also
            occur elsewhere, as those of a list (`0`, `1`, …) do.

    Returns:
        The tree of the same structure and dtypes, smaller. Leaves of blocks that are left out
        are None, as in the small params.

    Raises:
        ValueError: the leaf of a parameter that shrinks has a shape that doesn't tell which of
            its entries are whose (packed bits, sketches, low-rank factors).
        TypeError: such a leaf is a compressed array.

    Cost: one gather for each axis that shrinks. Under `jit` the positions are constants.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params, x = {"a": jnp.ones((8, 4)), "b": jnp.ones((4, 2))}, jnp.ones((1, 8))
        >>> keep = jc.select(jc.dependencies(apply, params, x), params, keep=0.5)
        >>> small = jc.shrink_like(optax.adam(1e-3).init(params), keep)
        >>> jax.tree.map(jnp.shape, small[0].mu), small[0].count
        ({'a': (8, 2), 'b': (2, 2)}, Array(0, dtype=int32))
    """
    if not isinstance(keep, Keep):
        rule, got = "be what stays, from jc.select", _check.describe(keep)
        raise TypeError(_check.message("shrink_like", "keep", rule, got))
    shapes = {path: tuple(leaf.shape) for path, leaf in keep.dependencies.shapes.items()}
    cuts = cuts_of(keep)
    copies = None if params is None else _Copies.of(params, shapes)

    def is_leaf(node):
        return isinstance(node, Mask) or (copies is not None and copies.matches(node))

    def one(path, node):
        if copies is not None and copies.matches(node):
            flat = [
                _shrunk(f"{path}/{own}".strip("/"), leaf, cuts.get(own), shapes[own])
                for own, leaf in zip(copies.paths, copies.treedef.flatten_up_to(node), strict=True)
            ]
            return jax.tree.unflatten(copies.treedef, flat)
        owner = owner_of(path, shapes, inside=copies is None)
        return node if owner is None else _shrunk(path, node, cuts.get(owner), shapes[owner])

    return tree.map_with_path(one, state, is_leaf=is_leaf)


class _Copies(NamedTuple):
    """What a subtree is recognised by that is a copy of the params."""

    treedef: Any
    paths: list[str]

    @classmethod
    def of(cls, params: PyTree, shapes: Mapping[str, Any]) -> "_Copies":
        paths = list(tree.by_path("shrink_like", "params", params))
        wrong = [path for path in paths if path not in shapes]
        if wrong:
            rule = "be the params that `keep` is of"
            raise ValueError(
                _check.message("shrink_like", "params", rule, "another leaf", path=wrong[0])
            )
        return cls(jax.tree.structure(params, is_leaf=_whole), paths)

    def matches(self, node: Any) -> bool:
        # A tree of one leaf is any leaf: then the path decides.
        if self.treedef.num_nodes == 1:
            return False
        return jax.tree.structure(node, is_leaf=_whole) == self.treedef


def _whole(node: Any) -> bool:
    return tree.is_array_like(node) or isinstance(node, Mask)


def owner_of(path: str, shapes: Mapping[str, Any], *, inside: bool = True) -> str | None:
    """The parameter whose path ends `path`, or else (if `inside`) is in the middle of it.

    Of several the longest.
    """
    parts = path.split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts) + 1))
    found = next((end for end in ends if end in shapes), None)
    if found is not None or not inside:
        return found
    n = len(parts)
    runs = ("/".join(parts[i : i + k]) for k in range(n - 1, 0, -1) for i in range(n - k))
    return next((run for run in runs if run in shapes), None)


def _shrunk(path: str, leaf: Any, cut: Cut | None, full: tuple[int, ...]) -> Any:
    """A leaf of the state, cut as the parameter of shape `full`."""
    if cut is None or leaf is None:
        return leaf
    if cut.dropped:
        return None
    if isinstance(leaf, Mask):
        return _shrunk_mask(path, leaf, cut, full)
    if tree.is_array_like(leaf):
        rule, got = "hold dense leaves where the params shrink", type(leaf).__name__
        fix = "Shrink first, and pack what is left."
        raise TypeError(_check.message("shrink_like", "state", rule, got, fix, path=path))
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return leaf
    places = reading(tuple(leaf.shape), full, cut, path)
    if places is None:
        rule = f"tell by its shape which entries belong to which of a parameter {list(full)}"
        got = _check.describe(leaf)
        raise ValueError(_check.message("shrink_like", "state", rule, got, _FIX, path=path))
    return cut_leaf(leaf, places, cut)


def _shrunk_mask(path: str, mask: Mask, cut: Cut, full: tuple[int, ...]) -> Mask:
    """The bits of what stays; groups and patterns only where they are not cut through."""
    touched = {*cut.axes} | (set() if cut.trips is None else {0})
    through = mask.nm is not None and mask.axis in touched
    through |= mask.block is not None and any(mask.block[d] != 1 for d in touched)
    if through:
        rule = "not shrink along the axis of an N:M pattern or of a block"
        got = f"a mask of nm={mask.nm}, block={mask.block}"
        raise ValueError(_check.message("shrink_like", "state", rule, got, _FIX, path=path))
    statistic = tree.map_with_path(
        lambda p, x: _shrunk(f"{path}/statistic/{p}".rstrip("/"), x, cut, full), mask.statistic
    )

    def bits(mask):
        keep = cut_leaf(mask.keep, tuple(range(len(full))), cut)
        return Mask.of(keep, nm=mask.nm, axis=mask.axis, block=mask.block)

    plain = dataclasses.replace(mask, statistic=None)
    abstract = isinstance(mask.bits, jax.ShapeDtypeStruct)
    small = jax.eval_shape(bits, plain) if abstract else bits(plain)
    return dataclasses.replace(small, statistic=statistic)

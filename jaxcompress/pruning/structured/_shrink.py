"""Smaller params, and the function that runs them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Keep
from jaxcompress.pruning.structured._blocks import drop_blocks
from jaxcompress.pruning.structured._cut import Cut, cut_leaf
from jaxcompress.pruning.structured._places import kept_positions
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing.positions import without_positions

Positions = Mapping[str, Mapping[int, np.ndarray]]
"""By path and axis which positions stay, `bool [*layers, positions]`."""


def shrink(
    fn: Callable[..., PyTree],
    params: PyTree,
    keep: Keep,
    *args: Any,
    sizes: str = "keep",
    **kwargs: Any,
) -> tuple[PyTree, Callable[..., PyTree]]:
    r"""Removes units and blocks: really smaller params, and the function that runs them.

    .. math:: f_\mathrm{small}(\theta_\mathrm{small}, x) = f(m \odot \theta, x)

    where the mask :math:`m` is zero in all places of the units that leave, up to the rounding
    of shorter sums. That holds wherever removed entries are the neutral element of what they go
    through, as zeros of a sum are; a group for which it does not says so in
    `jc.pruning.Group.inexact`: the variance of a LayerNorm, computed in two passes over an axis
    that is pruned, counts removed entries in the masked model and can't in a smaller one.

    The code of the model is not touched: `fn` is traced with the shapes that it is made for, and
    each equation is run again on the positions that stay, with its own names; a derivative of
    `jax.custom_jvp` or `jax.custom_vjp` is adapted, too.

    Args:
        fn: any function `fn(params, *args, **kwargs)`.
        params: its params: dense arrays, traced ones, NumPy's, or `jax.ShapeDtypeStruct`s.
        keep: static. What stays, from `jc.select`, of the dependencies of this function.
        *args: arguments that `fn` takes. They are looked at for their shapes, to find out here
            and not later that something does not fit.
        sizes: static. What becomes of numbers that come from a size, as the n of a mean or the
            scale of attention. `"keep"`: they stay, and the result is that of the masked model.
            `"replace"`: they follow the sizes, and the result is that of a smaller model that is
            written anew with these sizes; a warning names those that could come from one size
            or another, which stay. A custom derivative with such a number in it gives way to
            the derivative of its function.
        **kwargs: further arguments of `fn`.

    Returns:
        `(small_params, small_fn)`. `small_params` has the structure and dtypes of `params`; what
        only blocks that are left out use is None. `small_fn(small_params, *args)` can be jitted,
        mapped, differentiated, run on a mesh, captured, exported, quantized and shrunk again. It
        takes other shapes of `args`, and is traced anew at each call without `jit`. Random
        numbers are drawn as before, and those of what stays are used.

    Raises:
        TypeError: `fn` can't be called; `keep` is something else; a leaf is packed.
        ValueError: `params` are not those of `keep`; positions that leave together don't, or
            layers of a scan lose different numbers of units; an equation can't run without what
            is gone. The message names the leaf or the equation.

    Cost: a trace of `fn` and a reading of it, as of `jc.dependencies`, at each call without
    `jit`, none with it. Constants that are indexed by position are cut and stored.

    Examples:
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> params = {"up": jnp.eye(4), "bias": jnp.zeros(4), "down": jnp.ones((4, 2))}
        >>> x = jnp.ones((3, 4))
        >>> keep = jc.select(jc.dependencies(mlp, params, x), params, keep=0.5)
        >>> small, small_mlp = jc.shrink(mlp, params, keep, x)
        >>> jax.tree.map(jnp.shape, small)
        {'bias': (2,), 'down': (2, 2), 'up': (4, 2)}
        >>> jax.jit(small_mlp)(small, x).shape
        (3, 2)

    Source: what is removed is that of Fang et al. 2023, arXiv:2301.12900; re-running the program
    is ours.
    """
    _require(params, keep, sizes)
    small, run = params, fn
    if keep.blocks:
        small, run = drop_blocks(fn, params, keep.blocks, *args, **kwargs)
    positions = _of_layers_left(keep, small)
    cut = tree.map_with_path(
        lambda path, leaf: _cut(leaf, positions[path]) if path in positions else leaf, small
    )
    if positions:
        run = without_positions(
            run, small, positions, rescale=sizes == "replace", rules=keep.dependencies.rules
        )
    trace(run, (cut, *args), kwargs, parts=True)
    return cut, run


def _require(params: PyTree, keep: Any, sizes: str) -> None:
    kept_positions(keep)
    if sizes not in ("keep", "replace"):
        raise ValueError(_check.message("shrink", "sizes", "be 'keep' or 'replace'", repr(sizes)))
    leaves = tree.by_path("shrink", "params", params)
    for path, shape in keep.dependencies.shapes.items():
        leaf = leaves.get(path)
        if arrays.is_compressed(leaf):
            got, fix = _check.describe(leaf), "Remove first, then compress."
            raise TypeError(_check.message("shrink", "params", "be dense", got, fix, path=path))
        if getattr(leaf, "shape", None) != shape.shape:
            rule = f"have the shape {list(shape.shape)} that `keep` is of"
            got = "none" if leaf is None else _check.describe(leaf)
            raise ValueError(_check.message("shrink", "params", rule, got, path=path))


def _of_layers_left(keep: Keep, small: PyTree) -> Positions:
    """Which positions stay of the params without the blocks that are left out."""
    left = dict(tree.leaves_with_paths(small))
    layers = {path: np.asarray(gone.stays) for gone in keep.blocks for path in gone.block.leaves}
    found = {}
    for path, axes in kept_positions(keep).items():
        if path not in left:
            continue
        fewer = left[path].shape[:1] != keep.dependencies.shapes[path].shape[:1]
        found[path] = {
            d: mask[layers[path]] if fewer and mask.ndim > 1 else mask for d, mask in axes.items()
        }
    return found


def _cut(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    return cut_leaf(leaf, tuple(range(len(leaf.shape))), Cut(axes))

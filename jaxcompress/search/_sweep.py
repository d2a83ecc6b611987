"""A function on a grid of settings, in one compiled program."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._types import PyTree


def sweep(
    f: Callable[..., PyTree],
    grid: Mapping[str, Any],
    *args: PyTree,
    mode: Literal["vmap", "map"] = "vmap",
    batch_size: int | None = None,
    zipped: bool = False,
) -> PyTree:
    """`f(*args, **point)` for every point of a grid, in one program that is compiled once.

    Args:
        f: any function of arrays whose keyword arguments may be traced, as the numbers of this
            library are. Called again with the same function object, it is not compiled again.
        grid: from each keyword to its values, a sequence of numbers or an array of one dimension
            (PRNG keys too). The points are all combinations.
        *args: pytrees of arrays that all points share, such as params and batches. Pass them
            here: XLA would fold what `f` closes over into the program as constants.
        mode: static. `"vmap"` evaluates all points at once, and what depends on a few of the
            keywords only for their values. `"map"` takes one point after the other, in the
            memory of one; on a CPU it can be the faster one, for a branch of `lax.cond` that
            is not taken costs nothing.
        batch_size: static. Of `"map"`: how many points are evaluated at once; None: one. The last
            batch is filled up.
        zipped: static. Whether the values go together, one point for each index, instead of in
            all combinations.

    Returns:
        What `f` returns, each array with one leading axis for each keyword in the order of
        `grid`, or with one axis where `zipped`.

    Raises:
        TypeError: `f` can't be called, or `grid` is no mapping from names.
        ValueError: an axis is empty or has not one dimension, the values of a zipped grid differ
            in number, or an option is none of the above.

    Cost: all points. With `"vmap"` also their memory.

    Examples:
        >>> w = jax.random.normal(jax.random.key(0), (64, 8))
        >>> def error(w, bits, clip):
        ...     return jnp.mean((jc.compress(jc.quantize(bits, clip=clip), w) - w) ** 2)
        >>> grid = {"bits": [2, 3, 4], "clip": [0.5, 0.7, 0.9, 1.0]}
        >>> jc.sweep(error, grid, w).shape
        (3, 4)

        Mixed precision, as a tree of traced widths; the two go together:

        >>> params = {"a": w, "b": w.T}
        >>> def error(params, a, b):
        ...     new = jc.compress(jc.quantize({"a": a, "b": b}), params)
        ...     return sum(jnp.sum((new[k] - params[k]) ** 2) for k in params)
        >>> jc.sweep(error, {"a": [2, 4], "b": [4, 2]}, params, mode="map", zipped=True).shape
        (2,)
    """
    if not callable(f):
        raise TypeError(_check.message("sweep", "f", "be a function", _check.describe(f)))
    if not isinstance(grid, Mapping) or not all(isinstance(name, str) for name in grid):
        rule = "be a dict from keywords of `f` to their values"
        raise TypeError(_check.message("sweep", "grid", rule, _check.describe(grid)))
    if mode not in ("vmap", "map"):
        raise ValueError(_check.message("sweep", "mode", "be 'vmap' or 'map'", repr(mode)))
    if batch_size is not None:
        _check.integer("sweep", "batch_size", batch_size, 1)
        if mode == "vmap":
            rule, fix = "be left out with mode='vmap'", "Pass mode='map'."
            raise ValueError(_check.message("sweep", "batch_size", rule, batch_size, fix))
    axes = {name: _axis(name, values) for name, values in grid.items()}
    sizes = {name: values.shape[0] for name, values in axes.items()}
    if zipped and len(set(sizes.values())) > 1:
        rule = "have as many values of each keyword with zipped=True"
        raise ValueError(_check.message("sweep", "grid", rule, sizes))
    if not axes:
        rule = "have at least one keyword"
        raise ValueError(_check.message("sweep", "grid", rule, "none"))
    # A dict comes into jit sorted; its order is that of the axes of the result.
    return _swept(f, tuple(axes), tuple(axes.values()), args, mode, batch_size, zipped)


def _axis(name: str, values: Any) -> jax.Array:
    array = values if isinstance(values, jax.Array) else jnp.asarray(np.asarray(values))
    if array.ndim != 1 or not array.shape[0]:
        rule = "have one dimension and at least one value for each keyword"
        got = f"{_check.describe(array)} for {name!r}"
        raise ValueError(_check.message("sweep", "grid", rule, got))
    return array


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5, 6))
def _swept(f, names, values, args, mode: str, batch_size: int | None, zipped: bool) -> PyTree:
    def point(*at):
        return f(*args, **dict(zip(names, at, strict=True)))

    if mode == "vmap":
        if zipped:
            return jax.vmap(point)(*values)
        mapped = point
        for i in reversed(range(len(names))):
            mapped = jax.vmap(mapped, in_axes=[0 if j == i else None for j in range(len(names))])
        return mapped(*values)
    shape = tuple(x.shape[0] for x in values)
    if not zipped:
        places = jnp.unravel_index(jnp.arange(math.prod(shape)), shape)
        values = tuple(x[place] for x, place in zip(values, places, strict=True))
    count = values[0].shape[0]
    # Whole batches: for a last one that is shorter `f` would be traced and compiled again.
    index = np.minimum(np.arange(-(-count // (batch_size or 1)) * (batch_size or 1)), count - 1)
    values = tuple(x[index] for x in values)
    out = lax.map(lambda at: point(*at), values, batch_size=batch_size)
    shape = (count,) if zipped else shape
    return jax.tree.map(lambda x: x[:count].reshape(shape + x.shape[1:]), out)

"""Outputs of a teacher as rows of a file, and back."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.distillation import _cache_file
from jaxcompress.distillation._cache_file import Leaf


def rows(outputs: PyTree, count: int) -> list[tuple[str, np.ndarray]]:
    """The arrays of the outputs with their paths, on the host."""
    arrays = list(tree.by_path("cache.write", "outputs", outputs).items())
    if not arrays:
        raise ValueError(
            _check.message("cache.write", "outputs", "hold arrays", "a tree without leaves")
        )
    out = []
    for path, x in arrays:
        dtype = getattr(x, "dtype", None)
        name = getattr(dtype, "name", None)
        if name not in _cache_file.DTYPES or _check.is_traced(x):
            rule, fix, got = "hold arrays of booleans or real numbers", "", _check.describe(x)
            if _check.is_traced(x):
                got, fix = f"a traced {got}", "Call it outside of jit."
            elif dtype is None:
                fix = "Pass an array: a list is a tree of its entries."
            elif jnp.issubdtype(dtype, jnp.complexfloating):
                fix = "Write its real and its imaginary part."
            raise TypeError(
                _check.message("cache.write", "outputs", rule, got, fix, path=path or None)
            )
        if x.ndim == 0 or x.shape[0] != count:
            rule, got = f"have a row for each of the {count} ids", _check.describe(x)
            raise ValueError(_check.message("cache.write", "outputs", rule, got, path=path or None))
        out.append((path, np.asarray(x)))
    return out


def narrow(path: str, x: np.ndarray, dtype: np.dtype | None, num_classes: int | None):
    """The array as it is stored; refuses what does not fit."""
    if jnp.issubdtype(x.dtype, jnp.floating) and dtype is not None:
        with np.errstate(over="ignore"):
            y = x.astype(dtype)
        lost = np.isfinite(x) & ~np.isfinite(y)
        if lost.any():
            largest = np.max(np.abs(x[lost]).astype(np.float64))
            rule, got = f"fit {dtype.name}, up to {float(jnp.finfo(dtype).max):g}", f"{largest:g}"
            fix = "Subtract the largest logit of each row, or write float32."
            raise ValueError(
                _check.message("cache.write", "outputs", rule, got, fix, path=path or None)
            )
        return y
    if jnp.issubdtype(x.dtype, jnp.integer) and num_classes is not None:
        if x.size and (x.min() < 0 or x.max() >= num_classes):
            rule = f"hold classes in [0, {num_classes})"
            got = int(x.min()) if x.min() < 0 else int(x.max())
            raise ValueError(_check.message("cache.write", "outputs", rule, got, path=path or None))
        return x.astype(np.min_scalar_type(num_classes - 1))
    return x


def as_given(leaf: Leaf, x: np.ndarray) -> np.ndarray:
    """Integers as they came: narrow ones are for the disk, not to compute with."""
    return x.astype(leaf.given, copy=False)


def in_structure(like: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    if like is None:
        return arrays[""] if list(arrays) == [""] else arrays
    paths = [path for path, _ in tree.leaves_with_paths(like)]
    if set(paths) != set(arrays):
        rule = f"have the paths that were written, {sorted(arrays)}"
        raise ValueError(_check.message("cache.read", "like", rule, sorted(paths)))
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in paths])

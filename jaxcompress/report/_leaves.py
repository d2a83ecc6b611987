"""Array leaves of one tree or of two that match, pulled to the host as NumPy arrays."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree


def array_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """Every leaf with a shape and a dtype, with its path; random keys are left out."""
    return [(path, leaf) for path, leaf in tree.leaves_with_paths(params) if _is_array(leaf)]


def paired_leaves(
    function: str, params: PyTree, after: PyTree | None
) -> list[tuple[str, Any, Any | None]]:
    """`(path, before, after)` of each array leaf; `after` is None when there is one tree.

    Raises:
        ValueError: the two trees have other paths, or a leaf has another dense shape.
    """
    first = array_leaves(params)
    if after is None:
        return [(path, leaf, None) for path, leaf in first]
    second = array_leaves(after)
    one, two = [path for path, _ in first], [path for path, _ in second]
    if sorted(one) != sorted(two):
        gone, new = (_shown(set(a) - set(b)) for a, b in ((one, two), (two, one)))
        raise ValueError(
            _check.message(
                function,
                "after",
                "have the array leaves of `params`",
                f"a tree without {gone} and with {new} besides",
                "Give trees of one model; compressed arrays may stand where dense ones stood.",
            )
        )
    if one != two:  # other containers, another order: then paths decide
        lookup = dict(second)
        second = [(path, lookup[path]) for path in one]
    rows = [(path, x, y) for (path, x), (_, y) in zip(first, second, strict=True)]
    for path, x, y in rows:
        if tuple(x.shape) != tuple(y.shape):
            raise ValueError(
                _check.message(
                    function,
                    "after",
                    f"hold a leaf of shape {list(x.shape)}",
                    _describe(y),
                    "Summarize a shrunk model on its own, without `after`.",
                    path=path,
                )
            )
    return rows


def host(function: str, path: str, leaf: Any) -> np.ndarray | None:
    """The dense values of `leaf` in NumPy, pulled once; None when it is abstract.

    Floating-point dtypes narrower than float32 become float32.
    """
    parts = jax.tree.leaves(leaf)
    if any(_check.is_traced(part) for part in parts):
        raise TypeError(
            _check.message(
                function,
                "params",
                "hold concrete or abstract arrays",
                f"a traced {_describe(leaf)}",
                "Call it outside of jit, vmap and grad.",
                path=path,
            )
        )
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
        return None
    if not all(getattr(part, "is_fully_addressable", True) for part in parts):
        raise ValueError(
            _check.message(
                function,
                "params",
                "be held by this process as a whole",
                f"{_describe(leaf)}, shared with other processes",
                "First use jax.experimental.multihost_utils.process_allgather(params, tiled=True).",
                path=path,
            )
        )
    dense = np.asarray(jax.device_get(leaf.todense() if tree.is_array_like(leaf) else leaf))
    if jnp.issubdtype(dense.dtype, jnp.floating):
        return dense if dense.dtype in (np.float32, np.float64) else dense.astype(np.float32)
    return dense


def unit_matrix(dense: np.ndarray) -> np.ndarray:
    """The 2-D view that joins all axes but the last, times a power of two.

    The largest entry is then of order one, so that no singular value overflows; the others
    keep their digits. `dense` has two or more dimensions, entries, and all are finite.
    """
    view = dense.reshape(-1, dense.shape[-1])
    if np.iscomplexobj(view):
        real, imag = np.real(view), np.imag(view)
        _, power = np.frexp(max(np.abs(real).max(), np.abs(imag).max()))
        return np.ldexp(real, -power) + 1j * np.ldexp(imag, -power)
    _, power = np.frexp(np.abs(view).max())
    return np.ldexp(view, -power)


def require(function: str, module: str) -> Any:
    """Imports a module of the `report` extra, or says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{function}: `{module.split('.')[0]}` must be installed, got {error!r}."
            ' Run pip install "jaxcompress[report]".'
        ) from error


def _is_array(leaf: Any) -> bool:
    return (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _describe(leaf: Any) -> str:
    """Like `_check.describe`, with the type of a compressed leaf in front."""
    kind = f"{type(leaf).__name__} " if tree.is_array_like(leaf) else ""
    return kind + _check.describe(leaf)


def _shown(paths: set[str]) -> str:
    names = [repr(path) for path in sorted(paths)]
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f", … ({len(names) - 5} more)" if len(names) > 5 else "")

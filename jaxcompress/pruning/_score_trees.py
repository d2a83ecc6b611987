"""What trees of scores hold where there is nothing to score, and in which dtype."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide_dtype


def require_dense(function: str, w: Any, path: str) -> None:
    """Refuses what is not a dense real floating-point array."""
    if tree.is_array_like(w) or not is_floating(w):
        rule = "hold dense real floating-point arrays in the chosen leaves"
        got = type(w).__name__ if tree.is_array_like(w) else _check.describe(w)
        fix = "Choose other leaves with `where`; score params before they are packed."
        raise TypeError(_check.message(function, "params", rule, got, fix, path=path))


def score_of_unchosen(w: Any) -> jax.Array | None:
    """Infinity where a score was not asked for; zeros where there is none; None for no array."""
    if not hasattr(w, "dtype"):
        return None
    if not is_floating(w):
        return jnp.zeros(w.shape, jnp.float32)
    return jnp.full(w.shape, jnp.inf, dtype_of_scores(w))


def is_floating(x: Any) -> bool:
    """Whether `x` is an array of real floating-point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def dtype_of_scores(x: Any) -> Any:
    """float32, or the leaf's own where that is wider."""
    return wide_dtype(jax.dtypes.canonicalize_dtype(x.dtype))


def wide(x: Any) -> jax.Array:
    """A leaf in the dtype of its scores."""
    return jnp.asarray(x).astype(dtype_of_scores(x))

"""Dtypes to compute in."""

import jax
import jax.numpy as jnp
import numpy as np


def wide(x: jax.Array | np.ndarray) -> jax.Array:
    """A floating-point array in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    dtype = wide_dtype(x.dtype)
    return x if x.dtype == dtype else x.astype(dtype)


def wide_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """float32 for what is narrower, else the dtype itself."""
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else np.dtype(np.float32)

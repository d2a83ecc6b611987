"""Dtypes to compute in."""

import jax
import jax.numpy as jnp
import numpy as np


def wide(x: jax.Array | np.ndarray) -> jax.Array:
    """A floating-point array in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)

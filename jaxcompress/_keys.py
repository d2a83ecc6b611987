"""Keys of `jax.random`: one of its own for each leaf, and for each step."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def of_leaf(key: jax.Array, path: str, step: Any = None) -> jax.Array:
    """The key of the leaf at `path`, whatever other leaves there are; at a step, where given.

    Args:
        key: one key, typed or not.
        path: static.
        step: a whole number, modulo 2^32.
    """
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return own if step is None else jax.random.fold_in(own, jnp.asarray(step).astype(jnp.uint32))

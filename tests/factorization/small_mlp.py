"""A network of two layers, for the tests of adapters."""

import jax.numpy as jnp
import numpy as np


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def params(dtype=jnp.float32):
    return {"a": {"w": draw(16, 8, dtype=dtype), "b": draw(8, dtype=dtype)}, "c": draw(8, 4)}


def mlp(p, x):
    return jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None]) @ p["c"]

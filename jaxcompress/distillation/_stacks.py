"""Logits of several models in one array, [models, ..., classes], checked."""

import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress.distillation._rows import mask_of, require_temperature


def read_stack(function, logits, temperature, where):
    """The logits in the dtype to compute in, the temperature, and the mask of the logits' shape.

    A temperature per row [...] gets the shape [models, ...].
    """
    if not hasattr(logits, "dtype") or not jnp.issubdtype(logits.dtype, jnp.floating):
        rule, fix = "be a stack of real floating-point logits", "Stack them with jnp.stack."
        raise TypeError(_check.message(function, "logits", rule, _check.describe(logits), fix))
    shape = logits.shape
    if len(shape) < 2 or shape[0] == 0:
        rule, got = "have the shape [models, ..., classes], one model at least", list(shape)
        raise ValueError(_check.message(function, "logits", rule, got))
    require_temperature(function, temperature, shape[1:-1])
    dtype = jnp.float64 if logits.dtype == jnp.float64 else jnp.float32
    heat = jnp.asarray(temperature, dtype)
    if heat.ndim:
        heat = jnp.broadcast_to(heat[None], shape[:-1])
    keep = mask_of(function, where, shape[1:])
    return jnp.asarray(logits).astype(dtype), heat, jnp.broadcast_to(keep[None], shape)

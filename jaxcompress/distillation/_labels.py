"""Integer labels of rows of logits."""

import jax
import jax.numpy as jnp

from jaxcompress import _check


def target_of(function, labels, keep):
    """Where the label of each row is among its classes, and which rows are in order.

    A row is in order whose label is one of its classes, or that has none.
    """
    rule = f"be integers, one per row: shape {list(keep.shape[:-1])}"
    if not hasattr(labels, "dtype") or not jnp.issubdtype(labels.dtype, jnp.integer):
        fix = "Give the index of the class, not probabilities."
        raise TypeError(_check.message(function, "labels", rule, _check.describe(labels), fix))
    if labels.shape != keep.shape[:-1]:
        raise ValueError(_check.message(function, "labels", rule, _check.describe(labels)))
    labels = jnp.asarray(labels)
    labels = labels.astype(labels.dtype if labels.dtype.itemsize > 4 else jnp.int32)
    classes = jnp.arange(keep.shape[-1], dtype=labels.dtype)
    classes = jnp.reshape(classes, (1,) * labels.ndim + classes.shape)
    target = keep & (jnp.expand_dims(labels, -1) == classes)
    return target, jnp.any(target, -1) | ~jnp.any(keep, -1)


def checked(loss: jax.Array, in_order: jax.Array) -> jax.Array:
    """NaN for the rows whose label is none of their classes."""
    return jnp.where(in_order, loss, jnp.nan)

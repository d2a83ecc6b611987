"""Scales in a format of their own: powers of two, or narrow floats times one more scale."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays
from jaxcompress.quantization._formats import Format

TINY = float(np.finfo(np.float32).tiny)


def in_two(scale: jax.Array, scales: Format) -> tuple[jax.Array, jax.Array]:
    r"""The nearest :math:`v\,s_2`, with v in a format and one :math:`s_2` for all.

    Args:
        scale: float32, at least 0.
        scales: static. The format.

    Returns:
        v, above 0, of the shape of `scale`; and :math:`s_2 = \max s / v_{\max}`, of size 1,
        which makes the largest of them the largest of the format.
    """
    smallest = min(v for v in scales.values if v > 0)
    most = jnp.max(scale, keepdims=True, initial=0.0)
    # The smallest of all products of both is still a normal number.
    second = jnp.maximum(most * np.float32(1.0 / scales.max), TINY / smallest)
    second = jnp.where(most > 0, second, 1.0)
    return jnp.maximum(scales.round(scale * (1.0 / second)), smallest), second


def rounded_steps(scale: jax.Array, scales: Format | None) -> tuple[jax.Array, jax.Array | None]:
    """Steps of integers that can be stored, and the one that they are multiples of, or None.

    Powers of two are rounded up, so that the range stays covered; other formats take `in_two`.

    Args:
        scale: float32, above 0.
        scales: static. The format; None for float32.
    """
    if scales is None:
        return scale, None
    if scales.values[0] > 0:
        down = scales.round(scale)
        return jnp.where(down < scale, jnp.minimum(down * 2.0, scales.max), down), None
    values, second = in_two(scale, scales)
    return values * second, second


def packed_steps(scale: jax.Array, second: jax.Array | None, scales: Format | None) -> Any:
    """What `rounded_steps` gave, as `arrays.Quantized` holds it."""
    if scales is None or second is None:
        return pack_scales(scale, second, scales)
    return pack_scales(scales.round(scale * (1.0 / second)), second, scales)


def pack_scales(scale: jax.Array, second: jax.Array | None, scales: Format | None) -> Any:
    """Values of a format as `arrays.Quantized` holds them: in its dtype, and quantized if twice."""
    if scales is None:
        return scale
    codes = scale.astype(scales.dtype)
    if second is None:
        return codes
    return arrays.Quantized(codes, second, None, np.dtype(np.float32))

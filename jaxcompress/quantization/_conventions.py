"""Conventions of rounding to integers: ours, and those of the libraries that set others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Convention(NamedTuple):
    r"""What the same bits and the same range may mean; static.

    With :math:`q = 2^{b-1} - 1` symmetric codes reach from :math:`-q` to :math:`q`, or from
    :math:`-q - 1`, and :math:`\Delta = \max|w| / q`, or :math:`\max|w| / (q + 1/2)`.

    Attributes:
        half_step: the range ends half a step beyond the largest code, so that each code stands
            for an interval of one width. The largest weight then lies on a rounding tie.
        full_range: symmetric codes reach down to :math:`-2^{b-1}`.
        zero_first: the zero point is added before rounding, not after it.
        least: a step below this one is not used.
        least_is_one: such a step becomes 1, as a step of zero always does; else `least`.
    """

    half_step: bool = False
    full_range: bool = False
    zero_first: bool = False
    least: float = float(np.finfo(np.float32).tiny)
    least_is_one: bool = False


OURS = Convention()
"""No tie at the largest weight, codes symmetric about zero: the error is half a step at most."""
QWIX = Convention(True, True, True, float(np.sqrt(np.finfo(np.float32).tiny)), True)
"""`qwix.quantize` with `absmax` (symmetric) or `minmax` (asymmetric)."""
TORCHAO = Convention(True, True)
"""torchao's `choose_qparams_affine` and `quantize_affine` of float32."""
AQT = Convention(True)
"""AQT's `IntSymmetric` with `preserve_zero` and `preserve_max_val=False`: no code -2^(b-1)."""


def levels(bits: jax.Array) -> jax.Array:
    """2^bits - 1 in float32, exactly."""
    return (jnp.left_shift(jnp.int32(1), bits) - 1).astype(jnp.float32)


def step_of(
    low: jax.Array, high: jax.Array, bits: jax.Array, symmetric: bool, convention: Convention
) -> jax.Array:
    """The step of a range that holds zero."""
    if symmetric:
        top = levels(bits - 1)
        top = top + 0.5 if convention.half_step else jnp.maximum(top, 1.0)
        return _usable(jnp.maximum(-low, high) * (1.0 / top), convention)
    # Halves don't round, so that a fused multiply-add, which `jit` may use, changes nothing; and
    # the range of the largest floats does not overflow.
    return _usable((high * 0.5 - low * 0.5) * (2.0 / levels(bits)), convention)


def zero_point_of(low: jax.Array, scale: jax.Array, bits: jax.Array) -> jax.Array:
    """The code of zero on an asymmetric grid that starts at `low`."""
    return jnp.clip(jnp.round(-low * (1.0 / scale)), 0.0, levels(bits))


def codes_of(
    w: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    bits: jax.Array,
    convention: Convention,
) -> jax.Array:
    """Float32 integers: symmetric ones about zero, asymmetric ones from 0 on."""
    # A product with 1/scale, for XLA may or may not turn a quotient into one: the codes
    # must not depend on whether the call is jitted.
    steps = w.astype(jnp.float32) * (1.0 / scale)
    if zero_point is not None:
        shifted = jnp.round(steps + zero_point) if convention.zero_first else None
        shifted = jnp.round(steps) + zero_point if shifted is None else shifted
        return jnp.clip(shifted, 0.0, levels(bits))
    top = levels(bits - 1)
    bottom = -top - 1.0 if convention.full_range else -top
    return jnp.where(bits == 1, jnp.sign(steps), jnp.clip(jnp.round(steps), bottom, top))


def _usable(scale: jax.Array, convention: Convention) -> jax.Array:
    least = np.float32(convention.least)
    raised = jnp.where(scale < least, 1.0, scale) if convention.least_is_one else None
    raised = jnp.maximum(scale, least) if raised is None else raised
    return jnp.where(scale > 0, raised, 1.0)

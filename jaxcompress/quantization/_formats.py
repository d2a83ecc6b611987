"""Formats: the values that a code of a narrow float, or of a table, can stand for."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._sharding import automatic

# Above it a search is faster than a comparison with every value.
_FEW = 32


@dataclasses.dataclass(frozen=True)
class Format:
    """A set of values for weights or scales; static, hashable.

    Attributes:
        values: all finite values, ascending; negative zero is not listed.
        bits: width of a code.
        exponent: bits of the exponent; None for a table.
        mantissa: bits of the mantissa; None for a table.
        dtype: the name of the JAX dtype that packed arrays use, None where they use a codebook.

    Examples:
        >>> jc.quantization.E2M1
        Format(bits=4, exponent=2, mantissa=1, max=6.0)
        >>> jc.quantization.E2M1.round(jnp.array([0.7, -2.5, 100.0]))
        Array([ 0.5, -2. ,  6. ], dtype=float32)
    """

    values: tuple[float, ...]
    bits: int
    exponent: int | None = None
    mantissa: int | None = None
    dtype: str | None = None

    @property
    def max(self) -> float:
        """The largest magnitude, to which the largest weight of a run is scaled."""
        return max(abs(self.values[0]), abs(self.values[-1]))

    def round(self, x: jax.Array) -> jax.Array:
        """The nearest value, in float32; beyond the ends the end, and NaN stays NaN.

        Of two values equally near, a float takes the one with an even code, and a table the
        smaller one. A format without a zero, such as `E8M0`, rounds down to a power of two. The
        result is the same eagerly, under `jit`, `vmap` and `grad`; its gradient is zero.
        """
        x = lax.stop_gradient(x.astype(jnp.float32))
        if self.mantissa is None:
            return automatic(self._nearest, x, like_first=True)
        clipped = jnp.clip(x, self.values[0], self.values[-1])
        if self.values[0] > 0:
            bits = lax.bitcast_convert_type(clipped, jnp.uint32)
            power = lax.bitcast_convert_type(bits & np.uint32(0xFF800000), jnp.float32)
            return jnp.where(jnp.isnan(x), x, power)
        # The spacing at each magnitude, and its inverse: powers of two, built from their bits.
        bits = lax.bitcast_convert_type(clipped, jnp.uint32)
        power = (lax.shift_right_logical(bits, np.uint32(23)) & np.uint32(0xFF)).astype(jnp.int32)
        spacing = jnp.maximum(power, 127 + self._lowest) - self.mantissa
        rounded = jnp.round(clipped * _power(254 - spacing)) * _power(spacing)
        return jnp.where(jnp.isnan(x), x, rounded)

    def codes(self, x: np.ndarray) -> np.ndarray:
        """The uint8 codes of values of the format: indices into `codebook`."""
        x = np.asarray(x, np.float32)
        if self.mantissa is None:
            return np.searchsorted(np.asarray(self.values, np.float32), x).astype(np.uint8)
        positive = np.asarray(self.values, np.float32)[len(self.values) // 2 :]
        sign = np.uint8(1 << (self.bits - 1)) * np.signbit(x)
        return np.searchsorted(positive, np.abs(x)).astype(np.uint8) | sign

    def codebook(self) -> np.ndarray:
        """The float32 value of each code: of a float its bits, sign first."""
        if self.mantissa is None:
            return np.asarray(self.values, np.float32)
        positive = np.asarray(self.values, np.float32)[len(self.values) // 2 :]
        return np.concatenate([positive, -positive])

    @property
    def _lowest(self) -> int:
        """The exponent of the smallest normal value."""
        return 2 - (1 << ((self.exponent or 0) - 1))

    def _nearest(self, x: jax.Array) -> jax.Array:
        values = np.asarray(self.values, np.float32)
        middles = values[:-1] * np.float32(0.5) + values[1:] * np.float32(0.5)
        if len(values) <= _FEW:
            out = jnp.full_like(x, values[0])
            for middle, value in zip(middles, values[1:], strict=True):
                out = jnp.where(x > middle, value, out)
        else:
            out = jnp.take(values, jnp.searchsorted(middles, x, side="left"), mode="clip")
        return jnp.where(jnp.isnan(x), x, out)

    def __repr__(self) -> str:
        if self.mantissa is None:
            return f"Format(bits={self.bits}, values={len(self.values)}, max={self.max})"
        kind = f"exponent={self.exponent}, mantissa={self.mantissa}"
        return f"Format(bits={self.bits}, {kind}, max={self.max})"


def _power(biased: jax.Array) -> jax.Array:
    """2 to the power of a biased exponent, a float32 with no mantissa."""
    return lax.bitcast_convert_type(lax.shift_left(biased, np.int32(23)), jnp.float32)


def _float(exponent: int, mantissa: int, top: float, dtype: str | None = None) -> Format:
    """The signed float with subnormals whose largest value is `top`."""
    lowest, steps = 2 - (1 << (exponent - 1)), 1 << mantissa
    positive = [i / steps * 2.0**lowest for i in range(steps)]
    for power in range(1 << exponent):
        positive += [(1 + i / steps) * 2.0 ** (lowest + power) for i in range(steps)]
    positive = [v for v in positive if v <= top]
    negative = [-v for v in positive[:0:-1]]
    return Format((*negative, *positive), 1 + exponent + mantissa, exponent, mantissa, dtype)


E4M3 = _float(4, 3, 448.0, "float8_e4m3fn")
"""8 bits: Micikevicius et al. 2022, arXiv:2209.05433; no infinity."""

E5M2 = _float(5, 2, 57344.0, "float8_e5m2")
"""8 bits: Micikevicius et al. 2022, arXiv:2209.05433; rounding never gives infinity."""

E2M3 = _float(2, 3, 7.5)
"""6 bits: OCP microscaling formats (MX) specification v1.0, section 5.3.2."""

E3M2 = _float(3, 2, 28.0)
"""6 bits: OCP microscaling formats (MX) specification v1.0, section 5.3.2."""

E2M1 = _float(2, 1, 6.0)
"""4 bits: OCP microscaling formats (MX) specification v1.0, section 5.3.3."""

E8M0 = Format(tuple(2.0**k for k in range(-126, 128)), 8, 8, 0, "float8_e8m0fnu")
"""Powers of two, for scales: OCP MX specification v1.0, section 5.4.1. Differs: from 2^-126 on,
the smallest normal float32."""

NF4 = Format(
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    4,
)  # fmt: skip
"""4 bits: quantiles of the normal distribution, with zero; Dettmers et al. 2023,
arXiv:2305.14314, appendix E."""


def table(values: Iterable[float]) -> Format:
    """A format from a list of values.

    Args:
        values: static. 2 to 256 distinct finite numbers, in any order. Rounded to float32.

    Returns:
        The `Format`, for `jc.quantization.floats`, with codes of as many bits as their number
        needs. Where zero is not among the values an exact zero still stays zero.

    Raises:
        TypeError: what is not a list of numbers.
        ValueError: fewer than 2 or more than 256 distinct values, one that is not finite, or
            no value but zero.

    Examples:
        >>> thirds = jc.quantization.table([-1, -1 / 3, 0, 1 / 3, 1])
        >>> params = {"w": jnp.array([[3.0, 0.9], [-2.2, -0.1]])}
        >>> jc.compress(jc.quantization.floats(thirds, axis=None), params)["w"]
        Array([[ 3.,  1.],
               [-3.,  0.]], dtype=float32)
    """
    rule = "be 2 to 256 distinct finite numbers"
    try:
        array = np.asarray(list(values), np.float64).astype(np.float32)
    except (TypeError, ValueError):
        got = _check.describe(values)
        raise TypeError(_check.message("table", "values", rule, got)) from None
    distinct = np.unique(array + np.float32(0.0))
    if array.ndim != 1 or not 2 <= len(distinct) <= 256 or not np.isfinite(distinct).all():
        raise ValueError(_check.message("table", "values", rule, _check.describe(array)))
    bits = max(1, int(len(distinct) - 1).bit_length())
    return Format(tuple(float(v) for v in distinct), bits)

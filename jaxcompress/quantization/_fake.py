"""Quantization as a function for the loss: rounded values, straight-through gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike
from jaxcompress.quantization._conventions import OURS, levels, step_of, zero_point_of
from jaxcompress.quantization._grid import Grid
from jaxcompress.quantization._ranges import min_max
from jaxcompress.quantization._stochastic import round_randomly, typed_key


def fake_quantize(
    x: jax.Array,
    bits: ArrayLike = 8,
    *,
    axis: int | tuple[int, ...] | None = None,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
    symmetric: bool = True,
    key: jax.Array | None = None,
) -> jax.Array:
    r"""Rounds to an integer grid and back; the gradient passes where nothing is clipped.

    .. math:: \hat x = (\mathrm{clip}(\lfloor x / \Delta \rceil + z, l, u) - z)\,\Delta, \qquad
        \frac{\partial \hat x}{\partial x} = [\,l \le \lfloor x / \Delta \rceil + z \le u\,]

    symmetric: :math:`z = 0,\ u = -l = 2^{b-1} - 1`; else :math:`l = 0,\ u = 2^b - 1`. For use
    inside of a model or a loss. Weights need it nowhere: `jc.straight_through(opt,
    jc.quantize(bits))` trains them with no change to the model.

    Args:
        x: any shape, any float dtype; computed in float32.
        bits: :math:`b`, 1 to 16. May be traced. Rounded to an integer. One bit, symmetric, is
            binary as in `jc.quantize`, and clips nothing.
        axis: static. One step for each index of this axis or these axes; None: one for all.
        low: lower end of the range, at most 0; with `high`. A scalar, an array that broadcasts
            to `x`, or a vector along `axis`. May be traced. A symmetric range reaches as far to
            both sides as its farther end; without `low` that is `high`.
        high: upper end, at least 0. Without it and `scale` the range is that of `x` itself.
        scale: :math:`\Delta`, in the place of a range, shaped as `low`. May be traced.
        zero_point: :math:`z`, whole numbers, with `scale`; makes the grid asymmetric.
        symmetric: static.
        key: a `jax.random.key` for stochastic rounding: up or down at random, so that the mean
            of :math:`\hat x` is `x` within the range. None: to the nearest, half to even.

    Returns:
        Shape and dtype of `x`, exactly on the grid, and the same eagerly, under `jit`, `vmap`
        and `grad`. NaN stays NaN, infinities go to the ends. No gradient reaches `low`, `high`,
        `scale` or `zero_point` (`jc.quantization.lsq` learns them).

    Raises:
        TypeError: `x` is not real floating point; raised while tracing. `key` is no key.
        ValueError: a number out of range; ends without each other, or with a `scale`; a shape
            that fits neither `x` nor `axis`.

    Cost: one elementwise pass, and a reduction for a range that is not given.

    Examples:
        >>> jc.quantization.fake_quantize(jnp.array([1.0, -0.6, 0.2]), 2)
        Array([ 1., -1.,  0.], dtype=float32)
        >>> f = lambda x: jc.quantization.fake_quantize(x, 4, low=0.0, high=1.0, symmetric=False)
        >>> f(jnp.array([0.31, 1.5])), jax.grad(lambda x: f(x).sum())(jnp.array([0.31, 1.5]))
        (Array([0.33333334, 1.        ], dtype=float32), Array([1., 0.], dtype=float32))
        >>> at = lambda bits: jc.quantization.fake_quantize(jnp.ones(3), bits)
        >>> jax.vmap(at)(jnp.arange(2, 9)).shape
        (7, 3)

    Source: Jacob et al. 2017, arXiv:1712.05877, section 3; Krishnamoorthi 2018,
    arXiv:1806.08342, section 2.4; stochastic rounding from Gupta et al. 2015, arXiv:1502.02551.
    """
    _check.floating("fake_quantize", "x", x)
    _check.number("fake_quantize", "bits", bits, 1, 16)
    x, width = jnp.asarray(x), whole(bits, 1, 16)
    wide = jax.lax.stop_gradient(x.astype(jnp.float32))
    given = {"low": low, "high": high, "scale": scale, "zero_point": zero_point}
    _require_one_range(given, symmetric)
    shaped = {
        name: None
        if value is None
        else along("fake_quantize", name, jax.lax.stop_gradient(value), wide, axis)
        for name, value in given.items()
    }
    low, high, scale, zero_point = shaped.values()
    if scale is None:
        if high is None:
            low, high = min_max(_finite(wide), _shared(wide, axis), _no_error)
        low = -high if low is None else low
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        step = step_of(low, high, width, symmetric, OURS)
        zero_point = None if symmetric else zero_point_of(low, step, width)
        if symmetric and shaped["high"] is None:
            step = jnp.where(width == 1, _mean_size(wide, axis), step)
    else:
        step = scale
        if not symmetric and zero_point is None:
            zero_point = jnp.zeros((), jnp.float32)
    grid = Grid(step, zero_point, width)
    if key is None:
        value = grid.project(wide)
    else:
        own = typed_key("fake_quantize", key)
        uniform = place_like(jax.random.uniform(own, x.shape, jnp.float32), x)
        value = round_randomly(grid, wide, uniform)
    code = jnp.round(wide * (1.0 / step))
    if zero_point is None:
        inside = (jnp.abs(code) <= levels(width - 1)) | (width == 1)
    else:
        inside = (code + zero_point >= 0) & (code + zero_point <= levels(width))
    return pass_through(value.astype(x.dtype), x, inside.astype(x.dtype))


@jax.custom_jvp
def pass_through(value: jax.Array, x: jax.Array, inside: jax.Array) -> jax.Array:
    """`value`, with its own derivative and besides that of `x` times `inside`.

    Unlike `x + stop_gradient(value - x)` it is exactly `value`.
    """
    del x, inside
    return value


@pass_through.defjvp
def _pass_through_jvp(primals, tangents):
    value, _, inside = primals
    moved, dx, _ = tangents
    return value, moved + inside * dx


def whole(bits: ArrayLike, low: int, high: int) -> jax.Array:
    """A width as an int32 scalar; a traced one outside of the bounds counts as the nearer."""
    return jnp.clip(jnp.round(jnp.asarray(bits).astype(jnp.float32)), low, high).astype(jnp.int32)


def along(
    function: str,
    argument: str,
    value: ArrayLike,
    x: jax.Array,
    axis: int | tuple[int, ...] | None,
) -> jax.Array:
    """A scalar, an array of the rank of `x`, or a vector along `axis`, in float32 to broadcast."""
    value = jnp.asarray(value).astype(jnp.float32)
    shape = value.shape
    if value.ndim == 1 and x.ndim > 1 and isinstance(axis, int):
        own = _check.axis(function, "axis", axis, x.ndim)
        shape = tuple(value.size if a == own else 1 for a in range(x.ndim))
    fits = len(shape) in (0, x.ndim) and all(
        n in (1, m) for n, m in zip(shape, x.shape[: len(shape)], strict=True)
    )
    if not fits:
        rule = f"be a scalar, broadcast to {list(x.shape)}, or be a vector along `axis`"
        raise ValueError(_check.message(function, argument, rule, _check.describe(value)))
    return value.reshape(shape)


def _shared(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
    own = {_check.axis("fake_quantize", "axis", a, x.ndim) for a in axes}
    return tuple(a for a in range(x.ndim) if a not in own)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, jnp.nan)


def _mean_size(x: jax.Array, axis: int | tuple[int, ...] | None) -> jax.Array:
    axes, counts = _shared(x, axis), jnp.isfinite(x) & (x != 0)
    total = jnp.sum(jnp.abs(x), axes, keepdims=True, where=counts)
    number = jnp.sum(counts.astype(jnp.float32), axes, keepdims=True)
    mean = total * (1.0 / jnp.maximum(number, 1.0))
    return jnp.where(mean > 0, mean, 1.0)


def _no_error(low: Any, high: Any) -> Any:
    del low, high


def _require_one_range(given: dict[str, Any], symmetric: bool) -> None:
    has = {name for name, value in given.items() if value is not None}
    ends = {"high"} if symmetric else {"low", "high"}
    if has & {"low", "high"} and ("scale" in has or not ends <= has):
        rule = "come with `high`, and with `low` if asymmetric, and without `scale`"
        got = ", ".join(sorted(has))
        raise ValueError(_check.message("fake_quantize", "low, high", rule, got))
    if "zero_point" in has and ("scale" not in has):
        rule, got = "come with `scale`", "one without"
        raise ValueError(_check.message("fake_quantize", "zero_point", rule, got))

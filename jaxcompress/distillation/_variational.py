"""Variational information distillation: a Gaussian around the student, its variance trained."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._dtypes import wide_dtype
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import ALL, counted, read


def vid_init(
    channels: int,
    variance: ArrayLike = 5.0,
    *,
    floor: ArrayLike = 1e-5,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    r"""The parameter of `vid_loss` that gives every channel one variance.

    .. math:: a = \log(e^{v - \epsilon} - 1)

    Args:
        channels: static. How many channels the teacher's features have.
        variance: :math:`v`, above the floor. May be traced.
        floor: :math:`\epsilon`, the same as in `vid_loss`. May be traced.
        dtype: static. Of the parameter.

    Returns:
        An array [channels]: put it in the regressor's params tree, so that it is trained.

    Raises:
        TypeError: `channels` is not a static integer; raised while tracing.
        ValueError: a known `variance` is not above a known `floor`.

    Examples:
        >>> jc.distillation.vid_init(2, 1.0).round(4)
        Array([0.5413, 0.5413], dtype=float32)

    Source: Ahn et al. 2019, arXiv:1904.05835; the default from their program.
    """
    _check.integer("vid_init", "channels", channels, 0)
    _check.number("vid_init", "floor", floor, 0.0)
    _check.number("vid_init", "variance", variance, 0.0)
    known = not (_check.is_traced(variance) or _check.is_traced(floor))
    if known and not np.asarray(variance) > np.asarray(floor):
        rule = f"be above the floor, {floor}"
        raise ValueError(_check.message("vid_init", "variance", rule, variance))
    wide = wide_dtype(dtype)
    excess = jnp.asarray(variance, wide) - jnp.asarray(floor, wide)
    # The same as log(expm1(excess)), without overflow.
    raw = excess + jnp.log(-jnp.expm1(-excess))
    return jnp.full(channels, raw.astype(dtype))


def vid_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    raw_variance: ArrayLike,
    floor: ArrayLike = 1e-5,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Negative log-likelihood of a teacher's features around what a student predicts of them.

    .. math:: L = \frac{1}{n} \sum_{p, c} \Bigl[ \log \sigma_c
        + \frac{(t_{pc} - s_{pc})^2}{2 \sigma_c^2} \Bigr], \quad
        \sigma_c^2 = \log(1 + e^{a_c}) + \epsilon

    Args:
        student: :math:`s`, the regressor's prediction [batch, ..., channels], any real float
            dtype.
        teacher: :math:`t`, the same shape, any real float dtype.
        raw_variance: :math:`a`, [channels] or a scalar, real floating point, from `vid_init` at
            first. It is trained: a part of the regressor's params, with a gradient.
        floor: :math:`\epsilon`, the least variance, at least 0. May be traced.
        where: booleans [batch], or [batch, ...] for any number of the axes before the channels:
            what counts. All else is not read.

    Returns:
        One number per row, [batch]: the mean over its :math:`n` entries that count, in nats, less
        the constant :math:`\log \sqrt{2 \pi}`; 0 where there are none. It may be below 0. float64
        if a feature is, otherwise float32 (bfloat16 and float16 are computed in float32). Finite
        for any finite `raw_variance` where the floor is above 0.

    Raises:
        TypeError: the features or `raw_variance` are not real floating point, `where` is not
            boolean; raised while tracing.
        ValueError: the shapes differ: use an adapter; a known `floor` is below 0; `where` does
            not begin the features' shape.

    Cost: one pass.

    Examples:
        >>> raw = jc.distillation.vid_init(2, 1.0)
        >>> jc.distillation.vid_loss(jnp.zeros((1, 2)), jnp.array([[2.0, 0.0]]), raw).round(4)
        Array([1.], dtype=float32)

    Source: Ahn et al. 2019, arXiv:1904.05835. Differs: a mean, as in their
    program, where they have a sum.
    """
    _check.number("vid_loss", "floor", floor, 0.0)
    student, teacher, keep = read("vid_loss", student, teacher, where, ALL)
    variance = _variance(raw_variance, floor, student.shape[-1], student.dtype)
    variance = variance.reshape((1,) * (student.ndim - 1) + variance.shape)
    nats = 0.5 * (jnp.log(variance) + jnp.square(teacher - student) / variance)
    nats = jnp.where(jnp.expand_dims(keep, range(keep.ndim, nats.ndim)), nats, 0.0)
    return jnp.sum(nats, tuple(range(1, nats.ndim))) / counted(keep, nats.shape, nats.dtype)


def _variance(raw, floor, channels, dtype):
    """The variance of each channel, [channels]."""
    rule, got = f"be real floating-point numbers of shape [] or [{channels}]", _check.describe(raw)
    if not hasattr(raw, "dtype") or not jnp.issubdtype(raw.dtype, jnp.floating):
        raise TypeError(_check.message("vid_loss", "raw_variance", rule, got))
    if raw.shape not in ((), (channels,)):
        raise ValueError(_check.message("vid_loss", "raw_variance", rule, got))
    variance = jax.nn.softplus(jnp.asarray(raw).astype(dtype)) + jnp.asarray(floor, dtype)
    return jnp.broadcast_to(variance, (channels,))

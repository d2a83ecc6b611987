"""Logits of mean 0 and variance 1."""

import jax
import jax.numpy as jnp

from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._rows import largest, mask_of, require_logits


def standardize_logits(logits: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Each row of logits less its mean, over its standard deviation.

    .. math:: z_c = (x_c - \mu) / \sigma, \quad \mu = \frac{1}{C} \sum_c x_c, \quad
        \sigma^2 = \frac{1}{C} \sum_c (x_c - \mu)^2

    For use before any loss on logits, on both sides: the student then learns the teacher's
    relations between classes and is free in the size of its logits. Take a temperature of about
    2, as :math:`|z_c| \le \sqrt{C - 1}`, and the labels' loss on the logits as they were.

    Args:
        logits: :math:`x`, shape [..., classes], any real float dtype.
        where: booleans that broadcast to the logits' shape: the :math:`C` classes counted. A
            class whose logit is -inf is not counted either.

    Returns:
        Shape of `logits`, float32, or float64 for float64 (bfloat16 and float16 are computed in
        float32). What is not counted is -inf, which every loss here leaves away as if it had
        been masked. A row that varies by no more than rounding is 0, with zero gradients.

    Raises:
        TypeError: `logits` are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shape of `logits` is (), or that of `where` does not broadcast to it.

    Cost: four reductions over the classes.

    Examples:
        >>> standardize = jc.distillation.standardize_logits
        >>> standardize(jnp.array([1.0, 2.0, 3.0])).round(3)
        Array([-1.225,  0.   ,  1.225], dtype=float32)
        >>> student, teacher = jnp.array([0.1, 0.2, 0.4]), jnp.array([10.0, 20.0, 40.0])
        >>> jc.kd_loss(standardize(student), standardize(teacher), 2.0).round(4)
        Array(0., dtype=float32)

    Source: Sun et al. 2024, arXiv:2403.01427, algorithm 1; the base temperature is the loss's.
    Differs from their code, where the variance is over C - 1 and 1e-7 is added to its root.
    """
    name = "standardize_logits"
    require_logits(name, "logits", logits)
    x = wide(jnp.asarray(logits))
    keep = mask_of(name, where, x.shape)
    counted = keep & (x != -jnp.inf)
    x = jnp.where(counted, x, 0.0)
    info = jnp.finfo(x.dtype)
    size = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), -1, keepdims=True, initial=0.0)
    # To at most 4, by a power of two, so that no difference overflows and none loses digits.
    tiny = size <= jnp.sqrt(info.tiny)
    mantissa, _ = jnp.frexp(size)
    # Multiplied: a division by a quotient is turned by the compiler into one of a product.
    power = jnp.where(tiny, 1.0, 4.0 * mantissa) / jnp.where(tiny, 1.0, size)
    x = x * power
    # From the largest, so that like logits differ by 0 exactly, and their mean does.
    x = jnp.where(counted, x - largest(x, counted), 0.0)
    count = jnp.maximum(jnp.sum(counted, -1, keepdims=True, dtype=x.dtype), 1.0)
    x = jnp.where(counted, x - jnp.sum(x, -1, keepdims=True) / count, 0.0)
    scale = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), -1, keepdims=True, initial=0.0)
    least = jnp.maximum(4 * info.eps * (size * power), jnp.sqrt(info.tiny) * power)
    alike = scale <= least
    x = jnp.where(alike, 0.0, x) / jnp.where(alike, 1.0, scale)
    variance = jnp.sum(jnp.square(x), -1, keepdims=True) / count
    z = x / jnp.sqrt(jnp.where(alike, 1.0, variance))
    return jnp.where(counted, z, -jnp.inf)

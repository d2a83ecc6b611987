"""Losses between the logits of a student and of a teacher, one number per row.

All is done with logarithms of probabilities, see `_rows`.
"""

import jax
import jax.numpy as jnp

from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import kl
from jaxcompress.distillation._rows import read, softmax, surprise


def kd_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Knowledge distillation: how far the student's softened distribution is from the teacher's.

    .. math:: L = T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(t / T) \,\|\,
        \mathrm{softmax}(s / T)\bigr)

    The factor :math:`T^2` keeps the size of the gradient the same at all temperatures, so the
    temperature may be tuned without tuning the loss's weight again. For large T the loss tends
    to half of `mse_logits(student, teacher, centred=True)`.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row (shape
            `student_logits.shape[:-1]`). May be traced: NaN for a traced one that is not
            above 0.
        where: booleans that broadcast to the logits' shape: which classes there are. The
            others have probability zero in both, whatever their logits (NaN too). So has
            a class whose logit is -inf.

    Returns:
        One number per row, at least 0, shape `student_logits.shape[:-1]`; float64 if an
        argument is, otherwise float32 (bfloat16 and float16 are computed in float32). A row
        without classes has loss 0, and zero gradients. It is inf where the teacher has a class
        that the student rules out with -inf; no gradient flows through such a class.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0 or not finite.

    Cost: twelve reductions over the classes (the plain formula has five) and elementwise
    passes, and about as much again for the gradient; no more than a few arrays of the logits'
    shape. Small beside the product that makes the logits.

    Examples:
        >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> jc.kd_loss(student, teacher).round(4)
        Array([0.4621], dtype=float32)
        >>> jc.kd_loss(student, teacher, temperature=100.0).round(4)
        Array([0.5], dtype=float32)
        >>> jax.vmap(jc.kd_loss, (None, None, 0))(student, teacher, jnp.arange(1.0, 5.0)).shape
        (4, 1)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2. Differs: the teacher's entropy,
    a constant for the student, is subtracted, so that equal logits have loss 0. Small losses
    keep their relative accuracy in float32, where the difference of two logarithms loses it.
    Gradients flow to the teacher too, as in Optax; `jc.distill` stops them.
    """
    student, teacher, temperature, keep = read(
        "kd_loss", student_logits, teacher_logits, temperature, where
    )
    return temperature * temperature * kl(student, teacher, temperature, keep)


def kl_divergence(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kullback-Leibler divergence of the student's distribution from the teacher's.

    .. math:: L = \sum_c p_c \log(p_c / q_c), \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        `kd_loss` without its factor :math:`T^2`, in nats; see there for all else.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0 or not finite.

    Cost: that of `kd_loss`.

    Examples:
        >>> kl = jc.distillation.kl_divergence
        >>> kl(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 1.0).round(3)
        Array(0.462, dtype=float32)

    Source: Kullback & Leibler 1951. Differs from `optax.losses.kl_divergence`: logits on both
    sides, a temperature, and a gradient for the teacher that is finite at probability 0.
    """
    student, teacher, temperature, keep = read(
        "kl_divergence", student_logits, teacher_logits, temperature, where
    )
    return kl(student, teacher, temperature, keep)


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross-entropy of the student with the teacher's distribution as its soft labels.

    .. math:: L = -\sum_c p_c \log q_c, \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    It is `kl_divergence` plus the teacher's entropy, so both have the same gradient for the
    student. Multiply by :math:`T^2` yourself to keep the gradient's size across temperatures.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, in nats, at least 0; shape, dtype, masks and infinities as in
        `kd_loss`.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0 or not finite.

    Cost: seven reductions over the classes, and about as much again for the gradient.

    Examples:
        >>> jc.soft_cross_entropy(jnp.zeros((2, 4)), jnp.zeros((2, 4))).round(4)
        Array([1.3863, 1.3863], dtype=float32)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2 (without :math:`T^2`).
    """
    student, teacher, temperature, keep = read(
        "soft_cross_entropy", student_logits, teacher_logits, temperature, where
    )
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    return jnp.sum(surprise(q, p), -1)


def mse_logits(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    where: ArrayLike | None = None,
    centred: bool = False,
) -> jax.Array:
    r"""Mean squared difference of the logits.

    .. math:: L = \frac{1}{C} \sum_c (s_c - t_c)^2

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        where: booleans that broadcast to the logits' shape: the :math:`C` classes counted.
            A class whose logit is -inf in both is not counted either.
        centred: static. First subtracts from each row of logits its mean over the classes
            counted. Half of the result is the limit of `kd_loss` for large temperatures.

    Returns:
        One number per row, at least 0, shape `student_logits.shape[:-1]`; float64 if an
        argument is, otherwise float32 (bfloat16 and float16 are computed in float32). A row
        without classes has loss 0, and zero gradients. It is inf where only one of the two
        logits is -inf; no gradient flows through such a class, and none centres on it.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are ().

    Cost: one reduction over the classes, two if centred.

    Examples:
        >>> jc.mse_logits(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0]))
        Array(2., dtype=float32)
        >>> jc.mse_logits(jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0]), centred=True)
        Array(1., dtype=float32)

    Source: Ba & Caruana 2014, arXiv:1312.6184, section 2.2; Kim et al. 2021,
    arXiv:2105.08919, section 4 (the limit). Differs: a mean, where they have half of a sum.
    """
    student, teacher, _, keep = read("mse_logits", student_logits, teacher_logits, 1.0, where)
    in_student, in_teacher = keep & (student != -jnp.inf), keep & (teacher != -jnp.inf)
    both, either = in_student & in_teacher, in_student | in_teacher
    difference = jnp.where(both, student, 0.0) - jnp.where(both, teacher, 0.0)
    if centred:
        shared = jnp.maximum(jnp.sum(both, -1, keepdims=True, dtype=difference.dtype), 1.0)
        mean = jnp.sum(difference, -1, keepdims=True) / shared
        difference = jnp.where(both, difference - mean, 0.0)
    squares = jnp.where(either & ~both, jnp.inf, jnp.square(difference))
    count = jnp.maximum(jnp.sum(either, -1, dtype=difference.dtype), 1.0)
    return jnp.sum(squares, -1) / count

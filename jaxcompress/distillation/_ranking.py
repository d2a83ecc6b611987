"""Distillation of the order of the classes."""

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._sharding import by_rows
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._rows import read


def ranking_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    sharpness: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How far the student's order of the classes is from the teacher's: a smooth Kendall's tau.

    .. math:: L = 1 - \frac{2}{C (C - 1)} \sum_{i < j}
        \tanh\bigl(k\,(s_i - s_j)(t_i - t_j)\bigr)

    All pairs of classes count alike, also those that the teacher finds improbable, which hardly
    move `kd_loss`. An aid beside such a loss, not in its place: it says nothing of how far apart
    the classes are. For large k it tends to one minus Kendall's rank correlation. With
    `standardize_logits` before it, k does not depend on the size of the logits.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        sharpness: :math:`k > 0`, a scalar, in units of one over a squared logit. May be traced.
        where: booleans that broadcast to the logits' shape: the :math:`C` classes counted. A
            class whose logit is -inf in one of the two is not counted either.

    Returns:
        One number per row, in [0, 2], shape `student_logits.shape[:-1]`; float64 if an argument
        is, otherwise float32 (bfloat16 and float16 are computed in float32). Always finite. A
        pair that is tied in one of the two counts as half wrong. A row of fewer than two classes
        has loss 0, and zero gradients.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean, `sharpness` is
            not a real number; raised while tracing.
        ValueError: the shapes of the logits differ or are (), a known `sharpness` is negative.

    Cost: :math:`C^2` hyperbolic tangents a row, twice that and more with the gradient, where
    they are computed again rather than kept. One array of rows x C x C at most, two if the
    teacher gets a gradient: fine for thousands of classes, not for a vocabulary; there choose the
    teacher's largest first.

    Examples:
        >>> student, teacher = jnp.array([1.0, 2.0, 3.0]), jnp.array([3.0, 2.0, 1.0])
        >>> jc.distillation.ranking_loss(student, teacher, sharpness=10.0)
        Array(2., dtype=float32)
        >>> jc.distillation.ranking_loss(student, 5 * student, sharpness=10.0)
        Array(0., dtype=float32)

    Source: Zheng et al. 2023, arXiv:2307.15317, section 4.2 (the smooth tau, for features); Guan
    et al. 2024, arXiv:2409.17823 (Kendall's tau as a loss on logits, beside others).
    """
    name = "ranking_loss"
    student, teacher, _, keep = read(name, student_logits, teacher_logits, 1.0, where)
    _check.number(name, "sharpness", sharpness, 0.0)
    counted = keep & (student != -jnp.inf) & (teacher != -jnp.inf)
    student, teacher = jnp.where(counted, student, 0.0), jnp.where(counted, teacher, 0.0)
    sharpness = jnp.asarray(sharpness, student.dtype)
    # Pairs of sharded classes have no rule.
    agreement = by_rows(_agreement, student, teacher, sharpness, counted, like=student)
    count = jnp.sum(counted, -1, dtype=student.dtype)
    pairs = count * (count - 1)
    return jnp.where(pairs > 0, 1.0 - agreement / jnp.maximum(pairs, 1.0), 0.0)


@jax.checkpoint
def _agreement(student, teacher, sharpness, counted):
    """The sum over all ordered pairs of classes."""
    pairs = jnp.expand_dims(counted, -1) & jnp.expand_dims(counted, -2)
    product = _differences(student) * _differences(teacher)
    return jnp.sum(jnp.where(pairs, jnp.tanh(sharpness * product), 0.0), (-2, -1))


def _differences(x):
    return jnp.expand_dims(x, -1) - jnp.expand_dims(x, -2)

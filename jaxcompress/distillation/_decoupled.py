"""Losses that part the label's class from the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import kl
from jaxcompress.distillation._labels import checked, target_of
from jaxcompress.distillation._logits import soft_cross_entropy
from jaxcompress.distillation._rows import (
    log_sum,
    read,
    shifted,
    softmax,
    surprise,
)


class DecoupledLoss(NamedTuple):
    """The two parts of `dkd_loss`, one number per row each, before alpha and beta.

    Attributes:
        target: of the label's class against all others (TCKD).
        non_target: among the others (NCKD).
    """

    target: jax.Array
    non_target: jax.Array


def dkd_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Decoupled knowledge distillation: the label's class and all others weighted apart.

    .. math:: L = \alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD}, \quad
        \mathrm{TCKD} = T^2\,\mathrm{KL}\bigl((p_y, 1 - p_y) \,\|\, (q_y, 1 - q_y)\bigr), \quad
        \mathrm{NCKD} = T^2\,\mathrm{KL}(\hat p \,\|\, \hat q)

    with :math:`\hat p, \hat q` the distributions over the classes other than the label y. Plain
    distillation is :math:`\mathrm{TCKD} + (1 - p_y)\,\mathrm{NCKD}`: a sure teacher says almost
    nothing of the other classes there, and as much as any other teacher here.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        labels: :math:`y`, integers of shape `student_logits.shape[:-1]`.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        alpha: :math:`\alpha`, a scalar. May be traced.
        beta: :math:`\beta`, a scalar; 8 is for CIFAR-100, ImageNet took 0.5. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row; shape, dtype, masks and infinities as in `kd_loss`. With two classes
        NCKD is 0. NaN for a row whose label is none of its classes, outside of the range
        (negative too) or masked out; no gradient flows through it. A row without classes has
        loss 0 whatever its label: mask padding out in that way.

    Raises:
        TypeError: the logits are not real floating point, `labels` are not integers, `where` is
            not boolean, `alpha` or `beta` is not a real number; raised while tracing.
        ValueError: the shapes do not fit together, a known `temperature` is not above 0.

    Cost: that of `kd_loss`, and four reductions over the classes.

    Examples:
        >>> student, teacher = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([[9.0, 1.0, 0.0]])
        >>> jc.distillation.dkd_loss(student, teacher, jnp.array([0]), 4.0).round(2)
        Array([5.23], dtype=float32)
        >>> jc.distillation.dkd_parts(student, teacher, jnp.array([0]), 4.0).non_target.round(2)
        Array([0.12], dtype=float32)

    Source: Zhao et al. 2022, arXiv:2203.08679, sections 3.1 and 3.3; :math:`T^2` is of their
    code. Differs: logarithms of sums throughout, so that a student or a teacher that is sure
    gives no infinity, and the label's class is left away, not lowered by 1000.
    """
    name = "dkd_loss"
    _check.number(name, "alpha", alpha)
    _check.number(name, "beta", beta)
    parts, in_order = _parts(name, student_logits, teacher_logits, labels, temperature, where)
    alpha, beta = (jnp.asarray(x, parts.target.dtype) for x in (alpha, beta))
    return checked(_times(alpha, parts.target) + _times(beta, parts.non_target), in_order)


def dkd_parts(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> DecoupledLoss:
    r"""The two parts of `dkd_loss`, to be logged or weighted by the row.

    Args:
        student_logits: as in `dkd_loss`.
        teacher_logits: as in `dkd_loss`.
        labels: as in `dkd_loss`.
        temperature: as in `dkd_loss`.
        where: as in `dkd_loss`.

    Returns:
        A `DecoupledLoss` of TCKD and NCKD, each with its :math:`T^2`.

    Raises:
        TypeError: as `dkd_loss`.
        ValueError: as `dkd_loss`.

    Cost: that of `dkd_loss`.

    Examples:
        >>> student, teacher = jnp.array([2.0, 0.0, 1.0]), jnp.array([3.0, 1.0, 0.0])
        >>> parts = jc.distillation.dkd_parts(student, teacher, jnp.array(0))
        >>> p = jax.nn.softmax(teacher)[0]
        >>> (parts.target + (1 - p) * parts.non_target - jc.kd_loss(student, teacher)).round(5)
        Array(0., dtype=float32)

    Source: Zhao et al. 2022, arXiv:2203.08679, section 3.1.
    """
    name = "dkd_parts"
    parts, in_order = _parts(name, student_logits, teacher_logits, labels, temperature, where)
    return DecoupledLoss(*(checked(part, in_order) for part in parts))


def nkd_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    gamma: ArrayLike = 1.5,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Normalized knowledge distillation: a soft label for the target, a distribution for the rest.

    .. math:: L = -p_y \log q_y - \gamma\,T^2 \sum_{c \neq y} \hat p_c \log \hat q_c

    :math:`p_y` and :math:`q_y` are at temperature 1; :math:`\hat p` and :math:`\hat q` are
    softmaxes over the classes other than the label at temperature T, so that they can be equal
    even where :math:`p_y` and :math:`q_y` are not.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        labels: :math:`y`, integers of shape `student_logits.shape[:-1]`.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        gamma: :math:`\gamma`, a scalar. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, at least 0 and not 0 at equality, as both terms are cross-entropies;
        shape, dtype, masks and infinities as in `soft_cross_entropy`; labels as in `dkd_loss`.
        With two classes the second term is 0.

    Raises:
        TypeError: the logits are not real floating point, `labels` are not integers, `where` is
            not boolean, `gamma` is not a real number; raised while tracing.
        ValueError: the shapes do not fit together, a known `temperature` is not above 0.

    Cost: thirteen reductions over the classes, and about as much again for the gradient.

    Examples:
        >>> student, teacher = jnp.array([2.0, 0.0, 0.0]), jnp.array([9.0, 1.0, 0.0])
        >>> jc.distillation.nkd_loss(student, teacher, jnp.array(0)).round(2)
        Array(1.28, dtype=float32)

    Source: Yang et al. 2023, arXiv:2303.13005, section 3.1 (NKD); the paper adds it to the
    cross-entropy of the labels. Differs from their published code, whose mask keeps the label's
    class among the others.
    """
    name = "nkd_loss"
    _check.number(name, "gamma", gamma)
    student, teacher, temperature, keep = read(
        name, student_logits, teacher_logits, temperature, where
    )
    target, in_order = target_of(name, labels, keep)
    one = jnp.ones((), student.dtype)
    q, p = softmax(student, one, keep), softmax(teacher, one, keep)
    hit = jnp.sum(jnp.where(target, surprise(q, p), 0.0), -1)
    rest = soft_cross_entropy(student, teacher, temperature, where=keep & ~target)
    gamma = jnp.asarray(gamma, student.dtype)
    return checked(hit + _times(gamma * temperature * temperature, rest), in_order)


def _parts(function, student, teacher, labels, temperature, where):
    student, teacher, temperature, keep = read(function, student, teacher, temperature, where)
    target, in_order = target_of(function, labels, keep)
    square, one = temperature * temperature, jnp.ones((), student.dtype)
    ours, theirs = (_against_rest(x, temperature, keep, target) for x in (student, teacher))
    hit = kl(ours, theirs, one, jnp.ones((*keep.shape[:-1], 2), bool))
    return DecoupledLoss(
        square * hit, square * kl(student, teacher, temperature, keep & ~target)
    ), in_order


def _against_rest(logits, temperature, keep, target):
    """Two logits whose softmax is that of the label's class and the sum of the others."""
    present, z = shifted(logits, temperature, keep)
    return jnp.stack([log_sum(z, present & target), log_sum(z, present & ~target)], -1)


def _times(weight, loss):
    """The product, in which a weight of zero leaves even an infinite loss away."""
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0.0, loss)

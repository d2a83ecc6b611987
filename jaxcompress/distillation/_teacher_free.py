"""Soft labels without a teacher, from the label alone."""

import jax
import jax.numpy as jnp

from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import kl
from jaxcompress.distillation._labels import checked, target_of
from jaxcompress.distillation._rows import mask_of, read, require_logits, share, softmax


def smoothed_cross_entropy(
    student_logits: ArrayLike,
    labels: ArrayLike,
    smoothing: ArrayLike = 0.1,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross-entropy with integer labels, smoothed: a teacher that is sure but never certain.

    .. math:: L = -(1 - \varepsilon) \log q_y - \frac{\varepsilon}{C} \sum_c \log q_c, \quad
        q = \mathrm{softmax}(s)

    With :math:`\varepsilon = 0` it is the plain loss of the labels, the other half of distillation:
    `(1 - w) * smoothed_cross_entropy(s, labels, 0.0) + w * jc.kd_loss(s, t, temperature)`.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        labels: :math:`y`, integers of shape `student_logits.shape[:-1]`.
        smoothing: :math:`\varepsilon` in [0, 1], both ends included; a scalar. May be traced:
            NaN for a traced one outside.
        where: booleans that broadcast to the logits' shape: the :math:`C` classes that there
            are. A class whose logit is -inf is not counted either.

    Returns:
        One number per row, in nats, at least 0, shape `student_logits.shape[:-1]`; float64 for
        float64 logits, otherwise float32 (bfloat16 and float16 are computed in float32). It is
        inf where the label's logit is -inf, unless all are, or :math:`\varepsilon = 1`. NaN for a
        row whose label is none of its classes, outside of the range (negative too) or masked
        out; no gradient flows through it. A row without classes has loss 0 whatever its label:
        mask padding out in that way.

    Raises:
        TypeError: the logits are not real floating point, `labels` are not integers, `where` is
            not boolean, `smoothing` is not a real number; raised while tracing.
        ValueError: the shapes do not fit together, a known `smoothing` is outside of [0, 1].

    Cost: five reductions over the classes, and about as much again for the gradient.

    Examples:
        >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
        >>> jc.distillation.smoothed_cross_entropy(logits, labels).round(4)
        Array([0.2269, 2.0269], dtype=float32)
        >>> jc.distillation.smoothed_cross_entropy(logits, labels, 0.0).round(4)
        Array([0.1269, 2.1269], dtype=float32)

    Source: Szegedy et al. 2015, arXiv:1512.00567, section 7. The same as Optax's
    `softmax_cross_entropy` of `smooth_labels` of one-hot labels, but with classes that can be
    masked, logits that can be -inf, and no one-hot labels to make.
    """
    name = "smoothed_cross_entropy"
    student, keep = _read(name, student_logits, where)
    smoothing = share(name, "smoothing", smoothing, student.dtype)
    target, in_order = target_of(name, labels, keep)
    q = softmax(student, jnp.ones((), student.dtype), keep)
    count = jnp.sum(q.present, -1, dtype=student.dtype)
    hit = -jnp.sum(jnp.where(target, q.logs, 0.0), -1)
    mean = -jnp.sum(q.logs, -1) / jnp.maximum(count, 1.0)
    loss = (1 - smoothing) * hit + smoothing * mean
    lost = jnp.any(target & ~q.present, -1) & (count > 0) & (smoothing < 1)
    return checked(jnp.where(lost, jnp.inf, loss), in_order)


def teacher_free_loss(
    student_logits: ArrayLike,
    labels: ArrayLike,
    temperature: ArrayLike = 20.0,
    *,
    correct: ArrayLike = 0.99,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Distillation from a virtual teacher, which is right with a given probability.

    .. math:: L = T^2\,\mathrm{KL}\bigl(\mathrm{softmax}(\log p / T) \,\|\,
        \mathrm{softmax}(s / T)\bigr), \quad
        p_y = a, \quad p_c = \frac{1 - a}{C - 1} \text{ for } c \neq y

    A regularizer beside the labels' loss, `smoothed_cross_entropy(s, labels, 0.0)`. Unlike label
    smoothing it softens the student too, and its teacher can be nearly certain.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        labels: :math:`y`, integers of shape `student_logits.shape[:-1]`.
        temperature: :math:`T > 0`, a scalar or one number per row; the paper takes 20 and more.
            May be traced: NaN for a traced one that is not above 0.
        correct: :math:`a` in [0, 1], both ends included; a scalar. May be traced: NaN for a traced
            one outside. No gradient flows to it at the ends.
        where: booleans that broadcast to the logits' shape: the :math:`C` classes that there
            are. A class whose logit is -inf is not counted either.

    Returns:
        One number per row, at least 0, shape, dtype, masks and labels as in
        `smoothed_cross_entropy`. It is inf where the label's logit is -inf, unless all are, or
        :math:`a = 0`. A single class costs nothing.

    Raises:
        TypeError: the logits are not real floating point, `labels` are not integers, `where` is
            not boolean, `correct` is not a real number; raised while tracing.
        ValueError: the shapes do not fit together, a known `temperature` is not above 0, a known
            `correct` is outside of [0, 1].

    Cost: that of `kd_loss`.

    Examples:
        >>> logits, labels = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), jnp.array([0, 0])
        >>> jc.distillation.teacher_free_loss(logits, labels).round(2)
        Array([1.28, 4.94], dtype=float32)

    Source: Yuan et al. 2019, arXiv:1909.11723, section 4.2 (Tf-KD_reg). Differs: :math:`T^2`, as
    in all distillation here, and the teacher is softened as a distribution, by its logarithms;
    their code takes the softmax of p itself over T, which is all but uniform, and leaves the
    student's logits as they are.
    """
    name = "teacher_free_loss"
    student, _, temperature, keep = read(name, student_logits, student_logits, temperature, where)
    correct = share(name, "correct", correct, student.dtype)
    target, in_order = target_of(name, labels, keep)
    present = keep & (student != -jnp.inf)
    some = jnp.any(present, -1, keepdims=True)
    right, wrong = _log(correct), _log(1 - correct)
    others = jnp.sum(present & ~target, -1, keepdims=True, dtype=student.dtype)
    wrong = wrong - jnp.log(jnp.maximum(others, 1.0))
    teacher = jnp.where(target & some, right, jnp.where(present, wrong, -jnp.inf))
    # Where the label is all there is, its probability is 1, be it even called 0.
    teacher = jnp.where(target & (others == 0), 0.0, teacher)
    teacher = jnp.where(some, teacher, -jnp.inf)
    loss = temperature * temperature * kl(student, teacher, temperature, keep)
    return checked(jnp.where(jnp.isnan(correct), jnp.nan, loss), in_order)


def _read(function, logits, where):
    require_logits(function, "student_logits", logits)
    keep = mask_of(function, where, logits.shape)
    return wide(logits), keep


def _log(x):
    """The logarithm, -inf at 0 with no gradient there."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)

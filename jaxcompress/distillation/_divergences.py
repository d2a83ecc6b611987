"""Other divergences than the teacher's from the student's, one number per row, in nats."""

import jax
import jax.numpy as jnp

from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import NEAR, kl, log_ratio
from jaxcompress.distillation._mixtures import jensen, skewed
from jaxcompress.distillation._rows import read, share, softmax


def reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kullback-Leibler divergence of the teacher's distribution from the student's.

    .. math:: L = \sum_c q_c \log(q_c / p_c), \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    It makes the student keep away from what the teacher finds improbable ("mode seeking"),
    where `kl_divergence` makes it cover all that the teacher finds probable. Multiply by
    :math:`T^2` to keep the gradient's size across temperatures.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, at least 0, in nats; shape, dtype and masks as in `kd_loss`. It is
        inf where the student has a class that the teacher rules out with -inf: mask such
        classes in both, with `where`. No gradient flows through such a class.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0.

    Cost: that of `kd_loss`.

    Examples:
        >>> student, teacher = jnp.array([4.0, 0.0, 0.0]), jnp.array([4.0, 4.0, 0.0])
        >>> f"{jc.distillation.reverse_kl(student, teacher):.3f}"
        '0.596'
        >>> f"{jc.distillation.kl_divergence(student, teacher):.3f}"
        '1.316'

    Source: Gu et al. 2023, arXiv:2306.08543, section 2.1, for one token and exactly, where they
    estimate it over sequences by policy gradients.
    """
    student, teacher, temperature, keep = read(
        "reverse_kl", student_logits, teacher_logits, temperature, where
    )
    return kl(teacher, student, temperature, keep)


def jensen_shannon(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    beta: ArrayLike = 0.5,
    normalized: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Generalized Jensen-Shannon divergence: both distributions from their mixture.

    .. math:: L = \beta\,\mathrm{KL}(p \,\|\, m) + (1 - \beta)\,\mathrm{KL}(q \,\|\, m), \quad
        m = \beta p + (1 - \beta) q, \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    At most :math:`H(\beta) = -\beta\log\beta - (1 - \beta)\log(1 - \beta)`, however far the rows
    are apart, and symmetric for :math:`\beta = 1/2`. It vanishes at both ends. Divided by
    :math:`\beta (1 - \beta)` it is continuous from :math:`\mathrm{KL}(p\,\|\,q)`
    (`kl_divergence`) at 0 to :math:`\mathrm{KL}(q\,\|\,p)` (`reverse_kl`) at 1, so that one
    sweep over :math:`\beta` compares both and all between.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        beta: :math:`\beta` in [0, 1], both ends included; a scalar. May be traced.
        normalized: static. Divides by :math:`\beta (1 - \beta)`, with the limits at the ends.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, at least 0, in nats; shape, dtype and masks as in `kd_loss`. Finite
        too where only one of the two rules out a class with -inf, but for `normalized` at the
        end where the Kullback-Leibler divergence is not. NaN for a traced `beta` outside of
        [0, 1].

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean, `beta` is not
            a real number; raised while tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0, a known `beta` is outside of [0, 1].

    Cost: a little more than `kd_loss`.

    Examples:
        >>> student, teacher = jnp.array([5.0, 0.0]), jnp.array([0.0, 5.0])
        >>> f"{jc.distillation.jensen_shannon(student, teacher):.3f}"
        '0.653'
        >>> sweep = lambda b: jc.distillation.jensen_shannon(
        ...     student, teacher, beta=b, normalized=True
        ... )
        >>> [f"{loss:.3f}" for loss in jax.vmap(sweep)(jnp.linspace(0.0, 1.0, 3))]
        ['4.933', '2.612', '4.933']

    Source: Agarwal et al. 2023, arXiv:2306.13649, section 2 (GKD), with their :math:`\beta`.
    Differs: nothing is a special case at the ends, where trainers that replace the divergence
    by the Kullback-Leibler one jump. Small losses keep their relative accuracy.
    """
    name = "jensen_shannon"
    student, teacher, temperature, keep = read(
        name, student_logits, teacher_logits, temperature, where
    )
    beta = share(name, "beta", beta, student.dtype)
    return jensen(student, teacher, temperature, keep, beta, normalized)


def skewed_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    alpha: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Kullback-Leibler divergence of a student mixed with a little of the teacher.

    .. math:: L = \mathrm{KL}\bigl(p \,\|\, \alpha p + (1 - \alpha) q\bigr), \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    Never above :math:`-\log\alpha`: a class that the student has forgotten costs, and pulls,
    only so much. With :math:`\alpha = 0` it is `kl_divergence`.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        alpha: :math:`\alpha` in [0, 1], the teacher's share; a scalar. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, at least 0, in nats; shape, dtype and masks as in `kd_loss`. Where
        the student rules out a class with -inf it is inf for :math:`\alpha = 0` only. NaN for a
        traced `alpha` outside of [0, 1].

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean, `alpha` is
            not a real number; raised while tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0, a known `alpha` is outside of [0, 1].

    Cost: that of `kd_loss`.

    Examples:
        >>> student, teacher = jnp.array([0.0, 1e4]), jnp.array([1e4, 0.0])
        >>> f"{jc.distillation.skewed_kl(student, teacher):.4f}", f"{-np.log(0.1):.4f}"
        ('2.3026', '2.3026')

    Source: Ko et al. 2024, arXiv:2402.03898, section 3.1 (DistiLLM). Differs: the teacher's
    entropy, a constant for the student that their code leaves away, is subtracted, so that equal
    rows cost nothing.
    """
    student, teacher, temperature, keep, alpha = _read_skewed(
        "skewed_kl", student_logits, teacher_logits, temperature, alpha, where
    )
    return skewed(student, teacher, temperature, keep, alpha)


def skewed_reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    alpha: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reverse Kullback-Leibler divergence of a teacher mixed with a little of the student.

    .. math:: L = \mathrm{KL}\bigl(q \,\|\, (1 - \alpha) p + \alpha q\bigr), \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    `skewed_kl` with the roles exchanged; with :math:`\alpha = 0` it is `reverse_kl`.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        alpha: :math:`\alpha` in [0, 1], the student's share; a scalar. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, at least 0 and at most :math:`-\log\alpha`, in nats; shape, dtype
        and masks as in `kd_loss`. Where the teacher rules out a class with -inf it is inf for
        :math:`\alpha = 0` only. NaN for a traced `alpha` outside of [0, 1].

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean, `alpha` is
            not a real number; raised while tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0, a known `alpha` is outside of [0, 1].

    Cost: that of `kd_loss`.

    Examples:
        >>> student, teacher = jnp.array([0.0, 1.0]), jnp.array([0.0, -jnp.inf])
        >>> jc.distillation.skewed_reverse_kl(student, teacher).round(2)
        Array(1.35, dtype=float32)

    Source: Ko et al. 2024, arXiv:2402.03898, section 3.1 (DistiLLM).
    """
    student, teacher, temperature, keep, alpha = _read_skewed(
        "skewed_reverse_kl", student_logits, teacher_logits, temperature, alpha, where
    )
    return skewed(teacher, student, temperature, keep, alpha)


def total_variation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Total variation: the mass that must be moved to make one distribution the other.

    .. math:: L = \tfrac{1}{2} \sum_c |p_c - q_c|, \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    At most :math:`\sqrt{\mathrm{KL} / 2}` of either Kullback-Leibler divergence. Symmetric. Its
    gradient does not vanish near the minimum, and does where the rows are far apart.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are.

    Returns:
        One number per row, in [0, 1]; shape, dtype and masks as in `kd_loss`. Always finite:
        a class that only one of the two rules out with -inf counts with the other's
        probability. Where :math:`p_c = q_c` the gradient is that of 0.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0.

    Cost: that of `kd_loss`.

    Examples:
        >>> student, teacher = jnp.array([0.0, 1e4]), jnp.array([0.0, 0.0])
        >>> jc.distillation.total_variation(student, teacher)
        Array(0.5, dtype=float32)

    Source: Wen et al. 2023, arXiv:2307.15190, section 3 (their step-wise loss, for one token).
    """
    student, teacher, temperature, keep = read(
        "total_variation", student_logits, teacher_logits, temperature, where
    )
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    ratio = log_ratio(q, p, student, teacher, temperature)
    # Between like rows the difference of two probabilities loses digits, their ratio does not.
    near = p.present & q.present & (jnp.abs(ratio) <= NEAR)
    fine = p.probabilities * jnp.expm1(jnp.where(near, ratio, 0.0))
    difference = jnp.where(near, fine, q.probabilities - p.probabilities)
    return 0.5 * jnp.sum(jnp.abs(difference), -1)


def _read_skewed(function, student, teacher, temperature, alpha, where):
    student, teacher, temperature, keep = read(function, student, teacher, temperature, where)
    return student, teacher, temperature, keep, share(function, "alpha", alpha, student.dtype)

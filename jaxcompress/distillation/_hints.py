"""Losses between the features of a student and of a teacher themselves, one number per row."""

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import ALL, POSITIONS, counted, read, rescaled, unit


def hint_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Mean squared difference of a student's features from a teacher's, its hint.

    .. math:: L = \frac{1}{n} \sum_i (s_i - t_i)^2

    Args:
        student: :math:`s`, features [batch, ..., channels] after the student's regressor, any
            real float dtype.
        teacher: :math:`t`, the same shape, any real float dtype.
        where: booleans [batch], or [batch, ...] for any number of the axes before the channels:
            what counts (not the padding). All else is not read: it may be NaN.

    Returns:
        One number per row, [batch]: the mean over the :math:`n` entries of the row that count,
        0 where there are none; float64 if an argument is, otherwise float32 (bfloat16 and
        float16 are computed in float32).

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the shapes differ: use an adapter; `where` does not begin that shape.

    Cost: one pass.

    Examples:
        >>> jc.distillation.hint_loss(jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 1.0]]))
        Array([2.5], dtype=float32)
        >>> opt = jc.distill(  # on features instead of logits
        ...     lambda params, x: x @ params["w"],
        ...     lambda x: 2.0 * x,
        ...     loss=lambda s, t, _: jc.distillation.hint_loss(s, t),
        ... )

    Source: Romero et al. 2015, arXiv:1412.6550, equation 3. Differs: a mean, where they have
    half of a sum. Gradients flow to the teacher too; `jc.distill` stops them.
    """
    student, teacher, keep = read("hint_loss", student, teacher, where, ALL)
    squares = jnp.sum(jnp.square(student - teacher), tuple(range(1, student.ndim)))
    return squares / counted(keep, student.shape, student.dtype)


def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    power: ArrayLike = 2.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently a student and a teacher spread their activity over the positions.

    .. math:: L = \Bigl\| \frac{q^s}{\|q^s\|_2} - \frac{q^t}{\|q^t\|_2} \Bigr\|_2^2, \quad
        q_i = \sum_c |x_{ic}|^p

    Args:
        student: features [batch, positions..., channels], any real float dtype.
        teacher: the same batch and positions, any number of channels.
        power: :math:`p`, at least 0; larger ones look at the strongest channels alone. May be
            traced.
        where: booleans [batch], or [batch, ...] for any number of the axes before the channels:
            what counts. All else is not read, and has no activity.

    Returns:
        One number per row, [batch], in [0, 2] (1 where just one of the two maps is zero, 0
        where both are); dtype as in `hint_loss`. A map of zeros gets no gradient.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: batch or positions differ: use an adapter; there is no axis of positions;
            a known `power` is below 0; `where` does not begin the features' shape.

    Cost: a few passes.

    Examples:
        >>> student, teacher = jnp.eye(2)[None], jnp.array([[[3.0], [0.0]]])
        >>> jc.distillation.attention_transfer(student, teacher).round(4)
        Array([0.5858], dtype=float32)

    Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, section 3.1. Differs: the square of
    their norm, smooth where the maps agree; their program divides it by the positions.
    """
    _check.number("attention_transfer", "power", power, 0.0)
    student, teacher, _ = read("attention_transfer", student, teacher, where, POSITIONS, 3)
    power = jnp.asarray(power, student.dtype)
    difference = _attention(student, power) - _attention(teacher, power)
    return jnp.sum(jnp.square(difference), tuple(range(1, difference.ndim)))


def _attention(x: jax.Array, power: jax.Array) -> jax.Array:
    """The activity at each position, of length 1 in each row."""
    # Scaled first, so that no power overflows; the length takes the scale away again.
    size = jnp.abs(rescaled(x, tuple(range(1, x.ndim))))
    none = size == 0
    powers = jnp.where(none, 0.0, jnp.power(jnp.where(none, 1.0, size), power))
    return unit(jnp.sum(powers, -1), tuple(range(1, x.ndim - 1)))

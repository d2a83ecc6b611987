"""Distillation by correlation: of the classes of a row, and of the rows for a class."""

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._rows import read, softmax


def dist_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    beta: ArrayLike = 1.0,
    gamma: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""DIST: probabilities that go up and down together, over classes and over examples.

    .. math:: L_b = T^2 \Bigl[\beta\,\bigl(1 - \rho(q_{b,:}, p_{b,:})\bigr) +
        \frac{\gamma}{C} \sum_c \bigl(1 - \rho(q_{:,c}, p_{:,c})\bigr)\Bigr], \quad
        p = \mathrm{softmax}(t / T), \quad q = \mathrm{softmax}(s / T)

    with :math:`\rho` Pearson's correlation. It asks for the teacher's preferences only, not for
    its probabilities, and so leaves a small student more room than `kd_loss`. The first term is
    of each row; the second is of the batch, all leading axes together, and the same for all its
    rows, so that the mean over the rows is the paper's loss. Hand it the batch: under `vmap` over
    rows the second term is a constant.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher_logits: :math:`t`, the same shape, any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced.
        beta: :math:`\beta`, of the rows; a scalar. May be traced.
        gamma: :math:`\gamma`, of the columns; a scalar. May be traced.
        where: booleans that broadcast to the logits' shape: which classes there are. What is
            masked out counts neither in its row nor in its column, as padded rows do not.

    Returns:
        One number per row, at least 0, shape `student_logits.shape[:-1]`; float64 if an
        argument is, otherwise float32 (bfloat16 and float16 are computed in float32). Always
        finite: a class that one of the two rules out with -inf has probability 0 there; one that
        both rule out counts as masked. A row or column that does not vary, in the student or in
        the teacher (a single class, a single row), has correlation 0 and zero gradients. A row
        without classes has loss 0, and zero gradients.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean, `beta` or
            `gamma` is not a real number; raised while tracing.
        ValueError: the shapes of the logits differ or are (), a known `temperature` is not
            above 0.

    Cost: ten reductions over the classes, six over the rows, and about as much again for the
    gradient. On rows sharded over devices the second term is a few sums over the devices.

    Examples:
        >>> student = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> jc.distillation.dist_loss(student, student).round(4)
        Array([0., 0.], dtype=float32)
        >>> jc.distillation.dist_loss(student, -student, gamma=0.0).round(2)
        Array([1.87, 1.81], dtype=float32)

    Source: Huang et al. 2022, arXiv:2205.10536, section 3.2; :math:`T^2` is of their code.
    Differs: no 1e-8 in the denominator, which there drowns the columns of large vocabularies;
    what varies by no more than rounding counts as constant instead. Losses near 0 keep their
    digits, as squares of differences.
    """
    name = "dist_loss"
    student, teacher, temperature, keep = read(
        name, student_logits, teacher_logits, temperature, where
    )
    _check.number(name, "beta", beta)
    _check.number(name, "gamma", gamma)
    beta, gamma = (jnp.asarray(x, student.dtype) for x in (beta, gamma))
    q, p = softmax(student, temperature, keep), softmax(teacher, temperature, keep)
    counted = q.present | p.present
    batch = tuple(range(counted.ndim - 1))
    rows = _distance(q, p, counted, -1)
    columns, used = _distance(q, p, counted, batch), jnp.any(counted, batch)
    columns = jnp.sum(columns) / jnp.maximum(jnp.sum(used, dtype=columns.dtype), 1.0)
    loss = temperature * temperature * (beta * rows + gamma * columns)
    return jnp.where(jnp.any(counted, -1), loss, 0.0)


def _distance(q, p, counted, axis):
    """One minus Pearson's correlation along the axis, 1 if one of the two is constant."""
    x, y = _unit(q, counted, axis), _unit(p, counted, axis)
    vary = jnp.any(x != 0, axis) & jnp.any(y != 0, axis)
    distance = 0.5 * jnp.sum(jnp.square(x - y), axis)
    return jnp.where(vary, distance, jnp.where(jnp.any(counted, axis), 1.0, 0.0))


def _unit(row, counted, axis):
    """The probabilities less their mean, of length 1; 0 if they are all alike.

    Over the largest of them, from the logarithms: no column is too improbable to be seen.
    """
    logs = jax.lax.stop_gradient(jnp.where(row.present, row.logs, -jnp.inf))
    top = jnp.max(logs, axis, keepdims=True, initial=-jnp.inf)
    below = jnp.where(row.present, row.logs - jnp.where(top == -jnp.inf, 0.0, top), 0.0)
    x = jnp.where(counted, jnp.where(row.present, jnp.expm1(below), -1.0), 0.0)
    count = jnp.maximum(jnp.sum(counted, axis, keepdims=True, dtype=x.dtype), 1.0)
    x = jnp.where(counted, x - jnp.sum(x, axis, keepdims=True) / count, 0.0)
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    alike = squares <= count * (4 * jnp.finfo(x.dtype).eps) ** 2
    return jnp.where(alike, 0.0, x) / jnp.sqrt(jnp.where(alike, 1.0, squares))

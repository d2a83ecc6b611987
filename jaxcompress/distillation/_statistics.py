"""Losses on statistics of feature maps over their positions, one number per row."""

import functools
import math

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import (
    POSITIONS,
    ROWS_AND_CHANNELS,
    check,
    counted,
    mask_of,
    masked,
    read,
    require,
    unit,
)


def nst_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    constant: ArrayLike = 0.0,
    *,
    degree: int = 2,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently the channels of a student and of a teacher choose positions.

    The squared maximum mean discrepancy of the two sets of channels, each a vector
    :math:`f` over the positions, of length 1:

    .. math:: L = \frac{1}{m^2} \sum_{i, i'} k(f^t_i, f^t_{i'})
        + \frac{1}{n^2} \sum_{j, j'} k(f^s_j, f^s_{j'})
        - \frac{2}{m n} \sum_{i, j} k(f^t_i, f^s_j), \quad
        k(x, y) = (x^\top y + c)^d

    Args:
        student: features [batch, positions..., channels], any real float dtype.
        teacher: the same batch and positions, any number of channels.
        constant: :math:`c`, at least 0. May be traced.
        degree: static. :math:`d`, an integer of at least 1; 1 compares the mean maps.
        where: booleans [batch], or [batch, ...] for any number of the axes before the channels:
            what counts. All else is not read, and is like a position without activity.

    Returns:
        One number per row, [batch], at least 0 up to rounding; float64 if an argument is,
        otherwise float32 (bfloat16 and float16 are computed in float32). A channel of zeros has
        kernels :math:`c^d`, and no gradient.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean, `degree` is
            not a static integer; raised while tracing.
        ValueError: batch or positions differ: use an adapter; there is no axis of positions;
            `degree` or a known `constant` is too small; `where` does not begin the features'
            shape.

    Cost: products of channels by channels in each row, three times.

    Examples:
        >>> maps = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
        >>> jc.distillation.nst_loss(maps, 3.0 * maps[..., ::-1]), (
        ...     jc.distillation.nst_loss(maps, maps[..., :1]))
        (Array([0.], dtype=float32), Array([0.5], dtype=float32))

    Source: Huang & Wang 2017, arXiv:1707.01219, section 4. Differs: their loss has half of it.
    """
    _check.integer("nst_loss", "degree", degree, 1)
    _check.number("nst_loss", "constant", constant, 0.0)
    student, teacher, _ = read("nst_loss", student, teacher, where, POSITIONS, 3)
    constant = jnp.asarray(constant, student.dtype)
    discrepancy = functools.partial(_discrepancy, degree=int(degree))
    return automatic(discrepancy, student, teacher, constant, like_first=False)


def fsp_loss(
    student: tuple[ArrayLike, ArrayLike],
    teacher: tuple[ArrayLike, ArrayLike],
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently a student's and a teacher's features flow from one layer to another.

    .. math:: L = \bigl\| G^s - G^t \bigr\|_F^2, \quad
        G_{ij} = \frac{1}{n} \sum_p x_{pi}\, y_{pj}

    with x the first layer's features, y the second's and n the number of positions.

    Args:
        student: the features (x, y) of two layers, each [batch, positions..., channels], any
            real float dtype. Both have the same positions: pool the larger one.
        teacher: the teacher's, with as many channels; its positions may differ.
        where: booleans [batch], or [batch, ...] for leading axes that all four have: what counts.
            All else is not read.

    Returns:
        One number per row, [batch], at least 0; float64 if an argument is, otherwise float32
        (bfloat16 and float16 are computed in float32). 0 where nothing counts.

    Raises:
        TypeError: an argument is not a pair, the features are not real floating point, `where` is
            not boolean; raised while tracing.
        ValueError: the positions of two layers or the channels of the two models differ; there
            is no axis of positions; `where` does not begin the features' shape.

    Cost: a product of channels by channels in each row, for each model.

    Examples:
        >>> x = jnp.ones((1, 4, 2))
        >>> jc.distillation.fsp_loss((x, x), (x, 2.0 * x))
        Array([4.], dtype=float32)

    Source: Yim, Joo, Bae & Kim 2017, A Gift from Knowledge Distillation (CVPR), equations 1
    and 2; for more pairs of layers, sum with weights of your own.
    """
    for name, pair in {"student": student, "teacher": teacher}.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            rule, got = "be the features (first, second) of two layers", _check.describe(pair)
            raise TypeError(_check.message("fsp_loss", name, rule, got))
        for features in pair:
            check("fsp_loss", name, features, 3)
        require("fsp_loss", name, pair[1], POSITIONS, "the first layer's", pair[0])
    for ours, theirs in zip(student, teacher, strict=True):
        require("fsp_loss", "teacher", theirs, ROWS_AND_CHANNELS, "the student's", ours)
    layers = [jnp.asarray(x) for x in (*student, *teacher)]
    double = any(x.dtype == jnp.float64 for x in layers)
    dtype = jnp.float64 if double else jnp.float32
    keep = mask_of("fsp_loss", where, *(x.shape for x in layers))
    layers = [masked(x.astype(dtype), keep) for x in layers]
    return automatic(_flows, *layers, keep, like_first=False)


def ickd_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    normalized: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently a student's and a teacher's channels correlate.

    .. math:: L = \frac{1}{c^2} \bigl\| G^s - G^t \bigr\|_F^2, \quad
        G_{ij} = \sum_p x_{pi}\, x_{pj}

    Args:
        student: features [batch, positions..., channels] with c channels, after the student's
            regressor, any real float dtype.
        teacher: the same batch and channels; the positions may differ.
        normalized: static. Divides each row of :math:`G` by its length, and the square by c
            instead of :math:`c^2`: it does not depend on the scale of the features then.
        where: booleans [batch], or [batch, ...] for leading axes that both have: what counts. All
            else is not read.

    Returns:
        One number per row, [batch], at least 0; float64 if an argument is, otherwise float32
        (bfloat16 and float16 are computed in float32). 0 where nothing counts. Where normalized,
        a channel of zeros has correlations 0, and no gradient from its own row of G.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: batch or channels differ: use an adapter; there is no axis of positions;
            `where` does not begin the features' shape.

    Cost: a product of channels by channels in each row, for each model.

    Examples:
        >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
        >>> jc.distillation.ickd_loss(x, 2.0 * x)
        Array([4.5], dtype=float32)
        >>> jc.distillation.ickd_loss(x, 2.0 * x, normalized=True)
        Array([0.], dtype=float32)

    Source: Liu et al. 2021, arXiv:2202.03680, section 3; normalized as in their program.
    """
    student, teacher, _ = read("ickd_loss", student, teacher, where, ROWS_AND_CHANNELS, 3)
    correlations = functools.partial(_correlations, normalized=normalized)
    return automatic(correlations, student, teacher, like_first=False)


def _discrepancy(student, teacher, constant, *, degree):
    maps = [unit(_positions(x), 1) for x in (student, teacher)]

    def kernel(a, b):
        values = (product(jnp.swapaxes(a, 1, 2), b) + constant) ** degree
        return jnp.sum(values, (1, 2)) / max(a.shape[2] * b.shape[2], 1)

    student, teacher = maps
    both = kernel(student, teacher)
    return kernel(teacher, teacher) + kernel(student, student) - 2.0 * both


def _flows(student_first, student_second, teacher_first, teacher_second, keep):
    def flow(first, second):
        total = product(jnp.swapaxes(_positions(first), 1, 2), _positions(second))
        count = counted(keep, first.shape[:-1], first.dtype)
        return total / count[:, None, None]

    difference = flow(student_first, student_second) - flow(teacher_first, teacher_second)
    return jnp.sum(jnp.square(difference), (1, 2))


def _correlations(student, teacher, *, normalized):
    def gram(x):
        x = _positions(x)
        gram = product(jnp.swapaxes(x, 1, 2), x)
        return unit(gram) if normalized else gram

    channels = max(student.shape[-1], 1)
    total = jnp.sum(jnp.square(gram(student) - gram(teacher)), (1, 2))
    return total / (channels if normalized else channels * channels)


def _positions(x):
    """[batch, positions, channels]"""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])

"""Centred kernel alignment: how alike two models' features are, up to rotation and scale."""

import functools

import jax
import jax.numpy as jnp

from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import ROWS, flat, read, rescaled, root, rows_of


def cka(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    unbiased: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Linear centred kernel alignment of a student's and a teacher's features.

    .. math:: \mathrm{CKA} = \frac{\langle K, L \rangle_F}{\|K\|_F \|L\|_F}, \quad
        K = H X X^\top H, \quad L = H Y Y^\top H, \quad H = I - \tfrac{1}{b} 1 1^\top

    It does not change when either side is rotated, shifted or scaled, so widths may differ and no
    regressor is needed.

    Args:
        student: features [batch, ...], read as one vector :math:`X_{i:}` per row, any real float
            dtype.
        teacher: :math:`Y`, the same batch; all other axes may differ.
        unbiased: static. Takes the unbiased estimates of the three products (the diagonals of the
            Gram matrices left away), which a small batch with wide features needs: the plain
            ones tend to 1 there. It may be below 0, and needs four rows.
        where: booleans [batch]: the b rows that count. The others are not read: they may be
            NaN. Booleans [batch, ...] for leading axes that both have leave positions away, as
            zeros; rows without any position do not count.

    Returns:
        A scalar in [0, 1] up to rounding ([-1, 1] where unbiased); float64 if an argument is,
        otherwise float32 (bfloat16 and float16 are computed in float32). 0, with zero
        gradients, where the features of one side are the same in all rows, and with fewer than
        two rows (four where unbiased).

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; `where` does not begin the features' shape.

    Cost: two products [b, width] x [width, b]; where b is above both widths, three of widths by
    widths instead (not where unbiased).

    Examples:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> jc.distillation.cka(x, 3.0 * x[:, ::-1] + 1.0).round(4)
        Array(1., dtype=float32)

    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3; unbiased: Nguyen et al. 2021,
    arXiv:2010.15327, after Song et al. 2012.
    """
    similarity, _ = _cka("cka", student, teacher, unbiased, where)
    return similarity


def cka_loss(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    unbiased: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""One less the alignment of a student's features with a teacher's: :math:`1 - \mathrm{CKA}`.

    Args:
        student: features [batch, ...], read as one vector per row, any real float dtype.
        teacher: the same batch; all other axes may differ.
        unbiased: static; as in `cka`.
        where: booleans [batch] or more leading axes: what counts, as in `cka`.

    Returns:
        A scalar in [0, 1] up to rounding ([0, 2] where unbiased), a ratio of sums over pairs of
        rows, so no row has a share of its own; dtype as in `cka`. 0 with fewer than two rows
        (four where unbiased), and 1 where the features of one side are the same in all rows,
        with zero gradients.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; `where` does not begin the features' shape.

    Cost: that of `cka`.

    Examples:
        >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
        >>> jc.distillation.cka_loss(x, x[:, :1]).round(4)
        Array(0.2094, dtype=float32)

    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3.
    """
    similarity, enough = _cka("cka_loss", student, teacher, unbiased, where)
    return jnp.where(enough, 1.0 - similarity, 0.0)


def _cka(function, student, teacher, unbiased, where):
    """The alignment, and whether there are rows enough to speak of one."""
    student, teacher, keep = read(function, student, teacher, where, ROWS)
    align = functools.partial(_align, unbiased=unbiased)
    return automatic(align, student, teacher, rows_of(keep), like_first=False)


def _align(student, teacher, rows, *, unbiased):
    x, y = _centred(student, rows), _centred(teacher, rows)
    count = jnp.sum(rows, dtype=x.dtype)
    enough = count >= (4 if unbiased else 2)
    if not unbiased and x.shape[0] > max(x.shape[1], y.shape[1]):
        # The same three numbers from the covariances of the features.
        ours, theirs, both = product(x.T, x), product(y.T, y), jnp.sum(jnp.square(product(x.T, y)))
    else:
        ours, theirs = product(x, x.T), product(y, y.T)
        if unbiased:
            ours = _without_diagonal(ours, rows, count)
            theirs = _without_diagonal(theirs, rows, count)
        both = jnp.sum(ours * theirs)
    lengths = root(jnp.sum(jnp.square(ours))) * root(jnp.sum(jnp.square(theirs)))
    none = (lengths == 0) | ~enough
    return jnp.where(none, 0.0, both / jnp.where(none, 1.0, lengths)), enough


def _centred(x, rows):
    """The features less their mean over the rows that count; zero in the others."""
    x = flat(x)
    if x.size == 0:
        return x
    # Less any one row first: what all rows share then is zero to the last bit.
    first = jax.lax.dynamic_index_in_dim(x, jnp.argmax(rows))
    x = jnp.where(rows[:, None], x - jax.lax.stop_gradient(first), 0.0)
    mean = jnp.sum(x, 0, keepdims=True) / jnp.maximum(jnp.sum(rows, dtype=x.dtype), 1.0)
    return rescaled(jnp.where(rows[:, None], x - mean, 0.0), (0, 1))


def _without_diagonal(gram, rows, count):
    """Gram matrix whose inner products, up to a common factor, are the unbiased ones."""
    pairs = rows[:, None] & rows[None] & ~jnp.eye(rows.shape[0], dtype=bool)
    gram = jnp.where(pairs, gram, 0.0)
    each = jnp.sum(gram, 1) / jnp.maximum(count - 2, 1.0)
    whole = jnp.sum(each) / jnp.maximum(count - 1, 1.0)
    return jnp.where(pairs, gram - each[:, None] - each[None] + whole, 0.0)

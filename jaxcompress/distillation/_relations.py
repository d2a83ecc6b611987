"""Losses on the relations between the rows of a batch: widths of the features may differ."""

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._batches import ROWS, flat, read, rescaled, root, rows_of, unit
from jaxcompress.distillation._divergence import kl


def similarity_preserving(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""How differently a student and a teacher find the rows of a batch alike.

    .. math:: L = \frac{1}{b^2} \bigl\| \tilde G^s - \tilde G^t \bigr\|_F^2, \quad
        G = X X^\top, \quad \tilde G_{i:} = G_{i:} / \|G_{i:}\|_2

    Args:
        student: features [batch, ...], read as one vector :math:`X_{i:}` per row, any real float
            dtype.
        teacher: the same batch; all other axes may differ.
        where: booleans [batch]: the :math:`b` rows that count. The others are not read: they
            may be NaN. Booleans [batch, ...] for leading axes that both have leave positions
            away, as zeros; rows without any position do not count.

    Returns:
        A scalar, at least 0; the share of row i is the squared difference of row i over
        :math:`b^2`. float64 if an argument is, otherwise float32 (bfloat16 and float16 are
        computed in float32). An empty batch or mask gives 0, and zero gradients; a row of zeros
        is like no row.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; `where` does not begin the features' shape.

    Cost: two products [b, width] x [width, b].

    Examples:
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> jc.distillation.similarity_preserving(rows, jnp.ones((2, 5))).round(4)
        Array(0.2929, dtype=float32)

    Source: Tung & Mori 2019, arXiv:1907.09682. Gradients flow to the teacher too, as
    in all losses here; `jc.distill` stops them.
    """
    student, teacher, keep = read("similarity_preserving", student, teacher, where, ROWS)
    return automatic(_similarity, student, teacher, rows_of(keep), like_first=False)


def rkd_distance(
    student: ArrayLike,
    teacher: ArrayLike,
    delta: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently a student and a teacher place the rows of a batch: distances of pairs.

    .. math:: L = \frac{1}{b (b - 1)} \sum_{i \ne j} \ell_\delta\Bigl(
        \frac{d^s_{ij}}{\bar d^s} - \frac{d^t_{ij}}{\bar d^t}\Bigr), \quad
        d_{ij} = \|x_i - x_j\|_2

    with :math:`\bar d` the mean over the same pairs and :math:`\ell_\delta(r) = r^2 / 2` up to
    :math:`|r| = \delta` and :math:`\delta (|r| - \delta / 2)` beyond (Huber).

    Args:
        student: features [batch, ...], read as one vector per row, any real float dtype.
        teacher: the same batch; all other axes may differ.
        delta: :math:`\delta`, at least 0. May be traced.
        where: booleans [batch] or more leading axes: what counts, as in `similarity_preserving`.

    Returns:
        A scalar, at least 0, the mean over the pairs; dtype as in `similarity_preserving`. With
        fewer than two rows it is 0, with zero gradients. Rows that coincide are at distance 0
        and pull nowhere; if all do, so are their scaled distances.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; a known `delta` is below 0; `where` does not begin the
            features' shape.

    Cost: :math:`b^2` differences of rows, subtracted before they are squared, as Gram matrices
    lose the digits of rows near each other: a loop over the rows. Its memory is :math:`b^2` and
    [b, width], in the gradient too, which computes them once more.

    Examples:
        >>> line, corner = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[1.0, 0], [0, 0], [0, 1]])
        >>> jc.distillation.rkd_distance(line, 3.0 * line).round(4)
        Array(0., dtype=float32)
        >>> jc.distillation.rkd_distance(line, corner).round(4)
        Array(0.0166, dtype=float32)

    Source: Park et al. 2019, arXiv:1904.05068, section 3.2.1. Differs: a mean, where they have
    a sum; their program also counts i = j, and leaves distances of 0 out of their mean.
    """
    _check.number("rkd_distance", "delta", delta, 0.0)
    student, teacher, keep = read("rkd_distance", student, teacher, where, ROWS)
    delta = jnp.asarray(delta, student.dtype)
    return automatic(_distance, student, teacher, rows_of(keep), delta, like_first=False)


def rkd_angle(
    student: ArrayLike,
    teacher: ArrayLike,
    delta: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""How differently a student and a teacher place the rows of a batch: angles of triplets.

    .. math:: L = \frac{1}{b (b - 1) (b - 2)} \sum_{i \ne j \ne k \ne i}
        \ell_\delta\bigl(\cos^s_{ijk} - \cos^t_{ijk}\bigr), \quad
        \cos_{ijk} = \Bigl\langle \frac{x_i - x_j}{\|x_i - x_j\|},
        \frac{x_k - x_j}{\|x_k - x_j\|} \Bigr\rangle

    with Huber's :math:`\ell_\delta` of `rkd_distance`.

    Args:
        student: features [batch, ...], read as one vector per row, any real float dtype.
        teacher: the same batch; all other axes may differ.
        delta: :math:`\delta`, at least 0. May be traced.
        where: booleans [batch] or more leading axes: what counts, as in `similarity_preserving`.

    Returns:
        A scalar, at least 0, the mean over the triplets; dtype as in `similarity_preserving`.
        With fewer than three rows it is 0, with zero gradients. The cosine is 0 where a row
        coincides with the vertex j.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; a known `delta` is below 0; `where` does not begin the
            features' shape.

    Cost: :math:`b^3` width multiplications, vertex by vertex: a loop of b products of matrices
    [b, width]. Its memory is :math:`b^2` and [b, width], never :math:`b^3`, in the gradient
    too, which computes them once more.

    Examples:
        >>> line, corner = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[1.0, 0], [0, 0], [0, 1]])
        >>> jc.distillation.rkd_angle(line, corner).round(4)
        Array(0.1953, dtype=float32)

    Source: Park et al. 2019, arXiv:1904.05068, section 3.2.2. Differs: a mean, where they have
    a sum; their program also counts triplets in which rows repeat.
    """
    _check.number("rkd_angle", "delta", delta, 0.0)
    student, teacher, keep = read("rkd_angle", student, teacher, where, ROWS)
    delta = jnp.asarray(delta, student.dtype)
    return automatic(_angle, student, teacher, rows_of(keep), delta, like_first=False)


def pkt_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""How far a student's neighbours of each row are from a teacher's, as distributions.

    .. math:: L_i = \sum_{j \ne i} p_{ij} \log \frac{p_{ij}}{q_{ij}}, \quad
        p_{ij} = \frac{k^t_{ij}}{\sum_{l \ne i} k^t_{il}}, \quad
        k_{ij} = \frac{1 + \cos(x_i, x_j)}{2}

    and q alike from the student.

    Args:
        student: features [batch, ...], read as one vector per row, any real float dtype.
        teacher: the same batch; all other axes may differ.
        where: booleans [batch] or more leading axes: what counts, as in `similarity_preserving`.

    Returns:
        One number per row, [batch], in nats, at least 0 up to rounding; dtype as in
        `similarity_preserving`. Rows that do not count, and a row alone, have 0 and zero
        gradients. The cosine of a row of zeros is 0. Opposite rows have a kernel of the
        dtype's epsilon, so the loss and its gradient stay finite.

    Raises:
        TypeError: the features are not real floating point, `where` is not boolean; raised
            while tracing.
        ValueError: the batches differ; `where` does not begin the features' shape.

    Cost: two products [b, width] x [width, b], and a divergence [b, b].

    Examples:
        >>> rows = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> jc.distillation.pkt_loss(rows, jnp.ones((3, 5))).round(4)
        Array([0.0353, 0.0353, 0.    ], dtype=float32)

    Source: Passalis & Tefas 2018, arXiv:1803.10837, section 3. Differs: their program counts
    j = i too, adds 1e-7 in the logarithm, and has a mean over the pairs; take the sum here.
    """
    student, teacher, keep = read("pkt_loss", student, teacher, where, ROWS)
    return automatic(_neighbours, student, teacher, rows_of(keep), like_first=False)


def _similarity(student, teacher, rows):
    def gram(x):
        x = rescaled(flat(x), (0, 1))
        return unit(product(x, x.T))

    count = jnp.maximum(jnp.sum(rows, dtype=student.dtype), 1.0)
    return jnp.sum(jnp.square(gram(student) - gram(teacher))) / jnp.square(count)


def _distance(student, teacher, rows, delta):
    if student.shape[0] == 0:
        return jnp.zeros((), student.dtype)
    pairs = _pairs(rows)
    count = jnp.maximum(jnp.sum(pairs, dtype=student.dtype), 1.0)

    def distances(x):
        x = rescaled(flat(x), (0, 1))

        # Row by row, and once more in the gradient, so that no [b, b, width] is held.
        @jax.checkpoint
        def of_row(i):
            difference = x - jax.lax.dynamic_index_in_dim(x, i)
            return root(jnp.sum(jnp.square(difference), -1))

        d = jnp.where(pairs, jax.lax.map(of_row, jnp.arange(x.shape[0])), 0.0)
        mean = jnp.sum(d) / count
        return d / jnp.where(mean == 0, 1.0, mean)

    return jnp.sum(_huber(distances(student) - distances(teacher), delta)) / count


def _angle(student, teacher, rows, delta):
    student, teacher = rescaled(flat(student), (0, 1)), rescaled(flat(teacher), (0, 1))
    if student.shape[0] == 0:
        return jnp.zeros((), student.dtype)
    pairs = _pairs(rows)
    count = jnp.sum(rows, dtype=student.dtype)
    count = jnp.maximum(count * (count - 1) * (count - 2), 1.0)

    # Without the checkpoint the gradient would keep the directions of all vertices.
    @jax.checkpoint
    def at(vertex):
        def cosines(x):
            directions = unit(x - jax.lax.dynamic_index_in_dim(x, vertex))
            return product(directions, directions.T)

        others = pairs[vertex]
        triplets = pairs & others[:, None] & others[None]
        difference = jnp.where(triplets, cosines(student) - cosines(teacher), 0.0)
        return jnp.sum(_huber(difference, delta))

    return jnp.sum(jax.lax.map(at, jnp.arange(student.shape[0]))) / count


def _neighbours(student, teacher, rows):
    def logs(x):
        directions = unit(flat(x))
        kernel = (1.0 + product(directions, directions.T)) / 2.0
        # Its rounding error is about as large, and a logarithm of zero is not finite.
        return jnp.log(jnp.maximum(kernel, jnp.finfo(kernel.dtype).eps))

    return kl(logs(student), logs(teacher), jnp.ones((), student.dtype), _pairs(rows))


def _pairs(rows):
    """Which pairs of two different rows both count."""
    return rows[:, None] & rows[None] & ~jnp.eye(rows.shape[0], dtype=bool)


def _huber(difference, delta):
    size = jnp.abs(difference)
    near = jnp.minimum(size, delta)
    return near * (size - near / 2.0)

"""Teachers of which only the largest classes are kept, with the mass of the rest."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic, by_rows
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import kl
from jaxcompress.distillation._rows import (
    ids_below,
    log_sum,
    mask_of,
    require_logits,
    require_temperature,
    shifted,
    softmax,
)


class TopK(NamedTuple):
    """A teacher's k most probable classes, and all others as one.

    Everything is at one temperature, under the normalizer of all classes. A plain tree of
    arrays with the teacher's rows in front: slice it, stack it, save it.

    Attributes:
        indices: shape [..., k], the classes, the most probable first; integers of any width.
        log_probabilities: shape [..., k], their log-probabilities, any float dtype; -inf where
            a row has fewer than k classes.
        log_rest: shape [...], the logarithm of the rest's probability; -inf if nothing is left.
    """

    indices: jax.Array
    log_probabilities: jax.Array
    log_rest: jax.Array


def top_k(
    teacher_logits: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    k: int,
    where: ArrayLike | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> TopK:
    r"""The k most probable classes of each row and the probability of the rest, for `top_k_loss`.

    .. math:: \log p_c = t_c / T - \log\sum_{i} e^{t_i / T}, \quad
        \log p_\mathrm{rest} = \log\sum_{c \notin S} p_c

    The temperature is part of what is kept: the mass of the rest at another temperature depends
    on how it is spread, which is not kept. Make a `TopK` for each temperature you train with.

    Args:
        teacher_logits: :math:`t`, shape [..., classes], any real float dtype.
        temperature: :math:`T > 0`, a scalar or one number per row. May be traced: NaN for a
            traced one that is not above 0.
        k: static. How many classes to keep, 1 to all of them; :math:`|S|`.
        where: booleans that broadcast to the logits' shape: which classes there are. A class
            whose logit is -inf is left away too.
        dtype: static. Of the logarithms; None keeps that of the computation, float32, or
            float64 for float64 logits. In float16 they have three digits; `top_k_loss` divides
            by the sum of what came of the rounding.

    Returns:
        A `TopK`. Its indices are of the narrowest of uint8, uint16 and int32 that holds every
        class; among equal logits the first classes are kept. A row without classes has -inf
        everywhere.

    Raises:
        TypeError: the logits or `dtype` are not real floating point, `where` is not boolean,
            `k` is not an integer; raised while tracing.
        ValueError: the logits' shape is (), `k` is not in [1, classes], a known `temperature`
            is not above 0.

    Cost: one `jax.lax.top_k` and a few passes over the classes. With float16, k = 32 and up to
    65536 classes, 130 bytes a row.

    Examples:
        >>> logits = jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2]))
        >>> teacher = jc.distillation.top_k(logits, k=2)
        >>> teacher.indices
        Array([1, 3], dtype=uint8)
        >>> np.exp(teacher.log_probabilities).round(2), np.exp(teacher.log_rest).round(2)
        (array([0.6, 0.2], dtype=float32), np.float32(0.2))

    Source: Anshumann et al. 2025, arXiv:2503.16870: the top k, kept on disk.
    Differs: the mass of the rest is kept, as its logarithm, where one minus the sum of the k
    probabilities would be all rounding error.
    """
    require_logits("top_k", "teacher_logits", teacher_logits)
    logits = wide(jnp.asarray(teacher_logits))
    classes = logits.shape[-1]
    _check.integer("top_k", "k", k, 1, classes)
    dtype = logits.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        rule = "be a real floating-point dtype"
        raise TypeError(_check.message("top_k", "dtype", rule, dtype.name))
    require_temperature("top_k", temperature, logits.shape[:-1])
    keep = mask_of("top_k", where, logits.shape)
    row = softmax(logits, jnp.asarray(temperature, logits.dtype), keep)
    # Chosen by the logits themselves: at high temperatures rounding makes probabilities equal.
    order = jax.lax.stop_gradient(jnp.where(row.present, logits, -jnp.inf))
    indices = by_rows(lambda x: jax.lax.top_k(x, k)[1], order, like=order, axes=1)
    logs = jnp.where(row.present, row.logs, -jnp.inf)
    rest = log_sum(row.logs, row.present & ~_members(indices, logits))
    narrow = next(d for d in (jnp.uint8, jnp.uint16, jnp.int32) if classes - 1 <= jnp.iinfo(d).max)
    kept = _take(logs, indices)
    return TopK(indices.astype(narrow), kept.astype(dtype), rest.astype(dtype))


def top_k_loss(
    student_logits: ArrayLike,
    teacher: TopK,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Knowledge distillation from a teacher of which the k largest classes and the rest are known.

    .. math:: L = T^2 \Bigl[\sum_{c \in S} p_c \log\frac{p_c}{q_c} +
        p_\mathrm{rest} \log\frac{p_\mathrm{rest}}{q_\mathrm{rest}}\Bigr], \quad
        q_\mathrm{rest} = \sum_{c \notin S} q_c, \quad q = \mathrm{softmax}(s / T)

    The divergence of two distributions over k + 1 outcomes, the last of them "another class".
    It is at most `kd_loss`, and equal to it where at most one class is left. The student's
    probabilities have its full normalizer, so mass outside of the teacher's top k costs.

    Args:
        student_logits: :math:`s`, shape [..., classes], any real float dtype.
        teacher: what `top_k` gave for the same rows, or that read from disk.
        temperature: :math:`T > 0`, that of `top_k`; a scalar or one number per row. May be
            traced. It softens the student only: a teacher kept at another temperature is
            another teacher. NaN for a traced one that is not above 0.
        where: booleans that broadcast to the logits' shape: which classes there are; give
            `top_k` the same. Those of the top k that are not there have probability zero.

    Returns:
        One number per row, at least 0, shape `student_logits.shape[:-1]`; float64 if an
        argument is, otherwise float32. A row without classes, in either, has loss 0, and zero
        gradients. It is inf where the student rules out with -inf all classes of an outcome
        that the teacher has. NaN for an index that is not one of the classes, negative ones too.

    Raises:
        TypeError: the logits or the logarithms are not real floating point, the indices not
            integers, `teacher` is no `TopK`, `where` is not boolean; raised while tracing.
        ValueError: the shapes do not fit together, k is not in [1, classes], a known
            `temperature` is not above 0.

    Cost: two reductions over the student's classes, a gather and a scatter of k; the rest is
    of the size of the top k.

    Examples:
        >>> student, logits = jnp.array([0.0, 1.0, 5.0]), jnp.array([3.0, 1.0, 0.0])
        >>> teacher = jc.distillation.top_k(logits, 2.0, k=1)
        >>> loss, whole = jc.distillation.top_k_loss(student, teacher, 2.0), jc.kd_loss
        >>> np.round([loss, whole(student, logits, 2.0)], 1)
        array([4.2, 5.3], dtype=float32)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, for the divergence; the rest as one
    outcome is the coarsening of Kullback & Leibler 1951, theorem 4.1. Differs from peers that
    divide the teacher's top k by its sum or leave the rest away, which either sharpens the
    teacher (Anshumann et al. 2025, arXiv:2503.16870) or is blind to the student's other mass.
    """
    name = "top_k_loss"
    require_logits(name, "student_logits", student_logits)
    student = jnp.asarray(student_logits)
    rows, classes = student.shape[:-1], student.shape[-1]
    indices, logs, rest = _read(teacher, rows, classes)
    require_temperature(name, temperature, rows)
    keep = mask_of(name, where, student.shape)
    double = jnp.float64 in (student.dtype, logs.dtype, rest.dtype)
    dtype = jnp.float64 if double else jnp.float32
    temperature = jnp.asarray(temperature, dtype)
    present, z = shifted(student.astype(dtype), temperature, keep)
    others = log_sum(z, present & ~_members(indices, student))
    ours = _take(jnp.where(present, z, -jnp.inf), indices)
    ours = jnp.concatenate([ours, others[..., None]], -1)
    theirs = jnp.concatenate([logs.astype(dtype), rest.astype(dtype)[..., None]], -1)
    # A class left away is left away in both; so is a row of which the teacher has nothing.
    some = jnp.any(theirs != -jnp.inf, -1, keepdims=True)
    outcomes = jnp.concatenate([_take(keep, indices) & some, some], -1)
    return temperature * temperature * kl(ours, theirs, jnp.ones((), dtype), outcomes)


def _members(indices, like):
    """Which of the classes of `like` are among the indices, in its shape."""

    def inside(like, indices):
        one = lambda row: jnp.zeros(like.shape[-1], bool).at[row].set(True)  # noqa: E731
        for _ in range(indices.ndim - 1):
            one = jax.vmap(one)
        return one(indices)

    return automatic(inside, like, indices, like_first=True)


def _take(x, indices):
    return by_rows(lambda x, i: jnp.take_along_axis(x, i, -1), x, indices, like=x, axes=1)


def _read(teacher, rows, classes):
    """The fields of a teacher, checked; indices in int32, `classes` for those of no class."""
    name = "top_k_loss"
    if not isinstance(teacher, TopK):
        rule, fix = "be a TopK", "Make it with jc.distillation.top_k(teacher_logits, k=...)."
        raise TypeError(_check.message(name, "teacher", rule, _check.describe(teacher), fix))
    kinds = {"indices": jnp.integer, "log_probabilities": jnp.floating, "log_rest": jnp.floating}
    k = jnp.shape(teacher.indices)[-1:]
    shapes = {"indices": rows + k, "log_probabilities": rows + k, "log_rest": rows}
    for field, leaf in teacher._asdict().items():
        got = _check.describe(leaf)
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, kinds[field]):
            kind = "integers" if field == "indices" else "real floating-point numbers"
            raise TypeError(_check.message(name, f"teacher.{field}", f"be {kind}", got))
        if leaf.shape != shapes[field] or not k:
            rule = f"have one row for each of the student's, {list(rows)}, and k entries in it"
            rule = f"have the student's rows, {list(rows)}" if field == "log_rest" else rule
            raise ValueError(_check.message(name, f"teacher.{field}", rule, got))
    if not 1 <= k[0] <= classes:
        rule = f"hold 1 to {classes} classes, no more than the student has"
        raise ValueError(
            _check.message(name, "teacher.indices", rule, _check.describe(teacher.indices))
        )
    indices, logs, rest = (jnp.asarray(leaf) for leaf in teacher)
    return ids_below(classes, indices), logs, rest

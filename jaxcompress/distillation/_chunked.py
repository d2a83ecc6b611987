"""Distillation from hidden states: logits and probabilities exist a chunk at a time only."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._sharding import by_rows
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._rows import positive, require_temperature, share
from jaxcompress.distillation._streamed import Plan, Side, streamed_loss


def chunked_kd_loss(
    student_hidden: ArrayLike,
    student_head: ArrayLike,
    teacher_hidden: ArrayLike,
    teacher_head: ArrayLike,
    temperature: ArrayLike = 1.0,
    *,
    reverse: ArrayLike | None = None,
    mixture: ArrayLike | None = None,
    student_bias: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    token_chunk: int = 512,
    class_chunk: int | None = 4096,
    transposed: bool | tuple[bool, bool] = False,
) -> jax.Array:
    r"""`kd_loss` of the logits `hidden @ head + bias`, without ever holding these whole.

    .. math:: L = T^2 \bigl[(1 - \rho)\,\mathrm{KL}(p \,\|\, m) + \rho\,\mathrm{KL}(q \,\|\, m)
        \bigr], \quad m = \lambda p + (1 - \lambda) q

    With :math:`p` the teacher's and :math:`q` the student's distribution at temperature T:

    =========================================  ================  ===============
    Divergence                                 :math:`\rho`      :math:`\lambda`
    =========================================  ================  ===============
    KL(p, q), that of `kd_loss`                None, 0           None, 0
    KL(q, p), reverse                          1                 1
    Jensen-Shannon, generalized, of β          1 - β             β
    skewed KL(p, αp + (1 - α)q)                0                 α
    skewed reverse KL(q, αq + (1 - α)p)        1                 1 - α
    =========================================  ================  ===============

    Args:
        student_hidden: shape [..., student features], any real float dtype.
        student_head: shape [student features, classes], any real float dtype.
        teacher_hidden: shape [..., teacher features], the student's leading axes.
        teacher_head: shape [teacher features, classes].
        temperature: :math:`T > 0`, a scalar or one number per token. May be traced.
            A traced number out of its range, here and below, makes the loss NaN.
        reverse: :math:`\rho`, the share of the student's divergence, 0 to 1. May be traced.
        mixture: :math:`\lambda`, the teacher's share in the mixture, 0 to 1. May be traced.
            Where both are None, only the cheaper KL(p, q) is computed; one of them alone makes
            the other 0.
        student_bias: shape [classes]. A bias of -inf, in both, leaves a class away.
        teacher_bias: shape [classes].
        where: booleans that broadcast to the leading axes: which tokens count. The hidden
            states of the others are not read, NaN neither.
        token_chunk: static. How many tokens to take at a time.
        class_chunk: static. How many classes to take at a time; None takes all. Best for heads
            that are sharded over the classes, which it leaves in their place.
        transposed: static. Whether the heads are [classes, features], as embeddings are; a pair
            says it of the student and of the teacher.

    Returns:
        One number per token, at least 0, the leading axes' shape; float64 if an array is,
        otherwise float32: products of narrower arrays are summed in float32. Tokens that do not
        count, or have no classes, have loss 0 and zero gradients. Infinities as in `kd_loss`.
        Gradients flow to the student's three arrays, in their dtypes; NOT to the teacher, T,
        ρ and λ, which are constants of it. Reverse mode only.

    Raises:
        TypeError: an array is not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: shapes do not fit, a known number is out of its range, a chunk is below 1.

    Cost: two products with each head, and in the backward pass one more with each and the two
    of the gradients (the plain way takes one with each, and those two); the first two are one
    where all classes are taken at once. Memory: a few arrays of `token_chunk * class_chunk`
    numbers of 4 bytes, and the gradients, summed in float32. Logits that are there already need
    only `jax.lax.map(jax.checkpoint(lambda x: jc.kd_loss(*x, T)), (s, t), batch_size=512)`.

    Examples:
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> shapes = [(2, 5, 8), (8, 100), (2, 5, 16), (16, 100)]
        >>> s, s_head, t, t_head = map(jax.random.normal, keys, shapes)
        >>> loss = jc.distillation.chunked_kd_loss(s, s_head, t, t_head, 2.0, token_chunk=4)
        >>> plain = jc.kd_loss(s @ s_head, t @ t_head, 2.0)
        >>> loss.shape, bool(jnp.allclose(loss, plain, rtol=1e-4))
        ((2, 5), True)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2; Agarwal et al. 2023,
    arXiv:2306.13649, section 2 (Jensen-Shannon); Ko et al. 2024, arXiv:2402.03898, section 3.1
    (skewed); the sums by chunks with a running maximum are of Milakov & Gimelshein 2018,
    arXiv:1805.02867, recomputed in the backward pass as by Wijmans et al. 2025,
    arXiv:2411.09009. Differs: T² with all of them; Jensen-Shannon as it is defined, so 0 for
    β = 0 and 1, where TRL's trainer puts the two KL.
    """
    name = "chunked_kd_loss"
    pair_ = transposed if isinstance(transposed, tuple) else (transposed, transposed)
    student = _side(name, "student", student_hidden, student_head, student_bias, pair_[0])
    teacher = _side(name, "teacher", teacher_hidden, teacher_head, teacher_bias, pair_[1])
    rows, classes = _shapes(name, student, teacher, pair_)
    require_temperature(name, temperature, rows)
    _check.integer(name, "token_chunk", token_chunk, 1)
    if class_chunk is not None:
        _check.integer(name, "class_chunk", class_chunk, 1)
    if where is not None and jnp.result_type(where) != jnp.bool_:
        rule, got = "be booleans that broadcast to the tokens", _check.describe(where)
        raise TypeError(_check.message(name, "where", rule, got))
    try:
        keep = jnp.broadcast_to(True if where is None else jnp.asarray(where), rows)
    except ValueError:
        rule, got = f"broadcast to the tokens' shape {list(rows)}", _check.describe(where)
        raise ValueError(_check.message(name, "where", rule, got)) from None
    double = jnp.float64 in [x.dtype for x in (*student, *teacher) if x is not None]
    dtype = jnp.float64 if double else jnp.float32
    numbers = None
    if not (reverse is None and mixture is None):
        given = {"reverse": reverse, "mixture": mixture}
        numbers = tuple(share(name, k, 0.0 if x is None else x, dtype) for k, x in given.items())
    tempers = jnp.broadcast_to(positive(jnp.asarray(temperature, dtype)), rows)
    if 0 in (*rows, classes):
        return jnp.zeros(rows, dtype)
    width = classes if class_chunk is None else min(class_chunk, classes)
    plan = Plan(token_chunk, width, pair_)
    rest = jax.lax.stop_gradient((teacher, tempers, numbers))
    # The axes of a slice of classes and of the chunks of tokens are left to the compiler.
    run = functools.partial(_by_tokens, plan)
    return by_rows(run, student, *rest, keep, like=student.hidden)


def _by_tokens(plan, student, teacher, temperature, numbers, keep):
    """The loss of each token, by chunks of them."""
    count = keep.size
    size = min(plan.tokens, count)
    chunks = -(-count // size)

    def split(x, padding=0.0):
        """[chunks, size, ...]: a chunk has tokens of every device along a sharded axis."""
        x = x.reshape(count, *x.shape[keep.ndim :])
        widths = [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, widths, constant_values=padding)
        return jnp.swapaxes(x.reshape(size, chunks, *x.shape[1:]), 0, 1)

    def read(side):
        hidden = jnp.where(jnp.expand_dims(keep, -1), side.hidden, jnp.zeros((), side.hidden.dtype))
        return side._replace(hidden=split(hidden))

    tempers = split(jnp.where(keep, temperature, 1.0), 1.0)
    loss: Any = streamed_loss(plan, read(student), read(teacher), tempers, numbers)
    loss = jnp.swapaxes(loss, 0, 1).reshape(-1)[:count].reshape(keep.shape)
    return jnp.where(keep, loss, 0.0)


def _side(function, who, hidden, head, bias, transposed) -> Side:
    """A model's arrays, checked one by one."""
    arrays = {f"{who}_hidden": hidden, f"{who}_head": head, f"{who}_bias": bias}
    for name, x in arrays.items():
        if x is bias and bias is None:
            continue
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            rule = "be a real floating-point array"
            raise TypeError(_check.message(function, name, rule, _check.describe(x)))
    if hidden.ndim == 0:
        rule, got = "have a last axis of features", _check.describe(hidden)
        raise ValueError(_check.message(function, f"{who}_hidden", rule, got))
    order = "[classes, {}]" if transposed else "[{}, classes]"
    if head.ndim != 2 or head.shape[int(transposed)] != hidden.shape[-1]:
        rule = f"have the shape {order.format(hidden.shape[-1])}"
        fix = "Heads laid out the other way need transposed=" + str(not transposed) + "."
        raise ValueError(_check.message(function, f"{who}_head", rule, _check.describe(head), fix))
    classes = head.shape[int(not transposed)]
    if bias is not None and bias.shape != (classes,):
        rule = f"have the shape [{classes}]"
        raise ValueError(_check.message(function, f"{who}_bias", rule, _check.describe(bias)))
    return Side(jnp.asarray(hidden), jnp.asarray(head), None if bias is None else jnp.asarray(bias))


def _shapes(function: str, student: Side, teacher: Side, transposed) -> tuple[Any, int]:
    """The tokens' shape and the number of classes, which both models share."""
    rows = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != rows:
        rule = f"have the student's leading axes, {list(rows)}"
        got = _check.describe(teacher.hidden)
        raise ValueError(_check.message(function, "teacher_hidden", rule, got))
    sizes = [s.head.shape[int(not t)] for s, t in zip((student, teacher), transposed, strict=True)]
    if sizes[0] != sizes[1]:
        rule = f"have the student's {sizes[0]} classes"
        raise ValueError(
            _check.message(function, "teacher_head", rule, _check.describe(teacher.head))
        )
    return rows, sizes[0]

"""Losses of autoregressive students: from one number per token to one per batch."""

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike
from jaxcompress.distillation._labels import checked, target_of
from jaxcompress.distillation._rows import mask_of, require_logits, softmax
from jaxcompress.distillation._tokens import token_mask


def sequence_kd_loss(
    student_logits: ArrayLike, labels: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Cross-entropy with the tokens of an output that the teacher wrote, token by token.

    .. math:: L_i = -\log q(\hat y_i \mid x, \hat y_{<i}), \quad
        \sum_i L_i = -\log q(\hat y \mid x)

    Sequence-level distillation: the teacher's own outputs (those of a beam search, or samples)
    in place of its distributions. No teacher runs in training, and the vocabularies may differ.

    Args:
        student_logits: shape [..., length, classes], any real float dtype.
        labels: integers, shape [..., length], the token that each position predicts, as of
            `next_tokens`.
        where: booleans that broadcast to the logits' shape: `mask[..., None]` leaves positions
            away, a mask of shape [classes] classes.

    Returns:
        One number per position, in nats, at least 0, shape `labels.shape`; float64 for float64
        logits, otherwise float32. A position without classes has loss 0 and zero gradients,
        whatever its label. It is inf where the label's logit is -inf; NaN for a label that is
        none of the classes.

    Raises:
        TypeError: the logits are not real floating point, the labels not integers, `where` is
            not boolean; raised while tracing.
        ValueError: the shapes do not fit.

    Cost: two reductions over the classes.

    Examples:
        >>> labels, mask = jnp.array([1, 0]), jnp.array([True, False])
        >>> jc.distillation.sequence_kd_loss(jnp.zeros((2, 4)), labels, where=mask[:, None])
        Array([1.3862944, 0.       ], dtype=float32)

    Source: Kim & Rush 2016, arXiv:1606.07947, section 3.2.
    """
    name = "sequence_kd_loss"
    require_logits(name, "student_logits", student_logits)
    logits = wide(jnp.asarray(student_logits))
    keep = mask_of(name, where, logits.shape)
    target, in_order = target_of(name, labels, keep)
    row = softmax(logits, jnp.ones((), logits.dtype), keep)
    terms = jnp.where(row.present, -row.logs, jnp.inf)
    return checked(jnp.sum(jnp.where(target, terms, 0.0), -1), in_order)


def sequence_loss(losses: ArrayLike, mask: ArrayLike, *, per_sequence: bool) -> jax.Array:
    r"""The mean over the tokens that count, of a batch of sequences.

    .. math:: \frac{\sum_{b,i} m_{bi} L_{bi}}{\sum_{b,i} m_{bi}} \quad\text{or}\quad
        \frac{1}{|B|} \sum_{b \in B} \frac{\sum_i m_{bi} L_{bi}}{\sum_i m_{bi}}

    The first counts every token alike, the second every sequence, however long; a batch's
    padding changes neither.

    Args:
        losses: :math:`L`, shape [..., length], one number per token: of `kd_loss` or any other
            loss, `chunked_kd_loss`, `sequence_kd_loss`.
        mask: :math:`m`, booleans of the same shape: which tokens count. What the others hold
            is not read; if their logits may not be finite, mask the loss too
            (`where=mask[..., None]`), as a gradient of NaN is NaN, times zero too.
        per_sequence: static. Whether each sequence's mean is taken first; :math:`B` are the
            sequences with a token that counts.

    Returns:
        A scalar, float64 for float64 losses, otherwise float32. If no token counts, 0 with
        zero gradients.

    Raises:
        TypeError: `losses` are not real floating point, `mask` is not boolean; raised while
            tracing.
        ValueError: the shapes differ or are ().

    Cost: one pass over the losses.

    Examples:
        >>> losses = jnp.array([[1.0, 2.0, 3.0], [6.0, 9.0, 9.0]])
        >>> mask = jnp.array([[True, True, True], [True, False, False]])
        >>> jc.distillation.sequence_loss(losses, mask, per_sequence=False)
        Array(3., dtype=float32)
        >>> jc.distillation.sequence_loss(losses, mask, per_sequence=True)
        Array(4., dtype=float32)

        One step of on-policy distillation of a toy model, whose logits depend on the last
        token; how it samples is the user's code. No gradient flows through the samples.

        >>> d, length, prompt = jc.distillation, 8, 2
        >>> def sample(params, prompts, key):
        ...     def step(last, key):
        ...         token = jax.random.categorical(key, params[last])
        ...         return token, token
        ...     keys = jax.random.split(key, length - prompt)
        ...     _, tokens = jax.lax.scan(step, prompts[:, -1], keys)
        ...     return jnp.concatenate([prompts, tokens.T], 1)
        >>> @jax.jit
        ... def gkd_step(params, teacher, written, fraction, key):
        ...     tokens = sample(params, written[:, :prompt], jax.random.fold_in(key, 0))
        ...     tokens = d.mix_sequences(jax.random.fold_in(key, 1), tokens, written, fraction)
        ...     labels, mask = d.next_tokens(tokens, d.answer_mask(tokens, prompt, end=0))
        ...     def loss(params):
        ...         tokenwise = d.kl_divergence(params[tokens], teacher[tokens], 1.0)
        ...         return d.sequence_loss(tokenwise, mask, per_sequence=True)
        ...     value, grads = jax.value_and_grad(loss)(params)
        ...     return params - 2.0 * grads, value
        >>> params, teacher = jnp.zeros((5, 5)), 2.0 * jnp.eye(5)
        >>> written, losses = jnp.ones((16, length), int), []
        >>> for key in jax.random.split(jax.random.key(0), 30):
        ...     params, loss = gkd_step(params, teacher, written, 0.5, key)
        ...     losses.append(loss)
        >>> bool(losses[-1] < losses[0] / 10)
        True

    Source: Agarwal et al. 2023, arXiv:2306.13649, equation 2 (the mean over the tokens of each
    sequence).
    """
    name = "sequence_loss"
    if not jnp.issubdtype(getattr(losses, "dtype", int), jnp.floating):
        rule, fix = "be real floating-point numbers", "Give one loss per token."
        raise TypeError(_check.message(name, "losses", rule, _check.describe(losses), fix))
    if jnp.ndim(losses) == 0:
        rule, fix = "have a last axis of tokens", "Give one loss per token, not their mean."
        raise ValueError(_check.message(name, "losses", rule, _check.describe(losses), fix))
    losses = wide(jnp.asarray(losses))
    mask = token_mask(name, mask, losses.shape)
    axis = -1 if per_sequence else None
    total = jnp.sum(jnp.where(mask, losses, 0.0), axis)
    count = jnp.sum(mask, axis, dtype=losses.dtype)
    mean = total / jnp.maximum(count, 1.0)
    sequences = jnp.sum(count > 0, dtype=losses.dtype)
    return jnp.sum(mean) / jnp.maximum(sequences, 1.0)

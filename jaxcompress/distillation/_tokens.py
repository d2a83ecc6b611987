"""Batches of token sequences: which tokens count, what they predict, whose they are.

Sampling is the user's; all here takes tokens and masks.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike, PyTree


def answer_mask(
    tokens: ArrayLike, prompt_lengths: ArrayLike, *, end: ArrayLike | None = None
) -> jax.Array:
    """Which tokens are the answer: after the prompt, up to and including the first end token.

    Args:
        tokens: integers, shape [..., length], a prompt and then an answer, padded at the end.
        prompt_lengths: integers, shape `tokens.shape[:-1]` or (): how many tokens are prompt.
        end: the token that ends an answer (one in the prompt does not). May be traced. None:
            an answer goes on to the end of the row.

    Returns:
        Booleans, the shape of `tokens`. A row without an end token is answer to its end.

    Raises:
        TypeError: an argument is not of integers; raised while tracing.
        ValueError: the shapes do not fit.

    Cost: two passes over the tokens.

    Examples:
        >>> tokens = jnp.array([[5, 6, 7, 9, 0], [5, 9, 6, 7, 8]])
        >>> jc.distillation.answer_mask(tokens, 2, end=9).astype(int)
        Array([[0, 0, 1, 1, 0],
               [0, 0, 1, 1, 1]], dtype=int32)

    Source: the outputs y of Agarwal et al. 2023, arXiv:2306.13649, section 2.
    """
    name = "answer_mask"
    _integers(name, "tokens", tokens, 1)
    tokens = jnp.asarray(tokens)
    _integers(name, "prompt_lengths", prompt_lengths, 0)
    if jnp.shape(prompt_lengths) not in ((), tokens.shape[:-1]):
        rule = f"be one number, or one per row: {list(tokens.shape[:-1])}"
        got = _check.describe(prompt_lengths)
        raise ValueError(_check.message(name, "prompt_lengths", rule, got))
    lengths = jnp.broadcast_to(jnp.asarray(prompt_lengths, jnp.int32), tokens.shape[:-1])
    places = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    answer = jnp.broadcast_to(places, tokens.shape) >= jnp.expand_dims(lengths, -1)
    if end is None:
        return answer
    _integers(name, "end", end, 0)
    if jnp.ndim(end) != 0:
        raise ValueError(_check.message(name, "end", "be one token", _check.describe(end)))
    ends = (answer & (tokens == jnp.asarray(end, tokens.dtype))).astype(jnp.int32)
    return answer & (jnp.cumsum(ends, -1) - ends == 0)


def next_tokens(tokens: ArrayLike, mask: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The token that each position predicts, and whether it counts: both moved one to the left.

    The logits at position i are for token i + 1. Instead of cutting them, which copies
    [..., length, classes], the tokens move; the last position predicts nothing and is masked.

    Args:
        tokens: integers, shape [..., length].
        mask: booleans, the same shape: which tokens are to be learned, as of `answer_mask`.

    Returns:
        `(labels, mask)`, both of the shape of `tokens`, aligned with the logits of both models.
        The last label is 0.

    Raises:
        TypeError: `tokens` are not integers, `mask` is not boolean; raised while tracing.
        ValueError: the shapes differ.

    Cost: a copy of the tokens.

    Examples:
        >>> tokens, mask = jnp.array([5, 6, 7]), jnp.array([False, True, True])
        >>> labels, mask = jc.distillation.next_tokens(tokens, mask)
        >>> labels, mask.astype(int)
        (Array([6, 7, 0], dtype=int32), Array([1, 1, 0], dtype=int32))

    Source: Kim & Rush 2016, arXiv:1606.07947, section 2: p(t_i | s, t_1 … t_{i-1}).
    """
    _integers("next_tokens", "tokens", tokens, 1)
    tokens = jnp.asarray(tokens)
    mask = token_mask("next_tokens", mask, tokens.shape)
    after = [(0, 0)] * (tokens.ndim - 1) + [(0, min(1, tokens.shape[-1]))]
    return jnp.pad(tokens[..., 1:], after), jnp.pad(mask[..., 1:], after)


def mix_sequences(key: jax.Array, sampled: PyTree, fixed: PyTree, fraction: ArrayLike) -> PyTree:
    r"""A batch whose sequences are the student's own with probability `fraction`, each.

    Trains on a mixture of the student's outputs and of given ones (of a data set, or of the
    teacher) with static shapes: a `fraction` of 1 is on-policy, one of 0 is supervised.

    Args:
        key: of `jax.random`.
        sampled: a tree of arrays, all of shape [sequences, ...]: tokens, masks, whatever
            belongs to the student's sequences.
        fixed: the same for the given ones, with equal structure, shapes and dtypes.
        fraction: :math:`\lambda`, 0 to 1. May be traced.

    Returns:
        A tree like both. A row comes whole from one of the two, the same in all leaves.

    Raises:
        TypeError: `key` is no key, `fraction` no real number, or dtypes differ.
        ValueError: the structures or shapes differ, leaves have no or different numbers of
            sequences, a known `fraction` is not in [0, 1].

    Cost: one pass over both. Both batches are made for every step; where sampling is dear,
    sample for a part of the batch, and join the two parts yourself.

    Examples:
        >>> sampled, fixed, key = jnp.ones((2, 3), int), jnp.zeros((2, 3), int), jax.random.key(0)
        >>> mixed = lambda fraction: jc.distillation.mix_sequences(key, sampled, fixed, fraction)
        >>> jax.vmap(mixed)(jnp.array([0.0, 1.0]))[:, :, 0]
        Array([[0, 0],
               [1, 1]], dtype=int32)

    Source: Agarwal et al. 2023, arXiv:2306.13649, algorithm 1. Differs: each sequence is drawn,
    where the paper draws once for a whole batch; the expected loss is the same, its variance
    less, and no branch is needed.
    """
    name = "mix_sequences"
    _check.key(name, key)
    _check.number(name, "fraction", fraction, 0.0, 1.0)
    ours, theirs = (jax.tree.map(_check.describe, x) for x in (sampled, fixed))
    if jax.tree.structure(sampled) != jax.tree.structure(fixed) or ours != theirs:
        rule = f"have the structure, shapes and dtypes of `sampled`, {ours}"
        kind = TypeError if _shapes(sampled) == _shapes(fixed) else ValueError
        raise kind(_check.message(name, "fixed", rule, theirs))
    leaves = jax.tree.leaves(sampled)
    counts = {jnp.shape(x)[:1] for x in leaves}
    if len(counts) != 1 or () in counts:
        raise ValueError(_check.message(name, "sampled", "have sequences as its first axis", ours))
    picked = jax.random.uniform(key, counts.pop(), jnp.float32)
    picked = picked < jnp.asarray(fraction, jnp.float32)

    def pick(a, b):
        rows = jnp.reshape(picked, picked.shape + (1,) * (jnp.ndim(a) - 1))
        return jnp.where(jnp.broadcast_to(rows, jnp.shape(a)), a, b)

    return jax.tree.map(pick, sampled, fixed)


def _shapes(x):
    return jax.tree.structure(x), [jnp.shape(leaf) for leaf in jax.tree.leaves(x)]


def token_mask(function: str, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """The mask, checked to be one boolean per token."""
    rule = f"be booleans of the shape {list(shape)}"
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(_check.message(function, "mask", rule, _check.describe(mask)))
    if jnp.shape(mask) != shape:
        raise ValueError(_check.message(function, "mask", rule, _check.describe(mask)))
    return jnp.asarray(mask)


def _integers(function: str, argument: str, x: Any, ndim: int = 0) -> None:
    wrong = x is None or isinstance(x, (bool, str, list))
    if wrong or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(_check.message(function, argument, "be integers", _check.describe(x)))
    if len(getattr(x, "shape", ())) < ndim:
        rule, got = "have a last axis of tokens", _check.describe(x)
        raise ValueError(_check.message(function, argument, rule, got))

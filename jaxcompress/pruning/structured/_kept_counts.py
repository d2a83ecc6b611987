"""How many units of each group stay, and which: the rules of `jc.select`, traced."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning._select import largest
from jaxcompress.pruning.structured._base import Group
from jaxcompress.pruning.structured._ladder import allowed_counts

# Of a size: what float32 can't tell from a whole number counts as one, as in `_ladder`.
_SLACK = 2.0**-20


def kept_by_rankings(
    rankings: Sequence[Sequence[Group]],
    scores: Mapping[str, jax.Array],
    sparsity: jax.Array,
    multiples: Mapping[str, int],
    floors: Mapping[str, float | int | None],
) -> dict[str, jax.Array]:
    """The masks of the units of the largest scores, by the name of the group.

    Args:
        rankings: groups that are ranked together.
        scores: by name `[*layers, size]`.
        sparsity: the fraction removed of the units of each ranking, float32.
        multiples: static. By name of what counts are multiples, unless all units stay.
        floors: static. By name the least count (an integer) or fraction, or None.
    """
    masks = {}
    for groups in rankings:
        counts = _counts(groups, scores, sparsity, multiples, floors)
        for group in groups:
            masks[group.name] = _largest_of_layers(scores[group.name], counts[group.name])
    return masks


def _counts(
    groups: Sequence[Group],
    scores: Mapping[str, jax.Array],
    sparsity: jax.Array,
    multiples: Mapping[str, int],
    floors: Mapping[str, float | int | None],
) -> dict[str, jax.Array]:
    size = sum(g.size for g in groups)
    target = jnp.floor((1.0 - sparsity) * np.float32(size) + np.float32(size * _SLACK))
    target = target.astype(jnp.int32)
    allowed = [allowed_counts(g.size, multiples[g.name], floors[g.name], g.size) for g in groups]
    if len(groups) == 1:
        choices = jnp.asarray(allowed[0], jnp.int32)
        fits = jnp.sum(choices <= target, dtype=jnp.int32)
        return {groups[0].name: choices[jnp.maximum(fits - 1, 0)]}
    # A step takes a group from one count to the next; those of the best units come first.
    least = np.asarray([counts[0] for counts in allowed], np.int32)
    widths = np.concatenate([np.diff(counts) for counts in allowed]).astype(np.int32)
    owners = np.repeat(np.arange(len(groups)), [len(counts) - 1 for counts in allowed])
    values = [
        _of_steps(_by_rank(scores[g.name]), options)
        for g, options in zip(groups, allowed, strict=True)
    ]
    order = jnp.argsort(-jnp.concatenate(values), stable=True)
    falling = jnp.asarray(widths)[order]
    taken = np.sum(least, dtype=np.int32) + jnp.cumsum(falling) <= target
    grown = jax.ops.segment_sum(
        jnp.where(taken, falling, jnp.zeros_like(falling)),
        jnp.asarray(owners, jnp.int32)[order],
        num_segments=len(groups),
    )
    return {g.name: least[i] + grown[i] for i, g in enumerate(groups)}


def _of_steps(ranks: jax.Array, options: np.ndarray) -> jax.Array:
    """The mean score of what each step adds."""
    steps = np.arange(options[0], options[-1])
    if not len(steps):
        return jnp.zeros((0,), ranks.dtype)
    owners = np.searchsorted(options, steps, side="right") - 1
    sums = jax.ops.segment_sum(ranks[options[0] :], owners, num_segments=len(options) - 1)
    return _known(sums / jnp.asarray(np.diff(options), ranks.dtype))


def _by_rank(scores: jax.Array) -> jax.Array:
    """The scores of each rank, falling: of the layers of a scan, which lose as many, the mean."""
    falling = -jnp.sort(-_known(scores), axis=-1)
    return _known(jnp.mean(falling.reshape(-1, scores.shape[-1]), axis=0))


def _known(scores: jax.Array) -> jax.Array:
    """NaN ranks below every number."""
    return jnp.where(jnp.isnan(scores), jnp.array(-jnp.inf, scores.dtype), scores)


def _largest_of_layers(scores: jax.Array, count: jax.Array) -> jax.Array:
    if scores.ndim == 1 or scores.size == 0:
        return largest(scores, count)
    rows = scores.reshape(-1, scores.shape[-1])
    return jax.vmap(lambda row: largest(row, count))(rows).reshape(scores.shape)

"""The algebra of masks, and how much two of them share."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning import _threshold


class Overlap(NamedTuple):
    """How much two masks share.

    Attributes:
        both: uint32, entries that both keep.
        first: uint32, entries that the first alone keeps.
        second: uint32, entries that the second alone keeps.
        jaccard: float32, `both` over all that either keeps; 1 where none keeps any.
        expected: float32, the Jaccard index that random masks of the same densities would have
            on average, up to terms of one over the size.
    """

    both: jax.Array
    first: jax.Array
    second: jax.Array
    jaccard: jax.Array
    expected: jax.Array


def invert(masks: PyTree) -> PyTree:
    """True where a mask is False; None stays.

    Examples:
        >>> jc.pruning.invert({"w": jnp.array([True, False]), "b": None})
        {'b': None, 'w': Array([False,  True], dtype=bool)}
    """
    return jax.tree.map(jnp.logical_not, _boolean("invert", masks))


def union(*masks: PyTree) -> PyTree:
    """True where at least one mask is: trees of one structure, None at the same leaves.

    Examples:
        >>> jc.pruning.union({"w": jnp.array([True, False])}, {"w": jnp.array([False, False])})
        {'w': Array([ True, False], dtype=bool)}
    """
    return jax.tree.map(lambda *keeps: jnp.any(jnp.stack(keeps), 0), *_alike("union", masks))


def intersection(*masks: PyTree) -> PyTree:
    """True where all masks are: trees of one structure, None at the same leaves.

    Examples:
        >>> both = {"w": jnp.array([True, True])}, {"w": jnp.array([True, False])}
        >>> jc.pruning.intersection(*both)
        {'w': Array([ True, False], dtype=bool)}
    """
    return jax.tree.map(lambda *keeps: jnp.all(jnp.stack(keeps), 0), *_alike("intersection", masks))


def overlap(first: PyTree, second: PyTree) -> dict[str, Overlap]:
    r"""How much two trees of masks share, for each leaf and in all.

    .. math:: J = \frac{|A \cap B|}{|A \cup B|}, \qquad
        J_0 = \frac{d_A d_B}{d_A + d_B - d_A d_B}

    Args:
        first: a tree of `bool` arrays, as of `jc.pruning.nonzero`.
        second: the same structure and shapes.

    Returns:
        From the path of each leaf to its `Overlap`; that of all leaves together under `""`.
        Works under `jit` and `vmap`.

    Raises:
        TypeError: a leaf is not boolean.
        ValueError: the trees have other paths, or a leaf another shape.

    Cost: one pass of counting over both.

    Examples:
        >>> a, b = {"w": jnp.array([True, True, False])}, {"w": jnp.array([False, True, True])}
        >>> jc.pruning.overlap(a, b)[""].jaccard
        Array(0.33333334, dtype=float32)

    Source: Jaccard 1912; for masks of different seeds, as in Evci et al. 2020,
    arXiv:1911.11134, and Paul et al. 2023, arXiv:2210.03044.
    """
    one, two = (tree.by_path("overlap", "masks", m) for m in _alike("overlap", (first, second)))
    out, counts, size = {}, jnp.zeros(3, jnp.uint32), 0
    for path, a in one.items():
        b = two[path]
        shared = _threshold.count([a & b, a & ~b, ~a & b])
        out[path] = _overlap(shared, a.size)
        counts, size = counts + shared, size + a.size
    return out | {"": _overlap(counts, size)}


def _overlap(counts: jax.Array, size: int) -> Overlap:
    both, first, second = counts
    either = (both + first + second).astype(jnp.float32)
    one, two = ((both + x).astype(jnp.float32) / max(size, 1) for x in (first, second))
    expected = one + two - one * two
    return Overlap(
        both,
        first,
        second,
        jnp.where(either > 0, both.astype(jnp.float32) / jnp.maximum(either, 1.0), 1.0),
        jnp.where(expected > 0, one * two / jnp.where(expected > 0, expected, 1.0), 1.0),
    )


def _alike(function: str, masks: Sequence[PyTree]) -> list[PyTree]:
    """All trees boolean, with the leaves and shapes of the first."""
    if not masks:
        raise TypeError(_check.message(function, "masks", "hold at least one tree", "none"))
    checked = [_boolean(function, each) for each in masks]
    first = tree.by_path(function, "masks", checked[0])
    for each in checked[1:]:
        other = tree.by_path(function, "masks", each)
        if set(first) != set(other):
            rule, got = "have the same leaves", sorted(set(first) ^ set(other))
            text = _check.message(function, "masks", rule, f"trees that differ in {got}")
            raise ValueError(text)
        for path, a in first.items():
            if a.shape != other[path].shape:
                rule, got = f"have the same shape {list(a.shape)}", _check.describe(other[path])
                raise ValueError(_check.message(function, "masks", rule, got, path=path))
    return checked


def _boolean(function: str, masks: PyTree) -> PyTree:
    def leaf(path, mask):
        if not hasattr(mask, "dtype") or mask.dtype != bool:
            got = _check.describe(mask)
            raise TypeError(_check.message(function, "masks", "be boolean", got, path=path))
        return jnp.asarray(mask)

    return tree.map_with_path(leaf, masks)

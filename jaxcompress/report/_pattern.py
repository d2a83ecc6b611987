"""Which pattern the zeros of a leaf have: blocks, N:M, or none."""

import math

import numpy as np

_LENGTHS = (2, 4, 8, 16)
_LEAST_GROUPS = 16


def pattern(dense: np.ndarray) -> str:
    """The pattern of the exact zeros.

    `"4×4 blocks"`: the largest block, laid from the origin, of which each is zero as a whole or
    has no zero; a whole axis counts as its length, so that pruned output channels of a kernel
    of 128 inputs are `"128×1 blocks"`. `"2:4 along axis -2"`: at most two of each four live, and
    at least 90% of that many, in 16 groups or more; the shortest of 2, 4, 8 and 16 that fits,
    the axis from the last but one to the others. Else `"unstructured"`; empty without zeros, and
    `"all zero"` without anything else.
    """
    alive = dense != 0
    count = int(np.count_nonzero(alive))
    if count == alive.size:
        return ""
    if count == 0:
        return "all zero"
    block = _block(alive)
    if math.prod(block) > 1:
        return "×".join(map(str, block)) + (" blocks" if len(block) > 1 else " in a block")
    for m in _LENGTHS:
        for axis in (-2, -1, *range(-3, -alive.ndim - 1, -1)):
            n = _most_of(alive, m, axis, count) if axis >= -alive.ndim else None
            if n is not None:
                return f"{n}:{m} along axis {axis}"
    return "unstructured"


def _block(alive: np.ndarray) -> tuple[int, ...]:
    """Blocks are uniform just where their edges are: at multiples of their length."""
    sizes = []
    for axis, length in enumerate(alive.shape):
        others = tuple(a for a in range(alive.ndim) if a != axis)
        ahead = np.take(alive, range(1, length), axis)
        behind = np.take(alive, range(length - 1), axis)
        edges = np.flatnonzero(np.any(ahead != behind, axis=others)) + 1
        sizes.append(math.gcd(*edges.tolist()) if edges.size else length)
    return tuple(sizes)


def _most_of(alive: np.ndarray, m: int, axis: int, count: int) -> int | None:
    """The n of n:m, where it says nearly all of how many live; the last short group is free."""
    length = alive.shape[axis]
    whole = length - length % m
    if alive.size // max(length, 1) * (whole // m) < _LEAST_GROUPS:
        return None
    groups = np.moveaxis(alive, axis, -1)[..., :whole]
    n = int(groups.reshape(*groups.shape[:-1], -1, m).sum(-1).max())
    return n if 0 < n < m and count >= 0.9 * n / m * alive.size else None

"""Choosing the residual blocks to leave out."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Dependencies, Keep
from jaxcompress.pruning.structured._blocks import Dropped, require_blocks
from jaxcompress.tracing._jaxprs import is_array
from jaxcompress.tracing._residual_blocks import ResidualBlock


def select_blocks(
    blocks: Iterable[ResidualBlock],
    scores: Mapping[str, Any],
    *,
    drop: int | None = None,
    keep: float | None = None,
) -> tuple[Dropped, ...]:
    """The blocks with the lowest scores, to leave out.

    Args:
        blocks: those to choose from, of `jc.pruning.residual_blocks`. Leave out of them what
            has to stay.
        scores: by name a number, for a scan over layers one for each layer; as of
            `jc.pruning.block_influence`. The lowest go first, of equal ones the later.
        drop: static. How many go: each layer of a scan counts, and what is inside of a block
            that goes does not.
        keep: static. Or which fraction stays, in [0, 1]; rounded so that no more go.

    Returns:
        What `jc.pruning.drop_blocks` takes, in the order of `blocks`. A block that contains one
        with a lower score, or is inside of one, is passed over.

    Raises:
        TypeError: scores are traced: which blocks there are is static.
        ValueError: a block has no score, or not one for each layer; a score is NaN; not one of
            `drop` and `keep`; there are fewer blocks than `drop`.

    Examples:
        >>> fn = lambda p, x: x + jnp.tanh(x @ p["a"]) + 1e-3 * jnp.tanh(x @ p["b"])
        >>> params, x = {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(fn, params, x)
        >>> scores = jc.pruning.block_change(fn, params, [x], blocks)
        >>> [gone.block.name for gone in jc.pruning.select_blocks(blocks, scores, drop=1)]
        ['b']
    """
    blocks = require_blocks("select_blocks", blocks)
    units: list[tuple[float, int, int]] = []
    for i, block in enumerate(blocks):
        score = _score(block, scores)
        units += [(float(value), -i, -layer) for layer, value in enumerate(np.atleast_1d(score))]
    count = _count(len(units), drop, keep)
    chosen: dict[int, list[int]] = {}
    for _, i, layer in sorted(units):
        if count == 0:
            break
        if not any(_overlap(blocks[-i], blocks[j]) for j in chosen if j != -i):
            chosen.setdefault(-i, []).append(-layer)
            count -= 1
    if count > 0:
        rule = "be at most the number of blocks of which none is inside of another"
        raise ValueError(_check.message("select_blocks", "drop", rule, drop))
    return tuple(
        Dropped(blocks[i], tuple(k not in chosen[i] for k in range(blocks[i].layers)))
        for i in sorted(chosen)
    )


def keep_blocks(params_or_keep: PyTree | Keep, dropped: Iterable[Dropped]) -> Keep:
    """What `jc.shrink` takes to leave blocks out, alone or with channels.

    Args:
        params_or_keep: the params, arrays or shapes, to leave blocks out only; or what
            `jc.select` chose, to leave them out, too.
        dropped: of `jc.pruning.select_blocks`.

    Returns:
        A `Keep` with these blocks.

    Examples:
        >>> fn = lambda p, x: x + jnp.tanh(x @ p["w"])
        >>> params, x = {"w": jnp.eye(2)}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(fn, params, x)
        >>> dropped = jc.pruning.select_blocks(blocks, {"w": 0.1}, drop=1)
        >>> jc.pruning.keep_blocks(params, dropped).blocks[0].block.name
        'w'
    """
    if isinstance(params_or_keep, Keep):
        return dataclasses.replace(params_or_keep, blocks=tuple(dropped))
    leaves = tree.by_path("keep_blocks", "params", params_or_keep)
    shapes = {
        path: jax.ShapeDtypeStruct(w.shape, w.dtype) for path, w in leaves.items() if is_array(w)
    }
    return Keep(Dependencies((), (), shapes), {}, tuple(dropped))


def _score(block: ResidualBlock, scores: Mapping[str, Any]) -> np.ndarray:
    if block.name not in scores:
        got = f"{sorted(scores)}"
        rule = "have a score for each block"
        raise ValueError(_check.message("select_blocks", "scores", rule, got, path=block.name))
    score = scores[block.name]
    if _check.is_traced(score):
        rule = "be known numbers: which blocks there are is static"
        got = _check.describe(score)
        fix = "Choose outside of jit, or use jc.pruning.gate_blocks."
        raise TypeError(_check.message("select_blocks", "scores", rule, got, fix, path=block.name))
    shape = (block.layers,) if block.layers else ()
    array = np.asarray(score, np.float64)
    if array.shape != shape or np.isnan(array).any():
        rule = f"be numbers of shape {list(shape)}"
        got = f"{array.tolist()}"
        raise ValueError(_check.message("select_blocks", "scores", rule, got, path=block.name))
    return array


def _count(units: int, drop: int | None, keep: float | None) -> int:
    if (drop is None) == (keep is None):
        rule = "be given, or `keep`, and not both"
        raise ValueError(_check.message("select_blocks", "drop", rule, f"{drop} and {keep}"))
    if drop is not None:
        _check.integer("select_blocks", "drop", drop, 0, units)
        return drop
    if _check.is_traced(keep):
        rule = "be a static number"
        raise TypeError(_check.message("select_blocks", "keep", rule, _check.describe(keep)))
    _check.number("select_blocks", "keep", keep, 0, 1)
    assert keep is not None
    # 0.9 of 10 stay 9, although 0.1 * 10 falls short of 1 in floating point.
    return units - math.ceil(round(keep * units, 6))


def _overlap(a: ResidualBlock, b: ResidualBlock) -> bool:
    mine, others = set(a.parts), set(b.parts)
    return bool(mine & others or mine & set(b.contains) or others & set(a.contains))

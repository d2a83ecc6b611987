"""Scores of residual blocks: what they change in the stream, in the result, in the loss."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._blocks import gate_blocks, require_blocks
from jaxcompress.tracing._dropped import execute, plan
from jaxcompress.tracing._jaxprs import trace
from jaxcompress.tracing._residual_blocks import ResidualBlock, blocks_of
from jaxcompress.tracing._sites import require_function

Scores = dict[str, jax.Array]
"""By the name of a block its score, float32; of a scan over layers one for each layer."""


def block_influence(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    blocks: Iterable[ResidualBlock],
    *,
    axis: int = -1,
) -> Scores:
    r"""How far each block turns the stream that it adds to.

    .. math:: \mathrm{BI} = 1 - \mathbb{E}\,
        \frac{x^\top y}{\lVert x \rVert\,\lVert y \rVert}, \quad y = x + f(x)

    Args:
        fn: any function `fn(params, *batch)`.
        params: any pytree.
        batches: an iterable. A tuple is all further arguments of `fn`, anything else one.
        blocks: static. Of `jc.pruning.residual_blocks`.
        axis: static. Of the features of `x`; the mean is over all others, in all batches.

    Returns:
        By name a score of 0 (`y` is a multiple of `x`) to 2; for a scan over layers one for each
        layer, `[layers]`. Of several blocks as one, `x` is what the first gets and `y` what the
        last leaves. Of blocks side by side, `x` is `y` without the block.

    Raises:
        ValueError: there is no batch or no block, or `fn` has no such block.
        TypeError: `fn` can't be called.

    Cost: that of `fn` once a batch, compiled once for each shape of batch; activations are
    compared where they are and not kept.

    Examples:
        >>> fn = lambda p, x: x + x @ p["w"]
        >>> params, x = {"w": jnp.array([[0.0, 1.0], [-1.0, 0.0]])}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(fn, params, x)
        >>> jc.pruning.block_influence(fn, params, [x], blocks)["w"].round(4)
        Array(0.2929, dtype=float32)

    Source: Men et al. 2024, arXiv:2403.03853 (ShortGPT), equation 2. Differs: of any block, not
    of whole layers alone.
    """

    def compare(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        norms = jnp.sqrt(jnp.sum(x * x, axis) * jnp.sum(y * y, axis))
        same = jnp.where(jnp.all(x == y, axis), jnp.ones_like(norms), jnp.zeros_like(norms))
        cosine = jnp.where(norms > 0, jnp.sum(x * y, axis) / jnp.where(norms > 0, norms, 1), same)
        return {"cosine": jnp.sum(cosine), "count": jnp.full((), cosine.size, jnp.float32)}

    sums = _compared("block_influence", fn, params, batches, blocks, compare)
    return {name: 1 - record["cosine"] / record["count"] for name, record in sums.items()}


def block_change(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    blocks: Iterable[ResidualBlock],
) -> Scores:
    r"""How much each block adds, relative to the stream.

    .. math:: \lVert y - x \rVert \, / \, \lVert x \rVert, \quad y = x + f(x)

    Args:
        fn: any function `fn(params, *batch)`.
        params: any pytree.
        batches: an iterable. A tuple is all further arguments of `fn`, anything else one.
        blocks: static. Of `jc.pruning.residual_blocks`.

    Returns:
        As `jc.pruning.block_influence`; norms are over all of `x` and all batches. Infinite where
        all of `x` is zero and the block adds something.

    Raises:
        ValueError: there is no batch or no block, or `fn` has no such block.
        TypeError: `fn` can't be called.

    Cost: as of `jc.pruning.block_influence`.

    Examples:
        >>> fn = lambda p, x: x + x @ p["w"]
        >>> params, x = {"w": 0.5 * jnp.eye(2)}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(fn, params, x)
        >>> jc.pruning.block_change(fn, params, [x], blocks)["w"]
        Array(0.5, dtype=float32)
    """

    def compare(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return {"change": jnp.sum(jnp.square(y - x)), "size": jnp.sum(jnp.square(x))}

    sums = _compared("block_change", fn, params, batches, blocks, compare)
    return {name: _ratio(record["change"], record["size"]) for name, record in sums.items()}


def output_change(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    blocks: Iterable[ResidualBlock],
) -> Scores:
    """What the result of a function changes by without each block: `|z' - z| / |z|`.

    Args:
        fn: any function `fn(params, *batch)`.
        params: any pytree.
        batches: an iterable. A tuple is all further arguments of `fn`, anything else one.
        blocks: static. Of `jc.pruning.residual_blocks`.

    Returns:
        By name a score of at least 0; for a scan over layers one for each layer. Norms are
        over all batches and all floating-point results of `fn`.

    Raises:
        ValueError: there is no batch or no block, or `fn` has no such block.
        TypeError: `fn` can't be called.

    Cost: that of `fn` once a batch and once more for each block and each layer of a scan,
    compiled once for each shape of batch.

    Examples:
        >>> fn = lambda p, x: x + x @ p["w"]
        >>> params, x = {"w": jnp.eye(2)}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(fn, params, x)
        >>> jc.pruning.output_change(fn, params, [x], blocks)["w"]
        Array(0.5, dtype=float32)
    """
    require_function("output_change", fn)

    def compare(without, result):
        pairs = [
            (a.astype(jnp.float32), b.astype(jnp.float32))
            for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(result), strict=True)
            if jnp.issubdtype(b.dtype, jnp.floating)
        ]
        change = sum((jnp.sum(jnp.square(a - b)) for a, b in pairs), jnp.zeros(()))
        return change, sum((jnp.sum(jnp.square(b)) for _, b in pairs), jnp.zeros(()))

    found = _without("output_change", fn, params, batches, blocks, compare)
    return {name: _ratio(change, size) for name, (change, size) in found.items()}


def loss_change(
    loss: Callable[..., jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    blocks: Iterable[ResidualBlock],
) -> Scores:
    """What a loss rises by without each block.

    Args:
        loss: any function `loss(params, *batch)` that gives a scalar.
        params: any pytree.
        batches: an iterable. A tuple is all further arguments of `loss`, anything else one.
        blocks: static. Of `jc.pruning.residual_blocks(loss, params, *batch)`; where the loss
            calls a model, also of the model.

    Returns:
        By name the mean over the batches of the loss without the block less that with it, which
        may be negative; for a scan over layers one for each layer.

    Raises:
        ValueError: there is no batch or no block, `loss` has no such block, or is no scalar.
        TypeError: `loss` can't be called.

    Cost: as of `jc.pruning.output_change`.

    Examples:
        >>> model = lambda p, x: x + x @ p["w"]
        >>> loss = lambda p, x, y: ((model(p, x) - y) ** 2).mean()
        >>> params, x = {"w": jnp.eye(2)}, jnp.ones((3, 2))
        >>> blocks = jc.pruning.residual_blocks(model, params, x)
        >>> jc.pruning.loss_change(loss, params, [(x, 2 * x)], blocks)["w"]
        Array(1., dtype=float32)
    """
    require_function("loss_change", loss)

    def compare(without, result):
        if getattr(result, "shape", None) != ():
            rule = "give one number, an array without axes"
            got = _check.describe(result)
            raise ValueError(_check.message("loss_change", "loss", rule, got, "Take the mean."))
        return (without - result).astype(jnp.float32), jnp.ones(())

    found = _without("loss_change", loss, params, batches, blocks, compare)
    return {name: change / count for name, (change, count) in found.items()}


def _compared(function, fn, params, batches, blocks, compare) -> dict[str, Any]:
    """The sums over all batches of what `compare` says of each block."""
    require_function(function, fn)
    blocks = require_blocks(function, blocks)

    @jax.jit
    def run(params, batch):
        traced = trace(fn, (params, *batch), {}, parts=True)
        found = blocks_of(traced)
        require_blocks(function, blocks, found)
        probes = {block.name: block.parts for block in blocks}
        return execute(plan(found, probes=probes, compare=compare), traced.leaves)[1]

    sums = None
    for batch in batches:
        new = run(params, batch if isinstance(batch, tuple) else (batch,))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    if sums is None:
        raise ValueError(_no_batch(function))
    return {block.name: sums[block.name] for block in blocks}


def _without(function, fn, params, batches, blocks, compare) -> dict[str, Any]:
    """The sums over all batches of what `compare` says of the results without each block."""
    blocks = require_blocks(function, blocks)
    gated = gate_blocks(fn, blocks)
    whole = {
        block.name: jnp.ones((block.layers,) if block.layers else (), bool) for block in blocks
    }
    result_of = jax.jit(lambda params, batch: fn(params, *batch))

    @jax.jit
    def run(params, gates, batch, result):
        return compare(gated(params, gates, *batch), result)

    sums: dict[str, Any] = {}
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        result = result_of(params, batch)
        for block in blocks:
            gate = whole[block.name]
            # Each layer of a scan in turn; all with the one program.
            closed = [~jnp.eye(block.layers, dtype=bool)[i] for i in range(block.layers)]
            runs = [
                run(params, whole | {block.name: one}, batch, result)
                for one in closed or [jnp.zeros_like(gate)]
            ]
            new = jax.tree.map(lambda *x: jnp.stack(x), *runs) if block.layers else runs[0]
            old = sums.get(block.name)
            sums[block.name] = new if old is None else jax.tree.map(jnp.add, old, new)
    if not sums:
        raise ValueError(_no_batch(function))
    return sums


def _ratio(change: jax.Array, size: jax.Array) -> jax.Array:
    found = jnp.sqrt(change) / jnp.sqrt(size)
    return jnp.where(change == 0, jnp.zeros_like(found), found)


def _no_batch(function: str) -> str:
    return _check.message(function, "batches", "hold at least one batch", "none")

"""Scores from gradients on data: what the loss would lose with each weight."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.pruning._score_trees import is_floating, score_of_unchosen, wide

Loss = Callable[..., jax.Array]
"""`loss(params, *batch) -> scalar`."""


def snip(loss: Loss, params: PyTree, batches: Iterable[Any]) -> PyTree:
    r"""How much the loss feels each connection, :math:`|w\,\partial L/\partial w|`.

    Args:
        loss: a function `loss(params, *batch) -> scalar`, the mean over the examples.
        params: any pytree. Only real floating-point leaves are differentiated.
        batches: an iterable, as in `jc.calibrate`. A tuple is all further arguments of `loss`,
            anything else one. Gradients are averaged over batches, each counting the same.

    Returns:
        A tree of scores for `jc.prune(…, score=scores, scope="global")`: shapes of `params`,
        in float32 or wider; zeros at leaves of integers, booleans and complex numbers, None
        at what is no array. A weight whose gradient is NaN scores NaN, which goes first.

    Raises:
        TypeError: `loss` can't be called.
        ValueError: there is no batch, or `loss` returns no real scalar; raised while tracing.

    Cost: one gradient a batch, under `jit`, compiled once for each shape of batch. Memory: two
    gradients.

    Examples:
        >>> loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)
        >>> batches = [(jnp.array([[1.0, 0.0]]), jnp.array([0.0]))]
        >>> jc.pruning.snip(loss, {"w": jnp.array([3.0, 5.0])}, batches)
        {'w': Array([18.,  0.], dtype=float32)}

    Source: Lee et al. 2019, arXiv:1810.02340. Differs: not divided by its
    sum, which orders nothing.
    """
    return _scores("snip", loss, params, batches, _gradient, lambda w, g: jnp.abs(w * g))


def taylor(loss: Loss, params: PyTree, batches: Iterable[Any]) -> PyTree:
    r"""The squared first-order change of the loss, :math:`\overline{(w\,\partial L/\partial w)^2}`.

    The mean is that over batches of the squares, so gradients that differ in sign from batch
    to batch do not cancel, as they do in `snip`.

    Args:
        loss: as in `snip`.
        params: as in `snip`.
        batches: as in `snip`.

    Returns:
        A tree of scores, as of `snip`.

    Raises:
        TypeError: as `snip`.
        ValueError: as `snip`.

    Cost: as `snip`.

    Examples:
        >>> loss = lambda p, x: jnp.sum(x * p["w"])
        >>> batches = [jnp.array([1.0, 2.0]), jnp.array([-1.0, 2.0])]
        >>> jc.pruning.taylor(loss, {"w": jnp.array([1.0, 0.5])}, batches)
        {'w': Array([1., 1.], dtype=float32)}

    Source: Molchanov et al. 2019, arXiv:1906.10771, equation 8.
    """

    return _scores("taylor", loss, params, batches, _squared, lambda w, f: jnp.square(w) * f)


def fisher(
    loss: Loss, params: PyTree, batches: Iterable[Any], *, per_example: bool = True
) -> PyTree:
    r"""The diagonal of optimal brain damage, with the empirical Fisher for the Hessian.

    .. math:: \tfrac12\, w^2 F, \qquad F = \frac1N \sum_{n=1}^N
        \left(\frac{\partial L_n}{\partial w}\right)^2

    Args:
        loss: as in `snip`.
        params: as in `snip`.
        batches: as in `snip`.
        per_example: static. Whether :math:`L_n` is the loss of one example, handed to `loss`
            as a batch of one: each array of a batch has one leading axis of examples, and one
            without axes (a PRNG key) goes to every example. False: the loss of one batch, for a
            loss whose examples depend on each other. Squares of means are smaller than means
            of squares, about as many times as there are examples in a batch, and noisier.

    Returns:
        A tree of scores, as of `snip`.

    Raises:
        TypeError: as `snip`.
        ValueError: as `snip`, or arrays of a batch that differ in their leading axis.

    Cost: with `per_example` that of a gradient per example, vectorized; memory up to as many
    gradients as there are examples in a batch, so use small batches for large models.

    Examples:
        >>> loss = lambda p, x: jnp.mean(x @ p["w"])
        >>> x = jnp.array([[1.0, 2.0], [-1.0, 2.0]])
        >>> jc.pruning.fisher(loss, {"w": jnp.array([1.0, 1.0])}, [x])
        {'w': Array([0.5, 2. ], dtype=float32)}
        >>> jc.pruning.fisher(loss, {"w": jnp.array([1.0, 1.0])}, [x], per_example=False)
        {'w': Array([0., 2.], dtype=float32)}

    Source: LeCun et al. 1989, "Optimal brain damage"; Theis et al. 2018, arXiv:1801.05787;
    Singh & Alistarh 2020, arXiv:2004.14340.
    """

    def examplewise(loss_of, weights, batch):
        count, axes = _examples(batch)
        flat, treedef = jax.tree.flatten(batch)

        def one(*example):
            alone = [x[None] if axis == 0 else x for x, axis in zip(example, axes, strict=True)]
            return _squared(loss_of, weights, jax.tree.unflatten(treedef, alone))[1]

        squares = jax.vmap(one, in_axes=tuple(axes))(*flat)
        return count, jax.tree.map(lambda x: jnp.sum(x, axis=0), squares)

    measure = examplewise if per_example else _squared
    damage = lambda w, f: 0.5 * jnp.square(w) * f  # noqa: E731
    return _scores("fisher", loss, params, batches, measure, damage)


def grasp(loss: Loss, params: PyTree, batches: Iterable[Any]) -> PyTree:
    r"""How much gradient flow is lost with each weight, :math:`w\,(H g)`.

    Without weight q the squared norm of the gradient, by which training lowers the loss at
    first, is :math:`g^\top g - 2\,w_q (H g)_q` to first order. The paper scores
    :math:`S = -w\,(Hg)` and removes the weights of the largest S. Here the largest stay, so
    the sign is the other one: positive where the flow would shrink, negative where it would
    grow.

    Args:
        loss: as in `snip`. The paper divides the logits by a temperature of 200.
        params: as in `snip`.
        batches: as in `snip`, but read twice: of a generator all batches are held. g is the
            mean over the batches before it meets the Hessian, their mean too.

    Returns:
        A tree of scores of both signs, as of `snip`. Prune all at once, at initialization.

    Raises:
        TypeError: as `snip`.
        ValueError: as `snip`.

    Cost: a gradient and a product of the Hessian with a vector a batch (forward over reverse),
    three to four gradients in all; H is never formed.

    Examples:
        >>> loss = lambda p, a: 0.5 * jnp.sum(a * p["w"] ** 2)
        >>> jc.pruning.grasp(loss, {"w": jnp.array([1.0, 2.0])}, [jnp.array([2.0, -1.0])])
        {'w': Array([4., 4.], dtype=float32)}

    Source: Wang et al. 2020, arXiv:2002.07376. Differs: the sign;
    all floating-point leaves are part of g and H, where the published code leaves biases out;
    not divided by the sum.
    """
    batches = list(batches)
    parts = parts_of("grasp", loss, params)
    flow = mean_of("grasp", parts, batches, _gradient)

    def curvature(loss_of, weights, batch, flow):
        tangents = jax.tree.map(lambda w, g: g.astype(w.dtype), weights, flow)
        gradient = jax.grad(lambda w: loss_of(w, batch))
        return 1.0, jax.tree.map(wide, jax.jvp(gradient, (weights,), (tangents,))[1])

    return combined(parts, mean_of("grasp", parts, batches, curvature, flow), lambda w, hg: w * hg)


class _Parts(NamedTuple):
    """Params taken apart: flat lists with None where a leaf is of the other kind."""

    weights: list[jax.Array | None]
    others: list[jax.Array | None]
    treedef: Any
    loss_of: Callable[..., jax.Array]


def parts_of(function: str, loss: Loss, params: PyTree) -> _Parts:
    if not callable(loss):
        rule, fix = "be a function of the params", "Pass the loss first and the params second."
        raise TypeError(_check.message(function, "loss", rule, _check.describe(loss), fix))
    flat, treedef = jax.tree.flatten(params)
    weights = [x if is_floating(x) else None for x in flat]
    others = [x if hasattr(x, "dtype") and not is_floating(x) else None for x in flat]
    # What is no array can't pass through jit.
    static = [None if hasattr(x, "dtype") else x for x in flat]

    def loss_of(weights, others, batch):
        kinds = zip(weights, others, static, strict=True)
        leaves = [s if w is None and o is None else o if w is None else w for w, o, s in kinds]
        batch = batch if isinstance(batch, tuple) else (batch,)
        value = loss(jax.tree.unflatten(treedef, leaves), *batch)
        if not is_floating(value) or value.shape != ():
            rule, fix = "return a real floating-point scalar", "Take the mean over the examples."
            raise ValueError(_check.message(function, "loss", rule, _check.describe(value), fix))
        return value

    return _Parts(weights, others, treedef, loss_of)


def _scores(function, loss, params, batches, measure, combine) -> PyTree:
    parts = parts_of(function, loss, params)
    return combined(parts, mean_of(function, parts, batches, measure), combine)


def mean_of(function: str, parts: _Parts, batches: Iterable[Any], measure, *extra) -> list:
    """The mean over batches of what `measure(loss_of, weights, batch, *extra)` counts and sums."""

    @jax.jit
    def one(weights, others, batch, *extra):
        loss_of = lambda w, batch: parts.loss_of(w, others, batch)  # noqa: E731
        count, sums = measure(loss_of, weights, batch, *extra)
        return jnp.asarray(count, jnp.float32), sums

    total = None
    for batch in batches:
        new = one(parts.weights, parts.others, batch, *extra)
        total = new if total is None else jax.tree.map(jnp.add, total, new)
    if total is None:
        rule = "hold at least one batch"
        raise ValueError(_check.message(function, "batches", rule, "none"))
    count = jnp.maximum(total[0], 1.0)
    return jax.tree.map(lambda x: x / count.astype(x.dtype), total[1])


def _gradient(loss_of, weights: list, batch: Any):
    return 1.0, jax.tree.map(wide, jax.grad(loss_of)(weights, batch))


def _squared(loss_of, weights: list, batch: Any):
    count, gradient = _gradient(loss_of, weights, batch)
    return count, jax.tree.map(jnp.square, gradient)


def _examples(batch: Any) -> tuple[int, list[int | None]]:
    """How many there are, and for each array of a batch where they lie."""
    flat = jax.tree.leaves(batch)
    lengths = {x.shape[0] for x in flat if jnp.ndim(x) > 0}
    if len(lengths) != 1:
        rule = "have one leading axis of examples in all arrays"
        got, fix = [_check.describe(x) for x in flat], "Or pass per_example=False."
        raise ValueError(_check.message("fisher", "batches", rule, got, fix))
    return lengths.pop(), [0 if jnp.ndim(x) > 0 else None for x in flat]


def combined(parts: _Parts, found: list, combine) -> PyTree:
    scores = [
        score_of_unchosen(other) if w is None else combine(wide(w), x)
        for w, other, x in zip(parts.weights, parts.others, found, strict=True)
    ]
    return jax.tree.unflatten(parts.treedef, scores)

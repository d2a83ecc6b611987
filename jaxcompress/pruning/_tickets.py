"""Pruning in rounds, each trained from an earlier point: lottery tickets and rewinding."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection, kept_by
from jaxcompress.pruning._custom import apply_masks
from jaxcompress.pruning._prune import prune

Train = Callable[[PyTree, PyTree, int, int], PyTree]
"""`train(params, masks, begin, end) -> params`, from step `begin` to step `end`."""


class Ticket(NamedTuple):
    """A round of `lottery_tickets`.

    Attributes:
        sparsity: that was asked for; 0 in the first round, which is dense.
        params: trained, zero where not kept.
        masks: `bool` arrays at the leaves that are pruned, None at the others.
    """

    sparsity: float
    params: PyTree
    masks: PyTree


def lottery_tickets(
    train: Train,
    params: PyTree,
    sparsities: Iterable[float],
    *,
    steps: int,
    rewind_to: int = 0,
    reset_weights: bool = True,
    method: Callable[[ArrayLike], Projection] = prune,
) -> Iterator[Ticket]:
    r"""Trains, prunes and rewinds, round after round, with any training function.

    .. math:: w_k = T_{0 \to k}(w_0), \qquad m_0 = 1, \qquad
        m_r = m_{r-1} \wedge \mathrm{method}(s_r)(w^{(r-1)}), \qquad
        w^{(r)} = T_{k \to n}(m_r \odot w_k)

    Args:
        train: `train(params, masks, begin, end) -> params`, your training from step `begin`
            to step `end` of its schedules and data, with the masks held: by
            `jc.projected(optimizer, jc.pruning.from_masks(masks))`. Give `masks` to the function
            that you `jit` and it compiles once.
        params: at initialization, :math:`w_0`; any pytree.
        sparsities: one of each round after the dense first; in [0, 1], not decreasing. A
            fifth of what is left in each: `1 - 0.8 ** np.arange(1, 11)`.
        steps: n, the length of a training.
        rewind_to: k, the step that each round restarts from; 0 for initialization.
        reset_weights: whether weights go back to :math:`w_k`. False: only the clock does, and
            the trained weights stay (learning-rate rewinding, :math:`m_r \odot w^{(r-1)}`).
        method: static. `sparsity -> Projection`: `jc.prune`, or a function around it with your
            scope, budget, groups or leaves.

    Returns:
        An iterator of `Ticket`s, the dense one first. Each round is trained when it is asked
        for, so a loop may stop early. What was pruned once never comes back.

    Raises:
        TypeError: `train` or `method` can't be called.
        ValueError: a number out of its range; nothing to prune; `train` returned another
            structure, or a weight that is not zero outside of its mask.

    Cost: a training and one selection a round. The optimizer starts anew in each.

    Examples:
        >>> def train(params, masks, begin, end):
        ...     opt = jc.projected(optax.sgd(0.1), jc.pruning.from_masks(masks))
        ...     state = opt.init(params)
        ...     for _ in range(begin, end):
        ...         grads = jax.tree.map(lambda w: -w, params)
        ...         updates, state = opt.update(grads, state, params)
        ...         params = optax.apply_updates(params, updates)
        ...     return params
        >>> params = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
        >>> for ticket in jc.pruning.lottery_tickets(train, params, [0.5, 0.75], steps=2):
        ...     print(ticket.sparsity, ticket.masks["w"].astype(int))
        0.0 [[1 1 1 1]]
        0.5 [[0 0 1 1]]
        0.75 [[0 0 0 1]]

    Source: Frankle & Carbin 2019, arXiv:1803.03635; `rewind_to` from Frankle et al. 2019,
    arXiv:1903.01611; `reset_weights=False` from Renda et al. 2020, arXiv:2003.02389.
    """
    for name, value in (("train", train), ("method", method)):
        if not callable(value):
            rule, got = "be a function", _check.describe(value)
            raise TypeError(_check.message("lottery_tickets", name, rule, got))
    _check.integer("lottery_tickets", "steps", steps, 1)
    _check.integer("lottery_tickets", "rewind_to", rewind_to, 0, steps)
    wanted, last = [], 0.0
    for s in sparsities:
        _check.number("lottery_tickets", "sparsities", s, last, 1)
        last = float(s)
        wanted.append(last)
    return _rounds(train, params, wanted, (rewind_to, steps), reset_weights, method)


def _rounds(train, params, sparsities, span, reset_weights, method) -> Iterator[Ticket]:
    begin, end = span

    @jax.jit
    def smaller(sparsity, masks, weights):
        found = _masks(method(sparsity), weights)
        return jax.tree.map(jnp.logical_and, found, masks)

    masks = jax.tree.map(jnp.ones_like, _masks(method(0.0), params))
    if not jax.tree.leaves(masks):
        rule, got = "give a projection that drops weights", "one without masks"
        raise ValueError(_check.message("lottery_tickets", "method", rule, got))
    start = params if begin == 0 else _trained(train, params, masks, 0, begin)
    weights = _trained(train, start, masks, begin, end)
    yield Ticket(0.0, weights, masks)
    for sparsity in sparsities:
        masks = smaller(sparsity, masks, weights)
        first = apply_masks(start if reset_weights else weights, masks)
        weights = _trained(train, first, masks, begin, end)
        yield Ticket(sparsity, weights, masks)


def _masks(projection: Projection, params: PyTree) -> PyTree:
    kept = kept_by(projection, params, projection.find(params))
    return jax.tree.map(lambda w, k: None if k is True else k, params, kept)


def _trained(train: Train, params: PyTree, masks: PyTree, begin: int, end: int) -> PyTree:
    # Of its own, so that `train` may donate them: the start is needed again.
    copies = jax.tree.map(lambda w: jnp.array(w) if isinstance(w, jax.Array) else w, params)
    out = train(copies, masks, begin, end)
    if jax.tree.structure(out) != jax.tree.structure(params):
        rule, got = "return params of the same structure", str(jax.tree.structure(out))
        raise ValueError(_check.message("lottery_tickets", "train", rule, got))
    before = dict(tree.leaves_with_paths(params))
    for path, w in tree.leaves_with_paths(out):
        want, got = _check.describe(before[path]), _check.describe(w)
        if hasattr(before[path], "dtype") and want != got:
            rule = f"return params of the same shapes and dtypes ({want})"
            raise ValueError(_check.message("lottery_tickets", "train", rule, got, path=path))
    held = dict(tree.leaves_with_paths(masks))
    for path, w in tree.leaves_with_paths(out):
        if path in held and bool(jnp.any((w != 0) & ~held[path])):
            rule, got = "hold its masks", "a weight that is not zero outside of them"
            fix = "Train with jc.projected(optimizer, jc.pruning.from_masks(masks))."
            raise ValueError(_check.message("lottery_tickets", "train", rule, got, fix, path=path))
    return out

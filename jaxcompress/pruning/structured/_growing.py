"""A decay that grows on what is to be removed, until it has vanished."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection, kept_by
from jaxcompress.projections._combine import _require_projection
from jaxcompress.projections._land import wide
from jaxcompress.projections._optax import _require_params
from jaxcompress.projections._restrict import dropping


class GrowingState(NamedTuple):
    """State of `growing_regularization`: updates so far, and the structure found at first."""

    step: jax.Array
    structure: PyTree


def growing_regularization(
    projection: Projection, increase: ArrayLike, period: ArrayLike, ceiling: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""Adds to the gradient a decay of what will be removed, stronger every few updates.

    .. math:: g_t \mapsto g_t + \lambda_t\, \bar m \odot w_t, \qquad
        \lambda_t = \min\left(\tau,\; \delta\,\lfloor t / K \rfloor\right)

    where :math:`\bar m` marks what the projection drops. Zeroing units at once hurts; pressed
    down slowly they hand over what they do to the others while they go, and their removal
    changes little. Put it first in a chain: `optax.chain(growing, optax.sgd(…))`.

    Args:
        projection: one that drops entries, as `jc.pruning.prune_groups(dependencies, 0.5)`; any
            other with masks will do. It is found once, when the state is made, on the params
            before training.
        increase: :math:`\delta`, at least 0. May be traced.
        period: :math:`K`, number of updates from one increase to the next, at least 1. May be
            traced.
        ceiling: :math:`\tau`, at least 0. May be traced. The learning rate times it has to stay
            below 2 for gradient descent to be stable.

    Returns:
        A transformation with the state `GrowingState(step, structure)`; updates keep their
        dtypes. In the end `jc.pruning.kept_units(dependencies, opt_state)` says what
        `jc.shrink` removes, and `projection.project(params, state.structure)` zeros it.

    Raises:
        TypeError: `projection` is not a `Projection`.
        ValueError: a number out of its range; `update` without `params`; a projection that drops
            nothing.

    Cost: one elementwise pass.

    Examples:
        >>> params = {"a": jnp.array([[3.0, 1.0]]), "b": jnp.array([[4.0], [1.0]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> half = jc.pruning.prune_groups(groups, 0.5)
        >>> grow = jc.pruning.growing_regularization(half, 0.1, 1, 1.0)
        >>> state = grow.init(params)
        >>> for _ in range(3):
        ...     grads, state = grow.update(jax.tree.map(jnp.zeros_like, params), state, params)
        >>> grads["a"]
        Array([[0. , 0.2]], dtype=float32)

    Source: Wang et al. 2021, arXiv:2012.09243 (GReg-1). Differs: for any mask, and
    the mask is that of a projection.
    """
    _require_projection("growing_regularization", projection)
    _check.number("growing_regularization", "increase", increase, 0)
    _check.number("growing_regularization", "period", period, 1)
    _check.number("growing_regularization", "ceiling", ceiling, 0)

    def init(params):
        instead = "jc.pruning.prune_groups or jc.prune"
        structure = dropping("growing_regularization", projection, params, instead)
        return GrowingState(jnp.zeros((), jnp.int32), structure)

    def update(updates, state, params=None, **extra):
        del extra
        _require_params("growing_regularization", params)
        keep = kept_by(projection, params, state.structure)
        length = jnp.maximum(jnp.asarray(period).astype(jnp.int32), 1)
        times = (state.step // length).astype(jnp.float32)
        most = jnp.asarray(ceiling).astype(jnp.float32)
        strength = jnp.minimum(jnp.asarray(increase).astype(jnp.float32) * times, most)

        def leaf(u, w, k):
            if u is None or k is True:
                return u
            dtype = wide(u.dtype)
            pressed = u.astype(dtype) + strength.astype(dtype) * w.astype(dtype)
            return jnp.where(k, u, pressed.astype(u.dtype))

        new = jax.tree.map(leaf, updates, params, keep, is_leaf=lambda x: x is None)
        return new, GrowingState(state.step + 1, state.structure)

    return optax.GradientTransformationExtraArgs(init, update)

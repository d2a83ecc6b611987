"""Training only what a projection keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.projections._base import Projection, kept_by, observed
from jaxcompress.projections._combine import _require_projection
from jaxcompress.projections._optax import _first, _optimizer, _require_params, _zero, emitted


class RestrictedState(NamedTuple):
    """State of `restricted`: updates so far, the inner optimizer's state, the structure."""

    step: jax.Array
    inner: PyTree
    structure: PyTree


def restricted(
    optimizer: optax.GradientTransformation, projection: Projection
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that moves only what a projection keeps; the rest stays as it is.

    .. math:: \theta_{t+1} = \theta_t + m_t \odot \mathrm{opt}(m_t \odot \nabla L)

    Nothing is set to zero: with a fixed mask this is sparse fine-tuning. Inside of
    `jc.straight_through` it is the backward mask of Top-KAST, see `jc.pruning.top_kast`.

    Args:
        optimizer: any Optax optimizer. It sees zero gradients outside of the mask.
        projection: one that drops entries, as `jc.prune(0.9)`. It is found on the params, before
            the update; wrap it in `jc.every` to hold it. Leaves that it does not choose train
            as ever.

    Returns:
        A transformation with the state `RestrictedState(step, inner, structure)`. With an
        accumulation inside (`optax.MultiSteps`) its clock is that of the updates applied.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `update` was called without `params`, or the projection drops nothing.

    Cost: `find` when it is due and two elementwise passes.

    Examples:
        >>> opt = jc.restricted(optax.sgd(1.0), jc.prune(0.5))
        >>> params = {"w": jnp.array([[1.0, 4.0]])}
        >>> updates, _ = opt.update({"w": jnp.ones((1, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[1., 3.]], dtype=float32)

    Source: Sung et al. 2021, arXiv:2111.09839 (fixed masks); Jayakumar et al. 2021,
    arXiv:2106.03517 (the backward mask).
    """
    _require_projection("restricted", projection)
    inner_optimizer = _optimizer("restricted", optimizer)

    def init(params):
        structure = dropping("restricted", projection, params, "jc.prune or jc.pruning.from_masks")
        return RestrictedState(_zero(), inner_optimizer.init(params), structure)

    def update(updates, state, params=None, **extra):
        _require_params("restricted", params)
        grads = extra.get("grads", updates)
        previous = observed(projection, params, state.structure, grads, state.step)
        structure = projection.find(params, previous=previous, grads=grads, step=state.step)
        keep = kept_by(projection, params, structure)
        updates, inner = inner_optimizer.update(
            _within(updates, keep), state.inner, params, **extra
        )
        step, held = state.step + 1, structure
        applied = emitted(state.inner, inner)
        if applied is not None:
            # An accumulation inside goes on: the next update has not been seen yet.
            choose = lambda new, old: jnp.where(applied, new, old)  # noqa: E731
            step = choose(step, state.step)
            held = jax.tree.map(choose, structure, state.structure)
        return _within(updates, keep), RestrictedState(step, inner, held)

    return optax.GradientTransformationExtraArgs(init, update)


def _within(updates: PyTree, keep: PyTree) -> PyTree:
    def leaf(u, k):
        return u if u is None or k is True else jnp.where(k, u, jnp.zeros_like(u))

    return jax.tree.map(leaf, updates, keep, is_leaf=lambda x: x is None)


def dropping(function: str, projection: Projection, params: PyTree, instead: str) -> PyTree:
    """The first structure of a projection that drops entries; one that drops none is refused."""
    structure = _first(projection, params)
    keep = jax.tree.leaves(kept_by(projection, params, structure))
    if keep and all(k is True for k in keep):
        rule, got = "drop entries", "one that drops none"
        raise ValueError(_check.message(function, "projection", rule, got, f"Pass {instead}."))
    return structure

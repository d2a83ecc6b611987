"""Proximal gradient steps: a penalty on the weights, solved exactly after each update."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, tree
from jaxcompress._sharding import place_like
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections._base import hide, show
from jaxcompress.projections._land import apply, land, wide
from jaxcompress.projections._numbers import number_at
from jaxcompress.projections._optax import _require_params

Operator = Callable[..., jax.Array]
"""`(w, strength) -> w`: the minimiser v of `|v - w|^2 / 2 + strength * penalty(v)`. One with an
argument named `path` is given that of the leaf."""


class ProximalState(NamedTuple):
    """State of `proximal`: updates seen so far."""

    step: jax.Array


def proximal(
    operator: Operator,
    strength: Numeric,
    period: Numeric = 1,
    *,
    where: tree.Where = tree.is_weight,
) -> optax.GradientTransformationExtraArgs:
    r"""The last link of a chain: a proximal gradient step on a penalized loss.

    .. math:: w_{t+1} = \mathrm{prox}_{s_t}(w_t + u_t), \qquad
        \mathrm{prox}_s(w) = \arg\min_v \tfrac12 \|v - w\|^2 + s\,\Omega(v)

    Where a gradient of the penalty :math:`\Omega` only brings weights near zero, this makes
    them exactly zero, and keeps them there as long as the loss does not pull harder.

    Args:
        operator: static. `(w, strength) -> w` on one leaf, as `jc.pruning.soft_threshold`,
            `jc.pruning.hard_threshold`, `jc.pruning.group_lasso(groups)` or one of your own.
            One with an argument named `path` is given that of the leaf.
        strength: :math:`s_t`, the learning rate times the weight of the penalty in the loss:
            `lambda step: 1e-4 * learning_rate(step)`. A number or an Optax schedule of the
            step; may be traced. The operator gets it as a floating-point scalar.
        period: take the step at every `period`-th update, at least 1, and let the others
            through. The strength is not scaled by it. May be traced.
        where: static. The leaves to penalize, see `jaxcompress.tree.select`. Of a compressed
            leaf (the factors that `jc.low_rank_factors` trains) every part is penalized. A
            leaf whose update is None is left out.

    Returns:
        A transformation with the state `ProximalState(step)`. Its updates are in float32 where
        the parameters are narrower, and land on zeros exactly. Extra arguments are ignored.
        In bfloat16 a strength below 1/512 of a weight is rounded away: keep the parameters in
        float32, or collect the strength of many updates in one with `period`.

    Raises:
        ValueError: a `period` below 1; no leaf is chosen; the operator changed a shape;
            `update` was called without `params`.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: that of the operator; with a `period`, one `jax.lax.cond` around it. Put
    `optax.MultiSteps` around the whole chain: this link can't see an accumulation before it.

    Examples:
        >>> opt = optax.chain(optax.sgd(0.1), jc.proximal(jc.pruning.soft_threshold, 0.5))
        >>> params = {"w": jnp.array([[1.0, -0.25]])}
        >>> updates, _ = opt.update({"w": jnp.ones((1, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].round(3)
        Array([[0.4, 0. ]], dtype=float32)

    Source: Daubechies et al. 2003, arXiv:math/0307152 (iterative soft thresholding); Parikh &
    Boyd 2014, "Proximal algorithms", section 4.2. Behind an adaptive optimizer the norm of
    the step stays Euclidean; Yun et al. 2021, "Adaptive proximal gradient methods for
    structured neural networks", scale it by the preconditioner.
    """
    if not callable(operator):
        raise TypeError(
            _check.message(
                "proximal",
                "operator",
                "be a function (w, strength) -> w",
                _check.describe(operator),
                "Pass jc.pruning.soft_threshold, or jc.pruning.group_lasso(groups).",
            )
        )
    _check.numeric("proximal", "strength", strength, 0)
    _check.numeric("proximal", "period", period, 1)
    with_path = _takes_path(operator)

    def init(params):
        tree.select(params, where, function="proximal")
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del extra
        _require_params("proximal", params)
        params = with_updates(params, updates)
        mask = tree.select(params, where, function="proximal")
        before, moves = hide(params, mask), hide(updates, mask)
        amount = number_at(strength, state.step)
        if not jnp.issubdtype(amount.dtype, jnp.floating):
            amount = amount.astype(jnp.float32)

        def leaf(path, w):
            _check.floating("proximal", "params", w, path)
            out = operator(w, amount, path=path) if with_path else operator(w, amount)
            if jnp.shape(out) != w.shape:
                rule = f"keep the shape {list(w.shape)}"
                got = _check.describe(out)
                raise ValueError(_check.message("proximal", "operator", rule, got, path=path))
            return place_like(out, w)

        def stepped():
            return land(before, tree.map_arrays_with_path(leaf, apply(before, moves)))

        def plain():
            return as_landed(moves, before)

        landed = in_period(period, state.step, stepped, plain)
        return show(updates, landed), ProximalState(state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def with_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The params, None where the update is."""
    return jax.tree.map(
        lambda u, w: None if u is None else w, updates, params, is_leaf=lambda x: x is None
    )


def as_landed(updates: PyTree, params: PyTree) -> PyTree:
    """Updates as they are, of the types of those that land on a constraint."""
    return jax.tree.map(lambda u, w: place_like(u.astype(wide(w.dtype)), w), updates, params)


def in_period(
    period: Numeric, step: jax.Array, stepped: Callable[[], PyTree], plain: Callable[[], PyTree]
) -> PyTree:
    """`stepped()` at every `period`-th update, else `plain()`."""
    if isinstance(period, (int, float)) and period == 1:
        return stepped()
    length = jnp.maximum(number_at(period, step).astype(jnp.int32), 1)
    return jax.lax.cond((step + 1) % length == 0, stepped, plain)


def _takes_path(operator: Operator) -> bool:
    try:
        return "path" in inspect.signature(operator).parameters
    except (TypeError, ValueError):
        # Some callables written in C have no signature.
        return False

"""Top-KAST: sparse forward, a little less sparse backward."""

import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, Numeric
from jaxcompress.projections import every, restricted, straight_through
from jaxcompress.pruning._budgets import Budget, require_budget
from jaxcompress.pruning._prune import prune


def top_kast(
    optimizer: optax.GradientTransformation,
    forward: ArrayLike,
    backward: ArrayLike,
    decay: ArrayLike = 1e-4,
    *,
    refresh: Numeric = 1,
    budget: Budget | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs on the largest weights, trains those and the next largest.

    With :math:`A` the largest fraction :math:`D = 1 - s_f` of each leaf and :math:`B` the
    largest :math:`1 - s_b`, the params are :math:`\theta_A`, the gradient is that of
    :math:`B`, and to it is added that of the exploration loss

    .. math:: \tfrac{\lambda}{2}\left(\|\theta_A\|^2 + \|\theta_{B \setminus A}\|^2 / D\right)

    so that a weight that was just let in has to grow to stay.

    Args:
        optimizer: any Optax optimizer.
        forward: :math:`s_f`, the fraction of weights that is zero in the model, 0 to 1,
            exclusive. May be traced.
        backward: :math:`s_b`, the fraction that is not trained, at most `forward`. May be
            traced.
        decay: :math:`\lambda`. May be traced.
        refresh: number of updates from one mask to the next. May be traced.
        budget: static. How both are shared out over the leaves, as `jc.pruning.erdos_renyi()`.

    Returns:
        A transformation: `jc.straight_through` around `jc.restricted`. `jc.latent` reads the
        dense weights, `jc.pack` packs the sparse ones.

    Raises:
        ValueError: a number out of its range, or `backward` above `forward`.

    Cost: two selections each `refresh` updates.

    Examples:
        >>> opt = jc.pruning.top_kast(optax.adam(1e-3), 0.9, 0.8, refresh=100)
        >>> state = opt.init({"w": jnp.ones((4, 4))})

    Source: Jayakumar et al. 2021, arXiv:2106.03517, sections 2.2 and 2.3. Differs: the loss
    is scaled by a decay, and gradients are those of the loss on :math:`\theta_A`.
    """
    _check.number("top_kast", "forward", forward, 0, 1)
    _check.number("top_kast", "backward", backward, 0, 1)
    _check.number("top_kast", "decay", decay, 0)
    if budget is not None:
        require_budget("top_kast", "budget", budget)
    known = not (_check.is_traced(forward) or _check.is_traced(backward))
    if known and not np.asarray(backward) <= np.asarray(forward) < 1:
        rule = "be below 1 and at least `backward`"
        raise ValueError(_check.message("top_kast", "forward", rule, (forward, backward)))
    density = 1.0 - jnp.asarray(forward, jnp.float32)
    inner = optax.chain(_decayed(decay), optimizer)
    return straight_through(
        restricted(inner, every(refresh, prune(backward, budget=budget))),
        every(refresh, prune(forward, budget=budget)),
        jnp.asarray(decay, jnp.float32) * (1.0 / density - 1.0),
    )


def _decayed(decay: ArrayLike) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` on the weights, in the dtype of the updates."""

    def update(updates, state, params=None):
        def leaf(path, u, w):
            if not tree.is_weight(path, w):
                return u
            return u + (jnp.asarray(decay, jnp.float32) * w.astype(jnp.float32)).astype(u.dtype)

        return tree.map_with_path(leaf, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

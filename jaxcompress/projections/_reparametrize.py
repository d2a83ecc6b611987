"""Training latents of another structure behind ordinary dense parameters."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from jaxcompress import _check
from jaxcompress._sharding import place_like
from jaxcompress._types import PyTree
from jaxcompress.projections._base import is_masked_node
from jaxcompress.projections._land import apply, land
from jaxcompress.projections._optax import (
    _optimizer,
    _require_params,
    _when_applied,
    own_copy,
)


class Reparametrization(NamedTuple):
    """A family of parameters with parameters of its own.

    Attributes:
        init: `params -> latents`, a tree of any structure.
        apply: `latents -> params`, differentiable, with the structure, shapes and dtypes of
            the params that `init` was given.
        trained: `latents -> tree of Python bool` of their structure: which arrays are trained. The
            others stay as `init` made them, whatever the optimizer does: it holds
            `optax.MaskedNode()` in their places. None: all are trained.

    Examples:
        Positive weights as exponentials:

        >>> positive = jc.Reparametrization(
        ...     init=lambda params: jax.tree.map(jnp.log, params),
        ...     apply=lambda latents: jax.tree.map(jnp.exp, latents),
        ... )
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree], PyTree]
    trained: Callable[[PyTree], PyTree] | None = None


class ReparametrizedState(NamedTuple):
    """State of `reparametrized`: the inner optimizer's state, and the latents."""

    inner: PyTree
    latent: PyTree


def reparametrized(
    optimizer: optax.GradientTransformation, reparametrization: Reparametrization
) -> optax.GradientTransformationExtraArgs:
    r"""Trains the latents of a reparametrization behind ordinary dense parameters.

    .. math:: z_{t+1} = z_t + \mathrm{opt}(J_r(z_t)^\top \nabla L(w_t)), \qquad
        w_{t+1} = r(z_{t+1})

    Args:
        optimizer: any Optax optimizer. It sees the trained latents and their gradients, and may
            label them (`optax.partition`) to give some their own learning rate.
        reparametrization: `init`, `apply` and, where some latents are frozen, `trained`.

    Returns:
        A transformation with the state `ReparametrizedState(inner, latent)`;
        `jc.latent(opt_state)` reads the latents. The params are `apply(latents)` from the
        first applied update on. Extra arguments reach the inner optimizer.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: `update` without `params`, or `apply` gives other shapes than the params.

    Cost: one forward and one backward pass of `apply`; the memory of the latents.

    Examples:
        >>> opt = jc.reparametrized(optax.sgd(0.1), jc.low_rank_factors(rank=1))
        >>> params = {"w": jnp.eye(2) * jnp.array([[2.0], [1.0]])}
        >>> updates, _ = opt.update({"w": jnp.zeros((2, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].round(4)
        Array([[2., 0.],
               [0., 0.]], dtype=float32)
    """
    if not isinstance(reparametrization, Reparametrization):
        raise TypeError(
            _check.message(
                "reparametrized",
                "reparametrization",
                "be a jaxcompress Reparametrization",
                _check.describe(reparametrization),
                "Make one with jc.low_rank_factors or jc.Reparametrization(init, apply).",
            )
        )
    inner_optimizer = _optimizer("reparametrized", optimizer)
    init_latent, from_latent, which = reparametrization

    def split(latent):
        """The trained latents, and the function that puts the frozen ones back."""
        if which is None:
            return latent, lambda trained: trained
        mask = which(latent)
        frozen = jax.tree.map(lambda z, t: optax.MaskedNode() if t else z, latent, mask)
        trained = jax.tree.map(lambda z, t: z if t else optax.MaskedNode(), latent, mask)
        return trained, lambda trained: jax.tree.map(
            lambda z, t: t if is_masked_node(z) else z, frozen, trained, is_leaf=is_masked_node
        )

    def to_params(latent, params):
        return jax.tree.map(place_like, from_latent(latent), params)

    def init(params):
        latent = own_copy(init_latent(params), params)
        _require_same_shapes(params, jax.eval_shape(from_latent, latent))
        return ReparametrizedState(inner_optimizer.init(split(latent)[0]), latent)

    def update(updates, state, params=None, **extra):
        _require_params("reparametrized", params)
        trained, whole = split(state.latent)
        dense, pull = jax.vjp(lambda z: to_params(whole(z), params), trained)
        cotangents = jax.tree.map(lambda g, w: g.astype(w.dtype), updates, dense)
        (grads,) = pull(cotangents)
        updates, inner = inner_optimizer.update(grads, state.inner, trained, **extra)

        def applied():
            latent = whole(apply(trained, updates))
            return land(params, to_params(latent, params)), ReparametrizedState(inner, latent)

        return _when_applied(state.inner, inner, params, updates, applied, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _require_same_shapes(params: PyTree, out: PyTree) -> None:
    describe = lambda t: jax.tree.map(_check.describe, t)  # noqa: E731
    wanted, got = describe(params), describe(out)
    if jax.tree.structure(wanted) != jax.tree.structure(got) or wanted != got:
        raise ValueError(
            _check.message(
                "reparametrized", "reparametrization.apply", f"return the params: {wanted}", got
            )
        )

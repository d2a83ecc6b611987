"""L0 regularization: weights behind random gates that learn to close, hard-concrete ones."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check, _keys, tree
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike, Numeric, PyTree
from jaxcompress.projections import Reparametrization, number_at, reparametrized
from jaxcompress.projections._optax import _optimizer
from jaxcompress.pruning._gates import (
    GAMMA,
    TEMPERATURE,
    ZETA,
    fixed_gates,
    opening,
    require_numbers,
    require_open,
    sample_gates,
)
from jaxcompress.pruning._groups import Groups, l2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """Weights and their gates: what `hard_concrete` trains in the place of a leaf.

    Attributes:
        weight: the weights behind the gates, of the shape and dtype of the leaf.
        log_alpha: one number per gate, float32 or wider.
        draw: how often gates were drawn, a whole number in float32. None where it does not
            matter; the inner optimizer sees None.
        block: static. The shape of the block of weights that shares a gate.
        gamma: static. As in `sample_gates`.
        zeta: static. As in `sample_gates`.
    """

    weight: jax.Array
    log_alpha: jax.Array
    draw: jax.Array | None
    block: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    gamma: float = dataclasses.field(default=GAMMA, metadata={"static": True})
    zeta: float = dataclasses.field(default=ZETA, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the leaf."""
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype:
        """That of the leaf."""
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Of the weights and the gates."""
        return tree.nbytes([self.weight, self.log_alpha])

    def todense(self) -> jax.Array:
        """The weights of the trained model: times `fixed_gates`."""
        return self.times(fixed_gates(self.log_alpha, self.gamma, self.zeta))

    def times(self, gates: jax.Array) -> jax.Array:
        """The weights times gates, each spread over its block."""
        if gates.shape != self.shape:
            gates = _groups(self).expand("", gates, self.shape)
        return (self.weight.astype(gates.dtype) * place_like(gates, self.weight)).astype(self.dtype)


def hard_concrete(
    optimizer: optax.GradientTransformation,
    penalty: Numeric,
    *,
    key: jax.Array,
    initial_keep: ArrayLike = 0.9,
    temperature: ArrayLike = TEMPERATURE,
    groups: Groups | None = None,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    where: tree.Where = tree.is_weight,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains weights behind random gates, with a penalty on the gates that are open.

    .. math:: \min_{\theta, \alpha} \; E_{g \sim \alpha}\, L(\theta \odot g)
        + \lambda \sum_i n_i\, P(g_i \ne 0)

    with :math:`n_i` the number of weights behind gate i. The params are the weights times
    gates that are drawn anew at each update, so the model and the loss are those of a dense
    network, and the gradient that comes in is that of one sample, as in the paper. (A gate
    drawn inside of the loss would need a key there. A loss of your own that does it finds the
    parts in `sample_gates`, `fixed_gates` and `expected_l0`.)

    Args:
        optimizer: any Optax optimizer. It sees `Gated` leaves, with paths `…/weight` and
            `…/log_alpha`, and may label them: gates often want a larger learning rate.
        penalty: :math:`\lambda`, the price of one open weight next to a loss that is a mean over
            examples. A number or an Optax schedule of the step; may be traced.
        key: a `jax.random.key`. May be traced. Each leaf folds in its path and each update
            its number (modulo 2^24).
        initial_keep: all :math:`\ln\alpha` start at its logit; in (0, 1). May be traced. From
            11/12 on, fixed gates start at exactly 1, and the trained weights at the params.
        temperature: as in `sample_gates`. May be traced.
        groups: static. Weights that share a gate, as `jc.pruning.slices(-1)`; its norm is not
            used. None: a gate for each weight.
        gamma: static. As in `sample_gates`.
        zeta: static. As in `sample_gates`.
        where: static. The leaves to gate, see `jaxcompress.tree.select`.

    Returns:
        A transformation: `jc.reparametrized` with `Gated` latents, and its state. During
        training the params have random gates. `jc.pack(opt_state, params)` gives those of the
        trained model, dense with exact zeros, and `jc.todense(jc.latent(opt_state))` does
        under `jit`. Extra arguments reach the inner optimizer. `flax.nnx.Optimizer` rewrites
        trees such as `Gated`: use plain Optax on `nnx.state(model)`.

    Raises:
        ValueError: a number out of its range; no leaf is chosen; `update` was called without
            `params`.
        TypeError: a chosen leaf is not real floating point; an argument of the wrong kind.

    Cost: one random number per gate, drawn twice an update; the memory of the gates and of
    their moments: as much again as the weights without `groups`.

    Examples:
        >>> opt = jc.pruning.hard_concrete(optax.adam(0.1), 1e-2, key=jax.random.key(0))
        >>> params = {"w": jnp.array([[1.0, 1.0, 1.0]])}
        >>> state = opt.init(params)
        >>> for _ in range(100):  # nothing but the first weight matters to this loss
        ...     grads = {"w": params["w"] * 0 - jnp.array([[0.1, 0.0, 0.0]])}
        ...     updates, state = opt.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> jc.pack(state, params)["w"] == 0
        Array([[False,  True,  True]], dtype=bool)

    Source: Louizos et al. 2018, arXiv:1712.01312. Differs: all :math:`\ln\alpha` start equal,
    without the small noise of their code; a batch shares one draw of the gates.
    """
    _check.numeric("hard_concrete", "penalty", penalty, 0)
    require_open("hard_concrete", "initial_keep", initial_keep, 0, 1)
    require_numbers("hard_concrete", temperature, gamma, zeta)
    if groups is not None and not isinstance(groups, Groups):
        rule, fix = "be a Groups or None", "Make one with jc.pruning.slices, blocks or heads."
        got = _check.describe(groups)
        raise TypeError(_check.message("hard_concrete", "groups", rule, got, fix))
    for name, value in (("gamma", gamma), ("zeta", zeta)):
        if _check.is_traced(value):
            text = _check.message("hard_concrete", name, "be static", _check.describe(value))
            raise TypeError(text)
    stretch = float(gamma), float(zeta)

    def init(params):
        chosen = tree.select(params, where, function="hard_concrete")

        def leaf(path, w, is_chosen):
            if not is_chosen:
                return jnp.asarray(w) if hasattr(w, "dtype") else w
            _check.floating("hard_concrete", "params", w, path)
            w = jnp.asarray(w)
            # Narrow floats would lose the small steps that gates take.
            dtype = w.dtype if w.dtype.itemsize >= 4 else jnp.float32
            if groups is None:
                block, zeros = (1,) * w.ndim, jnp.zeros_like(w, dtype)
            else:
                block = groups.block(path, w.shape)
                zeros = jnp.zeros(groups.sizes(path, w.shape).shape, dtype)
            keep = jnp.asarray(initial_keep).astype(dtype)
            log_alpha = zeros + (jnp.log(keep) - jnp.log1p(-keep))
            return Gated(w, log_alpha, jnp.zeros((), jnp.float32), block, *stretch)

        return tree.map_with_path(leaf, params, chosen)

    def sampled(latents):
        def leaf(path, z):
            if not isinstance(z, Gated):
                return z
            own = _keys.of_leaf(key, path, _draws(z))
            return z.times(sample_gates(z.log_alpha, own, temperature, *stretch))

        return tree.map_with_path(leaf, latents)

    inner = _penalized(_optimizer("hard_concrete", optimizer), penalty, temperature)
    return reparametrized(inner, Reparametrization(init, sampled))


def _penalized(
    optimizer: optax.GradientTransformationExtraArgs, penalty: Numeric, temperature: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the penalty, and counts the draws, which `optimizer` does not see."""

    def pulled(g: Gated, z: Gated) -> Gated:
        p = opening(z.log_alpha, temperature, z.gamma, z.zeta)
        # All leaves count alike. Inside of an accumulation nothing is drawn: it is one update.
        strength = number_at(penalty, _draws(z).astype(jnp.int32)).astype(p.dtype)
        slope = strength * (_weights_per_gate(z) * p * (1 - p))
        return dataclasses.replace(g, log_alpha=g.log_alpha + slope)

    def counted(move: Gated, z: Gated) -> Gated:
        # Whole numbers up to 2^24 are exact in float32, and so is their sum.
        last = _draws(z) >= 2**24 - 1
        return dataclasses.replace(move, draw=jnp.where(last, -_draws(z), 1.0))

    def init(params):
        return optimizer.init(_each_gated(_hidden_draw, params))

    def update(updates, state, params=None, **extra):
        grads = _each_gated(_hidden_draw, _each_gated(pulled, updates, params))
        visible = _each_gated(_hidden_draw, params)
        moves, state = optimizer.update(grads, state, visible, **extra)
        return _each_gated(counted, moves, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _each_gated(f: Callable[..., Gated], *trees: PyTree) -> PyTree:
    is_gated = lambda x: isinstance(x, Gated)  # noqa: E731
    return jax.tree.map(
        lambda x, *rest: f(x, *rest) if is_gated(x) else x, *trees, is_leaf=is_gated
    )


def _hidden_draw(z: Gated) -> Gated:
    return dataclasses.replace(z, draw=None)


def _draws(z: Gated) -> jax.Array:
    return jnp.zeros((), jnp.float32) if z.draw is None else z.draw


def _groups(z: Gated) -> Groups:
    return Groups(lambda path, shape: z.block, l2)


def _weights_per_gate(z: Gated) -> jax.Array:
    if z.log_alpha.shape == z.shape:
        return jnp.ones((), z.log_alpha.dtype)
    return jnp.asarray(_groups(z).sizes("", z.shape), z.log_alpha.dtype)

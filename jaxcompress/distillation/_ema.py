"""A teacher that is the moving average of the student."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import number_at
from jaxcompress.projections._base import show
from jaxcompress.projections._land import apply, rounded, wide
from jaxcompress.projections._optax import _require_params


class EmaTeacherState(NamedTuple):
    """State of `ema_teacher`: updates so far, the weight of what is averaged, the average."""

    step: jax.Array
    mass: jax.Array
    average: PyTree


def ema_teacher(
    decay: Numeric = 0.999, *, debias: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the moving average of the parameters: the mean teacher of the student in training.

    .. math:: \bar\theta_{t+1} = \bar\theta_t + r_t\,(\theta_{t+1} - \bar\theta_t), \quad
        r_t = \frac{1 - d}{m_{t+1}}, \quad m_{t+1} = d\,m_t + 1 - d

    It averages params, not updates, and changes nothing: the LAST link of a chain, where
    `params + updates` are the student's next params. `ema_params(opt_state)` reads the average;
    hand it to the teacher in the batch. After `jc.straight_through` or a projection it
    averages the compressed weights, as the last link of the optimizer inside of
    `jc.straight_through` the dense latent ones.

    Args:
        decay: :math:`d` in [0, 1]: a number, a JAX scalar (maybe traced) or an Optax schedule of
            the step, read from 0 on. Warm-ups are schedules, with `debias=False`:
            `lambda t: jnp.minimum(0.999, 1 - 1 / (t + 2))` is the mean of all params so far
            until the average is longer (Tarvainen & Valpola's own), and
            `lambda t: jnp.minimum(0.999, (1 + t) / (10 + t))` that of TensorFlow.
        debias: static. True starts at :math:`m_0 = 0`: the initial params do not count, the
            first average is the params after one update (and so a first decay of 1 keeps the
            initial ones). False starts at :math:`m_0 = 1` and averages them in as well.

    Returns:
        A transformation with the state `EmaTeacherState(step, mass, average)`; its updates are
        those that come in. Averages are in float32 where the parameter is narrower. Leaves
        that are not floating point are copied as they become.

    Raises:
        TypeError: `decay` is not a real scalar.
        ValueError: `update` was called without `params`; a known `decay` is not in [0, 1].

    Cost: one copy of the parameters and an elementwise pass. Put `optax.MultiSteps` around the
    whole chain: before this link it would count each mini-step as a step.

    Examples:
        >>> opt = optax.chain(optax.sgd(1.0), jc.distillation.ema_teacher(0.9, debias=False))
        >>> params = {"w": jnp.array([1.0, 2.0])}
        >>> updates, state = opt.update({"w": jnp.ones(2)}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([0., 1.], dtype=float32)
        >>> jc.distillation.ema_params(state)["w"]
        Array([0.9, 1.9], dtype=float32)

        Its use in the next step, where `distill` is the first link:

        >>> apply = lambda params, batch: batch["x"] * params["w"]
        >>> teach = jc.distill(apply, lambda batch: apply(batch["teacher"], batch))
        >>> opt = optax.chain(teach, optax.sgd(0.1), jc.distillation.ema_teacher(0.99))
        >>> state = opt.init(params)
        >>> batch = {"x": jnp.ones(2), "teacher": jc.distillation.ema_params(state)}
        >>> updates, state = opt.update({"w": jnp.ones(2)}, state, params, batch=batch)

    Source: Tarvainen & Valpola 2017, arXiv:1703.01780, section 2. Differs: by default the
    initial params are not averaged in; the correction is that of Kingma & Ba 2015,
    arXiv:1412.6980, section 3, folded into the rate.
    """
    _check.numeric("ema_teacher", "decay", decay, 0, 1)

    def init(params):
        average = jax.tree.map(lambda w: jnp.array(w, _average_dtype(w), copy=True), params)
        mass = jnp.zeros(()) if debias else jnp.ones(())
        return EmaTeacherState(jnp.zeros((), jnp.int32), mass, average)

    def update(updates, state, params=None, **extra):
        del extra
        _require_params("ema_teacher", params)
        d = number_at(decay, state.step).astype(state.mass.dtype)
        mass = d * state.mass + (1 - d)
        rate = jnp.where(mass > 0, (1 - d) / jnp.where(mass > 0, mass, 1.0), 0.0)

        def leaf(w, u, average):
            if w is None:
                return None
            moved = w if u is None or u.dtype == jax.dtypes.float0 else _next(w, u)
            if not jnp.issubdtype(w.dtype, jnp.inexact):
                return moved
            return average + rate.astype(average.dtype) * (moved.astype(average.dtype) - average)

        average = jax.tree.map(leaf, params, updates, state.average, is_leaf=lambda x: x is None)
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates, EmaTeacherState(step, mass, average)

    return optax.GradientTransformationExtraArgs(init, update)


def ema_params(opt_state: PyTree, params: PyTree | None = None) -> PyTree:
    """The average that `ema_teacher` keeps, wherever it is nested.

    Args:
        opt_state: state of an optimizer with `ema_teacher` inside of any Optax wrapper. Several
            of them on parts of one tree (`optax.partition`) are put together.
        params: casts the average to their dtypes, and gives the leaves that no `ema_teacher`
            sees. None leaves the average as it is held, and `optax.MaskedNode()` there.

    Returns:
        The tree of averages.

    Raises:
        ValueError: there is none.

    Examples:
        >>> opt = optax.chain(optax.adam(1e-3), jc.distillation.ema_teacher())
        >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
        >>> jc.distillation.ema_params(opt.init(params))["w"].dtype
        dtype('float32')
        >>> jc.distillation.ema_params(opt.init(params), params)["w"].dtype
        dtype(bfloat16)
    """
    is_state = lambda x: isinstance(x, EmaTeacherState)  # noqa: E731
    found = [s.average for s in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(s)]
    if not found:
        rule, got = "hold the state of ema_teacher", type(opt_state).__name__
        fix = "Put jc.distillation.ema_teacher() last in the chain."
        raise ValueError(_check.message("ema_params", "opt_state", rule, got, fix))
    out = found[0]
    for other in found[1:]:
        out = show(other, out)
    if params is None:
        return out
    return jax.tree.map(
        lambda w, x: x if x.dtype == w.dtype else x.astype(w.dtype), params, show(params, out)
    )


def _next(w, u):
    """The parameter as `optax.apply_updates` will make it.

    XLA may hand on a narrow update that it has not rounded yet.
    """
    if jnp.issubdtype(u.dtype, jnp.floating):
        u = rounded(u.astype(wide(u.dtype)), u.dtype)
    return apply(w, u)


def _average_dtype(w):
    return wide(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else w.dtype

"""The gradient of a distillation loss, as a link of an Optax chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check
from jaxcompress._types import Numeric, PyTree
from jaxcompress.distillation._logits import kd_loss
from jaxcompress.distillation._rows import require_temperature
from jaxcompress.projections import number_at

_MISSING = object()


class DistillState(NamedTuple):
    """State of `distill`: how many updates it has made, int32."""

    step: jax.Array


def distill(
    student: Callable[[PyTree, Any], Any],
    teacher: Callable[[Any], Any],
    *,
    weight: Numeric = 1.0,
    task_weight: Numeric = 1.0,
    temperature: Numeric = 1.0,
    loss: Callable[[Any, Any, jax.Array], jax.Array] = kd_loss,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a distillation loss to the task's gradient.

    .. math:: g \leftarrow w_\mathrm{task}\, g + w\, \nabla_\theta\,
        \mathrm{mean}\, L\bigl(s(\theta, x),\, t(x),\, T\bigr)

    It changes gradients, so it comes FIRST in a chain, before the optimizer; after it all goes
    on as if the loss had been `task_weight * task + weight * mean(L)`. Hand it the batch:
    `opt.update(grads, state, params, batch=batch)`.

    Args:
        student: `student(params, batch)` -> logits, differentiated with respect to `params`.
        teacher: `teacher(batch)` -> logits of the same shape. No gradient flows into it. What
            it closes over is a constant of a jitted step: give a big teacher's weights in the
            batch instead, `teacher=lambda batch: apply(batch["teacher"], batch["x"])`.
        weight: :math:`w`, of the distillation loss: a number, a JAX scalar (maybe traced) or an
            Optax schedule of the step.
        task_weight: :math:`w_\mathrm{task}`, of the incoming updates; the same choice.
        temperature: :math:`T > 0`, given to `loss` as a real array; the same choice.
        loss: static. Any function `(student_logits, teacher_logits, temperature)` -> array; its
            mean over all entries is taken. Without a temperature:
            `loss=lambda s, t, _: jc.mse_logits(s, t)`.

    Returns:
        A transformation with the state `DistillState(step)`; schedules are read at `step`, from
        0 on. Its updates have the dtypes of the incoming ones; the sum is made in float32 at
        least. Where an update is None, or the parameter is None or not floating point (an
        integer table, a key), the update passes through unchanged. An empty batch adds nothing.

    Raises:
        TypeError: `update` was called without `batch`; `student`, `teacher` or `loss` is not
            a function; a number is not a real scalar.
        ValueError: `update` was called without `params`; the student's and the teacher's logits
            have different shapes; `temperature` is known and not above 0.

    Cost: a forward pass of the teacher, a forward and a backward pass of the student, besides
    those of the task's gradient.

    With `optax.MultiSteps` there are two orders. `optax.chain(jc.distill(...),
    optax.MultiSteps(opt, n).gradient_transformation())` accumulates the distillation gradient
    of every mini-batch: exact, and `step` counts mini-steps. `optax.MultiSteps(optax.chain(
    jc.distill(...), opt), n)` runs both models at each mini-step but keeps only the last
    mini-batch's distillation gradient, and `step` counts applied updates; call its `update`
    itself, as its `gradient_transformation()` drops the batch (Optax 0.2.8). With
    `optax.inject_hyperparams` say `static_args=("student", "teacher", "loss")`, or it takes the
    functions for schedules. `optax.masked` hides params from `student`: mask what follows.

    Examples:
        >>> student = lambda params, x: x @ params["w"]
        >>> teacher = lambda x: 2.0 * x
        >>> p = jc.prune(0.5)
        >>> opt = optax.chain(
        ...     jc.distill(student, teacher, weight=0.9, task_weight=0.1, temperature=2.0),
        ...     jc.straight_through(optax.sgd(0.1), p),
        ... )
        >>> params, x = {"w": jnp.eye(2)}, jnp.eye(2)
        >>> grads = jax.grad(lambda params: jnp.sum(student(params, x) ** 2))(params)
        >>> updates, state = opt.update(grads, opt.init(params), params, batch=x)
        >>> state[0].step
        Array(1, dtype=int32)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2: the weighted sum of two losses.
    """
    for name, function in {"student": student, "teacher": teacher, "loss": loss}.items():
        if not callable(function):
            got = _check.describe(function)
            raise TypeError(_check.message("distill", name, "be a function", got))
    _check.numeric("distill", "weight", weight)
    _check.numeric("distill", "task_weight", task_weight)
    if not callable(temperature):
        require_temperature("distill", temperature, ())

    def init(params):
        del params
        return DistillState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, batch=_MISSING, **extra):
        del extra
        if params is None:
            got, fix = "None", "Call opt.update(grads, state, params, batch=batch)."
            rule = "be given to `update` (distill needs params)"
            raise ValueError(_check.message("distill", "params", rule, got, fix))
        if batch is _MISSING:
            got, fix = "nothing", "Call opt.update(grads, state, params, batch=batch)."
            rule = "be given to `update` as an extra argument"
            raise TypeError(_check.message("distill", "batch", rule, got, fix))
        targets = jax.tree.map(jax.lax.stop_gradient, teacher(batch))
        heat = number_at(temperature, state.step)
        if not jnp.issubdtype(heat.dtype, jnp.floating):
            heat = heat.astype(jnp.float32)

        def objective(params):
            logits = student(params, batch)
            _require_same_shapes(logits, targets)
            return _mean(loss(logits, targets, heat))

        grads = _gradient(objective, params)
        task, distilled = number_at(task_weight, state.step), number_at(weight, state.step)
        updates = jax.tree.map(
            lambda u, g: _sum(task, u, distilled, g), updates, grads, is_leaf=_is_none
        )
        return updates, DistillState(jnp.asarray(optax.safe_increment(state.step)))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_none(x) -> bool:
    return x is None


def _is_inexact(x) -> bool:
    return x is not None and jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _gradient(objective, params):
    """The gradient, with None where a leaf is None or not floating point."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=_is_none)
    chosen = [_is_inexact(leaf) for leaf in leaves]

    def of_floating(floating):
        floating = iter(floating)
        merged = [next(floating) if c else x for c, x in zip(chosen, leaves, strict=True)]
        return objective(treedef.unflatten(merged))

    grads = jax.grad(of_floating)([x for c, x in zip(chosen, leaves, strict=True) if c])
    grads = iter(grads)
    return treedef.unflatten([next(grads) if c else None for c in chosen])


def _mean(values):
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        rule, got = "return real floating-point numbers", _check.describe(values)
        raise TypeError(_check.message("distill", "loss", rule, got))
    total = jnp.sum(values, dtype=_wide(values.dtype))
    return total / max(values.size, 1)


def _sum(task, update, distilled, grad):
    """`task * update + distilled * grad` in the update's dtype."""
    if update is None or grad is None:
        return update
    update = jnp.asarray(update)
    wide = np.promote_types(_wide(update.dtype), _wide(grad.dtype))
    total = task.astype(wide) * update.astype(wide) + distilled.astype(wide) * grad.astype(wide)
    return total.astype(update.dtype)


def _wide(dtype):
    """The dtype to add in: float32 for what is narrower."""
    return np.promote_types(dtype, np.float32)


def _require_same_shapes(logits, targets) -> None:
    ours, theirs = (jax.tree.map(_check.describe, x) for x in (logits, targets))
    if jax.tree.map(jnp.shape, logits) != jax.tree.map(jnp.shape, targets):
        rule = f"return logits of the student's shape, {ours}"
        raise ValueError(_check.message("distill", "teacher", rule, theirs))

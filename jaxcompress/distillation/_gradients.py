"""The gradient of a distillation loss, as a link of an Optax chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide_dtype
from jaxcompress._types import Numeric, PyTree
from jaxcompress.distillation._combine import (
    Combination,
    aligned,
    is_inexact,
    require_combination,
    scale,
    summed,
)
from jaxcompress.distillation._logits import kd_loss
from jaxcompress.distillation._rows import require_temperature
from jaxcompress.projections import number_at

_MISSING = object()


class DistillState(NamedTuple):
    """State of `distill`.

    Attributes:
        step: how many updates it has made, int32.
        combination: the state of `combine`.
        regressors: their trained values.
        inner: the state of the regressors' optimizer.
    """

    step: jax.Array
    combination: PyTree = ()
    regressors: PyTree = ()
    inner: PyTree = ()


def distill(
    student: Callable[[PyTree, Any], Any],
    teacher: Callable[[Any], Any],
    *,
    weight: Numeric = 1.0,
    task_weight: Numeric = 1.0,
    temperature: Numeric = 1.0,
    loss: Callable[..., jax.Array] = kd_loss,
    regressors: PyTree = None,
    regressor_optimizer: optax.GradientTransformation | None = None,
    combine: Combination | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a distillation loss to the task's gradient.

    .. math:: g \leftarrow w_\mathrm{task}\, g + w\, \nabla_\theta\,
        \mathrm{mean}\, L\bigl(s(\theta, x),\, t(x),\, T\bigr)

    It changes gradients, so it comes FIRST in a chain, before clipping and the optimizer; after
    it all goes on as if the loss had been `task_weight * task + weight * mean(L)`. Hand it the
    batch: `opt.update(grads, state, params, batch=batch)`. Or, where you have the gradient of
    `mean(L)` from a forward pass of your own (`value_and_multi_grad`), hand it that, and neither
    model runs: `opt.update(grads, state, params, teacher_grads=teacher_grads)`.

    Args:
        student: `student(params, batch)` -> logits, or any tree of features and logits,
            differentiated with respect to `params`. What it draws at random takes its key from
            the batch.
        teacher: `teacher(batch)` -> logits, or any tree. No gradient flows into it. What it
            closes over is a constant of a jitted step: give a big teacher's weights in the
            batch instead, `teacher=lambda batch: apply(batch["teacher"], batch["x"])`. So the
            dense version of the student being compressed teaches it:
            `batch={"x": x, "teacher": jc.latent(state)}`.
        weight: :math:`w`, of the distillation loss: a number, a JAX scalar (maybe traced) or an
            Optax schedule of the step.
        task_weight: :math:`w_\mathrm{task}`, of the incoming updates; the same choice.
        temperature: :math:`T > 0`, given to `loss` as a real array; the same choice.
        loss: static. Any function `(student_output, teacher_output, temperature)` -> one array;
            its mean over all entries is taken. Without a temperature:
            `loss=lambda s, t, _: jc.mse_logits(s, t)`. For the default one both outputs are
            logits of one shape. A loss that needs labels takes them from the teacher's output,
            see the example.
        regressors: parameters that only the loss has, such as the projection of a student's
            features to the teacher's width: any tree of floating-point arrays, which `loss`
            then takes as its fourth argument. They live in the state, where
            `jc.distillation.regressors(opt_state)` reads them, and never in `params`.
        regressor_optimizer: static. Trains the regressors by the gradient of the same backward
            pass, times `weight`. To accumulate it over mini-batches wrap it in
            `optax.MultiSteps(...).gradient_transformation()`.
        combine: static. How `task_weight * g` and the teacher's weighted gradient become one,
            such as `jc.distillation.pcgrad()`, `norm_balanced()`, `cosine_gated()` or `dot()`.
            None adds them.

    Returns:
        A transformation with the state `DistillState(step, combination, regressors, inner)`,
        the last three empty without what they are for; schedules are read at `step`, from 0 on.
        Its updates have the dtypes of the incoming ones; the sum is made in float32 at least.
        Where an update is None, or the parameter is None or not floating point (an integer
        table, a key), the update passes through unchanged. An empty batch adds nothing.

    Raises:
        TypeError: `update` was called with neither `batch` nor `teacher_grads`, or with the
            latter and without `regressor_grads` though there are regressors; `student`,
            `teacher` or `loss` is not a function; a number is not a real scalar; a regressor is
            not floating point, or only one of `regressors` and their optimizer was given.
        ValueError: `update` was called without `params`; the student's and the teacher's logits
            have different shapes; `temperature` is known and not above 0.

    Cost: a forward pass of the teacher, a forward and a backward pass of the student, besides
    those of the task's gradient; with `teacher_grads` none of them.

    With `optax.MultiSteps` there are two orders. `optax.chain(jc.distill(...),
    optax.MultiSteps(opt, n).gradient_transformation())` accumulates the distillation gradient
    of every mini-batch: exact, and `step` counts mini-steps. `optax.MultiSteps(optax.chain(
    jc.distill(...), opt), n)` runs both models at each mini-step but keeps only the last
    mini-batch's distillation gradient, and `step` counts applied updates; call its `update`
    itself, as its `gradient_transformation()` drops the batch (Optax 0.2.8). With
    `optax.inject_hyperparams` say `static_args=("student", "teacher", "loss")`, or it takes the
    functions for schedules. `optax.masked` hides params from `student`: mask what follows. Put
    `jc.projected` around what follows too: it clears all that looks like moments of `params`.

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

        Labels, and whatever else a loss needs of the batch, come with the teacher's output:

        >>> d = jc.distillation
        >>> decoupled = jc.distill(
        ...     lambda params, batch: student(params, batch["x"]),
        ...     lambda batch: (teacher(batch["x"]), batch["y"]),
        ...     loss=lambda s, t, heat: d.dkd_loss(s, t[0], t[1], heat),
        ...     temperature=4.0,
        ... )
        >>> batch = {"x": x, "y": jnp.array([0, 1])}
        >>> _, state = decoupled.update(grads, decoupled.init(params), params, batch=batch)

        A regressor from the student's two features to the teacher's three:

        >>> hint = jc.distill(
        ...     student,
        ...     lambda x: jnp.ones((2, 3)),
        ...     loss=lambda s, t, _, r: (s @ r["out"] - t) ** 2,
        ...     regressors={"out": jnp.zeros((2, 3))},
        ...     regressor_optimizer=optax.adam(1e-2),
        ... )
        >>> _, state = hint.update(grads, hint.init(params), params, batch=x)
        >>> jc.distillation.regressors(state)["out"].shape
        (2, 3)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2: the weighted sum of two losses;
    regressors from Romero et al. 2015, arXiv:1412.6550, section 2.2.
    """
    for name, function in {"student": student, "teacher": teacher, "loss": loss}.items():
        if not callable(function):
            got = _check.describe(function)
            raise TypeError(_check.message("distill", name, "be a function", got))
    _check.numeric("distill", "weight", weight)
    _check.numeric("distill", "task_weight", task_weight)
    if not callable(temperature):
        require_temperature("distill", temperature, ())
    _require_regressors(regressors, regressor_optimizer)
    if combine is not None:
        require_combination("distill", "combine", combine)
    combination = summed() if combine is None else combine
    trainer = None
    if regressor_optimizer is not None:
        trainer = optax.with_extra_args_support(regressor_optimizer)

    def init(params):
        state = DistillState(jnp.zeros((), jnp.int32), combination.init(params, 2))
        if trainer is None:
            return state
        own = jax.tree.map(_own, regressors)
        return state._replace(regressors=own, inner=trainer.init(own))

    def of_batch(params, state, batch):
        """The gradients of the mean loss with respect to the params and the regressors."""
        targets = jax.tree.map(jax.lax.stop_gradient, teacher(batch))
        heat = number_at(temperature, state.step)
        if not jnp.issubdtype(heat.dtype, jnp.floating):
            heat = heat.astype(jnp.float32)

        def objective(trained):
            params, own = trained
            output = student(params, batch)
            if loss is kd_loss:
                _require_same_shapes(output, targets)
            return _mean(loss(output, targets, heat, *([] if trainer is None else [own])))

        return _gradient(objective, (params, state.regressors))

    def update(
        updates,
        state,
        params=None,
        *,
        batch=_MISSING,
        teacher_grads=None,
        regressor_grads=None,
        **extra,
    ):
        if params is None:
            got, fix = "None", "Call opt.update(grads, state, params, batch=batch)."
            rule = "be given to `update` (distill needs params)"
            raise ValueError(_check.message("distill", "params", rule, got, fix))
        if teacher_grads is not None:
            _require_regressor_grads(state.regressors, regressor_grads)
            grads, others = teacher_grads, regressor_grads
        elif batch is _MISSING:
            got, fix = "nothing", "Call opt.update(grads, state, params, batch=batch)."
            rule = "be given to `update` as an extra argument"
            raise TypeError(_check.message("distill", "batch", rule, got, fix))
        else:
            grads, others = of_batch(params, state, batch)
        task, distilled = number_at(task_weight, state.step), number_at(weight, state.step)
        (ours, theirs), back = aligned("distill", (updates, grads), params)
        combined, held = combination.update(
            (scale(task, ours), scale(distilled, theirs)),
            state.combination,
            params,
            step=state.step,
        )
        state = state._replace(step=jnp.asarray(optax.safe_increment(state.step)), combination=held)
        if trainer is not None:
            others = jax.tree.map(
                lambda g, r: (distilled.astype(_wide(g)) * g.astype(_wide(g))).astype(r.dtype),
                others,
                state.regressors,
            )
            moves, inner = trainer.update(others, state.inner, state.regressors, **extra)
            state = state._replace(regressors=_apply(state.regressors, moves), inner=inner)
        return back(combined), state

    return optax.GradientTransformationExtraArgs(init, update)


def regressors(opt_state: PyTree) -> PyTree:
    """The regressors that `distill` has trained, wherever its state is nested.

    Args:
        opt_state: state of an optimizer with `jc.distill(..., regressors=...)` inside of any
            Optax wrapper.

    Returns:
        The tree of regressors; a tuple of them, in order, where there are several.

    Raises:
        ValueError: there is none.

    Examples:
        >>> opt = optax.chain(
        ...     jc.distill(
        ...         lambda params, x: x @ params,
        ...         lambda x: x,
        ...         loss=lambda s, t, _, scale: (s * scale - t) ** 2,
        ...         regressors=jnp.ones(()),
        ...         regressor_optimizer=optax.sgd(0.1),
        ...     ),
        ...     optax.adam(1e-3),
        ... )
        >>> jc.distillation.regressors(opt.init(jnp.eye(2)))
        Array(1., dtype=float32)
    """
    is_ours = lambda x: isinstance(x, DistillState)  # noqa: E731
    nodes = jax.tree.leaves(opt_state, is_leaf=is_ours)
    found = [x.regressors for x in nodes if is_ours(x) and jax.tree.leaves(x.regressors)]
    if not found:
        rule, got = "hold the state of distill with regressors", type(opt_state).__name__
        raise ValueError(_check.message("regressors", "opt_state", rule, got))
    return found[0] if len(found) == 1 else tuple(found)


def _gradient(objective, trained):
    """The gradient, with None where a leaf is None or not floating point."""
    leaves, treedef = jax.tree.flatten(trained, is_leaf=lambda x: x is None)
    chosen = [is_inexact(leaf) for leaf in leaves]

    def of_floating(floating):
        floating = iter(floating)
        merged = [next(floating) if c else x for c, x in zip(chosen, leaves, strict=True)]
        return objective(treedef.unflatten(merged))

    grads = jax.grad(of_floating)([x for c, x in zip(chosen, leaves, strict=True) if c])
    grads = iter(grads)
    return treedef.unflatten([next(grads) if c else None for c in chosen])


def _mean(values):
    if not isinstance(values, (jax.Array, np.ndarray, np.number, float)):
        rule, got = "return one array", _check.describe(values)
        fix = "What else it computes can't be handed on."
        raise TypeError(_check.message("distill", "loss", rule, got, fix))
    values = jnp.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        rule, got = "return real floating-point numbers", _check.describe(values)
        raise TypeError(_check.message("distill", "loss", rule, got))
    total = jnp.sum(values, dtype=wide_dtype(values.dtype))
    return total / max(values.size, 1)


def _own(x):
    """A strongly typed array of its own: a step may donate the state."""
    x = jnp.array(x)
    return jax.lax.convert_element_type(x, x.dtype)


def _apply(regressors, moves):
    """`optax.apply_updates` without a promotion of dtypes that strict mode would refuse."""

    def leaf(r, u):
        common = jnp.promote_types(_wide(r), _wide(u))
        return (r.astype(common) + u.astype(common)).astype(r.dtype)

    return jax.tree.map(leaf, regressors, moves)


def _wide(x):
    return wide_dtype(x.dtype)


def _require_regressors(regressors, optimizer) -> None:
    if regressors is None and optimizer is None:
        return
    if regressors is None:
        rule, got = "be given with `regressor_optimizer`", "None"
        raise TypeError(_check.message("distill", "regressors", rule, got))
    if not isinstance(optimizer, optax.GradientTransformation):
        rule, got = "be an optax.GradientTransformation", _check.describe(optimizer)
        fix = "It trains the regressors, for instance optax.adam(1e-3)."
        raise TypeError(_check.message("distill", "regressor_optimizer", rule, got, fix))
    for path, leaf in tree.leaves_with_paths(regressors):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            rule, got = "hold real floating-point leaves", _check.describe(leaf)
            fix = "What is not trained belongs in the loss."
            raise TypeError(_check.message("distill", "regressors", rule, got, fix, path=path))


def _require_regressor_grads(regressors, grads) -> None:
    rule = "be given to `update` with `teacher_grads` where there are regressors, and only there"
    fix = "Differentiate your loss by jc.distillation.regressors(state) too."
    if (grads is None) == bool(jax.tree.leaves(regressors)):
        got = "nothing" if grads is None else "some without regressors"
        raise TypeError(_check.message("distill", "regressor_grads", rule, got, fix))
    if grads is None:
        return
    if jax.tree.map(jnp.shape, grads) != jax.tree.map(jnp.shape, regressors):
        rule = f"be like the regressors, {jax.tree.map(_check.describe, regressors)}"
        got = jax.tree.map(_check.describe, grads)
        raise ValueError(_check.message("distill", "regressor_grads", rule, got, fix))


def _require_same_shapes(logits, targets) -> None:
    ours, theirs = (jax.tree.map(_check.describe, x) for x in (logits, targets))
    if jax.tree.map(jnp.shape, logits) != jax.tree.map(jnp.shape, targets):
        rule = f"return logits of the student's shape, {ours}"
        fix = "Other shapes, as of features, need a loss of your own."
        raise ValueError(_check.message("distill", "teacher", rule, theirs, fix))

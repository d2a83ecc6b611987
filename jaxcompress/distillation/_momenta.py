"""A transformation of its own for the gradient of each loss: separate momenta (DOT)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check
from jaxcompress._types import Numeric, PyTree
from jaxcompress.distillation._combine import Combination, add, of_floating, require_count
from jaxcompress.projections import number_at


class DotState(NamedTuple):
    """State of `dot`: the momentum of the task's gradients, and of the teacher's."""

    task: PyTree
    teacher: PyTree


def separate(*transformations: optax.GradientTransformation) -> Combination:
    r"""Transforms the gradient of each loss on its own, then adds them up.

    .. math:: u = \sum_k \mathrm{opt}_k(g_k)

    The sum goes on through the chain: `optax.chain(jc.distill(..., combine=separate(...)),
    optax.sgd(0.1))`. So each loss may have its own momentum, clipping or adaptive scale, and
    any optimizer follows.

    Args:
        *transformations: one for each gradient, the task's first: `optax.trace(0.9)`,
            `optax.clip_by_global_norm(1.0)`, `optax.scale_by_adam()`, a chain, `identity()`…

    Returns:
        A `Combination` with a tuple of their states. Each of them sees gradients and params in
        float32 at least, so that moments do not stall in bfloat16; and only floating-point
        leaves. Extra arguments of `update` do not reach them.

    Raises:
        TypeError: one is not a transformation.
        ValueError: there is not one transformation for each gradient.

    Cost: those of the transformations, and one sum.

    Examples:
        >>> each = jc.distillation.separate(optax.identity(), optax.clip_by_global_norm(1.0))
        >>> state = each.init(jnp.zeros(2), 2)
        >>> each.update((jnp.array([2.0, 0.0]), jnp.array([0.0, 9.0])), state)[0]
        Array([2., 1.], dtype=float32)

    Source: Zhao et al. 2023, arXiv:2307.08436, section 3.2, for momenta; `dot` is that case.
    """
    for transformation in transformations:
        if not isinstance(transformation, optax.GradientTransformation):
            rule, got = "be optax.GradientTransformations", _check.describe(transformation)
            raise TypeError(_check.message("separate", "transformations", rule, got))
    parts = [optax.with_extra_args_support(t) for t in transformations]

    def init(params, count):
        require_count("separate", count, len(parts))
        return tuple(part.init(params) for part in parts)

    def update(gradients, state, params, step):
        del step
        require_count("separate", len(gradients), len(parts))
        outs = [
            part.update(_as_held(gradient, params), held, params)
            for part, gradient, held in zip(parts, gradients, state, strict=True)
        ]
        return add([out for out, _ in outs]), tuple(held for _, held in outs)

    return of_floating("separate", init, update)


def dot(momentum: Numeric = 0.9, delta: Numeric = 0.075) -> Combination:
    r"""The Distillation-Oriented Trainer: more momentum for the teacher's gradient.

    .. math:: v_\mathrm{task} \leftarrow (\mu - \delta)\, v_\mathrm{task} + g_\mathrm{task},
        \qquad v_\mathrm{kd} \leftarrow (\mu + \delta)\, v_\mathrm{kd} + g_\mathrm{kd},
        \qquad u = v_\mathrm{task} + v_\mathrm{kd}

    The paper's trainer is `optax.chain(jc.distill(..., combine=jc.distillation.dot()),
    optax.sgd(rate))`; weight decay goes to the task's gradient: put
    `optax.add_decayed_weights(decay)` before `distill`. Use no other momentum after it.

    Args:
        momentum: :math:`\mu`, in [0, 1]: a number, a JAX scalar (maybe traced) or an Optax
            schedule of the step.
        delta: :math:`\delta`, at least 0, with :math:`\mu + \delta < 1`; the same choice. The
            paper takes 0.075 for CIFAR-100 and Tiny-ImageNet, 0.09 for ImageNet. With 0 it is
            `optax.trace(momentum)` of the summed gradient.

    Returns:
        A `Combination` of two gradients with the state `DotState(task, teacher)`, in float32
        at least.

    Raises:
        TypeError: a number is not a real scalar.
        ValueError: a number is out of range, or there are not two gradients.

    Cost: two momenta in memory, two elementwise passes.

    Examples:
        >>> trainer = jc.distillation.dot(momentum=0.5, delta=0.25)
        >>> g, state = jnp.ones(1), trainer.init(jnp.zeros(1), 2)
        >>> _, state = trainer.update((g, g), state)
        >>> trainer.update((g, g), state)
        (Array([3.], dtype=float32), DotState(task=Array([1.25], dtype=float32),
                                              teacher=Array([1.75], dtype=float32)))

    Source: Zhao et al. 2023, arXiv:2307.08436, section 3.2.
    """
    _check.numeric("dot", "momentum", momentum, 0, 1)
    _check.numeric("dot", "delta", delta, 0, 1)
    if not any(callable(x) or _check.is_traced(x) for x in (momentum, delta)):
        total = float(np.asarray(momentum)) + float(np.asarray(delta))
        if total >= 1:
            rule, fix = "be less than 1 - momentum", "The teacher's momentum would diverge."
            raise ValueError(_check.message("dot", "delta", rule, delta, fix))

    def init(params, count):
        require_count("dot", count, 2)
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return DotState(zeros(), zeros())

    def update(gradients, state, params, step):
        require_count("dot", len(gradients), 2)
        mean, half = number_at(momentum, step), number_at(delta, step)
        first, second = (_as_held(gradient, params) for gradient in gradients)
        task = _moved(state.task, first, mean, -half)
        teacher = _moved(state.teacher, second, mean, half)
        return add([task, teacher]), DotState(task, teacher)

    return of_floating("dot", init, update)


def _moved(momenta: PyTree, gradient: PyTree, mean: jax.Array, shift: jax.Array) -> PyTree:
    def leaf(v, g):
        return (mean.astype(v.dtype) + shift.astype(v.dtype)) * v + g

    return jax.tree.map(leaf, momenta, gradient)


def _as_held(gradient: PyTree, params: PyTree) -> PyTree:
    """In the dtypes of the params that `init` saw, so that the state keeps its own."""
    return jax.tree.map(lambda g, w: g.astype(w.dtype), gradient, params)

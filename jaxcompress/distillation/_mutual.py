"""Students that learn from each other."""

import jax
import jax.numpy as jnp

from jaxcompress._types import ArrayLike
from jaxcompress.distillation._divergence import kl
from jaxcompress.distillation._stacks import read_stack


def mutual_loss(
    logits: ArrayLike, temperature: ArrayLike = 1.0, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Deep mutual learning: how far each student is from the others, on average.

    .. math:: L_k = \frac{T^2}{K - 1} \sum_{l \ne k} \mathrm{KL}(p_l \,\|\, p_k), \quad
        p_k = \mathrm{softmax}(s_k / T)

    For student k the others are teachers: no gradient flows to them from :math:`L_k`. So the
    gradient of the sum over all students gives each one its own. Add the task's losses.

    Args:
        logits: :math:`s`, shape [students, ..., classes], any real float dtype, as
            `jax.vmap(apply, (0, None))(stacked_params, x)` gives them, or of unlike students
            `jnp.stack([f(params_f, x), g(params_g, x)])`.
        temperature: :math:`T > 0`, a scalar or one number per row (shape
            `logits.shape[1:-1]`). May be traced. The paper has 1.
        where: booleans that broadcast to `logits.shape[1:]`: which classes there are.

    Returns:
        One number per student and row, at least 0, shape `logits.shape[:-1]`: the mean of
        `kd_loss(s_k, s_l, T)` over the others; dtype, masks, -inf and rows without
        classes as there. 0 for a single student.

    Raises:
        TypeError: the logits are not real floating point, `where` is not boolean; raised while
            tracing.
        ValueError: the logits are no stack, a known `temperature` is not above 0.

    Cost: K (K - 1) times that of `kd_loss` for a single student's logits, and the memory of K:
    one round of pairs at a time, made anew for the gradient.

    Examples:
        >>> apply = lambda params, x: x @ params
        >>> students, x = jnp.stack([jnp.eye(2), 2.0 * jnp.eye(2)]), jnp.eye(2)
        >>> labels = jnp.array([0, 1])
        >>> def loss(students):
        ...     logits = jax.vmap(apply, (0, None))(students, x)
        ...     mimic = jc.distillation.mutual_loss(logits)
        ...     task = jax.vmap(optax.losses.softmax_cross_entropy_with_integer_labels, (0, None))
        ...     return jnp.sum(jnp.mean(task(logits, labels) + mimic, axis=1))
        >>> jax.grad(loss)(students).shape
        (2, 2, 2)

    Source: Zhang et al. 2018, arXiv:1706.00384, the loss of K networks. Differs: all students
    take a step at once, where theirs take turns, each seeing the steps before its own; a
    temperature.
    """
    s, heat, keep = read_stack("mutual_loss", logits, temperature, where)
    students = s.shape[0]
    if students == 1:
        return jnp.zeros(s.shape[:-1], s.dtype)
    others = jax.lax.stop_gradient(s)

    @jax.checkpoint
    def one_round(shift):
        return kl(s, jnp.roll(others, shift, 0), heat, keep)

    total = jnp.sum(jax.lax.map(one_round, jnp.arange(1, students)), 0)
    return heat * heat * total / (students - 1)

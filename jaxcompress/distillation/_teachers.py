"""Teachers: any function with its weights, and several of them as one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.distillation._rows import column, softmax
from jaxcompress.distillation._stacks import read_stack


def frozen(apply: Callable[..., Any], params: PyTree) -> jax.tree_util.Partial:
    """A function with its weights as one value, that is called and gets no gradient.

    What it returns is a pytree: its leaves are the weights. Hand it to a jitted step in the
    batch, as any array, and the weights are arguments of the compiled program. A teacher that
    the step closes over is a constant of that program instead: copied into it, computed with
    while it is compiled, and compiled again for the next teacher.

    Args:
        apply: static. `apply(params, *args, **kwargs)`, any function. It need not be
            differentiable. Of a Flax NNX module: `module.eval()`, then
            `jc.functional(module)`, or dropout stays on and batch norm reads the batch. Of a Linen
            module: `lambda params, x: module.apply({"params": params}, x, deterministic=True)`.
        params: any pytree of weights; compressed ones with `jc.lift(apply)`.

    Returns:
        `teacher(*args, **kwargs)`, a `jax.tree_util.Partial`: `apply(params, *args, **kwargs)`
        with `stop_gradient` on the weights, on the arrays among the arguments and on the result.
        It goes through `jit`, `vmap` and `scan`, is sharded, saved and stacked as other trees.
        Two of one `apply` and of weights alike share a compiled program.

    Raises:
        TypeError: `apply` is not a function.

    Cost: that of `apply`, forward alone.

    Examples:
        >>> apply = lambda params, x: x @ params["w"]
        >>> teacher = jc.distillation.frozen(apply, {"w": 2.0 * jnp.eye(2)})
        >>> student = lambda params, batch: apply(params, batch["x"])
        >>> opt = jc.distill(student, lambda batch: batch["teacher"](batch["x"]))
        >>> params, batch = {"w": jnp.eye(2)}, {"x": jnp.eye(2), "teacher": teacher}
        >>> step = jax.jit(lambda g, s, p, batch: opt.update(g, s, p, batch=batch))
        >>> updates, _ = step({"w": jnp.zeros((2, 2))}, opt.init(params), params, batch)
        >>> updates["w"].round(3)
        Array([[-0.075,  0.075],
               [ 0.075, -0.075]], dtype=float32)

        The dense version of a student under compression is a teacher too: the weights behind
        `jc.straight_through`, read anew for each step.

        >>> opt = jc.straight_through(optax.sgd(0.1), jc.prune(0.5))
        >>> dense = jc.distillation.frozen(apply, jc.latent(opt.init(params)))

        A chain of assistants is a loop over sizes: each student is the next one's teacher.

        >>> def train(width, teacher):
        ...     return {"w": teacher(jnp.eye(2)) / width}  # your training
        >>> for width in (2, 1):
        ...     teacher = frozen(apply, train(width, teacher))

    Source: Hinton et al. 2015, arXiv:1503.02531 (a teacher that is trained no more); Mirzadeh
    et al. 2019, arXiv:1902.03393 (assistants).
    """
    if not callable(apply):
        got = _check.describe(apply)
        raise TypeError(_check.message("frozen", "apply", "be a function", got))
    # Partials compare by the function in them, so equal teachers hit the same compiled step.
    return jax.tree_util.Partial(_call, jax.tree_util.Partial(apply), params)


def _call(apply, params, *args, **kwargs):
    # On the way in too, so that nothing is differentiated that need not be differentiable.
    args, kwargs = _stopped((args, kwargs))
    return _stopped(apply(_stopped(params), *args, **kwargs))


def _stopped(tree):
    """`stop_gradient` of the arrays: Python numbers may be static for the function."""
    stop = lambda x: jax.lax.stop_gradient(x) if isinstance(x, jax.Array) else x  # noqa: E731
    return jax.tree.map(stop, tree)


def ensemble_logits(
    logits: ArrayLike,
    weights: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
    geometric: bool = False,
) -> jax.Array:
    r"""Several teachers as one: logits of the weighted mean of their distributions.

    .. math:: z = T \log \sum_k w_k\, \mathrm{softmax}(t_k / T)
        \quad\text{or}\quad z = \sum_k w_k\, t_k

    At temperature T the first is the arithmetic mean of the members' distributions,
    `softmax(z / T)`: hand it to a loss with the same temperature. The second is their geometric
    mean, at all temperatures.

    Args:
        logits: :math:`t`, shape [members, ..., classes], any real float dtype. Of one function
            with stacked weights `jax.vmap(apply, (0, None))(params, x)`, of several
            `jnp.stack([f(x), g(x)])`.
        weights: :math:`w \ge 0`, shape [members], or [members, ...] for weights of each row;
            they are divided by their sum. May be traced. None: all equal.
        temperature: :math:`T > 0`, a scalar or one number per row (shape
            `logits.shape[1:-1]`). May be traced. The geometric mean does not depend on it.
        where: booleans that broadcast to `logits.shape[1:]`: which classes there are.
        geometric: static. The mean of the logits in place of that of the probabilities.

    Returns:
        Logits, shape `logits.shape[1:]`; float64 if the logits are, otherwise float32. A class
        is -inf where `where` leaves it away, and where its probability is 0: all members rule it
        out with -inf (geometric: one does). A member of weight 0 is not read, NaN or not, and
        gives its weight no gradient. A row whose weights are all 0 is NaN.

    Raises:
        TypeError: the logits are not real floating point, the weights are not real numbers,
            `where` is not boolean; raised while tracing.
        ValueError: the logits or weights have another shape, a known weight is negative or not
            finite, a known `temperature` is not above 0.

    Cost: one softmax of each member and a sum over them; a few arrays of the logits' shape.

    Examples:
        >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> np.round(np.exp(jc.distillation.ensemble_logits(logits)), 2)
        array([0.7, 0.3], dtype=float32)
        >>> z = jc.distillation.ensemble_logits(logits, jnp.array([3.0, 1.0]), geometric=True)
        >>> np.round(np.asarray(jax.nn.softmax(z)), 2)
        array([0.63, 0.37], dtype=float32)

    Source: Hinton et al. 2015, arXiv:1503.02531, section 1 (either mean); You et al. 2017,
    "Learning from multiple teacher networks" (the mean of softened outputs). Differs: weights.
    """
    name = "ensemble_logits"
    z, heat, keep = read_stack(name, logits, temperature, where)
    w = _weights(name, weights, z)
    share = jnp.expand_dims(w / jnp.sum(w, 0, keepdims=True), -1)
    # NaN, where the weights are all 0, is neither read nor hidden.
    reads = jnp.broadcast_to(share != 0, z.shape)
    z = jnp.where(reads & keep, z, 0.0)
    if geometric:
        finite = z != -jnp.inf
        mean = jnp.sum(share * jnp.where(finite, z, 0.0), 0)
        return jnp.where(jnp.all(finite & keep, 0), mean, -jnp.inf)
    row = softmax(z, heat, keep)
    present = row.present & reads
    logs = jnp.where(present, row.logs, 0.0)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(present, logs, -jnp.inf), 0, keepdims=True))
    some = jnp.any(present, 0, keepdims=True)
    top = jnp.where(some, top, 0.0)
    powers = jnp.exp(jnp.where(present, logs - top, 0.0))
    total = jnp.sum(jnp.where(present, share * powers, 0.0), 0)
    mean = jnp.log(jnp.where(some[0], total, 1.0)) + top[0]
    return jnp.where(some[0], column(heat[0] if heat.ndim else heat) * mean, -jnp.inf)


def _weights(function, weights, logits):
    """One weight per member and row, or per member and 1 row, not yet divided by their sum."""
    members, rows = logits.shape[0], logits.shape[1:-1]
    if weights is None:
        weights = np.ones(members)
    rule = f"be real numbers of at least 0, shape [{members}] or {[members, *rows]}"
    got = _check.describe(weights)
    kind = getattr(weights, "dtype", None)
    kinds = (jnp.floating, jnp.integer)
    if kind is None or not any(jnp.issubdtype(kind, k) for k in kinds):
        raise TypeError(_check.message(function, "weights", rule, got))
    if weights.shape not in ((members,), (members, *rows)):
        raise ValueError(_check.message(function, "weights", rule, got))
    if not _check.is_traced(weights):
        known = np.asarray(weights, np.float64)
        if not (np.isfinite(known).all() and (known >= 0).all()):
            raise ValueError(_check.message(function, "weights", rule, known))
        if known.size and not (known.sum(0) > 0).all():
            rule = "have a member above 0 in each row"
            raise ValueError(_check.message(function, "weights", rule, known))
    w = jnp.asarray(weights, logits.dtype)
    return w if w.ndim > 1 else w.reshape(members, *[1] * len(rows))

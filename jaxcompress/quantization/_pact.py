"""PACT and DoReFa: quantized activations, weights and gradients for the loss."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, _keys, tree
from jaxcompress._sharding import place_like
from jaxcompress._types import ArrayLike, Numeric
from jaxcompress.projections import number_at
from jaxcompress.quantization._conventions import levels
from jaxcompress.quantization._fake import along, pass_through, whole
from jaxcompress.quantization._stochastic import typed_key


def pact(
    x: jax.Array, clip: ArrayLike, bits: ArrayLike = 4, *, axis: int | None = None
) -> jax.Array:
    r"""A ReLU with a learned upper end, in :math:`2^b` levels: for activations.

    .. math:: y = \left\lfloor \mathrm{clip}(x, 0, \alpha)\,\frac{2^b - 1}{\alpha} \right\rceil
        \frac{\alpha}{2^b - 1}, \qquad \frac{\partial y}{\partial x} = [0 \le x < \alpha], \quad
        \frac{\partial y}{\partial \alpha} = [x \ge \alpha]

    Add the square of :math:`\alpha`, with the factor of the weight decay, to the loss: without
    it the end is only ever pushed away by what it cuts.

    Args:
        x: activations, any shape, any float dtype; computed in float32.
        clip: :math:`\alpha`, positive: a parameter of the model. A scalar, an array that
            broadcasts to `x`, or a vector along `axis`. What is not positive gives zeros.
        bits: :math:`b`, 1 to 16. May be traced.
        axis: static. Of a vector of ends.

    Returns:
        Shape and dtype of `x`, in :math:`[0, \alpha]`.

    Raises:
        TypeError: `x` is not real floating point; raised while tracing.
        ValueError: `bits` is a number out of range; the shape of `clip` does not fit.

    Cost: one elementwise pass.

    Examples:
        >>> f = lambda x, alpha: jc.quantization.pact(x, alpha, 2)
        >>> f(jnp.array([-1.0, 0.9, 2.0, 7.0]), 3.0)
        Array([0., 1., 2., 3.], dtype=float32)
        >>> jax.grad(lambda a: f(jnp.array([-1.0, 0.9, 2.0, 7.0]), a).sum())(3.0)
        Array(1., dtype=float32, weak_type=True)

    Source: Choi et al. 2018, arXiv:1805.06085, equations 1 to 3.
    """
    _check.floating("pact", "x", x)
    _check.number("pact", "bits", bits, 1, 16)
    x, top = jnp.asarray(x), levels(whole(bits, 1, 16))
    wide, end = x.astype(jnp.float32), along("pact", "clip", clip, x, axis)
    fixed, limit = jax.lax.stop_gradient((wide, end))
    used = limit > 0
    step = jnp.where(used, limit, 1.0) * (1.0 / top)
    code = jnp.clip(jnp.round(fixed * (1.0 / step)), 0.0, top)
    value = jnp.where(used, code * step, 0.0)
    inside, above = (fixed >= 0) & (fixed < limit), (fixed >= limit) & used
    # The end comes in by a sum with zero, so that the value stays what it is.
    value = pass_through(value, jnp.broadcast_to(end, value.shape), above.astype(jnp.float32))
    return pass_through(value, wide, inside.astype(jnp.float32)).astype(x.dtype)


def dorefa(w: jax.Array, bits: ArrayLike) -> jax.Array:
    r"""Weights squashed by a tanh to [-1, 1] and rounded there: for use in the model.

    .. math:: \hat w = 2\,Q_b\!\left(\frac{\tanh w}{2 \max|\tanh w|} + \tfrac12\right) - 1,
        \qquad Q_b(u) = \lfloor (2^b - 1)\,u \rceil / (2^b - 1)

    and :math:`\hat w = \mathrm{sign}(w)\,\overline{|w|}` at one bit. The gradient goes straight
    through the rounding, and through the tanh; at one bit it is the identity.

    Args:
        w: weights, any shape, any float dtype; computed in float32.
        bits: :math:`b`, 1 to 16. May be traced.

    Returns:
        Shape and dtype of `w`. The scale of the weights is lost, as in the paper: normalize
        after the layer. Zeros stay zero only at one bit.

    Raises:
        TypeError: `w` is not real floating point; raised while tracing.
        ValueError: `bits` is a number out of range.

    Cost: a tanh per weight and one reduction.

    Examples:
        >>> jc.quantization.dorefa(jnp.array([2.0, 0.3, -0.2, -1.0]), 2).round(3)
        Array([ 1.   ,  0.333, -0.333, -1.   ], dtype=float32)

    Source: Zhou et al. 2016, arXiv:1606.06160, equations 5, 8 and 9.
    """
    _check.floating("dorefa", "w", w)
    _check.number("dorefa", "bits", bits, 1, 16)
    w, width = jnp.asarray(w), whole(bits, 1, 16)
    x = w.astype(jnp.float32)
    squashed = jnp.tanh(x)
    largest = jnp.max(jnp.abs(squashed), initial=0.0)
    unit = squashed * (0.5 / jnp.where(largest > 0, largest, 1.0)) + 0.5
    top = levels(width)
    fixed = jax.lax.stop_gradient(unit)
    rounded = jnp.round(jax.lax.optimization_barrier(fixed) * top) * (1.0 / top)
    one = jnp.ones((), jnp.float32)
    many = 2.0 * pass_through(rounded, unit, one) - 1.0
    fixed = jax.lax.stop_gradient(x)
    mean = jnp.sum(jnp.abs(fixed)) * (1.0 / max(w.size, 1))
    binary = pass_through(jnp.sign(fixed) * mean, x, one)
    return jnp.where(width == 1, binary, many).astype(w.dtype)


def _rounded_gradient(g: jax.Array, bits: ArrayLike, uniform: jax.Array, shared: tuple[int, ...]):
    """Equation 12: the largest magnitude is the end of the range; noise makes it unbiased."""
    x, top = g.astype(jnp.float32), levels(whole(bits, 1, 16))
    largest = jnp.max(jnp.abs(x), shared, keepdims=True, initial=0.0)
    used = jnp.where(largest > 0, largest, 1.0)
    place = jax.lax.optimization_barrier((x * (0.5 / used) + 0.5) * top)
    code = jnp.clip(jnp.round(place + (uniform - 0.5)), 0.0, top)
    out = (code * (1.0 / top) - 0.5) * (2.0 * used)
    return jnp.where(largest > 0, out, x).astype(g.dtype)


def round_backward(
    x: jax.Array, bits: ArrayLike, key: jax.Array, *, batch_axis: int | None = 0
) -> jax.Array:
    r"""The identity, whose gradient is rounded at random on its way back: for activations.

    .. math:: \hat g = 2 m \left[Q_b\!\left(\frac{g}{2 m} + \tfrac12 + \frac{\sigma}{2^b - 1}
        \right) - \tfrac12\right], \qquad m = \max|g|, \quad \sigma \sim U(-\tfrac12, \tfrac12)

    Args:
        x: activations, any shape, any float dtype.
        bits: :math:`b`, 1 to 16. May be traced.
        key: a `jax.random.key`, another one at each step and each place. May be traced.
        batch_axis: static. The axis with a range for each index, as in the paper; None: one
            range for all.

    Returns:
        `x`.

    Raises:
        TypeError: `x` is not real floating point, `key` is no key; raised while tracing.
        ValueError: `bits` is a number out of range; no such axis.

    Cost: nothing forward; one random number and a reduction backward.

    Examples:
        >>> key = jax.random.key(0)
        >>> f = lambda x: jc.quantization.round_backward(x, 2, key) @ jnp.array([3.0, -1.0, -3.0])
        >>> jax.grad(f)(jnp.zeros(3))
        Array([ 3., -1., -3.], dtype=float32)

    Source: Zhou et al. 2016, arXiv:1606.06160, equation 12.
    """
    _check.floating("round_backward", "x", x)
    _check.number("round_backward", "bits", bits, 1, 16)
    x = jnp.asarray(x)
    own = set()
    if batch_axis is not None and x.ndim:
        own = {_check.axis("round_backward", "batch_axis", batch_axis, x.ndim)}
    shared = tuple(a for a in range(x.ndim) if a not in own)
    data = jax.random.key_data(typed_key("round_backward", key))
    implementation = str(jax.random.key_impl(typed_key("round_backward", key)))
    bits = jnp.asarray(bits).astype(jnp.float32)
    return _identity(shared, implementation, x, bits, data)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _identity(shared, implementation, x, bits, data):
    del shared, implementation, bits, data
    return x


def _forward(shared, implementation, x, bits, data):
    del shared, implementation
    return x, (bits, data)


def _backward(shared, implementation, saved, g):
    bits, data = saved
    key = jax.random.wrap_key_data(data, impl=implementation)
    uniform = place_like(jax.random.uniform(key, g.shape, jnp.float32), g)
    return _rounded_gradient(g, bits, uniform, shared), jnp.zeros_like(bits), None


_identity.defvjp(_forward, _backward)


class RoundGradientsState(NamedTuple):
    """State of `round_gradients`: updates seen so far."""

    step: jax.Array


def round_gradients(
    bits: Numeric, *, key: jax.Array, where: tree.Where | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients of a few bits, rounded at random, so that they are right on average.

    The formula is that of `jc.quantization.round_backward`, with one range for each leaf. Put
    it before the optimizer: `optax.chain(jc.quantization.round_gradients(8, key=key), opt)`.

    Args:
        bits: 1 to 16. A number, a JAX scalar or an Optax schedule of the step; may be traced.
        key: a `jax.random.key`. May be traced. Each leaf folds in its path and each update its
            number.
        where: static. Whose gradients, see `jaxcompress.tree.select`; None for all real
            floating-point leaves.

    Returns:
        A transformation with the state `RoundGradientsState(step)`. Shapes and dtypes stay, and
        so does a leaf with a gradient that is not finite.

    Raises:
        ValueError: `bits` is a number out of range; `where` chooses nothing.
        TypeError: `key` is no key.

    Cost: one random number per gradient and a reduction per leaf.

    Examples:
        >>> opt = jc.quantization.round_gradients(2, key=jax.random.key(0))
        >>> grads = {"w": jnp.full((100, 100), 0.5).at[0, 0].set(1.0)}
        >>> updates, _ = opt.update(grads, opt.init(grads))
        >>> jnp.unique((3 * updates["w"]).round()), updates["w"].mean().round(2)
        (Array([1., 3.], dtype=float32), Array(0.5, dtype=float32))

    Source: Zhou et al. 2016, arXiv:1606.06160, equation 12. Differs: of the gradients of
    parameters, as low-precision communication has them; `round_backward` is the paper's.
    """
    _check.numeric("round_gradients", "bits", bits, 1, 16)
    typed = typed_key("round_gradients", key)

    def init(params):
        if where is not None:
            tree.select(params, where, function="round_gradients")
        return RoundGradientsState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra: Any):
        del params, extra
        width = number_at(bits, state.step)
        chosen = None
        if where is not None:
            chosen = tree.by_path(
                "round_gradients",
                "updates",
                tree.select(updates, where, function="round_gradients"),
            )

        def leaf(path, g):
            skip = not hasattr(g, "dtype") or not jnp.issubdtype(g.dtype, jnp.floating)
            if skip or (chosen is not None and not chosen[path]):
                return g
            own = _keys.of_leaf(typed, path, state.step)
            uniform = place_like(jax.random.uniform(own, g.shape, jnp.float32), g)
            out = _rounded_gradient(g, width, uniform, tuple(range(g.ndim)))
            return jnp.where(jnp.isfinite(g).all(), out, g)

        rounded = tree.map_with_path(leaf, updates)
        return rounded, RoundGradientsState(state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)

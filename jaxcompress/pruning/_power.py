"""Powerpropagation: weights as powers, so that training leaves small ones alone."""

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Reparametrization


def powerpropagation(power: ArrayLike, *, where: tree.Where = tree.is_weight) -> Reparametrization:
    r"""Weights as powers of trained latents: large ones learn faster, small ones hardly.

    .. math:: w = z\,|z|^{a-1}, \qquad \frac{\partial w}{\partial z} = a\,|z|^{a-1}, \qquad
        z_0 = \mathrm{sign}(w_0)\,|w_0|^{1/a}

    The weights crowd around zero and can be pruned further. Magnitudes of latents rank as
    those of weights, so any pruning by magnitude gives the same mask on either. A latent at
    zero gets no gradient (:math:`a > 1`): inside of `jc.reparametrized`, what is pruned stays
    pruned.

    Args:
        power: :math:`a`, at least 1; 1 is the plain parametrization. May be traced, and
            differentiated.
        where: static. The leaves to reparametrize, see `jaxcompress.tree.select`: those that it
            chooses from the params by their paths, shapes and dtypes. Others pass through.

    Returns:
        A `Reparametrization` whose latents have the structure, shapes and dtypes of the
        params. Zeros, ones and (at power 1) everything come back exactly; other values within a
        few roundings, :math:`(a + 1)\,2^{-8}` of the weight in bfloat16. NaN stays NaN. The
        gradient is finite at every finite latent.

    Raises:
        TypeError: a chosen leaf is not real floating point; `power` is a schedule, which
            latents can't follow.
        ValueError: `power` is a number below 1; no leaf is chosen.

    Cost: one power per weight in the forward pass and one in the backward pass.

    Examples:
        >>> r = jc.pruning.powerpropagation(2.0)
        >>> latents = r.init({"w": jnp.array([[4.0, -0.25]])})
        >>> latents["w"], r.apply(latents)["w"]
        (Array([[ 2. , -0.5]], dtype=float32), Array([[ 4.  , -0.25]], dtype=float32))

        Pruned while it trains, and once at the end:

        >>> inner = optax.chain(optax.sgd(0.1), jc.project_params(jc.every(100, jc.prune(0.5))))
        >>> opt = jc.reparametrized(inner, r)
        >>> params = {"w": jnp.array([[4.0, -0.25]])}
        >>> updates, state = opt.update({"w": jnp.zeros((1, 2))}, opt.init(params), params)
        >>> optax.apply_updates(params, updates)["w"]
        Array([[4., 0.]], dtype=float32)
        >>> jc.compress(jc.prune(0.5), r.apply(latents))["w"]
        Array([[4., 0.]], dtype=float32)

    Source: Schwarz et al. 2021, arXiv:2110.00296, section 2. An optimizer that divides by the
    size of gradients (Adam) undoes part of the effect on the latents: use SGD with momentum.
    """
    if callable(power):
        raise TypeError(
            _check.message(
                "powerpropagation", "power", "be a number", "a schedule", "Latents have one power."
            )
        )
    _check.number("powerpropagation", "power", power, 1)

    def each(f, params: PyTree) -> PyTree:
        chosen = tree.select(params, where, function="powerpropagation")

        def leaf(path, x, is_chosen):
            if not is_chosen:
                return jnp.asarray(x) if hasattr(x, "dtype") else x
            _check.floating("powerpropagation", "params", x, path)
            y = wide(x)
            return f(y, jnp.asarray(power, y.dtype)).astype(x.dtype)

        return tree.map_with_path(leaf, params, chosen)

    return Reparametrization(lambda params: each(_root, params), lambda z: each(_power, z))


@jax.custom_jvp
def _power(z: jax.Array, a: jax.Array) -> jax.Array:
    return z * jnp.power(jnp.abs(z), a - 1)


@_power.defjvp
def _power_jvp(primals, tangents):
    # By the chain rule the factors would be 0 * inf at a latent of zero.
    (z, a), (dz, da) = primals, tangents
    size = jnp.abs(z)
    steep = jnp.power(size, a - 1)
    w = z * steep
    log = jnp.log(jnp.where(size == 0, jnp.ones_like(size), size))
    return w, a * steep * dz + w * log * da


def _root(w: jax.Array, a: jax.Array) -> jax.Array:
    z = jnp.sign(w) * jnp.power(jnp.abs(w), 1 / a)
    return jnp.where(a == 1, w, z)

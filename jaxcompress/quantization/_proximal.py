"""Proximal quantization: weights are drawn to the grid more and more, not put there at once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import ArrayLike, Numeric
from jaxcompress.projections import Projection, number_at
from jaxcompress.quantization._stochastic import Values, around, neighbours


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed:
    """A grid or a codebook, and how far weights still are from it.

    Attributes:
        inner: the `Grid`, `FloatGrid` or `Centroids`.
        inverse_slope: float32 scalar; 1 leaves weights alone, 0 rounds them.
    """

    inner: Values
    inverse_slope: jax.Array

    def project(self, w: jax.Array) -> jax.Array:
        """Each weight moved towards the nearest value."""
        return _annealed(self.inner, w, self.inverse_slope)

    def pack(self, w: Any, path: str) -> Any:
        """As the inner one, once the inverse slope is 0."""
        if float(self.inverse_slope) > 0:
            rule, got = "be 0 to pack annealed weights", float(self.inverse_slope)
            fix = "Train on until its schedule ends."
            raise ValueError(_check.message("pack", "inverse_slope", rule, got, fix, path=path))
        return self.inner.pack(w, path)


def _annealed(values: Values, w: jax.Array, inverse_slope: jax.Array) -> jax.Array:
    rho = inverse_slope.astype(jnp.float32)
    x = w.astype(jnp.float32)
    fixed = jax.lax.stop_gradient(x)
    nearest, other = neighbours(values, fixed)
    # From the middle between both neighbours outwards, as far as the nearer one. The gradient
    # is the slope there, and none where a weight has arrived.
    middle, half = 0.5 * (nearest + other), 0.5 * jnp.abs(other - nearest)
    moved = (x - middle) * (1.0 / jnp.maximum(rho, 1e-30))
    arrived = jnp.abs(jax.lax.stop_gradient(moved)) >= half
    soft = jnp.where(arrived, nearest, middle + jnp.where(arrived, 0.0, moved))
    soft = jnp.where(rho <= 0, nearest, soft)
    # Where the slope is 1 nothing is rounded, not even on the way through float32.
    return jnp.where(rho >= 1, w, soft.astype(w.dtype))


def parq(projection: Projection, inverse_slope: Numeric) -> Projection:
    r"""Draws weights to the grid by a piecewise-affine map that steepens to rounding.

    .. math:: w \mapsto \mathrm{clip}\left(m + \frac{w - m}{\rho},\; q^-, q^+\right), \qquad
        m = \tfrac12 (q^- + q^+)

    with :math:`q^- \le w \le q^+` the neighbouring values. `jc.straight_through(opt,
    jc.quantization.parq(jc.quantize(2), jc.schedules.cosine(1.0, 0.0, begin, end)))` is PARQ:
    plain training at :math:`\rho = 1`, the straight-through estimator at 0, and in between
    proximal steps on latent weights (averaged gradients), which the paper proves to converge.

    Args:
        projection: static. `jc.quantize`, `jc.quantization.floats`, `jc.cluster` and the like
            of any options, also inside of `jc.masked`, `jc.every` and others.
        inverse_slope: :math:`\rho`, from 1, nothing is changed, to 0, exactly `projection`. A
            number, a JAX scalar or an Optax schedule of the step; may be traced.

    Returns:
        The projection whose structure has an `Annealed` per leaf. It is idempotent at 0 and 1
        alone. Below 1, what lies beyond the ends of the range goes to the end. An exact zero
        stays zero.

    Raises:
        TypeError: `projection` is not a `Projection` or rounds to nothing.
        ValueError: `inverse_slope` is a number outside of [0, 1]; or `pack` above 0.

    Cost: that of two roundings.

    Examples:
        >>> rounding = jc.quantize(2, axis=None, ranges=jc.quantization.absmax)
        >>> p = jc.quantization.parq(rounding, 0.5)
        >>> jc.compress(p, {"w": jnp.array([[1.0, 0.625, 0.1]])})["w"]
        Array([[1.  , 0.75, 0.  ]], dtype=float32)

    Source: Jin et al. 2025, arXiv:2503.15748, section 5, and torchao's `ProxPARQ`. The other
    proximal way, BinaryRelax, is `jc.relaxed`.
    """
    _check.numeric("parq", "inverse_slope", inverse_slope, 0, 1)

    def wrap(path, found, step):
        del path
        return Annealed(found, number_at(inverse_slope, step).astype(jnp.float32))

    return around("parq", projection, wrap)


def piecewise_affine(projection: Projection) -> Callable[..., jax.Array]:
    r"""The proximal operator of the distance to both neighbours on the grid.

    .. math:: \Omega(v) = \tfrac12 \sum_i (v_i - q_i^-)(q_i^+ - v_i), \qquad
        \mathrm{prox}_s(w) = \mathrm{clip}\left(m + \frac{w - m}{1 - s},\; q^-, q^+\right)

    The penalty is zero exactly on the grid, and infinite beyond its ends. This is the map of
    `jc.quantization.parq` with :math:`\rho = 1 - s`, for `jc.proximal`, without latent
    weights: proximal gradient descent. Its strength is a schedule from 0 to 1, and at 1 the
    weights are on the grid.

    Args:
        projection: static. As for `jc.quantization.parq`, without schedules; the
            grid is fitted to the weights of each step.

    Returns:
        An operator `(w, strength, path="") -> w` for `jc.proximal`: shape and dtype of `w`. A
        strength above 1 counts as 1.

    Raises:
        TypeError: `projection` is not a `Projection` or rounds to nothing; a leaf is not real
            floating point.
        ValueError: a strength is a number below 0.

    Cost: a `find` and two roundings.

    Examples:
        >>> rounding = jc.quantize(2, axis=None, ranges=jc.quantization.absmax)
        >>> draw = jc.quantization.piecewise_affine(rounding)
        >>> draw(jnp.array([[1.0, 0.625, 0.1]]), 0.5)
        Array([[1.  , 0.75, 0.  ]], dtype=float32)
        >>> strength = jc.schedules.linear(0.0, 1.0, 100, 900)
        >>> opt = optax.chain(optax.sgd(0.1), jc.proximal(draw, strength))

    Source: Jin et al. 2025, arXiv:2503.15748; the penalty follows from its map by integration.
    """
    parq(projection, 0.0)  # Refuses what is no projection before any leaf comes.

    def operator(w: jax.Array, strength: ArrayLike, path: str = "") -> jax.Array:
        _check.floating("piecewise_affine", "w", w, path or None)
        _check.number("piecewise_affine", "strength", strength, 0)
        p = parq(projection, 1.0 - jnp.asarray(strength).astype(jnp.float32))
        p, tree = p.everywhere or p, {path or "w": w}
        return p.project(tree, p.find(tree))[path or "w"]

    return operator

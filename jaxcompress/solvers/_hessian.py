"""The Hessian of a layer's squared output error, made safe to invert."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._types import ArrayLike

_MOST_TRIES = 10
_LEAST_DAMPING = 1e-6  # that a failure starts from


class Prepared(NamedTuple):
    """A Hessian ready for `compensate`.

    Attributes:
        factor: `[k, k]`, the upper triangular :math:`U` with :math:`H^{-1} = U^\\top U`, of the
            reordered Hessian.
        order: int32 `[k]`, which row of the layer comes first, second, …
        inverse_order: int32 `[k]`, where each row went: `order[inverse_order]` is `arange(k)`.
        dead: bool `[k]`, in the original order: inputs that were always zero.
    """

    factor: jax.Array
    order: jax.Array
    inverse_order: jax.Array
    dead: jax.Array


class PrepareInfo(NamedTuple):
    """How it went.

    Attributes:
        ok: whether the factor is finite and means something.
        damping: the damping that was used at last.
        tries: int32, how often it was factored.
    """

    ok: jax.Array
    damping: jax.Array
    tries: jax.Array


class Damped(NamedTuple):
    """`hessian` is that of the layer divided by `scale`; `lower` factors it in reverse order."""

    hessian: jax.Array
    lower: jax.Array
    scale: jax.Array
    dead: jax.Array
    info: PrepareInfo


def prepare(
    gram: jax.Array | np.ndarray, damping: ArrayLike = 0.01, *, act_order: bool = False
) -> tuple[Prepared, PrepareInfo]:
    r"""The upper Cholesky factor of the inverse of a damped Hessian.

    .. math:: U^\top U = H^{-1}, \qquad H = G + d\,s\,I, \qquad s = \overline{G_{jj}}

    Row j of :math:`U` says how the error of row j of a layer is best spread over the later
    rows, after the earlier ones were fixed.

    Args:
        gram: :math:`G = X^\top X`, `[k, k]`, any real float dtype, as `jc.calibrate(…,
            gram=True)` gives it.
        damping: :math:`d`, relative to the mean :math:`s` of the diagonal over inputs that were
            not always zero, at least 0. May be traced.
        act_order: static. Whether rows are taken by falling diagonal: those that matter most
            have the most rows left to make up for them.

    Returns:
        `(Prepared, PrepareInfo)` in float32 (float64 for a float64 gram). An input that was
        always zero gets the diagonal :math:`s (1 + d)` and is tied to no other. Where the
        factorization fails, or has a pivot that is rounding noise, the damping grows tenfold
        (from 1e-6), nine times at most; then, and for NaN or infinities in `gram`, `ok` is False
        and the factor NaN.

    Raises:
        ValueError: `gram` is no square matrix; `damping` is a number below 0 or NaN.
        TypeError: `gram` is not real floating point.

    Cost: one Cholesky decomposition a try and one triangular solve, :math:`O(k^3)`.

    Examples:
        >>> prepared, info = jc.solvers.prepare(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 0.0)
        >>> prepared.factor, bool(info.ok)
        (Array([[0.5, 0. ],
               [0. , 1. ]], dtype=float32), True)

    Source: Frantar et al. 2022, arXiv:2210.17323, section 3.3. Differs: the factor comes from
    the Cholesky factor of the Hessian in reverse order, so the inverse is never formed.
    """
    _check.floating("prepare", "gram", gram)
    if len(gram.shape) != 2 or gram.shape[0] != gram.shape[1]:
        fix = "Use jax.vmap for a stack of layers." if len(gram.shape) > 2 else ""
        got = _check.describe(gram)
        raise ValueError(_check.message("prepare", "gram", "be a square matrix", got, fix))
    _check.number("prepare", "damping", damping, 0.0)
    gram = wide(gram)
    order = jnp.arange(gram.shape[0], dtype=jnp.int32)
    dead = jnp.diagonal(gram) <= 0
    if act_order:
        order = jnp.argsort(-jnp.diagonal(gram), stable=True).astype(jnp.int32)
        gram = gram[order][:, order]
    damped = damp(gram, jnp.asarray(damping))
    back = jnp.argsort(order).astype(jnp.int32)
    return Prepared(inverse_factor(damped), order, back, dead), damped.info


def check_layer(function: str, w: Any, gram: Any, name: str = "gram") -> None:
    """Refuses what is no kernel with a square matrix that fits it."""
    _check.floating(function, "w", w)
    if len(w.shape) != 2:
        rule, got = "be a kernel of shape [inputs, outputs]", _check.describe(w)
        raise ValueError(_check.message(function, "w", rule, got, "Use jax.vmap for a stack."))
    _check.floating(function, name, gram)
    wanted = [w.shape[0], w.shape[0]]
    if list(gram.shape) != wanted:
        got = _check.describe(gram)
        raise ValueError(_check.message(function, name, f"be of shape {wanted}", got))


def damp(gram: jax.Array, damping: jax.Array) -> Damped:
    """The Hessian with the least damping, from `damping` on, that can be factored."""
    gram = wide(gram)
    size, dtype = gram.shape[0], gram.dtype
    damping = damping.astype(dtype)
    diagonal = jnp.diagonal(gram)
    dead = diagonal <= 0
    live = jnp.maximum(jnp.sum((~dead).astype(dtype)), 1.0)
    # Divided before it is summed, which could leave the range.
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal / live))
    scale = jnp.where(mean == 0, jnp.ones_like(mean), mean)
    unit = gram / scale + jnp.diag(dead.astype(dtype))

    def failed(carry):
        _, _, sound, tries = carry
        return ~sound & (tries < _MOST_TRIES)

    def attempt(carry):
        last, _, _, tries = carry
        harder = jnp.maximum(10 * last, jnp.asarray(_LEAST_DAMPING, dtype))
        strength = jnp.where(tries == 0, damping, harder)
        hessian = unit + strength * jnp.eye(size, dtype=dtype)
        lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
        # A pivot that is rounding noise: XLA's decomposition "succeeds" on singular matrices.
        # Wherever a NaN or an infinity is, it reaches a pivot.
        noise = 4 * math.sqrt(size) * jnp.finfo(dtype).eps * jnp.diagonal(hessian)[::-1]
        sound = (jnp.square(jnp.diagonal(lower)) > noise).all()
        return strength, lower, sound, tries + 1

    # The first try is a trip too, for a decomposition takes long to compile.
    start = (damping, unit, jnp.zeros((), bool), jnp.zeros((), jnp.int32))
    strength, lower, sound, tries = lax.while_loop(failed, attempt, start)
    lower = jnp.where(sound, lower, jnp.full_like(lower, jnp.nan))
    hessian = unit + strength * jnp.eye(size, dtype=dtype)
    return Damped(hessian, lower, scale, dead, PrepareInfo(sound, strength, tries))


def inverse_factor(damped: Damped) -> jax.Array:
    """The upper factor of the inverse of the layer's damped Hessian."""
    eye = jnp.eye(damped.lower.shape[0], dtype=damped.lower.dtype)
    if eye.size == 0:
        return eye
    inverse = jax.scipy.linalg.solve_triangular(damped.lower, eye, lower=True)
    upper = jnp.triu(inverse[::-1, ::-1]) / jnp.sqrt(damped.scale)
    return jnp.where(damped.info.ok, upper, jnp.full_like(upper, jnp.nan))

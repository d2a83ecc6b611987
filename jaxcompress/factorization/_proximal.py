"""Proximal operators of penalties on singular values, for `jc.proximal`."""

import functools

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import ArrayLike
from jaxcompress.factorization import _lapack as lapack
from jaxcompress.factorization._basis import as_matrix


def nuclear_norm(w: jax.Array, strength: ArrayLike, path: str = "") -> jax.Array:
    r"""The proximal operator of the nuclear norm: singular values shrink, small ones to zero.

    .. math:: W = U S V^\top \;\mapsto\; U \max(S - s, 0)\, V^\top
        = \arg\min_Z \tfrac12 \|Z - W\|_F^2 + s \sum_i \sigma_i(Z)

    What `jc.pruning.soft_threshold` is to weights. In training it finds the rank of each leaf,
    after which `jc.low_rank(energy=…)` packs it. A leaf is seen as a matrix of
    `prod(shape[:-1])` rows and `shape[-1]` columns, as in `jc.low_rank`.

    Args:
        w: weights of two or more dimensions, any float dtype; computed in float32.
        strength: :math:`s`, at least 0. May be traced: below 0 it then counts as 0.
        path: static. Named in errors.

    Returns:
        Shape and dtype of `w`, of a rank that counts the singular values above `strength`:
        exactly zero where there are none, exactly `w` at strength 0. A NaN or infinite entry
        makes the whole leaf NaN. Gradients with respect to both are finite, also where singular
        values are equal or zero.

    Raises:
        TypeError: `w` is not real floating point; raised while tracing.
        ValueError: `w` has fewer than two dimensions; `strength` is a number below 0.

    Cost: a thin SVD, O(m n min(m, n)). The eigenvectors of the smaller Gram matrix would come
    sooner, but squared singular values lose all digits below 3e-4 of the largest, which is where
    the strength of a training step lies.

    Examples:
        >>> w = jnp.diag(jnp.array([3.0, 1.5, 0.5]))
        >>> jc.factorization.nuclear_norm(w, 1.0).diagonal().round(3)
        Array([2. , 0.5, 0. ], dtype=float32)
        >>> opt = optax.chain(optax.sgd(0.1), jc.proximal(jc.factorization.nuclear_norm, 1e-3))

    Source: Cai, Candès & Shen 2008, arXiv:0810.3286, theorem 2.1. The derivative is that of a
    spectral function, Candès et al. 2012, arXiv:1210.4139, theorem 3.
    """
    s = _checked("nuclear_norm", w, strength, path)
    return automatic(functools.partial(_on_leaf, kind="soft"), w, s, like_first=True)


def singular_value_hard_threshold(w: jax.Array, strength: ArrayLike, path: str = "") -> jax.Array:
    r"""The proximal operator of the rank: small singular values become zero, others stay.

    .. math:: W = U S V^\top \;\mapsto\; U S\,[S > \sqrt{2 s}]\, V^\top
        \in \arg\min_Z \tfrac12 \|Z - W\|_F^2 + s\,\mathrm{rank}(Z)

    What `jc.pruning.hard_threshold` is to weights.

    Args:
        w: as in `nuclear_norm`.
        strength: :math:`s`, the price of one rank, at least 0. May be traced: below 0 it then
            counts as 0.
        path: static. Named in errors.

    Returns:
        Shape and dtype of `w`: exactly `w` where every singular value is kept, exactly zero where
        none is. A NaN or infinite entry makes the whole leaf NaN. No gradient reaches `strength`;
        that of `w` is finite, and grows as a kept and a dropped singular value come close.

    Raises:
        TypeError: `w` is not real floating point; raised while tracing.
        ValueError: `w` has fewer than two dimensions; `strength` is a number below 0.

    Cost: that of `nuclear_norm`.

    Examples:
        >>> w = jnp.diag(jnp.array([3.0, 1.5, 0.5]))
        >>> threshold = jc.factorization.singular_value_hard_threshold
        >>> jnp.linalg.matrix_rank(threshold(w, 0.5))
        Array(2, dtype=int32)

    Source: Eckart & Young 1936 gives the minimiser of each rank; as a step of an iteration Goldfarb
    & Ma 2009, arXiv:0906.3499 (iterative hard thresholding of singular values).
    """
    s = _checked("singular_value_hard_threshold", w, strength, path)
    cut = jnp.sqrt(2 * jax.lax.stop_gradient(s))
    return automatic(functools.partial(_on_leaf, kind="hard"), w, cut, like_first=True)


def _checked(function: str, w: jax.Array, strength: ArrayLike, path: str) -> jax.Array:
    """The strength in float32; a traced one below 0 counts as 0."""
    _check.floating(function, "w", w, path or None)
    if w.ndim < 2:
        rule, fix = "have two or more dimensions", "Choose other leaves with `where`."
        got = _check.describe(w)
        raise ValueError(_check.message(function, "w", rule, got, fix, path=path or None))
    _check.number(function, "strength", strength, 0)
    s = jnp.asarray(strength).astype(jnp.float32)
    return jnp.where(s < 0, jnp.zeros_like(s), s)


def _on_leaf(w: jax.Array, cut: jax.Array, *, kind: str) -> jax.Array:
    return singular_values_mapped(as_matrix(w), cut, kind).reshape(w.shape).astype(w.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def singular_values_mapped(matrix: jax.Array, cut: jax.Array, kind: str) -> jax.Array:
    """`U f(S) V^T`, where f is zero up to `cut` and above it as `kind` has it.

    Args:
        matrix: float32.
        cut: scalar, at least 0; of "sign" a fraction of the largest singular value.
        kind: static. "soft" for S - cut, "hard" for S, "sign" for 1.
    """
    return _mapped(matrix, cut, kind)[0]


def _mapped(matrix: jax.Array, cut: jax.Array, kind: str):
    u, s, vt = lapack.svd(matrix)
    if kind == "sign":
        cut = cut * jnp.max(s, initial=0.0)
    kept = (s > cut).astype(jnp.float32)
    value = jnp.where(s > cut, {"soft": s - cut, "hard": s, "sign": jnp.ones_like(s)}[kind], 0.0)
    # As a product, so that NaN is not hidden.
    out = product(u * jnp.where(jnp.isnan(s), s, value)[None, :], vt)
    return jnp.where(jnp.all(value == s), matrix, out), (u, s, vt, kept, value)


@singular_values_mapped.defjvp
def _mapped_jvp(kind, primals, tangents):
    matrix, cut = primals
    move, of_cut = tangents
    out, (u, s, vt, kept, value) = _mapped(matrix, cut, kind)
    slope = jnp.zeros_like(s) if kind == "sign" else kept
    # Divided differences of f, extended as an odd function. On one side of the cut f is a line:
    # its slope is exact also where the difference of two values would be all rounding.
    differences = jnp.where(
        kept[:, None] == kept[None, :],
        slope[:, None],
        _ratio(value[:, None] - value[None, :], s[:, None] - s[None, :]),
    )
    means = _ratio(value[:, None] + value[None, :], s[:, None] + s[None, :])
    inner = product(product(u.T, move), vt.T)
    even, odd = (inner + inner.T) / 2, (inner - inner.T) / 2
    moved = differences * even + means * odd
    if kind == "soft":
        moved = moved - jnp.diag(kept) * of_cut
    moved = product(product(u, moved), vt)
    # What leaves the span of the thin factor of the longer side.
    scale = _ratio(value, s)
    if matrix.shape[0] < matrix.shape[1]:
        outside = product(u.T, move) - product(inner, vt)
        moved = moved + product(u * scale[None, :], outside)
    elif matrix.shape[0] > matrix.shape[1]:
        outside = product(move, vt.T) - product(u, inner)
        moved = moved + product(outside * scale[None, :], vt)
    return out, moved


def _ratio(top: jax.Array, bottom: jax.Array) -> jax.Array:
    """Their quotient, and 0 for 0/0."""
    zero = bottom == 0
    return jnp.where(zero, 0.0, top / jnp.where(zero, 1.0, bottom))

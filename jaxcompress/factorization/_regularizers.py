"""Penalties on the singular values of weights, to add to a loss."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcompress import arrays, tree
from jaxcompress._products import product
from jaxcompress._sharding import automatic
from jaxcompress._types import PyTree
from jaxcompress.factorization import _lapack as lapack
from jaxcompress.factorization._basis import as_matrix, require_matrix
from jaxcompress.factorization._proximal import singular_values_mapped


def nuclear_norm_penalty(params: PyTree, *, where: tree.Where = tree.is_weight) -> jax.Array:
    r"""The sum of the singular values of the chosen leaves: a convex stand-in for their rank.

    .. math:: \sum_W \|W\|_* = \sum_W \sum_i \sigma_i(W), \qquad
        \nabla \|W\|_* = \sum_{\sigma_i > 0} u_i v_i^\top

    A gradient only brings singular values near zero; `jc.proximal` with
    `jc.factorization.nuclear_norm` makes them exactly zero.

    Args:
        params: any tree. A compressed leaf counts by the weights that it stands for.
        where: static. The leaves to penalize, see `jaxcompress.tree.select`. Each is seen as a
            matrix of `prod(shape[:-1])` rows and `shape[-1]` columns, as in `jc.low_rank`.

    Returns:
        A float32 scalar, computed in float32. The gradient is the subgradient of the least norm,
        finite also at equal and at zero singular values: those below the rounding of float32,
        :math:`\epsilon \max(m, n)\, \sigma_1`, count as zero. It is zero at a leaf of zeros and
        empty leaves add nothing. NaN and infinity give NaN.

    Raises:
        TypeError: a chosen leaf is not real floating point; raised while tracing.
        ValueError: a chosen leaf has fewer than two dimensions; no leaf is chosen.

    Cost: a thin SVD of each leaf, O(m n min(m, n)).

    Examples:
        >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0, 0.0])), "b": jnp.ones(3)}
        >>> jc.factorization.nuclear_norm_penalty(params)
        Array(4., dtype=float32)
        >>> jax.grad(jc.factorization.nuclear_norm_penalty)(params)["w"].diagonal()
        Array([1., 1., 0.], dtype=float32)

    Source: Fazel 2002, "Matrix rank minimization with applications"; subgradient of Watson 1992,
    "Characterization of the subdifferential of some matrix norms".
    """
    return _summed("nuclear_norm_penalty", params, where, _nuclear_norm)


def spectral_norm_penalty(params: PyTree, *, where: tree.Where = tree.is_weight) -> jax.Array:
    r"""Half the squared largest singular value of each chosen leaf, summed.

    .. math:: \tfrac12 \sum_W \sigma_1(W)^2, \qquad
        \nabla \tfrac12 \sigma_1(W)^2 = \sigma_1 u_1 v_1^\top

    It bounds how much a layer magnifies its input, and leaves the other directions free, where
    weight decay shrinks them all.

    Args:
        params: as in `nuclear_norm_penalty`.
        where: static. As in `nuclear_norm_penalty`.

    Returns:
        A float32 scalar, computed in float32. The gradient is finite: zero at a leaf of zeros,
        and where the largest singular value is not alone, that of one of its directions. NaN and
        infinity give NaN. A second derivative holds the singular vectors as they are.

    Raises:
        TypeError: a chosen leaf is not real floating point; raised while tracing.
        ValueError: a chosen leaf has fewer than two dimensions; no leaf is chosen.

    Cost: the eigenvectors of the smaller Gram matrix of each leaf, O(m n k + k^3) with
    k = min(m, n).

    Examples:
        >>> params = {"w": jnp.diag(jnp.array([3.0, 1.0, 0.0]))}
        >>> jc.factorization.spectral_norm_penalty(params)
        Array(4.5, dtype=float32)
        >>> jax.grad(jc.factorization.spectral_norm_penalty)(params)["w"].diagonal()
        Array([3., 0., 0.], dtype=float32)

    Source: Yoshida & Miyato 2017, arXiv:1705.10941, equation 4. Differs: the singular vectors are
    exact, where the paper takes a step of the power iteration each update, from a state.
    """
    return _summed("spectral_norm_penalty", params, where, _half_squared_spectral_norm)


def orthogonality_penalty(params: PyTree, *, where: tree.Where = tree.is_weight) -> jax.Array:
    r"""How far the chosen leaves are from orthonormal columns, or rows where those are fewer.

    .. math:: \sum_W \|W^\top W - I\|_F^2 = \sum_W \sum_i (\sigma_i^2 - 1)^2

    Args:
        params: as in `nuclear_norm_penalty`.
        where: static. As in `nuclear_norm_penalty`.

    Returns:
        A float32 scalar, computed in float32; zero exactly where all singular values are 1. A
        polynomial of the weights: derivatives of any order are exact. NaN gives NaN.

    Raises:
        TypeError: a chosen leaf is not real floating point; raised while tracing.
        ValueError: a chosen leaf has fewer than two dimensions; no leaf is chosen.

    Cost: the smaller Gram matrix of each leaf, O(m n min(m, n)), without a decomposition.

    Examples:
        >>> jc.factorization.orthogonality_penalty({"w": jnp.eye(3), "v": 2 * jnp.eye(2)})
        Array(18., dtype=float32)

    Source: Bansal et al. 2018, arXiv:1810.09102, equation 1 (soft orthogonality). Differs: a leaf
    with fewer rows than columns is compared by its rows. Its gradient is the same, as
    :math:`\|W W^\top - I\|_F^2` is less by the constant n - m, and zero is in reach.
    """
    return _summed("orthogonality_penalty", params, where, _orthogonality)


def _summed(
    function: str,
    params: PyTree,
    where: tree.Where,
    penalty: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    chosen = tree.select(params, where, function=function)
    total = jnp.zeros((), jnp.float32)

    def add(path, w, is_chosen):
        nonlocal total
        if is_chosen:
            w = arrays.todense(w)
            require_matrix(function, path, w)
            if math.prod(w.shape) > 0:
                total = total + automatic(lambda w: penalty(as_matrix(w)), w, like_first=False)

    tree.map_with_path(add, params, chosen)
    return total


@jax.custom_jvp
def _nuclear_norm(matrix: jax.Array) -> jax.Array:
    return jnp.sum(jnp.linalg.svd(matrix, full_matrices=False, compute_uv=False))


@_nuclear_norm.defjvp
def _nuclear_norm_jvp(primals, tangents):
    (matrix,), (move,) = primals, tangents
    # Its inner product with the matrix is the norm: one decomposition gives both.
    noise = jnp.asarray(jnp.finfo(jnp.float32).eps * max(matrix.shape), jnp.float32)
    sign = singular_values_mapped(matrix, noise, "sign")
    return jnp.sum(sign * matrix), jnp.sum(sign * move)


def _half_squared_spectral_norm(matrix: jax.Array) -> jax.Array:
    held = jax.lax.stop_gradient(matrix)
    # Squares of the entries must stay in the range of float32.
    top = jnp.max(jnp.abs(held))
    held = held * (1 / jnp.where(top > 0, top, 1.0))
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = product(held, held.T) if wide else product(held.T, held)
    first = lapack.eigh(gram)[1][:, -1]
    # With the vector held, the gradient of this square is the one of the singular value.
    image = product(first[None, :], matrix) if wide else product(matrix, first[:, None])
    return 0.5 * jnp.sum(jnp.square(image))


def _orthogonality(matrix: jax.Array) -> jax.Array:
    wide = matrix.shape[0] <= matrix.shape[1]
    gram = product(matrix, matrix.T) if wide else product(matrix.T, matrix)
    return jnp.sum(jnp.square(gram - jnp.eye(gram.shape[0], dtype=jnp.float32)))

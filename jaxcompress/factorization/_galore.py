"""Optimizers whose state is of low rank: GaLore."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxcompress import _check, tree
from jaxcompress._products import product
from jaxcompress._sharding import automatic, is_explicit, on_mesh_of
from jaxcompress._types import Numeric, PyTree
from jaxcompress.factorization._basis import (
    Basis,
    as_matrix,
    column_limit,
    is_wide,
    require_matrix,
    side_limit,
)
from jaxcompress.factorization._decompose import decompose
from jaxcompress.projections import number_at
from jaxcompress.projections._due import found_when
from jaxcompress.projections._optax import _optimizer


class GaloreState(NamedTuple):
    """State of `galore`: updates seen so far, the inner optimizer's state, and the subspaces.

    `basis` has the structure of the params, with a `Basis` at each chosen leaf and an
    `optax.MaskedNode()` at the others.
    """

    step: jax.Array
    inner: PyTree
    basis: PyTree


def galore(
    optimizer: optax.GradientTransformation,
    rank: Numeric,
    every: Numeric = 200,
    scale: Numeric = 1.0,
    *,
    max_rank: int | None = None,
    where: tree.Where = tree.is_weight,
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that sees the gradients of matrices in a small subspace, to save memory.

    .. math:: R_t = P^\top G_t, \qquad W_{t+1} = W_t + \alpha\, P\, \mathrm{opt}(R_t)

    Every `every` updates :math:`P` becomes the :math:`r` first singular vectors of the shorter
    side of the gradient; for a leaf of more rows than columns it acts from the right. The state
    of the inner optimizer, such as the moments of Adam, is of :math:`r \times n` numbers in place
    of :math:`m \times n`. Parameters stay dense and of full rank.

    Args:
        optimizer: any Optax optimizer. Of a chosen leaf it sees a matrix :math:`R_t` of the dtype
            of the gradient; leaves that aren't chosen it sees as they are.
        rank: :math:`r`, at least 1; above the full rank it counts as full. A number, a JAX scalar
            or an Optax schedule, read when the subspaces are found; may be traced.
        every: updates from one subspace to the next, at least 1. As `rank`.
        scale: :math:`\alpha`, times the updates of the chosen leaves. As `rank`; read in each step.
        max_rank: static. How many rows (or columns) the inner state has; by default `rank` where
            that is a Python number, else the full rank, which saves nothing.
        where: static. The leaves to project, see `jaxcompress.tree.select`. Each is seen as a
            matrix of `prod(shape[:-1])` rows and `shape[-1]` columns, as in `jc.low_rank`.

    Returns:
        A transformation with the state `GaloreState(step, inner, basis)`. Extra arguments reach
        the inner optimizer. As params it gets :math:`P^\top W`, so that a penalty on the norm of
        the weights has its exact gradient in the subspace; a decay inside leaves the rest of
        each matrix as it is. To decay all of it, as the authors do, put the decay outside:
        `optax.chain(galore(optax.scale_by_adam(), r), optax.add_decayed_weights(1e-2),
        optax.scale_by_learning_rate(1e-3))`. The moments stay when the subspace changes; each
        new vector is signed as the old one in its place. A gradient that isn't finite when the
        subspaces are found makes its leaf NaN.

    Raises:
        ValueError: a number out of range; a chosen leaf has fewer than two dimensions; no leaf
            is chosen.
        TypeError: a chosen leaf is not real floating point.

    Cost: two products O(m n r) a step, one more with params, and, when a subspace is due, the
    eigenvectors of the smaller Gram matrix, O(m n k + k^3) with k = min(m, n), sooner than an SVD:
    vectors of close singular values at the cut may mix, which costs no more of the gradient's
    energy than the rounding of float32. It runs inside one conditional, also under `vmap`.
    Memory: r min(m, n) numbers for :math:`P` and r max(m, n) for each moment. Put
    `optax.MultiSteps` around it, not inside, and no optimizer inside that keeps parameters of its
    own (`optax.lookahead`): those would be of a subspace that is gone.

    Examples:
        >>> params = {"w": jnp.ones((64, 256))}
        >>> small = jc.factorization.galore(optax.adam(1e-3), rank=4).init(params)
        >>> jc.tree.nbytes(optax.adam(1e-3).init(params)) // jc.tree.nbytes(small)
        14

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithms 1 and 2. Differs: the signs; the
    authors' scale is 0.25, with a learning rate larger than that of Adam.
    """
    inner_optimizer = _optimizer("galore", optimizer)
    for name, value, least in (("rank", rank, 1), ("every", every, 1), ("scale", scale, None)):
        _check.numeric("galore", name, value, least)
    columns = column_limit("galore", rank, max_rank)
    if columns is not None and columns < 1:
        rule = "be a static integer of at least 1"
        raise ValueError(_check.message("galore", "max_rank", rule, max_rank))

    def init(params):
        mask = tree.select(params, where, function="galore")
        mask = jax.tree.map(lambda m, w: jax.tree.map(lambda _: m, w), mask, params)
        basis = tree.map_arrays_with_path(functools.partial(_empty, columns=columns), params, mask)
        return GaloreState(
            jnp.zeros((), jnp.int32), inner_optimizer.init(_mapped(_down, params, basis)), basis
        )

    def update(updates, state, params=None, **extra):
        period = jnp.maximum(number_at(every, state.step).astype(jnp.int32), 1)
        kept = jnp.maximum(jnp.round(number_at(rank, state.step).astype(jnp.float32)), 1.0)
        find = functools.partial(_found, kept=kept)
        due = state.step % period == 0
        basis = found_when(due, lambda: _mapped(find, updates, state.basis), state.basis)
        small = _mapped(_down, updates, basis)
        weights = None if params is None else _mapped(_down, params, basis)
        moves, inner = inner_optimizer.update(small, state.inner, weights, **extra)
        alpha = number_at(scale, state.step).astype(jnp.float32)
        out = _mapped(functools.partial(_up, alpha=alpha), updates, basis, moves)
        return out, GaloreState(state.step + 1, inner, basis)

    return optax.GradientTransformationExtraArgs(init, update)


def _mapped(f, leaves: PyTree, basis: PyTree, *rest: PyTree) -> PyTree:
    """`f(leaf, basis, *rest)`; leaves may be None where the params are not."""
    return jax.tree.map(f, leaves, basis, *rest, is_leaf=lambda x: x is None)


def _empty(path: str, w: Any, chosen: bool, columns: int | None) -> Basis | optax.MaskedNode:
    """The subspace before the first gradient: all zero."""
    if not chosen:
        return optax.MaskedNode()
    require_matrix("galore", path, w)
    shape = (side_limit(w.shape, None), side_limit(w.shape, columns))
    vectors = automatic(lambda w: jnp.zeros(shape, jnp.float32), w, like_first=False)
    return Basis(vectors, is_wide(w.shape))


def _found(g: Any, basis: Any, kept: jax.Array) -> Any:
    """The first `kept` singular vectors of the gradient, signed as the old ones."""
    if g is None or not isinstance(basis, Basis):
        return basis

    def vectors(g, old, kept):
        found = decompose(as_matrix(g), old.shape[1], "gram")
        new = found.u if basis.left else found.vt.T
        # Moments outlive the subspace: an arbitrary sign would turn them around.
        new = jnp.where(jnp.sum(new * old, axis=0)[None, :] < 0, -new, new)
        live = jnp.arange(old.shape[1], dtype=jnp.float32) < kept
        return jnp.where(live[None, :], new, 0.0)

    return Basis(automatic(vectors, g, basis.vectors, kept, like_first=False), basis.left)


def _down(w: Any, basis: Any) -> Any:
    """The leaf in the subspace: of `r` rows, or `r` columns where the basis acts from the right."""
    if w is None or not isinstance(basis, Basis):
        return w

    def small(w, q):
        out = product(q.T, as_matrix(w)) if basis.left else product(as_matrix(w), q)
        return out.astype(w.dtype)

    if not is_explicit(w):
        return small(w, basis.vectors)
    # The longer side stays sharded as it is, and with it the state of the inner optimizer.
    spec = jax.typeof(w).sharding.spec
    first = spec[0] if w.ndim == 2 else None
    spec = PartitionSpec(None, spec[-1]) if basis.left else PartitionSpec(first, None)
    run: Callable[..., Any] = jax.sharding.auto_axes(small, out_sharding=on_mesh_of(w, spec))
    return run(w, basis.vectors)


def _up(g: Any, basis: Any, move: Any, alpha: jax.Array) -> Any:
    """The update of the whole leaf."""
    if g is None or not isinstance(basis, Basis):
        return move

    def whole(g, q, move, alpha):
        wide = move.astype(jnp.float32)
        # Beyond the rank the gradient is zero, of which some optimizers make 0/0.
        live = jnp.any(q != 0, axis=0)
        wide = jnp.where(live[:, None] if basis.left else live[None, :], wide, 0.0)
        out = product(q, wide) if basis.left else product(wide, q.T)
        return (alpha * out).reshape(g.shape).astype(move.dtype)

    return automatic(whole, g, basis.vectors, move, alpha, like_first=True)

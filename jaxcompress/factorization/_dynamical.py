"""Dynamical low-rank training as an Optax optimizer."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic
from jaxcompress._types import Numeric, PyTree
from jaxcompress.factorization._basis import column_limit, require_matrix, side_limit
from jaxcompress.factorization._integrator import (
    Coordinates,
    DynamicalFactors,
    Gradient,
    advanced,
    dense,
    first,
    gradient,
)
from jaxcompress.projections import ReparametrizedState, number_at
from jaxcompress.projections._land import land
from jaxcompress.projections._optax import _optimizer, _require_params, _when_applied


class DynamicalState(NamedTuple):
    """Updates applied so far, and the state of the inner optimizer."""

    step: jax.Array
    inner: PyTree


def dynamical_low_rank(
    optimizer: optax.GradientTransformation,
    rank: Numeric | None = None,
    tolerance: Numeric | None = None,
    *,
    max_rank: int | None = None,
    where: tree.Where = tree.is_weight,
) -> optax.GradientTransformationExtraArgs:
    r"""Dynamical low-rank training: weights that stay of low rank, whose bases follow the gradient.

    .. math:: K = U_0 S_0 - \eta\, G V_0, \quad L = V_0 S_0^\top - \eta\, G^\top U_0, \quad
        \hat U = \mathrm{orth}[U_0, K], \quad \hat V = \mathrm{orth}[V_0, L], \\
        \hat S = \hat U^\top (U_0 S_0 V_0^\top - \eta\, G) \hat V, \qquad
        W_1 = \hat U\, \mathrm{truncated}(\hat S)\, \hat V^\top = U_1 S_1 V_1^\top

    The bases :math:`\hat U, \hat V` hold :math:`W_0` exactly, so that one gradient at
    :math:`W_0` serves the K, L and S steps. Nothing is divided by a singular value: unlike
    gradients of two factors, steps are as good where singular values are tiny, and an unused
    rank costs no stability.

    With SGD of learning rate :math:`\eta` this is the authors' scheme. Any other optimizer sees
    the gradient in the coordinates of the bases (`core`, `left`, `right`, `corner`; together of
    the norm of :math:`\hat U \hat U^\top G \hat V \hat V^\top`), and its update, a direction
    in them, replaces :math:`-\eta G`. Bases are turned within their span to where they lie
    nearest to the old ones, so that moments are carried along, whatever the optimizer.

    Args:
        optimizer: any Optax optimizer. Of a chosen leaf it sees `Coordinates` in float32; leaves
            that aren't chosen it sees and updates as they are. As params of a chosen leaf it
            gets :math:`S_0` as `core` and zeros: a decay of the weights is exact.
        rank: :math:`r` after each update, at least 1; above `max_rank` it counts as that. A
            number, a JAX scalar or an Optax schedule; may be traced.
        tolerance: instead of `rank`: the smallest :math:`r`, at least 1, whose truncation costs at
            most :math:`\tau \|\hat S\|_F` in the Frobenius norm; 0 to 1. In each step the rank may
            double or fall. As `rank`.
        max_rank: static. How many columns the factors hold; by default `rank` where that is a
            Python number, else the full rank. Give it with `tolerance`.
        where: static. The leaves to train so, see `jaxcompress.tree.select`. Each is seen as a
            matrix of `prod(shape[:-1])` rows and `shape[-1]` columns, as in `jc.low_rank`.

    Returns:
        A transformation with the state `ReparametrizedState(DynamicalState(step, inner),
        latent)`. `jc.latent(opt_state)` has `DynamicalFactors` at the chosen leaves, with the
        `rank` of each, and `jc.pack(opt_state, params)` gives `arrays.LowRank` of that rank.
        The factors start at the truncated SVD, and the params are their product from the first
        applied update on: begin at `jc.compress(jc.low_rank(r), params)` to take the first
        gradient there too. Extra arguments reach the inner optimizer. A gradient that isn't
        finite makes its leaf NaN; one that is None leaves it. An all-zero leaf starts from
        arbitrary directions. Gradients through an update hold the bases fixed.

    Raises:
        ValueError: both or none of `rank` and `tolerance`, or one out of range; a chosen leaf
            has fewer than two dimensions; no leaf is chosen; `update` without `params`.
        TypeError: a chosen leaf is not real floating point.

    Cost: with R = `max_rank` one `svd` per leaf in `init`; each step four products O(m n R), SVDs
    O((m + n) R^2) and O(R^3). Memory: (m + n + R) R numbers for the factors
    and (m + n + 2 R) R for each moment. Put `optax.MultiSteps` around it: inside, the corners
    that are added up belong to different bases.

    Examples:
        >>> opt = jc.factorization.dynamical_low_rank(optax.sgd(0.5), tolerance=0.1, max_rank=4)
        >>> goal = jnp.outer(jnp.arange(8.0), jnp.ones(6)).at[2, 3].add(5.0)
        >>> w, state = 0.1 * jnp.eye(8, 6), opt.init(0.1 * jnp.eye(8, 6))
        >>> for _ in range(20):
        ...     updates, state = opt.update(w - goal, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> jc.latent(state).rank, jc.pack(state, w).rank
        (Array(2, dtype=int32), 2)

    Source: Schotthöfer et al. 2022, arXiv:2205.13571, algorithm 1; the integrator of Ceruti, Kusch
    & Lubich 2021, arXiv:2104.05247; moments are transported as in Absil, Mahony & Sepulchre 2008,
    "Optimization algorithms on matrix manifolds", section 8.1. Differs: one gradient for all
    steps, where the authors take one in each; what optimizers other than SGD see.
    """
    inner_optimizer = _optimizer("dynamical_low_rank", optimizer)
    if (rank is None) == (tolerance is None):
        rule, got = "be given, or else `tolerance`, but not both", f"{rank!r} and {tolerance!r}"
        raise ValueError(_check.message("dynamical_low_rank", "rank", rule, got))
    if rank is not None:
        _check.numeric("dynamical_low_rank", "rank", rank, 1)
    if tolerance is not None:
        _check.numeric("dynamical_low_rank", "tolerance", tolerance, 0, 1)
    columns = column_limit("dynamical_low_rank", rank, max_rank)
    if columns is not None and columns < 1:
        rule = "be a static integer of at least 1"
        raise ValueError(_check.message("dynamical_low_rank", "max_rank", rule, max_rank))
    adaptive = rank is None

    def knob_at(step):
        wanted = tolerance if rank is None else rank
        return number_at(wanted, step).astype(jnp.float32)  # pyright: ignore[reportArgumentType]

    def init(params):
        mask = tree.select(params, where, function="dynamical_low_rank")
        mask = jax.tree.map(lambda m, w: jax.tree.map(lambda _: m, w), mask, params)
        step = jnp.zeros((), jnp.int32)
        start = functools.partial(_first, knob=knob_at(step), columns=columns, adaptive=adaptive)
        latent = tree.map_arrays_with_path(start, params, mask)
        inner = inner_optimizer.init(_mapped(_weights, params, latent))
        return ReparametrizedState(DynamicalState(step, inner), latent)

    def update(updates, state, params=None, **extra):
        _require_params("dynamical_low_rank", params)
        (step, held), latent = state.inner, state.latent
        seen = _mapped(_seen, updates, latent)
        grads = _mapped(lambda g, z, x: x.numbers if _chosen(z) else g, updates, latent, seen)
        weights = _mapped(_weights, params, latent)
        moves, inner = inner_optimizer.update(grads, held, weights, **extra)

        def applied():
            advance = functools.partial(_advanced, knob=knob_at(step), adaptive=adaptive)
            new = _mapped(advance, updates, latent, seen, moves)
            landed = _mapped(_landed, updates, new, params, moves)
            return landed, ReparametrizedState(DynamicalState(step + 1, inner), new)

        after = DynamicalState(step, inner)
        return _when_applied(held, after, params, updates, applied, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _mapped(f, leaves: PyTree, latent: PyTree, *rest: PyTree) -> PyTree:
    """`f(leaf, factors, *rest)`; leaves may be None where the params are not."""
    return jax.tree.map(f, leaves, latent, *rest, is_leaf=lambda x: x is None)


def _chosen(z: Any) -> bool:
    return isinstance(z, DynamicalFactors)


def _first(path: str, w: Any, chosen: bool, knob: jax.Array, columns: int | None, adaptive: bool):
    """The factors of a chosen leaf."""
    if not chosen:
        return optax.MaskedNode()
    require_matrix("dynamical_low_rank", path, w)
    start = functools.partial(first, width=side_limit(w.shape, columns), adaptive=adaptive)
    u, s, v, rank = automatic(start, w, knob, like_first=False)
    return DynamicalFactors(u, s, v, rank, tuple(w.shape), np.dtype(w.dtype))


def _weights(w: Any, z: Any) -> Any:
    """The leaf in its own coordinates."""
    if not _chosen(z):
        return w
    return Coordinates(z.s, *(jnp.zeros_like(x) for x in (z.u, z.v, z.s)))


def _seen(g: Any, z: Any) -> Any:
    """The gradient in the coordinates of the leaf; zeros where there is none."""
    if not _chosen(z):
        return g
    if g is None:
        return Gradient(jax.tree.map(jnp.zeros_like, _weights(None, z)), z.u, z.v)
    return automatic(gradient, g, z.u, z.v, like_first=False)


def _advanced(g: Any, z: Any, seen: Any, move: Any, knob: jax.Array, adaptive: bool) -> Any:
    """The factors after a step along `move`."""
    if g is None or not _chosen(z):
        return z
    step = functools.partial(advanced, adaptive=adaptive)
    given = (z.u, z.s, z.v, z.rank, seen.left, seen.right, move, knob)
    u, s, v, rank = automatic(step, *given, like_first=False)
    return DynamicalFactors(u, s, v, rank, z.shape, z.dtype)


def _landed(g: Any, z: Any, w: Any, move: Any) -> Any:
    """The update after which the leaf is the product of its factors."""
    if g is None or not _chosen(z):
        return None if g is None else move

    def target(w, u, s, v):
        return dense(u, s, v).reshape(w.shape)

    return land(w, automatic(target, w, z.u, z.s, z.v, like_first=True))

"""Magnitude pruning as a projection."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import Numeric
from jaxcompress.projections import Projection, number_at, of_leaves
from jaxcompress.pruning._masks import Mask
from jaxcompress.pruning._nm import keep_n_of_m
from jaxcompress.pruning._select import largest, largest_of_tree


def prune(
    sparsity: Numeric | None = None,
    *,
    nm: tuple[int, int] | None = None,
    axis: int = -2,
    scope: Literal["leaf", "global"] = "leaf",
) -> Projection:
    r"""Keeps the weights of largest magnitude and sets the others to zero.

    .. math:: w_i \mapsto w_i \,[\,|w_i| \text{ is among the } n - \lfloor s n \rceil
        \text{ largest}\,]

    Args:
        sparsity: :math:`s`, the fraction removed, 0 to 1. A number, a JAX scalar or an Optax
            schedule of the step (`jc.schedules.cubic` for gradual pruning); may be traced.
            A traced value outside of [0, 1] counts as the nearer end. Each leaf, or the whole
            tree with a global scope, keeps exactly :math:`n - \lfloor s n \rceil` weights
            (half to even, in float32): of equal magnitudes the first ones in C order, then
            in leaf order, live.
        nm: static. `(n, m)` instead of `sparsity`: the n largest of each m consecutive
            weights along `axis` are kept, as sparse tensor cores want it with `(2, 4)`.
        axis: static. Where the groups of `nm` run. The default is the axis that is summed
            over in Flax's layouts (`(in, out)`, and `(height, width, in, out)`); pass -1 for
            `(out, in)` layouts such as Equinox's. A leaf with one dimension has but one.
        scope: static. `"leaf"`: the sparsity holds for each leaf; `"global"`: for all chosen
            leaves together, by one threshold.

    Returns:
        A projection whose structure has a `Mask` per leaf. NaN ranks below every number, so
        it goes first. An empty leaf stays empty; a scalar counts as one weight. It drops
        nothing at sparsity 0 and everything at 1. Chosen by default are floating-point
        leaves of two or more dimensions; `jc.masked` chooses others.

    Raises:
        ValueError: `sparsity` is a number outside of [0, 1]; both or none of `sparsity` and
            `nm`; `nm` with a global scope, or not 0 <= n <= m.
        TypeError: a chosen leaf is not real floating point; raised while tracing.

    Cost: `find` counts, and never sorts: some ten passes over the weights (`largest`), m(m-1)
    comparisons for `nm`; sharded leaves are not gathered. `project` is one elementwise pass.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]]), "b": jnp.ones(2)}
        >>> jc.compress(jc.prune(0.5), params)["w"]
        Array([[ 0., -4.],
               [ 3.,  0.]], dtype=float32)
        >>> gradual = jc.prune(jc.schedules.cubic(0.0, 0.9, begin=0, end=1000))
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, gradual))

    Source: Han et al. 2015, arXiv:1506.02626; gradual schedule from Zhu & Gupta 2017,
    arXiv:1710.01878; N:M from Mishra et al. 2021, arXiv:2104.08378.
    """
    if (sparsity is None) == (nm is None):
        raise ValueError(
            _check.message(
                "prune",
                "sparsity",
                "be given, or else `nm`, but not both",
                f"sparsity={sparsity!r}, nm={nm!r}",
            )
        )
    if scope not in ("leaf", "global"):
        raise ValueError(_check.message("prune", "scope", 'be "leaf" or "global"', repr(scope)))
    if nm is not None:
        return _prune_n_of_m(nm, axis, scope)
    _check.number("prune", "sparsity", sparsity, 0, 1)
    wanted: Numeric = sparsity  # pyright: ignore[reportAssignmentType]

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads
        fraction = jnp.clip(number_at(wanted, step).astype(jnp.float32), 0.0, 1.0)
        sizes = [w.size for w in jax.tree.leaves(params)]
        magnitudes = tree.map_arrays_with_path(_magnitude, params)
        if scope == "global":
            keep = largest_of_tree(magnitudes, _kept_count(fraction, sum(sizes)))
        else:
            keep = jax.tree.map(lambda x: largest(x, _kept_count(fraction, x.size)), magnitudes)
        return jax.tree.map(Mask, keep)

    return of_leaves(find)


def _prune_n_of_m(nm: tuple[int, int], axis: int, scope: str) -> Projection:
    if not isinstance(nm, tuple) or len(nm) != 2:
        raise TypeError(_check.message("prune", "nm", "be a tuple (n, m)", repr(nm)))
    n, m = nm
    _check.integer("prune", "nm[1]", m, 1)
    _check.integer("prune", "nm[0]", n, 0, m)
    _check.integer("prune", "axis", axis, -64)
    if scope == "global":
        raise ValueError(
            _check.message(
                "prune", "scope", 'be "leaf" with `nm`', repr(scope), "Groups are local."
            )
        )

    def find(params, *, previous=None, grads=None, step=0):
        del previous, grads, step

        def leaf(path, w):
            scores = _magnitude(path, w)
            if w.ndim == 0:
                raise ValueError(
                    _check.message(
                        "prune",
                        "params",
                        "have leaves with a dimension when `nm` is given",
                        _check.describe(w),
                        "Choose other leaves with jc.masked.",
                        path=path,
                    )
                )
            along = 0 if w.ndim == 1 else _check.axis("prune", "axis", axis, w.ndim, path)
            return Mask(keep_n_of_m(scores, n, m=m, axis=along), nm=(n, m), axis=along)

        return tree.map_arrays_with_path(leaf, params)

    return of_leaves(find)


def _magnitude(path: str, w: jax.Array) -> jax.Array:
    _check.floating("prune", "params", w, path)
    return jnp.abs(w)


def _kept_count(sparsity: jax.Array, size: int) -> jax.Array:
    return jnp.uint32(size) - jnp.round(sparsity * size).astype(jnp.uint32)

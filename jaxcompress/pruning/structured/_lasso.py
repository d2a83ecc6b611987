"""The proximal operator of the group lasso over coupled leaves: whole units become zero."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, tree
from jaxcompress._dtypes import wide
from jaxcompress._sharding import automatic_like
from jaxcompress._types import ArrayLike, Numeric, PyTree
from jaxcompress.projections import ProximalState, number_at
from jaxcompress.projections._land import apply, land
from jaxcompress.projections._optax import _require_params
from jaxcompress.projections._proximal import as_landed, in_period, with_updates
from jaxcompress.pruning.structured._base import Dependencies
from jaxcompress.pruning.structured._leaves import (
    member_leaves,
    norms_of,
    present,
    require_dependencies,
)
from jaxcompress.pruning.structured._penalty import strengths_of, thresholds_of
from jaxcompress.pruning.structured._places import along, member_mask


def soft_threshold_units(
    dependencies: Dependencies,
    params: PyTree,
    strength: ArrayLike,
    *,
    strengths: Mapping[str, jax.Array] | None = None,
    by_size: bool = True,
) -> PyTree:
    r"""The proximal operator of `jc.pruning.group_penalty`: units shrink, small ones to zero.

    .. math:: w_u \mapsto w_u\,\max\left(0,\; 1 - s\,\gamma_u \sqrt{n_u} / \|w_u\|_2\right)

    Where no entry belongs to two units this is exactly the minimiser of
    :math:`\|v - w\|^2 / 2 + s\,\Omega(v)`. Groups that share entries (heads, and features of all
    heads) are taken one after the other, in their order, each on what the last one left: the
    first round of block coordinate ascent in the dual, which is exact where the units of
    one lie inside those of the next. An entry that two units of one group share (a leaf that
    reads and writes the same stream) gets both factors. However that may be, a unit whose norm
    is at most its threshold when its turn comes is exactly zero in all its places.

    Args:
        dependencies: static. From `jc.dependencies`.
        params: the parameters. Leaves of no group stay, and so do running statistics and what
            isn't floating point.
        strength: :math:`s`, at least 0. May be traced: below 0 it then counts as 0.
        strengths: :math:`\gamma`, as in `jc.pruning.group_penalty`.
        by_size: static. As there.

    Returns:
        Params of the same structure, shapes and dtypes, computed in float32 or wider. A NaN
        makes its unit NaN. The gradient is finite, also at a unit of zeros.

    Raises:
        ValueError: as `jc.pruning.group_penalty`; `strength` is a number below 0.
        TypeError: a leaf is packed.

    Cost: two reductions and one elementwise pass of each leaf for each of its members.

    Examples:
        >>> params = {"a": jnp.array([[3.0, 0.1]]), "b": jnp.array([[4.0], [0.1]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> jc.pruning.soft_threshold_units(groups, params, 1.0, by_size=False)["a"].round(3)
        Array([[2.4, 0. ]], dtype=float32)

    Source: Yuan & Lin 2006, "Model selection and estimation in regression with grouped
    variables"; the order of overlapping groups from Jenatton et al. 2011, "Proximal methods for
    hierarchical sparse coding".
    """
    leaves = member_leaves("soft_threshold_units", dependencies, params)
    _check.number("soft_threshold_units", "strength", strength, 0)
    given = strengths_of("soft_threshold_units", dependencies, strengths)
    groups = present(dependencies.groups, leaves)
    amount = jnp.asarray(strength)
    if not jnp.issubdtype(amount.dtype, jnp.floating):
        amount = amount.astype(jnp.float32)

    def shrunk(leaves, amount, given):
        amount = jnp.where(amount < 0, jnp.zeros_like(amount), amount)
        # Narrow leaves are rounded once, when all groups are through.
        now = {path: wide(w) for path, w in leaves.items()}
        for group in groups:
            norms = norms_of(group, now)
            least = thresholds_of(group, now, norms, amount, given, by_size)
            gone = norms <= least
            factor = jnp.where(gone, jnp.zeros_like(norms), 1 - least / jnp.where(gone, 1, norms))
            for member in group.members:
                x = now[member.path]
                kept = along(member_mask(group, member, factor), member.axis, x.ndim)
                kept = kept.astype(x.dtype)
                now[member.path] = jnp.where(kept == 0, jnp.zeros_like(x), x * kept)
        return {path: now[path].astype(w.dtype) for path, w in leaves.items()}, ()

    new, _ = automatic_like(shrunk, leaves, amount, given)
    return tree.map_with_path(lambda path, w: new.get(path, w), params)


def proximal_groups(
    dependencies: Dependencies,
    strength: Numeric,
    period: Numeric = 1,
    *,
    strengths: Mapping[str, jax.Array] | None = None,
    by_size: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""The last link of a chain: a proximal gradient step on the group lasso over coupled leaves.

    .. math:: w_{t+1} = \mathrm{prox}_{s_t}(w_t + u_t)

    As `jc.proximal`, for units with places in many leaves: they become zero in all of them at
    the same step, after which `jc.pruning.kept_units(dependencies, params)` says what
    `jc.shrink` removes.

    Args:
        dependencies: static. From `jc.dependencies`.
        strength: :math:`s_t`, the learning rate times the weight of the penalty in the loss. A
            number or an Optax schedule of the step; may be traced.
        period: take the step at every `period`-th update, at least 1, and let the others
            through. The strength is not scaled by it. May be traced.
        strengths: of units, as in `jc.pruning.group_penalty`. May be traced.
        by_size: static. As in `jc.pruning.group_penalty`.

    Returns:
        A transformation with the state `ProximalState(step)`. Its updates are in float32 where
        the parameters are narrower, and land on zeros exactly. A leaf whose update is None is
        left out. Extra arguments are ignored.

    Raises:
        ValueError: `strength` below 0 or `period` below 1; `update` without `params`; as
            `jc.pruning.soft_threshold_units`.

    Cost: that of `jc.pruning.soft_threshold_units`; with a `period`, one `jax.lax.cond` around
    it. Put `optax.MultiSteps` around the whole chain.

    Examples:
        >>> params = {"a": jnp.array([[3.0, 0.1]]), "b": jnp.array([[4.0], [0.1]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> opt = optax.chain(optax.sgd(0.1), jc.pruning.proximal_groups(groups, 0.2))
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = opt.update(grads, opt.init(params), params)
        >>> jc.pruning.kept_units(groups, optax.apply_updates(params, updates)).masks
        {'a[1]': array([ True, False])}

    Source: Parikh & Boyd 2014, "Proximal algorithms", section 4.2, with the operator of
    `jc.pruning.soft_threshold_units`.
    """
    require_dependencies("proximal_groups", dependencies)
    _check.numeric("proximal_groups", "strength", strength, 0)
    _check.numeric("proximal_groups", "period", period, 1)
    given = strengths_of("proximal_groups", dependencies, strengths)

    def init(params):
        member_leaves("proximal_groups", dependencies, params)
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        del extra
        _require_params("proximal_groups", params)
        params = with_updates(params, updates)
        mine = set(member_leaves("proximal_groups", dependencies, params))
        amount = number_at(strength, state.step)
        options = {"strengths": given, "by_size": by_size}

        def stepped():
            moved = apply(params, updates)
            return land(params, soft_threshold_units(dependencies, moved, amount, **options))

        def plain():
            return as_landed(updates, params)

        landed = in_period(period, state.step, stepped, plain)
        # What no group has a part in gets its update as it came.
        out = tree.map_with_path(lambda path, u, new: new if path in mine else u, updates, landed)
        return out, ProximalState(state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)

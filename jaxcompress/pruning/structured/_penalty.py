"""Penalties on the norms of units, over all leaves that they have places in."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check
from jaxcompress._sharding import automatic_like
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.pruning.structured._base import Dependencies, Group
from jaxcompress.pruning.structured._leaves import (
    Leaves,
    member_leaves,
    norms_of,
    present,
    sizes_of,
)


def group_penalty(
    dependencies: Dependencies,
    params: PyTree,
    *,
    strengths: Mapping[str, jax.Array] | None = None,
    by_size: bool = True,
    squared: bool = False,
) -> jax.Array:
    r"""The group lasso over coupled leaves: what to add to a loss so that units can leave.

    .. math:: \Omega(w) = \sum_u \gamma_u \sqrt{n_u}\,\|w_u\|_2 \qquad \text{or} \qquad
        \sum_u \gamma_u \|w_u\|_2^2

    where :math:`w_u` are the :math:`n_u` places of unit u in all leaves: its weights in and
    out, its bias, its scale of a norm.

    Args:
        dependencies: static. From `jc.dependencies`. Leaves that are not among `params` are
            left out, and so are running statistics (`jc.pruning.is_trained`).
        params: the parameters; narrow ones are summed in float32.
        strengths: :math:`\gamma`, by the names of groups, arrays `[*layers, size]` that may be
            traced, as those of `jc.pruning.unit_strengths`; groups without one are not
            penalized. None: 1 for every unit.
        by_size: static. Whether the norm has the factor :math:`\sqrt{n_u}`, with which units
            of all sizes fall at the same mean square.
        squared: static. Whether squares are summed instead, without a factor of size: a decay
            for each unit, which makes them small but never zero.

    Returns:
        A scalar, float32 or wider. The gradient is finite, and zero for a unit of zeros. An
        entry that belongs to several units (of a head, and of a feature of all heads) counts in
        each; so does one that a unit has by two axes of a leaf.

    Raises:
        ValueError: a leaf has another shape than in the dependencies; no leaf is there; a
            strength of another shape, or for no group.
        TypeError: a leaf is packed.

    Cost: two reductions of each leaf for each of its members.

    Examples:
        >>> params = {"a": jnp.array([[3.0, 0.0]]), "b": jnp.array([[4.0], [0.0]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> jc.pruning.group_penalty(groups, params, by_size=False)
        Array(5., dtype=float32)
        >>> jax.grad(lambda p: jc.pruning.group_penalty(groups, p, by_size=False))(params)["b"]
        Array([[0.8],
               [0. ]], dtype=float32)

    Source: Yuan & Lin 2006, "Model selection and estimation in regression with grouped
    variables"; over coupled leaves, squared and with strengths, Fang et al. 2023,
    arXiv:2301.12900 (its sparse training).
    """
    leaves = member_leaves("group_penalty", dependencies, params)
    groups = present(dependencies.groups, leaves)
    given = strengths_of("group_penalty", dependencies, strengths)

    def total(leaves, given):
        terms = []
        for group in groups:
            if given is not None and group.name not in given:
                continue
            norms = norms_of(group, leaves)
            if squared:
                norms = jnp.square(norms)
            elif by_size:
                norms = norms * _spread(np.sqrt(sizes_of(group, leaves)), norms)
            if given is not None:
                norms = norms * given[group.name].astype(norms.dtype)
            terms.append(jnp.sum(norms))
        if not terms:
            return leaves, jnp.zeros(())
        dtype = jnp.result_type(*[t.dtype for t in terms])
        return leaves, jnp.sum(jnp.stack([t.astype(dtype) for t in terms]))

    return automatic_like(total, leaves, given)[1]


def unit_strengths(
    dependencies: Dependencies, params: PyTree, growth: ArrayLike = 4.0
) -> dict[str, jax.Array]:
    r"""How hard to press on each unit: the less it matters in its group, the harder.

    .. math:: \gamma_u = 2^{\alpha\,(I_{\max} - I_u) / (I_{\max} - I_{\min})}, \qquad
        I_u = \|w_u\|_2^2

    Args:
        dependencies: static. From `jc.dependencies`.
        params: the parameters.
        growth: :math:`\alpha`, at least 0; the strengths go from 1 to :math:`2^\alpha`. May be
            traced.

    Returns:
        By the names of groups arrays `[*layers, size]`, float32 or wider, for
        `jc.pruning.group_penalty`, `jc.pruning.soft_threshold_units` and
        `jc.pruning.proximal_groups`; each layer of a scan by itself. Constants to derivatives.
        Where all units matter alike they are 1.

    Raises:
        ValueError: as `jc.pruning.group_penalty`; `growth` is a number below 0.

    Cost: as `jc.pruning.group_penalty`.

    Examples:
        >>> params = {"a": jnp.array([[3.0, 1.0]]), "b": jnp.array([[4.0], [0.0]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 1)))
        >>> gamma = jc.pruning.unit_strengths(groups, params)
        >>> gamma["a[1]"]
        Array([ 1., 16.], dtype=float32)
        >>> loss = jc.pruning.group_penalty(groups, params, strengths=gamma, squared=True)

    Source: Fang et al. 2023, arXiv:2301.12900 (its sparse training, with 4 for the growth).
    """
    leaves = member_leaves("unit_strengths", dependencies, params)
    _check.number("unit_strengths", "growth", growth, 0)
    groups = present(dependencies.groups, leaves)

    def strengths(leaves, growth):
        found = {}
        for group in groups:
            norms = jax.lax.stop_gradient(norms_of(group, leaves))
            top = jnp.max(norms, axis=-1, keepdims=True, initial=0.0)
            # Of the largest, so that squares stay in range.
            shares = jnp.square(norms / jnp.where(top > 0, top, jnp.ones_like(top)))
            lowest = jnp.min(shares, axis=-1, keepdims=True, initial=1.0)
            gap = 1 - lowest
            below = (1 - shares) / jnp.where(gap > 0, gap, jnp.ones_like(gap))
            below = jnp.where((gap > 0) & (top > 0), below, jnp.zeros_like(below))
            found[group.name] = jnp.exp2(growth.astype(below.dtype) * below)
        return leaves, found

    return automatic_like(strengths, leaves, jnp.asarray(growth))[1]


def strengths_of(
    function: str, dependencies: Dependencies, strengths: Mapping[str, Any] | None
) -> dict[str, jax.Array] | None:
    """The strengths as arrays, each checked against its group."""
    if strengths is None:
        return None
    if not isinstance(strengths, Mapping):
        rule, fix = "be a dict by the names of groups", "Call jc.pruning.unit_strengths."
        got = _check.describe(strengths)
        raise TypeError(_check.message(function, "strengths", rule, got, fix))
    shapes = {group.name: group.shape for group in dependencies.groups}
    for name, value in strengths.items():
        if name not in shapes:
            rule, fix = "name groups of the dependencies", f"They are {sorted(shapes)[:20]}."
            raise ValueError(_check.message(function, "strengths", rule, repr(name), fix))
        if jnp.shape(value) != shapes[name]:
            rule, got = f"have the shape {list(shapes[name])}", _check.describe(value)
            raise ValueError(_check.message(function, "strengths", rule, got, path=name))
    return {name: jnp.asarray(value) for name, value in strengths.items()}


def thresholds_of(
    group: Group,
    leaves: Leaves,
    norms: jax.Array,
    strength: jax.Array,
    given: Mapping[str, jax.Array] | None,
    by_size: bool,
) -> jax.Array:
    """The norm at which each unit falls, `[*layers, size]`; none falls without a strength."""
    found = jnp.broadcast_to(strength.astype(norms.dtype), norms.shape)
    if by_size:
        found = found * _spread(np.sqrt(sizes_of(group, leaves)), norms)
    if given is None:
        return found
    if group.name not in given:
        return jnp.zeros_like(norms)
    own = given[group.name].astype(norms.dtype)
    return found * jnp.where(own < 0, jnp.zeros_like(own), own)


def _spread(sizes: np.ndarray, norms: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(sizes, norms.dtype), norms.shape)

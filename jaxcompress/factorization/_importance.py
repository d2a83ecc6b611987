"""How much a loss minds the error of each leaf."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, projections, tree
from jaxcompress._types import PyTree
from jaxcompress.factorization._spectra import chosen_matrices, spectra
from jaxcompress.factorization._svd import low_rank
from jaxcompress.solvers import compress, sensitivities
from jaxcompress.tracing import Statistics

_NOISE = 1e-3
"""Of the mean change of the loss: less is counted as so much."""
_ROUNDING = 1e-10
"""Of the squared norm of a leaf: below it a squared error is that of float32."""


def measured_importance(
    loss: Callable[[PyTree], Any],
    params: PyTree,
    *,
    stats: Mapping[str, Statistics] | None = None,
    fraction: float = 0.5,
    where: tree.Where = tree.is_weight,
    center: bool = False,
) -> dict[str, jax.Array]:
    r"""What a loss rises by for each unit of a leaf's squared error, measured.

    .. math:: a_l = \frac{L(w_1, \dots, w'_l, \dots, w_m) - L(w_1, \dots, w_m)}{\epsilon_l}

    with :math:`w'_l` the leaf at the rank whose factors have `fraction` of its parameters, and
    :math:`\epsilon_l` the squared error of it, or of its outputs, that `spectra` predicts. Two
    layers whose outputs are equally wrong need not do equal harm.

    Args:
        loss: `params -> scalar`, on data of your choice, least at `params`: such as the distance of
            the outputs from those of `params`.
        params: any pytree of dense parameters; they are not changed.
        stats: as in `spectra`.
        fraction: static. Between 0 and 1: near the budget that is planned.
        where: static. The leaves, see `jaxcompress.tree.select`.
        center: static. As in `jc.low_rank`; measured without `jc.solvers.correct_bias`.

    Returns:
        From the path of each chosen leaf to a float32 scalar above 0, for `importance` of
        `budgeted_ranks`. A change below a thousandth of the mean change counts as that, so that
        noise gives no leaf away; a leaf without an error gets the largest importance.

    Raises:
        ValueError: `fraction` out of range, and as `spectra` and `jc.solvers.sensitivities`.
        TypeError: as `spectra`.

    Cost: one decomposition of each leaf, and one loss for each, in one compiled loop.

    Examples:
        >>> w = jax.random.normal(jax.random.key(0), (8, 8))
        >>> params = {"a": w, "b": w}
        >>> loss = lambda p: jnp.sum((p["a"] - w) ** 2 + 3 * (p["b"] - w) ** 2)
        >>> found = jc.factorization.measured_importance(loss, params)
        >>> {path: round(float(a), 3) for path, a in found.items()}
        {'a': 1.0, 'b': 3.0}

    Source: the sensitivities of layers of Yuan et al. 2023, arXiv:2312.05821, section 3.3. Differs:
    one measurement of each leaf, by which the predicted errors of all its ranks are scaled.
    """
    if not 0 < fraction < 1:
        rule = "be above 0 and below 1"
        raise ValueError(_check.message("measured_importance", "fraction", rule, fraction))
    values = spectra(params, stats=stats, where=where, center=center)
    ranks = {}
    for path, w in chosen_matrices("measured_importance", params, where).items():
        m, n = math.prod(w.shape[:-1]), w.shape[-1]
        ranks[path] = min(max(int(fraction * m * n / (m + n)), 1), min(m, n) - 1)
    projection = projections.masked(low_rank(ranks, center=center), where)
    tried = compress(projection, params, stats=stats)
    rises = sensitivities(loss, params, jax.tree.map(lambda w: jnp.asarray(w)[None], tried))
    rise = {path: rises[path][0].astype(jnp.float32) for path in ranks if path in rises}
    if not rise:
        return {path: jnp.ones((), jnp.float32) for path in ranks}
    mean = sum(jnp.maximum(r, 0.0) for r in rise.values()) / len(rise)
    found = {}
    for path, r in rise.items():
        squares = jnp.square(values[path])
        error = jnp.sum(squares[ranks[path] :])
        error = jnp.where(error > _ROUNDING * jnp.sum(squares), error, 0.0)
        found[path] = jnp.maximum(r, _NOISE * mean) / error
    finite = jnp.stack([jnp.where(jnp.isfinite(a), a, 0.0) for a in found.values()])
    largest = jnp.where(jnp.max(finite) > 0, jnp.max(finite), 1.0)
    known = {path: jnp.where(jnp.isfinite(a) & (a > 0), a, largest) for path, a in found.items()}
    return {path: known.get(path, largest) for path in ranks}

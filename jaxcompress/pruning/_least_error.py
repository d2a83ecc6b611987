"""A budget from measurements: what each leaf costs the model at each sparsity."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.pruning._budgets import Budget


def least_error(sparsities: Any, errors: Mapping[str, ArrayLike]) -> Budget:
    r"""The budget with the least sum of measured errors.

    .. math:: \min_{s_1, \dots, s_m} \sum_l e_l(s_l) \quad\text{where}\quad
        \sum_l n_l s_l = s \sum_l n_l

    Each :math:`e_l` is the convex, piecewise linear curve through 0 at sparsity 0 and what was
    measured; where measurements are not convex, it rises as steeply as before. Beyond the last
    sparsity that was measured the budget is uniform.

    Args:
        sparsities: `[points]`, rising, above 0 and at most 1.
        errors: from the path of each leaf to its errors at `sparsities`, `[points]`, as
            `jc.solvers.sensitivities` measures them. May be traced.

    Returns:
        A budget for `jc.prune(…, budget=…)`; its total is exact.

    Raises:
        ValueError: `sparsities` is not as above; errors of another shape, or a leaf that is
            chosen and has none.

    Cost: one sort of leaves times points, besides what `prune` costs.

    Examples:
        >>> budget = jc.pruning.least_error([0.5, 1.0], {"a": [1.0, 10.0], "b": [8.0, 58.0]})
        >>> params = {"a": jnp.array([[1.0, 3.0]]), "b": jnp.array([[2.0, 5.0]])}
        >>> jc.compress(jc.prune(0.25, budget=budget), params)
        {'a': Array([[0., 3.]], dtype=float32), 'b': Array([[2., 5.]], dtype=float32)}

    Source: the fractional knapsack, Dantzig 1957, doi:10.1287/opre.5.2.266; measured curves for
    each layer as in Frantar & Alistarh 2022, arXiv:2203.04466 (SPDY). Differs: errors are taken
    to add up, so that the optimum is exact, where theirs is searched for.
    """
    grid = np.asarray(sparsities, np.float32)
    if grid.ndim != 1 or not grid.size or not (np.diff(np.append(0.0, grid)) > 0).all():
        rule = "be a list of numbers that rise from above 0"
        raise ValueError(_check.message("least_error", "sparsities", rule, sparsities))
    if grid[-1] > 1:
        raise ValueError(_check.message("least_error", "sparsities", "be at most 1", sparsities))
    curves = {path: jnp.asarray(e, jnp.float32) for path, e in errors.items()}
    for path, curve in curves.items():
        if curve.shape != grid.shape:
            rule, got = f"be of shape {list(grid.shape)}", _check.describe(curve)
            raise ValueError(_check.message("least_error", "errors", rule, got, path=path))

    def densities(shapes, sizes, density):
        for path in shapes:
            if path not in curves:
                rule, fix = "have errors of each chosen leaf", "Choose leaves with jc.masked."
                got = sorted(curves)
                raise ValueError(_check.message("least_error", "errors", rule, got, fix, path=path))
        return _fill(grid, curves, sizes, 1.0 - density)

    return Budget(densities)


def _fill(grid, curves, sizes, sparsity) -> dict[str, jax.Array]:
    """Takes the segments of all curves by rising slope until enough is removed."""
    paths = [path for path in sizes if sizes[path]]
    out: dict[str, jax.Array] = {path: jnp.ones((), jnp.float32) for path in sizes}
    if not paths:
        return out
    n = np.array([sizes[path] for path in paths], np.float64)
    n = (n / n.sum()).astype(np.float32)
    steps = np.diff(grid, prepend=np.float32(0))
    wanted = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    y = jnp.stack([jnp.maximum(jnp.nan_to_num(curves[path], nan=jnp.inf), 0.0) for path in paths])
    rise = jnp.diff(y, axis=1, prepend=0.0)
    rise = jnp.where(jnp.isnan(rise), jnp.inf, rise) / (n[:, None] * steps[None, :])
    slope = lax.cummax(rise, axis=1).reshape(-1)
    width = (n[:, None] * steps[None, :]).reshape(-1)
    order = jnp.argsort(slope, stable=True)
    sorted_width = jnp.asarray(width)[order]
    before = jnp.cumsum(sorted_width) - sorted_width
    taken = jnp.clip(wanted - before, 0.0, sorted_width)
    removed = jnp.zeros_like(slope).at[order].set(taken).reshape((len(paths), -1)).sum(1) / n
    removed = jnp.where(wanted > grid[-1], wanted, removed)
    return out | {p: jnp.clip(1.0 - removed[i], 0.0, 1.0) for i, p in enumerate(paths)}

"""Budgets: how a total sparsity is shared out over the leaves."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike

Shapes = Mapping[str, tuple[int, ...]]
"""From the path of each chosen leaf to its shape."""

Sizes = Mapping[str, int]
"""From the same paths to what is counted: the weights of the leaf, or its groups."""


class Budget(NamedTuple):
    """A way to share out a total.

    Attributes:
        densities: `(shapes, sizes, density) -> densities`: from the fraction that is kept of
            all, a traced float32 scalar, to that of each leaf, in [0, 1], by path.
        exact: static. Whether the densities are meant to add up to `density`, weighted by
            sizes; then the number of weights that live is met to the last one.

    Examples:
        >>> budget = jc.pruning.erdos_renyi()
        >>> shapes, sizes = {"a": (8, 8), "b": (8, 2)}, {"a": 64, "b": 16}
        >>> {p: round(float(d), 3) for p, d in budget.densities(shapes, sizes, 0.25).items()}
        {'a': 0.192, 'b': 0.481}
    """

    densities: Callable[[Shapes, Sizes, jax.Array], dict[str, jax.Array]]
    exact: bool = True


def require_budget(function: str, argument: str, budget: object) -> None:
    """Refuses what is not a `Budget`, as one of its makers that was not called."""
    if not isinstance(budget, Budget):
        rule, fix = "be a Budget", "Make one, as jc.pruning.erdos_renyi()."
        raise TypeError(_check.message(function, argument, rule, _check.describe(budget), fix))


def uniform(*, dense: tuple[str, ...] = ()) -> Budget:
    """The same density in each leaf.

    Args:
        dense: static. Path patterns of leaves that stay dense, as far as the total goes: it
            is exact all the same. The others make up for them.

    Returns:
        A budget for `jc.prune(…, budget=…)`. Without `dense` it differs from none only in the
        rounding: the total is exact, not each leaf.

    Raises:
        ValueError: a pattern of `dense` matches no leaf; raised while tracing.

    Examples:
        >>> p = jc.prune(0.5, budget=jc.pruning.uniform(dense=("head",)))
        >>> params = {"body": jnp.ones((3, 4)), "head": jnp.ones((2, 2))}
        >>> jax.tree.map(lambda w: float(w.sum()), jc.compress(p, params))
        {'body': 4.0, 'head': 4.0}
    """
    return Budget(
        lambda shapes, sizes, density: _share(
            "uniform", dict.fromkeys(shapes, 1.0), sizes, density, dense
        )
    )


def erdos_renyi(*, kernel: bool = True, power: float = 1.0, dense: tuple[str, ...] = ()) -> Budget:
    r"""Denser where a leaf is small: Erdős–Rényi, by default with the kernel's window (ERK).

    .. math:: d_l = \min\left(1, \varepsilon\,
        \left(\frac{\sum_i n^l_i}{\prod_i n^l_i}\right)^p\right)

    with the dimensions :math:`n_i` of the leaf, and :math:`\varepsilon` such that the total is
    met.

    Args:
        kernel: static. Whether all dimensions count; otherwise the last two alone, inputs and
            outputs.
        power: static. The exponent p, at least 0: 0 is uniform, above 1 small leaves are
            denser still.
        dense: static. Path patterns of leaves that stay dense, as far as the total goes.

    Returns:
        A budget for `jc.prune(…, budget=…)`. A leaf without dimensions counts as one of size 1.

    Raises:
        ValueError: `power` is below 0; a pattern of `dense` matches no leaf, raised while tracing.

    Cost: a few scalar operations per leaf.

    Examples:
        >>> p = jc.prune(0.9, budget=jc.pruning.erdos_renyi())

    Source: Mocanu et al. 2018, arXiv:1707.04780, equation 1; Evci et al. 2020,
    arXiv:1911.11134, section 3. Differs: :math:`\varepsilon` comes from a closed form, exact
    for a traced total, instead of trial after trial.
    """
    if _check.is_traced(power):
        rule, got = "be static", "a traced value"
        raise TypeError(_check.message("erdos_renyi", "power", rule, got))
    _check.number("erdos_renyi", "power", power, 0.0)

    def densities(shapes, sizes, density):
        raw = {path: _erdos_renyi(shape, kernel) ** power for path, shape in shapes.items()}
        return _share("erdos_renyi", raw, sizes, density, dense)

    return Budget(densities)


def cost_weighted(costs: Mapping[str, float], *, dense: tuple[str, ...] = ()) -> Budget:
    r"""Keeps a fraction of the cost, not of the weights: fewer where a weight costs more.

    .. math:: d_l = \min(1, \varepsilon / c_l), \qquad
        \sum_l c_l\,n_l\,d_l = (1 - s) \sum_l c_l\,n_l

    Args:
        costs: static. From the path of each leaf to the cost of one of its weights: for
            operations `{site.path: site.flops / weights}` with the sites of `jc.sites`.
        dense: static. Path patterns of leaves that stay dense.

    Returns:
        A budget for `jc.prune(…, budget=…)`, whose sparsity is the fraction of the cost that
        goes, up to the rounding of each leaf.

    Raises:
        ValueError: a leaf has no cost, or one that is not above zero; a pattern of `dense`
            matches no leaf.

    Examples:
        >>> budget = jc.pruning.cost_weighted({"conv": 3.0, "dense": 1.0})
        >>> params = {"conv": jnp.ones((10, 10)), "dense": jnp.ones((10, 10))}
        >>> kept = jc.compress(jc.prune(0.5, budget=budget), params)
        >>> jax.tree.map(lambda w: float(w.sum()), kept)
        {'conv': 33.0, 'dense': 100.0}
    """
    costs = dict(costs)
    for path, cost in costs.items():
        rule = "hold finite numbers above zero"
        if _check.is_traced(cost):
            got, fix = "a traced value", "Costs are static."
            raise TypeError(_check.message("cost_weighted", "costs", rule, got, fix, path=path))
        _check.number("cost_weighted", f"costs[{path!r}]", cost)
        if not 0 < cost < np.inf:
            raise ValueError(_check.message("cost_weighted", "costs", rule, cost, path=path))

    def densities(shapes, sizes, density):
        for path in shapes:
            if path not in costs:
                rule, fix = "have a cost for each chosen leaf", "Choose leaves with jc.masked."
                text = _check.message("cost_weighted", "costs", rule, sorted(costs), fix, path=path)
                raise ValueError(text)
        raw = {path: 1.0 / float(costs[path]) for path in shapes}
        paid = {path: size * float(costs[path]) for path, size in sizes.items()}
        return _share("cost_weighted", raw, paid, density, dense)

    return Budget(densities, exact=False)


def _share(
    function: str,
    raw: Mapping[str, float],
    sizes: Mapping[str, float],
    density: ArrayLike,
    dense: tuple[str, ...],
) -> dict[str, jax.Array]:
    r"""Densities :math:`\min(1, \varepsilon r_l)` whose mean, weighted by sizes, is `density`.

    :math:`\sum_l n_l \min(1, \varepsilon r_l)` is the least of its values for each number m of
    leaves that are full, those of largest :math:`r` first. So :math:`\varepsilon` is the largest
    of the solutions for each m, and nothing has to be tried.
    """
    if isinstance(dense, str):
        rule, got = "be a tuple of path patterns", _check.describe(dense)
        raise TypeError(_check.message(function, "dense", rule, got))
    full = {path for pattern in dense for path in matching(function, pattern, raw)}
    shared = [path for path in raw if path not in full and sizes[path] > 0]
    one = jnp.float32(1.0)
    if not shared:
        return {path: one for path in raw}
    falling = sorted(shared, key=lambda path: -raw[path])
    n = np.array([sizes[path] for path in falling], np.float64)
    r = np.array([raw[path] for path in falling], np.float64)
    total = n.sum() + sum(sizes[path] for path in full)
    filled = (sum(sizes[path] for path in full) + np.cumsum([0.0, *n[:-1]])) / total
    slope = np.cumsum((n * r)[::-1])[::-1] / total
    wanted = jnp.clip(jnp.asarray(density, jnp.float32), 0.0, 1.0)
    epsilon = jnp.max((wanted - filled.astype(np.float32)) / slope.astype(np.float32))
    out = {path: one for path in raw}
    for path in shared:
        out[path] = jnp.clip(epsilon * np.float32(raw[path]), 0.0, 1.0)
    return out


def _erdos_renyi(shape: tuple[int, ...], kernel: bool) -> float:
    dims = np.array(shape if kernel else shape[-2:], np.float64)
    return float(max(dims.sum(), 1.0) / max(dims.prod(), 1.0))


def matching(function: str, pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches; refuses one that matches none."""
    leaves = {path: jax.ShapeDtypeStruct((), np.float32) for path in paths}
    chosen = tree.select(leaves, pattern, function=function)
    return [path for path, hit in chosen.items() if hit]

"""Ranks of all leaves under one budget."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxcompress import _check
from jaxcompress._types import ArrayLike
from jaxcompress.solvers._assign import MOST_COST, assign, at


class RankAllocation(NamedTuple):
    """What `allocate_ranks` chose.

    Attributes:
        ranks: int32 scalar per path; min(m, n) where the leaf stays dense.
        dense: bool scalar per path: whether the leaf stays as it is, without factors.
        loss: float32, the sum of the squared errors, each times its importance.
        cost: float32, the sum of the costs, rounded to float32.
    """

    ranks: dict[str, jax.Array]
    dense: dict[str, jax.Array]
    loss: jax.Array
    cost: jax.Array


class _Options(NamedTuple):
    """What each leaf may be, in rows that cost more and more; the last one is dense. Static."""

    ranks: np.ndarray
    costs: np.ndarray
    count: np.ndarray
    unit: float
    whole: float


def allocate_ranks(
    spectra: Mapping[str, jax.Array | np.ndarray],
    shapes: Mapping[str, tuple[int, int]],
    fraction: ArrayLike | None = None,
    total: ArrayLike | None = None,
    *,
    cost: Literal["parameters"] | Mapping[str, tuple[float, float]] = "parameters",
    importance: Mapping[str, ArrayLike] | None = None,
    align: int = 1,
    min_rank: int = 1,
) -> RankAllocation:
    r"""The rank of each leaf, or that it stays dense, with the least error under a budget.

    .. math:: \min_{r_l} \sum_l a_l \sum_{i > r_l} s_{l,i}^2 \quad \text{such that} \quad
        \sum_l c_l(r_l) \le B, \qquad c_l(r) = r\,(m_l + n_l) \text{ or } m_l n_l \text{ if dense}

    A dense leaf has no error. For a multiplier :math:`\mu` each leaf alone minimizes
    :math:`\text{loss} + \mu\,c`; the smallest multiplier that keeps the budget is found by
    bisection on its bits. What it leaves over, where it jumps, goes to the steps that gain most
    for their cost, and a search by dynamic programming tries to exchange ranks around that.

    Args:
        spectra: from each path to the singular values of the leaf, falling, of shape
            [min(m, n)]; any float dtype, computed in float32. Multiplied by the activations, as
            whitened ones are, the errors are those of the outputs. May be traced.
        shapes: static. From each path to the :math:`(m, n)` of the leaf as a matrix.
        fraction: the budget, 0 to 1, as a fraction of the cost of all leaves dense. The product
            is rounded to float32. May be traced, one program for all budgets.
        total: instead of `fraction`: the budget :math:`B` itself, at least 0. May be traced.
        cost: static. `"parameters"` as above, or from each path to (the cost of the dense leaf,
            the cost of one rank), such as bytes or FLOPs.
        importance: :math:`a_l` of some paths, at least 0, such as the traces of their Fisher
            information; of the others it is 1. May be traced: below 0 it then counts as 0.
        align: static. Ranks are multiples of it, or full.
        min_rank: static. The smallest rank, at least 0; 0 lets a whole leaf be zero.

    Returns:
        A `RankAllocation`. The budget is never exceeded; costs count to the unit while they are
        integers of at most 2^30 in all, else rounded up to 2^-30 of all, and a traced float
        budget is read in float32. Ranks whose factors cost as much as the dense leaf are left
        out: where these are all, the leaf stays dense. Optimal where the dense leaves cost 1024
        units (parameters) at most in all, with up to 8 ranks each; else near it. A traced budget
        below the smallest cost gives that smallest. A leaf with a NaN or infinite value gets its
        smallest cost, and the loss is NaN. The loss is differentiable in spectra and importances,
        with ranks held.

    Raises:
        ValueError: both or none of `fraction` and `total`, or one out of range or below the
            smallest cost; mappings with other paths; a spectrum without min(m, n) values; a cost
            that is not positive and finite.
        TypeError: a spectrum is not real floating point; raised while tracing.

    Cost: some 40 passes over all singular values, and 50,000 operations per leaf.

    Examples:
        >>> s = {"a": jnp.array([9.0, 1.0, 0.5, 0.1]), "b": jnp.array([5.0, 4.0, 3.0, 2.0])}
        >>> out = jc.factorization.allocate_ranks(s, {"a": (8, 4), "b": (4, 4)}, fraction=0.6)
        >>> {path: int(rank) for path, rank in out.ranks.items()}
        {'a': 1, 'b': 4}
        >>> bool(out.dense["b"]), int(out.cost), round(float(out.loss), 2)
        (True, 28, 1.26)

    Source: the multiplier of Everett 1963, "Generalized Lagrange multiplier method"; its use for
    ranks in Idelbayev & Carreira-Perpiñán 2020, "Low-rank compression of neural nets: learning
    the rank of each layer", where the multiplier is the setting, not the budget, and rank 0 and
    unaligned ranks are always allowed; the search around its answer is that of a core,
    Pisinger 1995, "A minimal algorithm for the multiple-choice knapsack problem".
    """
    paths = list(spectra)
    _check_leaves(spectra, shapes, importance)
    _check.integer("allocate_ranks", "align", align, 1)
    _check.integer("allocate_ranks", "min_rank", min_rank, 0)
    if (fraction is None) == (total is None):
        rule, got = "be given, or else `total`, but not both", f"{fraction!r} and total={total!r}"
        raise ValueError(_check.message("allocate_ranks", "fraction", rule, got))
    options = _options(paths, shapes, _prices(paths, shapes, cost), align, min_rank)
    budget = _budget(options, fraction, total)
    if not paths:
        zero = jnp.zeros((), jnp.float32)
        return RankAllocation({}, {}, zero, zero)
    weights = [1.0 if importance is None else importance.get(path, 1.0) for path in paths]
    ranks, dense, loss, spent = _solve(
        [jnp.asarray(spectra[path]).astype(jnp.float32) for path in paths],
        [jnp.asarray(weight).astype(jnp.float32) for weight in weights],
        *(jnp.asarray(table) for table in (options.ranks, options.costs, options.count)),
        budget,
    )
    return RankAllocation(
        dict(zip(paths, ranks, strict=True)),
        dict(zip(paths, dense, strict=True)),
        loss,
        spent * options.unit,
    )


# Tables are arguments: leaves of other shapes but as many options share one program.
@jax.jit
def _solve(
    spectra: list[jax.Array],
    weights: list[jax.Array],
    ranks: jax.Array,
    costs: jax.Array,
    count: jax.Array,
    budget: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array, jax.Array]:
    """Ranks, whether dense, loss and units spent; tables of [leaves, options], cheap ones first."""
    losses, scale = _losses(spectra, weights, ranks, count)
    fixed = lax.stop_gradient(losses)
    choice = assign(jnp.where(jnp.isnan(fixed), 0.0, fixed), costs, count, budget)
    rank, dense = at(ranks, choice), choice == count - 1
    loss = jnp.sum(at(losses, choice)) * scale
    spent = jnp.sum(at(costs, choice), dtype=jnp.int32).astype(jnp.float32)
    return [*rank], [*dense], loss, spent


def _losses(
    spectra: list[jax.Array], weights: list[jax.Array], ranks: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loss of each option, over a scale; infinite where a leaf has no such option."""
    width = max(len(s) for s in spectra) + 1
    s = jnp.stack([jnp.pad(s, (0, width - len(s))) for s in spectra])
    weight = jnp.stack(weights)[:, None]
    weight = jnp.where(weight < 0, 0.0, weight)
    length, heaviest = _largest(s), _largest(weight)
    # Summed from the smallest up, so that small losses are exact.
    dropped = jnp.cumsum(jnp.square(s / length)[:, ::-1], axis=1)[:, ::-1] * (weight / heaviest)
    # What is not finite has an unknown loss at every rank, also where it is kept.
    known = jnp.all(jnp.isfinite(dropped), axis=1, keepdims=True)
    losses = jnp.take_along_axis(jnp.where(known, dropped, jnp.nan), ranks, 1)
    there = jnp.arange(ranks.shape[1], dtype=jnp.int32)[None, :] < count[:, None]
    return jnp.where(there, losses, jnp.inf), jnp.square(length) * heaviest


def _largest(values: jax.Array) -> jax.Array:
    """A number to divide by, held constant."""
    values = lax.stop_gradient(values)
    top = jnp.max(jnp.where(jnp.isfinite(values), values, 0.0))
    return jnp.where(top > 0, top, 1.0)


def _options(
    paths: list[str],
    shapes: Mapping[str, tuple[int, int]],
    prices: dict[str, tuple[float, float]],
    align: int,
    min_rank: int,
) -> _Options:
    ranks, costs = [], []
    for path in paths:
        full = min(shapes[path])
        dense, each = prices[path]
        kept = [r for r in range(full + 1) if r >= min(min_rank, full) and r % align == 0]
        kept = [r for r in sorted({*kept, full}) if r * each < dense]
        ranks.append([*kept, full])
        costs.append([*(r * each for r in kept), dense])
    # Integers stay exact; above int32, or not integers, they are rounded up to a unit.
    whole = sum(row[-1] for row in costs)
    exact = whole <= MOST_COST and all(float(c).is_integer() for row in costs for c in row)
    unit = 1 if exact else whole / MOST_COST
    width = max((len(row) for row in ranks), default=1)
    pad = np.iinfo(np.int32).max
    return _Options(
        np.array([row + row[-1:] * (width - len(row)) for row in ranks], np.int32),
        np.array(
            [[math.ceil(c / unit) for c in row] + [pad] * (width - len(row)) for row in costs],
            np.int32,
        ),
        np.array([len(row) for row in ranks], np.int32),
        unit,
        whole,
    )


def _budget(options: _Options, fraction: ArrayLike | None, total: ArrayLike | None) -> jax.Array:
    """In units, int32, at most the cost of all leaves dense."""
    rows = np.arange(len(options.count))
    most = int(options.costs[rows, options.count - 1].sum()) if len(rows) else 0
    least = int(options.costs[:, 0].sum()) if len(rows) else 0
    name, value = ("fraction", fraction) if total is None else ("total", total)
    _check.number("allocate_ranks", name, value, 0, 1 if total is None else None)
    if total is None:
        part = jnp.asarray(value).astype(jnp.float32)
        units = jnp.floor(part * np.float32(options.whole / options.unit))
        everything = part >= 1
    elif not _check.is_traced(total):
        # In Python's own numbers, which need not fit in 32 bits.
        number = np.asarray(total).item()
        everything = jnp.asarray(number >= options.whole)
        number = min(number, options.whole)
        units = jnp.asarray(min(math.floor(number / options.unit), most))
    elif options.unit == 1 and jnp.issubdtype(jnp.asarray(total).dtype, jnp.integer):
        units, everything = jnp.asarray(total), jnp.zeros((), bool)
    else:
        units = jnp.asarray(total).astype(jnp.float32)
        everything = units >= np.float32(options.whole)
        units = jnp.floor(units * np.float32(1 / options.unit))
    # Out of range a cast is undefined.
    everything |= units >= most
    units = jnp.where(everything, 0, units).astype(jnp.int32)
    units = jnp.where(everything, most, units).astype(jnp.int32)
    if not _check.is_traced(units) and int(units) < least:
        rule = f"allow the smallest cost, {least * options.unit:g} of {options.whole:g}"
        fix = "Raise it, or lower min_rank or align."
        raise ValueError(_check.message("allocate_ranks", name, rule, value, fix))
    return units


def _prices(paths, shapes, cost) -> dict[str, tuple[float, float]]:
    """Of each leaf the cost of it dense and that of one rank."""
    if isinstance(cost, str) and cost == "parameters":
        return {path: (math.prod(shapes[path]), sum(shapes[path])) for path in paths}
    if not isinstance(cost, Mapping):
        rule = 'be "parameters" or a dict from paths to (cost of dense, cost of one rank)'
        raise TypeError(_check.message("allocate_ranks", "cost", rule, _check.describe(cost)))
    _same_paths("cost", cost, paths)
    for path in paths:
        pair = cost[path]
        numbers = isinstance(pair, tuple) and len(pair) == 2
        if not numbers or not all(
            isinstance(c, (int, float, np.number)) and 0 < c < math.inf for c in pair
        ):
            rule, got = "have two positive static numbers", _check.describe(pair)
            raise ValueError(_check.message("allocate_ranks", "cost", rule, got, path=path))
    return {path: (cost[path][0], cost[path][1]) for path in paths}


def _check_leaves(spectra, shapes, importance) -> None:
    _same_paths("shapes", shapes, list(spectra))
    for path, s in spectra.items():
        _check.floating("allocate_ranks", "spectra", s, path)
        shape = shapes[path]
        if len(shape) != 2 or s.shape != (min(shape),):
            rule = f"have the min(m, n) singular values of a matrix {tuple(shape)}"
            got = _check.describe(s)
            raise ValueError(_check.message("allocate_ranks", "spectra", rule, got, path=path))
    for path, weight in (importance or {}).items():
        if path not in spectra:
            rule = f"have paths of `spectra`, {sorted(spectra)}"
            raise ValueError(_check.message("allocate_ranks", "importance", rule, repr(path)))
        _check.number("allocate_ranks", f"importance[{path!r}]", weight, 0)


def _same_paths(argument: str, mapping: Mapping, paths: list[str]) -> None:
    if set(mapping) != set(paths):
        other = sorted(set(mapping) ^ set(paths))
        rule = "have the paths of `spectra`"
        raise ValueError(_check.message("allocate_ranks", argument, rule, f"others: {other}"))

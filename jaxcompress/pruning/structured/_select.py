"""Choosing what stays: from scores to a static `Keep`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning._groups import Norm, l2
from jaxcompress.pruning._scores import magnitude
from jaxcompress.pruning.structured._base import Dependencies, Group, Keep
from jaxcompress.pruning.structured._budget import UnitBudget, masks_of, within
from jaxcompress.pruning.structured._choose import (
    Overlap,
    Scope,
    by_group,
    matching,
    ranked_together,
    without_overlap,
)
from jaxcompress.pruning.structured._ladder import Ladder, ladder
from jaxcompress.pruning.structured._normalize import Normalize, by_mean, require_normalize
from jaxcompress.pruning.structured._unit_scores import Score, is_trained, unit_scores

Amount = float | Mapping[Any, float] | UnitBudget
"""What stays: a fraction, fractions by patterns of groups, or a budget."""


def select(
    dependencies: Dependencies,
    params: PyTree,
    *,
    keep: Amount = 0.5,
    score: Score = magnitude,
    norm: Norm = l2,
    leaves: tree.Where = is_trained,
    scores: Mapping[str, Any] | None = None,
    grads: PyTree = None,
    step: Any = 0,
    scope: Scope = "local",
    normalize: Normalize | None = by_mean,
    multiple_of: int | Mapping[Any, int] = 1,
    floor: float | int | Mapping[Any, float | int] | None = None,
    where: Any = None,
    exclude: Any = (),
    overlap: Overlap = "blocks",
    of: Dependencies | None = None,
) -> Keep:
    r"""Which units of which groups stay: the best by score, exactly as many as asked for.

    .. math:: n_{\mathrm{kept}} = \max(1, \lfloor k\,n \rfloor)

    of each group, rounded down further to a multiple where `multiple_of` says so. Groups are
    chosen by patterns: the name of a group, or a glob or regular expression that matches the
    name or the path of any of its members, or a predicate of a `Group`.

    Args:
        dependencies: static. From `jc.dependencies`.
        params: any pytree of concrete arrays; not read if `scores` are given.
        keep: static. The fraction k of the units that stays, in [0, 1]. Or a mapping from
            patterns to fractions: the first that matches counts, groups that none matches stay
            whole, and each pattern's groups are ranked for themselves. Or a budget, as
            `jc.pruning.parameter_budget(0.5)`: the largest fraction, one for all rankings, that
            meets it.
        score: of single weights, as in `unit_scores`.
        norm: static. What makes one number of those of a unit, as in `unit_scores`.
        leaves: static. Which leaves count in the scores, as in `unit_scores`.
        scores: instead of `score`: by name of the group an array `[*layers, size]`, from
            `unit_scores`, `activation_scores`, `unit_taylor`, `random_units` or your own.
        grads: as in `unit_scores`.
        step: as in `unit_scores`.
        scope: static. `"local"`: each group keeps the fraction. `"global"`: all groups are ranked
            together. `"isomorphic"`: groups of one structure (equal kinds of leaves and axes, up
            to sizes) are ranked together, and each such set keeps the fraction.
        normalize: static. What makes the scores of several groups comparable, for the last two:
            `jc.pruning.by_mean`, `by_largest`, `by_total`, `between_extremes`, `by_deviation`, your
            own `scores -> scores`, or None.
        multiple_of: static. What counts are multiples of, for the hardware: 8, 128. A group that
            loses nothing keeps its size; one that is smaller stays whole. A mapping from patterns
            is possible; groups that none matches have 1.
        floor: static. The least that a group keeps: an integer is a count, a float a fraction. A
            mapping from patterns is possible; groups that none matches keep one unit.
        where: static. A pattern, or a tuple of them: only these groups lose units.
        exclude: static. A pattern, or a tuple of them: these groups stay whole.
        overlap: static. Where several groups cut the same positions of one axis, as heads and
            the features of all heads do along a merged axis: `"blocks"` cuts contiguous ones (whole
            heads; whole groups of a grouped convolution or GroupNorm), `"strides"` the others (as
            many features of each head), `"both"` all. Groups that different patterns of a
            mapping `keep` match are all cut.
        of: static. The dependencies before any removal, if params have been shrunk already:
            fractions are then of the sizes there, so that steps add up to the same total.

    Returns:
        A static `Keep`, with a mask for each group that may lose units. Of equal scores the
        first stays; NaN goes first. Layers of a scan keep as many each, by scores of their own;
        in a ranking of several groups their units of one rank count as one, with the mean of
        their scores. A group without a leaf that counts stays whole, and so does one that
        `scores` doesn't name.

    Raises:
        ValueError: a pattern matches no group; a number is out of range; a budget can't be met;
            the scores of a whole group are infinite (leaves that were not scored: choose
            `leaves`), or of another shape; no group is left.
        TypeError: scores are traced: the result is static, so call it outside of `jit`.

    Cost: one compiled call of `unit_scores`, then sorts of the scores on the host.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.array([[3.0, 0.1, 1.0, 2.0]]), "b": jnp.ones((4, 1))}
        >>> groups = jc.dependencies(apply, params, jnp.ones((1, 1)))
        >>> jc.select(groups, params, keep=0.5).masks["a[1]"]
        array([ True, False, False,  True])
        >>> jc.select(groups, params, keep=0.8, multiple_of=2).masks["a[1]"].sum()
        np.int64(2)
        >>> jc.select(groups, params, keep={"a": 0.75}, floor=2).masks["a[1]"].sum()
        np.int64(3)

    Source: the counts are those of Torch-Pruning, with its `round_to`; "isomorphic" is Fang et
    al. 2024, arXiv:2407.04616, section 3.2. Differs: a ranking of several groups is met exactly
    where scores tie, and with `multiple_of` from below by less than one step; at least one
    multiple stays of each group.
    """
    _require(dependencies, scope, overlap)
    require_normalize("select", normalize)
    groups, labels = _chosen(dependencies, keep, where, exclude)
    found = _scores(dependencies, params, scores, score, norm, leaves, grads, step)
    groups = [group for group in groups if group.name in found]
    groups = without_overlap(groups, overlap, labels)
    if not groups:
        rule, got = "leave a group that loses units and has scores", "none"
        raise ValueError(_check.message("select", "where", rule, got))
    values = _ranked(groups, found, normalize if scope != "local" else None)
    ladders = _ladders(dependencies, groups, labels, values, scope, multiple_of, floor, of)
    if isinstance(keep, UnitBudget):
        return Keep(dependencies, within(keep, dependencies, ladders, values))
    masks: dict[str, np.ndarray] = {}
    fractions = by_group("select", "keep", keep, groups, 1.0)
    for rank in ladders:
        masks |= masks_of([rank], values, float(fractions[rank.groups[0]]))
    return Keep(dependencies, {group.name: masks[group.name] for group in groups})


def _chosen(
    dependencies: Dependencies, keep: Amount, where: Any, exclude: Any
) -> tuple[list[Group], dict[str, Any]]:
    """The groups that may lose units, and by which pattern of `keep` they do."""
    groups = list(dependencies.groups)
    if where is not None:
        hits = matching("select", "where", where, groups)
        groups = [group for group in groups if hits[group.name]]
    hits = matching("select", "exclude", exclude, dependencies.groups)
    groups = [group for group in groups if not hits[group.name]]
    if isinstance(keep, UnitBudget):
        return groups, dict.fromkeys((group.name for group in groups), 0)
    if not isinstance(keep, Mapping):
        _fraction(keep)
        return groups, dict.fromkeys((group.name for group in groups), 0)
    for fraction in keep.values():
        _fraction(fraction)
    patterns = dict(zip(keep, range(len(keep)), strict=True))
    labels = by_group("select", "keep", patterns, dependencies.groups, -1)
    return [group for group in groups if labels[group.name] >= 0], labels


def _fraction(value: Any) -> None:
    if _check.is_traced(value):
        rule, fix = "be static", "Call jc.select outside of jit: what stays decides shapes."
        raise TypeError(_check.message("select", "keep", rule, "a traced value", fix))
    fix = "Budgets are made by jc.pruning.parameter_budget, byte_budget or flop_budget."
    _check.number("select", "keep", value, 0, 1, fix)


def _scores(
    dependencies, params, scores, score, norm, leaves, grads, step
) -> dict[str, jax.Array | np.ndarray]:
    """Scores by name, checked."""
    if scores is None:
        given = {"params": params, "grads": grads} | ({} if callable(score) else {"score": score})
        # Functions and names, as an Equinox module holds, can't pass through jit.
        flat, treedef = jax.tree.flatten(given)
        array = [hasattr(x, "dtype") for x in flat]

        def run(arrays):
            values = iter(arrays)
            whole = [next(values) if hit else x for x, hit in zip(flat, array, strict=True)]
            tied = {"score": score} | jax.tree.unflatten(treedef, whole)
            return unit_scores(dependencies, norm=norm, leaves=leaves, step=step, **tied)

        found = jax.jit(run)([x for x, hit in zip(flat, array, strict=True) if hit])
    else:
        names = {group.name: group for group in dependencies.groups}
        found = dict(scores)
        for name, one in found.items():
            if name not in names or jnp.shape(one) != names[name].shape:
                rule = "be by names of groups, of shape [*layers, size]"
                got = _check.describe(one) if name in names else f"no group of the name {name!r}"
                raise ValueError(_check.message("select", "scores", rule, got, path=name))
    for name, one in found.items():
        if _check.is_traced(one):
            rule, fix = "be concrete", "Call jc.select outside of jit: what stays decides shapes."
            got = _check.describe(one)
            raise TypeError(_check.message("select", "scores", rule, got, fix, path=name))
    return found


def _ranked(groups, scores, normalize: Normalize | None) -> dict[str, np.ndarray]:
    """The scores of the groups as float64 without NaN, comparable where they have to be."""
    found = {}
    for group in groups:
        values = np.asarray(scores[group.name], np.float64)
        if values.size and np.all(values == np.inf):
            rule, got = "be finite for some unit", "infinity for all"
            fix = "Trees of scores hold it where a leaf was not scored: choose others by `leaves`."
            raise ValueError(_check.message("select", "score", rule, got, fix, path=group.name))
        nan = np.isnan(values)
        if normalize is not None:
            even = normalize(jnp.asarray(np.where(nan, 0.0, values)))
            if jnp.shape(even) != group.shape:
                rule, got = "return the shape of the scores", _check.describe(even)
                raise ValueError(_check.message("select", "normalize", rule, got))
            values = np.asarray(even, np.float64)
        found[group.name] = np.where(nan | np.isnan(values), -np.inf, values)
    return found


def _ladders(dependencies, groups, labels, values, scope, multiple_of, floor, of) -> list[Ladder]:
    multiples = by_group("select", "multiple_of", multiple_of, groups, 1)
    floors = by_group("select", "floor", floor, groups, None)
    sizes = {group.name: group.size for group in groups}
    if of is not None:
        before = {group.name: group.size for group in of.groups}
        missing = [name for name in sizes if name not in before]
        if missing:
            rule, got = "have all groups that lose units", f"none of the name {missing[0]!r}"
            raise ValueError(_check.message("select", "of", rule, got))
        sizes = {name: before[name] for name in sizes}
    for name in sizes:
        _check.integer("select", "multiple_of", multiples[name], 1)
        if isinstance(floors[name], float):
            _check.number("select", "floor", floors[name], 0, 1, "A count is an integer.")
        elif floors[name] is not None:
            _check.integer("select", "floor", floors[name], 0)
    return [
        ladder(together, values, multiples, floors, sizes)
        for together in ranked_together(dependencies, groups, scope, labels)
    ]


def _require(dependencies: Any, scope: Any, overlap: Any) -> None:
    if not isinstance(dependencies, Dependencies):
        rule, fix = "be Dependencies", "Call jc.dependencies(fn, params, x)."
        got = _check.describe(dependencies)
        raise TypeError(_check.message("select", "dependencies", rule, got, fix))
    for name, value, choices in (
        ("scope", scope, ("local", "global", "isomorphic")),
        ("overlap", overlap, ("blocks", "strides", "both")),
    ):
        if value not in choices:
            rule = f"be one of {', '.join(map(repr, choices))}"
            raise ValueError(_check.message("select", name, rule, repr(value)))

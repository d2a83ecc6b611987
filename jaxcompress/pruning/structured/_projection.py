"""Pruning whole units of groups of coupled leaves, as a projection."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompress import _check, tree
from jaxcompress._sharding import automatic_like
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import Projection, of_leaves
from jaxcompress.projections._base import choose
from jaxcompress.pruning._counts import fraction_at
from jaxcompress.pruning._groups import Norm, l2
from jaxcompress.pruning._rank import observer_of, require_score, scores_of
from jaxcompress.pruning._scores import RunningScore, Score, magnitude
from jaxcompress.pruning.structured._base import Dependencies, Group, Member
from jaxcompress.pruning.structured._choose import (
    Overlap,
    Scope,
    by_group,
    matching,
    ranked_together,
    without_overlap,
)
from jaxcompress.pruning.structured._kept_counts import kept_by_rankings
from jaxcompress.pruning.structured._leaves import (
    is_floating,
    member_leaves,
    member_paths,
    present,
    require_dependencies,
)
from jaxcompress.pruning.structured._normalize import Normalize, by_mean, require_normalize
from jaxcompress.pruning.structured._places import member_mask
from jaxcompress.pruning.structured._unit_mask import UnitMask
from jaxcompress.pruning.structured._unit_scores import is_trained, reduced


def prune_groups(
    dependencies: Dependencies,
    sparsity: Numeric,
    *,
    score: Score = magnitude,
    norm: Norm = l2,
    leaves: tree.Where = is_trained,
    scores: Mapping[str, Any] | None = None,
    scope: Scope = "local",
    normalize: Normalize | None = by_mean,
    multiple_of: int | Mapping[Any, int] = 1,
    floor: float | int | Mapping[Any, float | int] | None = None,
    where: Any = None,
    exclude: Any = (),
    overlap: Overlap = "blocks",
) -> Projection:
    r"""Keeps the units of each group that matter most, and zeros all places of the others.

    .. math:: w \mapsto w\,\prod_{u \ni w} m_u, \qquad m_u = [\,S_u \text{ is among the }
        \max(1, \lfloor (1 - s)\,n \rfloor) \text{ largest}\,]

    with the scores S of `jc.pruning.unit_scores`. The simulated face of `jc.shrink`: a unit
    leaves all leaves at once, with its bias and its scale of a norm, and
    `jc.pruning.kept_units` reads from the structure what `shrink` then removes. At one number
    it keeps what `jc.select(…, keep=1 - s)` keeps with the same options. How soft the pruning is
    is up to its use: `jc.projected` holds units at zero until others are found, without
    moments; in `jc.straight_through` they go on training unseen; `jc.project_params` of
    `jc.alternated(p, 1, n)` zeros them once and lets all train for n updates (soft filter
    pruning); `jc.relaxed` comes to zero gradually; `jc.every` holds the masks.

    Args:
        dependencies: static. From `jc.dependencies`, of the function whose params these are. Of
            its leaves those are zeroed that are there and are floating point: an optimizer need
            not be given the running statistics.
        sparsity: :math:`s`, the fraction of the units removed, 0 to 1. A number, a JAX scalar
            or an Optax schedule of the step; may be traced, and outside of [0, 1] counts as
            the nearer end. (What is a whole number of units but for a millionth of all is
            that number.) Other fractions for some groups: a `jc.chain` of several with `where`.
        score: static. Of single weights, as in `jc.prune`: a function, a
            `jc.pruning.RunningScore` as `jc.pruning.movement()`, or a tree of arrays, which
            may be traced.
        norm: static. What makes one number of those of a unit, as in `jc.pruning.unit_scores`.
        leaves: static. Which leaves count in the scores, as there.
        scores: instead of `score`: by name of the group an array `[*layers, size]`, which may
            be traced. Groups that are not named stay whole.
        scope: static. `"local"`, `"global"` or `"isomorphic"`, as in `jc.select`.
        normalize: static. Of the scores of a ranking of several groups, as in `jc.select`.
        multiple_of: static. What counts are multiples of, as in `jc.select`.
        floor: static. The least that a group keeps, as in `jc.select`.
        where: static. Patterns of the groups that lose units, as in `jc.select`.
        exclude: static. Patterns of those that stay whole, as in `jc.select`.
        overlap: static. As in `jc.select`.

    Returns:
        A projection whose structure is a dict from the paths of leaves to `UnitMask`s. Of equal
        scores the first units stay; NaN ranks below every number. `jc.pack` stores the
        positions that stay, as blocks where they are; `jc.shrink` makes the leaves themselves
        smaller. Inside of `jc.masked` and `jc.partition` only the leaves given count.

    Raises:
        ValueError: `sparsity` is a number outside of [0, 1]; a leaf has another shape than in
            the dependencies; no leaf is there; scores of another shape, or missing; a pattern
            that matches no group, or no group left.
        TypeError: a leaf is packed; raised while tracing.

    Cost: `find` reduces each leaf once for each of its axes that loses positions, and selects
    among the units. `project` is one elementwise pass; the structure has a byte for each
    position of an axis.

    Examples:
        >>> params = {"a": jnp.array([[1.0, 3.0], [2.0, 0.5]]), "b": jnp.array([[1.0], [2.0]])}
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> groups = jc.dependencies(fn, params, jnp.ones((1, 2)))
        >>> p = jc.pruning.prune_groups(groups, 0.5)
        >>> jc.compress(p, params)["a"]
        Array([[0. , 3. ],
               [0. , 0.5]], dtype=float32)
        >>> gradual = jc.pruning.prune_groups(groups, jc.schedules.cubic(0.0, 0.5, 0, 1000))
        >>> opt = jc.projected(optax.adam(1e-3), jc.every(100, gradual))
        >>> keep = jc.pruning.kept_units(groups, opt.init(params))

    Source: Li et al. 2017, arXiv:1608.08710 (norms of filters); over coupled leaves Fang et al.
    2023, arXiv:2301.12900; filters that go on training He et al. 2018,
    arXiv:1808.06866.
    """
    require_dependencies("prune_groups", dependencies)
    _check.numeric("prune_groups", "sparsity", sparsity, 0, 1)
    _require_choice("scope", scope, ("local", "global", "isomorphic"))
    _require_choice("overlap", overlap, ("blocks", "strides", "both"))
    require_normalize("prune_groups", normalize)
    if scores is None:
        require_score("prune_groups", "score", score)
    else:
        scores = _by_name(dependencies, scores)
    able = _able(dependencies, where, exclude)
    multiples = by_group("prune_groups", "multiple_of", multiple_of, dependencies.groups, 1)
    floors = by_group("prune_groups", "floor", floor, dependencies.groups, None)
    _require_amounts(multiples, floors)
    labels = dict.fromkeys((g.name for g in dependencies.groups), 0)
    paths = member_paths(dependencies.groups)

    def loses_units(path: str, leaf: Any) -> bool:
        return path in paths and is_floating(leaf)

    def find(params, *, previous=None, grads=None, step=0):
        zeroed = member_leaves("prune_groups", dependencies, params, None)
        if scores is None:
            ranked, statistics = _of_weights(score, leaves, params, previous, grads, step)
            groups = [g for g in able if any(m.path in ranked for m in g.members)]
        else:
            ranked, statistics = scores, {}
            groups = [g for g in able if g.name in scores]
        groups = without_overlap(groups, overlap, labels)
        if not groups:
            rule, fix = "leave a group that loses units and has scores", "none"
            raise ValueError(_check.message("prune_groups", "where", rule, fix))
        rankings = ranked_together(dependencies, groups, scope, labels)
        there = present(groups, zeroed)

        def select(zeroed, ranked, fraction):
            units = ranked
            if scores is None:
                # One number for all weights that count of a unit.
                units = {g.name: _of_units(g, ranked, norm) for g in groups}
            if normalize is not None and scope != "local":
                units = {name: _comparable(normalize, x) for name, x in units.items()}
            masks = kept_by_rankings(rankings, units, fraction, multiples, floors)
            return zeroed, [[member_mask(g, m, masks[g.name]) for m in g.members] for g in there]

        _, stays = automatic_like(select, zeroed, ranked, fraction_at(sparsity, step))
        found = _by_leaf(there, stays)

        def leaf(path, w):
            of_it = found.get(path, [])
            return UnitMask(
                tuple(stay for _, _, stay in of_it),
                tuple(group.name for group, _, _ in of_it),
                tuple(member.axis for _, member, _ in of_it),
                w.shape,
                statistics.get(path),
            )

        return tree.map_arrays_with_path(leaf, params)

    everywhere = of_leaves(find, observer_of(score) if scores is None else None).everywhere
    assert everywhere is not None
    return choose(everywhere, loses_units, function="prune_groups")


def _of_weights(
    score: Score, leaves: tree.Where, params: PyTree, previous: PyTree, grads: PyTree, step: Any
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The scores of the leaves that count, and the statistics of all, by path."""
    counted = tree.select(params, leaves, function="prune_groups")
    shown = counted
    if isinstance(score, RunningScore):
        # What it gathers is of every leaf, as it is updated for every one.
        shown = jax.tree.map(lambda _: True, counted)
    hide = lambda x: jax.tree.map(lambda s, x: x if s else optax.MaskedNode(), shown, x)  # noqa: E731
    hidden = hide(params)
    before, moves = (None if x is None else hide(x) for x in (previous, grads))
    scores, gathered = scores_of(score, hidden, before, moves, step)
    statistics: dict[str, Any] = {}
    tree.map_arrays_with_path(lambda path, w, s: statistics.update({path: s}), hidden, gathered)
    hits = dict(tree.leaves_with_paths(counted))
    return {path: x for path, x in tree.leaves_with_paths(scores) if hits[path]}, statistics


def _of_units(group: Group, scores: Mapping[str, jax.Array], norm: Norm) -> jax.Array:
    members = [m for m in group.members if m.path in scores]
    return reduced(group, members, [scores[m.path] for m in members], norm)


def _comparable(normalize: Normalize, scores: jax.Array) -> jax.Array:
    """Normalized, with NaN where there was one."""
    unknown = jnp.isnan(scores)
    found = normalize(jnp.where(unknown, jnp.zeros_like(scores), scores))
    if found.shape != scores.shape:
        rule, got = "return the shape of the scores", _check.describe(found)
        raise ValueError(_check.message("prune_groups", "normalize", rule, got))
    return jnp.where(unknown, jnp.array(jnp.nan, found.dtype), found)


def _by_leaf(
    groups: list[Group], stays: list[list[jax.Array]]
) -> dict[str, list[tuple[Group, Member, jax.Array]]]:
    found: dict[str, list[tuple[Group, Member, jax.Array]]] = {}
    for group, factors in zip(groups, stays, strict=True):
        for member, factor in zip(group.members, factors, strict=True):
            found.setdefault(member.path, []).append((group, member, factor))
    return found


def _able(dependencies: Dependencies, where: Any, exclude: Any) -> list[Group]:
    """The groups that may lose units."""
    groups = list(dependencies.groups)
    if where is not None:
        hits = matching("prune_groups", "where", where, groups)
        groups = [g for g in groups if hits[g.name]]
    hits = matching("prune_groups", "exclude", exclude, dependencies.groups)
    return [g for g in groups if not hits[g.name]]


def _by_name(dependencies: Dependencies, scores: Any) -> dict[str, jax.Array]:
    shapes = {group.name: group.shape for group in dependencies.groups}
    if not isinstance(scores, Mapping):
        rule, got = "be a dict by the names of groups", _check.describe(scores)
        raise TypeError(_check.message("prune_groups", "scores", rule, got))
    for name, x in scores.items():
        if name not in shapes or jnp.shape(x) != shapes[name]:
            rule = "be by names of groups, of shape [*layers, size]"
            got = _check.describe(x) if name in shapes else f"no group of the name {name!r}"
            raise ValueError(_check.message("prune_groups", "scores", rule, got, path=name))
        _check.floating("prune_groups", "scores", x, name)
    return {name: jnp.asarray(x) for name, x in scores.items()}


def _require_amounts(multiples: Mapping[str, Any], floors: Mapping[str, Any]) -> None:
    for name, multiple in multiples.items():
        _check.integer("prune_groups", "multiple_of", multiple, 1)
        if isinstance(floors[name], float):
            _check.number("prune_groups", "floor", floors[name], 0, 1, "A count is an integer.")
        elif floors[name] is not None:
            _check.integer("prune_groups", "floor", floors[name], 0)


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        rule = f"be one of {', '.join(map(repr, choices))}"
        raise ValueError(_check.message("prune_groups", name, rule, repr(value)))

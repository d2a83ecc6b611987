"""Layers projected by the rules of a projection: those of one shape through one program."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Features, Projection, RowRule, Rows, rows_of
from jaxcompress.solvers._compensate import compensate
from jaxcompress.solvers._hessian import prepare
from jaxcompress.solvers._layout import Layout, gram_of, layouts
from jaxcompress.tracing import Statistics

Uses = dict[str, list[Rows]]
"""From the path of a leaf to the rules by which its rows are projected, in turn."""


class How(NamedTuple):
    """The numbers of the solver, as `compress` takes them; `tell` asks for the structures."""

    damping: ArrayLike
    block_size: int
    act_order: bool
    tell: bool


class Solved(NamedTuple):
    """A leaf, and the structure of each of its rules if they were asked for."""

    w: jax.Array
    structures: list[Any]


class _Job(NamedTuple):
    path: str
    layout: Layout
    w: jax.Array
    gram: jax.Array
    uses: list[Rows]
    data: list[Any]
    features: Features | None


def rules_of(projection: Projection, params: PyTree, step: int | jax.Array) -> tuple[PyTree, Uses]:
    """What `projection` will do to each leaf that it chooses, found on `params`: tree and dict."""
    found = rows_of(projection, params, jnp.asarray(step, jnp.int32))
    uses: Uses = {}
    for rows in filter(_is_rows, jax.tree.leaves(found, is_leaf=_is_rows)):
        for path in rows.data:
            uses.setdefault(path, []).append(rows)
    return found, uses


def structure_of(found: PyTree, solved: Mapping[str, Solved]) -> PyTree:
    """The structure of the whole projection, from those of its leaves."""
    left: dict[str, Iterator[Any]] = {path: iter(s.structures) for path, s in solved.items()}

    def one(rows):
        return {path: next(left[path]) for path in rows.data} if _is_rows(rows) else rows

    return jax.tree.map(one, found, is_leaf=_is_rows)


def solve(
    function: str,
    uses: Uses,
    params: PyTree,
    stats: Mapping[str, Statistics],
    how: How,
) -> dict[str, Solved]:
    """The new leaf of each path in `uses`."""
    leaves: dict[str, Any] = {}
    tree.map_arrays_with_path(lambda path, w: leaves.update({path: w}), params)
    leaves = {path: w for path, w in leaves.items() if path in uses}
    batches: dict[Any, list[_Job]] = {}
    new = {}
    for path, (layout, several) in layouts(function, stats, leaves).items():
        gram = gram_of(function, path, several, layout)
        if any(rows.whole for rows in uses[path]):
            w = leaves[path]
            new[path] = _in_turn(function, path, w, gram, layout, several, uses[path], how)
            continue
        job = _job(function, path, leaves[path], layout, gram, uses[path], how)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (job.w, job.data))
        key = (tuple(id(rows.rule) for rows in job.uses), str(shapes))
        batches.setdefault(key, []).append(job)
    for jobs in batches.values():
        new.update(_solved(jobs, how))
    return new


def _in_turn(
    function: str, path: str, w: jax.Array, gram, layout: Layout, several, uses: list[Rows], how
) -> Solved:
    """A leaf that some rule projects as a whole; rules of rows between such are solved together."""
    if len(uses) > 1 and not all(rows.joins for rows in uses if rows.whole):
        rule = "project a leaf of low rank by that alone where there are statistics"
        got = "a chain"
        fix = (
            "jc.factorization.low_rank_plus joins low rank with another projection. To quantize"
            " factors, pack them and calibrate jc.lift(fn)."
        )
        raise ValueError(_check.message(function, "projection", rule, got, fix, path=path))
    found: list[Any] = []
    for whole, run in itertools.groupby(uses, lambda rows: rows.whole is not None):
        rules = list(run)
        if not whole:
            job = _job(function, path, w, layout, gram, rules, how)
            w, structures = _solved([job], how)[path]
            found += structures
        for rows in rules if whole else ():
            w, chosen = rows.whole(path, w, gram, layout, several)  # pyright: ignore[reportOptionalCall]
            found.append(chosen)
    if not how.tell:
        return Solved(w, [])
    # Those of whole leaves at last: the first of several may wait for what the last has found.
    told = [
        rows.structure(path, chosen) if rows.whole and rows.structure else chosen
        for rows, chosen in zip(uses, found, strict=True)
    ]
    return Solved(w, told)


def _is_rows(x: Any) -> bool:
    return isinstance(x, Rows)


def _job(function, path: str, w: jax.Array, layout: Layout, gram, uses: list[Rows], how) -> _Job:
    features = _features(function, path, uses)
    if features is not None:
        w, gram = features.there(w), features.gram(gram, layout)
    must = [rows.innermost for rows in uses if rows.otherwise is None]
    wanted = {innermost[path] for innermost in must if path in innermost}
    if wanted and (len(wanted) > 1 or not wanted <= set(layout.axes)):
        rule = f"have groups along one axis that is summed over ({list(layout.axes)})"
        got, fix = sorted(wanted), "Pass `axis` to jc.prune, see jc.pruning.contraction_axes."
        raise ValueError(_check.message(function, "projection", rule, got, fix, path=path))
    used = []
    for rows in uses:
        if rows.otherwise is not None:
            axis = rows.innermost.get(path)
            fits = axis in layout.axes and wanted <= {axis} and not how.act_order
            if fits and _whole(layout, axis, rows.rule.group):
                wanted = {axis}
            else:
                rows = rows.otherwise()
        used.append(rows)
        if how.tell and rows.structure is None:
            rule, got = "tell its structure for `return_structure`", "one that does not"
            raise ValueError(_check.message(function, "projection", rule, got, path=path))
    innermost = next(iter(wanted), None)
    group = math.lcm(*(rows.rule.group or 1 for rows in used))
    if innermost is not None and not _whole(layout, innermost, group):
        rule = f"have groups that divide the {layout.shape[innermost]} entries of the axis"
        raise ValueError(_check.message(function, "projection", rule, group, path=path))
    layout, gram = layout.with_innermost(innermost, gram)

    def matrices(x):
        return jnp.broadcast_to(x, gram.shape[:1]) if x.ndim == 0 else layout.matrices(x)

    data = [jax.tree.map(matrices, rows.data[path]) for rows in used]
    return _Job(path, layout, layout.matrices(w), gram, used, data, features)


def _features(function: str, path: str, uses: list[Rows]) -> Features | None:
    """The features in which a leaf is projected: one error is made up for in one space."""
    found = [rows.features.get(path) if rows.features else None for rows in uses]
    if any(one is not found[0] for one in found):
        rule = "project each leaf in the same features throughout"
        got, fix = "a chain in several", "Put the combinator around the whole jc.chain."
        raise ValueError(_check.message(function, "projection", rule, got, fix, path=path))
    return found[0]


def _whole(layout: Layout, axis: int | None, group: int | None) -> bool:
    """Whether groups along the axis are neighbouring rows when it is the innermost one."""
    return len(layout.axes) == 1 or layout.shape[axis or 0] % (group or 1) == 0


def _solved(jobs: list[_Job], how: How) -> dict[str, Solved]:
    """All layers of one shape, one after the other through one loop."""
    given = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *((job.w, job.gram, job.data) for job in jobs)
    )
    rules = tuple(rows.rule for rows in jobs[0].uses)
    static = how._replace(damping=0.0)
    new, chosen = _layers(given, jnp.asarray(how.damping), rules, static)
    out, first = {}, 0
    for job in jobs:
        last = first + job.w.shape[0]
        leaf = functools.partial(_leaf, job.layout, first, last)
        structures = [
            rows.structure(job.path, jax.tree.map(leaf, one))  # pyright: ignore[reportOptionalCall]
            for rows, one in zip(job.uses, chosen, strict=False)
        ]
        solved = leaf(new)
        out[job.path] = Solved(job.features.back(solved) if job.features else solved, structures)
        first = last
    return out


def _leaf(layout: Layout, first: int, last: int, x: jax.Array) -> jax.Array:
    if x.ndim == 3:
        return layout.leaf(x[first:last])
    return x[first, 0] if x.size else jnp.zeros((), x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _layers(given, damping, rules: tuple[RowRule, ...], how: How) -> tuple[jax.Array, Any]:
    """Compiled once for each shape and each projection, also where the caller is not."""

    def layer(one):
        w, gram, data = one
        return _project_layer(w, gram, data, rules, how._replace(damping=damping))

    return lax.map(layer, given)


def _project_layer(w, gram, data, rules: tuple[RowRule, ...], how: How) -> tuple[jax.Array, Any]:
    features = w.shape[0]
    groups = [rule.group for rule in rules if rule.group is not None]
    block = math.lcm(*groups) if groups else max(1, min(how.block_size, features))
    order = _falling(jnp.diagonal(gram), block if groups else 1) if how.act_order else None
    if order is not None:
        w, gram = w[order], gram[order][:, order]
        data = jax.tree.map(lambda x: x[order] if x.ndim else x, data)
    prepared, _ = prepare(gram, how.damping)
    gone = jnp.isnan(w) | prepared.dead[:, None]
    filled = -(-features // block) * block - features

    def fill(x):
        return x if x.ndim == 0 else jnp.pad(x, ((0, filled), (0, 0)))

    data = jax.tree.map(fill, data)

    def choose(rows, diagonal, start):
        structures = []
        for rule, one in zip(rules, data, strict=True):
            structures.append(rule.choose(one, rows, diagonal, start, features))
            if len(structures) < len(rules):
                each = jax.vmap(rule.project, in_axes=(0, None, 0))
                rows = each(rows, structures[-1], jnp.arange(block))
        return structures

    def project(row, structures, i):
        for rule, structure in zip(rules, structures, strict=True):
            row = rule.project(row, structure, i)
        return row

    dense = jnp.where(gone, jnp.zeros((), w.dtype), w)
    new, structures = compensate(dense, prepared.factor, choose, project, block_size=block)
    chosen = jax.tree.map(lambda x: _joined(x, block, features), structures) if how.tell else ()
    if order is None:
        return new, chosen
    back = jnp.argsort(order)
    return new[back], jax.tree.map(lambda x: x[back] if x.ndim > 1 else x, chosen)


def _joined(x: jax.Array, block: int, features: int) -> jax.Array:
    """What was chosen for each block, `[blocks, rows, outputs]`, as one matrix."""
    if x.ndim < 3:
        return x
    rows = -(-features * x.shape[1] // block)
    return x.reshape((x.shape[0] * x.shape[1], x.shape[2]))[:rows]


def _falling(diagonal: jax.Array, group: int) -> jax.Array:
    """Rows by falling size of their inputs, whole groups at once; a ragged last one stays last."""
    features = diagonal.shape[0]
    whole = features // group * group
    sizes = jnp.sum(diagonal[:whole].reshape((-1, group)), axis=1)
    first = jnp.argsort(-sizes, stable=True) * group
    order = (first[:, None] + jnp.arange(group)[None, :]).reshape(whole)
    return jnp.concatenate([order, jnp.arange(whole, features)])

"""Compressing once: in the space of the weights, or of the outputs of each layer."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress import _check, projections, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection, RowRule, rows_of
from jaxcompress.solvers._compensate import compensate
from jaxcompress.solvers._hessian import prepare
from jaxcompress.solvers._layout import Layout, gram_of, layouts
from jaxcompress.tracing import Statistics


def compress(
    projection: Projection,
    params: PyTree,
    *,
    step: int | jax.Array = 0,
    stats: Mapping[str, Statistics] | None = None,
    damping: ArrayLike = 0.01,
    block_size: int = 128,
    act_order: bool = False,
) -> PyTree:
    r"""Projects once, after training: on the nearest params, or on those with the nearest outputs.

    Without statistics `project(params, find(params))`. With statistics of what each layer
    was multiplied with, each layer W becomes the W' for which

    .. math:: \|X W' - X W\|^2 + \lambda\,\overline{\operatorname{diag}(X^\top X)}\,\|W' - W\|^2

    is small: its rows are projected one by one, and the error of each is made up for by those
    that follow. For `jc.prune` that is SparseGPT, for `jc.quantize` GPTQ with fixed steps, and
    for a `jc.chain` of both the two jointly.

    Args:
        projection: any without `stats`. With them `jc.prune`, `jc.quantize`,
            `jc.pruning.from_masks`, and `jc.chain`, `jc.masked`, `jc.partition` and `jc.scheduled`
            of them. `jc.prune` by magnitude keeps of each leaf as many weights as it would
            without `stats`, but chooses them, in blocks of rows, by what their loss costs; with
            another score, with `groups` or with an axis as its scope it keeps its masks.
        params: any pytree of parameters; they are not changed.
        step: where schedules and `jc.every` are read. May be traced.
        stats: from `jc.calibrate(fn, params, batches, gram=True)`.
        damping: :math:`\lambda`, at least 0, raised where float32 needs it. May be traced.
        block_size: static. Rows whose weights are chosen together.
        act_order: static. Whether the rows with the largest inputs are projected first, when
            most rows are left to make up for them; groups of `nm` stay together.

    Returns:
        Params of the same structure, shapes and dtypes: the simulated face. `jc.pack` gives
        the smaller arrays. A NaN counts as zero where there are statistics, and the weights
        of inputs that were always zero go first.

    Raises:
        TypeError: `projection` is not a `Projection`.
        ValueError: with `stats`: a chosen leaf has none, or no Gram matrix, or is used in
            parts or in several ways; a projection that can't be taken row by row.

    Cost: one `find` and one `project`; with statistics, for each layer of k inputs and n outputs
    one decomposition, :math:`O(k^3)`, and :math:`O(k^2 n)`. Layers of one shape share one
    compiled loop. Works under `jit` and `vmap`.

    Examples:
        >>> params = {"w": jnp.array([[1.0, -4.0], [3.0, 0.5]])}
        >>> jax.vmap(lambda s: jc.compress(jc.prune(s), params)["w"])(jnp.array([0.25, 0.75]))
        Array([[[ 1.,  -4.],
                [ 3.,   0.]],
               [[ 0.,  -4.],
                [ 0.,   0.]]], dtype=float32)
        >>> fn = lambda p, x: x @ p["w"]
        >>> x = jnp.array([[1.0, 0.9], [0.9, 1.0]])
        >>> stats = jc.calibrate(fn, params, [x], gram=True)
        >>> new = jc.compress(jc.prune(0.5), params, stats=stats)
        >>> plain = jc.compress(jc.prune(0.5), params)
        >>> loss = lambda p: float(jnp.sum((fn(p, x) - fn(params, x)) ** 2))
        >>> loss(new) < loss(plain)
        True

    Source: Frantar & Alistarh 2023, arXiv:2301.00774; Frantar et al. 2022, arXiv:2210.17323.
    To calibrate each layer behind those that are compressed already use
    `jc.solvers.sequential`.
    """
    if stats is None:
        return projections.compress(projection, params, step=step)
    if not isinstance(projection, Projection):
        return projections.compress(projection, params)  # for its error
    _check.number("compress", "damping", damping, 0.0)
    _check.integer("compress", "block_size", block_size, 1)
    uses = uses_of(projection, params, step)
    new = solve("compress", uses, params, stats, How(damping, block_size, act_order))
    return tree.map_with_path(lambda path, w: new.get(path, w), params)


Uses = dict[str, list[tuple[RowRule, Any, int | None]]]
"""From the path of a leaf to the rules by which its rows are projected, and their data."""


class How(NamedTuple):
    """The numbers of the solver, as `compress` takes them."""

    damping: ArrayLike
    block_size: int
    act_order: bool


def uses_of(projection: Projection, params: PyTree, step: int | jax.Array) -> Uses:
    """What `projection` will do to each leaf that it chooses, found on `params`."""
    uses: Uses = {}
    for rows in rows_of(projection, params, jnp.asarray(step, jnp.int32)):
        for path, data in rows.data.items():
            uses.setdefault(path, []).append((rows.rule, data, rows.innermost.get(path)))
    return uses


def solve(
    function: str,
    uses: Uses,
    params: PyTree,
    stats: Mapping[str, Statistics],
    how: How,
) -> dict[str, jax.Array]:
    """The new leaf of each path in `uses`."""
    leaves = {path: w for path, w in tree.leaves_with_paths(params) if path in uses}
    batches: dict[Any, list[_Job]] = {}
    for path, (layout, several) in layouts(function, stats, leaves).items():
        gram = gram_of(function, path, several, layout)
        job = _job(path, leaves[path], layout, gram, uses[path])
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (job.w, job.data))
        key = (tuple(map(id, job.rules)), str(shapes))
        batches.setdefault(key, []).append(job)
    new = {}
    for jobs in batches.values():
        new.update(_solved(jobs, how))
    return new


class _Job(NamedTuple):
    path: str
    layout: Layout
    w: jax.Array
    gram: jax.Array
    rules: list[RowRule]
    data: list[Any]


def _job(path: str, w: jax.Array, layout: Layout, gram: jax.Array, uses) -> _Job:
    wanted = {axis for _, _, axis in uses if axis is not None}
    if wanted and (len(wanted) > 1 or not wanted <= set(layout.axes)):
        rule = f"have groups along one axis that is summed over ({list(layout.axes)})"
        got, fix = sorted(wanted), "Pass `axis` to jc.prune, see jc.pruning.contraction_axes."
        raise ValueError(_check.message("compress", "projection", rule, got, fix, path=path))
    layout, gram = layout.with_innermost(next(iter(wanted), None), gram)
    if wanted and len(layout.axes) > 1:
        length = layout.shape[layout.axes[-1]]
        group = math.lcm(*(rule.group or 1 for rule, _, _ in uses))
        if length % group:
            rule = f"have groups that divide the {length} entries of the axis"
            raise ValueError(_check.message("compress", "projection", rule, group, path=path))

    def matrices(x):
        return jnp.broadcast_to(x, gram.shape[:1]) if x.ndim == 0 else layout.matrices(x)

    data = [jax.tree.map(matrices, one) for _, one, _ in uses]
    return _Job(path, layout, layout.matrices(w), gram, [rule for rule, _, _ in uses], data)


def _solved(jobs: list[_Job], how: How) -> dict[str, jax.Array]:
    """All layers of one shape, one after the other through one loop."""

    def together(*parts):
        return jnp.concatenate(parts)

    given = jax.tree.map(together, *((job.w, job.gram, job.data) for job in jobs))
    rules = tuple(jobs[0].rules)
    solved = _layers(given, jnp.asarray(how.damping), rules, how.block_size, how.act_order)
    out, first = {}, 0
    for job in jobs:
        last = first + job.w.shape[0]
        out[job.path] = job.layout.leaf(solved[first:last])
        first = last
    return out


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _layers(given, damping, rules, block_size: int, act_order: bool) -> jax.Array:
    """Compiled once for each shape and each projection, also where the caller is not."""
    how = How(damping, block_size, act_order)

    def layer(one):
        w, gram, data = one
        return _project_layer(w, gram, data, rules, how)

    return lax.map(layer, given)


def _project_layer(w, gram, data, rules: tuple[RowRule, ...], how: How) -> jax.Array:
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
        return structures

    def project(row, structures, i):
        for rule, structure in zip(rules, structures, strict=True):
            row = rule.project(row, structure, i)
        return row

    dense = jnp.where(gone, jnp.zeros((), w.dtype), w)
    new = compensate(dense, prepared.factor, choose, project, block_size=block)[0]
    return new if order is None else new[jnp.argsort(order)]


def _falling(diagonal: jax.Array, group: int) -> jax.Array:
    """Rows by falling size of their inputs, whole groups at once; a ragged last one stays last."""
    features = diagonal.shape[0]
    whole = features // group * group
    sizes = jnp.sum(diagonal[:whole].reshape((-1, group)), axis=1)
    first = jnp.argsort(-sizes, stable=True) * group
    order = (first[:, None] + jnp.arange(group)[None, :]).reshape(whole)
    return jnp.concatenate([order, jnp.arange(whole, features)])

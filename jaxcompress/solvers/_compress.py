"""Compressing once: in the space of the weights, or of the outputs of each layer."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxcompress import _check, projections, tree
from jaxcompress._sharding import automatic_like
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection
from jaxcompress.solvers._solve import How, rules_of, solve, structure_of
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
    return_structure: bool = False,
) -> PyTree:
    r"""Projects once, after training: on the nearest params, or on those with the nearest outputs.

    Without statistics `project(params, find(params))`. With statistics of what each layer
    was multiplied with, each layer W becomes the W' for which

    .. math:: \|X W' - X W\|^2 + \lambda\,\overline{\operatorname{diag}(X^\top X)}\,\|W' - W\|^2

    is small: its rows are projected one by one, and the error of each is made up for by those
    that follow. For `jc.prune` that is SparseGPT, for `jc.quantize` GPTQ, and for a `jc.chain` of
    both the two jointly. `jc.low_rank` takes each layer as a whole and makes the first term least,
    without damping: the whitened decomposition of SVD-LLM.

    Args:
        projection: any without `stats`. With them `jc.prune`, `jc.quantize`, `jc.low_rank` (not in
            a `jc.chain`), `jc.factorization.low_rank_plus`, `jc.pruning.from_masks`, and
            `jc.chain`, `jc.masked`, `jc.partition` and `jc.scheduled` of them. `jc.prune` by
            magnitude keeps of each leaf as many weights as it would without `stats`, but
            chooses them, in blocks of rows, by what their loss costs; with another score, with
            `groups` or with an axis as its scope it keeps its masks.
        params: any pytree of parameters; they are not changed.
        step: where schedules and `jc.every` are read. May be traced.
        stats: from `jc.calibrate(fn, params, batches, gram=True)`.
        damping: :math:`\lambda`, at least 0, raised where float32 needs it. May be traced.
        block_size: static. Rows whose weights are chosen together. Groups along the rows, of `nm`
            and of `jc.quantize(…, group_size=…)`, are blocks of their own instead, with masks
            and steps fitted to what the compensation has made of them when their turn comes.
        act_order: static. Whether the rows with the largest inputs are projected first, when
            most rows are left to make up for them; groups of `nm` stay together, and groups of
            `jc.quantize` are those of the leaf, with steps fitted beforehand.
        return_structure: static. Whether the structure is returned too: the masks and grids
            that were found on the way, which `find` would not find on the new params.

    Returns:
        Params of the same structure, shapes and dtypes: the simulated face. With
        `return_structure` also the structure, on which `projection.project` leaves them as they
        are and by which `projection.pack` makes them small: the realized face. A NaN counts as
        zero where there are statistics, and the weights of inputs that were always zero go
        first.

    Raises:
        TypeError: `projection` is not a `Projection`.
        ValueError: with `stats`: a chosen leaf has none, or no Gram matrix, or is used in
            parts or in several ways; a projection that can't be taken row by row, or can't tell
            its structure.

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

        GPTQ, packed on its own grids:

        >>> p = jc.quantize(4, group_size=2, symmetric=False)
        >>> new, structure = jc.compress(p, params, stats=stats, return_structure=True)
        >>> packed = p.pack(new, structure)
        >>> bool((jc.todense(packed)["w"] == new["w"]).all())
        True

        Factors that `jc.lift` runs, quantized for their own inputs:

        >>> tall = {"w": jnp.outer(jnp.array([1.0, 2.0]), jnp.arange(1.0, 5.0))}
        >>> small = jc.pack(jc.low_rank(1), tall)
        >>> stats = jc.calibrate(jc.lift(fn), small, [x], gram=True)
        >>> sorted(stats)
        ['w/u', 'w/v']
        >>> small = jc.compress(jc.quantize(4), small, stats=stats)

    Source: Frantar & Alistarh 2023, arXiv:2301.00774; Frantar et al. 2022, arXiv:2210.17323; Wang
    et al. 2024, arXiv:2403.07378.
    To calibrate each layer behind those that are compressed already use
    `jc.solvers.sequential`.
    """
    if not isinstance(projection, Projection):
        return projections.compress(projection, params)  # for its error
    if stats is None:
        structure = projection.find(params, step=jnp.asarray(step, jnp.int32))
        new = projection.project(params, structure)
        return (new, structure) if return_structure else new
    _check.number("compress", "damping", damping, 0.0)
    _check.integer("compress", "block_size", block_size, 1)

    def solved_for(params, stats, damping, step):
        found, uses = rules_of(projection, params, step)
        how = How(damping, block_size, act_order, return_structure)
        solved = solve("compress", uses, params, stats, how)
        swap = lambda path, w: solved[path].w if path in solved else w  # noqa: E731
        new = tree.map_arrays_with_path(swap, params)
        return new, structure_of(found, solved) if return_structure else None

    new, structure = automatic_like(solved_for, params, stats, damping, step)
    return (new, structure) if return_structure else new

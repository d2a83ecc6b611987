"""Compressing layer after layer, each for the inputs that the compressed ones before it give."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxcompress import _check, tree
from jaxcompress._types import ArrayLike, PyTree
from jaxcompress.projections import Projection
from jaxcompress.solvers._solve import How, Solved, rules_of, solve, structure_of
from jaxcompress.tracing import calibrate, sites


def sequential(
    projection: Projection,
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    *,
    order: Sequence[tree.Where] | None = None,
    step: int | jax.Array = 0,
    damping: ArrayLike = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    return_structure: bool = False,
) -> PyTree:
    r"""`jc.compress` with statistics, where each layer meets the compressed layers before it.

    .. math:: W'_l \approx \arg\min_{W' \in C} \|X'_l W' - X'_l W_l\|^2, \qquad
        X'_l = \text{the inputs of layer } l \text{ behind } W'_1, \dots, W'_{l-1}

    Args:
        projection: as in `jc.compress` with statistics. Its budgets and scopes are those of
            the dense model: they are found once, before the first layer changes.
        fn: any function `fn(params, *batch)`, of which `jc.sites` finds the layers.
        params: any pytree of dense parameters; they are not changed.
        batches: as in `jc.calibrate`, and read once for each group: of a generator all are held.
        order: static. Groups of leaves, each as in `jaxcompress.tree.select`, in the order of
            computation: `["*/q", "*/k"]` are two groups, `jc.tree.any_of("*/q", "*/k")` is
            one, calibrated in one run. None: each leaf is a group, in the order in which `fn`
            first uses them.
        step: as in `jc.compress`.
        damping: as in `jc.compress`.
        block_size: as in `jc.compress`.
        act_order: as in `jc.compress`.
        return_structure: as in `jc.compress`.

    Returns:
        Params of the same structure, shapes and dtypes, as of `jc.compress`, with the structure
        where it is asked for. Each layer is fitted to inputs that it will really get. The output
        of the whole is nearer to the dense one as a rule, not always: measure it.

    Raises:
        TypeError: `fn` can't be called, or `projection` is not a `Projection`.
        ValueError: as `jc.compress`; or a chosen leaf is in no group of `order`.

    Cost: for each group one `jc.calibrate` of `fn`, which compiles it anew, and the solving.
    Group leaves of the same inputs. Layers of a scanned stack are one leaf, and are calibrated
    together.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> a, b, x = (jax.random.normal(jax.random.key(i), (32, 32)) for i in range(3))
        >>> params = {"a": a, "b": b}
        >>> new = jc.solvers.sequential(jc.prune(0.5), fn, params, [x])
        >>> stats = jc.calibrate(fn, params, [x], gram=True)
        >>> at_once = jc.compress(jc.prune(0.5), params, stats=stats)
        >>> inputs = jax.nn.relu(x @ new["a"])
        >>> loss = lambda b: float(jnp.sum((inputs @ b - inputs @ params["b"]) ** 2))
        >>> loss(new["b"]) < loss(at_once["b"])
        True

    Source: Frantar et al. 2022, arXiv:2210.17323, section 4, and Frantar & Alistarh 2023,
    arXiv:2301.00774: their layers are calibrated behind compressed ones. Differs: the groups
    are leaves, of any function, where theirs are blocks of a transformer.
    """
    _check.number("sequential", "damping", damping, 0.0)
    _check.integer("sequential", "block_size", block_size, 1)
    if not isinstance(projection, Projection):
        rule, got = "be a Projection", _check.describe(projection)
        raise TypeError(_check.message("sequential", "projection", rule, got))
    batches = list(batches)
    if not batches:
        raise ValueError(_check.message("sequential", "batches", "hold at least one batch", "none"))
    found, uses = rules_of(projection, params, step)
    how, solved = How(damping, block_size, act_order, return_structure), {}
    for group in _groups(fn, params, batches[0], order, set(uses)):
        part = {path: uses[path] for path in group}
        stats = calibrate(fn, params, batches, where=_any_of(group), gram=True)
        new: dict[str, Solved] = solve("sequential", part, params, stats, how)
        solved |= new
        params = tree.map_arrays_with_path(
            lambda path, w, new=new: new[path].w if path in new else w, params
        )
    return (params, structure_of(found, solved)) if return_structure else params


def _any_of(paths: list[str]) -> tree.Where:
    return lambda path, _: path in paths


def _groups(fn, params: PyTree, batch: Any, order, chosen: set[str]) -> list[list[str]]:
    """Paths of the chosen leaves, those of one calibration together."""
    if order is None:
        batch = batch if isinstance(batch, tuple) else (batch,)
        used = dict.fromkeys(site.path for site in sites(fn, params, *batch))
        groups = [[path] for path in used if path in chosen]
    else:
        groups, left = [], set(chosen)
        for where in order:
            picked = tree.select(params, where, function="sequential")
            flat = zip(tree.leaves_with_paths(params), jax.tree.leaves(picked), strict=True)
            heads = [path for (path, _), hit in flat if hit]
            # The factors of a compressed leaf go with it.
            group = [p for p in sorted(left) if any(f"{p}/".startswith(f"{h}/") for h in heads)]
            left -= set(group)
            groups += [group] if group else []
    missing = sorted(chosen - {path for group in groups for path in group})
    if missing:
        rule = "have each chosen leaf in a group" if order is not None else "use each chosen leaf"
        name = "order" if order is not None else "fn"
        fix = "Choose fewer leaves with jc.masked."
        text = _check.message("sequential", name, rule, f"none of {missing}", fix)
        raise ValueError(text)
    return groups

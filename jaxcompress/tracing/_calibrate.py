"""Statistics of the activations that each parameter meets, batch by batch."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing import _histogram, _observers
from jaxcompress.tracing._inputs import PRODUCTS, activations_of, as_patches, as_rows
from jaxcompress.tracing._interpret import Hooks, interpret
from jaxcompress.tracing._jaxprs import Location, Traced, trace
from jaxcompress.tracing._observers import Observer
from jaxcompress.tracing._sites import Site, param_paths, require_function, sites_among
from jaxcompress.tracing._walk import walk


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["low", "high", "moments", "histogram", "gram"],
    meta_fields=["axes", "stacked"],
)
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Statistics of the activations of one site; a leading axis for each scan over layers.

    Attributes:
        low: where the range begins, by the observer of `ranges`.
        high: where it ends.
        moments: `Moments` of each feature, or None.
        histogram: `Histogram`, or None.
        gram: `Gram`, or None. The features of a convolution are the input features of a
            group and the places of the kernel, in this order, with a leading axis of groups.
        axes: static. The axes of the leaf that the features meet, see `jc.sites`.
        stacked: static. How many leading axes are those of scans.
    """

    low: jax.Array
    high: jax.Array
    moments: _observers.Moments | None = None
    histogram: _histogram.Histogram | None = None
    gram: _observers.Gram | None = None
    axes: tuple[int, ...] | None = None
    stacked: int = 0


def calibrate(
    fn: Callable[..., PyTree],
    params: PyTree,
    batches: Iterable[Any],
    *,
    where: tree.Where | None = None,
    ranges: Observer | None = None,
    moments: bool = False,
    histogram: bool = False,
    gram: bool = False,
    progress: bool = False,
) -> dict[str, Statistics]:
    """Runs `fn` on batches and keeps statistics of the inputs of each site.

    Args:
        fn: any function `fn(params, *batch)`. With compressed leaves pass `jc.lift(fn)`.
        params: any pytree.
        batches: an iterable. A tuple is all further arguments of `fn`, anything else one.
        where: static. Which sites, by their names (the paths of their leaves), as for
            `jaxcompress.tree.select`; None for all.
        ranges: static. The observer of `low` and `high`; None: `observers.min_max()`.
        moments: static. Whether to keep mean and variance of each feature.
        histogram: static. Whether to keep a histogram.
        gram: static. Whether to keep the Gram matrix of the inputs, for error compensation.
        progress: static. Whether to show a progress bar (needs rich).

    Returns:
        `Statistics` by site name, see `jc.sites`. Layers of a scan are kept apart along a
        leading axis; steps of a loop over one weight (a recurrent network) are one sample.
        The branch of a `cond` that did not run adds nothing, and neither does the test of a
        `while`. Embedding lookups have no activations and are left out.

    Raises:
        ValueError: there is no batch, `fn` has no site, or `where` matches none.
        TypeError: `fn` can't be called, or `ranges` is no observer.
        ImportError: `progress` without rich.

    Cost: that of `fn` once a batch, under `jit`, compiled once for each shape of batch, and
    that of the observers. No activation outlives its batch. Sharded batches stay sharded.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["w"])
        >>> batches = [jnp.full((4, 2), 3.0), jnp.full((4, 2), -1.0)]
        >>> stats = jc.calibrate(fn, {"w": jnp.ones((2, 2))}, batches, gram=True)
        >>> stats["w"].low, stats["w"].high, stats["w"].gram.matrix[0]
        (Array(-1., dtype=float32), Array(3., dtype=float32), Array([40., 40.], dtype=float32))
    """
    require_function("calibrate", fn)
    ranges = _observers.min_max() if ranges is None else ranges
    if not isinstance(ranges, Observer):
        rule = "be an Observer, as jc.observers.min_max()"
        raise TypeError(_check.message("calibrate", "ranges", rule, _check.describe(ranges)))
    rows: dict[str, Observer] = {"ranges": ranges}
    if moments:
        rows["moments"] = _observers.mean_variance(per="channel")
    if histogram:
        rows["histogram"] = _histogram.histogram()
    observer = _SiteObserver(_observers.together(**rows), _observers.gram() if gram else None)

    @jax.jit
    def observe(params, batch):
        return _observe(_plan(fn, params, batch, where), observer)

    @jax.jit
    def add(states, params, batch):
        plan = _plan(fn, params, batch, where)
        new = _observe(plan, observer)
        return {
            site.name: _merge(observer, site.stacked, states[site.name], new[site.name])
            for site in plan.sites
        }

    states, sites = None, {}
    for batch in _shown(batches) if progress else batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        if states is None:
            sites = {site.name: site for site in _plan(fn, params, batch, where).sites}
            states = observe(params, batch)
        else:
            states = add(states, params, batch)
    if states is None:
        rule = "hold at least one batch"
        raise ValueError(_check.message("calibrate", "batches", rule, "none"))
    finish = jax.jit(
        lambda states: {
            name: _statistics(observer, sites[name], state) for name, state in states.items()
        }
    )
    # A dict comes out of jit sorted; the program's order tells more.
    finished = finish(states)
    return {name: finished[name] for name in sites}


class _SiteObserver(NamedTuple):
    rows: Observer
    patches: Observer | None

    def init(self, rows: int, groups: tuple[int, ...], patches: int) -> PyTree:
        state = {"rows": self.rows.init(rows)}
        if self.patches is not None:
            one = self.patches.init(patches)
            state["patches"] = jax.tree.map(lambda x: jnp.broadcast_to(x, groups + x.shape), one)
        return state

    def merge(self, a: PyTree, b: PyTree) -> PyTree:
        merged = {"rows": self.rows.merge(a["rows"], b["rows"])}
        if self.patches is not None:
            merged["patches"] = self.patches.merge(a["patches"], b["patches"])
        return merged


class _Plan(NamedTuple):
    """A traced function, and the sites to observe in it."""

    traced: Traced
    sites: list[Site]
    eqns: dict[Location, Any]


def _plan(fn, params, batch, where) -> _Plan:
    traced = trace(fn, (params, *batch), {}, parts=True)
    steps = {step.location: step for step in walk(traced.jaxpr, param_paths(traced))}
    sites = [
        site
        for site in sites_among(list(steps.values()))
        if site.op in PRODUCTS and not steps[site.location].testing
    ]
    sites = chosen_sites("calibrate", sites, where)
    return _Plan(traced, sites, {site.location: steps[site.location].eqn for site in sites})


def _observe(plan: _Plan, observer: _SiteObserver) -> dict[str, PyTree]:
    sites = {site.name: site for site in plan.sites}
    by_location: dict[Location, list[Site]] = {}
    for site in plan.sites:
        by_location.setdefault(site.location, []).append(site)

    def start(site: Site) -> PyTree:
        eqn = plan.eqns[site.location]
        x = eqn.invars[activations_of(site.operand)].aval
        rows, patches = jax.eval_shape(
            lambda x: (as_rows(eqn, site.operand, x), as_patches(eqn, site.operand, x)),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
        )
        return observer.init(rows.shape[-1], patches.shape[:-2], patches.shape[-1])

    def seen(site: Site, x) -> PyTree:
        eqn, state = plan.eqns[site.location], start(site)
        x = jax.lax.stop_gradient(x)
        new = {"rows": observer.rows.update(state["rows"], as_rows(eqn, site.operand, x))}
        if observer.patches is not None:
            patches, update = as_patches(eqn, site.operand, x), observer.patches.update
            for _ in patches.shape[:-2]:
                update = jax.vmap(update)
            new["patches"] = update(state["patches"], patches)
        return new

    def equation(location, eqn, values, given, run):
        records = {
            site.name: seen(site, values[activations_of(site.operand)])
            for site in by_location[location]
        }
        results, inner = run(values)
        return results, records | inner

    def identity(name, shapes):
        state = start(sites[name])
        return jax.tree.map(lambda x, s: jnp.broadcast_to(x, s.shape), state, shapes)

    def merge(name, a, b):
        alone = jax.tree.leaves(start(sites[name]))[0]
        return _merge(observer, jax.tree.leaves(a)[0].ndim - alone.ndim, a, b)

    hooks = Hooks(
        frozenset(by_location),
        equation,
        stacks=lambda name, location: location in sites[name].stack,
        identity=identity,
        merge=merge,
    )
    return interpret(plan.traced, plan.traced.leaves, hooks)[1]


def _merge(observer: _SiteObserver, stacked: int, a: PyTree, b: PyTree) -> PyTree:
    merge = observer.merge
    for _ in range(stacked):
        merge = jax.vmap(merge)
    return merge(a, b)


def _statistics(observer: _SiteObserver, site: Site, state: PyTree) -> Statistics:
    rows, finalize = state["rows"], observer.rows.finalize
    for _ in range(site.stacked):
        finalize = jax.vmap(finalize)
    found = finalize(rows)
    span = found.pop("ranges")
    gram = None if observer.patches is None else observer.patches.finalize(state["patches"])
    return Statistics(span.low, span.high, **found, gram=gram, axes=site.axes, stacked=site.stacked)


def _shown(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        progress = importlib.import_module("rich.progress")
    except ImportError as error:
        raise ImportError(
            _check.message(
                "calibrate",
                "progress",
                "be False without rich",
                "True",
                'Run pip install "jaxcompress[report]".',
            )
        ) from error
    return progress.track(batches, description="calibrate")


def chosen_sites(function: str, sites: list[Site], where: tree.Where | None) -> list[Site]:
    """The sites whose name `where` chooses."""
    if not sites:
        raise ValueError(
            _check.message(
                function,
                "fn",
                "multiply activations with at least one leaf of its first argument",
                "none",
                "Pass the params as the first argument. Of decoded codes there is none: put jc.lift"
                " outside, as jc.lift(jc.quantize_activations(fn)), and calibrate dense params.",
            )
        )
    if where is None:
        return sites
    names = {site.name: jax.ShapeDtypeStruct((), jnp.float32) for site in sites}
    chosen = tree.select(names, where, function=function)
    return [site for site in sites if chosen[site.name]]

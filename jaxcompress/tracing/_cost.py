"""What a function costs: operations, bytes, and the time they take at least."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jec
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._flops import flops, is_fused, moved_bytes
from jaxcompress.tracing._jaxprs import Location, bodies, constant, is_array, trace
from jaxcompress.tracing._lift import lift
from jaxcompress.tracing._sites import OPS, require_function
from jaxcompress.tracing._walk import Step, walk


class LeafCost(NamedTuple):
    """What the sites of one parameter leaf cost together, decoding it included.

    Attributes:
        path: of the leaf.
        ops: the operations that consume it: of `dot_general`, `conv_general_dilated`,
            `gather`, `ragged_dot_general`.
        flops: of these, in all trips, and of decoding a compressed leaf for them.
        bytes: that these read and write, in all trips.
        param_bytes: of the leaf as it is stored.
        dense_param_bytes: of the leaf made dense.
        seconds: at least, by the rates given; None without rates.
    """

    path: str
    ops: tuple[str, ...]
    flops: int
    bytes: int
    param_bytes: int
    dense_param_bytes: int
    seconds: Any


class Cost(NamedTuple):
    """What a function costs.

    Attributes:
        rows: a `LeafCost` for each leaf that has a site.
        flops: floating-point operations of the whole function, transcendental ones left out.
        bytes: read and written by it, as if elementwise operations, casts and reshapes were
            fused into others and nothing stayed in a cache.
        param_bytes: of all parameters as they are stored.
        dense_param_bytes: of all parameters made dense.
        seconds: the roofline estimate; None without rates. A Python float, or a float32
            scalar where a rate is a JAX array.
        bounded: False where a loop's trips depend on values: it is counted once.
    """

    rows: list[LeafCost]
    flops: int
    bytes: int
    param_bytes: int
    dense_param_bytes: int
    seconds: Any
    bounded: bool


def cost(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    flops_per_second: ArrayLike | None = None,
    bytes_per_second: ArrayLike | None = None,
    **kwargs: Any,
) -> Cost:
    r"""Operations and bytes of `fn(params, *args)`, per parameter leaf and in total.

    .. math:: t = \sum_e \max\left(\frac{\mathrm{flops}_e}{F}, \frac{\mathrm{bytes}_e}{B}\right)

    over all equations :math:`e`, each as often as it runs: the roofline model. Inside of a
    `shard_map` the work of one device counts.

    Args:
        fn: any function. It is traced, not run.
        params: any pytree; with compressed leaves the cost is that of `jc.lift(fn)`.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        flops_per_second: :math:`F`, a positive scalar. May be traced.
        bytes_per_second: :math:`B`, a positive scalar. May be traced.
        **kwargs: further arguments of `fn`.

    Returns:
        A `Cost`. Of a `cond` the branch with the most operations counts. An operation that
        consumes two leaves is in the rows of both, and once in the totals.

    Raises:
        TypeError: `fn` can't be called, or a rate is no number; what `jc.lift` refuses.
        ValueError: only one of the rates is given, or one is not positive.

    Cost: one trace of `fn`, two with compressed leaves. Nothing is compiled.

    Examples:
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
        >>> params = {"w1": jnp.ones((64, 64)), "w2": jnp.ones((64, 8))}
        >>> dense = jc.cost(mlp, params, jnp.ones((16, 64)))
        >>> dense.flops, dense.rows[0].flops
        (148480, 131072)
        >>> small = jc.cost(mlp, jc.pack(jc.low_rank(4), params), jnp.ones((16, 64)))
        >>> small.rows[0].flops, small.rows[0].param_bytes, small.rows[0].dense_param_bytes
        (16384, 2048, 16384)

    Source: Williams, Waterman, Patterson 2009, "Roofline", CACM 52(4).
    """
    require_function("cost", fn)
    rates = _rates(flops_per_second, bytes_per_second)
    leaves = [(path, x) for path, x in tree.leaves_with_paths(params) if is_array(x)]
    if any(arrays.is_compressed(leaf) for _, leaf in leaves):
        fn = lift(fn)
    traced = trace(fn, (params, *args), kwargs, parts=True)
    # For each invar the leaf that it is (dense), and the one that it is a part of.
    dense: list[str | None] = []
    whole: list[str | None] = []
    for path, leaf in leaves:
        if arrays.is_compressed(leaf):
            count = len([part for part in jax.tree.leaves(leaf) if is_array(part)])
            dense, whole = dense + [None] * count, whole + [path] * count
        else:
            dense, whole = [*dense, path], [*whole, None]
    extra = [None] * (len(traced.paths) - len(dense))
    parts, decoding = _parts_used(traced.jaxpr, whole + extra)
    steps = [step for step in walk(traced.jaxpr, dense + extra) if not bodies(step.eqn)]
    bounded = all(step.trips is not None for step in steps)
    steps = _costliest(steps)
    used: dict[str, list[Step]] = {path: [] for path, _ in leaves}
    for step in steps:
        origins = [step.origins[i] for i in OPS.get(step.eqn.primitive.name, ())]
        paths = {path for origin in origins if origin for path in origin.paths}
        paths |= parts[step.location]
        for path in paths:
            used[path].append(step)
    return Cost(
        [row for path, leaf in leaves for row in _row(path, leaf, used[path], decoding, rates)],
        sum(map(_flops, steps)),
        sum(map(_bytes, steps)),
        sum(tree.nbytes(leaf) for _, leaf in leaves),
        sum(_dense_bytes(leaf) for _, leaf in leaves),
        _seconds(steps, rates),
        bounded,
    )


def _row(
    path: str, leaf: Any, used: Sequence[Step], decoding: set[Location], rates: Any
) -> Iterable[LeafCost]:
    """The row of a leaf, if it has a site."""
    sites = [step for step in used if step.eqn.primitive.name in OPS]
    # A gather that only decodes is no site, unless nothing else consumes the leaf.
    sites = [step for step in sites if step.location not in decoding] or sites
    if sites:
        yield LeafCost(
            path,
            tuple(dict.fromkeys(step.eqn.primitive.name for step in sites)),
            sum(map(_flops, used)),
            sum(map(_bytes, used)),
            tree.nbytes(leaf),
            _dense_bytes(leaf),
            _seconds(used, rates),
        )


def _trips(step: Step) -> int:
    return 1 if step.trips is None else step.trips


def _flops(step: Step) -> int:
    return _trips(step) * flops(step.eqn)


def _bytes(step: Step) -> int:
    return 0 if is_fused(step.eqn) else _trips(step) * moved_bytes(step.eqn)


_CONSTANT = object()
"""What depends on no argument belongs to any leaf that it meets."""


def _parts_used(
    jaxpr: Any, owners: Sequence[str | None]
) -> tuple[dict[Location, set[str]], set[Location]]:
    """For each equation the compressed leaves that it decodes or consumes; which only decode.

    Args:
        jaxpr: open.
        owners: for each invar the compressed leaf that it is a part of, or None.
    """
    found: dict[Location, set[str]] = {}
    decoding: set[Location] = set()
    _follow(jaxpr, owners, (), found, decoding)
    return found, decoding


def _follow(
    jaxpr: Any, owners: Sequence[Any], here: Location, found: dict, decoding: set
) -> list[Any]:
    """For each outvar the leaf that alone it depends on, or None. Fills `found`, `decoding`."""
    known = dict(zip(jaxpr.invars, owners, strict=True))

    def owner(v):
        return _CONSTANT if isinstance(v, jec.Literal) else known.get(v)

    for i, eqn in enumerate(jaxpr.eqns):
        given = [owner(v) for v in eqn.invars]
        name, at, inside = eqn.primitive.name, (*here, i), bodies(eqn)
        results: list[Any] = [None] * len(eqn.outvars)
        sole = _sole(given)
        if inside:
            results = [_CONSTANT] * len(eqn.outvars)
            for k, body in enumerate(inside):
                entering = [
                    given[j] if constant(body, n) or n in body.sliced else None
                    for n, j in enumerate(body.inputs)
                ]
                leaving = _follow(body.jaxpr, entering, (*at, k), found, decoding)
                for result, j in zip(leaving, body.outputs, strict=True):
                    if j is not None:
                        results[j] = _sole([results[j], result])
        else:
            of = {given[j] for j in OPS[name]} if name in OPS else {sole}
            found[at] = of - {None, _CONSTANT}
            if sole in found[at]:
                decoding.add(at)
            # A product with a constant is one with activations that the function made.
            if name not in OPS or name == "gather" or _CONSTANT not in given:
                results = [sole] * len(eqn.outvars)
        known.update(zip(eqn.outvars, results, strict=True))
    return [owner(v) for v in jaxpr.outvars]


def _sole(owners: Sequence[Any]) -> Any:
    """The one leaf among the owners, beside constants; None if there are others."""
    kinds = set(owners) - {_CONSTANT}
    return _CONSTANT if not kinds else kinds.pop() if len(kinds) == 1 else None


def _dense_bytes(leaf: Any) -> int:
    if not arrays.is_compressed(leaf):
        return tree.nbytes(leaf)
    return tree.nbytes(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _costliest(steps: Sequence[Step]) -> list[Step]:
    """The steps without those of branches that another branch outweighs; inner conds first."""
    steps = list(steps)
    conds = {at for step in steps for at, _ in step.branches}
    for at in sorted(conds, key=len, reverse=True):
        totals: dict[int, tuple[int, int]] = {}
        for step in steps:
            k = dict(step.branches).get(at)
            if k is not None:
                operations, moved = totals.get(k, (0, 0))
                totals[k] = (operations + _flops(step), moved + _bytes(step))
        chosen = max(totals, key=lambda k: totals[k])
        steps = [step for step in steps if dict(step.branches).get(at, chosen) == chosen]
    return steps


def _rates(flops_per_second: Any, bytes_per_second: Any) -> tuple[Any, Any] | None:
    given = {"flops_per_second": flops_per_second, "bytes_per_second": bytes_per_second}
    if all(rate is None for rate in given.values()):
        return None
    for name, rate in given.items():
        if rate is None:
            raise ValueError(_check.message("cost", name, "be given with the other rate", "None"))
        if callable(rate):
            raise TypeError(_check.message("cost", name, "be a number", _check.describe(rate)))
        _check.number("cost", name, rate, 0)
        if not _check.is_traced(rate) and float(rate) == 0:
            raise ValueError(_check.message("cost", name, "be positive", 0))
    return _rate(flops_per_second), _rate(bytes_per_second)


def _rate(rate: Any) -> Any:
    return rate.astype(jnp.float32) if isinstance(rate, jax.Array) else float(rate)


def _seconds(steps: Iterable[Step], rates: tuple[Any, Any] | None) -> Any:
    if rates is None:
        return None
    larger = jnp.maximum if any(isinstance(rate, jax.Array) for rate in rates) else max
    # Floats: the counts may be larger than JAX's integers.
    pairs = [(float(_flops(step)), float(_bytes(step))) for step in steps]
    return sum((larger(f / rates[0], b / rates[1]) for f, b in pairs if f or b), start=0.0)

"""What a function costs: operations, bytes, and the time they take at least."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.tracing._flops import flops, is_fused, moved_bytes
from jaxcompress.tracing._jaxprs import bodies, trace
from jaxcompress.tracing._lift import lift
from jaxcompress.tracing._sites import Site, is_extra, param_paths, require_function, sites_among
from jaxcompress.tracing._walk import Step, walk


class LeafCost(NamedTuple):
    """What the sites of one parameter leaf cost together.

    Attributes:
        path: of the leaf.
        ops: the operations that consume it.
        flops: of these, in all trips.
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
        flops: floating-point operations of the whole function.
        bytes: read and written by it, as if elementwise operations, casts and reshapes were
            fused into others and nothing stayed in a cache.
        param_bytes: of all parameters as they are stored.
        dense_param_bytes: of all parameters made dense.
        seconds: the roofline estimate; None without rates.
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

    over all equations :math:`e`, each as often as it runs: the roofline model.

    Args:
        fn: any function. It is traced, not run.
        params: any pytree; with compressed leaves the cost is that of `jc.lift(fn)`.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        flops_per_second: :math:`F`. May be traced.
        bytes_per_second: :math:`B`. May be traced.
        **kwargs: further arguments of `fn`.

    Returns:
        A `Cost`. Of a `cond` the branch with the most operations counts.

    Raises:
        TypeError: `fn` can't be called.
        ValueError: only one of the rates is given, or one is not positive.

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
    leaves = tree.leaves_with_paths(params)
    if any(arrays.is_compressed(leaf) for _, leaf in leaves):
        fn = lift(fn)
    traced = trace(fn, (params, *args), kwargs, parts=True)
    steps = [step for step in walk(traced.jaxpr, param_paths(traced)) if not bodies(step.eqn)]
    steps = _costliest(steps)
    at = {step.location: step for step in steps}
    found: dict[str, list[Site]] = {}
    for site in sites_among(steps):
        found.setdefault(_leaf_of(site.path, leaves), []).append(site)
    rows = []
    for path, leaf in leaves:
        of_leaf = found.get(path)
        if of_leaf:
            used = {site.location: at[site.location] for site in of_leaf}.values()
            rows.append(
                LeafCost(
                    path,
                    tuple(dict.fromkeys(site.op for site in of_leaf)),
                    sum(map(_flops, used)),
                    sum(map(_bytes, used)),
                    tree.nbytes(leaf),
                    _dense_bytes(leaf),
                    _seconds(used, rates),
                )
            )
    moving = [step for step in steps if not is_fused(step.eqn)]
    params_only = [leaf for path, leaf in leaves if hasattr(leaf, "dtype") and not is_extra(path)]
    return Cost(
        rows,
        sum(map(_flops, steps)),
        sum(map(_bytes, moving)),
        sum(map(tree.nbytes, params_only)),
        sum(map(_dense_bytes, params_only)),
        _seconds(steps, rates),
        all(step.trips is not None for step in steps),
    )


def _trips(step: Step) -> int:
    return 1 if step.trips is None else step.trips


def _flops(step: Step) -> int:
    return _trips(step) * flops(step.eqn)


def _bytes(step: Step) -> int:
    return _trips(step) * moved_bytes(step.eqn)


def _leaf_of(path: str, leaves: Sequence[tuple[str, Any]]) -> str:
    """The leaf that a path is of, or of a part of which it is."""
    whole = [leaf for leaf, x in leaves if path == leaf or path.startswith(f"{leaf}/")]
    return max(whole, key=len)


def _dense_bytes(leaf: Any) -> int:
    return tree.nbytes(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def _costliest(steps: Sequence[Step]) -> list[Step]:
    """The steps without those of branches that another branch outweighs; inner conds first."""
    steps = list(steps)
    conds = {at for step in steps for at, _ in step.branches}
    for at in sorted(conds, key=len, reverse=True):
        totals: dict[int, int] = {}
        for step in steps:
            k = dict(step.branches).get(at)
            if k is not None:
                totals[k] = totals.get(k, 0) + _flops(step)
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
        _check.number("cost", name, rate, 0)
        if not _check.is_traced(rate) and float(rate) == 0:
            raise ValueError(_check.message("cost", name, "be positive", 0))
    return flops_per_second, bytes_per_second


def _seconds(steps: Any, rates: tuple[Any, Any] | None) -> Any:
    if rates is None:
        return None
    total = 0.0
    for step in steps:
        operations, moved = _flops(step), 0 if is_fused(step.eqn) else _bytes(step)
        if operations or moved:
            pair = (operations / rates[0], moved / rates[1])
            traced = any(_check.is_traced(t) or hasattr(t, "dtype") for t in pair)
            total = total + (jnp.maximum(*pair) if traced else max(pair))
    return total

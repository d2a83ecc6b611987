"""Combinators over time and strength: every, scheduled, relaxed."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections._base import Projection, kept_by, observed, rows_of
from jaxcompress.projections._combine import _require_projection
from jaxcompress.projections._due import found_when
from jaxcompress.projections._numbers import number_at


class Timed(NamedTuple):
    """Structure of `every`: whether it is in force yet, and the structure held."""

    active: jax.Array
    inner: PyTree


class Scheduled(NamedTuple):
    """Structure of `scheduled`: the numbers in force, by name, and the structure they gave."""

    hyperparams: dict[str, jax.Array]
    inner: PyTree


class Relaxed(NamedTuple):
    """Structure of `relaxed`: the strength in force, and the structure projected on."""

    strength: jax.Array
    inner: PyTree


def every(
    steps: Numeric, projection: Projection, begin: Numeric = 0, end: Numeric | None = None
) -> Projection:
    """Finds the structure anew at `begin`, `begin + steps`, … up to `end`, and holds it between.

    Before `begin` the params are left as they are. After `end` the structure is frozen.
    Between two finds only `project` runs: nothing is ranked, fitted or decomposed. The clock
    is the adapter's count of applied updates, so schedules inside keep true time.

    Args:
        steps: number of updates from one find to the next, at least 1. May be traced.
        projection: what to find. Projections inside of it may have clocks of their own.
        begin: first step at which it is in force. May be traced.
        end: last step at which it may be found anew; None for no end. May be traced.

    Returns:
        The projection whose structure is `Timed(active, inner)`.

    Raises:
        ValueError: `steps` is a number below 1.

    Cost: one `jax.lax.cond`, also under `vmap`, where the find runs for all as soon as one is
    due; `jc.batch_axes` keeps one clock for all. No gradient flows through a find.

    Examples:
        >>> p = jc.every(10, jc.prune(0.5), begin=20)
        >>> params = {"w": jnp.array([[1.0, 2.0]])}
        >>> jc.compress(p, params, step=19)["w"], jc.compress(p, params, step=20)["w"]
        (Array([[1., 2.]], dtype=float32), Array([[0., 2.]], dtype=float32))
    """
    _require_projection("every", projection)
    _check.numeric("every", "steps", steps, 1)
    _check.numeric("every", "begin", begin)
    if end is not None:
        _check.numeric("every", "end", end)

    def number(value: Numeric, step) -> jax.Array:
        return jnp.asarray(number_at(value, step), jnp.int32)

    def started(step) -> jax.Array:
        first = number(begin, step)
        in_time = jnp.asarray(True) if end is None else first <= number(end, step)
        return (step >= first) & in_time

    def due(step) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        period = jnp.maximum(number(steps, step), 1)
        now = started(step) & ((step - number(begin, step)) % period == 0)
        return now if end is None else now & (step <= number(end, step))

    def find(params, *, previous=None, grads=None, step=0):
        step = jnp.asarray(step, jnp.int32)
        if previous is None:
            return Timed(started(step), projection.find(params, grads=grads, step=step))
        now = due(step)
        inner = found_when(
            now,
            lambda: projection.find(params, previous=previous.inner, grads=grads, step=step),
            previous.inner,
        )
        return Timed(previous.active | now, inner)

    again = lambda everywhere: every(steps, everywhere, begin, end)  # noqa: E731
    return timed(projection, find, again)._replace(due=due)


def timed(
    projection: Projection,
    find: Callable[..., Timed],
    again: Callable[[Projection], Projection],
) -> Projection:
    """`projection` where the `Timed` that `find` returns is active, and nothing elsewhere.

    Args:
        projection: the one inside.
        find: as in `Projection`.
        again: the same combinator, for the projection on every leaf.
    """

    def project(params, structure):
        projected = projection.project(params, structure.inner)
        return _blend(lambda new, old: jnp.where(structure.active, new, old), projected, params)

    def pack(params, structure):
        return projection.pack(params, structure.inner) if bool(structure.active) else params

    def kept(params, structure):
        inner = kept_by(projection, params, structure.inner)
        return jax.tree.map(lambda k: k if k is True else k | ~structure.active, inner)

    everywhere = None if projection.everywhere is None else again(projection.everywhere)
    return _with_inner(Projection(find, project, pack, kept, everywhere), projection)


def relaxed(projection: Projection, strength: Numeric) -> Projection:
    r"""Moves the params only a part of the way: from the identity to the hard projection.

    .. math:: w \mapsto w + \lambda\,(P(w) - w), \quad \lambda \in [0, 1]

    With a schedule from 0 to 1 this is BinaryRelax, whose relaxation
    :math:`(w + \mu P(w)) / (1 + \mu)` has :math:`\lambda = \mu / (1 + \mu)`.

    Args:
        projection: the hard one.
        strength: :math:`\lambda`; 0 changes nothing, 1 is exactly `projection`. A number, a
            JAX scalar or an Optax schedule; may be traced.

    Returns:
        The projection whose structure is `Relaxed(strength, inner)`. Entries count as dropped
        only at strength 1. It is idempotent at strength 0 and 1 alone.

    Raises:
        ValueError: `strength` is a number outside of [0, 1]; or `pack` at a strength below 1.

    Examples:
        >>> half = jc.relaxed(jc.prune(0.5), 0.5)
        >>> jc.compress(half, {"w": jnp.array([[1.0, 4.0]])})["w"]
        Array([[0.5, 4. ]], dtype=float32)

    Source: Yin et al. 2018, arXiv:1801.06313, equation 7. Differs: for any projection, and
    the strength reaches the hard one.
    """
    _require_projection("relaxed", projection)
    _check.numeric("relaxed", "strength", strength, 0, 1)

    def find(params, *, previous=None, grads=None, step=0):
        held = None if previous is None else previous.inner
        inner = projection.find(params, previous=held, grads=grads, step=step)
        return Relaxed(number_at(strength, step).astype(jnp.float32), inner)

    def project(params, structure):
        s = structure.strength

        def leaf(new, old):
            mixed = old.astype(jnp.float32) + s * (
                new.astype(jnp.float32) - old.astype(jnp.float32)
            )
            return jnp.where(s >= 1, new, mixed.astype(old.dtype))

        return _blend(leaf, projection.project(params, structure.inner), params)

    def pack(params, structure):
        require_hard(structure)
        return projection.pack(params, structure.inner)

    def kept(params, structure):
        inner = kept_by(projection, params, structure.inner)
        return jax.tree.map(lambda k: k if k is True else k | (structure.strength < 1), inner)

    everywhere = None
    if projection.everywhere is not None:
        everywhere = relaxed(projection.everywhere, strength)
    return _with_inner(Projection(find, project, pack, kept, everywhere), projection)


def require_hard(structure: Relaxed) -> None:
    """Refuses to pack what has not reached the hard projection."""
    if float(structure.strength) < 1:
        raise ValueError(
            _check.message(
                "pack",
                "strength",
                "be 1 to pack a relaxed projection",
                float(structure.strength),
                "Train on until its schedule ends.",
            )
        )


def scheduled(factory: Callable[..., Projection]) -> Callable[..., Projection]:
    """Lets the numbers of a factory be Optax schedules, and keeps their values in the state.

    As `optax.inject_hyperparams`: `jc.structure(opt_state).hyperparams` shows the numbers in
    force, to log them, and a constant one may be replaced there between two steps.

    Args:
        factory: `jc.prune`, `jc.quantize`, `jc.low_rank`, `jc.cluster`, `jc.relaxed` or any
            function that returns a `Projection`. Its positional arguments that are numbers or
            schedules are recorded; its keyword-only arguments are static and are passed on.

    Returns:
        A function with the arguments of `factory`. The projection that it returns has the
        structure `Scheduled(hyperparams, inner)`.

    Raises:
        TypeError: `factory` can't be called.

    Examples:
        >>> p = jc.scheduled(jc.prune)(sparsity=jc.schedules.cubic(0.0, 0.9, 0, 100))
        >>> p.find({"w": jnp.ones((2, 2))}, step=100).hyperparams
        {'sparsity': Array(0.9, dtype=float32)}
    """
    if not callable(factory):
        raise TypeError(
            _check.message(
                "scheduled", "factory", "be a function such as jc.prune", _check.describe(factory)
            )
        )
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args, **kwargs) -> Projection:
        given = signature.bind(*args, **kwargs).arguments
        numbers, static = {}, {}
        for name, value in given.items():
            keyword_only = signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            numeric = (
                callable(value)
                or (isinstance(value, (int, float)) and not isinstance(value, bool))
                or (hasattr(value, "dtype") and hasattr(value, "shape"))
            )
            (numbers if numeric and not keyword_only else static)[name] = value
        return _scheduled(factory, numbers, static, everywhere=False)

    return make


def _scheduled(factory, numbers: dict[str, Numeric], static: dict[str, Any], everywhere: bool):
    def at(values) -> Projection:
        projection = factory(**values, **static)
        return (projection.everywhere or projection) if everywhere else projection

    def find(params, *, previous=None, grads=None, step=0):
        values = {}
        for name, value in numbers.items():
            if previous is None or callable(value):
                values[name] = number_at(value, step)
            else:
                values[name] = previous.hyperparams[name]
        held = None if previous is None else previous.inner
        return Scheduled(values, at(values).find(params, previous=held, grads=grads, step=step))

    def project(params, structure):
        return at(structure.hyperparams).project(params, structure.inner)

    def pack(params, structure):
        return at(structure.hyperparams).pack(params, structure.inner)

    def kept(params, structure):
        return kept_by(at(structure.hyperparams), params, structure.inner)

    def observe(params, structure, *, grads=None, step=0):
        inner = observed(at(structure.hyperparams), params, structure.inner, grads, step)
        return structure._replace(inner=inner)

    def rows(params, *, step=0):
        values = {name: number_at(value, step) for name, value in numbers.items()}
        return Scheduled(values, rows_of(at(values), params, step))

    other = None if everywhere else _scheduled(factory, numbers, static, everywhere=True)
    member = at({name: number_at(value, 0) for name, value in numbers.items()})
    return Projection(find, project, pack, kept, other)._replace(
        observe=None if member.observe is None else observe,
        from_zero=member.from_zero,
        rows=None if member.rows is None else rows,
    )


def _with_inner(outer: Projection, projection: Projection) -> Projection:
    """`outer`, whose structure holds `inner`, gathers what `projection` does."""

    def observe(params, structure, *, grads=None, step=0):
        inner = observed(projection, params, structure.inner, grads, step)
        return structure._replace(inner=inner)

    return outer._replace(
        observe=None if projection.observe is None else observe, from_zero=projection.from_zero
    )


def _blend(f, projected: PyTree, params: PyTree) -> PyTree:
    """`f(new, old)` where the projection changed the leaf, the leaf itself where it did not."""
    return jax.tree.map(lambda new, old: old if new is old else f(new, old), projected, params)

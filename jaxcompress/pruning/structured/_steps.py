"""Removing in steps, with training in between."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Dependencies, Keep
from jaxcompress.pruning.structured._budget import Shrink, UnitBudget
from jaxcompress.pruning.structured._places import kept_positions
from jaxcompress.pruning.structured._restrict import composed, remaining
from jaxcompress.pruning.structured._select import Amount, select

Spacing = Literal["linear", "geometric", "cubic"]


class Shrunk(NamedTuple):
    """What is left after all steps.

    Attributes:
        params: the small params, trained.
        fn: the function of them.
        keep: what stays of the original, for `jc.shrink_like` and reports.
    """

    params: PyTree
    fn: Callable[..., PyTree]
    keep: Keep


def steps(keep: float, number: int, *, spacing: Spacing = "linear") -> tuple[float, ...]:
    r"""The fractions that stay after each of several steps; the last is `keep`.

    .. math:: k_i = 1 - (1 - k)\,\tfrac{i}{n}, \qquad k_i = k^{i/n}, \qquad
        k_i = 1 - (1 - k)\left(1 - (1 - \tfrac{i}{n})^3\right)

    Args:
        keep: static. :math:`k`, the fraction that stays in the end, in [0, 1].
        number: static. :math:`n`, of the steps.
        spacing: static. `"linear"`: as much goes in each step; `"geometric"`: the same fraction
            of what is left; `"cubic"`: most at first.

    Returns:
        `number` fractions of the original, falling.

    Raises:
        ValueError: a number is out of range, or `spacing` is another.

    Examples:
        >>> jc.pruning.steps(0.5, 2)
        (0.75, 0.5)
        >>> jc.pruning.steps(0.25, 2, spacing="geometric")
        (0.5, 0.25)

    Source: linear as in Torch-Pruning; cubic from Zhu & Gupta 2017, arXiv:1710.01878, equation 1.
    """
    _check.number("steps", "keep", keep, 0, 1)
    _check.integer("steps", "number", number, 1)
    shares = {
        "linear": lambda t: 1 - (1 - keep) * t,
        "geometric": lambda t: keep**t,
        "cubic": lambda t: 1 - (1 - keep) * (1 - (1 - t) ** 3),
    }
    if spacing not in shares:
        rule = f"be one of {', '.join(map(repr, shares))}"
        raise ValueError(_check.message("steps", "spacing", rule, repr(spacing)))
    before = tuple(float(shares[spacing](i / number)) for i in range(1, number))
    return (*before, float(keep))


def shrink_in_steps(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    keep: Amount,
    train: Callable[[Callable[..., PyTree], PyTree], PyTree],
    number: int = 5,
    spacing: Spacing = "linear",
    scores: Callable[[Dependencies, Callable[..., PyTree], PyTree], Mapping[str, Any]]
    | None = None,
    dependencies: Dependencies | None = None,
    shrink: Shrink | None = None,
    **options: Any,
) -> Shrunk:
    """Scores, selects, shrinks and trains, several times; the total is of the original sizes.

    Args:
        fn: any function `fn(params, *args)`.
        params: its params.
        *args: further arguments of one call, as for `jc.dependencies`.
        keep: static. What stays in the end: as in `jc.select`. The steps towards a budget are
            steps in what it measures.
        train: `(small_fn, small_params) -> small_params`, called after each step. Make the
            optimizer inside: its state has other shapes each time.
        number: static. Of the steps.
        spacing: static. As in `jc.pruning.steps`.
        scores: `(dependencies, small_fn, small_params) -> scores by group`, for scores that need
            data, as `jc.pruning.unit_taylor`; None: those of the `options`.
        dependencies: static. Of `fn`; None: `jc.dependencies(fn, params, *args)`.
        shrink: static. None: `jc.shrink`.
        **options: static. Of `jc.select`: `score`, `norm`, `leaves`, `scope`, `normalize`,
            `multiple_of`, `floor`, `where`, `exclude`, `overlap`.

    Returns:
        `Shrunk(params, fn, keep)`. The function is made of the original one in one piece.

    Raises:
        TypeError: `train` can't be called, or returns a tree of other shapes.
        ValueError: what `jc.select` and `steps` refuse.

    Cost: in each step that of the scores, two traces of `fn`, and the training.

    Examples:
        >>> apply = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
        >>> params = {"a": jnp.ones((2, 8)), "b": jnp.ones((8, 1))}
        >>> small = jc.pruning.shrink_in_steps(
        ...     apply, params, jnp.ones((1, 2)), keep=0.5, number=2, train=lambda fn, params: params
        ... )
        >>> small.params["a"].shape, small.fn(small.params, jnp.ones((1, 2)))
        ((2, 4), Array([[8.]], dtype=float32))
    """
    if not callable(train):
        rule, got = "be a function of the function and its params", _check.describe(train)
        raise TypeError(_check.message("shrink_in_steps", "train", rule, got))
    if dependencies is None:
        from jaxcompress.pruning.structured._dependencies import dependencies as found

        dependencies = found(fn, params, *args)
    if shrink is None:
        from jaxcompress.pruning.structured._shrink import shrink
    shapes = jax.tree.map(_abstract, params)
    total, small, small_fn = Keep(dependencies, {}), params, fn
    for amount in _amounts(keep, number, spacing, dependencies):
        left = remaining(total)
        found = {} if scores is None else {"scores": scores(left, small_fn, small)}
        chosen = select(
            left, small, keep=_after(amount, total), of=dependencies, **{**options, **found}
        )
        if kept_positions(chosen):
            small, _ = shrink(small_fn, small, chosen, *args)
        total = composed(total, chosen)
        # Of the original: functions of functions of functions would trace ever more slowly.
        if kept_positions(total):
            _, small_fn = shrink(fn, shapes, total, *args)
        small = _checked(train(small_fn, small), small)
    return Shrunk(small, small_fn, total)


def _amounts(keep: Any, number: int, spacing: Spacing, dependencies: Dependencies) -> list[Any]:
    """What stays after each step: fractions, mappings or budgets of whole amounts."""
    if isinstance(keep, UnitBudget):
        whole = float(keep.measure(Keep(dependencies, {})))
        share = keep.limit if isinstance(keep.limit, float) else min(keep.limit / whole, 1.0)
        shares = steps(share, number, spacing=spacing)
        limits = [*(int(s * whole) for s in shares[:-1]), keep.limit]
        if isinstance(keep.limit, float):
            # As `select` rounds it.
            limits[-1] = int(keep.limit * whole * (1 + 2.0**-40))
        return [keep._replace(limit=max(limit, 1)) for limit in limits]
    if isinstance(keep, Mapping):
        each = {key: steps(one, number, spacing=spacing) for key, one in keep.items()}
        return [{key: one[i] for key, one in each.items()} for i in range(number)]
    return list(steps(keep, number, spacing=spacing))


def _after(amount: Any, total: Keep) -> Any:
    """A budget of the original, measured on a `Keep` of what is left."""
    if not isinstance(amount, UnitBudget):
        return amount
    return amount._replace(measure=lambda keep: amount.measure(composed(total, keep)))


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x


def _checked(trained: PyTree, before: PyTree) -> PyTree:
    same = jax.tree.structure(trained) == jax.tree.structure(before)
    pairs = zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True) if same else ()
    if not same or any(np.shape(a) != np.shape(b) for a, b in pairs):
        rule = "return params of the structure and shapes that it got"
        got = f"{jax.tree.map(np.shape, trained)}"
        raise TypeError(_check.message("shrink_in_steps", "train", rule, got))
    return trained

"""Gradients of several losses become one: the interface, its link in a chain, their sum."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcompress import _check
from jaxcompress._dtypes import wide_dtype
from jaxcompress._types import Numeric, PyTree
from jaxcompress.projections import is_masked_node, number_at
from jaxcompress.tree import path_string


class Combination(NamedTuple):
    """A way to make one gradient of several: written as an Optax transformation is.

    `jc.distill(..., combine=...)` and `combine_gradients` take one. Both functions are pure, so
    it can be used without either; `of_floating` makes one of functions that need not care about
    missing leaves and narrow dtypes.

    Attributes:
        init: `(params, count) -> state`, arrays whose types never change, for `count` gradients.
        update: `(gradients, state, params=None, *, step=0) -> (gradient, state)`. `gradients`
            is a sequence of trees of one structure, that of the task first. The result has its
            dtypes; where it is None or not floating point, it passes through unchanged, and
            where only another one is, that one counts as zero. Schedules are read at `step`.

    Examples:
        >>> against, along = {"w": jnp.array([-1.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}
        >>> gradient, _ = jc.distillation.pcgrad().update((along, against), ())
        >>> gradient["w"]
        Array([0.5, 1.5], dtype=float32)
    """

    init: Callable[[PyTree, int], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class CombineState(NamedTuple):
    """State of `combine_gradients`: updates made so far, and the state of the combination."""

    step: jax.Array
    combination: PyTree


def combine_gradients(
    combination: Combination, *, count: int = 2
) -> optax.GradientTransformationExtraArgs:
    """A link of a chain that combines the updates with the gradients of other losses.

    It comes FIRST in a chain, before clipping and the optimizer. `jc.distill` does the same
    with the gradient of a teacher's loss, which it takes itself.

    Args:
        combination: `pcgrad()`, `norm_balanced()`, `cosine_gated()`, `dot()`, `separate(...)`,
            `weighted_sum(...)` or your own.
        count: static. How many gradients, the incoming updates included.

    Returns:
        A transformation with the state `CombineState(step, combination)`. Call
        `opt.update(grads, state, params, other_grads=[...])` with a list or tuple of `count - 1`
        gradient trees, as `value_and_multi_grad` gives them. The updates keep their dtypes;
        without `params` they must have the structure and dtypes of the params that `init` saw.

    Raises:
        TypeError: an argument of the wrong kind, or `update` was called without `other_grads`.
        ValueError: `other_grads` are more or fewer than `count - 1`, or differ in structure.

    Cost: that of the combination.

    `optax.chain(combine_gradients(...), optax.MultiSteps(opt, n).gradient_transformation())`
    combines the gradients of every mini-batch, then averages. Inside of a MultiSteps it meets
    the average of the task's gradients but only the last mini-batch's `other_grads`.

    Examples:
        >>> opt = optax.chain(
        ...     jc.distillation.combine_gradients(jc.distillation.pcgrad()), optax.sgd(1.0)
        ... )
        >>> w, state = jnp.zeros(2), opt.init(jnp.zeros(2))
        >>> first, second = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
        >>> opt.update(first, state, w, other_grads=[second])[0]
        Array([-0.5, -1.5], dtype=float32)
    """
    require_combination("combine_gradients", "combination", combination)
    _check.integer("combine_gradients", "count", count, 1)

    def init(params):
        return CombineState(jnp.zeros((), jnp.int32), combination.init(params, count))

    def update(updates, state, params=None, *, other_grads=None, **extra):
        del extra
        fix = "Call opt.update(grads, state, params, other_grads=[...])."
        if not isinstance(other_grads, (list, tuple)):
            rule = "be given to `update` as a list or tuple of gradient trees"
            got = "nothing" if other_grads is None else type(other_grads).__name__
            raise TypeError(_check.message("combine_gradients", "other_grads", rule, got, fix))
        if len(other_grads) != count - 1:
            rule, got = f"be {count - 1} gradient trees", len(other_grads)
            fix = "Say count=, the incoming updates included."
            raise ValueError(_check.message("combine_gradients", "other_grads", rule, got, fix))
        gradients = (updates, *other_grads)
        combined, held = combination.update(gradients, state.combination, params, step=state.step)
        return combined, CombineState(jnp.asarray(optax.safe_increment(state.step)), held)

    return optax.GradientTransformationExtraArgs(init, update)


def weighted_sum(*weights: Numeric) -> Combination:
    r"""The gradient of a weighted sum of the losses.

    .. math:: g = \sum_k w_k\, g_k

    Args:
        *weights: :math:`w_k`, one for each gradient: a number, a JAX scalar (maybe traced) or
            an Optax schedule of the step.

    Returns:
        A `Combination` without state. The sum is made in float32 at least.

    Raises:
        TypeError: a weight is not a real scalar.
        ValueError: there is not one weight for each gradient.

    Cost: one elementwise pass.

    Examples:
        >>> both = jc.distillation.weighted_sum(0.1, optax.linear_schedule(0.0, 1.0, 10))
        >>> both.update((jnp.ones(2), jnp.ones(2)), (), step=10)[0]
        Array([1.1, 1.1], dtype=float32)
    """
    for weight in weights:
        _check.numeric("weighted_sum", "weights", weight)

    def init(params, count):
        del params
        require_count("weighted_sum", count, len(weights))
        return ()

    def update(gradients, state, params, step):
        del params
        require_count("weighted_sum", len(gradients), len(weights))
        scaled = [scale(number_at(w, step), g) for w, g in zip(weights, gradients, strict=True)]
        return add(scaled), state

    return of_floating("weighted_sum", init, update)


def summed() -> Combination:
    """The sum of the gradients as they are."""
    return of_floating(
        "summed", lambda *_: (), lambda gradients, state, *_: (add(gradients), state)
    )


def of_floating(
    function: str, init: Callable[[PyTree, int], PyTree], update: Callable[..., Any]
) -> Combination:
    """The combination whose `update` sees only arrays that can be computed with.

    Args:
        function: the name in its errors.
        init: as in `Combination`; it sees `optax.MaskedNode()` where a param is not floating.
        update: `(gradients, state, params, step) -> (gradient, state)`, of trees of one
            structure: float32 or wider arrays, and None or `optax.MaskedNode()` elsewhere.
            `params` are such a tree too.
    """

    def whole(gradients, state, params=None, *, step=0):
        wide, back = aligned(function, gradients, params)
        like = floating(gradients[0] if params is None else params)
        combined, state = update(wide, state, like, step)
        return back(combined), state

    return Combination(lambda params, count: init(floating(params), count), whole)


def floating(tree: PyTree) -> PyTree:
    """The tree in float32 at least, with `optax.MaskedNode()` for what is not floating point."""

    def leaf(w):
        if not is_inexact(w):
            return _hole(w)
        w = jnp.asarray(w)
        return w.astype(wide_dtype(w.dtype))

    return jax.tree.map(leaf, tree, is_leaf=_is_hole)


def aligned(
    function: str, gradients: Sequence[PyTree], params: PyTree | None = None
) -> tuple[tuple[PyTree, ...], Callable[[PyTree], PyTree]]:
    """Gradients on the leaves to be computed with, and the way back to the first one's form.

    Args:
        function: the name in its errors.
        gradients: trees of one structure, with None or anything for missing leaves.
        params: what says which leaves there are; the first gradient without them.

    Returns:
        A tree for each gradient: all have float32 or wider arrays of one dtype where `params`
        are floating point (zeros for a missing gradient), elsewhere None or
        `optax.MaskedNode()`. And a function from such a tree to one like the first gradient.
    """
    first, treedef = jax.tree.flatten(gradients[0], is_leaf=_is_hole)
    flat = [first]
    for other in (*gradients[1:], *(() if params is None else (params,))):
        leaves, structure = jax.tree.flatten(other, is_leaf=_is_hole)
        if structure != treedef:
            rule, got = f"have one structure, as the first: {treedef}", structure
            raise ValueError(_check.message(function, "gradients", rule, got))
        flat.append(leaves)
    like = first if params is None else flat.pop()
    _require_shapes(function, gradients[0], like, flat)
    columns = [_column(*each) for each in zip(like, *flat, strict=True)]
    trees = tuple(treedef.unflatten([c[k] for c in columns]) for k in range(len(flat)))

    def back(tree):
        combined = jax.tree.leaves(tree, is_leaf=_is_hole)
        return treedef.unflatten(
            [
                g if _is_hole(c) or not is_inexact(g) else c.astype(jnp.result_type(g))
                for c, g in zip(combined, first, strict=True)
            ]
        )

    return trees, back


def _require_shapes(function: str, first: PyTree, like: list[Any], flat: list[list[Any]]) -> None:
    """Refuses gradients that would be broadcast, and the params with them."""
    paths = jax.tree_util.tree_flatten_with_path(first, is_leaf=_is_hole)[0]
    for (path, _), wanted, *several in zip(paths, like, *flat, strict=True):
        for g in several:
            if is_inexact(wanted) and is_inexact(g) and jnp.shape(g) != jnp.shape(wanted):
                rule, at = f"have the shape {list(jnp.shape(wanted))}", path_string(path)
                fix = "Of the gradients of a vector of losses take each by its leading index."
                got = _check.describe(g)
                raise ValueError(_check.message(function, "gradients", rule, got, fix, path=at))


def _column(like: Any, *gradients: Any) -> list[Any]:
    """One leaf of all gradients, in one dtype."""
    if not is_inexact(like):
        return [_hole(like)] * len(gradients)
    dtypes = [jnp.result_type(g) for g in gradients if is_inexact(g)]
    dtype = common_dtype(*dtypes) if dtypes else wide_dtype(jnp.result_type(like))
    return [
        jnp.asarray(g).astype(dtype) if is_inexact(g) else jnp.zeros_like(like, dtype)
        for g in gradients
    ]


def scale(weight: jax.Array, tree: PyTree) -> PyTree:
    """`weight * tree`, on the leaves that `aligned` gives."""
    return jax.tree.map(lambda g: weight.astype(g.dtype) * g, tree)


def add(trees: Sequence[PyTree]) -> PyTree:
    """The sum of the trees that `aligned` gives."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *trees)


def is_inexact(x: Any) -> bool:
    """Whether `x` is an array, or a number, that a gradient can be taken by."""
    return not _is_hole(x) and jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def common_dtype(*dtypes: Any) -> np.dtype:
    """The widest of the dtypes to add in."""
    out = wide_dtype(dtypes[0])
    for dtype in dtypes[1:]:
        out = np.promote_types(out, wide_dtype(dtype))
    return out


def require_combination(function: str, argument: str, value: Any) -> None:
    """Refuses what is not a `Combination`."""
    if not isinstance(value, Combination):
        rule, got = "be a combination of gradients", _check.describe(value)
        fix = "Make one with jc.distillation.pcgrad() or its like."
        raise TypeError(_check.message(function, argument, rule, got, fix))


def require_count(function: str, count: int, wanted: int) -> None:
    """Refuses another number of gradients than there are places for."""
    if count != wanted:
        rule = f"be {wanted}, one for each argument of {function}"
        raise ValueError(_check.message(function, "gradients", rule, count))


def _hole(x: Any) -> Any:
    """What stands for `x` where nothing is computed: None stays, as it is no leaf in params."""
    return None if x is None else optax.MaskedNode()


def _is_hole(x: Any) -> bool:
    return x is None or is_masked_node(x)

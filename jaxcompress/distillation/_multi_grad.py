"""Gradients of several losses from one forward pass."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress import _check, tree

_FUNCTION = "value_and_multi_grad"


def value_and_multi_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    sequential: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""As `jax.value_and_grad`, of a function with several losses, which runs only once.

    .. math:: (L_1, \dots, L_K)(\theta) \;\mapsto\;
        (L_1, \dots, L_K),\; (\nabla_\theta L_1, \dots, \nabla_\theta L_K)

    For losses that are to be combined by more than their sum (`pcgrad`, `dot`…): hand the first
    gradient to the optimizer as the updates, the others to `jc.distill` (`teacher_grads`) or to
    `combine_gradients` (`other_grads`).

    Args:
        fun: `fun(*args, **kwargs)` -> any tree of losses, each a real floating-point scalar or a
            vector of them; with `has_aux`, `(losses, aux)`. It is traced once.
        argnums: static. As in `jax.grad`: which positional arguments to differentiate by.
        has_aux: static. Whether `fun` returns anything else besides the losses.
        sequential: static. One backward pass after the other, in place of one pass for all of
            them under `vmap`: less memory at a time, and no `vmap` of a custom gradient.

    Returns:
        A function with the arguments of `fun` that gives `(losses, grads)`, or `((losses, aux),
        grads)`. `grads` has the structure of the losses, with a gradient, as `jax.grad` gives
        it, in the place of each; of a vector of K losses all leaves get a leading axis of K.

    Raises:
        TypeError: an argument to differentiate by holds other than floating-point or complex
            leaves; a loss is not a real floating-point number. Both while tracing.
        ValueError: a loss has more than one axis.

    Cost: one forward pass and K backward ones; the gradients' memory K times. A loss whose
    derivative is infinite makes the other gradients NaN too, as 0 times infinity is NaN.

    Examples:
        >>> def losses(w, x):
        ...     y = x @ w
        ...     return {"task": jnp.mean(y**2), "teacher": jnp.mean((y - 1.0) ** 2)}
        >>> values, grads = jc.distillation.value_and_multi_grad(losses)(jnp.ones(2), jnp.eye(2))
        >>> grads["task"], grads["teacher"]
        (Array([1., 1.], dtype=float32), Array([0., 0.], dtype=float32))

    Source: Griewank & Walther 2008, Evaluating Derivatives, section 3.2: reverse mode with
    several adjoints at a time.
    """
    if not callable(fun):
        raise TypeError(_check.message(_FUNCTION, "fun", "be a function", _check.describe(fun)))
    single = isinstance(argnums, int)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(map(operator.index, argnums))

    @functools.wraps(fun)
    def value_and_grads(*args, **kwargs):
        places = [_place(number, len(args)) for number in numbers]
        chosen = tuple(args[place] for place in places)
        for place, argument in zip(places, chosen, strict=True):
            _require_inexact(place, argument)

        def losses_of(*chosen):
            given = list(args)
            for place, argument in zip(places, chosen, strict=True):
                given[place] = argument
            out = fun(*given, **kwargs)
            losses, aux = _pair(out) if has_aux else (out, None)
            return jax.tree.map(jnp.asarray, _checked(losses)), aux

        losses, pull, aux = jax.vjp(losses_of, *chosen, has_aux=True)
        whole = lambda cotangents: pull(cotangents)[0] if single else pull(cotangents)  # noqa: E731
        grads = _each(whole, losses, sequential)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grads


def _each(pull: Callable[[Any], Any], losses: Any, sequential: bool) -> Any:
    """The gradient of every loss, in its place."""
    leaves, treedef = jax.tree.flatten(losses)
    count = sum(leaf.size for leaf in leaves)
    starts = [sum(leaf.size for leaf in leaves[:i]) for i in range(len(leaves))]

    def cotangents(number):
        """One for the loss of this number, zero for the others."""
        ones = [
            (start + jnp.arange(leaf.size) == number).reshape(leaf.shape).astype(leaf.dtype)
            for start, leaf in zip(starts, leaves, strict=True)
        ]
        return pull(treedef.unflatten(ones))

    if sequential:
        singles = [cotangents(number) for number in range(count)]
    else:
        stacked = jax.vmap(cotangents)(jnp.arange(count)) if count else None
        singles = [jax.tree.map(lambda g, i=i: g[i], stacked) for i in range(count)]

    def place(start, leaf):
        own = singles[start : start + leaf.size]
        return own[0] if leaf.ndim == 0 else jax.tree.map(lambda *g: jnp.stack(g), *own)

    return treedef.unflatten([place(*each) for each in zip(starts, leaves, strict=True)])


def _place(number: int, count: int) -> int:
    if not -count <= number < count:
        rule, got = f"name one of the {count} positional arguments", number
        fix = "Arguments to differentiate by are given by position."
        raise ValueError(_check.message(_FUNCTION, "argnums", rule, got, fix))
    return number % count


def _require_inexact(place: int, argument: Any) -> None:
    for path, leaf in _paths(argument):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            rule = "hold floating-point or complex leaves where it is differentiated by"
            got, fix = _check.describe(leaf), "Give what is not trained as another argument."
            raise TypeError(_check.message(_FUNCTION, f"args[{place}]", rule, got, fix, path=path))


def _paths(whole: Any) -> list[tuple[str, Any]]:
    """Every leaf with its path; the parts of a compressed array are leaves too."""
    flat, _ = jax.tree_util.tree_flatten_with_path(whole)
    return [(tree.path_string(path), leaf) for path, leaf in flat]


def _pair(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, tuple) or len(out) != 2:
        rule, got = "return a pair (losses, aux) with has_aux=True", _check.describe(out)
        raise TypeError(_check.message(_FUNCTION, "fun", rule, got))
    return out


def _checked(losses: Any) -> Any:
    for path, loss in _paths(losses):
        rule, got = "return real floating-point losses, scalars or vectors", _check.describe(loss)
        path = path or None
        if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(_check.message(_FUNCTION, "fun", rule, got, path=path))
        if jnp.ndim(loss) > 1 or jnp.size(loss) == 0:
            fix = "Take the mean over the batch."
            raise ValueError(_check.message(_FUNCTION, "fun", rule, got, fix, path=path))
    return losses

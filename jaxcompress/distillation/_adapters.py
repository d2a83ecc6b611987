"""Adapters: from the shape of a student's feature to that of the teacher's.

An adapter is chosen by a function such as `linear_adapter()`. What it returns is fitted to the
two shapes by `adapt`, and is then a pair of functions `Adapter(init, apply)`. Of the teacher's
shape it takes those axes that it is about, so it serves batches of any size.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxcompress import _check
from jaxcompress._dtypes import wide
from jaxcompress._types import PyTree


class Adapter(NamedTuple):
    """A function with parameters of its own, fitted to a student's and a teacher's shape.

    Attributes:
        init: `(key) -> params`, in float32; an empty dict where there is nothing to train.
        apply: `(params, feature) -> array`, pure. It computes in float32, or in float64 where
            the feature or the params are, and so returns.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, Any], Any]


Fit = Callable[[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], Adapter]
"""A choice of adapter: from the student's and the teacher's shape to an `Adapter`."""


def chain_adapters(*adapters: Fit) -> Fit:
    """Adapters one after the other, the first on the student's feature.

    Args:
        *adapters: static. Each is fitted to what the one before gives and to the teacher's shape.

    Returns:
        An adapter; its params are a list of those of the parts.

    Raises:
        TypeError: one of `adapters` is no function of two shapes.

    Examples:
        >>> d = jc.distillation
        >>> maps, rows = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 5))
        >>> adapter = d.chain_adapters(d.global_pool_adapter(), d.linear_adapter())(maps, rows)
        >>> adapter.apply(adapter.init(jax.random.key(0)), maps).shape
        (2, 5)
    """
    for fit in adapters:
        require_fit("chain_adapters", "adapters", fit)

    def fit_all(student, teacher):
        parts, shape = [], struct_of(student)
        for fit in adapters:
            parts.append(fit(shape, teacher))
            shape = result_of(parts[-1], shape)

        def init(key):
            keys = jax.random.split(key, max(len(parts), 1))
            return [part.init(k) for part, k in zip(parts, keys, strict=False)]

        def apply(params, feature):
            for part, own in zip(parts, params, strict=True):
                feature = part.apply(own, feature)
            return wide(feature)

        return Adapter(init, apply)

    return fit_all


def per_layer_adapter(adapter: Fit) -> Fit:
    """One adapter for each layer of features that `scan` stacks along their leading axis.

    Without it the layers are one more axis of the batch, and share the params.

    Args:
        adapter: static. Fitted to one layer of the two shapes.

    Returns:
        An adapter whose params have a leading axis of layers, as the features.

    Raises:
        TypeError: `adapter` is no function of two shapes.
        ValueError: the student and the teacher have different numbers of layers, or none; raised
            when it is fitted.

    Cost: that of one adapter, mapped by `jax.vmap`.

    Examples:
        >>> d, small, big = jc.distillation, jnp.zeros((3, 2, 4)), jnp.zeros((3, 2, 8))
        >>> adapter = d.per_layer_adapter(d.linear_adapter())(small, big)
        >>> adapter.init(jax.random.key(0))["kernel"].shape
        (3, 4, 8)
    """
    require_fit("per_layer_adapter", "adapter", adapter)

    def fit(student, teacher):
        ours, theirs = student.shape[:1], teacher.shape[:1]
        if ours != theirs or not ours or ours[0] == 0:
            rule = f"have as many layers along axis 0 as the student's, {_check.describe(student)}"
            fix = "Take the teacher's layers with Layers(name, (1, 3, 5)) in capture_pairs."
            got = _check.describe(teacher)
            raise ValueError(_check.message("per_layer_adapter", "teacher", rule, got, fix))
        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (student, teacher)]
        inner = adapter(*one)

        def init(key):
            return jax.vmap(inner.init)(jax.random.split(key, ours[0]))

        return Adapter(init, jax.vmap(inner.apply))

    return fit


def identity_adapter() -> Fit:
    """No change but that of a low-precision dtype: the shapes must be equal already.

    Returns:
        An adapter without params.

    Examples:
        >>> adapter = jc.distillation.identity_adapter()(jnp.zeros(3), jnp.zeros(3))
        >>> adapter.apply({}, jnp.ones(3))
        Array([1., 1., 1.], dtype=float32)
    """
    return lambda student, teacher: without_params(wide)


def without_params(function: Callable[[Any], jax.Array]) -> Adapter:
    """An `Adapter` of a function of the feature alone."""
    return Adapter(lambda key: {}, lambda params, feature: function(feature))


def result_of(adapter: Adapter, student: Any) -> Any:
    """The shape and dtype of what an adapter gives; nothing runs."""
    return jax.eval_shape(lambda x: adapter.apply(adapter.init(jax.random.key(0)), x), student)


def struct_of(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def require_fit(function: str, argument: str, fit: Any) -> None:
    if not callable(fit) or isinstance(fit, Adapter):
        rule = "be functions of two shapes, as linear_adapter()"
        raise TypeError(_check.message(function, argument, rule, _check.describe(fit)))
    if not _takes_two(fit):
        rule = "be functions of two shapes, as linear_adapter()"
        name = getattr(fit, "__name__", type(fit).__name__)
        got, fix = f"{name}, which takes no two shapes", f"Call it, if it makes one: {name}(…)."
        raise TypeError(_check.message(function, argument, rule, got, fix))


def _takes_two(fit: Callable[..., Any]) -> bool:
    try:
        inspect.signature(fit).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C do not tell
        return True
    return True

"""Adapters fitted to every pair of features, or an error that says which to choose."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxcompress import _check, _keys, tree
from jaxcompress._types import Shaped
from jaxcompress.distillation._adapters import Adapter, Fit, require_fit, result_of, struct_of


def adapt(
    adapters: Fit | Mapping[Any, Fit],
    student_shapes: Mapping[str, Shaped],
    teacher_shapes: Mapping[str, Shaped],
) -> Adapter:
    r"""Fits an adapter to each pair of features; nothing is chosen that was not asked for.

    The params are a tree apart from the model's, so a model is saved, packed and counted
    without them. Train them beside the student, with an optimizer of their own or in one tree:
    `{"student": params, "adapters": adapter_params}`.

    Args:
        adapters: static. One adapter for all pairs, or a mapping from the pairs' names to
            adapters; a key is a name or, as for `jaxcompress.tree.select`, a glob on it.
            Each pair needs exactly one, be it `identity_adapter()`. One of your own is any
            function `(student, teacher) -> Adapter` of two `jax.ShapeDtypeStruct`s.
        student_shapes: static. Arrays or `jax.ShapeDtypeStruct`s by pair, as in
            `capture_pairs(...).student_shapes`.
        teacher_shapes: static. The same of the teacher, by equal names.

    Returns:
        An `Adapter` of all pairs: `init(key)` -> `{pair: params}`, each pair with a key of its
        own, and `apply(params, student_features)` -> `{pair: array}`, of the teacher's shapes.
        Features may come in other batch sizes than the shapes said. Low-precision features are
        computed with, and returned, in float32: a loss takes the difference from a teacher in
        bfloat16 or float16 as it is. To adapt the teacher's side also, as by
        `l2_norm_adapter()`, call `adapt` with its shapes on both sides.

    Raises:
        ValueError: a pair has no adapter, or two; an adapter does not give the teacher's shape
            (the message has the pair, both shapes and the adapters to choose); the names on
            the two sides, or those of the features at `apply`, differ; a key matches no pair.
        TypeError: an argument is none of the above, or a feature is not floating point.

    Cost: only shapes are computed, nothing runs.

    Examples:
        >>> student = {"hidden": jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)}
        >>> teacher = {"hidden": jax.ShapeDtypeStruct((2, 10, 16), jnp.bfloat16)}
        >>> d = jc.distillation
        >>> choice = d.chain_adapters(d.resize_adapter(axes=(-2,)), d.linear_adapter())
        >>> adapters = d.adapt({"hidden": choice}, student, teacher)
        >>> params = adapters.init(jax.random.key(0))
        >>> adapters.apply(params, {"hidden": jnp.ones((4, 5, 8))})["hidden"].shape
        (4, 10, 16)

    Source: a regressor on the student's side is Romero et al. 2015, arXiv:1412.6550,
    section 2.2. Differs: theirs ends in the teacher's nonlinearity.
    """
    for name, shapes in {
        "student_shapes": student_shapes,
        "teacher_shapes": teacher_shapes,
    }.items():
        if not isinstance(shapes, Mapping) or not all(_has_shape(x) for x in shapes.values()):
            rule = "be a mapping from pairs to arrays or jax.ShapeDtypeStructs"
            raise TypeError(_check.message("adapt", name, rule, _check.describe(shapes)))
    _require_names("teacher_shapes", teacher_shapes, student_shapes)
    fits = _by_pair(adapters, student_shapes, teacher_shapes)
    fitted = {
        pair: _fitted(pair, fit, struct_of(student_shapes[pair]), struct_of(teacher_shapes[pair]))
        for pair, fit in fits.items()
    }

    def init(key):
        _check.key("adapt", key)
        return {pair: adapter.init(_keys.of_leaf(key, pair)) for pair, adapter in fitted.items()}

    def apply(params, features):
        _require_names("features", features, student_shapes)
        _require_names("params", params, student_shapes)
        return {pair: _applied(pair, params[pair], features[pair]) for pair in fitted}

    def _applied(pair, params, feature):
        student, teacher = struct_of(student_shapes[pair]), struct_of(teacher_shapes[pair])
        _require_floating("features", feature, pair)
        if jnp.ndim(feature) != len(student.shape):
            rule = f"have the axes of the example, {_check.describe(student)}"
            got = _check.describe(feature)
            raise ValueError(_check.message("adapt", "features", rule, got, path=pair))
        try:
            return fitted[pair].apply(params, feature)
        except ValueError as error:
            raise _misfit(pair, feature, teacher, error) from error

    return Adapter(init, apply)


def _by_pair(adapters, student_shapes, teacher_shapes) -> dict[str, Any]:
    """The adapter of each pair, of which each has exactly one."""
    if not isinstance(adapters, Mapping):
        require_fit("adapt", "adapters", adapters)
        return dict.fromkeys(student_shapes, adapters)
    chosen: dict[str, list[Any]] = {pair: [] for pair in student_shapes}
    for key, fit in adapters.items():
        require_fit("adapt", "adapters", fit)
        for pair in [key] if isinstance(key, str) and key in chosen else _hit(key, student_shapes):
            chosen[pair].append(key)
    for pair, keys in chosen.items():
        if len(keys) != 1:
            shapes = f"{_check.describe(struct_of(student_shapes[pair]))} to "
            shapes += _check.describe(struct_of(teacher_shapes[pair]))
            rule = f"have one adapter for each pair, from {shapes}"
            got = f"two, {keys[:2]}" if keys else "none"
            fix = _advice(student_shapes[pair], teacher_shapes[pair])
            raise ValueError(_check.message("adapt", "adapters", rule, got, fix, path=pair))
    return {pair: adapters[keys[0]] for pair, keys in chosen.items()}


def _hit(key: Any, student_shapes) -> list[str]:
    """The pairs that a key matches, of which there is at least one."""
    structs = {pair: struct_of(x) for pair, x in student_shapes.items()}
    try:
        hits = tree.select(structs, key, function="adapt")
    except (TypeError, ValueError) as error:
        rule, got = "have keys that are names of pairs or globs on them", f"the key {key!r}"
        got += "" if isinstance(error, TypeError) else ", which matches none"
        text = _check.message("adapt", "adapters", rule, got, f"The pairs are {sorted(structs)}.")
        raise (TypeError if isinstance(error, TypeError) else ValueError)(text) from error
    return [pair for pair, hit in hits.items() if hit]


def _fitted(pair: str, fit: Fit, student: Any, teacher: Any) -> Adapter:
    _require_floating("student_shapes", student, pair)
    try:
        adapter = fit(student, teacher)
        if not isinstance(adapter, Adapter):
            rule = "be functions of two shapes that return an Adapter"
            got = _check.describe(adapter)
            raise TypeError(_check.message("adapt", "adapters", rule, got, path=pair))
        result = result_of(adapter, student)
    except ValueError as error:
        raise _misfit(pair, student, teacher, error) from error
    if result.shape != teacher.shape:
        raise _misfit(pair, student, teacher, _check.describe(result))
    return adapter


def _misfit(pair: str, student: Any, teacher: Any, got: Any) -> ValueError:
    rule = f"bring {_check.describe(student)} to {_check.describe(teacher)}"
    fix = _advice(student, teacher)
    got = f"{got}".removesuffix(".") if isinstance(got, ValueError) else got
    return ValueError(_check.message("adapt", "adapters", rule, got, fix, path=pair))


def _advice(student: Any, teacher: Any) -> str:
    """Which adapters there are for the axes that differ."""
    ours, theirs = student.shape, teacher.shape
    if len(ours) > len(theirs):
        return "Choose global_pool_adapter(axes), which drops axes."
    if len(ours) < len(theirs):
        return "Choose other features, or write an adapter: a function of two shapes -> Adapter."
    differ = [i - len(ours) for i in range(len(ours)) if ours[i] != theirs[i]]
    words = []
    if -1 in differ:
        words.append("linear_adapter() for the channels")
    inner = [i for i in differ if i not in (-1, -len(ours))]
    fewer = tuple(i for i in inner if theirs[i] < ours[i])
    more = tuple(i for i in inner if theirs[i] > ours[i])
    if fewer:
        words.append(f"average_pool_adapter(axes={fewer}) or resize_adapter(axes={fewer})")
    if more:
        words.append(f"resize_adapter(axes={more})")
    if differ and differ[0] == -len(ours) != -1:
        words.append("features of one batch and of equally many layers for axis 0")
    if not words:
        return "Choose identity_adapter()."
    return f"Choose {' and '.join(words)}" + ("; chain_adapters joins." if words[1:] else ".")


def _has_shape(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _require_floating(argument: str, feature: Any, pair: str) -> None:
    if not _has_shape(feature) or not jnp.issubdtype(feature.dtype, jnp.floating):
        rule, got = "hold real floating-point features", _check.describe(feature)
        raise TypeError(_check.message("adapt", argument, rule, got, path=pair))


def _require_names(argument: str, given: Any, pairs: Mapping[str, Any]) -> None:
    names = sorted(given) if isinstance(given, Mapping) else _check.describe(given)
    if names != sorted(pairs):
        rule = f"be a mapping with the pairs {sorted(pairs)}"
        raise ValueError(_check.message("adapt", argument, rule, names))

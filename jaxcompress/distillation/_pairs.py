"""Values inside of a student and of its teacher, in pairs and under the same names."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress import _check
from jaxcompress._types import PyTree
from jaxcompress.distillation._pair_names import Place, paired
from jaxcompress.tracing import capture, capture_names

_FUNCTION = "capture_pairs"


class Pairs(NamedTuple):
    """A student and a teacher that also return their paired values, from `capture_pairs`.

    Attributes:
        student: `student(params, *args, **kwargs) -> (output, {pair: value})`.
        teacher: the same of the teacher, with equal keys.
        names: from each pair to the names of its two values, as `jc.capture` knows them.
        student_shapes: from each pair to the shape and dtype of the student's value, with the
            axis of a scan, for the example arguments.
        teacher_shapes: the same of the teacher's values.
    """

    student: Callable[..., tuple[Any, dict[str, jax.Array]]]
    teacher: Callable[..., tuple[Any, dict[str, jax.Array]]]
    names: dict[str, tuple[str, str]]
    student_shapes: dict[str, jax.ShapeDtypeStruct]
    teacher_shapes: dict[str, jax.ShapeDtypeStruct]


def capture_pairs(
    student: Callable[..., PyTree],
    teacher: Callable[..., PyTree],
    pairs: Mapping[Any, Any],
    student_args: tuple[Any, ...],
    teacher_args: tuple[Any, ...],
) -> Pairs:
    r"""A student and a teacher, each returning also its values of the pairs, by equal names.

    What the values are is for a loss on features to say; where their shapes differ, `adapt`
    brings the student's to the teacher's. No gradient is stopped here; `jc.distill` stops the
    teacher's.

    Args:
        student: any function `student(params, *args, **kwargs)`.
        teacher: any function; it need not be of the student's library.
        pairs: static. From values of the student to values of the teacher, by the names of
            `jc.capture_names`. On both sides a glob as for `jaxcompress.tree.select`
            (`"blocks_*/attn"`), a compiled regular expression that matches the whole name, or
            `Layers(name, index)` for layers of a scan. Where there are wildcards (groups of a
            regular expression), values with the same text in their place are paired, never by
            their order. (A further value of a name, `blocks_0:1`, is matched by `blocks_*` too
            but not by `blocks_[0-9]`.) Instead of the teacher's pattern, a function from the
            texts of the student's wildcards to the teacher's whole name (or `Layers`) maps
            layers: `{"blocks_*": lambda i: f"layer_{2 * int(i) + 1}"}`.
        student_args: static. Example arguments `(params, *args)` to read names and shapes
            from: arrays or `jax.ShapeDtypeStruct`s. Other leaves keep their value.
        teacher_args: the same of the teacher.

    Returns:
        `Pairs(student, teacher, names, student_shapes, teacher_shapes)`. A pair is called as the
        student's value, `blocks_0/attn`, with the index after it where it is `Layers`,
        `blocks/0`. The two functions take other arguments than the examples, as other batch
        sizes; they may be jitted, mapped, differentiated and lifted. A value is stacked, kept
        or zero in `scan`, `while` and `cond` as `jc.capture` says.

    Raises:
        ValueError: a pattern matches nothing (the message lists the names there are); the
            wildcards of one side stand for what those of the other side don't, or for the
            same twice (the message lists both sides' names); a value of the student, or a layer
            of one, is in two pairs or twice in one; a function names no value of the teacher;
            `Layers` of a value that no scan stacks; an index is not one of the layers.
        TypeError: `student` or `teacher` can't be called; `pairs`, a pattern or the example
            arguments are none of the above.

    Cost: both functions are traced twice, and nothing runs. Later that of `jc.capture`.

    Examples:
        >>> def mlp(params, x):
        ...     for i, w in enumerate(params):
        ...         x = jc.name(jnp.tanh(x @ w), f"layer_{i}")
        ...     return x
        >>> small, big, x = [jnp.ones((4, 4))] * 3, [jnp.ones((4, 4))] * 6, jnp.ones((2, 4))

        A student of 3 layers and a teacher of 6, whose every second layer is a target:

        >>> paired = jc.distillation.capture_pairs(
        ...     mlp, mlp, {"layer_*": lambda i: f"layer_{2 * int(i) + 1}"}, (small, x), (big, x)
        ... )
        >>> paired.names["layer_2"]
        ('layer_2', 'layer_5')
        >>> output, values = jax.jit(paired.teacher)(big, x)
        >>> list(values)
        ['layer_0', 'layer_1', 'layer_2']

        The same one by one: `{"layer_0": "layer_1", "layer_1": "layer_3", "layer_2": "layer_5"}`;
        for a teacher that scans over its layers, `{"layer_*": lambda i: Layers("block", 2 *
        int(i) + 1)}`, and if both scan, `{"block": Layers("block", (1, 3, 5))}`.

    Source: one pair is Romero et al. 2015, arXiv:1412.6550, section 2.2; a function that maps
    layers, every third of the teacher's, is Jiao et al. 2019, arXiv:1909.10351.
    """
    for name, fn in {"student": student, "teacher": teacher}.items():
        if not callable(fn):
            rule, got = "be a function of its params", _check.describe(fn)
            raise TypeError(_check.message(_FUNCTION, name, rule, got))
    for name, args in {"student_args": student_args, "teacher_args": teacher_args}.items():
        if not isinstance(args, tuple):
            rule, got = "be a tuple of arguments, (params, *args)", _check.describe(args)
            raise TypeError(_check.message(_FUNCTION, name, rule, got))
    if not isinstance(pairs, Mapping) or not pairs:
        rule = "be a mapping from values of the student to values of the teacher"
        raise TypeError(_check.message(_FUNCTION, "pairs", rule, _check.describe(pairs)))
    ours = capture_names(student, *student_args)
    theirs = capture_names(teacher, *teacher_args)
    places: dict[str, tuple[Place, Place]] = {}
    for left, right in pairs.items():
        for place, other in paired(left, right, list(ours), list(theirs)):
            label = place.label()
            if label in places:
                rule = "have each value of the student in one pair"
                got = f"two, with {places[label][1].label()!r} and {other.label()!r}"
                raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, path=label))
            places[label] = (place, other)
    firsts = {label: place for label, (place, _) in places.items()}
    seconds = {label: place for label, (_, place) in places.items()}
    student, stacks, student_shapes = _capturing(student, firsts, student_args, ours)
    teacher, _, teacher_shapes = _capturing(teacher, seconds, teacher_args, theirs)
    _require_apart(firsts, stacks)
    names = {label: (place.label(), other.label()) for label, (place, other) in places.items()}
    return Pairs(student, teacher, names, student_shapes, teacher_shapes)


def _capturing(
    fn: Callable[..., PyTree],
    places: Mapping[str, Place],
    args: tuple[Any, ...],
    steps: Mapping[str, jax.ShapeDtypeStruct],
):
    """`fn`, returning also the values at `places`, by label; for `args` the shapes of the
    whole values by name, and of those by label.

    `steps` has the shape of one step of each value: a scan stacks more axes than that.
    """
    wanted = {place.name for place in places.values()}

    def in_a_pair(name: str, value: Any) -> bool:
        del value
        return name in wanted

    capturing = capture(fn, in_a_pair)

    def captured(*args: Any, **kwargs: Any):
        output, values = capturing(*args, **kwargs)
        missing = sorted(wanted - values.keys())
        if missing:
            rule = "have the values that it had for the example arguments"
            fix = "Make the pairs for these arguments anew."
            raise ValueError(_check.message(_FUNCTION, "args", rule, f"no {missing}", fix))
        return output, at_places(values)

    def at_places(values):
        return {label: _layers(values[p.name], p) for label, p in places.items()}

    whole = _shapes(capturing, args)
    for place in places.values():
        if place.index is not None and len(whole[place.name].shape) <= len(steps[place.name].shape):
            rule = "be of a value that a scan stacks"
            got = _check.describe(whole[place.name])
            fix = "No scan stacks this one, so it has no axis of layers: give its name alone."
            raise ValueError(_check.message(_FUNCTION, "Layers", rule, got, fix, path=place.name))
    return captured, whole, jax.eval_shape(at_places, whole)


def _require_apart(places: Mapping[str, Place], whole: Mapping[str, Any]) -> None:
    """Refuses a layer of the student that is in two pairs, or twice in one."""
    stacked = {place.name for place in places.values() if place.index is not None}
    taken: dict[tuple[str, int], str] = {}
    for label, place in places.items():
        if place.name not in stacked:
            continue
        count, index = whole[place.name].shape[0], place.index
        index = range(count) if index is None else index
        for i in (index,) if isinstance(index, int) else index:
            one = (place.name, i % count)
            if one in taken:
                rule = "have each value of the student in one pair"
                got = f"layer {one[1]} of it in {taken[one]!r} and again in {label!r}"
                raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, path=place.name))
            taken[one] = label


def _layers(value: jax.Array, place: Place) -> jax.Array:
    if place.index is None:
        return value
    count = value.shape[0] if value.ndim else 0
    index = place.index if isinstance(place.index, tuple) else (place.index,)
    if not all(-count <= i < count for i in index):
        rule, got = f"be among the {count} layers of {place.name!r}", place.index
        raise ValueError(_check.message(_FUNCTION, "index", rule, got))
    if isinstance(place.index, int):
        return value[place.index]
    return jnp.stack([value[i] for i in index])


def _shapes(fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of captured values; as for `capture`, what is no array is static."""
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape") and hasattr(x, "dtype")}

    def values(arrays):
        return fn(*treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))[1]

    return jax.eval_shape(values, arrays)

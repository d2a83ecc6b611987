"""Dependency groups of any function."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.pruning.structured._base import Dependencies, Frozen, Group, Member
from jaxcompress.tracing.positions import AxisRule, Kind, Program, kinds, program_of


def dependencies(
    fn: Callable[..., PyTree],
    params: PyTree,
    *args: Any,
    rules: Mapping[str, AxisRule] | None = None,
    **kwargs: Any,
) -> Dependencies:
    """What can be removed from a function, and all places that have to leave with it.

    The function is traced, and every equation says which positions of its values stay or leave
    together: those of axes that are added, multiplied, or summed over with each other. Where a
    reshape merges axes, as heads and their features, a position stays where both of its parts
    stay, so heads, features of all heads, groups of heads that share keys, and pairs of rotary
    embeddings are found without a hint. Concatenations, slices, flips, rolls, permutations by
    known indices, flattened images, shuffles, grouped and depthwise convolutions, gates and
    loops are followed position by position.

    Units that touch the same axes of the same leaves are a group. What stays is listed with the
    operation that keeps it: axes of arguments and results; those that entries are found by (an
    embedding's rows), or compared along (a softmax, a maximum), or that there is no rule for.

    A result at the path of a leaf of the params, perhaps after a prefix, is its new value and
    shrinks with it: statistics that a training step returns. Other state that has to shrink
    belongs into the params, as in `fn((params, state), x)`.

    Args:
        fn: any function `fn(params, *args, **kwargs)`, of Flax NNX (`jc.functional`), Linen,
            Equinox, Haiku or none. It is traced, not run.
        params: any pytree of dense arrays or `jax.ShapeDtypeStruct`s: no weights are needed.
        *args: further arguments; arrays, `jax.ShapeDtypeStruct`s, or static values.
        rules: static. By the name of a primitive or of a jitted function how its axes belong
            together, for kernels that can't be read: see `jc.pruning.AxisRule`.
        **kwargs: further arguments of `fn`.

    Returns:
        `Dependencies`; printed, it is a table by path. Groups in the order in which the
        function uses the weights that write them. In a scan over layers each layer may lose
        units of its own, as many, unless they meet something that all layers share.

    Raises:
        TypeError: `fn` can't be called; a leaf is packed.
        ValueError: two leaves have one path, or a rule does not fit.

    Cost: one trace, and a few passes over the sizes of all axes: seconds for a decoder of 8
    billion parameters, unrolled. A scan over layers is read once.

    Examples:
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> params = {"up": jnp.ones((8, 6)), "bias": jnp.zeros(6), "down": jnp.ones((6, 8))}
        >>> (group,) = jc.dependencies(mlp, params, jnp.ones((1, 8))).groups
        >>> group.name, group.size, [(member.path, member.axis) for member in group.members]
        ('up[1]', 6, [('bias', 0), ('down', 0), ('up', 1)])

    Source: the idea of dependency groups is that of Fang et al. 2023, arXiv:2301.12900, who
    follow PyTorch modules and whole axes; here equations and single positions are followed.
    """
    leaves = tree.by_path("dependencies", "params", params)
    for path, leaf in leaves.items():
        if arrays.is_compressed(leaf):
            got, fix = _check.describe(leaf), "Remove first, then compress."
            raise TypeError(
                _check.message("dependencies", "params", "be dense", got, fix, path=path)
            )
    _require_rules(rules)
    program = program_of("dependencies", fn, params, args, kwargs, rules or {})
    paths = program.traced.paths
    order = {argument: n for n, argument in enumerate(program.reading.stacks)}
    several, frozen = [], []
    for kind in kinds(program.reading, program.arguments):
        if len(kind.places) == 1 and not program.reading.uses(kind.atoms):
            program.reading.freeze((kind.atoms[:, None],), "it is not used with these arguments")
        elif len(kind.atoms) > 1:
            several.append(kind)
        else:
            atoms = kind.atoms[:, None]
            program.reading.freeze((atoms,), "all of its positions would leave together")
    several.sort(key=lambda kind: order[_writer(kind, program, order)[0]])
    names: Counter[str] = Counter()
    groups = []
    for kind in several:
        name = _name(kind, program, order)
        names[name] += 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        members = tuple(Member(paths[p.argument], p.axis, p.units) for p in kind.places)
        layers = program.traced.jaxpr.invars[kind.places[0].argument].aval.shape[: kind.layers]
        groups.append(Group(name, len(kind.atoms), members, tuple(layers), kind.note))
    for i, path in enumerate(paths):
        if path in leaves and i < len(program.arguments):
            frozen += _frozen(program, i, path)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in leaves.items()
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    }
    return Dependencies(tuple(groups), tuple(frozen), shapes, dict(rules or {}))


def _require_rules(rules: Any) -> None:
    named = isinstance(rules, Mapping) and all(isinstance(r, AxisRule) for r in rules.values())
    if rules is not None and not named:
        rule, got = "be None or AxisRules by name", _check.describe(rules)
        fix = 'As {"my_kernel": jc.pruning.AxisRule("t d, d f -> t f")}.'
        raise TypeError(_check.message("dependencies", "rules", rule, got, fix))


def _writer(kind: Kind, program: Program, order: dict[int, int]) -> tuple[int, int, np.ndarray]:
    """The place that names the units: of the first weight that the function uses."""

    def rank(place):
        ndim = len(program.arguments[place.argument].labels) - kind.layers
        return ndim < 2, order[place.argument], -place.axis

    return min(kind.places, key=rank)


def _name(kind: Kind, program: Program, order: dict[int, int]) -> str:
    argument, axis, units = _writer(kind, program, order)
    name = f"{program.traced.paths[argument]}[{axis}]"
    present = units[units >= 0]
    counts = np.bincount(present, minlength=1)
    repeats = int(counts[0])
    if repeats == 1 or (counts != repeats).any():
        return name
    return f"{name}/blocks" if present[0] == present[1] else f"{name}/strides"


def _frozen(program: Program, i: int, path: str) -> list[Frozen]:
    found = []
    for axis, label in enumerate(program.arguments[i].labels):
        if len(label) < 2:
            continue
        reasons = Counter(program.reading.atoms.reasons(label))
        found += [Frozen(path, axis, count, reason) for reason, count in reasons.items()]
    return found

"""Dependencies as text: what shrinks together, and what stays and why."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from jaxcompress.pruning.structured._base import Dependencies, Frozen, Group, Member

WIDTH = 120
_MOST_GROUPS, _MOST_MEMBERS, _MOST_FROZEN, _MOST_REASONS = 40, 10, 8, 20
# Holds a name and its number together while lines are broken.
_HOLD = "\N{NO-BREAK SPACE}"
_Item = TypeVar("_Item")


def dependencies_text(dependencies: Dependencies) -> str:
    """A table of the groups and a list of what is frozen; plain text, at most 120 wide.

    Groups that differ only in the numbers in their paths (the layers of a network) are one
    entry, and so are frozen axes of one reason. Long lists are cut, and say of how much.

    Args:
        dependencies: of a function.

    Returns:
        Of each group its name, its units (`12 × 64` where 12 layers of a scan have 64 each),
        the parameters that leave with one, on average, and the axes of leaves that shrink
        together, with the positions of each. A group whose removal is not exact says why.

    Examples:
        >>> from jaxcompress.pruning.structured._base import Group, Member
        >>> units, shape = np.arange(4), jax.ShapeDtypeStruct((2, 4), jnp.float32)
        >>> group = Group("a/kernel[1]", 4, (Member("a/kernel", 1, units),))
        >>> print(dependencies_text(Dependencies((group,), (), {"a/kernel": shape})))
        1 group of 4 units that can be removed
        <BLANKLINE>
        group        units  params each
        a/kernel[1]      4            2
            a/kernel[1] 4
    """
    groups = dependencies.groups
    count = sum(math.prod(group.shape) for group in groups)
    lines = [f"{_many(len(groups), 'group')} of {_many(count, 'unit')} that can be removed"]
    if groups:
        lines += ["", *_group_lines(dependencies)]
    if dependencies.frozen:
        lines += ["", *_frozen_lines(dependencies.frozen)]
    return "\n".join(lines)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _group_lines(dependencies: Dependencies) -> list[str]:
    alike = list(_merged(dependencies.groups, _pattern).values())
    shown = alike[:_MOST_GROUPS]
    rows = [("group", "units", "params each")]
    rows += [_row(groups[0], dependencies) for groups in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # A very long name moves only its own numbers.
    widths[0] = min(widths[0], 60)
    heads = [_line(row, widths) for row in rows]
    lines = [heads[0]]
    for groups, head in zip(shown, heads[1:], strict=True):
        lines.append(head)
        lines += _wrapped("    " + _members(groups[0], dependencies), "    ")
        if groups[0].inexact is not None:
            lines += _wrapped(f"    not exact: {groups[0].inexact}", "      ")
        if len(groups) > 1:
            lines.append(f"    and {len(groups) - 1} alike, the last {groups[-1].name}")
    if len(shown) < len(alike):
        rest = sum(map(len, alike[_MOST_GROUPS:]))
        lines.append(f"… {_many(rest, 'more group')}, in `.groups`")
    return lines


def _row(group: Group, dependencies: Dependencies) -> tuple[str, str, str]:
    units = " × ".join(map(str, group.shape))
    each = sum(_parameters(group, member, dependencies) for member in group.members)
    number = f"{round(each):,}" if abs(each - round(each)) < 1e-9 else f"{each:,.1f}"
    return group.name, units, number


def _members(group: Group, dependencies: Dependencies) -> str:
    """The axes of leaves; those that differ only in the numbers in their paths once."""
    alike = _merged(
        group.members, lambda m: (_numberless(m.path), m.axis, len(m.units), m.units.tobytes())
    )
    names = []
    for members in alike.values():
        more = "" if len(members) == 1 else f" (and {len(members) - 1} alike)"
        name = _member(members[0], group, dependencies) + more
        names.append(name.replace(" ", _HOLD))
    return _cut(names, _MOST_MEMBERS)


def _member(member: Member, group: Group, dependencies: Dependencies) -> str:
    """`qkv/kernel[1] 32 of 96 (8 each)`: the axis, and how many of its positions are units'."""
    positions = int((member.units >= 0).sum())
    size = dependencies.shapes[member.path].shape[member.axis]
    part = "" if positions == size else f" of {size}"
    each = positions // group.size if group.size and positions % group.size == 0 else 1
    several = f" ({each} each)" if each > 1 else ""
    return f"{member.path}[{member.axis}] {positions}{part}{several}"


def _parameters(group: Group, member: Member, dependencies: Dependencies) -> float:
    """The entries of a leaf that a unit has, of one layer."""
    shape = dependencies.shapes[member.path].shape
    others = math.prod(shape[len(group.layers) :]) / max(1, shape[member.axis])
    return others * int((member.units >= 0).sum()) / max(1, group.size)


def _frozen_lines(frozen: Sequence[Frozen]) -> list[str]:
    by_reason = list(_merged(frozen, lambda f: f.reason).items())
    lines = [f"{_many(len(frozen), 'axis').replace('axiss', 'axes')} of which positions stay"]
    for reason, axes in by_reason[:_MOST_REASONS]:
        lines += _wrapped(f"  {reason}", "    ")
        alike = _merged(axes, lambda f: (_numberless(f.path), f.axis, f.count))
        names = []
        for same in alike.values():
            first, more = same[0], f" (and {len(same) - 1} alike)" if len(same) > 1 else ""
            name = f"{first.path}[{first.axis}] {first.count}{more}"
            names.append(name.replace(" ", _HOLD))
        lines += _wrapped(f"    {_cut(names, _MOST_FROZEN)}", "    ")
    if len(by_reason) > _MOST_REASONS:
        lines.append(f"  … {_many(len(by_reason) - _MOST_REASONS, 'more reason')}, in `.frozen`")
    return lines


def _pattern(group: Group) -> Any:
    """What groups have in common that differ only in the numbers in their paths."""
    members = tuple((_numberless(m.path), m.axis, m.units.tobytes()) for m in group.members)
    return (_numberless(group.name), group.shape, group.inexact, members)


def _numberless(path: str) -> str:
    return re.sub(r"\d+", "#", path)


def _merged(items: Iterable[_Item], key: Callable[[_Item], Any]) -> dict[Any, list[_Item]]:
    found: dict[Any, list[_Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def _cut(names: Sequence[str], most: int) -> str:
    # One name more is as short as saying that there is one more.
    shown = names if len(names) <= most + 1 else names[:most]
    rest = "" if len(shown) == len(names) else f", … {len(names) - most} more"
    return ", ".join(shown) + rest


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, units, each = cells
    return f"{name:<{widths[0]}}  {units:>{widths[1]}}  {each:>{widths[2]}}"


def _wrapped(text: str, indent: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False)
    return [line.replace(_HOLD, " ") for line in lines]

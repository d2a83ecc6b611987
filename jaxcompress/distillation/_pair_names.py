"""Names of a student's values paired with names of a teacher's, by patterns."""

import operator
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

from jaxcompress import _check, tree

_FUNCTION = "capture_pairs"


class Layers(NamedTuple):
    """Some layers of a value that `scan` stacks along its leading axis, for `capture_pairs`.

    Attributes:
        name: as in `capture_pairs`: a glob or a compiled regular expression.
        index: static. Which layers: an integer, also one of NumPy, takes one and its axis
            goes; a tuple takes several, in that order. Negative ones count from the last layer.
    """

    name: str | re.Pattern
    index: SupportsIndex | tuple[SupportsIndex, ...]


class Place(NamedTuple):
    """Where a value of a pair is: its whole name, and the layers to take (None: all)."""

    name: str
    index: int | tuple[int, ...] | None = None

    def label(self) -> str:
        index = self.index if isinstance(self.index, tuple) else (self.index,)
        return self.name if self.index is None else f"{self.name}/{','.join(map(str, index))}"


def paired(left, right, ours: Sequence[str], theirs: Sequence[str]):
    """The pairs of one entry of `pairs`, in the student's order."""
    found = _matches(left, ours, "student")
    if callable(right):
        named = {texts: _named(right(*texts), place, theirs) for texts, place in found.items()}
    else:
        named = _matches(right, theirs, "teacher")
    if found.keys() != named.keys():
        rule = "have the same texts in the place of the wildcards on both sides"
        sides = ", the teacher's ".join(str(_texts_and_names(side)) for side in (found, named))
        fix = (
            "Map the layers by a function of the student's texts, as"
            ' {"blocks_*": lambda i: f"layer_{2 * int(i) + 1}"}, or list the pairs one by one.'
        )
        got = f"the student's {sides}"
        raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, fix, path=_shown(left)))
    return [(place, named[texts]) for texts, place in found.items()]


def _texts_and_names(side: dict[tuple[str, ...], Place]) -> dict[str, str]:
    return {", ".join(texts): place.label() for texts, place in side.items()}


def _matches(pattern, names: Sequence[str], side: str) -> dict[tuple[str, ...], Place]:
    """From what stands in the place of the wildcards to the value of that name."""
    index = None
    if isinstance(pattern, Layers):
        pattern, index = pattern.name, _require_index(pattern)
    if not isinstance(pattern, (str, re.Pattern)):
        rule = "hold globs, regular expressions or Layers of those"
        rule += "" if side == "student" else ", or a function of the student's wildcards"
        raise TypeError(_check.message(_FUNCTION, "pairs", rule, _check.describe(pattern)))
    compiled = tree.glob(pattern) if isinstance(pattern, str) else pattern
    found: dict[tuple[str, ...], Place] = {}
    for name in names:
        match = compiled.fullmatch(name)
        if match is None:
            continue
        texts = tuple(text or "" for text in match.groups())
        if texts in found:
            rule = "tell the values apart by what stands in the place of its wildcards"
            got = f"{found[texts].name!r} and {name!r} for {list(texts)}"
            fix = "Put each part of the pattern that varies in a group."
            path = _shown(pattern)
            raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, fix, path=path))
        found[texts] = Place(name, index)
    if not found:
        rule = f"match at least one value of the {side}"
        got = f"{_shown(pattern)!r}, which matches none"
        raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, _listed(names)))
    return found


def _named(right, place: Place, theirs: Sequence[str]) -> Place:
    """The value that a function of the wildcards names."""
    name, index = (
        (right.name, _require_index(right)) if isinstance(right, Layers) else (right, None)
    )
    if not isinstance(name, str) or name not in theirs:
        rule = "name a value of the teacher, where it is a function"
        got, path = _check.describe(name), place.label()
        raise ValueError(_check.message(_FUNCTION, "pairs", rule, got, _listed(theirs), path=path))
    return Place(name, index)


def _require_index(layers: Layers) -> int | tuple[int, ...]:
    index = layers.index
    if isinstance(index, tuple) and not index:
        rule = "have at least one layer as index"
        raise ValueError(_check.message(_FUNCTION, "Layers", rule, index, path=_shown(layers)))
    if isinstance(index, tuple):
        return tuple(_integer(i, layers) for i in index)
    return _integer(index, layers)


def _integer(i: Any, layers: Layers) -> int:
    try:
        if isinstance(i, bool):
            raise TypeError
        return operator.index(i)
    except TypeError:
        rule, got = "have a static integer or a tuple of them as index", _check.describe(i)
        path = _shown(layers)
        raise TypeError(_check.message(_FUNCTION, "Layers", rule, got, path=path)) from None


def _listed(names: Sequence[str]) -> str:
    shown = "\n  ".join(names[:50]) + (f"\n  … {len(names) - 50} more" if len(names) > 50 else "")
    return f"The names there are:\n  {shown}"


def _shown(pattern: Any) -> str:
    name = pattern.name if isinstance(pattern, Layers) else pattern
    return name.pattern if isinstance(name, re.Pattern) else str(name)

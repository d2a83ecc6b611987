"""Edges between nodes, once all of a program has been read."""

from collections.abc import Iterator

from jaxcompress.report._network_layers import Link, Reading

Found = dict[tuple[int, int, bool], tuple[str, ...]]
"""From `(source, target, whether in the next trip)` to the marks."""


def resolved(reading: Reading) -> list[tuple[Link, bool]]:
    """Edges between nodes that stay, and whether each is one to the next trip of a loop.

    What a loop carries is seen through to what comes in and what comes back. Where that leaves
    a sum or a product one source (the other was a counter), it is no node any more. What no
    output is computed from has no edges.
    """
    found: Found = {}
    for link in reading.links:
        for source, marks, loop in _sources(reading, link.source, link.marks):
            _add(found, (source, link.target, loop), marks)
    while (gone := _idle(reading, found)) is not None:
        into = {key: marks for key, marks in found.items() if key[1] == gone}
        out = {key: marks for key, marks in found.items() if key[0] == gone}
        for key in (*into, *out):
            found.pop(key, None)
        for (source, _, first), marks in into.items():
            for (_, target, second), more in out.items():
                if source != gone and target != gone:
                    _add(found, (source, target, first or second), (*marks, *more))
    living = _living(reading, found)
    return [
        (Link(source, target, marks), loop)
        for (source, target, loop), marks in found.items()
        if target in living
    ]


def _living(reading: Reading, found: Found) -> set[int]:
    """The nodes that some output is computed from: not those of running statistics."""
    into: dict[int, list[int]] = {}
    for source, target, _ in found:
        into.setdefault(target, []).append(source)
    todo = [i for i, box in enumerate(reading.boxes) if box.kind == "output"]
    living = set(todo)
    while todo:
        new = [source for source in into.get(todo.pop(), ()) if source not in living]
        living.update(new)
        todo += new
    return living


def _add(found: Found, key: tuple[int, int, bool], marks: tuple[str, ...]) -> None:
    found[key] = tuple(dict.fromkeys((*found.get(key, ()), *marks)))


def _sources(
    reading: Reading, source: int, marks: tuple[str, ...], loop: bool = False, seen=frozenset()
) -> Iterator[tuple[int, tuple[str, ...], bool]]:
    if source >= 0:
        yield source, marks, loop
    elif source not in seen:
        for value, again in zip(reading.ports[source], (False, True), strict=True):
            if value.source is not None:
                known = (*value.marks, *marks)
                yield from _sources(reading, value.source, known, loop or again, seen | {source})


def _idle(reading: Reading, found: Found) -> int | None:
    """A node without parameters that does not join anything; None: there is none."""
    into: dict[int, set[int]] = {}
    ends: dict[int, bool] = {}
    for source, target, _ in found:
        into.setdefault(target, set()).add(source)
        ends[source] = ends[target] = True
    for i, box in enumerate(reading.boxes):
        plain = box.kind not in ("layer", "input", "output", "matmul") and not box.paths
        if plain and i in ends and len(into.get(i, set()) - {i}) < 2:
            return i
    return None

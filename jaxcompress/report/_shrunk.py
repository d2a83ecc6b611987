"""What a removal of channels, heads or blocks gained: sizes, operations and time."""

import math
import statistics
import time as clock
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxcompress import _check, arrays, tracing, tree
from jaxcompress._types import PyTree
from jaxcompress.report._leaves import array_leaves, require


class ShrunkRow(NamedTuple):
    """A leaf before and after.

    Attributes:
        path: of the leaf.
        before: its shape; None where there was none.
        after: its shape; None where it is gone.
        parameters: entries before and after; of a compressed leaf those of the dense array.
        nbytes: stored bytes before and after.
    """

    path: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    parameters: tuple[int, int]
    nbytes: tuple[int, int]


class Shrunk(NamedTuple):
    """Two networks side by side; prints as tables (by rich).

    Attributes:
        rows: of each leaf, in the order of the params before.
        parameters: entries of all leaves, before and after, as are all that follow.
        nbytes: stored bytes.
        flops: operations of a call, by `jc.cost`: counted, not measured.
        seconds: median time of a compiled call, measured; None where it was not.
    """

    rows: list[ShrunkRow]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    flops: tuple[int, int]
    seconds: tuple[float, float] | None

    @property
    def speedup(self) -> float | None:
        """How many times faster a call is; None where it was not measured."""
        return None if self.seconds is None else self.seconds[0] / self.seconds[1]

    def __str__(self) -> str:
        from jaxcompress.report._table import plain_console, printed

        require("shrunk", "rich")
        return printed(plain_console(), self.__rich__())

    def __rich__(self) -> Any:
        from jaxcompress.report._shrunk_table import shrunk_table

        return shrunk_table(self)


def shrunk(
    fn: Callable[..., PyTree],
    params: PyTree,
    small_fn: Callable[..., PyTree],
    small_params: PyTree,
    *args: Any,
    time: bool = True,
    repeats: int = 20,
    **kwargs: Any,
) -> Shrunk:
    """Compares a function with a smaller one: each leaf, and in total also FLOPs and latency.

    Args:
        fn: any function `fn(params, *args, **kwargs)`.
        params: its params: arrays, compressed arrays or `jax.ShapeDtypeStruct`s.
        small_fn: the small function, from `jc.shrink` for example.
        small_params: its params. Leaves may be smaller, None, or not be there.
        *args: arguments of both.
        time: static. Whether to run both, which takes arrays: with abstract ones nothing is
            measured.
        repeats: static. How many calls of each the median is of, after two to warm up; the
            functions take turns.
        **kwargs: further arguments of both.

    Returns:
        A `Shrunk`. Only its `seconds` are measured, on the default device, compilation left out.

    Raises:
        ImportError: when printed: rich is not installed.
        TypeError: a function can't be called.
        ValueError: `repeats` is less than 1, or a tree has two leaves of one path.

    Cost: two traces, and with `time` two compilations and `2 (repeats + 2)` calls.

    Examples:
        >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> wide = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
        >>> narrow = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2))}
        >>> print(jc.report.shrunk(fn, wide, fn, narrow, jnp.ones((1, 4)), time=False))
         leaf   before  after  params  after   kept
         ───────────────────────────────────────────
         down   8×2     6×2        16     12  75.0%
         up     4×8     4×6        32     24  75.0%
         ───────────────────────────────────────────
         total                     48     36  75.0%
                     before  after  ratio
         ─────────────────────────────────
         parameters      48     36  1.33×
         bytes        192 B  144 B  1.33×
         FLOPs          104     78  1.33×
    """
    _check.integer("shrunk", "repeats", repeats, 1)
    rows = _rows(params, small_params)
    costs = [
        tracing.cost(f, p, *args, **kwargs) for f, p in ((fn, params), (small_fn, small_params))
    ]
    both = ((fn, params), (small_fn, small_params))
    abstract = [x for x in jax.tree.leaves((params, small_params, args, kwargs)) if _abstract(x)]
    seconds = None
    if time and not abstract:
        first, second = (_compiled(f, p, args, kwargs) for f, p in both)
        seconds = _medians(first, second, repeats)
    return Shrunk(
        rows,
        _sums([row.parameters for row in rows]),
        _sums([row.nbytes for row in rows]),
        (costs[0].flops, costs[1].flops),
        seconds,
    )


def sizes(
    small_params: PyTree, params: PyTree
) -> dict[str, tuple[tuple[int, ...] | None, tuple[int, ...] | None]]:
    """The shapes that changed, by path: what to write into the definition of a smaller module.

    Args:
        small_params: any pytree of arrays or `jax.ShapeDtypeStruct`s.
        params: the one before.

    Returns:
        `{path: (shape before, shape after)}` of the leaves whose shapes differ, in the order of
        `params`; None where there is no such leaf.

    Raises:
        ValueError: a tree has two leaves of one path.

    Examples:
        >>> before = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> after = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        >>> jc.report.sizes(after, before)
        {'dense/bias': ((8,), (6,)), 'dense/kernel': ((4, 8), (4, 6))}
    """
    rows = _rows(params, small_params, "sizes")
    return {row.path: (row.before, row.after) for row in rows if row.before != row.after}


def _rows(params: PyTree, small_params: PyTree, function: str = "shrunk") -> list[ShrunkRow]:
    before, after = array_leaves(params), array_leaves(small_params)
    for name, leaves in (("params", before), ("small_params", after)):
        tree.require_distinct(function, name, [path for path, _ in leaves])
    one, two = dict(before), dict(after)
    return [_row(path, one.get(path), two.get(path)) for path in {**one, **two}]


def _row(path: str, first: Any, second: Any) -> ShrunkRow:
    shapes = [None if x is None else tuple(x.shape) for x in (first, second)]
    counts = [0 if shape is None else math.prod(shape) for shape in shapes]
    stored = [0 if x is None else tree.nbytes(x) for x in (first, second)]
    return ShrunkRow(path, shapes[0], shapes[1], (counts[0], counts[1]), (stored[0], stored[1]))


def _sums(pairs: list[tuple[int, int]]) -> tuple[int, int]:
    return sum(a for a, _ in pairs), sum(b for _, b in pairs)


def _abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) or _check.is_traced(x)


def _compiled(
    fn: Callable[..., PyTree], params: PyTree, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """A call of the jitted function; what is no array is static."""
    leaves = [leaf for _, leaf in tree.leaves_with_paths(params)]
    if any(arrays.is_compressed(leaf) for leaf in leaves):
        fn = tracing.lift(fn)
    flat, treedef = jax.tree.flatten((params, args, kwargs))
    places = [i for i, leaf in enumerate(flat) if hasattr(leaf, "shape")]

    def call(given):
        filled = list(flat)
        for i, leaf in zip(places, given, strict=True):
            filled[i] = leaf
        params, args, kwargs = jax.tree.unflatten(treedef, filled)
        results = jax.tree.leaves(fn(params, *args, **kwargs))
        return [x for x in results if hasattr(x, "shape")]

    # On the device beforehand: moving is no part of the call.
    given = jax.block_until_ready([jax.numpy.asarray(flat[i]) for i in places])
    jitted = jax.jit(call)
    return lambda: jax.block_until_ready(jitted(given))


def _medians(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int
) -> tuple[float, float]:
    """Seconds of a call of each; in turns, so that both meet the same load."""
    for _ in range(2):
        first()
        second()
    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for call, taken in zip((first, second), times, strict=True):
            start = clock.perf_counter()
            call()
            taken.append(clock.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])

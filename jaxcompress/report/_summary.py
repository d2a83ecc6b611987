"""One row of facts per leaf: size, zeros, bits, values, rank, bytes and error."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.report._leaves import host, paired_leaves, unit_matrix
from jaxcompress.report._pattern import pattern


class LeafRow(NamedTuple):
    """The facts of one leaf, or of all leaves together.

    A fact is None where it is not defined: those that need data for an abstract leaf, the
    last ones with one tree, shape and rank and number of values of a total.

    Attributes:
        path: as `jaxcompress.tree` writes it, `"encoder/0/kernel"`; `"total"` for the total.
        shape: of the dense array.
        dtype: name of the dense dtype; empty for the total.
        kind: `"dense"`, or the nested types, `"Quantized(NM)"`; empty for the total.
        parameters: entries of the dense array, zeros included.
        nonzero: how many of them are not exactly zero; NaN is not.
        sparsity: fraction of exact zeros, in [0, 1]; 0 for an empty leaf.
        bits: average stored bits of a parameter, `8 nbytes / parameters`, indices and scales
            included; 0 for an empty leaf.
        distinct: number of distinct values; all NaN count as one, and both zeros.
        rank: numerical rank of the 2-D view that joins all axes but the last; the number of
            columns of a low-rank array. None below two dimensions, for integers and where a
            value is not finite.
        nbytes: stored bytes.
        error: `|after - before|_F / |before|_F`, with 0 / 0 = 0.
        before_nbytes: stored bytes before.
        ratio: `before_nbytes / nbytes`, with 0 / 0 = 1.
        pattern: of the zeros, as found: `"4×4 blocks"` (each zero as a whole or without a zero),
            `"2:4 along axis -2"`, `"unstructured"`, `"all zero"`, or empty without zeros. Of the
            total what all leaves with zeros have in common, else `"mixed"`.
        overlap: of the entries that are not zero before or after, the part that is in both
            (Jaccard's index), with 0 / 0 = 1.
    """

    path: str
    shape: tuple[int, ...] | None
    dtype: str
    kind: str
    parameters: int
    nonzero: int | None
    sparsity: float | None
    bits: float
    distinct: int | None
    rank: int | None
    nbytes: int
    error: float | None
    before_nbytes: int | None
    ratio: float | None
    pattern: str | None = ""
    overlap: float | None = None


class Summary(NamedTuple):
    """Rows in the order of the leaves, and their total; prints as a table (by rich)."""

    rows: list[LeafRow]
    total: LeafRow

    def __str__(self) -> str:
        from jaxcompress.report._table import text

        return text(self)

    def __rich__(self) -> Any:
        from jaxcompress.report._table import table

        return table(self)

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        from jaxcompress.report._table import text

        return f'<pre style="line-height:1.2">{_escape(text(self))}</pre>'


def summary(params: PyTree, after: PyTree | None = None, *, ranks: bool = True) -> Summary:
    r"""Sizes, zeros, bits, ranks and bytes of every leaf; with two trees also the error.

    .. math:: e = \|W_{after} - W_{before}\|_F \, / \, \|W_{before}\|_F

    Leaves that are no arrays (functions, strings, None) and random keys are left out. The
    numerical rank is NumPy's: singular values above
    :math:`\sigma_1 \max(m, n)\,\epsilon` count, where :math:`\epsilon` is that of float64
    for float64 leaves, else of float32, so the rounding of a bfloat16 leaf counts as rank.

    Args:
        params: any pytree of arrays, compressed arrays (`jaxcompress.arrays`) or
            `jax.ShapeDtypeStruct`, of any dtype and shape.
        after: None, or a tree with the same paths and dense shapes. The rows then describe
            `after` and compare it with `params`; either may hold compressed arrays.
        ranks: static. False leaves out the singular values, the expensive part; a low-rank
            array still tells its number of columns.

    Returns:
        A `Summary` of plain Python numbers and its total. The total's error is the global
        one, over floating-point leaves only: a step counter says nothing of weights. A fact
        that some leaf does not have for want of data is None in the total.

    Raises:
        ValueError: the trees have other paths or shapes, or other processes hold a part.
        TypeError: a leaf is traced.

    Cost: each leaf is densified and pulled to the host once, one at a time; there a sort
    and, unless `ranks=False`, one SVD, :math:`O(mn \min(m, n))`.

    Examples:
        >>> before = {"w": np.array([[1.0, 2.0], [0.0, 3.0]], np.float32)}
        >>> after = {"w": np.array([[0.0, 2.0], [0.0, 3.0]], np.float32)}
        >>> row = summary(before, after).rows[0]
        >>> row.sparsity, row.distinct, row.rank, row.nbytes, round(row.error, 4)
        (0.5, 3, 1, 16, 0.2673)
        >>> print(summary(before))
         leaf   shape  stored as  params  zeros  bytes
         ──────────────────────────────────────────────
         w        2×2  float32         4  25.0%   16 B
         ──────────────────────────────────────────────
         total                         4  25.0%   16 B
    """
    rows, pairs = [], []
    for path, first, second in paired_leaves("summary", params, after):
        row, pair = _row(path, first, second, ranks)
        rows.append(row)
        pairs.append(pair)
    return Summary(rows, _total(rows, pairs, after is not None))


class _Pair(NamedTuple):
    """What a total needs of two leaves: errors and norms, and entries that are not zero."""

    square: float
    norm: float
    both: int
    either: int


def _row(path: str, first: Any, second: Any | None, ranks: bool) -> tuple[LeafRow, _Pair | None]:
    """The row of one leaf, and how it compares; None with one tree or for want of data."""
    leaf = first if second is None else second
    parameters, nbytes = math.prod(leaf.shape), tree.nbytes(leaf)
    dense = host("summary", path, leaf)
    nonzero = None if dense is None else int(np.count_nonzero(dense))
    before_nbytes = None if second is None else tree.nbytes(first)
    pair = None
    if second is not None:
        before = host("summary", path, first)
        pair = None if dense is None or before is None else _compared(before, dense)
    row = LeafRow(
        path=path,
        shape=tuple(leaf.shape),
        dtype=jnp.dtype(leaf.dtype).name,
        kind=_kind(leaf),
        parameters=parameters,
        nonzero=nonzero,
        sparsity=_sparsity(nonzero, parameters),
        bits=8 * nbytes / parameters if parameters else 0.0,
        distinct=None if dense is None else len(np.unique(dense)),
        rank=_rank(leaf, dense, ranks),
        nbytes=nbytes,
        error=None if pair is None else _relative(pair.square, pair.norm),
        before_nbytes=before_nbytes,
        ratio=_ratio(before_nbytes, nbytes),
        pattern=None if dense is None else pattern(dense),
        overlap=None if pair is None else _overlap(pair.both, pair.either),
    )
    weighs = any(jnp.issubdtype(x.dtype, jnp.inexact) for x in (first, leaf))
    return row, (pair if weighs else _Pair(0.0, 0.0, 0, 0))


def _total(rows: list[LeafRow], pairs: list[_Pair | None], two: bool) -> LeafRow:
    parameters = sum(row.parameters for row in rows)
    nbytes = sum(row.nbytes for row in rows)
    nonzero = _sum([row.nonzero for row in rows])
    before_nbytes = _sum([row.before_nbytes for row in rows]) if two else None
    known = [pair for pair in pairs if pair is not None]
    all_known = two and len(known) == len(pairs)
    sums = (
        _Pair(*(sum(column) for column in zip(*known, strict=True)))
        if known
        else _Pair(0.0, 0.0, 0, 0)
    )
    found = {row.pattern for row in rows} - {""}
    return LeafRow(
        path="total",
        shape=None,
        dtype="",
        kind="",
        parameters=parameters,
        nonzero=nonzero,
        sparsity=_sparsity(nonzero, parameters),
        bits=8 * nbytes / parameters if parameters else 0.0,
        distinct=None,
        rank=None,
        nbytes=nbytes,
        error=_relative(sums.square, sums.norm) if all_known else None,
        before_nbytes=before_nbytes,
        ratio=_ratio(before_nbytes, nbytes),
        pattern="mixed" if len(found) > 1 else found.pop() if found else "",
        overlap=_overlap(sums.both, sums.either) if all_known else None,
    )


def _sum(values: list[Any]) -> int | None:
    return None if any(value is None for value in values) else sum(values)


def _sparsity(nonzero: int | None, parameters: int) -> float | None:
    return None if nonzero is None else 1.0 - nonzero / parameters if parameters else 0.0


def _ratio(before: int | None, after: int) -> float | None:
    if before is None:
        return None
    return before / after if after else (math.inf if before else 1.0)


def _relative(square: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if square == 0.0 else math.nan if math.isnan(square) else math.inf
    return math.sqrt(square / norm)


def _overlap(both: int, either: int) -> float:
    return both / either if either else 1.0


def _compared(before: np.ndarray, after: np.ndarray) -> _Pair:
    one, two = before != 0, after != 0
    both, either = (int(np.count_nonzero(x)) for x in (one & two, one | two))
    return _Pair(*_squares(before, after), both, either)


def _squares(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Squared error and squared norm in float64, a slice at a time to spare memory."""
    square = norm = 0.0
    wide = np.complex128 if np.iscomplexobj(before) or np.iscomplexobj(after) else np.float64
    x, y, step = before.reshape(-1), after.reshape(-1), 1 << 22
    with np.errstate(invalid="ignore", over="ignore"):
        for i in range(0, x.size, step):
            a, b = x[i : i + step].astype(wide), y[i : i + step].astype(wide)
            square += float(np.sum(np.abs(b - a) ** 2))
            norm += float(np.sum(np.abs(a) ** 2))
    return square, norm


def _rank(leaf: Any, dense: np.ndarray | None, ranks: bool) -> int | None:
    if isinstance(leaf, arrays.LowRank):
        return int(leaf.v.shape[0])
    if not ranks or dense is None or dense.ndim < 2 or not np.issubdtype(dense.dtype, np.inexact):
        return None
    if not dense.size:
        return 0
    if not np.all(np.isfinite(dense)):
        return None
    return int(np.linalg.matrix_rank(unit_matrix(dense)))


def _kind(leaf: Any) -> str:
    """`Quantized(NM)`: the type of a compressed array and, in brackets, of those it holds."""
    if not tree.is_array_like(leaf):
        return "dense"
    name = type(leaf).__name__
    inner = []
    for field in dataclasses.fields(leaf) if dataclasses.is_dataclass(leaf) else ():
        part = getattr(leaf, field.name)
        if tree.is_array_like(part) and not isinstance(part, arrays.Packed):
            inner.append(_kind(part))
    return f"{name}({', '.join(dict.fromkeys(inner))})" if inner else name


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

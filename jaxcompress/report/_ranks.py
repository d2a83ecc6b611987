"""What ranks cost: each leaf with its rank, its parameters, its predicted error and estimates."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxcompress import _check, arrays, tree
from jaxcompress._types import PyTree
from jaxcompress.factorization import (
    RankAllocation,
    energy_rank,
    evbmf_rank,
    gavish_donoho_rank,
    stable_rank,
)
from jaxcompress.report._leaves import array_leaves, require, unit_matrix
from jaxcompress.report._panels import concrete
from jaxcompress.report._summary import _escape
from jaxcompress.report._table import BLANK, _error, path_name, plain_console, printed


class RankRow(NamedTuple):
    r"""One leaf, or all together.

    Attributes:
        path: as `jaxcompress.tree` writes it; `"total"` for the total.
        shape: of the leaf; None for the total.
        full: min(m, n) of the leaf as a matrix of `prod(shape[:-1])` by `shape[-1]`; 0 for the
            total.
        rank: what was chosen; `full` where the leaf stays as it is, 0 for the total.
        dense: whether the leaf is stored without factors, as `jc.pack` does where they are
            not smaller.
        before: entries of the leaf.
        parameters: :math:`r\,(m + n)`, or `before` where `dense`.
        loss: predicted squared error, :math:`\sum_{i > r} s_i^2`.
        error: :math:`\sqrt{\text{loss} / \sum_i s_i^2}`, with 0 / 0 = 0.
        energy: the rank that holds the fraction `Ranks.energy` of the squared norm.
        evbmf: `jc.factorization.evbmf_rank`.
        gavish_donoho: `jc.factorization.gavish_donoho_rank`.
        stable: `jc.factorization.stable_rank`.
        spectrum: the singular values in float64, falling.

    `loss` and what follows are None for a leaf with a value that is not finite; those after
    `error` for the total too.
    """

    path: str
    shape: tuple[int, ...] | None
    full: int
    rank: int
    dense: bool
    before: int
    parameters: int
    loss: float | None
    error: float | None
    energy: int | None = None
    evbmf: int | None = None
    gavish_donoho: int | None = None
    stable: float | None = None
    spectrum: np.ndarray | None = None


class Ranks(NamedTuple):
    """The rows, in tree order; prints as a table (by rich)."""

    rows: list[RankRow]
    total: RankRow
    energy: float

    def __str__(self) -> str:
        require("ranks", "rich")
        return printed(plain_console(), _table(self))

    def __rich__(self) -> Any:
        return _table(self)

    def _repr_html_(self) -> str:
        """Shown by notebooks."""
        return f'<pre style="line-height:1.2">{_escape(str(self))}</pre>'


def ranks(
    params: PyTree,
    chosen: RankAllocation | Mapping[str, Any] | None = None,
    spectra: Mapping[str, Any] | None = None,
    *,
    where: tree.Where = tree.is_weight,
    energy: float = 0.9,
) -> Ranks:
    r"""Every matrix with its rank, its parameters before and after, and what the rank costs.

    Args:
        params: any pytree; compressed leaves are densified.
        chosen: what `jc.factorization.allocate_ranks` returned, or a dict from paths to ranks;
            a leaf that it does not name stays as it is. None: what is stored, the rank of an
            `arrays.LowRank`.
        spectra: from paths to the singular values that count, as `allocate_ranks` takes them,
            such as those of whitened leaves. Of other paths they are those of the leaf.
        where: static. Which leaves, see `jaxcompress.tree.select`; those below two dimensions are
            left out.
        energy: the fraction of the squared norm, 0 to 1, of one of the estimates.

    Returns:
        A `Ranks` of plain Python numbers. `jc.report.rank_figure` draws it. Errors are without
        the importance that an allocation may have had.

    Raises:
        ValueError: nothing is chosen; a path that there is not; a rank below 0; a spectrum
            without min(m, n) values.
        TypeError: a leaf is traced or abstract; a rank is not an integer.

    Cost: one SVD per leaf without a spectrum, on the host, and the estimates.

    Examples:
        >>> params = {"a": jnp.diag(jnp.array([3.0, 2.0, 0.1, 0.1])), "b": jnp.eye(4)}
        >>> made = jc.report.ranks(params, {"a": 1})
        >>> made.rows[0].parameters, round(made.rows[0].loss, 2), made.rows[1].dense
        (8, 4.02, True)
        >>> print(made)
         leaf   shape   rank  params  after  squared error  relative  90%  EVBMF  G–D  stable
         ─────────────────────────────────────────────────────────────────────────────────────
         a        4×4    1/4      16      8           4.02      0.56    2      0    0     1.4
         b        4×4  dense      16     16              0         0    4      0    0     4.0
         ─────────────────────────────────────────────────────────────────────────────────────
         total                    32     24           4.02      0.49
    """
    _check.number("ranks", "energy", energy, 0, 1)
    hits = tree.select(params, where, function="ranks")
    paths = {path for path, hit in tree.leaves_with_paths(hits) if hit}
    leaves = [(p, w) for p, w in array_leaves(params) if p in paths and len(w.shape) >= 2]
    if not leaves:
        rule = "choose an array of at least two dimensions"
        raise ValueError(_check.message("ranks", "where", rule, repr(where)))
    given = _given(chosen)
    for name, mapping in (("chosen", given), ("spectra", spectra or {})):
        others = sorted(set(mapping) - {path for path, _ in leaves})
        if others:
            rule, fix = "have paths of chosen leaves", f"They are {[path for path, _ in leaves]}."
            raise ValueError(_check.message("ranks", name, rule, others, fix))
    rows, norms = [], []
    for path, leaf in leaves:
        m, n = math.prod(leaf.shape[:-1]), leaf.shape[-1]
        s = _spectrum(path, leaf, (spectra or {}).get(path), min(m, n))
        rank = given.get(path)
        if chosen is None and isinstance(leaf, arrays.LowRank):
            rank = leaf.rank
        row, norm = _row(path, leaf, s, rank, float(energy))
        rows.append(row)
        norms.append(norm)
    return Ranks(rows, _total(rows, norms), float(energy))


def _given(chosen: Any) -> dict[str, int]:
    """Ranks by path."""
    if isinstance(chosen, RankAllocation):
        return {path: int(rank) for path, rank in chosen.ranks.items()}
    if chosen is not None and not isinstance(chosen, Mapping):
        rule = "be a RankAllocation or a dict from paths to ranks"
        raise TypeError(_check.message("ranks", "chosen", rule, _check.describe(chosen)))
    out = {}
    for path, rank in (chosen or {}).items():
        value = np.asarray(rank)
        if value.shape != () or not np.issubdtype(value.dtype, np.integer):
            got = _check.describe(rank)
            raise TypeError(_check.message("ranks", "chosen", "be an integer", got, path=path))
        if value < 0:
            raise ValueError(_check.message("ranks", "chosen", "be at least 0", rank, path=path))
        out[path] = int(value)
    return out


def _spectrum(path: str, leaf: Any, given: Any, full: int) -> np.ndarray | None:
    """The singular values in float64; None where a value is not finite."""
    if given is not None:
        s = np.asarray(given).astype(np.float64)
        if s.shape != (full,):
            rule, got = f"have min(m, n) = {full} values", _check.describe(given)
            raise ValueError(_check.message("ranks", "spectra", rule, got, path=path))
        return s if np.isfinite(s).all() else None
    values = concrete("ranks", path, leaf)
    if not np.isfinite(values).all():
        return None
    if not values.any():
        return np.zeros(full)
    matrix = unit_matrix(values)
    unit = float(np.abs(values).max()) / float(np.abs(matrix).max())
    return np.linalg.svd(matrix, compute_uv=False).astype(np.float64) * unit


def _row(
    path: str, leaf: Any, s: np.ndarray | None, rank: int | None, energy: float
) -> tuple[RankRow, float | None]:
    """The facts of a leaf, and its squared norm."""
    m, n = math.prod(leaf.shape[:-1]), leaf.shape[-1]
    full = min(m, n)
    kept = full if rank is None else min(rank, full)
    # At full rank, as an allocation has it for a dense leaf, factors are never smaller.
    dense = kept * (m + n) >= m * n
    parameters = m * n if dense else kept * (m + n)
    row = RankRow(path, tuple(leaf.shape), full, kept, dense, m * n, parameters, None, None)
    if s is None:
        return row, None
    loss, norm = (float(np.sum(np.square(x))) for x in (s[kept:], s))
    unit = float(s.max(initial=0.0)) or 1.0
    scaled = jnp.asarray((s / unit).astype(np.float32))
    row = row._replace(
        loss=loss,
        error=math.sqrt(loss / norm) if norm else 0.0,
        energy=int(energy_rank(scaled, energy)),
        evbmf=int(evbmf_rank(scaled, (m, n))),
        gavish_donoho=int(gavish_donoho_rank(scaled, (m, n))),
        stable=float(stable_rank(scaled)),
        spectrum=s,
    )
    return row, norm


def _total(rows: list[RankRow], norms: list[float | None]) -> RankRow:
    known = [norm for norm in norms if norm is not None]
    loss = error = None
    if len(known) == len(rows):
        loss, norm = sum(row.loss or 0.0 for row in rows), sum(known)
        error = math.sqrt(loss / norm) if norm else 0.0
    before, after = (sum(getattr(row, name) for row in rows) for name in ("before", "parameters"))
    dense = all(row.dense for row in rows)
    return RankRow("total", None, 0, 0, dense, before, after, loss, error)


def _table(made: Ranks) -> Any:
    """A `rich.table.Table` with one row per leaf and the total below."""
    require("ranks", "rich")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = [
        ("leaf", lambda row: path_name(row.path)),
        ("shape", lambda row: "×".join(map(str, row.shape or ()))),
        ("rank", _rank),
        ("params", lambda row: f"{row.before:,}"),
        ("after", lambda row: f"{row.parameters:,}"),
        ("squared error", lambda row: BLANK if row.loss is None else f"{row.loss:.3g}"),
        ("relative", lambda row: _error(row.error)),
        (f"{100 * made.energy:.3g}%", lambda row: _estimate(row, row.energy)),
        ("EVBMF", lambda row: _estimate(row, row.evbmf)),
        ("G–D", lambda row: _estimate(row, row.gavish_donoho)),
        ("stable", lambda row: _estimate(row, row.stable)),
    ]
    out = Table(box=box.SIMPLE, show_footer=True, padding=(0, 1, 0, 0))
    for name, cell in columns:
        out.add_column(
            Text(name),
            footer=Text(cell(made.total)),
            justify="left" if name == "leaf" else "right",
            no_wrap=name != "leaf",
            overflow="fold",
            style="cyan" if name == "leaf" else "",
            footer_style="bold",
        )
    for row in made.rows:
        out.add_row(*(Text(cell(row)) for _, cell in columns))
    return out


def _rank(row: RankRow) -> str:
    if row.shape is None:
        return ""
    said = [] if row.dense and row.rank == row.full else [f"{row.rank}/{row.full}"]
    return ", ".join(said + (["dense"] if row.dense else []))


def _estimate(row: RankRow, value: float | None) -> str:
    if row.shape is None:
        return ""
    return BLANK if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

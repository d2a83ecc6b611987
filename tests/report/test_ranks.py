"""Tables and figures of ranks against NumPy float64."""

import io
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

import jaxcompress as jc
from jaxcompress.report import Ranks, rank_figure, ranks
from jaxcompress.report._canvas import COLORS

SHAPES = {"conv": (3, 3, 2, 8), "deep/up": (20, 12), "deep/wide": (6, 20)}


def weights(*shape, seed=0):
    rows = int(np.prod(shape[:-1]))
    rng = np.random.default_rng(seed)
    low = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, shape[-1]))
    return (low + 0.1 * rng.normal(size=(rows, shape[-1]))).reshape(shape).astype(np.float32)


def tree():
    up, wide = weights(20, 12), weights(6, 20, seed=1)
    return {
        "conv": weights(3, 3, 2, 8, seed=2),
        "deep": {"up": up, "wide": wide, "bias": np.ones(12, np.float32)},
    }


def spectrum(w):
    w = np.asarray(w, np.float64)
    return np.linalg.svd(w.reshape(-1, w.shape[-1]), compute_uv=False)


def spectra_of(params):
    return {path: spectrum(w) for path, w in jc.tree.leaves_with_paths(params) if np.ndim(w) > 1}


@pytest.fixture(scope="module")
def allocated():
    params = tree()
    shapes = {"conv": (18, 8), "deep/up": (20, 12), "deep/wide": (6, 20)}
    s = {path: x.astype(np.float32) for path, x in spectra_of(params).items()}
    allocation = jc.factorization.allocate_ranks(s, shapes, fraction=0.7)
    return params, allocation, ranks(params, allocation)


def test_rows_of_an_allocation(allocated):
    params, allocation, made = allocated
    assert [row.path for row in made.rows] == list(SHAPES)
    assert {row.dense for row in made.rows} == {True, False}
    for row in made.rows:
        s, r = spectra_of(params)[row.path], int(allocation.ranks[row.path])
        m, n = int(np.prod(row.shape[:-1])), row.shape[-1]
        assert (row.shape, row.full, row.rank) == (SHAPES[row.path], min(m, n), r)
        assert row.dense == bool(allocation.dense[row.path])
        assert (row.before, row.parameters) == (m * n, m * n if row.dense else r * (m + n))
        np.testing.assert_allclose(row.spectrum, s, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(row.loss, np.sum(s[r:] ** 2), rtol=1e-5)
        np.testing.assert_allclose(row.error, np.sqrt(np.sum(s[r:] ** 2) / np.sum(s**2)), rtol=1e-5)
        held = np.cumsum(s**2) / np.sum(s**2)
        assert row.energy == int(np.argmax(held >= 0.9)) + 1
        np.testing.assert_allclose(row.stable, np.sum(s**2) / s[0] ** 2, rtol=1e-5)
        assert row.evbmf == int(jc.factorization.evbmf_rank(s.astype(np.float32), (m, n)))
        found = jc.factorization.gavish_donoho_rank(s.astype(np.float32), (m, n))
        assert row.gavish_donoho == int(found)
    assert {row.gavish_donoho for row in made.rows} == {2, 3}
    total = made.total
    np.testing.assert_allclose(total.loss, allocation.loss, rtol=1e-4)
    assert total.parameters == int(allocation.cost)
    assert total.before == sum(row.before for row in made.rows)
    norm = sum(np.sum(s**2) for s in spectra_of(params).values())
    np.testing.assert_allclose(total.error, np.sqrt(total.loss / norm), rtol=1e-6)


def test_predicted_is_measured_and_counts_are_those_of_pack():
    params, chosen = tree(), {"conv": 2, "deep/up": 7, "deep/wide": 9}
    made = ranks(params, chosen)
    parts = {path: jc.low_rank(r) for path, r in chosen.items()}
    p = jc.partition(parts)
    packed, after = jc.pack(p, params), jc.compress(p, params)
    for row, before, now, stored in zip(
        made.rows,
        *(
            [w for _, w in jc.tree.leaves_with_paths(t) if w.ndim > 1]
            for t in (params, after, packed)
        ),
        strict=True,
    ):
        measured = np.sum(np.square(np.asarray(now, np.float64) - before))
        np.testing.assert_allclose(row.loss, measured, rtol=1e-4, atol=1e-8)
        assert row.parameters == stored.nbytes // 4
        assert row.dense == (not jc.arrays.is_compressed(stored))
    # 7 (20 + 12) is not below 20 x 12, nor is rank 9 above the full one.
    assert [(row.rank, row.dense) for row in made.rows] == [(2, False), (7, False), (6, True)]
    # Without ranks: what is stored.
    stored = ranks(packed)
    assert [(row.rank, row.dense) for row in stored.rows] == [(2, False), (7, False), (6, True)]
    assert all(row.loss < 1e-8 for row in stored.rows)
    assert all(row.dense and row.rank == row.full for row in ranks(params).rows)


def test_given_spectra_and_scales_count():
    params = {"w": np.diag([3.0, 2.0, 1.0]).astype(np.float32) * 1e30, "x": np.eye(3)}
    made = ranks(params, {"w": 1, "x": 1})
    np.testing.assert_allclose(made.rows[0].loss, 5e60, rtol=1e-5)
    made = ranks(params, {"w": 1, "x": 1}, {"w": jnp.array([4.0, 1.0, 0.5])}, energy=0.99)
    assert made.rows[0].loss == 1.25
    assert (made.rows[0].energy, made.rows[1].energy) == (3, 3)
    assert made.rows[1].loss == 2.0
    assert made.rows[0].stable == pytest.approx(17.25 / 16)


def test_leaves_without_facts():
    params = {
        "empty": np.zeros((0, 4), np.float32),
        "nan": np.array([[np.nan, 1.0], [2.0, 3.0]], np.float32),
        "zero": jnp.zeros((8, 9), jnp.bfloat16),
        "half": jnp.asarray(weights(9, 8), jnp.bfloat16),
    }
    made = ranks(params, {"zero": 1, "half": 2, "nan": 1})
    rows = {row.path: row for row in made.rows}
    assert (rows["empty"].parameters, rows["empty"].loss, rows["empty"].dense) == (0, 0.0, True)
    assert rows["nan"].loss is rows["nan"].evbmf is rows["nan"].spectrum is None
    assert (rows["zero"].loss, rows["zero"].error, rows["zero"].stable) == (0.0, 0.0, 0.0)
    want = spectrum(np.asarray(params["half"], np.float32))
    np.testing.assert_allclose(rows["half"].loss, np.sum(want[2:] ** 2), rtol=1e-4)
    assert made.total.loss is made.total.error is None
    assert re.search(r"nan +2×2 +1/2, dense +4 +4 +– +– +– +– +– +–", str(made))
    figure = rank_figure(made)
    figure.draw_without_rendering()
    for path, reason in (("nan", "not finite"), ("zero", "are zero"), ("empty", "is empty")):
        lines = figure.get_supxlabel().splitlines()
        assert any(f": {path}," in line and reason in line for line in lines)
    nothing = rank_figure(ranks({"z": np.zeros((2, 2))}))
    nothing.draw_without_rendering()
    assert not nothing.axes[0].lines


def test_the_table(allocated):
    _, _, made = allocated
    text = str(made)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "\x1b" not in text
    for row in made.rows:
        line = next(line for line in lines if line.strip().startswith(row.path))
        assert ("dense" if row.dense else f"{row.rank}/{row.full}") in line
        assert f"{row.loss:.3g}" in line
        assert f"{row.stable:.1f}" in line
    total = next(line for line in lines if "total" in line)
    assert f"{made.total.before:,}" in total
    assert f"{made.total.loss:.3g}" in total
    assert "90%" in lines[0]
    stream = io.StringIO()
    Console(file=stream, width=110).print(made)
    assert "G–D" in stream.getvalue()
    assert "deep/up" in made._repr_html_()
    assert "[red]x" in str(ranks({"[red]x": np.ones((2, 2))}))


def test_the_figure_marks_the_chosen_ranks(allocated):
    params, _, made = allocated
    figure = rank_figure(made)
    figure.draw_without_rendering()
    decay, energy, estimates = figure.axes
    assert decay.get_yscale() == "log"
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "singular values",
        "cumulative energy",
        "chosen ranks and estimates",
    ]
    assert {axes.get_xlabel() for axes in figure.axes} == {"rank / full rank"}
    for row, color in zip(made.rows, COLORS, strict=False):
        s = spectra_of(params)[row.path]
        share = np.cumsum(s**2) / np.sum(s**2)
        for axes, values in ((decay, s / s[0]), (energy, share)):
            mine = [line for line in axes.lines if to_hex(line.get_color()) == color.lower()]
            dots = [line for line in mine if line.get_marker() == "o"]
            kept, rest, *_ = (line.get_data() for line in mine if line.get_marker() == "None")
            np.testing.assert_allclose(kept[1][-row.rank :], values[: row.rank], rtol=1e-4)
            if row.rank < row.full:
                (dot,) = dots
                np.testing.assert_allclose(dot.get_xdata(), row.rank / row.full)
                np.testing.assert_allclose(dot.get_ydata(), values[row.rank - 1], rtol=1e-4)
                np.testing.assert_allclose(rest[1], values[row.rank - 1 :], rtol=1e-4)
            else:
                assert not dots
    lengths = [bar.get_width() for bars in estimates.containers for bar in bars]
    assert lengths == [row.rank / row.full for row in made.rows]
    marks = [float(line.get_xdata()[0]) for line in estimates.lines]
    want = [(r.energy, r.evbmf, r.gavish_donoho, r.stable) for r in made.rows]
    full = np.array([row.full for row in made.rows])[:, None]
    np.testing.assert_allclose(np.reshape(marks, (3, 4)), np.array(want) / full)
    assert [label.get_text() for label in estimates.get_yticklabels()] == list(SHAPES)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:3] == list(SHAPES)
    assert names[3:] == ["chosen rank", "90% energy", "EVBMF", "Gavish–Donoho", "stable rank"]


def test_the_figure_of_low_ranks_and_many_leaves():
    low = (weights(9, 2) @ weights(2, 8, seed=1)).astype(np.float32)
    made = ranks({"a": low, "b": weights(3, 3), "c": weights(4, 4)}, {"a": 5, "b": 0})
    figure = rank_figure(made, limit=2)
    figure.draw_without_rendering()
    assert figure.get_supxlabel() == "The 2 largest of 3 leaves."
    decay = figure.axes[0]
    # It ends at the numerical rank, and so does the mark.
    assert max(line.get_xdata()[-1] for line in decay.lines[:3]) == 2 / 8
    figure = rank_figure(made)
    figure.draw_without_rendering()
    (zero,) = [
        line
        for line in figure.axes[1].lines
        if line.get_marker() == "o" and line.get_xdata()[0] == 0
    ]
    assert zero.get_ydata()[0] == 0


def test_refusals(monkeypatch):
    w = {"w": np.ones((3, 2)), "b": np.ones(3)}
    with pytest.raises(ValueError, match=r"ranks: `chosen` must have paths of chosen leaves.*'v'"):
        ranks(w, {"v": 1})
    with pytest.raises(ValueError, match=r"ranks: `spectra` must have paths.*'b'"):
        ranks(w, None, {"b": np.ones(3)})
    with pytest.raises(ValueError, match=r"ranks: `spectra` must have min\(m, n\) = 2 .* at 'w'"):
        ranks(w, None, {"w": np.ones(3)})
    with pytest.raises(TypeError, match=r"ranks: `chosen` must be an integer.* at 'w'"):
        ranks(w, {"w": 0.5})
    with pytest.raises(ValueError, match=r"ranks: `chosen` must be at least 0"):
        ranks(w, {"w": -1})
    with pytest.raises(TypeError, match=r"ranks: `chosen` must be a RankAllocation"):
        ranks(w, 3)
    with pytest.raises(ValueError, match=r"ranks: `where` must choose an array"):
        ranks(w, where="b")
    with pytest.raises(ValueError, match=r"ranks: `energy` must"):
        ranks(w, energy=1.5)
    with pytest.raises(TypeError, match=r"ranks: `params` must hold concrete arrays.*abstract"):
        ranks({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)})
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda w: [ranks({"w": w}), w][1])(jnp.ones((2, 2)))
    made = ranks(w)
    assert isinstance(made, Ranks)
    with pytest.raises(ValueError, match=r"rank_figure: `limit`"):
        rank_figure(made, limit=9)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"rank_figure: `matplotlib` must"):
        rank_figure(made)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"ranks: `rich` must"):
        str(made)

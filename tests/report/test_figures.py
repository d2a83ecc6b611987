import math
import sys

import jax
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_rgba
from matplotlib.text import Text

from jaxcompress.report import figure, histograms, spectra, summary, tradeoff

PNG = b"\x89PNG\r\n\x1a\n"


def trees():
    rng = np.random.default_rng(0)
    before = {"a": {"w": rng.normal(size=(8, 4)).astype(np.float32)}, "b": np.ones(4, np.float32)}
    after = {"a": {"w": np.where(before["a"]["w"] > 0, 1, 0).astype(np.float16)}, "b": before["b"]}
    return before, after


def widths(axes) -> list[list[float]]:
    return [[bar.get_width() for bar in bars] for bars in axes.containers]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_bars_of_one_tree():
    made = summary(trees()[1])
    size, zeros = figure(made).axes
    assert widths(size) == [[64, 16]]
    assert widths(zeros) == [[row.sparsity for row in made.rows]]
    assert texts(size) == ["64 B", "16 B"]
    assert [label.get_text() for label in size.get_yticklabels()] == ["a/w", "b"]
    assert size.get_ylim()[0] > size.get_ylim()[1]  # first leaf on top


def test_bars_of_two_trees():
    made = summary(*trees())
    size, zeros, error = figure(made).axes
    assert widths(size) == [[128, 16], [64, 16]]
    assert widths(zeros) == [[row.sparsity for row in made.rows]]
    assert widths(error) == [[row.error for row in made.rows]]
    assert texts(size) == ["128 B → 64 B", "16 B"]
    assert "144 B → 80 B" in size.get_xlabel()


def test_limit_keeps_the_largest_and_says_so():
    params = {"a": np.ones((2, 2)), "b": np.ones((5, 5)), "c": np.ones(3), "d": np.ones((9, 9))}
    made = figure(summary(params), limit=2)
    assert widths(made.axes[0]) == [[200, 648]]
    assert made.get_supxlabel() == "The 2 largest leaves; 2 more hold 56 B."
    with pytest.raises(ValueError, match="figure: `limit`"):
        figure(summary(params), limit=0)


def test_what_is_not_known_has_no_bar():
    made = summary({"z": np.zeros(2), "n": np.ones(2)}, {"z": np.ones(2), "n": np.full(2, np.nan)})
    error = figure(made).axes[2]
    assert widths(error) == [[0, 0]]
    assert texts(error) == ["nan", "inf"]
    zeros = figure(summary({"w": jax.ShapeDtypeStruct((2,), np.float32)})).axes[1]
    assert texts(zeros) == ["unknown"]


def test_nothing_to_draw():
    assert len(figure(summary({})).axes) == 2


POINTS = [
    ("dense", 4e6, 0.98),
    ("int8", 1e6, 0.98),
    ("int4", 5e5, 0.97),
    ("bad", 2e6, 0.90),
    ("worse", 6e5, 0.97),
    ("twin of int4", 5e5, 0.97),
    ("tiny", 1e5, 0.60),
]


def test_tradeoff_draws_points_and_front():
    made = tradeoff(POINTS, ylabel="top-1")
    (axes,) = made.axes
    assert axes.get_xscale() == "log"
    assert axes.get_ylabel() == "top-1"
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [p[1:] for p in POINTS])
    assert texts(axes) == [p[0] for p in POINTS]
    white = to_rgba("white")
    filled = [tuple(c) != white for c in axes.collections[0].get_facecolors()]
    assert filled == [False, True, True, False, False, True, True]
    x, y = axes.lines[0].get_data()
    np.testing.assert_allclose(x, [1e5, 5e5, 5e5, 1e6])
    np.testing.assert_allclose(y, [0.6, 0.97, 0.97, 0.98])


@pytest.mark.parametrize("seed", range(3))
def test_tradeoff_labels_hide_neither_each_other_nor_points(seed):
    rng = np.random.default_rng(seed)
    points = [
        (f"setting {i}", 10 ** rng.uniform(5, 7), 1 - rng.uniform(0, 1) ** 3 / 5) for i in range(14)
    ]
    points += [
        ("close one", 1e6, 0.9),
        ("close two", 1.01e6, 0.9001),
        ("the name of the last point is so long that it goes left", 1.05e7, 0.94),
        ("close three", 1e6, 0.9),
    ]
    made = tradeoff(points)
    made.draw_without_rendering()
    renderer = made.canvas.get_renderer()
    (axes,) = made.axes
    frame = axes.get_window_extent(renderer)
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]
    for i, box in enumerate(boxes):
        assert frame.x0 - 1 <= box.x0 <= box.x1 <= frame.x1 + 1
        for other in boxes[:i]:
            assert box.shrunk(0.95, 0.85).count_overlaps([other.shrunk(0.95, 0.85)]) == 0
        for point in axes.transData.transform([p[1:] for p in points]):
            assert not box.contains(*point)


@pytest.mark.parametrize("size", [1.0, 3.2, 4.4, 8.6])
def test_tradeoff_of_one_point_has_a_tick(size):
    axes = tradeoff([("one", size, 0.5)], unit="").axes[0]
    low, high = axes.get_xlim()
    assert any(low <= tick <= high for tick in axes.get_xticks())


@pytest.mark.parametrize(
    "points", [[], [("a", 0, 1)], [("a", 1, math.nan)], [("a", math.inf, 1)], [("a", 1)], [3]]
)
def test_tradeoff_refuses(points):
    with pytest.raises(ValueError, match="tradeoff: `points` must hold"):
        tradeoff(points)


def drawings():
    before, after = trees()
    return {
        "figure": lambda: figure(summary(before, after)),
        "histograms": lambda: histograms(before, after),
        "spectra": lambda: spectra(before, after),
        "tradeoff": lambda: tradeoff(POINTS),
    }


@pytest.mark.parametrize("name", ["figure", "histograms", "spectra", "tradeoff"])
def test_png_is_written_and_pyplot_knows_nothing(name, tmp_path):
    made = drawings()[name]()
    made.savefig(tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    assert made._repr_png_().startswith(PNG)
    assert not Gcf.get_all_fig_managers()


@pytest.mark.parametrize("name", ["figure", "histograms", "spectra", "tradeoff"])
def test_missing_matplotlib(name, monkeypatch):
    draw = drawings()[name]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=rf'{name}: `matplotlib`.*"jaxcompress\[report\]"'):
        draw()


def test_dollars_are_not_maths():
    params = {r"a$\q$": np.ones((3, 3)), "c$": np.ones((3, 3))}
    for made in (figure(summary(params)), histograms(params), spectra(params)):
        made.draw_without_rendering()
    tradeoff([("$x_", 1, 1), (r"$\q$", 2, 2)]).draw_without_rendering()

from math import erf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.patches import StepPatch

from jaxcompress import arrays
from jaxcompress.report import histograms, spectra


def weights(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stairs(axes) -> list[StepPatch]:
    return [patch for patch in axes.patches if isinstance(patch, StepPatch)]


def area(patch: StepPatch) -> float:
    data = patch.get_data()
    return float(np.sum(data.values * np.diff(data.edges)))


def said(axes) -> str:
    return "\n".join(text.get_text() for text in axes.texts)


def notes(made) -> str:
    return made.get_supxlabel()


def test_histogram_is_a_density_of_numpy():
    w = weights(40, 30)
    (axes,) = histograms({"w": w, "b": np.ones(3)}, bins=25).axes
    (patch,) = stairs(axes)
    heights, edges = np.histogram(w, bins=25, density=True)
    np.testing.assert_allclose(patch.get_data().values, heights, rtol=1e-6)
    np.testing.assert_allclose(patch.get_data().edges, edges)
    assert said(axes) == ""
    assert axes.get_title(loc="left") == "w"


def test_zeros_are_told_not_drawn():
    w = weights(40, 50)
    kept = np.abs(w) > np.quantile(np.abs(w), 0.9)
    (axes,) = histograms([w], [np.where(kept, w, 0)]).axes
    before, after = stairs(axes)
    assert said(axes) == "after: 90% zeros"
    assert area(before) == pytest.approx(1.0)
    assert area(after) == pytest.approx(0.1)
    # where all weights were kept, the pruned curve is the dense one
    np.testing.assert_allclose(after.get_data().values[:5], before.get_data().values[:5])
    assert axes.get_ylim()[1] < 1.2 * before.get_data().values.max()


@pytest.mark.parametrize(
    ("zeros", "text"), [(0, ""), (1, "<0.5% zeros"), (9996, "99.96% zeros"), (10000, "100% zeros")]
)
def test_words_for_zeros(zeros, text):
    w = 1 + np.arange(10000, dtype=np.float32)
    w[:zeros] = 0
    (axes,) = histograms([w.reshape(100, 100)]).axes
    assert said(axes) == text


def test_few_values_are_lines_that_follow_the_curve():
    w = weights(200, 100)
    step = 0.5
    quantized = np.clip(np.round(w / step), -8, 7) * step
    (axes,) = histograms([w], [quantized.astype(np.float32)]).axes
    assert len(stairs(axes)) == 1
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    x, heights = points.get_data()
    levels = np.unique(quantized)
    np.testing.assert_allclose(x, levels[levels != 0])
    shares = [np.mean(quantized == level) for level in x]
    np.testing.assert_allclose(heights, np.array(shares) / step)
    # averages of the normal density over each cell
    cdf = [0.5 * (1 + erf(v / sqrt(2))) for v in np.r_[x - step / 2, x + step / 2]]
    normal = (np.array(cdf[len(x) :]) - np.array(cdf[: len(x)])) / step
    np.testing.assert_allclose(heights[1:-1], normal[1:-1], atol=0.02)


def test_uneven_values_share_the_room_between_them():
    w = np.repeat(np.array([-4.0, 0.0, 1.0, 2.0, 6.0], np.float32), [1, 4, 8, 4, 3]).reshape(4, 5)
    (axes,) = histograms([w]).axes
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    shares, rooms = np.array([1, 8, 4, 3]) / 20, np.array([4.0, 1.0, 2.5, 4.0])
    np.testing.assert_allclose(points.get_ydata(), shares / rooms)
    assert said(axes) == "20% zeros"


def test_eight_bits_are_a_curve_with_a_gap_at_zero():
    w = weights(200, 100)
    codes = np.round(w / 0.05)
    (axes,) = histograms([w], [(codes * np.float32(0.05)).astype(np.float32)]).axes
    levels, counts = np.unique(codes, return_counts=True)
    assert 64 < len(levels) <= 256
    (curve,) = [line for line in axes.lines if len(line.get_xdata()) == len(levels)]
    x, heights = curve.get_data()
    np.testing.assert_allclose(x, 0.05 * levels, rtol=1e-6)
    inner = np.abs(levels) < 30
    assert np.isnan(heights[levels == 0]).all()
    shown = inner & (levels != 0)
    np.testing.assert_allclose(heights[shown], counts[shown] / codes.size / 0.05, rtol=1e-5)
    assert len(stairs(axes)) == 1


def test_limit_takes_the_largest_in_tree_order():
    params = {"a": weights(3, 3), "b": weights(9, 9), "c": weights(5, 5), "d": weights(2, 2)}
    made = histograms(params, limit=2)
    assert [axes.get_title(loc="left") for axes in made.axes] == ["b", "c"]
    assert notes(made) == "The 2 largest of 4 chosen leaves; choose others with `where`."
    assert notes(histograms(params)) == ""
    made = spectra(params, limit=3)
    assert notes(made).startswith("The 3 largest of 4")
    assert len(made.axes[0].lines) == 3


def test_where_chooses():
    params = {"a": {"kernel": weights(3, 3), "bias": weights(3)}, "b": {"kernel": weights(4, 4)}}
    made = histograms(params, where="a/*")
    assert [axes.get_title(loc="left") for axes in made.axes] == ["a/bias", "a/kernel"]
    assert len(spectra(params, where="a/*").axes[0].lines) == 1  # the bias has none
    for draw in (histograms, spectra):
        with pytest.raises(ValueError, match=f"{draw.__name__}: `where` must match"):
            draw(params, where="nothing")
    with pytest.raises(ValueError, match="spectra: `where` must choose an array"):
        spectra(params, where="*/bias")


def test_odd_leaves_are_drawn_without_warning():
    odd = {
        "nan": np.array([[np.nan, 1.0], [np.inf, 2.0]], np.float32),
        "zero": np.zeros((3, 3), np.float32),
        "same": np.full((3, 3), 1e30, np.float32),
        "tiny": np.full((3, 3), 1e-45, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "wide": np.array([[-3e38, 3e38]], np.float32),
        "half": jnp.ones((3, 3), jnp.bfloat16),
    }
    made = histograms(odd)
    made.draw_without_rendering()
    told = {axes.get_title(loc="left"): said(axes) for axes in made.axes}
    assert (told["nan"], told["zero"], told["empty"]) == ("2 not finite", "100% zeros", "empty")
    made = spectra(odd)
    made.draw_without_rendering()
    for path, reason in (("nan", "not finite"), ("zero", "are zero"), ("empty", "is empty")):
        assert any(f": {path}," in line and reason in line for line in notes(made).splitlines())
    assert len(made.axes[0].lines) == 4


def test_spectrum_of_numpy():
    w = weights(4, 3, 6)
    decay, energy = spectra({"w": w}).axes
    sigma = np.linalg.svd(w.reshape(12, 6).astype(np.float64), compute_uv=False)
    x, y = decay.lines[0].get_data()
    np.testing.assert_allclose(x, np.arange(1, 7) / 6)
    np.testing.assert_allclose(y, sigma / sigma[0], rtol=1e-5)
    x, y = energy.lines[0].get_data()
    np.testing.assert_allclose(x, np.arange(7) / 6)
    np.testing.assert_allclose(y, np.r_[0, np.cumsum(sigma**2) / np.sum(sigma**2)], rtol=1e-5)
    assert decay.get_yscale() == "log"


def test_spectra_end_at_the_rank():
    w = weights(20, 3) @ weights(3, 10, seed=1)
    full = weights(20, 10, seed=2)
    decay, energy = spectra({"w": full}, {"w": w}).axes
    before, after = decay.lines
    assert (before.get_linestyle(), after.get_linestyle()) == ("--", "-")
    assert (len(before.get_xdata()), len(after.get_xdata())) == (10, 3)
    assert (before.get_marker(), after.get_marker()) == ("None", "o")
    assert energy.lines[1].get_ydata()[-1] == pytest.approx(1.0)


def test_compressed_leaves():
    u, v = weights(20, 2), weights(2, 10)
    low = arrays.LowRank(jnp.asarray(u), jnp.asarray(v))
    decay, _ = spectra({"w": low}).axes
    assert len(decay.lines[0].get_xdata()) == 2
    (axes,) = histograms({"w": u @ v}, {"w": low}).axes
    assert area(stairs(axes)[1]) == pytest.approx(1.0)


@pytest.mark.parametrize("draw", [histograms, spectra])
def test_refusals(draw):
    name = draw.__name__
    with pytest.raises(TypeError, match=f"{name}: `params` must hold concrete arrays.*abstract"):
        draw({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)})
    with pytest.raises(ValueError, match=f"{name}: `after` must"):
        draw({"w": weights(2, 2)}, {"w": weights(2, 3)})
    with pytest.raises(ValueError, match=f"{name}: `limit` must"):
        draw({"w": weights(2, 2)}, limit=0)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda w: [draw({"w": w}), w][1])(jnp.ones((2, 2)))

"""Names beside points, placed one by one where they hide the least."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

_ANGLES = np.deg2rad([0, 45, 315, 90, 270, 180, 135, 225])
_RADII = (9.0, 19.0, 31.0)


def place_labels(
    figure: Any,
    axes: Any,
    named: Sequence[tuple[str, float, float]],
    steps: Sequence[tuple[float, float]],
) -> None:
    """Writes each name near its point, with a thin line where it had to go far.

    Greedy: each name takes the place, of eight directions at three distances, that covers
    the least of the points, of the names before it, of the line of steps and of the world
    outside the axes.
    """
    texts = [
        axes.annotate(
            label,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            color="#222222",
            parse_math=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "#999999",
                "lw": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )
        for label, x, y in named
    ]
    for text in texts:
        text.set_in_layout(False)
    figure.draw_without_rendering()  # settles the layout: pixels are known from here on
    renderer = figure.canvas.get_renderer()
    pixel = figure.dpi / 72.0
    spots = axes.transData.transform([(x, y) for _, x, y in named])
    outer = axes.get_window_extent(renderer)
    dots = [(a - 4 * pixel, b - 4 * pixel, a + 4 * pixel, b + 4 * pixel) for a, b in spots]
    corners = axes.transData.transform(list(steps))
    line = [
        box
        for (a, b), (c, d) in pairwise(corners)
        for box in ((a, b - pixel, c, b + pixel), (c - pixel, b, c + pixel, d))
    ]
    taken: list[tuple[float, float, float, float]] = []
    for text, (px, py) in zip(texts, spots, strict=True):
        extent = renderer.get_text_width_height_descent(
            text.get_text(), text.get_fontproperties(), ismath=False
        )
        width, height = extent[0] + 2 * pixel, extent[1] + 1 * pixel
        best = None
        for rank, (radius, angle) in enumerate((r, a) for r in _RADII for a in _ANGLES):
            dx = np.cos(angle) * (radius * pixel + width / 2)
            dy = np.sin(angle) * (radius * pixel + height / 2)
            x, y = px + dx, py + dy
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            outside = width * height - _overlap(box, (outer.x0, outer.y0, outer.x1, outer.y1))
            cost = sum(_overlap(box, other) for other in taken) + outside
            cost += 2 * sum(_overlap(box, other) for other in dots + line)
            if best is None or cost + 0.01 * rank < best[0]:
                best = (cost + 0.01 * rank, dx / pixel, dy / pixel, box, radius)
        assert best is not None
        _, dx, dy, box, radius = best
        taken.append(box)
        text.set_position((dx, dy))
        if radius == _RADII[0] and text.arrow_patch is not None:
            text.arrow_patch.set_visible(False)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Area common to two boxes (x0, y0, x1, y1)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)

"""A Matplotlib figure without pyplot, and its looks. Imported only when a figure is drawn."""

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart by the colour-blind too. Yellow is left out: too pale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c6bb1")
BEFORE, AFTER, ACCENT = "#b3b3b3", "#0072B2", "#D55E00"
SMALL, NORMAL = 8.0, 9.0


class NotebookFigure(Figure):
    """A figure that notebooks show though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        stream = BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


def new_figure(width: float, height: float) -> NotebookFigure:
    """An empty figure on its own canvas, in inches; nothing global is touched."""
    figure = NotebookFigure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Light grid behind the data, no box, readable labels."""
    axes.set_title(title, fontsize=NORMAL, loc="left", parse_math=False)
    axes.set_xlabel(xlabel, fontsize=NORMAL)
    axes.set_ylabel(ylabel, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL, length=0, which="both")
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#b0b0b0")


def remark(figure: Figure, lines: Sequence[str]) -> None:
    """What the reader must know of what is not shown, below the axes."""
    if lines:
        note = figure.supxlabel("\n".join(lines), fontsize=SMALL, color="#555555")
        note.set_parse_math(False)


def short(path: str, length: int = 44) -> str:
    """The path, its middle left out when it is long: the ends tell most."""
    path = path or "(root)"
    if len(path) <= length:
        return path
    head = (length - 1) // 3
    return f"{path[:head]}…{path[head + 1 - length :]}"

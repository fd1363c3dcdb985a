"""How every picture looks, and how it is saved: PNG and SVG, the same bytes for the same input."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ldm_scaling import files
from ldm_scaling.study import labels

INK, SOFT, GRID = "#1d2530", "#5b6675", "#e3e7ec"
MARKERS = "osD^vPX*<>hd"
DPI = 160

STYLE = {
    "axes.edgecolor": "#9aa4b1",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "ldm_scaling",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib with this project's look, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def ramp(n: int, first: float = 0.0, last: float = 0.86) -> list[str]:
    """`n` colours of one perceptually ordered, colour-blind-safe map (viridis), small to large.

    On white the map's pale end is left out; on black take `first=0.3, last=1`.
    """
    places = np.linspace(first, last, n) if n > 1 else [first]
    return [to_hex(matplotlib.colormaps["viridis"](p)) for p in places]


def marks(sizes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each size: `{size: {"color", "marker"}}`, for `Axes.plot`."""
    colours = ramp(len(sizes))
    return {m: {"color": colours[k], "marker": MARKERS[k % len(MARKERS)]}
            for k, m in enumerate(sizes)}


def figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that draws with Agg and lays itself out."""
    new = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(new)
    return new


def log_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many as its range has room for."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 3000 else (1,)
    if high / low < 8:
        subs = (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def log_x(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers."""
    ax.set_xscale("log")
    log_ticks(ax.xaxis)


def log_y(ax: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    ax.set_yscale("log")
    log_ticks(ax.yaxis)


def step_ticks(ax: Axes, steps: Sequence[int]) -> None:
    """Ticks at exactly the step counts that were measured."""
    ax.xaxis.set_major_locator(FixedLocator(list(steps)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def best_arrow(ax: Axes, metric: str) -> None:
    """Writes the measure on the y axis, with an arrow towards better."""
    measure = labels.measure(metric)
    arrow = "↓" if measure.better == "lower" else "↑"
    ax.set_ylabel(f"{measure.label}\n{arrow} {measure.better} is better")


def save(drawn: Figure, directory: epath.PathLike, name: str) -> None:
    """Writes `name.png` and `name.svg`, each by rename and without date or version stamps."""
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        with style():
            drawn.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        files.atomic_write_bytes(epath.Path(directory) / f"{name}.{kind}", buffer.getvalue())

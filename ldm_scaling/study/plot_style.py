"""How every picture looks, and how it is saved: the same bytes for the same input."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ldm_scaling import files
from ldm_scaling.study import labels

# It tells of every table of every font that goes into a PDF.
logging.getLogger("fontTools").setLevel(logging.WARNING)

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
    "pdf.fonttype": 42,
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


def title(fig: Figure, text: str, **how: Any) -> None:
    """The title of the whole figure, on as many lines as its width needs."""
    fig.suptitle(text, x=0.01, ha="left", wrap=True, **how)


def log_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many as its range has room for."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 3000 else (1,)
    if high / low < 8:
        subs = (1, 1.5, 2, 3, 4, 5, 6, 8)
    large = high > 1e5
    if large and high / low > 8:
        subs = (1, 3) if high / low < 3000 else (1,)
    few = high / low < 3
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]) if few else
                           LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power if large else lambda v, _: f"{v:g}"))


def _power(value: float, _: int) -> str:
    """A large number as its leading digits times a power of ten."""
    if value <= 0:
        return ""
    exponent = int(np.floor(np.log10(value * (1 + 1e-9))))
    lead = f"{value / 10**exponent:.3g}"
    return f"$10^{{{exponent}}}$" if lead == "1" else f"${lead}\\times10^{{{exponent}}}$"


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


def band(ax: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float],
         color: str) -> None:
    """The band of a curve, behind everything: it holds all of the curve at once with 95%."""
    ax.fill_between(x, low, high, color=color, alpha=0.13, lw=0, zorder=1)


End = tuple[float, float, str, str]
"""Where a curve begins or ends (x, y), its name, its colour."""


def _ink(colour: str) -> tuple[float, ...]:
    """A curve's colour, dark enough to be read as text."""
    return tuple(0.62 * np.array(to_rgb(colour)) + 0.38 * np.array(to_rgb(INK)))


def _named(ax: Axes, end: End, size: float, **how: Any) -> Annotation:
    x, y, text, colour = end
    new = ax.annotate(
        text, (x, y), textcoords="offset points", fontsize=size, color=_ink(colour),
        fontweight="bold", annotation_clip=False, zorder=6,
        path_effects=[withStroke(linewidth=2.2, foreground="white")], **how,
    )
    new.set_in_layout(False)
    return new


def name_curves(
    ax: Axes, starts: Sequence[End], ends: Sequence[End], lower_is_better: bool, size: float = 8.0
) -> None:
    """Writes each curve's name slanting away from its start, its worse end, where that is free:
    curves are steep and starts far enough apart. At its end if not. Call it last, as `name_ends`.
    """
    if not starts:
        return
    ax.figure.draw_without_rendering()
    sign, point = 1 if lower_is_better else -1, ax.figure.dpi / 72
    x_N, y_N = ax.transData.transform([(x, y) for x, y, *_ in starts]).T
    end_N = ax.transData.transform([(x, y) for x, y, *_ in ends])[:, 1]
    steep = np.median(sign * (y_N - end_N)) > 0.35 * ax.bbox.height
    if not steep or np.diff(np.sort(x_N)).min(initial=np.inf) < 1.15 * size * point:
        _name_ends(ax, ends, size)
        return
    names = [
        _named(ax, start, size, xytext=(0, sign * 8), rotation=sign * 55, rotation_mode="anchor",
               ha="left", va="center")
        for start in starts
    ]
    boxes = [name.get_window_extent() for name in names]
    top = max(box.y1 for box in boxes) + 2 * point - ax.bbox.y1
    bottom = ax.bbox.y0 - min(box.y0 for box in boxes) + 2 * point
    right = max(box.x1 for box in boxes) + 2 * point - ax.bbox.x1
    _widen(ax, *(max(v, 0) for v in (right, bottom, top)))


def name_ends(ax: Axes, ends: Sequence[End], size: float = 8.0) -> None:
    """Writes each curve's name to the right of its end, moved apart where two would touch.

    Call it last: the axes make room on the right, and places depend on the final limits.
    """
    if ends:
        ax.figure.draw_without_rendering()
        _name_ends(ax, ends, size)


def _name_ends(ax: Axes, ends: Sequence[End], size: float) -> None:
    """As `name_ends`, of a figure that is laid out: it takes the most of the time."""
    point = ax.figure.dpi / 72
    names = [_named(ax, end, size, xytext=(6, 0), va="center") for end in ends]
    boxes = [name.get_window_extent() for name in names]
    _widen(ax, max(max(box.x1 for box in boxes) + 2 * point - ax.bbox.x1, 0), 0, 0)
    ax.figure.draw_without_rendering()
    boxes = [name.get_window_extent() for name in names]
    left_N, right_N, bottom_N, top_N = np.array([[b.x0, b.x1, b.y0, b.y1] for b in boxes]).T
    moved_N = apart(left_N, right_N, bottom_N, top_N, (ax.bbox.y0, ax.bbox.y1)) / point
    for name, moved, (x, y, _, colour) in zip(names, moved_N, ends, strict=True):
        name.set_position((6, moved))
        if abs(moved) > 0.6 * size:
            line = ax.annotate("", (x, y), xytext=(6, moved), textcoords="offset points", zorder=5,
                               arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6,
                                           "shrinkA": 0, "shrinkB": 3})
            line.set_in_layout(False)


def _widen(ax: Axes, right: float, bottom: float, top: float) -> None:
    """Moves limits out by so many pixels."""
    to, back = ax.transScale.transform, ax.transScale.inverted().transform
    (x0, y0), (x1, y1) = to(list(zip(ax.get_xlim(), ax.get_ylim(), strict=True)))
    x1 += right / (ax.bbox.width - right) * (x1 - x0)
    each = (y1 - y0) / (ax.bbox.height - bottom - top)
    (_, y0), (x1, y1) = back([(x0, y0 - bottom * each), (x1, y1 + top * each)])
    ax.set_xlim(right=x1)
    ax.set_ylim(y0, y1)


def apart(
    left_N: np.ndarray, right_N: np.ndarray, bottom_N: np.ndarray, top_N: np.ndarray,
    within: tuple[float, float], rounds: int = 400,
) -> np.ndarray:
    """How far each of N boxes moves up so that none overlap and all stay within the heights."""
    moved_N = np.zeros(len(left_N))
    meet_NN = (left_N[:, None] < right_N) & (left_N < right_N[:, None])
    order = np.argsort((bottom_N + top_N) / 2, kind="stable")
    for _ in range(rounds):
        still = True
        for place, lower in enumerate(order):
            for upper in order[place + 1 :]:
                overlap = top_N[lower] + moved_N[lower] - bottom_N[upper] - moved_N[upper]
                if meet_NN[lower, upper] and overlap > 0.1:
                    moved_N[lower] -= overlap / 2
                    moved_N[upper] += overlap / 2
                    still = False
        held_N = np.clip(moved_N, within[0] - bottom_N, np.maximum(within[1] - top_N,
                                                                  within[0] - bottom_N))
        still &= bool(np.allclose(held_N, moved_N))
        moved_N = held_N
        if still:
            break
    return moved_N


FORMATS = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Formats of pictures, and what is left out of their metadata: it changes from run to run. The last
is the slowest."""


def save(drawn: Figure, directory: epath.PathLike, name: str) -> None:
    """Writes the picture in each of `FORMATS`, by rename and without date or version stamps. Where
    all but the last have the very bytes that they would get, that is left as it is: a PDF's fonts
    take most of the time. Where they have not, it is gone until they have."""
    paths = {kind: epath.Path(directory) / f"{name}.{kind}" for kind in FORMATS}

    def made(kind: str) -> bytes:
        buffer = io.BytesIO()
        with style():
            drawn.savefig(buffer, format=kind, dpi=DPI, metadata=FORMATS[kind])
        drawn.set_layout_engine("none")  # What the first made of it holds for all.
        return buffer.getvalue()

    *quick, slow = FORMATS
    bytes_ = {kind: made(kind) for kind in quick}
    if quick and all(path.exists() for path in paths.values()) and all(
        paths[kind].read_bytes() == data for kind, data in bytes_.items()
    ):
        return
    paths[slow].unlink(missing_ok=True)
    for kind in FORMATS:
        files.atomic_write_bytes(paths[kind], bytes_[kind] if kind in bytes_ else made(kind))

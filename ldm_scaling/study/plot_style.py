"""How every picture looks, and how it is saved: the same bytes for the same input."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import (
    FixedLocator,
    Formatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
)

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
    "text.parse_math": False,  # Names and captions may hold dollars.
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib with this project's look, whatever the user's own settings are. Letters that its
    font lacks are boxes, without a warning for each."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def ramp(n: int, first: float = 0.0, last: float = 0.86) -> list[str]:
    """`n` colours of one perceptually ordered, colour-blind-safe map (viridis), small to large.

    On white the map's pale end is left out; on black take `first=0.3, last=1`.
    """
    places = np.linspace(first, last, n) if n > 1 else [first]
    return [to_hex(matplotlib.colormaps["viridis"](p)) for p in places]


def shades(values: Sequence[float]) -> Normalize:
    """Maps these onto a colour map's 0 to 1, logarithmically where all are above 0."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * abs(low):  # A scale without a length has no logarithms.
        room = 1e-3 * abs(low) or 1e-3
        low, high = low - room, high + room
    return (LogNorm if low > 0 else Normalize)(low, high)


def ink_on(fill: Sequence[float]) -> str:
    """Of white and the dark ink that which has more contrast (WCAG 2) with a colour (R, G, B in
    0..1)."""
    def light(rgb: Sequence[float]) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb[:3]]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722))) + 0.05

    white, own, dark = light((1, 1, 1)), light(fill), light(to_rgb(INK))
    return "white" if white / own > own / dark else INK


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
    axis.set_major_formatter(FuncFormatter(lambda v, _: power(v) if large else f"{v:g}"))


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float, digits: int = 3) -> str:
    """A large number as its leading digits times a power of ten, `2.5×10⁷`; nothing for one that
    has none."""
    if value <= 0:
        return ""
    lead, exponent = map(float, f"{value:.{digits - 1}e}".split("e"))
    return f"{'' if lead == 1 else f'{lead:g}×'}10{f'{exponent:g}'.translate(_RAISED)}"


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
    _ticks_at(ax, steps, "{:g}".format)


def size_ticks(ax: Axes, params: Sequence[int]) -> None:
    """Ticks at exactly the numbers of parameters that there are."""
    _ticks_at(ax, params, labels.count)


def _ticks_at(ax: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    ax.xaxis.set_major_locator(FixedLocator(list(values)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(_Apart(text))


class _Apart(Formatter):
    """Values as text; none where it would touch another. The last has the first say, then the
    first, then the others from the last on."""

    def __init__(self, text: Callable[[float], str]):
        self.text = text

    def __call__(self, value: float, place: int | None = None) -> str:
        return self.text(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """The labels of all ticks, as the axis lies."""
        texts, n, ax = [self(v) for v in values], len(values), self.axis.axes
        at_N = ax.get_xaxis_transform().transform([(v, 0.0) for v in values])[:, 0]
        digit = 0.64 * STYLE["font.size"] * ax.figure.dpi / 72
        kept: list[int] = []
        for k in [n - 1, 0, *range(n - 2, 0, -1)][:n]:
            if all(abs(at_N[k] - at_N[j]) > digit * (len(texts[k] + texts[j]) + 1) / 2
                   for j in kept):
                kept.append(k)
        return [text if k in kept else "" for k, text in enumerate(texts)]


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


def ink(colour: str) -> tuple[float, ...]:
    """A curve's colour, dark enough to be read as text."""
    return tuple(0.62 * np.array(to_rgb(colour)) + 0.38 * np.array(to_rgb(INK)))


def shortened(text: str, inches: float, size: float) -> str:
    """As much of it as a width holds in bold letters of a size (points), and that it was more."""
    most = max(int(72 * inches / (0.72 * size)), 4)
    return text if len(text) <= most else f"{text[: most - 1]}…"


_NAMES = 8.0
"""Points, of curves' names."""
_WIDEST = 1.6
"""Inches of a curve's name, at most: what is longer takes the room of curves."""


def _named(ax: Axes, end: End, **how: Any) -> Annotation:
    """A curve's name; of a long one what half of the panel has room for, or `_WIDEST`."""
    x, y, text, colour = end
    new = ax.annotate(
        shortened(text, min(0.5 * ax.bbox.width / ax.figure.dpi, _WIDEST), _NAMES), (x, y),
        textcoords="offset points", fontsize=_NAMES, color=ink(colour),
        fontweight="bold", annotation_clip=False, zorder=6,
        path_effects=[withStroke(linewidth=2.2, foreground="white")], **how,
    )
    new.set_in_layout(False)
    return new


def name_curves(
    ax: Axes, starts: Sequence[End], ends: Sequence[End], lower_is_better: bool
) -> None:
    """Writes each curve's name slanting away from its start, its worse end, where that is free:
    curves are steep and starts far enough apart. At its end if not. Call it last, as `name_ends`.
    """
    if not starts:
        return
    ax.figure.draw_without_rendering()
    sign = 1 if lower_is_better else -1
    x_N, y_N = ax.transData.transform([(x, y) for x, y, *_ in starts]).T
    end_N = ax.transData.transform([(x, y) for x, y, *_ in ends])[:, 1]
    steep = np.median(sign * (y_N - end_N)) > 0.35 * ax.bbox.height
    if not steep or np.diff(np.sort(x_N)).min(initial=np.inf) < 1.15 * _NAMES * ax.figure.dpi / 72:
        _name_ends(ax, ends)
        return
    names = [
        _named(ax, start, xytext=(0, sign * 8), rotation=sign * 55, rotation_mode="anchor",
               ha="left", va="center")
        for start in starts
    ]
    _make_room(ax, names)


def name_ends(ax: Axes, ends: Sequence[End], below: float = 0.0) -> None:
    """Writes each curve's name to the right of its end, so many points below it, moved where it
    would touch another or cover a marker.

    Call it last: the axes make room on the right, and places depend on the final limits.
    """
    if ends:
        ax.figure.draw_without_rendering()
        _name_ends(ax, ends, below)


def _name_ends(ax: Axes, ends: Sequence[End], below: float = 0.0) -> None:
    """As `name_ends`, of a figure that is laid out: it takes the most of the time."""
    point = ax.figure.dpi / 72
    names = [_named(ax, end, xytext=(6, -below), va="center") for end in ends]
    _make_room(ax, names, upright=False)
    ax.figure.draw_without_rendering()
    boxes = [name.get_window_extent() for name in names]
    left_N, right_N, bottom_N, top_N = np.array([[b.x0, b.x1, b.y0, b.y1] for b in boxes]).T
    within = ax.bbox.y0, ax.bbox.y1
    moved_N = apart(left_N, right_N, bottom_N, top_N, within)
    moved_N = off_marks(left_N, right_N, bottom_N, top_N, moved_N, _marks_of(ax), within) / point
    for name, moved, (x, y, _, colour) in zip(names, moved_N, ends, strict=True):
        name.set_position((6, moved - below))
        if abs(moved) > 0.6 * _NAMES:
            line = ax.annotate("", (x, y), xytext=(6, moved - below), textcoords="offset points",
                               zorder=5, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6,
                                           "shrinkA": 0, "shrinkB": 3})
            line.set_in_layout(False)


def _make_room(ax: Axes, names: Sequence[Annotation], upright: bool = True) -> None:
    """Moves limits out until the names lie inside, right and, if `upright`, above and below; what
    is drawn keeps half of the panel at least."""
    edge = 2 * ax.figure.dpi / 72
    x_N, y_N = ax.transData.transform([name.xy for name in names]).T
    boxes_N4 = np.array([name.get_window_extent().extents for name in names])
    _, low_N, right_N, high_N = (boxes_N4 + (-edge, -edge, edge, edge)).T

    def more(side: float, within_N: np.ndarray, beyond_N: np.ndarray) -> float:
        """The share of its length that an axis grows by: points keep their place along it, and
        names their lengths."""
        kept = np.nanmin((side - beyond_N) / np.maximum(within_N, 1.0))
        return 1 / float(np.clip(kept, 0.5, 1.0)) - 1

    box, to, back = ax.bbox, ax.transScale.transform, ax.transScale.inverted().transform
    (x0, y0), (x1, y1) = to(list(zip(ax.get_xlim(), ax.get_ylim(), strict=True)))
    x1 += more(box.width, x_N - box.x0, right_N - x_N) * (x1 - x0)
    if upright:
        y0, y1 = (y0 - more(box.height, box.y1 - y_N, y_N - low_N) * (y1 - y0),
                  y1 + more(box.height, y_N - box.y0, high_N - y_N) * (y1 - y0))
    (_, y0), (x1, y1) = back([(x0, y0), (x1, y1)])
    ax.set_xlim(right=x1)
    ax.set_ylim(y0, y1)
    for axis in (ax.xaxis, ax.yaxis):
        if isinstance(axis.get_major_locator(), LogLocator):  # A longer range has room for fewer.
            log_ticks(axis)


_TOUCH = 0.5
"""Pixels by which names may overlap: no one sees them."""


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
                if meet_NN[lower, upper] and overlap > _TOUCH / 5:
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


def _marks_of(ax: Axes) -> np.ndarray:
    """The boxes (left, right, bottom, top) of all curves' markers, in pixels."""
    boxes = [np.zeros((0, 4))]
    for line in ax.lines:
        if line.get_marker() in ("", "None", None):
            continue
        every = line.get_markevery()
        every = every if isinstance(every, (int, np.integer)) else 1  # Else all: it does no harm.
        x_N, y_N = ax.transData.transform(line.get_xydata()[::every]).T
        half = line.get_markersize() * ax.figure.dpi / 144
        boxes.append(np.stack([x_N - half, x_N + half, y_N - half, y_N + half], axis=1))
    return np.concatenate(boxes)


def off_marks(
    left_N: np.ndarray, right_N: np.ndarray, bottom_N: np.ndarray, top_N: np.ndarray,
    moved_N: np.ndarray, marks_M4: np.ndarray, within: tuple[float, float],
) -> np.ndarray:
    """Where N boxes that moved up so far cover a marker (left, right, bottom, top), they move on to
    the nearest height at which they cover neither one nor another box, where there is one."""
    moved_N = moved_N.copy()
    for k, (left, right, bottom, top) in enumerate(zip(left_N, right_N, bottom_N, top_N,
                                                       strict=True)):
        boxes_N4 = np.stack([left_N, right_N, bottom_N + moved_N, top_N + moved_N], axis=1)
        others_4 = np.concatenate([marks_M4, np.delete(boxes_N4, k, axis=0)]).T
        for up in sorted(moved_N[k] + (top - bottom) / 4 * np.arange(-60, 61),
                         key=lambda up: abs(up - moved_N[k])):
            covers = ((left < others_4[1]) & (others_4[0] < right)
                      & (bottom + up < others_4[3] - _TOUCH) & (others_4[2] + _TOUCH < top + up))
            if not covers.any() and within[0] <= bottom + up and top + up <= within[1]:
                moved_N[k] = up
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

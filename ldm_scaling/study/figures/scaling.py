"""Scaling laws of the study's own networks: by training compute, by size, and what the smaller
sizes foretell of the largest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.config import repeats
from ldm_scaling.study import families, labels, plot_style, plots
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.statistics import fits, scaling, trends
from ldm_scaling.study.statistics.laws import Law
from ldm_scaling.study.statistics.scaling import By, Runs

VALIDATION_LOSS = "validation_loss"
_NOISE = {VALIDATION_LOSS: fits.DELTA}
_QUALITY_NOISE = 0.01
"""Where Huber's loss turns linear: distances of networks that were trained once scatter by 1%."""

LEAST_WITH_OFFSET = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What a law is of.

    Attributes:
      name: `VALIDATION_LOSS` or a measure.
      runs: rows, compute in GFLOPs of a network call x training steps, as in Fig. 3.
      family: the networks' own, for readers; empty where there is one alone.
    """

    name: str
    runs: Runs
    family: str = ""

    @property
    def axis(self) -> str:
        """What stands on its axis."""
        if self.name == VALIDATION_LOSS:
            return "validation loss\n↓ lower is better"
        return f"{labels.measure(self.name).label}\n↓ lower is better"

    @property
    def title(self) -> str:
        """Its short name, after its family's."""
        short = "Validation loss" if self.name == VALIDATION_LOSS else labels.measure(
            self.name).short
        return f"{self.family}: {short}" if self.family else short

    @property
    def noise(self) -> float:
        """Its `delta` of `fits.fit`."""
        return _NOISE.get(self.name, _QUALITY_NOISE)


def measured(source: Source) -> list[Measured]:
    """Validation losses along the training runs, and the main measure of the networks; of several
    families each by itself, for networks of different kinds follow no one law. A measure that may
    be 0 or below, as a kernel distance without bias is of good networks, follows no power law: with
    such a value it is left out, see `left_out`."""
    records = [r for r in source.of_task("text_to_image") if r.identity.train_step > 0]
    size = {r.identity.model: (r.params, r.gflops) for r in records}
    losses = {
        m: [(int(step), loss) for step, _, loss in rows if loss is not None and 0 < loss < np.inf]
        for m, rows in source.loss_curves.items() if m in size or repeats.parse(m)[0] in size
    }
    out = []
    if any(losses.values()):
        runs = scaling.of_losses(
            losses, {m: n for m, (n, _) in size.items()}, {m: g for m, (_, g) in size.items()},
            batch_size=1, settled=scaling.SETTLED)
        out += _by_family(VALIDATION_LOSS, _in_steps(runs))
    runs = _quality(source)
    if runs is not None and runs.value_N.min() > 0:
        out += _by_family(source.metric, _in_steps(runs))
    return out


def _quality(source: Source) -> Runs | None:
    """The main measure of the networks, where it is a distance that they have."""
    held = [r for r in source.of_task("text_to_image")
            if r.identity.train_step > 0 and source.metric in r.metrics]
    blocks = source.blocks(held)
    if labels.measure(source.metric).better != "lower" or not trends.networks(
            held, source.metric, *blocks):
        return None
    return scaling.of_records(held, source.metric, 1, *blocks)


def left_out(source: Source) -> list[str]:
    """A sentence where `measured` leaves the main measure out, of sizes enough for a law."""
    runs = _quality(source)
    if runs is None or runs.value_N.min() > 0 or len({*runs.models}) < scaling.LEAST:
        return []
    least = int(np.argmin(runs.value_N))
    short = labels.measure(source.metric).short
    return [
        f"no scaling law of {short} is drawn: of {runs.models[least]} it is "
        f"{labels.number(runs.value_N[least])}, and no power law goes through 0 or below"
    ]


def _by_family(name: str, runs: Runs) -> list[Measured]:
    models = np.array(runs.models)
    parts = families.parted(list(dict.fromkeys(runs.models)))
    if len(parts) == 1:
        return [Measured(name, runs)]
    return [Measured(name, runs.some(np.isin(models, own)), f) for f, own in parts.items()]


def _in_steps(runs: Runs) -> Runs:
    """GFLOPs of a call x training steps for GFLOPs: records do not say the batch size."""
    return dataclasses.replace(runs, gflops_N=runs.gflops_N / scaling.BACKWARD)


@dataclasses.dataclass(frozen=True, eq=False)
class _Line:
    """A saturating power law of one scale, as it is drawn.

    Attributes:
      runs: the points that are shown.
      by: the scale.
      parameters: "E", "A", "alpha" -> the estimate, and its low and high end.
      at: `at(x)`: the law, and the low and high end of its 95% interval.
      about: what it goes through, in words; may be empty.
    """

    runs: Runs
    by: By
    parameters: Mapping[str, tuple[float, float, float]]
    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    about: str = ""

    @property
    def words(self) -> str:
        """Its form and parameters."""
        scale = "C" if self.by == "compute" else "N"
        value, low, high = self.parameters["alpha"]
        text = f"A / {scale}ᵅ:  α = {value:.3f} [{low:.3f}, {high:.3f}]"
        if "E" not in self.parameters:
            return text
        value, low, high = map(_or_nothing, self.parameters["E"])
        return f"E + {text},  E = {value} [{low}, {high}]"


def _or_nothing(offset: float) -> str:
    """An offset as text; what the fit has driven towards 0 is 0."""
    return labels.number(offset) if offset > 1e-6 else "0"


def _direct(one: Measured, by: By, about: str = "") -> _Line | None:
    """The law through the ends of the runs; without an offset where they are few."""
    runs = one.runs.ends()
    if len(np.unique(runs.scales(by))) < scaling.LEAST:
        return None
    offset = runs.networks >= LEAST_WITH_OFFSET
    fit = runs.fitted(by, offset=offset, delta=one.noise, replicates=scaling.REPLICATES)
    names = ("E", "A", "alpha") if offset else ("A", "alpha")
    return _Line(runs, by, {n: (fits.value(fit.law, n), *fit.interval(n)) for n in names},
                 lambda x: (fit.law(x), *fit.predict(x)), about)


def _optimal(one: Measured) -> _Line | None:
    """What the best size has at each compute, by a law of size and images through all points:
    it needs no run to be the best at any compute. None where that law, or more of its replicates
    than chance explains, has no best size."""
    runs = one.runs
    fit = runs.fitted("call and images", delta=one.noise, replicates=scaling.REPLICATES)
    laws = [law for law in fit.replicates if law.has_best(runs.gflops_N, 1.0)]
    if not fit.law.has_best(runs.gflops_N, 1.0) or (
            len(laws) < (1 - scaling.WITHOUT_BEST) * len(fit.replicates)):
        return None

    def factor(law: Law) -> float:
        return float(law.least(1.0, 1.0)[0] - law.offset)

    def at(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = np.percentile([law.least(x, 1.0) for law in laws], (2.5, 97.5), axis=0)
        return fit.law.least(x, 1.0), low, high

    parameters = {
        name: (of(fit.law), *map(float, np.percentile([of(law) for law in laws], (2.5, 97.5))))
        for name, of in (("E", lambda law: law.offset), ("A", factor),
                         ("alpha", lambda law: law.least_exponent))
    }
    return _Line(runs, "compute", parameters, at, "the best size at each compute, by all runs")


def by_compute(source: Source) -> dict[str, Drawn]:
    """A saturating power law of training compute: of the best size at each where runs were
    measured at several lengths, else through the networks."""
    def line(one: Measured) -> _Line | None:
        if not one.runs.several_lengths:
            return _direct(one, "compute")
        return _optimal(one) or _direct(
            one, "compute", "through the runs' ends: all runs do not tell a best size")

    return _laws(source, line, labels.AXES["compute"],
                 "Scaling with training compute (shaded: 95%, of the law)")


def by_size(source: Source) -> dict[str, Drawn]:
    """A saturating power law of size through the ends of the runs."""
    return _laws(source, lambda one: _direct(one, "size"), "parameters",
                 "Scaling with size, at the end of training (shaded: 95%, of the law)")


def _laws(
    source: Source, line: Callable[[Measured], _Line | None], axis: str, title: str
) -> dict[str, Drawn]:
    panels: dict[str, list[tuple[Measured, _Line]]] = {}
    for one in measured(source):
        if (law := line(one)) is not None:
            panels.setdefault(one.name, []).append((one, law))
    if not panels:
        return {}
    marks = plot_style.marks(list(plots.sized(source.main)))
    fig = plot_style.figure(max(5.6 * len(panels), 6.6), 4.8)
    axes = fig.subplots(1, len(panels), squeeze=False)[0]
    rows: list[Mapping[str, object]] = []
    for ax, shown in zip(axes, panels.values(), strict=True):
        several = _colours(shown)
        for one, law in shown:
            own = several.get(one.family)
            draw_runs(ax, law.runs, law.by, _tinted(law.runs, own) if own else marks)
            _draw_line(ax, law, *([own, f"{one.family}: {law.words}"] if own else []))
            rows += _law_rows(one, law)
        one, law = shown[0]
        ax.set(ylabel=one.axis, xlabel=f"{axis} (log scale)")
        if law.by == "size":
            sizes = np.concatenate([law.runs.params_N for _, law in shown])
            plot_style.size_ticks(ax, np.unique(sizes))
        if several:
            about = dict.fromkeys(law.about for _, law in shown if law.about)
            entitle(ax, dataclasses.replace(one, family=""), *about, *[""] * len(shown))
            # In the lines that the title has left free.
            key = ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8.5, frameon=False,
                            borderpad=0.2, borderaxespad=0, labelspacing=0.2, handlelength=1.6)
            key.set_in_layout(False)
        else:
            entitle(ax, one, *filter(None, (law.about, law.words)))
    plot_style.title(fig, title)
    for ax, shown in zip(axes, panels.values(), strict=True):
        several = _colours(shown)
        ends: tuple[list[plot_style.End], list[plot_style.End]] = ([], [])
        for one, law in shown:
            own = several.get(one.family)
            named = curve_ends(law.runs, law.by, _tinted(law.runs, own) if own else marks)
            for both, some in zip(ends, named, strict=True):
                both += some
        plot_style.name_curves(ax, *ends, lower_is_better=True)
    return {"": Drawn(fig, rows)}


def _colours(shown: Sequence[tuple[Measured, _Line]]) -> dict[str, str]:
    """A colour for each family, where the panel is of families."""
    names = [one.family for one, _ in shown if one.family]
    return {f: mark["color"] for f, mark in plot_style.marks(names).items()}


def _tinted(runs: Runs, colour: str) -> dict[str, dict[str, str]]:
    """Marks of a family's sizes: all of its colour."""
    own = plot_style.marks(list(dict.fromkeys(runs.models)))
    return {m: mark | {"color": colour} for m, mark in own.items()}


def draw_runs(ax: Axes, runs: Runs, by: By, marks: Mapping[str, Mapping[str, str]]) -> None:
    """A thin line for each run through its points, which carry its size's marker."""
    for own in _by_run(runs, by):
        m = own.models[0]
        x = own.scales(by)[:, 0]
        ax.plot(x, own.value_N, lw=1.0, alpha=0.75, markevery=max(len(x) // 8, 1), zorder=3,
                **marks[m])
        if own.value_RN is not None:
            ends_2N = np.percentile(own.value_RN, (2.5, 97.5), axis=0)
            ax.vlines(x, *ends_2N, color=marks[m]["color"], lw=1.3, alpha=0.55)


def _by_run(runs: Runs, by: By = "compute") -> list[Runs]:
    """The rows of each training run, rising on the scale."""
    names, x_N = np.array(runs.each), runs.scales(by)[:, 0]
    out = []
    for run in dict.fromkeys(runs.each):
        own = np.flatnonzero(names == run)
        out.append(runs.some(own[np.argsort(x_N[own], kind="stable")]))
    return out


def _draw_line(
    ax: Axes, law: _Line, colour: str = plot_style.INK, name: str | None = None
) -> None:
    """The law over the points' range, its interval, and where it ends; its name in a legend."""
    x_N = law.runs.scales(law.by)[:, 0]
    plot_style.log_x(ax)
    span = (x_N.max() / x_N.min()) ** 0.05
    x = np.geomspace(x_N.min() / span, x_N.max() * span, 100)
    y, low, high = law.at(x)
    plot_style.band(ax, x, low, high, colour)
    ax.plot(x, y, color=colour, lw=1.6, zorder=5, label=name)
    plot_style.log_y(ax)
    offset = law.parameters.get("E", (0.0,))[0]
    bottom, top = ax.get_ylim()
    if bottom < offset < top:
        ax.axhline(offset, color=plot_style.SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
        ax.annotate("E", (0, offset), xycoords=("axes fraction", "data"), xytext=(4, 3),
                    textcoords="offset points", fontsize=8.5, color=plot_style.SOFT)


def entitle(ax: Axes, one: Measured, *lines: str) -> None:
    """A panel's title, and smaller lines under it."""
    ax.set_title(one.title + "\n" * len(lines))
    small = ax.text(0, 1.015, "\n".join(lines), transform=ax.transAxes, fontsize=8.5,
                    color=plot_style.SOFT, va="bottom")
    small.set_in_layout(False)  # The title has made room.


def _law_rows(one: Measured, law: _Line) -> list[dict]:
    """Every point, the law there, and the law's parameters."""
    columns = np.stack(law.at(law.runs.scales(law.by)[:, 0]), axis=1)
    parameters = {
        f"{name}{end}": value for name, values in law.parameters.items()
        for end, value in zip(("", "_low", "_high"), values, strict=True)
    }
    return [
        row_of(one, law.runs, k)
        | dict(zip(("law", "law_low", "law_high"), map(float, columns[k]), strict=True))
        | parameters
        for k in range(len(columns))
    ]


def row_of(one: Measured, runs: Runs, k: int) -> dict[str, object]:
    family = {"family": one.family} if one.family else {}
    return family | {
        "model": runs.models[k], "params": int(runs.params_N[k]),
        "train_step": int(round(runs.images_N[k])), "compute": float(runs.gflops_N[k]),
        "measure": one.name, "loss": float(runs.value_N[k]),
    } | ({"run": repeats.parse(runs.runs[k])[1]} if len({*runs.runs}) > len({*runs.models}) else {})


def curve_ends(
    runs: Runs, by: By, marks: Mapping[str, Mapping[str, str]]
) -> tuple[list[plot_style.End], list[plot_style.End]]:
    """Where each size's curve begins, and where it ends: its first run's."""
    first = {own.models[0]: own for own in reversed(_by_run(runs, by))}
    starts, ends = ([
        (float(own.scales(by)[at, 0]), float(own.value_N[at]), m, marks[m]["color"])
        for m, own in reversed(first.items())
    ] for at in (0, -1))
    return starts, ends

"""Scaling laws of the study's own networks: by training compute, by size, and what the smaller
sizes foretell of the largest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.study import labels, plot_style, plots
from ldm_scaling.study.figures.source import Drawn, Source
from ldm_scaling.study.statistics import fits, scaling, trends
from ldm_scaling.study.statistics.fits import HeldOut
from ldm_scaling.study.statistics.laws import Law
from ldm_scaling.study.statistics.scaling import By, Runs

VALIDATION_LOSS = "validation_loss"
SETTLED = 0.1
"""Share of a training run, at its beginning, that enters no law: the learning rate warms up."""

_NOISE = {VALIDATION_LOSS: fits.DELTA}
_QUALITY_NOISE = 0.01
"""Where Huber's loss turns linear: distances of networks that were trained once scatter by 1%."""

_LEAST = 3
_LEAST_WITH_OFFSET = 5
_LEAST_RUNS = 4
"""Sizes for a law of size and training: factor, exponent and level fit any three sizes' luck."""
_REPLICATES = 200
_WITHOUT_BEST = 0.05
"""Share of replicates without a best size above which the others' interval would be another's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What a law is of.

    Attributes:
      name: `VALIDATION_LOSS` or a measure.
      runs: rows, compute in GFLOPs of a network call x training steps, as in Fig. 3.
    """

    name: str
    runs: Runs

    @property
    def axis(self) -> str:
        """What stands on its axis."""
        if self.name == VALIDATION_LOSS:
            return "validation loss\n↓ lower is better"
        return f"{labels.measure(self.name).label}\n↓ lower is better"

    @property
    def title(self) -> str:
        """Its short name."""
        return "Validation loss" if self.name == VALIDATION_LOSS else labels.measure(
            self.name).short

    @property
    def noise(self) -> float:
        """Its `delta` of `fits.fit`."""
        return _NOISE.get(self.name, _QUALITY_NOISE)


def measured(source: Source) -> list[Measured]:
    """Validation losses along the training runs, and the main measure of the networks."""
    records = [r for r in source.of_task("text_to_image") if r.identity.train_step > 0]
    size = {r.identity.model: (r.params, r.gflops) for r in records}
    losses = {
        m: [(int(step), loss) for step, _, loss in rows if loss is not None and 0 < loss < np.inf]
        for m, rows in source.loss_curves.items() if m in size
    }
    out = []
    if any(losses.values()):
        runs = scaling.of_losses(
            losses, {m: n for m, (n, _) in size.items()}, {m: g for m, (_, g) in size.items()},
            batch_size=1, settled=SETTLED)
        out.append(Measured(VALIDATION_LOSS, _in_steps(runs)))
    if labels.measure(source.metric).better == "lower":
        held = [r for r in records if source.metric in r.metrics]
        blocks = source.blocks(held)
        if trends.networks(held, source.metric, *blocks):
            runs = scaling.of_records(held, source.metric, 1, *blocks)
            out.append(Measured(source.metric, _in_steps(runs)))
    return out


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
        text = f"A / {scale}$^\\alpha$:  $\\alpha$ = {value:.3f} [{low:.3f}, {high:.3f}]"
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
    if len(np.unique(runs.scales(by))) < _LEAST:
        return None
    offset = len(runs.models) >= _LEAST_WITH_OFFSET
    fit = runs.fitted(by, offset=offset, delta=one.noise, replicates=_REPLICATES)
    names = ("E", "A", "alpha") if offset else ("A", "alpha")
    return _Line(runs, by, {n: (fits.value(fit.law, n), *fit.interval(n)) for n in names},
                 lambda x: (fit.law(x), *fit.predict(x)), about)


def _optimal(one: Measured) -> _Line | None:
    """What the best size has at each compute, by a law of size and images through all points:
    it needs no run to be the best at any compute. None where that law, or more of its replicates
    than chance explains, has no best size."""
    runs = one.runs
    fit = runs.fitted("call and images", delta=one.noise, replicates=_REPLICATES)
    laws = [law for law in fit.replicates if law.has_best(runs.gflops_N, 1.0)]
    if not fit.law.has_best(runs.gflops_N, 1.0) or (
            len(laws) < (1 - _WITHOUT_BEST) * len(fit.replicates)):
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
        if not _several_lengths(one.runs):
            return _direct(one, "compute")
        return _optimal(one) or _direct(
            one, "compute", "through the runs' ends: all runs do not tell a best size")

    return _laws(source, line, labels.AXES["compute"],
                 "Scaling with training compute (shaded: 95%, of the law)")


def _several_lengths(runs: Runs) -> bool:
    sizes, lengths = (len(np.unique(v)) for v in (runs.params_N, runs.images_N))
    return sizes >= _LEAST_RUNS and lengths >= _LEAST and len(runs.models) >= _LEAST * sizes


def by_size(source: Source) -> dict[str, Drawn]:
    """A saturating power law of size through the ends of the runs."""
    return _laws(source, lambda one: _direct(one, "size"), "parameters",
                 "Scaling with size, at the end of training (shaded: 95%, of the law)")


def _laws(
    source: Source, line: Callable[[Measured], _Line | None], axis: str, title: str
) -> dict[str, Drawn]:
    shown = [(one, law) for one in measured(source) if (law := line(one)) is not None]
    if not shown:
        return {}
    marks = plot_style.marks(list(plots.sized(source.main)))
    fig = plot_style.figure(max(5.6 * len(shown), 6.6), 4.8)
    axes = fig.subplots(1, len(shown), squeeze=False)[0]
    rows: list[Mapping[str, object]] = []
    for ax, (one, law) in zip(axes, shown, strict=True):
        _draw_runs(ax, law.runs, law.by, marks)
        _draw_line(ax, law)
        ax.set(ylabel=one.axis, xlabel=f"{axis} (log scale)")
        _head(ax, one, *filter(None, (law.about, law.words)))
        rows += _law_rows(one, law)
    fig.suptitle(title, x=0.01, ha="left")
    for ax, (_, law) in zip(axes, shown, strict=True):
        _name_runs(ax, law.runs, law.by, marks)
    return {"": Drawn(fig, rows)}


def _draw_runs(ax: Axes, runs: Runs, by: By, marks: Mapping[str, Mapping[str, str]]) -> None:
    """A thin line for each size through its points, which carry its marker."""
    for m, own in _by_model(runs, by).items():
        x = own.scales(by)[:, 0]
        ax.plot(x, own.value_N, lw=1.0, alpha=0.75, markevery=max(len(x) // 8, 1), zorder=3,
                **marks[m])
        if own.value_RN is not None:
            ends_2N = np.percentile(own.value_RN, (2.5, 97.5), axis=0)
            ax.vlines(x, *ends_2N, color=marks[m]["color"], lw=1.3, alpha=0.55)


def _by_model(runs: Runs, by: By = "compute") -> dict[str, Runs]:
    """The rows of each size, rising on the scale."""
    names, x_N = np.array(runs.models), runs.scales(by)[:, 0]
    out = {}
    for m in dict.fromkeys(runs.models):
        own = np.flatnonzero(names == m)
        out[m] = runs.some(own[np.argsort(x_N[own], kind="stable")])
    return out


def _draw_line(ax: Axes, law: _Line) -> None:
    """The law over the points' range, its interval, and where it ends."""
    x_N = law.runs.scales(law.by)[:, 0]
    plot_style.log_x(ax)
    span = (x_N.max() / x_N.min()) ** 0.05
    x = np.geomspace(x_N.min() / span, x_N.max() * span, 100)
    y, low, high = law.at(x)
    plot_style.band(ax, x, low, high, plot_style.INK)
    ax.plot(x, y, color=plot_style.INK, lw=1.6, zorder=5)
    plot_style.log_y(ax)
    offset = law.parameters.get("E", (0.0,))[0]
    bottom, top = ax.get_ylim()
    if bottom < offset < top:
        ax.axhline(offset, color=plot_style.SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
        ax.annotate("E", (0, offset), xycoords=("axes fraction", "data"), xytext=(4, 3),
                    textcoords="offset points", fontsize=8.5, color=plot_style.SOFT)


def _head(ax: Axes, one: Measured, *lines: str) -> None:
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
        _row(one, law.runs, k)
        | dict(zip(("law", "law_low", "law_high"), map(float, columns[k]), strict=True))
        | parameters
        for k in range(len(columns))
    ]


def _row(one: Measured, runs: Runs, k: int) -> dict[str, object]:
    return {
        "model": runs.models[k], "params": int(runs.params_N[k]),
        "train_step": int(round(runs.images_N[k])), "compute": float(runs.gflops_N[k]),
        "measure": one.name, "loss": float(runs.value_N[k]),
    }


def _name_runs(ax: Axes, runs: Runs, by: By, marks: Mapping[str, Mapping[str, str]]) -> None:
    starts, ends = ([
        (float(own.scales(by)[at, 0]), float(own.value_N[at]), m, marks[m]["color"])
        for m, own in _by_model(runs, by).items()
    ] for at in (0, -1))
    plot_style.name_curves(ax, starts, ends, lower_is_better=True)


# --- the largest from the smaller -----------------------------------------------------------------


def largest_held_out(source: Source) -> dict[str, Drawn]:
    """What a law of the smaller sizes foretells of the largest: of size and images where runs were
    measured at several lengths, else of compute."""
    shown = [found for one in measured(source) if (found := _foretold(one)) is not None]
    if not shown:
        return {}
    marks = plot_style.marks(list(plots.sized(source.main)))
    fig = plot_style.figure(max(5.6 * len(shown), 6.6), 4.8)
    rows: list[Mapping[str, object]] = []
    axes = fig.subplots(1, len(shown), squeeze=False)[0]
    for ax, (one, by, held) in zip(axes, shown, strict=True):
        rows += _draw_held_out(ax, one, by, held, marks)
    fig.suptitle("The largest size, foretold from the smaller ones", x=0.01, ha="left")
    for ax, (one, _, _) in zip(axes, shown, strict=True):
        _name_runs(ax, one.runs, "compute", marks)
    return {"": Drawn(fig, rows)}


def _foretold(one: Measured) -> tuple[Measured, By, HeldOut] | None:
    """What is foretold, the law's scales and its prediction; None where the smaller sizes are too
    few, or too much alike in compute, for one."""
    def rest(runs: Runs) -> Runs:
        return runs.some(runs.params_N < runs.params_N.max())

    by: By = "size and images"
    if not _several_lengths(rest(one.runs)):
        by, one = "compute", dataclasses.replace(one, runs=one.runs.ends())
        if len(np.unique(rest(one.runs).gflops_N)) < _LEAST:
            return None
    return one, by, one.runs.held_out(
        by, offset=len(rest(one.runs).models) >= _LEAST_WITH_OFFSET, delta=one.noise,
        replicates=_REPLICATES)


def _draw_held_out(
    ax: Axes, one: Measured, by: By, held: HeldOut, marks: Mapping[str, Mapping[str, str]]
) -> list[dict]:
    runs = one.runs
    last = runs.some(runs.params_N == runs.params_N.max())
    order = np.argsort(last.gflops_N, kind="stable")
    x, predicted, low, high = (np.asarray(v)[order] for v in (
        last.gflops_N, held.predicted, held.low, held.high))
    _draw_runs(ax, runs, "compute", marks)
    if len(x) > 1:
        plot_style.band(ax, x, low, high, plot_style.INK)
        ax.plot(x, predicted, color=plot_style.INK, lw=1.6, ls=(0, (4, 2)), zorder=5)
    else:
        ax.vlines(x, low, high, color=plot_style.INK, lw=1.4, zorder=4)
        ax.plot(x, predicted, ls="", marker="o", ms=9, mfc="white", mec=plot_style.INK, zorder=5)
    plot_style.log_x(ax)
    if by == "compute":
        line = np.geomspace(runs.gflops_N.min(), runs.gflops_N.max(), 60)
        ax.plot(line, held.fit.law(line), color=plot_style.INK, lw=1.2, ls=(0, (4, 2)), zorder=2)
    plot_style.log_y(ax)
    ax.set(xlabel=f"{labels.AXES['compute']} (log scale)", ylabel=one.axis)
    covered = f"{100 * held.covered:.0f}% inside" if 0 < held.covered < 1 else (
        "inside" if held.covered else "outside")
    _head(ax, one, f"{last.models[0]} foretold (dashed) by a law of {by} of the others:",
          f"off by {100 * held.error:.2g}%, {covered} the 95% interval")
    return [
        _row(one, last, int(k)) | {
            "predicted": held.predicted[k], "low_predicted": held.low[k],
            "high_predicted": held.high[k], "law_of": by, "error": held.error,
            "covered": held.covered}
        for k in order
    ]


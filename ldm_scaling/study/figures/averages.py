"""Loss, or distance, against the length of the average over training, at several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.errors import UserError
from ldm_scaling.study import labels, plot_style
from ldm_scaling.study.averages import LOSS, Cell, Measured
from ldm_scaling.study.figures import best
from ldm_scaling.study.figures.source import Drawn
from ldm_scaling.study.statistics import optimum
from ldm_scaling.study.statistics.optimum import Curve, Optimum


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One network with averages of all lengths.

    Attributes:
      measure: `loss`, or a metric's place, `distance`.
      member, params: its name and number of parameters.
      curve: of the measure, by length.
      best: where it is lowest.
      own: (length, value) of the run's `ema`; None where it was not measured.
      residual_N: of each length, see `averages.Measured`.
    """

    measure: str
    member: str
    params: int
    curve: Curve
    best: Optimum
    own: tuple[float, float] | None
    residual_N: Sequence[float]

    @property
    def least(self) -> float:
        """The lowest value that was measured."""
        return float(np.nanmin(self.curve.loss_N))


def lines(found: Iterable[Measured]) -> list[Line]:
    """The networks, small ones first, by loss and then by distance where that was measured.

    Raises:
      UserError: for a loss that is not finite, or a distance that is not above 0.
    """
    found = list(found)
    names = {m.which.member: m.params for m in found}
    members = sorted(names, key=lambda name: (names[name], name))
    out = []
    for measure in (LOSS, "distance"):
        if any(getattr(m, measure) is None for m in found):
            continue
        curves, owns, residuals = [], [], []
        for member in members:
            several = sorted((m for m in found if m.which.member == member and
                              m.which.length is not None), key=lambda m: m.length)
            values = np.array([getattr(m, measure) for m in several])
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise UserError(f"{member}: a {measure} is {values.min():g}: a best length is told "
                                "from numbers above 0: choose another --metric, or train anew")
            curves.append(Curve(np.array([m.length for m in several]), values))
            owns.append(next(((m.length, getattr(m, measure)) for m in found if
                              m.which.member == member and m.which.length is None), None))
            residuals.append([m.residual for m in several])
        out += [
            Line(measure, member, names[member], *parts) for member, *parts in zip(
                members, curves, optimum.optima(curves), owns, residuals, strict=True)
        ]
    return out


def _title(measure: str, cell: Cell | None) -> str:
    return "validation loss" if measure == LOSS else f"{labels.measure(cell.metric).short}"


def verdict(shown: Sequence[Line], cell: Cell | None) -> str:
    """What the curves say, in a paragraph for each measure."""
    out = []
    for measure in dict.fromkeys(line.measure for line in shown):
        own = [line for line in shown if line.measure == measure]
        title = _title(measure, cell)
        about = "" if measure == LOSS else f" ({cell.words})"
        bests = ", ".join(f"{best.words(line.best, _length)} at {line.member}" for line in own)
        words = [f"The length with the lowest {title}{about} is {bests}."]
        if len(own) > 1:
            words += _against_size(own, title)
        for line in own:
            if line.own is not None:
                less = 1 - line.least / line.own[1]
                words.append(
                    f"{line.member}'s lowest is {abs(100 * less):.2g}% "
                    f"{'below' if less >= 0 else 'above'} that of its ema, whose length is "
                    f"{_length(line.own[0])}.")
        for side, other in (("short", "shorter"), ("long", "longer")):
            if ends := [line.member for line in own if line.best.edge and
                        (line.curve.loss_N[0] == line.least) == (side == "short")]:
                words.append(f"The best of {labels.listing(ends)} lies at the {side} end of the "
                             f"lengths measured: measure {other} ones by --lengths, where the "
                             "snapshots give any.")
        if cut := [line.member for line in own if line.best.open and not line.best.edge]:
            words.append(f"The interval of {labels.listing(cut)} is open where the lengths "
                         "measured end.")
        out.append(" ".join(words))
    told = "Intervals are of where these curves are lowest, not of what other runs would give."
    if use := ",".join(f"{line.member}={_length(line.best.rate)}" for line in shown if
                       line.measure == shown[-1].measure and not line.best.edge):
        told += f" These lengths are used with --config.average={use}"
    return "\n".join([*out, told])


def _against_size(own: Sequence[Line], title: str) -> list[str]:
    first, last = own[0], own[-1]
    moved, how = best.moves(first.best, last.best, first.member)
    if not moved:
        return ["Whether it moves with size is not told."]
    out = [f"It {moved} with size: at {last.member}, of {last.params / first.params:.3g} times the "
           f"parameters of {first.member}, it is {how}."]
    if first.best.known and last.best.known:
        near = int(np.argmin(np.abs(np.log(last.curve.rate_N / first.best.rate))))
        lost = last.curve.loss_N[near] / last.least - 1
        out.append(
            f"At the length nearest to {first.member}'s best, {_length(last.curve.rate_N[near])}, "
            f"{last.member} has " + (f"a {title} {100 * lost:.2g}% above its lowest." if lost > 0
                                     else f"its lowest {title}."))
    return out


def _length(length: float) -> str:
    return f"{length:.2g}"


def draw(shown: Sequence[Line], cell: Cell | None) -> Drawn:
    """A panel for each measure, a line for each size: what lies above the size's lowest."""
    measures = list(dict.fromkeys(line.measure for line in shown))
    marks = plot_style.marks(list(dict.fromkeys(line.member for line in shown)))
    fig = plot_style.figure(5.4 * len(measures), 5.2)
    axes = fig.subplots(1, len(measures), squeeze=False)[0]
    for ax, measure in zip(axes, measures, strict=True):
        own = [line for line in shown if line.measure == measure]
        for line in own:
            _draw(ax, line, marks[line.member])
        plot_style.log_x(ax)
        top = min(ax.get_ylim()[1], _top(own))
        ax.set_ylim(-0.1 * top, top)
        title = _title(measure, cell)
        ax.set(title=title[0].upper() + title[1:], xlabel="Length of the average, relative "
               "standard deviation (log scale)", ylabel=f"{title[0].upper() + title[1:]}, % above "
               "the network's lowest")
        ax.legend(title="Network, its best length (star) and 95% interval; its ema (ring)",
                  alignment="left", loc="upper left", bbox_to_anchor=(0.0, -0.16))
    plot_style.title(fig, "Which length of the average is best at which size")
    return Drawn(fig, [row for line in shown for row in _rows(line, cell)])


def _top(own: Sequence[Line]) -> float:
    """Where a panel ends: lengths that are far too long are not what it is about."""
    every = [_above(line, value) for line in own for value in line.curve.loss_N]
    emas = [_above(line, line.own[1]) for line in own if line.own]
    return 1.3 * max(float(np.percentile(every, 75)), *emas, 1e-3)


def _above(line: Line, value: float | np.ndarray) -> float | np.ndarray:
    return 100 * (value / line.least - 1)


def _draw(ax: Axes, line: Line, mark: Mapping[str, str]) -> None:
    own, color = line.best, mark["color"]
    name = f"{line.member}  {best.words(own, _length)}"
    at = _above(line, own.loss)
    ax.plot(line.curve.rate_N, _above(line, line.curve.loss_N), label=name, zorder=3, **mark)
    ax.plot(best.shown(own, *line.curve.rate_N[[0, -1]]), [at] * 2, color=color, lw=5, alpha=0.3,
            zorder=2, solid_capstyle="butt")
    if own.known:
        ax.plot([own.rate], [at], ls="", marker="*", ms=13, mfc="white", mec=color, mew=1.4,
                zorder=5)
    if line.own is not None:
        length, value = line.own
        ax.plot([length], [_above(line, value)], ls="", marker="o", ms=9, mfc="none", mec=color,
                mew=1.6, zorder=4)


def _rows(line: Line, cell: Cell | None) -> list[dict[str, object]]:
    """Every point, that of the run's `ema` last, and the best."""
    name = LOSS if line.measure == LOSS else cell.metric
    points = [*zip(line.curve.rate_N, line.curve.loss_N, line.residual_N, strict=True)]
    points += [] if line.own is None else [(*line.own, 0.0)]
    return [
        {
            "model": line.member, "params": line.params, "measure": name,
            "length": float(length), "value": float(value), "residual": float(residual),
            "ema": number == len(line.curve.rate_N), **best.columns(line.best, "best_length"),
            "best_value": line.best.loss, "at_an_end": line.best.edge,
        }
        for number, (length, value, residual) in enumerate(points)
    ]

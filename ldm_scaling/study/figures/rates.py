"""Loss against learning rate at several widths, with width transfer and without."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from ldm_scaling.errors import UserError
from ldm_scaling.study import labels, plot_style
from ldm_scaling.study.figures import best
from ldm_scaling.study.figures.source import Drawn
from ldm_scaling.study.rates import Trained
from ldm_scaling.study.statistics import optimum
from ldm_scaling.study.statistics.optimum import Curve, Optimum

TITLES = {"none": "Standard parametrisation", "mup": "Width transfer (muP)"}
# Losses above so many times the best of all are out of the picture.
_TOP = 1.9


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """One network at all rates.

    Attributes:
      transfer, member, width: see `rates.Trained`.
      curve: losses, the mean over seeds; NaN where a seed's training diverged.
      best: where it is lowest.
    """

    transfer: str
    member: str
    width: int
    curve: Curve
    best: Optimum


def lines(found: Iterable[Trained]) -> list[Line]:
    """The networks, narrow ones first, without width transfer first.

    Raises:
      UserError: where training diverged at all but two rates of one, or at all but four of each.
    """
    by: dict[tuple[str, int, str], dict[float, list[float]]] = {}
    for one in found:
        losses = by.setdefault((one.run.transfer, one.width, one.run.member), {})
        loss = np.nan if one.loss is None else one.loss
        losses.setdefault(one.run.rate, []).append(loss)
    order = sorted(by, key=lambda k: (tuple(TITLES).index(k[0]), k[1], k[2]))
    curves = [
        Curve(np.array(sorted(by[k])), np.array([np.mean(by[k][r]) for r in sorted(by[k])]))
        for k in order
    ]
    for (transfer, _, member), curve in zip(order, curves, strict=True):
        if curve.known < optimum.LEAST:
            raise UserError(
                f"{member}, {TITLES[transfer]}: training ended at fewer than 3 of the rates "
                f"{', '.join(f'{r:g}' for r in curve.rate_N)}: add lower ones by --rates"
            )
    if curves and max(curve.known for curve in curves) < optimum.NOISE_FROM:
        raise UserError(
            f"no network was trained at {optimum.NOISE_FROM} rates without diverging, from which "
            "noise is told: add lower ones by --rates"
        )
    return [
        Line(transfer, member, width, curve, best) for (transfer, width, member), curve, best in
        zip(order, curves, optimum.optima(curves), strict=True)
    ]


def verdict(shown: Sequence[Line]) -> str:
    """What the curves say, in a paragraph."""
    out = []
    for transfer, title in TITLES.items():
        own = [line for line in shown if line.transfer == transfer]
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        moved, how = best.moves(first.best, last.best, first.member)
        bests = ", ".join(f"{best.place(line.best, _rate)} at {line.member}" for line in own)
        if moved:
            out.append(
                f"{title}: the best rate {moved} with width ({bests}): at {last.member}, "
                f"{last.width / first.width:.3g} times as wide as {first.member}, it is {how}.")
        else:
            out.append(f"{title}: whether the best rate moves with width is not told ({bests}).")
        if first.best.known and last.best.known:
            out.append(_at_best_of(first, last))
        beyond = {line.member: _beyond(line) for line in own}
        for side in ("lower", "higher"):
            if ends := [m.member for m in own if m.best.edge and _at_highest(m) ==
                        (side == "higher") and not (beyond[m.member] and _at_highest(m))]:
                out.append(f"The best of {labels.listing(ends)} lies at an end of the rates tried: "
                           f"add {side} ones by --rates.")
        if cut := [m.member for m in own if m.best.open and not m.best.edge]:
            out.append(f"The interval of {labels.listing(cut)} is open where the rates tried end.")
        for line in own:
            if between := beyond[line.member]:
                low, high = map(_rate, between)
                what = f"best of {line.member} lies at {low}, and the next rate, {high}, diverges"
                if not _at_highest(line):
                    what = (f"interval of {line.member} ends at {high}, which diverges, and the "
                            f"rate before it is {low}")
                out.append(f"The {what}: try rates between.")
    return " ".join(out)


def _at_best_of(first: Line, last: Line) -> str:
    """What the last network has at the rate that is best for the first."""
    near = int(np.argmin(np.abs(np.log(last.curve.rate_N / first.best.rate))))
    lost = last.curve.loss_N[near] / np.nanmin(last.curve.loss_N) - 1
    return (
        f"At the rate nearest to {first.member}'s best, {_rate(last.curve.rate_N[near])}, "
        f"{last.member} " + (
            "diverges." if np.isnan(lost) else
            f"has a loss {100 * lost:.2g}% above its lowest." if lost > 0 else
            "has its lowest loss.")
    )


def _at_highest(line: Line) -> bool:
    """Whether the loss is lowest at the highest rate that did not diverge."""
    known_N = np.isfinite(line.curve.loss_N)
    return bool(np.argmin(line.curve.loss_N[known_N]) == known_N.sum() - 1)


def _beyond(line: Line) -> tuple[float, float] | None:
    """The highest rate that did not diverge and the next, which did, where the best of a line or
    its interval ends there; else None."""
    high = line.curve.beyond
    if high == math.inf or not np.isclose(line.best.high, high):
        return None
    return float(line.curve.rate_N[line.curve.rate_N < high][-1]), high


def _rate(rate: float) -> str:
    return f"{rate:.2g}"


def draw(shown: Sequence[Line]) -> Drawn:
    """A panel for each parametrisation, a line for each width; the best with its interval."""
    transfers = [t for t in TITLES if any(line.transfer == t for line in shown)]
    members = list(dict.fromkeys(
        line.member for line in sorted(shown, key=lambda line: line.width)
    ))
    marks = plot_style.marks(members)
    fig = plot_style.figure(4.6 * len(transfers), 5.2)
    axes = fig.subplots(1, len(transfers), sharex=True, sharey=True, squeeze=False)[0]
    lowest = min(np.nanmin(line.curve.loss_N) for line in shown)
    for ax, transfer in zip(axes, transfers, strict=True):
        own = [line for line in shown if line.transfer == transfer]
        for line in own:
            _draw(ax, line, marks[line.member])
        plot_style.log_x(ax)
        plot_style.log_y(ax)
        ax.set(title=TITLES[transfer], xlabel="Learning rate (log scale)")
    top = min(axes[0].get_ylim()[1], _TOP * lowest)
    axes[0].set_ylim(top=top)
    plot_style.log_y(axes[0])
    axes[0].set_ylabel("Validation loss (log scale)")
    for ax, transfer in zip(axes, transfers, strict=True):
        for line in shown:
            gone = line.curve.rate_N[np.isnan(line.curve.loss_N)]
            if line.transfer == transfer and len(gone):
                ax.plot(gone, np.full(len(gone), top), ls="", marker="x", clip_on=False,
                        color=marks[line.member]["color"], zorder=6)
        ax.legend(title="Network, its best rate (star) and 95% interval", alignment="left",
                  loc="upper left", bbox_to_anchor=(0.0, -0.16))
    plot_style.title(fig, "Which learning rate is best at which width")
    return Drawn(fig, [row for line in shown for row in _rows(line)])


def _draw(ax: Axes, line: Line, mark: Mapping[str, str]) -> None:
    own, color = line.best, mark["color"]
    name = f"{line.member}  {best.words(own, _rate)}"
    ax.plot(line.curve.rate_N, line.curve.loss_N, label=name, zorder=3, **mark)
    ax.plot(best.shown(own, *line.curve.rate_N[[0, -1]]), [own.loss] * 2, color=color, lw=5,
            alpha=0.3, zorder=2, solid_capstyle="butt")
    if own.known:
        ax.plot([own.rate], [own.loss], ls="", marker="*", ms=13, mfc="white", mec=color, mew=1.4,
                zorder=5)


def _rows(line: Line) -> list[dict[str, object]]:
    """Every point, and the best."""
    return [
        {
            "transfer": line.transfer, "model": line.member, "width": line.width,
            "rate": float(rate), "loss": None if np.isnan(loss) else float(loss),
            **best.columns(line.best, "best_rate"), "best_loss": line.best.loss,
            "at_an_end": line.best.edge,
        }
        for rate, loss in zip(line.curve.rate_N, line.curve.loss_N, strict=True)
    ]

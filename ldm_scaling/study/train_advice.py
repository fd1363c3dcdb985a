"""Advice on training: the size and the pictures for a budget of training, or of training and then
drawing, by the law of a study's own losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.models.cost import Cost
from ldm_scaling.study import labels
from ldm_scaling.study.statistics import scaling
from ldm_scaling.study.statistics.laws import Law
from ldm_scaling.study.statistics.scaling import BACKWARD, Runs

# How many times the least and the most compute that was measured the law is followed.
_BELOW, _BEYOND = 100.0, 1e10

Estimate = tuple[float, float, float]
"""A number, and the low and high end of its 95% interval."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What is drawn with a network once it is trained.

    Attributes:
      pictures: so many.
      calls: of the network, for each: twice the steps, where they are guided.
    """

    pictures: int
    calls: int

    @property
    def all_calls(self) -> int:
        return self.pictures * self.calls


@dataclasses.dataclass(frozen=True)
class Size:
    """A network that there is, trained for the budget.

    Attributes:
      name, params, gflops: of it, the last of a call.
      images: that the budget trains it on; 0 where drawing alone takes all of it.
      loss: that the law foretells; infinite without training.
      times: how many times the budget it takes for the best size's loss; infinite where it never
        has that.
    """

    name: str
    params: int
    gflops: float
    images: float
    loss: float
    times: float


@dataclasses.dataclass(frozen=True, eq=False)
class TrainAdvice:
    """What to train.

    Attributes:
      gflops: the budget, in GFLOPs of training and of drawing.
      drawing: what else is paid from it; None where it is training's alone.
      law: of GFLOPs of a call and images.
      points, models, runs: what it is fitted to: so many losses of these sizes, in so many training
        runs.
      measured: the least and the most compute, GFLOPs of a call and images among them.
      with_best, replicates: of so many replicates of the law so many have a best size; intervals
        are of these.
      size: GFLOPs of a call of the best network.
      images: that it is trained on.
      loss: that it comes to.
      half: how many times the budget a network of half these FLOPs takes for the same loss.
      sizes: networks that there are, rising.
    """

    gflops: float
    drawing: Drawing | None
    law: Law
    points: int
    models: tuple[str, ...]
    runs: int
    measured: Mapping[str, tuple[float, float]]
    with_best: int
    replicates: int
    size: Estimate
    images: Estimate
    loss: Estimate
    half: Estimate
    sizes: tuple[Size, ...]

    @property
    def nearest(self) -> Size:
        """Of `sizes` the one whose FLOPs are nearest to the best's; with drawing, which the next
        larger may not leave anything of, the one with the least loss."""
        if self.drawing:
            return min(self.sizes, key=lambda s: s.loss)
        return min(self.sizes, key=lambda s: abs(np.log(s.gflops / self.size[0])))

    @property
    def training(self) -> float:
        """GFLOPs of training alone."""
        return BACKWARD * self.size[0] * self.images[0]


def advise(
    runs: Runs, gflops: float, sizes: Mapping[str, Cost], drawing: Drawing | None = None
) -> TrainAdvice:
    """The best size for a budget of training, by Hoffmann et al.'s approach 3 (2022): the law of
    all runs, its least at this compute, and replicates of both. With drawing in the same budget it
    is smaller and trained for longer, as Sardana et al. (2024) have it.

    Args:
      runs: losses along training, compute with the backward pass.
      gflops: the budget, in GFLOPs: of a call x (`BACKWARD` x images + calls of drawing).
      sizes: networks to name, by name.
      drawing: what else is paid from it.

    Raises:
      UserError: where the runs are too few for the law, it has no best size, or the budget lies far
        from all of them, or drawing leaves nothing of it.
    """
    names = tuple(dict.fromkeys(runs.models))
    if not runs.several_lengths:
        lengths = len(np.unique(runs.images_N))
        raise UserError(
            f"a budget of training needs losses of {scaling.LEAST_SIZES} sizes at {scaling.LEAST} "
            f"lengths of training each, beyond the first {scaling.SETTLED:.0%} of a run; there are "
            f"{len(runs.models)} losses of {labels.counted(len(names), 'size')} "
            f"({', '.join(names)}) at {labels.counted(lengths, 'length')}: train more sizes, or "
            "set train.validate_every"
        )
    least, most = float(runs.gflops_N.min()), float(runs.gflops_N.max())
    if not least / _BELOW <= gflops <= most * _BEYOND:
        raise UserError(
            f"the budget comes to {gflops * 1e9:.3g} FLOPs of training, and the runs to "
            f"{least * 1e9:.3g} to {most * 1e9:.3g}: their law says nothing of what lies so far "
            "away; give another")
    # Of a call, where `Runs` has what training on a picture takes.
    forward = dataclasses.replace(runs, gflops_N=runs.gflops_N / BACKWARD)
    fit = forward.fitted("call and images", replicates=scaling.REPLICATES)
    calls = drawing.all_calls if drawing else 0
    spent = np.array(gflops), BACKWARD, calls / BACKWARD
    laws = [law for law in fit.replicates if law.has_best(*spent)]
    if not fit.law.has_best(*spent) or not laws:
        a, b = fit.law.exponents
        raise UserError(
            f"the losses of {', '.join(names)} tell no best size: by their law they fall with size "
            f"to the power {-a:.2g} and with pictures to the power {-b:.2g}, and both must help: "
            "train sizes that lie further apart, or longer"
        )

    def estimate(of) -> Estimate:
        # Of ends that may be infinite no mean is taken.
        ends = np.percentile([of(law) for law in laws], (2.5, 97.5), method="nearest")
        return float(of(fit.law)), float(ends[0]), float(ends[1])

    def best(law: Law) -> float:
        return law.best_split(*spent)[0]

    columns = {"compute": runs.gflops_N, **dict(zip(
        ("size", "images"), forward.scales("call and images").T, strict=True))}
    measured = {name: (float(x_N.min()), float(x_N.max())) for name, x_N in columns.items()}
    named = sorted(sizes.items(), key=lambda item: item[1].gflops)
    call_S = np.array([cost.gflops for _, cost in named])
    images_S = np.maximum(gflops / call_S - calls, 0) / BACKWARD
    loss_S = np.full(len(named), np.inf)
    trained_S = images_S > 0
    if not trained_S.any():
        raise UserError(
            f"drawing takes all of the budget: {calls:,} calls of {named[0][0]}, the smallest, are "
            f"{calls * call_S[0] * 1e9:.3g} FLOPs, and the budget is {gflops * 1e9:.3g}: give a "
            "larger one, or fewer pictures or calls")
    loss_S[trained_S] = fit.law(np.stack([call_S, images_S], axis=1)[trained_S])
    times_S = fit.law.off_best(call_S, *spent)
    return TrainAdvice(
        gflops, drawing, fit.law, len(runs.models), names, len({*runs.each}),
        measured, len(laws), len(fit.replicates), estimate(best),
        estimate(lambda law: law.best_split(*spent)[1]),
        estimate(lambda law: law.least(*spent)[0]),
        estimate(lambda law: law.off_best(best(law) / 2, *spent)),
        tuple(
            Size(name, cost.params, cost.gflops, float(images), float(loss), float(times))
            for (name, cost), images, loss, times in zip(
                named, images_S, loss_S, times_S, strict=True)
        ),
    )

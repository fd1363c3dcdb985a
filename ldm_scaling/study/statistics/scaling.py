"""Scaling laws of a study's own networks: quality or loss against size, images seen, compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ldm_scaling.config import repeats
from ldm_scaling.errors import UserError
from ldm_scaling.study.records import Record
from ldm_scaling.study.statistics import fits, isoflop, laws, trends
from ldm_scaling.study.statistics.fits import Fit, HeldOut
from ldm_scaling.study.statistics.isoflop import Frontier

By = Literal["size", "images", "compute", "size and images", "call and images"]

BACKWARD = 3.0
"""FLOPs of a training step over those of its forward pass: the gradient takes twice as many."""
SETTLED = 0.1
"""Share of a training run, at its beginning, that enters no law: the learning rate warms up."""
LEAST = 3
LEAST_SIZES = 4
"""Sizes for a law of size and training: factor, exponent and level fit any three sizes' luck."""
REPLICATES = 200
WITHOUT_BEST = 0.05
"""Share of replicates without a best size above which the others' interval would be another's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """Trained networks, one row each (several along a run, where it was measured several times).

    Attributes:
      models: names of the sizes.
      params_N: parameters.
      images_N: training images seen.
      gflops_N: training compute: `BACKWARD` x GFLOPs of a call x images.
      value_N: the quality or loss, smaller is better, above 0.
      value_RN: its paired replicates, where records hold them; None otherwise.
      runs: names of the training runs; those of `models` where each was trained once.
    """

    models: tuple[str, ...]
    params_N: np.ndarray
    images_N: np.ndarray
    gflops_N: np.ndarray
    value_N: np.ndarray
    value_RN: np.ndarray | None = None
    runs: tuple[str, ...] = ()

    @property
    def each(self) -> tuple[str, ...]:
        """The training run of each row."""
        return self.runs or self.models

    @property
    def networks(self) -> int:
        """How many there are of other sizes or lengths of training."""
        return len({*zip(self.models, self.images_N.tolist(), strict=True)})

    def scales(self, by: By) -> np.ndarray:
        """The columns that a law is fitted over, (N, 1) or (N, 2).

        Those of "call and images" multiply to the compute, whatever a parameter costs, so that the
        law's `Law.least` with `per=1` is of a training budget.
        """
        columns = {"size": [self.params_N], "images": [self.images_N], "compute": [self.gflops_N],
                   "size and images": [self.params_N, self.images_N],
                   "call and images": [self.gflops_N / self.images_N, self.images_N]}
        if by not in columns:
            raise UserError(f"a law is fitted by {', '.join(columns)}; not by {by!r}")
        return laws.scales(np.stack(columns[by], axis=1))

    @property
    def several_lengths(self) -> bool:
        """Whether they are enough, in sizes and lengths of training, for a law of both."""
        sizes, lengths = (len(np.unique(v)) for v in (self.params_N, self.images_N))
        return sizes >= LEAST_SIZES and lengths >= LEAST and len(self.models) >= LEAST * sizes

    def fitted(
        self, by: By, *, offset: bool = True, delta: float = fits.DELTA, replicates: int = 200
    ) -> Fit:
        """The law, with replicates that draw each run's luck and its points' noise, see
        `scatter.Scatter`; the luck only from 4 sizes on (with an offset; 3 without). Through fewer,
        or through 4 ends of runs by two scales, the law always passes: it has no intervals then.

        Luck is of a size: several runs of one share how far their size lies from the law, and are
        noise about it. What paired replicates say of the choice of prompts is the smaller part of
        the doubt; `fits.bootstrap(..., y_RN=runs.value_RN)` has that part.
        """
        x_NK = self.scales(by)
        fit = fits.fit(x_NK, self.value_N, offset=offset, delta=delta)
        return fits.bootstrap(fit, x_NK, self.value_N, replicates=replicates, runs=self.models)

    def held_out(
        self, by: By, *, offset: bool = True, delta: float = fits.DELTA, replicates: int = 200
    ) -> HeldOut:
        """What the smaller sizes foretell of the largest's run, see `fits.without`.

        Raises:
          UserError: where a law passes through any luck of the smaller sizes, see `fitted`.
        """
        largest_N = self.params_N == self.params_N.max()
        return fits.without(
            self.scales(by), self.value_N, largest_N, offset=offset, delta=delta,
            replicates=replicates, runs=self.models,
        )

    def frontier(
        self, count: int = 5, *, delta: float = fits.DELTA, replicates: int = 200, seed: int = 0
    ) -> Frontier:
        """The best size for a training budget, by iso-FLOP profiles of `at_budgets(count)`.

        All budgets are read off the same runs, so a replicate moves the runs' points, by the
        scatter about a law of calls and images, and is interpolated anew.

        Raises:
          UserError: where runs are too few for profiles, or too short for that law.
        """
        rows, weight_BN = self._interpolated(count)
        columns = (rows.gflops_N * 1e9, rows.params_N, rows.value_N)
        exact = isoflop.EXACT
        # Raises before what takes long.
        isoflop.frontier(*columns, replicates=1, tolerance=exact)
        fit = fits.fit(self.scales("call and images"), self.value_N, delta=delta)
        noise_RN, _ = fit.scatter_by(self.models).draw(replicates, np.random.default_rng(seed))
        loss_RB = np.exp((np.log(self.value_N) + noise_RN) @ weight_BN.T)
        return isoflop.frontier(*columns, loss_RN=loss_RB, tolerance=exact)

    def some(self, number_N: np.ndarray) -> Runs:
        """The rows with these numbers, or marks."""
        number_N = np.arange(len(self.models))[number_N]
        return Runs(
            tuple(self.models[k] for k in number_N), self.params_N[number_N],
            self.images_N[number_N], self.gflops_N[number_N], self.value_N[number_N],
            None if self.value_RN is None else self.value_RN[:, number_N],
            tuple(self.runs[k] for k in number_N) if self.runs else (),
        )

    def ends(self) -> Runs:
        """The last row of each run."""
        return self.some(np.array([
            max(np.flatnonzero(np.array(self.each) == run), key=lambda k: self.images_N[k])
            for run in dict.fromkeys(self.each)
        ]))

    def at_budgets(self, count: int = 5) -> Runs:
        """What each size would have at the same training budgets, for iso-FLOP profiles.

        Interpolated along each size's run, straight on log axes; of a size only at budgets that its
        run passes. With a constant learning rate the middle of a run is the end of a shorter one.

        Args:
          count: budgets, spread evenly on a log axis over where `isoflop.LEAST_SIZES` runs meet.

        Returns:
          Rows by budget; none where so many runs meet nowhere.
        """
        return self._interpolated(count)[0]

    def _interpolated(self, count: int) -> tuple[Runs, np.ndarray]:
        """`at_budgets`, and the weights of these rows' log values in its own (B, N)."""
        names, logc_N = np.array(self.each), np.log(self.gflops_N)
        runs = []
        for name in dict.fromkeys(self.each):
            own = np.flatnonzero(names == name)
            runs.append(own[np.argsort(logc_N[own], kind="stable")])
        sizes_M = np.array([self.params_N[own[0]] for own in runs])
        ends_M2 = np.array([(logc_N[own[0]], logc_N[own[-1]]) for own in runs])
        there = [
            c for c in np.unique(ends_M2)
            if len(np.unique(sizes_M[(ends_M2[:, 0] <= c) & (c <= ends_M2[:, 1])]))
            >= isoflop.LEAST_SIZES
        ]
        rows, weights = [], []
        for c in np.unique(np.linspace(min(there), max(there), count)) if there else ():
            for own, (low, high) in zip(runs, ends_M2, strict=True):
                if low - 1e-9 <= c <= high + 1e-9:
                    weight_N = np.zeros(len(names))
                    weight_N[own] = [np.interp(c, logc_N[own], one) for one in np.eye(len(own))]
                    first, gflops = own[0], np.exp(c)
                    images = self.images_N[first] * gflops / self.gflops_N[first]
                    value = np.exp(weight_N @ np.log(self.value_N))
                    rows.append((self.models[first], self.params_N[first], images, gflops, value))
                    weights.append(weight_N)
        models, *columns = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        met = Runs(tuple(map(str, models)), *(np.array(one, np.float64) for one in columns))
        return met, np.array(weights).reshape(len(weights), len(names))


def of_records(
    records: Sequence[Record], metric: str, batch_size: int, select_block: int = 0,
    report_block: int = 1,
) -> Runs:
    """Quality of each trained network at the steps and sampler that `trends.networks` compares.

    Args:
      records: of one study, at any training steps.
      metric: a distance (smaller is better, above 0).
      batch_size: of training: images per step.
      select_block, report_block: of the guidance.

    Raises:
      UserError: without a reported record.
    """
    found = trends.networks(records, metric, select_block, report_block)
    if not found:
        raise UserError("no network has a reported record: run the sweep first")
    images_N = np.array([float(n.train_step) * batch_size for n in found])
    drawn = [n.point.replicates_R for n in found]
    paired = len({d.size for d in drawn}) == 1 and drawn[0].size > 0
    return Runs(
        tuple(n.model for n in found), np.array([float(n.params) for n in found]), images_N,
        BACKWARD * np.array([n.gflops for n in found]) * images_N,
        np.array([n.point.value for n in found]), np.stack(drawn, axis=1) if paired else None,
    )


def of_losses(
    losses: Mapping[str, Sequence[tuple[int, float]]], params: Mapping[str, int],
    gflops: Mapping[str, float], batch_size: int, settled: float = 0.0,
) -> Runs:
    """Validation losses along training runs.

    Only runs whose learning rate has settled by then follow one law of size and images: leave out
    steps in the warm-up.

    Args:
      losses: training run, see `config.repeats`, by a size's name the first -> (step, validation
        loss) along it. One that is shorter than another of its size is under way, and left out.
      params, gflops: of each size.
      batch_size: images per step.
      settled: share of each run that is left out at its beginning.

    Raises:
      UserError: without a validation loss.
    """
    size_of = {m: m if m in params else repeats.parse(m)[0] for m in losses}
    ends = {m: max((step for step, _ in run), default=0) for m, run in losses.items()}
    longest = {size: max(end for m, end in ends.items() if size_of[m] == size)
               for size in size_of.values()}
    rows = [(m, step, loss) for m, run in losses.items() for step, loss in run
            if step > 0 and step >= settled * ends[m] and ends[m] == longest[size_of[m]]]
    sizes = tuple(size_of[m] for m, _, _ in rows)
    if not rows:
        raise UserError("no training run has a validation loss: set train.validate_every")
    images_N = np.array([float(step) * batch_size for _, step, _ in rows])
    return Runs(
        sizes, np.array([float(params[m]) for m in sizes]), images_N,
        BACKWARD * np.array([gflops[m] for m in sizes]) * images_N,
        np.array([loss for _, _, loss in rows]), runs=tuple(m for m, _, _ in rows),
    )

"""Races: guidance rates (or any arms) lose by halves, so that images go where they decide.

Successive halving (Jamieson and Talwalkar 2016; Karnin, Koren and Somekh 2013): every round has
half as many arms with twice as many images each. Arms share prompts and noise, so that they are
compared in pairs; distances are foretold for one number of images (`metrics.foretold`), as arms of
more variety look worse while there are few. Pure bookkeeping: it is told scores and says who draws
how many more images. A race is a function of its scores, so that one that was stopped goes on from
its records.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import scipy

from ldm_scaling.config import measuring
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import bootstrap, foretold
from ldm_scaling.metrics.frechet import ReferenceStats, frechet_from_features

Arm = Hashable
"""What races: a guidance rate, a pair of steps and guidance, ..."""

LEAST = measuring.LEAST_RACED
"""Images of an arm in the first round, at least."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """What an arm reached with the images of a round.

    Attributes:
      loss: smaller is better.
      replicates_R: centred bootstrap replicates of it, paired between arms.
    """

    loss: float
    replicates_R: np.ndarray


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a race ended.

    Attributes:
      choice: the arm with the least loss in the last round.
      decided: whether it is the winner for sure: every other arm was beaten significantly, at its
        last round. Among identical arms that happens at most at the race's `error` rate.
      tied: the arms that could not be told from the choice; empty where `decided`.
      images: how many were drawn in all.
    """

    choice: Arm
    decided: bool
    tied: tuple[Arm, ...]
    images: int


def schedule(arms: int, images: int, saving: float = 4.0) -> tuple[int, ...]:
    """Images of an arm after each round, see `config.measuring.race_rounds`.

    Args:
      arms: how many start.
      images: what each would draw on the full grid.
      saving: full grid's images over the race's, at least 1.

    Raises:
      UserError: when the first round would have fewer than `LEAST` images, or there is one arm.
    """
    if arms < 2 or saving < 1:
        raise UserError(
            f"a race of {arms} arms that saves {saving} times: it needs 2 arms and a saving of at "
            "least 1"
        )
    rounds = measuring.race_rounds(arms, images, saving)
    if rounds[0] < LEAST:
        raise UserError(
            f"a race of {arms} arms over {images} images that saves {saving:g} times would start "
            f"with {rounds[0]} images an arm: {LEAST} are needed; raise sweep.num_images or use "
            "sweep.strategy=grid"
        )
    return tuple(sorted(set(rounds)))


@dataclasses.dataclass(frozen=True, eq=False)
class Race:
    """A race as far as it has been run.

    Attributes:
      arms: in the order in which ties are decided: the first wins.
      rounds: images of an arm after each round, rising; see `schedule`.
      error: the most probable that a winner is declared among identical arms.
      told: the scores of each finished round, of the arms that ran it.
    """

    arms: tuple[Arm, ...]
    rounds: tuple[int, ...]
    error: float = 0.05
    told: tuple[Mapping[Arm, Score], ...] = ()

    def __post_init__(self):
        if len(set(self.arms)) < max(len(self.arms), 2):
            raise UserError(f"a race needs at least 2 different arms, got {self.arms}")
        if not self.rounds or list(self.rounds) != sorted(set(self.rounds)) or self.rounds[0] < 1:
            raise UserError(f"images after each round of a race rise, got {self.rounds}")
        if not 0 < self.error < 1:
            raise UserError(f"a race's error rate is between 0 and 1, got {self.error}")

    @property
    def live(self) -> tuple[Arm, ...]:
        """The arms of the next round, in order; () when the race is over. One that is left alone
        runs on, so that the choices of several races have the same number of images."""
        if not self.told:
            return self.arms
        if len(self.told) == len(self.rounds):
            return ()
        last = self.told[-1]
        order = self._ranked(last)
        beaten = {a for a in order[1:] if self._beats(last[order[0]], last[a])}
        kept = [a for a in order[: math.ceil(len(order) / 2)] if a not in beaten]
        return tuple(a for a in self.arms if a in kept)

    @property
    def span(self) -> tuple[int, int]:
        """Numbers of the images that the next round draws: from, up to."""
        done = len(self.told)
        return (self.rounds[done - 1] if done else 0), self.rounds[min(done, len(self.rounds) - 1)]

    @property
    def over(self) -> bool:
        """Whether there is nothing more to draw."""
        return not self.live

    def tell(self, scores: Mapping[Arm, Score]) -> Race:
        """The race after one more round.

        Args:
          scores: of each live arm, on all its images so far.

        Raises:
          UserError: when the arms are not the live ones, or replicates are not paired.
        """
        if not scores or set(scores) != set(self.live):
            raise UserError(f"this round is run by {self.live}, got scores of {tuple(scores)}")
        if len({s.replicates_R.size for s in scores.values()}) > 1:
            raise UserError("scores of one round need the same number of paired replicates")
        return dataclasses.replace(self, told=(*self.told, dict(scores)))

    @property
    def images(self) -> int:
        """Images drawn so far, over all arms."""
        before = (0, *self.rounds)
        return sum(len(t) * (self.rounds[k] - before[k]) for k, t in enumerate(self.told))

    def outcome(self) -> Outcome:
        """Raises `UserError` while the race goes on."""
        if not self.over:
            raise UserError(f"the race goes on: {self.live} have another round to run")
        choice = self._ranked(self.told[-1])[0]
        met = {a: t for t in self.told for a in t}  # The last round that an arm ran.
        tied = tuple(
            a for a in self.arms
            if a != choice and not self._beats(met[a][choice], met[a][a])
        )
        return Outcome(choice, not tied, tied, self.images)

    def _ranked(self, scores: Mapping[Arm, Score]) -> list[Arm]:
        return sorted(scores, key=lambda a: (scores[a].loss, self.arms.index(a)))

    def _beats(self, a: Score, b: Score) -> bool:
        """Whether a is better than b for sure.

        One-sided, at error / (arms x rounds): a winner must beat each other arm, in one of the
        rounds, so among identical arms each wins with probability error / arms at most.
        """
        level = self.error / (len(self.arms) * len(self.rounds))
        error = float(np.std(b.replicates_R - a.replicates_R, ddof=1))
        gap = b.loss - a.loss
        if error == 0:
            return gap > 0
        return bool(gap / error > scipy.stats.t.isf(level, a.replicates_R.size - 1))


def run(race: Race, score: Callable[[Arm, int], Score]) -> Race:
    """Runs a race to its end.

    Args:
      race: as far as it is.
      score: `score(arm, n)`, the score of an arm's first n images.
    """
    while not race.over:
        n = race.span[1]
        race = race.tell({arm: score(arm, n) for arm in race.live})
    return race


def frechet_score(
    features_ND: np.ndarray, reference: ReferenceStats, images: int, replicates: int, seed: int
) -> Score:
    """The Fréchet distance that `images` images would have, see `metrics.foretold`, and its
    replicates, paired between arms by n and `seed`."""
    n = len(features_ND)
    counts_RN = bootstrap.resample_counts(n, replicates, seed)
    loss = frechet_from_features(features_ND, reference)
    drawn_R = bootstrap.frechet_replicates(features_ND, reference, counts_RN)
    loss = foretold.foretold(loss, float(drawn_R.mean()), n, images, reference)
    return Score(loss, bootstrap.centre(loss, drawn_R))


def on_features(
    features: Mapping[Arm, np.ndarray], reference: ReferenceStats, *, saving: float = 4.0,
    error: float = 0.05, replicates: int = 60, order_N: Sequence[int] | None = None, seed: int = 0,
) -> Race:
    """A race over the stored features of an exhaustive sweep, as if they were drawn for it.

    Args:
      features: arm to features (N, D) of the same prompts and noise.
      reference: statistics of real pictures.
      saving, error: see `schedule` and `Race`.
      replicates: bootstrap replicates of a score.
      order_N: the order in which prompts are drawn; as they lie, unless given.
      seed: of the bootstrap.
    """
    arms = tuple(features)
    total = {len(f) for f in features.values()}
    if len(total) != 1:
        raise UserError(f"arms of a race have {sorted(total)} images: they share prompts and noise")
    (total,) = total
    order_N = np.arange(total) if order_N is None else np.asarray(order_N)
    race = Race(arms, schedule(len(arms), total, saving), error)
    return run(
        race, lambda arm, n: frechet_score(
            features[arm][order_N[:n]], reference, total, replicates, seed)
    )

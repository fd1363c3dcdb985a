"""How measurements of trained networks scatter about a law: by run, and within runs."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Scatter:
    """How points scatter about a law where several are of one training run.

    A run's luck (its initialisation, its order of data) moves all of its points, so they are worth
    little more than one: on what tells runs apart, the law knows as much as there are runs. This is
    the balanced model with a random offset per run (Davison and Hinkley 1997, section 3.8), whose
    few offsets are drawn from Student's t instead of from themselves.

    Attributes:
      run_N: number of each point's run, from 0.
      sd: standard deviation of the runs' mean log residuals.
      freedom: its degrees of freedom: runs, less the parameters that the runs' levels are fitted
        by. At 0 or below the law goes through any levels: `sd` is 0 then, and says nothing.
      within_N: log residuals about their run's mean, scaled up by what the fit took away.
    """

    run_N: np.ndarray
    sd: float
    freedom: int
    within_N: np.ndarray

    def draw(self, replicates: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Log noise (R, N) as that of the points, and the runs' standard deviation in each (R,).

        The standard deviation is itself known from few runs, so each replicate has its own
        (sd^2 x freedom / chi^2), which gives offsets, and what is fitted to them, Student's tails.
        """
        share_NG = np.eye(self.run_N.max() + 1)[self.run_N]
        within_RN = rng.choice(self.within_N, (replicates, len(self.run_N)))
        # The runs' means hold what noise within runs leaves of itself in them: not twice.
        within_RN -= within_RN @ (share_NG / share_NG.sum(axis=0)) @ share_NG.T
        luck_R = np.zeros(replicates)
        if self.freedom > 0:
            luck_R = self.sd * np.sqrt(self.freedom / rng.chisquare(self.freedom, replicates))
        offset_RG = luck_R[:, None] * rng.normal(size=(replicates, share_NG.shape[1]))
        return within_RN + offset_RG @ share_NG.T, luck_R

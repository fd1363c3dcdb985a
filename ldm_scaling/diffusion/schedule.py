"""The noise schedule: how much signal and noise each training timestep holds."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A variance-preserving schedule, x_t = alpha_t x0 + sigma_t eps with alpha^2 + sigma^2 = 1.

    Everything is float64: built in float32, abar is off by 2e-6 relative and sigma by 1e-5.

    Attributes:
        name: what records and tables call it.
        alphas_cumprod: abar_t, shape (T,), float64 in [0, 1], strictly falling.

    Raises:
        UserError: if `alphas_cumprod` is not such an array.
    """

    name: str
    alphas_cumprod: np.ndarray

    def __post_init__(self):
        abar_T = np.array(self.alphas_cumprod, dtype=np.float64)
        if abar_T.ndim != 1 or abar_T.size == 0:
            raise UserError(
                f"schedule {self.name!r}: alphas_cumprod has shape {abar_T.shape}: give one "
                "value per timestep"
            )
        if not np.all((abar_T >= 0) & (abar_T <= 1)):
            raise UserError(
                f"schedule {self.name!r}: alphas_cumprod runs from {abar_T.min()} to "
                f"{abar_T.max()}: every value must lie in [0, 1]"
            )
        rises = np.flatnonzero(np.diff(abar_T) >= 0)
        if rises.size:
            t = int(rises[0])
            raise UserError(
                f"schedule {self.name!r}: alphas_cumprod must fall at every timestep, but goes "
                f"from {abar_T[t]} at t={t} to {abar_T[t + 1]} at t={t + 1}"
            )
        abar_T.setflags(write=False)
        object.__setattr__(self, "alphas_cumprod", abar_T)

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def alpha(self) -> np.ndarray:
        """Signal scale sqrt(abar_t), shape (T,)."""
        return np.sqrt(self.alphas_cumprod)

    @property
    def sigma(self) -> np.ndarray:
        """Noise scale sqrt(1 - abar_t), shape (T,)."""
        return np.sqrt(1 - self.alphas_cumprod)

    @property
    def lam(self) -> np.ndarray:
        """Half log signal-to-noise ratio log(alpha_t / sigma_t), shape (T,); -inf without signal.

        Source: Lu et al. 2022 (DPM-Solver), section 2.2.
        """
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] == 0)


def sd(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Schedule:
    """Stable Diffusion's schedule: sqrt(beta) rises linearly.

    CompVis calls it "linear" and diffusers "scaled_linear"; Rombach et al. 2022, appendix.

    Raises:
        UserError: unless 0 < beta_start <= beta_end < 1 and num_timesteps >= 1.
    """
    if num_timesteps < 1 or not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"schedule with num_timesteps={num_timesteps}, beta_start={beta_start}, "
            f"beta_end={beta_end}: needs num_timesteps >= 1 and 0 < beta_start <= beta_end < 1"
        )
    beta_T = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    return Schedule("sd", np.cumprod(1 - beta_T))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule shifted and scaled so that its last timestep is pure noise; the first stays.

    Needs v or x0 prediction, and a sampler that starts at the last timestep (trailing spacing).
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    algorithm 1.

    Raises:
        UserError: if the schedule has a single timestep.
    """
    if schedule.num_timesteps < 2:
        raise UserError("a schedule of one timestep cannot end in pure noise: give it two or more")
    alpha_T = schedule.alpha
    alpha_T = (alpha_T - alpha_T[-1]) * (alpha_T[0] / (alpha_T[0] - alpha_T[-1]))
    return Schedule(f"{schedule.name}_zero_snr", alpha_T**2)


_BY_NAME = {"sd": sd, "sd_zero_snr": lambda: zero_terminal_snr(sd())}


def get(name: str) -> Schedule:
    """The schedule called `name`: "sd" or "sd_zero_snr".

    Raises:
        UserError: for another name.
    """
    if name not in _BY_NAME:
        raise UserError(f"unknown schedule {name!r}: choose one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]()

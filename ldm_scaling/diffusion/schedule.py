"""The noise schedule: how much signal and noise each training timestep holds."""

from __future__ import annotations

import dataclasses

import numpy as np

from ldm_scaling.config import named
from ldm_scaling.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """x_t = alpha_t x0 + sigma_t eps at every timestep t, with ever more noise.

    Everything is float64: built in float32, Stable Diffusion's sigma is off by 1e-5.

    Attributes:
        name: what records and tables call it.
        alpha: signal scale, shape (T,), not below 0; 0 is pure noise.
        sigma: noise scale, the same.

    Samplers need the ratio sigma / alpha alone: a common factor of both rescales x and no more.

    Raises:
        UserError: if the arrays are not such, or sigma / alpha does not rise with every timestep.
    """

    name: str
    alpha: np.ndarray
    sigma: np.ndarray

    def __post_init__(self):
        for field in ("alpha", "sigma"):
            array_T = np.array(getattr(self, field), dtype=np.float64)
            if array_T.ndim != 1 or array_T.size == 0:
                raise UserError(
                    f"schedule {self.name!r}: {field} has shape {array_T.shape}: give one value "
                    "per timestep"
                )
            if not np.all((array_T >= 0) & (array_T < np.inf)):
                raise UserError(
                    f"schedule {self.name!r}: {field} runs from {array_T.min()} to "
                    f"{array_T.max()}: every value must be finite and not below 0"
                )
            array_T.setflags(write=False)
            object.__setattr__(self, field, array_T)
        if self.alpha.shape != self.sigma.shape or np.any(self.alpha + self.sigma == 0):
            raise UserError(
                f"schedule {self.name!r}: alpha has shape {self.alpha.shape}, sigma "
                f"{self.sigma.shape}: give one of each per timestep, not both 0"
            )
        noise_T = self.noise
        stays = np.flatnonzero(~(noise_T[1:] > noise_T[:-1]))
        if stays.size:
            t = int(stays[0])
            raise UserError(
                f"schedule {self.name!r}: sigma / alpha must rise at every timestep, but goes from "
                f"{noise_T[t]} at t={t} to {noise_T[t + 1]} at t={t + 1}"
            )

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alpha)

    @property
    def noise(self) -> np.ndarray:
        """Noise level sigma_t / alpha_t, shape (T,), infinite without signal."""
        return noise_level(self.alpha, self.sigma)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise."""
        return bool(self.alpha[-1] == 0)

    @property
    def straight(self) -> bool:
        """Whether x goes straight from x0 to eps: alpha + sigma = 1 (flow matching)."""
        return _on_line(self.alpha, self.sigma)

    def at(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha, sigma at timesteps in [0, T-1]. Between whole ones sigma / alpha is linear, as in
        diffusers' Euler; on a straight schedule sigma is; next to pure noise alpha / sigma is."""
        t = np.asarray(t, np.float64)
        nodes = np.floor(t).astype(np.int64)
        alpha, sigma = self.alpha[nodes], self.sigma[nodes]
        between = nodes != t
        if np.any(between):
            if self.straight:
                value = np.interp(t[between], np.arange(self.num_timesteps), self.sigma)
                alpha[between], sigma[between] = 1 - value, value
            else:
                alpha[between], sigma[between] = self.at_noise(self._noise_at(t[between]))
        return alpha, sigma

    def _noise_at(self, t_N: np.ndarray) -> np.ndarray:
        """Noise levels between whole timesteps."""
        known_T, last = self.noise, self.num_timesteps - 1
        finite_T = np.isfinite(known_T)
        noise_N = np.interp(t_N, np.flatnonzero(finite_T), known_T[finite_T])
        if not finite_T.all():
            noise_N = noise_N / np.minimum(last - t_N, 1)
        return noise_N

    def at_noise(self, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha, sigma at finite noise levels sigma / alpha within its range."""
        return at_noise(self.alpha, self.sigma, noise)

    def timestep_at(self, noise: np.ndarray) -> np.ndarray:
        """The timesteps at these noise levels sigma / alpha, linear in log between known ones; on a
        straight schedule linear in sigma; next to pure noise linear in alpha / sigma, as `at`."""
        known_T = np.arange(self.num_timesteps)
        if self.straight:
            return np.interp(1 - 1 / (1 + np.asarray(noise)), self.sigma, known_T)
        t = np.interp(log_noise(noise), log_noise(self.noise), known_T)
        if self.zero_terminal_snr and self.num_timesteps > 1:
            before = self.noise[-2]
            beyond = np.maximum(noise, before)
            t = np.where(beyond > before, known_T[-1] - before / beyond, t)
        return t


def noise_level(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """sigma / alpha, infinite without signal."""
    with np.errstate(divide="ignore"):
        return sigma / alpha


def log_noise(noise: np.ndarray) -> np.ndarray:
    """The logarithm of noise levels, -inf of none."""
    with np.errstate(divide="ignore"):
        return np.log(noise)


def _on_line(alpha: np.ndarray, sigma: np.ndarray) -> bool:
    return bool(np.all(np.abs(alpha + sigma - 1) < 1e-9))


def at_noise(
    alpha_N: np.ndarray, sigma_N: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """alpha, sigma at finite noise levels sigma / alpha between those of nodes.

    Exact where the nodes have alpha^2 + sigma^2 = 1, alpha + sigma = 1 or alpha = 1; of others
    alpha^2 + sigma^2 is interpolated, log-linear.

    Args:
        alpha_N, sigma_N: the nodes, sigma / alpha rising.
        noise: any shape.
    """
    if np.all(np.abs(alpha_N**2 + sigma_N**2 - 1) < 1e-9):
        alpha = 1 / np.hypot(1, noise)
    elif _on_line(alpha_N, sigma_N):
        alpha = 1 / (1 + noise)
    elif np.all(alpha_N == 1):
        alpha = np.ones_like(noise)
    else:
        known = log_noise(noise_level(alpha_N, sigma_N))
        scale = np.interp(log_noise(noise), known, np.log(np.hypot(alpha_N, sigma_N)))
        alpha = np.exp(scale) / np.hypot(1, noise)
    return alpha, noise * alpha


def variance_preserving(name: str, alphas_cumprod: np.ndarray) -> Schedule:
    """The schedule of alpha_t = sqrt(abar_t) and sigma_t = sqrt(1 - abar_t).

    Args:
        name: what records and tables call it.
        alphas_cumprod: abar_t, shape (T,), in [0, 1], strictly falling.

    Raises:
        UserError: if `alphas_cumprod` is not such an array.
    """
    abar_T = np.array(alphas_cumprod, dtype=np.float64)
    if not np.all((abar_T >= 0) & (abar_T <= 1)):
        raise UserError(
            f"schedule {name!r}: alphas_cumprod runs from {abar_T.min()} to {abar_T.max()}: every "
            "value must lie in [0, 1]"
        )
    return Schedule(name, np.sqrt(abar_T), np.sqrt(1 - abar_T))


def sd(
    num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Schedule:
    """Stable Diffusion's schedule: sqrt(beta) rises linearly.

    CompVis calls it "linear" and diffusers "scaled_linear"; Rombach et al. 2022, appendix.

    Raises:
        UserError: unless 0 < beta_start <= beta_end < 1 and num_timesteps >= 1.
    """
    return _rising("sd", 0.5, num_timesteps, beta_start, beta_end)


def linear(
    num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """DDPM's schedule, ADM's and DiT's too: beta rises linearly.

    Source: Ho et al. 2020 (DDPM), section 4.

    Raises:
        UserError: as `sd`.
    """
    return _rising("linear", 1.0, num_timesteps, beta_start, beta_end)


def _rising(
    name: str, power: float, num_timesteps: int, beta_start: float, beta_end: float
) -> Schedule:
    """beta^power rises linearly."""
    if num_timesteps < 1 or not 0 < beta_start <= beta_end < 1:
        raise UserError(
            f"{name} schedule with num_timesteps={num_timesteps}, beta_start={beta_start}, "
            f"beta_end={beta_end}: needs num_timesteps >= 1 and 0 < beta_start <= beta_end < 1"
        )
    ends = np.array([beta_start, beta_end], np.float64) ** power
    beta_T = np.linspace(*ends, num_timesteps) ** (1 / power)
    told = {"beta_start": beta_start, "beta_end": beta_end}
    return variance_preserving(
        named.spell(name, told, named.SCHEDULES), np.cumprod(1 - beta_T)
    )


def cosine(num_timesteps: int = 1000) -> Schedule:
    """Improved DDPM's schedule: abar falls as a squared cosine, and no beta is above 0.999.

    Source: Nichol & Dhariwal 2021, eq. 17, with s = 0.008.

    Raises:
        UserError: unless num_timesteps >= 1.
    """
    if num_timesteps < 1:
        raise UserError(f"cosine schedule with num_timesteps={num_timesteps}: give 1 or more")
    time = np.arange(num_timesteps + 1) / num_timesteps
    abar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    beta_T = np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    return variance_preserving("cosine", np.cumprod(1 - beta_T))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule shifted and scaled so that its last timestep is pure noise; the first stays.

    Needs v, x0 or flow prediction, and a sampler that starts at the last timestep (trailing
    spacing). Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", algorithm 1.

    Args:
        schedule: a variance-preserving one.

    Raises:
        UserError: if the schedule has a single timestep or preserves no variance.
    """
    square_T = schedule.alpha**2 + schedule.sigma**2
    if np.any(np.abs(square_T - 1) > 1e-9):
        raise UserError(
            f"schedule {schedule.name!r} has alpha^2 + sigma^2 from {square_T.min():.6g} to "
            f"{square_T.max():.6g}: only one where that is 1 can be shifted to zero terminal SNR"
        )
    if schedule.num_timesteps < 2:
        raise UserError("a schedule of one timestep cannot end in pure noise: give it two or more")
    alpha_T = schedule.alpha
    alpha_T = (alpha_T - alpha_T[-1]) * (alpha_T[0] / (alpha_T[0] - alpha_T[-1]))
    return variance_preserving(f"{schedule.name}_zero_snr", alpha_T**2)


def flow(num_timesteps: int = 1000, shift: float = 1.0) -> Schedule:
    """Rectified flow: x = (1 - s) x0 + s eps, at timestep t with s = (t + 1) / T.

    The first timestep has a little noise, the last nothing else: it needs flow, v or x0 prediction
    and a sampler that starts there. These s are those that diffusers' flow-matching schedulers
    train at; they tell the network 1000 s, which is t + 1.

    Args:
        num_timesteps: T.
        shift: s becomes shift s / (1 + (shift - 1) s): more noise at every timestep, for pictures
            of more pixels; 1 changes nothing.

    Source: Liu et al. 2023 (Rectified Flow); Esser et al. 2024 (Stable Diffusion 3), eq. 23.

    Raises:
        UserError: unless num_timesteps >= 1 and shift > 0.
    """
    if num_timesteps < 1 or not 0 < shift < np.inf:
        raise UserError(
            f"flow schedule with num_timesteps={num_timesteps}, shift={shift}: needs num_timesteps "
            ">= 1 and shift > 0"
        )
    s_T = np.arange(1, num_timesteps + 1) / num_timesteps
    alpha_T = (1 - s_T) / (1 + (shift - 1) * s_T)
    return Schedule(named.spell("flow", {"shift": shift}, named.SCHEDULES), alpha_T, 1 - alpha_T)


def edm(
    num_timesteps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0,
    sigma_data: float = 0.5,
) -> Schedule:
    """EDM's noise levels, even in sigma^(1/7), with its c_in on both scales.

    EDM's x = x0 + sigma eps of data with standard deviation sigma_data enters its network as
    c_in x. That product is what x is here, for latents of unit variance: noise levels are sigma /
    sigma_data, alpha^2 + sigma^2 = 1, and any network is fed as EDM feeds its own. Under v
    prediction its c_skip and c_out follow, and the plain loss of v is EDM's weighted one.
    Karras spacing is EDM's nodes.

    Args:
        num_timesteps: T.
        sigma_min, sigma_max, sigma_data: EDM's.

    Source: Karras et al. 2022 (EDM), table 1.

    Raises:
        UserError: unless num_timesteps >= 1, 0 < sigma_min < sigma_max and sigma_data > 0.
    """
    if num_timesteps < 1 or not 0 < sigma_min < sigma_max < np.inf or not 0 < sigma_data < np.inf:
        raise UserError(
            f"edm schedule with num_timesteps={num_timesteps}, sigma_min={sigma_min}, "
            f"sigma_max={sigma_max}, sigma_data={sigma_data}: needs num_timesteps >= 1, 0 < "
            "sigma_min < sigma_max and sigma_data > 0"
        )
    ends = (np.array([sigma_min, sigma_max]) / sigma_data) ** (1 / _EDM_RHO)
    noise_T = np.linspace(*ends, num_timesteps) ** _EDM_RHO
    alpha_T = 1 / np.hypot(1, noise_T)
    told = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": sigma_data}
    return Schedule(named.spell("edm", told, named.SCHEDULES), alpha_T, noise_T * alpha_T)


_EDM_RHO = 7.0
SCHEDULES = named.filled(named.SCHEDULES, {
    "sd": sd, "sd_zero_snr": lambda: zero_terminal_snr(sd()), "linear": linear, "cosine": cosine,
    "flow": flow, "edm": edm,
})
"""Schedules by name: `make(**options) -> Schedule`. One's own are added here."""


def get(name: str) -> Schedule:
    """The schedule called `name`, one of `SCHEDULES`, or with options "flow:shift=3"; see
    `config.named`. It is named so.

    Raises:
        UserError: for another name or option.
    """
    kind, options = named.parse("schedule", name, SCHEDULES)
    made = SCHEDULES[kind].make(**options)
    return dataclasses.replace(made, name=named.spell(kind, options, SCHEDULES))

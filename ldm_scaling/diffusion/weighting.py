"""How much the loss counts at each timestep."""

from __future__ import annotations

import functools
import logging

import numpy as np

from ldm_scaling.config import named
from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError

log = logging.getLogger(__name__)


def _snr(schedule: Schedule) -> np.ndarray:
    return (schedule.alpha / schedule.sigma) ** 2


def _s(schedule: Schedule) -> np.ndarray:
    return schedule.sigma / (schedule.alpha + schedule.sigma)


def _cosmap(schedule: Schedule) -> np.ndarray:
    s = _s(schedule)
    return 2 / (np.pi * (1 - 2 * s + 2 * s**2)) / s**2


WEIGHTINGS = named.filled(named.WEIGHTINGS, {
    "none": lambda schedule: None,
    "min_snr": lambda schedule, gamma: np.minimum(_snr(schedule), gamma),
    "snr": _snr,
    "sigma_sqrt": lambda schedule: _s(schedule) ** -2,
    "cosmap": _cosmap,
    "p2": lambda schedule, gamma, k: _snr(schedule) / (k + _snr(schedule)) ** gamma,
    "debiased": lambda schedule: schedule.alpha / schedule.sigma,
})
"""Weightings by name: `make(schedule, **options)` is what the squared error of x0 is multiplied by,
(T,) float64, or None, which leaves the error of the output as it is. One's own are added here."""


def weights(weighting: str, schedule: Schedule, prediction: str) -> np.ndarray | None:
    """What the squared error of the network's output is multiplied by, (T,) float64; None is 1.

    | weighting  | the loss is then, whatever the network outputs                              |
    |------------|-----------------------------------------------------------------------------|
    | none       | the error of its output                                                     |
    | min_snr    | min(SNR, gamma) times the error of x0 (Hang et al. 2023, eq. 8)             |
    | snr        | SNR times the error of x0, which is the error of eps                        |
    | sigma_sqrt | 1 / s^2 times the error of x0, which is the error of the velocity eps - x0  |
    | cosmap     | 2 / (pi (1 - 2 s + 2 s^2)) times the error of the velocity                  |
    | p2         | 1 / (k + SNR)^gamma times the error of eps (Choi et al. 2022)               |
    | debiased   | 1 / sqrt(SNR) times the error of eps (Yu et al. 2024)                       |

    with SNR = alpha^2 / sigma^2 and s = sigma / (alpha + sigma), flow matching's time at that SNR.
    In pure noise, where samples begin, those by SNR are 0 and what the network says there is not
    trained; that is logged.
    Names as in diffusers' compute_loss_weighting_for_sd3; cosmap is Esser et al. 2024, section 3.1.

    Args:
        weighting: one of `WEIGHTINGS`, with options.
        schedule: the noise schedule.
        prediction: what the network outputs.

    Raises:
        UserError: for an unknown weighting or option, a prediction that the schedule rules out,
            weights that are not one a timestep, finite and not below 0, as of a schedule with a
            timestep without noise.
    """
    name, options = named.parse("weighting", weighting, WEIGHTINGS)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_x0 = WEIGHTINGS[name].make(schedule, **options)
    if of_x0 is None:
        return None
    parameterization.check(prediction, schedule)
    of_x0 = np.asarray(of_x0, np.float64)
    if of_x0.shape != schedule.alpha.shape:
        raise UserError(
            f"weighting {weighting!r} gives weights of shape {of_x0.shape}: give one for each of "
            f"the {schedule.num_timesteps} timesteps"
        )
    bad = np.flatnonzero(~((of_x0 >= 0) & (of_x0 < np.inf)))
    if bad.size:
        t = int(bad[0])
        clean = ", a timestep without noise" if schedule.sigma[t] == 0 else ""
        raise UserError(
            f"weighting {weighting!r} is {of_x0[t]} at t={t} of schedule {schedule.name!r}{clean}: "
            "every weight must be finite and not below 0; 'none' has none"
        )
    _, q = parameterization.x0_coefficients(prediction, schedule.alpha, schedule.sigma)
    weight_T = of_x0 * q**2  # an error in x0 is q times that of the output
    if weight_T[-1] == 0:
        _say_untrained(weighting, schedule.name)
    return weight_T


@functools.cache
def _say_untrained(weighting: str, schedule: str) -> None:
    log.warning(
        "weighting %r is 0 in the pure noise that schedule %r ends in, and next to 0 before it: "
        "samples begin there, by an output that is hardly trained; sigma_sqrt, cosmap and none "
        "weigh it", weighting, schedule,
    )

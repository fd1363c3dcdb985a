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


def weights(weighting: str, schedule: Schedule, prediction: str) -> np.ndarray | None:
    """What the squared error of the network's output is multiplied by, (T,) float64; None is 1.

    | weighting  | the loss is then, whatever the network outputs                              |
    |------------|-----------------------------------------------------------------------------|
    | none       | the error of its output                                                     |
    | min_snr    | min(SNR, gamma) times the error of x0 (Hang et al. 2023, eq. 8)             |
    | snr        | SNR times the error of x0, which is the error of eps                        |
    | sigma_sqrt | 1 / s^2 times the error of x0, which is the error of the velocity eps - x0  |
    | cosmap     | 2 / (pi (1 - 2 s + 2 s^2)) times the error of the velocity                  |

    with SNR = alpha^2 / sigma^2 and s = sigma / (alpha + sigma), flow matching's time at that SNR.
    In pure noise, where samples begin, min_snr and snr are 0 and what the network says there is not
    trained; that is logged.
    Names as in diffusers' compute_loss_weighting_for_sd3; cosmap is Esser et al. 2024, section 3.1.

    Args:
        weighting: its name with options, see `config.named`.
        schedule: the noise schedule.
        prediction: what the network outputs.

    Raises:
        UserError: for an unknown weighting or option, a prediction that the schedule rules out, or
            a schedule with a timestep without noise.
    """
    name, options = named.parse("weighting", weighting, named.WEIGHTINGS)
    if name == "none":
        return None
    parameterization.check(prediction, schedule)
    alpha, sigma = schedule.alpha, schedule.sigma
    if sigma[0] == 0:
        raise UserError(
            f"weighting {weighting!r} by SNR: schedule {schedule.name!r} has a timestep without "
            "noise, where that is infinite: use weighting 'none'"
        )
    _, q = parameterization.x0_coefficients(prediction, alpha, sigma)
    snr, s = (alpha / sigma) ** 2, sigma / (alpha + sigma)
    of_x0 = {
        "min_snr": lambda: np.minimum(snr, options["gamma"]),
        "snr": lambda: snr,
        "sigma_sqrt": lambda: s**-2,
        "cosmap": lambda: 2 / (np.pi * (1 - 2 * s + 2 * s**2)) / s**2,
    }[name]()
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

"""What the network predicts, eps, v, x0 or flow, and the linear maps between them."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError

PREDICTIONS = ("epsilon", "v", "x0", "flow")

Array = TypeVar("Array")


def check(prediction: str, schedule: Schedule | None = None) -> None:
    """Raises `UserError` for an unknown prediction, or one that `schedule` rules out; and for a
    schedule that is none, such as its name."""
    if prediction not in PREDICTIONS:
        raise UserError(
            f"unknown prediction {prediction!r}: choose one of {', '.join(PREDICTIONS)}"
        )
    if schedule is not None and not isinstance(schedule, Schedule):
        raise UserError(f"{schedule!r} is no noise schedule: schedule.get(name) makes one")
    if prediction == "epsilon" and schedule is not None and schedule.zero_terminal_snr:
        raise UserError(_NO_SIGNAL.format(where=f"schedule {schedule.name!r}, last timestep"))


_NO_SIGNAL = (
    "epsilon prediction cannot tell x0 from pure noise (alpha = 0: {where}): use prediction 'v' "
    "or 'x0' or 'flow', or a schedule without zero terminal SNR such as 'sd'"
)


def target(prediction: str, x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What the network should output at x = alpha x0 + sigma eps.

    Args:
        prediction: one of `PREDICTIONS`. v = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 11);
            flow is the velocity eps - x0 of x = (1 - s) x0 + s eps as s rises (Esser et al. 2024,
            eq. 8), and the same difference on any other schedule.
        x0: clean latents, any shape.
        eps: the noise, the same shape.
        alpha: signal scale, broadcastable to `x0`.
        sigma: noise scale, broadcastable to `x0`.

    Raises:
        UserError: for an unknown prediction.
    """
    check(prediction)
    if prediction == "epsilon":
        return eps
    if prediction == "v":
        return alpha * eps - sigma * x0
    return eps - x0 if prediction == "flow" else x0


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and part to the last bit where whole is 1 but for rounding."""
    return part / np.where(np.abs(whole - 1) < 1e-12, 1.0, whole)


def x0_coefficients(
    prediction: str, alpha: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with x0 = p x + q F for a network output F at x; float64, the shape of `alpha`.

    Raises:
        UserError: for an unknown prediction, or epsilon prediction where alpha = 0.
    """
    check(prediction)
    alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    if prediction == "epsilon":
        if np.any(alpha == 0):
            raise UserError(_NO_SIGNAL.format(where=f"node {int(np.argmin(alpha))} of the grid"))
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        square = alpha**2 + sigma**2
        return _over(alpha, square), _over(-sigma, square)
    if prediction == "flow":
        return _over(np.ones_like(alpha), alpha + sigma), _over(-sigma, alpha + sigma)
    return np.zeros_like(alpha), np.ones_like(alpha)


def eps_coefficients(
    prediction: str, alpha: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(p, q) with eps = p x + q F for a network output F at x; float64, the shape of `alpha`.

    Raises:
        UserError: for an unknown prediction, or x0 prediction where sigma = 0.
    """
    check(prediction)
    alpha, sigma = np.asarray(alpha, np.float64), np.asarray(sigma, np.float64)
    if prediction == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction == "v":
        square = alpha**2 + sigma**2
        return _over(sigma, square), _over(alpha, square)
    if prediction == "flow":
        return _over(np.ones_like(alpha), alpha + sigma), _over(alpha, alpha + sigma)
    if np.any(sigma == 0):
        raise UserError(
            "x0 prediction holds no noise where sigma = 0: ask for eps at noisier timesteps only"
        )
    return 1 / sigma, -alpha / sigma

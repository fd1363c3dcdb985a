"""Power-function averages over training, and how one is made of others: Karras et al. 2024 (EDM2,
arXiv 2312.02696), section 3 and appendix C. Float64 numpy.

The average of exponent gamma at step t weighs what the parameters were at a time tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 < tau <= t.

Its length is p's relative standard deviation, deviation / t, which is the same at every t. With
parameters that stay as they are within a step, `rate` gives exactly this average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


def gamma_of(length: float) -> float:
    """The exponent of a length, a relative standard deviation in (0, 0.289]: the largest root of
    (gamma + 2)^2 (gamma + 3) length^2 = gamma + 1 (eq. 126, algorithm 2)."""
    t = float(length) ** -2
    roots = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t])
    return float(roots.real[np.abs(roots.imag) < 1e-9 * np.abs(roots)].max())


def inner(
    step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray:
    """Integrals of the product of two profiles, of broadcast steps and exponents (algorithm 3):

    (gamma_a + 1) (gamma_b + 1) / ((gamma_a + gamma_b + 1) max(t_a, t_b)) (min / max)^gamma,

    with the exponent of the later one.
    """
    step_a, gamma_a, step_b, gamma_b = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (step_a, gamma_a, step_b, gamma_b))
    )
    most = np.maximum(step_a, step_b)
    ratio = np.minimum(step_a, step_b) / most
    power = ratio ** np.where(step_a < step_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * power / ((gamma_a + gamma_b + 1) * most)


# What a float32 average is rounded by, over how far parameters move while it reaches back: they are
# taken to move by a thousandth of their size at least.
_ROUNDING = 2.0**-24 / 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """A profile as a sum of others.

    Attributes:
      weight_I: of each of I profiles, in float64; they sum to 1.
      residual: root mean square of what the sum is off the wanted profile, over the profile's own,
        and of what the rounding of float32 averages comes to in it.
    """

    weight_I: np.ndarray
    residual: float


def solve(
    step_I: Sequence[float], gamma_I: Sequence[float], step: float, gamma: float
) -> Mix:
    """The sum of profiles that is nearest to a wanted one, by least squares (algorithm 3).

    Of profiles that are nearly alike, sums with weights of thousands would be nearest: what these
    make of the rounding of each average counts as well, so that there are none.

    EDM2 leaves what the weights sum to free, for its networks take no notice of their kernels'
    size. Others do: a sum of 0.98 would shrink all parameters by 2%. So here they sum to 1, which
    hardly changes how near the profile is met.

    Args:
      step_I, gamma_I: of the profiles that there are.
      step, gamma: of the wanted one.
    """
    step_I, gamma_I = np.asarray(step_I, np.float64), np.asarray(gamma_I, np.float64)
    norm_I = np.sqrt(inner(step_I, gamma_I, step_I, gamma_I))
    count, whole = len(step_I), float(inner(step, gamma, step, gamma))
    products_II = inner(step_I[:, None], gamma_I[:, None], step_I, gamma_I) / np.outer(
        norm_I, norm_I)
    wanted_I = inner(step_I, gamma_I, step, gamma) / norm_I
    products_II += np.diag(whole * (_ROUNDING / norm_I) ** 2)
    # Lagrange's conditions, of profiles that are scaled to one norm.
    bordered = np.zeros((count + 1, count + 1))
    bordered[:count, :count] = products_II
    bordered[:count, count] = bordered[count, :count] = 1 / norm_I
    x_I = np.linalg.solve(bordered, np.append(wanted_I, 1.0))[:count]
    left = x_I @ products_II @ x_I - 2 * wanted_I @ x_I + whole
    return Mix(x_I / norm_I, float(np.sqrt(max(left, 0.0) / whole)))


def exponential(decay: float, ramp: bool, steps: int) -> float:
    """Relative standard deviation of what `train.ema_decay` averages over after so many steps, see
    `optimizer.ema_decay`."""
    taken = np.arange(steps, dtype=np.float64)
    decay_S = np.minimum(decay, (1 + taken) / (10 + taken)) if ramp else np.full(steps, decay)
    with np.errstate(divide="ignore"):  # Of a decay of 0: all before weighs nothing.
        log_S = np.log(decay_S)
    after_S = np.append(np.cumsum(log_S[:0:-1])[::-1], 0.0)
    weight_S = (1 - decay_S) * np.exp(after_S)
    weight_S[0] += np.exp(log_S.sum())  # The first parameters.
    weight_S /= weight_S.sum()
    mean = weight_S @ taken
    return float(np.sqrt(weight_S @ (taken - mean) ** 2) / steps)

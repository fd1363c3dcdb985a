"""UniPC: a predictor of DPM-Solver++'s kind, and a corrector that costs no further call."""

from __future__ import annotations

import numpy as np

from ldm_scaling.errors import UserError
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.history import History, moments
from ldm_scaling.sampling.step import Steps, one_row_a_step
from ldm_scaling.sampling.table import SamplerTable

VARIANTS = ("bh1", "bh2")


def unipc(
    grid: Grid, prediction: str, *, order: int = 2, variant: str = "bh2",
    lower_order_final: bool = True,
) -> SamplerTable:
    """UniPC of x0, order 1 to 3.

    Before a row predicts, its new x0 corrects the step that led there. Both integrate a polynomial
    through the known x0 exactly, but where only one coefficient is free (predictor of order 2,
    corrector of order 1): there the paper sets it to B(h) / 2.

    Args:
        grid: the nodes.
        prediction: what the network outputs.
        order: of the predictor; with the corrector a step is of one order more.
        variant: B(h): "bh1" is h, "bh2" (as in diffusers, and for guidance) is 1 - exp(-h).
        lower_order_final: whether the last steps fall to order 1, at any number of steps.

    The first step is of order 1, the second of 2 at most, a last one without noise of order 1, and
    the output is never corrected.

    Source: Zhao et al. 2023 (UniPC), section 3; diffusers, scheduling_unipc_multistep.py.

    Raises:
        UserError: for another order or variant, or "bh1" from pure noise, where h is infinite.
    """
    if order not in (1, 2, 3):
        raise UserError(f"unipc with order={order}: choose 1, 2 or 3")
    if variant not in VARIANTS:
        raise UserError(f"unipc with variant={variant!r}: choose one of {', '.join(VARIANTS)}")
    if variant == "bh1" and grid.alpha[0] == 0:
        raise UserError("unipc with variant='bh1' cannot leave pure noise: choose 'bh2'")
    steps, k = Steps.of(grid), np.arange(grid.steps)
    order_N = np.minimum(order, k + 1)
    if lower_order_final:
        order_N = np.minimum(order_N, grid.steps - k)
    order_N[steps.clean] = 1

    h = np.where(steps.clean, 0, steps.h)  # such a step looks nowhere and is x' = m0
    a = steps.sigma1 / steps.sigma
    P = steps.alpha1 - steps.alpha * a
    I_0, I_1, I_2, I_3 = moments(h, 4)
    half = (I_0 if variant == "bh2" else h) / 2
    history = History.of(h, order_N)

    m0, m1, m2 = np.eye(3)[..., None]
    _, D1, D2 = history.differences(m0, m1, m2)
    b0, b1, b2 = P * m0 + steps.alpha1 * (np.where(order_N == 2, half, I_1) * D1 + I_2 * D2)

    # The corrector of a step, from the x0 at its end (mt), at its beginning (m0) and before. In
    # Newton's form the polynomial is m0 + s (mt - m0) + s (s-1) second + s (s-1) (s + r0) q third.
    mt, m0, m1, m2 = np.eye(4)[..., None]
    first, _, D2 = history.differences(m0, m1, m2)
    second = history.nearer / (1 + history.nearer) * (mt - m0 - first)
    q = history.nearer * history.share  # 1 / (r0 + r1)
    third = (second - D2) / (1 + q)
    corrected = (
        np.where(order_N == 1, half, I_1) * (mt - m0) + (I_2 - I_1) * second
        + (q * (I_3 - I_2) + history.share * (I_2 - I_1)) * third
    )
    k0, k1, k2, k3 = P * m0 + steps.alpha1 * corrected

    def behind(column: np.ndarray, first: float = 0.0) -> np.ndarray:
        return np.append(first, column[:-1])

    return one_row_a_step(
        f"unipc{order}_{variant}", grid, prediction, a=a, b0=b0, b1=b1, b2=b2,
        kx=(k == 0).astype(float), ky=behind(a), k0=behind(k0), k1=behind(k1), k2=behind(k2),
        k3=behind(k3),
    )

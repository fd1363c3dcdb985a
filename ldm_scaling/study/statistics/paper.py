"""Fits of the paper's own Table 1: eleven sizes, one training each, no error bars."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ldm_scaling.models import zoo
from ldm_scaling.study.statistics import fits
from ldm_scaling.study.statistics.fits import Fit, HeldOut

DELTA = 0.01
"""Huber's delta in log FID: the table scatters about any smooth law by 1%."""

Scale = Literal["params", "norm_cost"]


def table_1(metric: Literal["fid", "clip"], scale: Scale) -> tuple[np.ndarray, np.ndarray]:
    """Printed points (x_N, y_N), smallest size first.

    Args:
      metric: FID, or 1 - CLIP score (which falls with quality as a loss does).
      scale: "params", or "norm_cost": all were trained alike, so that this is training compute
        too, in units of the 866M member's. The printed GFLOPs hold a misprint and are not used.
    """
    found = [member.published for member in zoo.PAPER]
    x_N = np.array([p.params * 1e6 if scale == "params" else p.norm_cost for p in found])
    y_N = np.array([p.fid if metric == "fid" else 1 - p.clip for p in found])
    return x_N, y_N


def fitted(
    metric: Literal["fid", "clip"] = "fid", scale: Scale = "norm_cost", *, offset: bool = False,
    replicates: int = 1000, seed: int = 0,
) -> Fit:
    """The table's power law, with replicates that draw residuals.

    Without an offset FID falls as norm. cost to the power -0.054. With one, the table cannot tell
    where FID would end (anywhere between 1 and 19) and how fast it gets there.
    """
    x_N, y_N = table_1(metric, scale)
    fit = fits.fit(x_N, y_N, offset=offset, delta=DELTA)
    return fits.bootstrap(fit, x_N, y_N, replicates=replicates, seed=seed, method="residuals")


def held_out(
    metric: Literal["fid", "clip"] = "fid", scale: Scale = "norm_cost", *, offset: bool = False
) -> HeldOut:
    """What the ten smaller sizes foretell of 5B."""
    return fits.held_out(*table_1(metric, scale), offset=offset, delta=DELTA)

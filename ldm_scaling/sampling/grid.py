"""The nodes that a sampler visits: N timesteps to call the network at, and where it ends.

Two conventions of placing N nodes on T timesteps are in use, and they differ in all but trailing:
"ddim" (DDIM, DDPM, Euler) and "dpm" (DPM-Solver, UniPC), as in diffusers. At few steps the spacing
decides the result, so it is part of the grid's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError

CONVENTIONS = ("ddim", "dpm")
FINALS = ("abar_0", "zero")


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """N nodes at which the network is called and one more at which the sample is left.

    A step always goes to its true neighbour in this list; nobody subtracts a stride.

    Attributes:
        timesteps: (N,) float64, strictly falling, what the network is told.
        alpha: (N+1,) float64 signal scale, not falling.
        sigma: (N+1,) float64 noise scale, alpha^2 + sigma^2 = 1.
        name: how the nodes were placed.

    Raises:
        UserError: if the nodes are not such.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    name: str

    def __post_init__(self):
        for field in ("timesteps", "alpha", "sigma"):
            array = np.array(getattr(self, field), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, field, array)
        n = self.timesteps.size
        if n == 0 or self.timesteps.shape != (n,):
            raise UserError(f"grid {self.name!r}: timesteps of shape {self.timesteps.shape}: "
                            "give a list of one or more")
        if self.alpha.shape != (n + 1,) or self.sigma.shape != (n + 1,):
            raise UserError(
                f"grid {self.name!r}: {n} timesteps need {n + 1} nodes, but alpha has shape "
                f"{self.alpha.shape} and sigma {self.sigma.shape}"
            )
        rises = np.flatnonzero(np.diff(self.timesteps) >= 0)
        if rises.size:
            k = rises[0]
            raise UserError(
                f"grid {self.name!r}: timesteps must fall strictly, but {self.timesteps[k]:g} is "
                f"followed by {self.timesteps[k + 1]:g}"
            )
        variance = self.alpha**2 + self.sigma**2
        if not np.all(np.abs(variance - 1) < 1e-9) or np.any(self.alpha < 0):
            raise UserError(
                f"grid {self.name!r}: nodes must have alpha >= 0 and alpha^2 + sigma^2 = 1, but "
                f"that ranges from {variance.min()} to {variance.max()}"
            )
        if np.any(np.diff(self.alpha) < 0) or self.sigma.min() < 0:
            raise UserError(f"grid {self.name!r}: the signal must not fall from node to node")

    @property
    def steps(self) -> int:
        """N, the number of network calls of a one-call-a-step solver."""
        return len(self.timesteps)


def from_timesteps(
    schedule: Schedule, timesteps: Sequence[int], final: str = "abar_0", name: str = "custom"
) -> Grid:
    """The grid that visits the given timesteps, first to last, and ends at `final`.

    Args:
        schedule: the noise schedule.
        timesteps: whole numbers in [0, T), strictly falling.
        final: where the last step ends: "abar_0" at the schedule's first node (CompVis's, and
            diffusers' set_alpha_to_one=False and final_sigmas_type="sigma_min"), "zero" without
            noise.
        name: for the grid's name.

    Raises:
        UserError: for other timesteps or another `final`.
    """
    if final not in FINALS:
        raise UserError(f"unknown final node {final!r}: choose one of {', '.join(FINALS)}")
    t_N = np.asarray(timesteps, np.float64)
    last = schedule.num_timesteps - 1
    wrong = t_N[(t_N != np.round(t_N)) | (t_N < 0) | (t_N > last)]
    if wrong.size:
        raise UserError(f"timestep {wrong.flat[0]:g}: give whole numbers from {last} down to 0")
    nodes = t_N.astype(np.int64)
    abar = schedule.alphas_cumprod
    end = abar[0] if final == "abar_0" else 1.0
    abar = np.append(abar[nodes], end)
    return Grid(t_N, np.sqrt(abar), np.sqrt(1 - abar), f"{name}-{final}")


def _leading(steps: int, num_timesteps: int, convention: str, offset: int) -> np.ndarray:
    dpm = convention == "dpm"
    stride = num_timesteps // (steps + dpm)
    return (np.arange(steps) + dpm)[::-1] * stride + offset


def _trailing(steps: int, num_timesteps: int, convention: str) -> np.ndarray:
    # As diffusers rounds it (halves to even, after float error); arange may yield one node too
    # many, at -1, for instance at 61 steps.
    t = np.round(np.arange(num_timesteps, 0, -num_timesteps / steps))
    return t[:steps] - 1


def _linspace(steps: int, num_timesteps: int, convention: str) -> np.ndarray:
    dpm = convention == "dpm"
    return np.round(np.linspace(0, num_timesteps - 1, steps + dpm))[::-1][:steps]


_NODES: dict[str, Callable[..., np.ndarray]] = {
    "leading": _leading, "trailing": _trailing, "linspace": _linspace,
}
SPACINGS = tuple(_NODES)


def build(
    spacing: str, schedule: Schedule, steps: int, convention: str = "ddim",
    final: str = "abar_0", offset: int | None = None,
) -> Grid:
    """The grid of N steps with a named spacing.

    With T timesteps and N steps the nodes are (half-integers round to even)

    | spacing  | "ddim" convention             | "dpm" convention                         |
    |----------|-------------------------------|------------------------------------------|
    | leading  | (T // N) i + offset, i < N    | (T // (N+1)) i + offset, 1 <= i <= N     |
    | trailing | round(T - i T / N) - 1        | the same                                 |
    | linspace | round(linspace(0, T-1, N))    | round(linspace(0, T-1, N+1)) without 0   |

    Args:
        spacing: one of `SPACINGS`.
        schedule: the noise schedule.
        steps: N.
        convention: one of `CONVENTIONS`.
        final: where the last step ends, see `from_timesteps`.
        offset: for leading only; 1 (Stable Diffusion's) if not given.

    Raises:
        UserError: for an unknown name, an offset that does not belong, or more steps than the
            spacing can make.
    """
    if spacing not in _NODES:
        raise UserError(f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    if convention not in CONVENTIONS:
        raise UserError(
            f"unknown grid convention {convention!r}: choose one of {', '.join(CONVENTIONS)}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps={steps!r}: give a whole number of 1 or more")
    options = {}
    name = f"{spacing}-{convention}"
    if spacing == "leading":
        options["offset"] = 1 if offset is None else offset
        if offset not in (None, 1):
            name = f"{spacing}+{offset}-{convention}"
    elif offset is not None:
        raise UserError(f"offset={offset} does not belong to {spacing} spacing: leave it out, or "
                        "use spacing 'leading'")

    last = schedule.num_timesteps - 1

    def nodes(n: int) -> np.ndarray:
        return _NODES[spacing](n, schedule.num_timesteps, convention, **options)

    def fits(t: np.ndarray) -> bool:
        return t[0] <= last and t[-1] >= 0 and bool(np.all(np.diff(t) < 0))

    t_N = nodes(steps)
    if not fits(t_N):
        most = next((n for n in range(min(steps - 1, last + 1), 0, -1) if fits(nodes(n))), 0)
        raise UserError(
            f"{name} spacing cannot place {steps} steps on {last + 1} timesteps: use at most "
            f"{most} steps, or another spacing ({', '.join(SPACINGS)})"
        )
    return from_timesteps(schedule, t_N, final, name)


def leading(
    schedule: Schedule, steps: int, convention: str = "ddim", final: str = "abar_0",
    offset: int = 1,
) -> Grid:
    """Stable Diffusion's spacing: starts below T-1 (t=751 at 4 steps), see `build`."""
    return build("leading", schedule, steps, convention, final, offset)


def trailing(
    schedule: Schedule, steps: int, convention: str = "ddim", final: str = "abar_0"
) -> Grid:
    """Starts at T-1, whatever N; see `build`. Source: Lin et al. 2023, section 3.3."""
    return build("trailing", schedule, steps, convention, final)


def linspace(
    schedule: Schedule, steps: int, convention: str = "ddim", final: str = "abar_0"
) -> Grid:
    """Both ends of [0, T-1] in the "ddim" convention, all but 0 in "dpm"; see `build`."""
    return build("linspace", schedule, steps, convention, final)

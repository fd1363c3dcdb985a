"""The nodes that a sampler visits: N timesteps to call the network at, and where it ends.

At few steps the spacing decides the result, so it is part of the grid's name. Three conventions of
placing N nodes on T timesteps are in use, as in diffusers: "ddim" (DDIM, DDPM), "dpm" (DPM-Solver,
UniPC) and "euler" (Euler, Heun); they differ in leading and linspace spacing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ldm_scaling.diffusion.schedule import Schedule, at_noise, log_noise, noise_level, sd
from ldm_scaling.errors import UserError

CONVENTIONS = ("ddim", "dpm", "euler")
FINALS = ("abar_0", "zero")

# Sabour et al. 2024 (Align Your Steps), Stable Diffusion 1.5, 10 steps and their end. Published as
# noise levels (14.6146, 6.4746, ..., 0.0292: research.nvidia.com/labs/toronto-ai/AlignYourSteps),
# which are the SD schedule's own at these timesteps, as diffusers' AysSchedules has them.
AYS_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
# Timesteps that consistency models are distilled at, evenly out of T.
_DISTILLED = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """N nodes at which the network is called and one more at which the sample is left.

    A step always goes to its true neighbour in this list; nobody subtracts a stride.

    Attributes:
        timesteps: (N,) float64, strictly falling, what the network is told.
        alpha: (N+1,) float64 signal scale.
        sigma: (N+1,) float64 noise scale; sigma / alpha does not rise.
        name: how the nodes were placed.
        schedule: tells the timestep of noise levels between the nodes; a grid without one
            interpolates between its own, its end taken for t = 0.

    Raises:
        UserError: if the nodes are not such.
    """

    timesteps: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    name: str
    schedule: Schedule | None = None

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
        low, least = min(self.alpha.min(), self.sigma.min()), (self.alpha + self.sigma).min()
        if not (low >= 0 and 0 < least < np.inf):
            raise UserError(
                f"grid {self.name!r}: nodes must have alpha >= 0 and sigma >= 0 and not both 0, "
                f"but alpha is {self.alpha} and sigma {self.sigma}"
            )
        if np.any(self.noise[1:] > self.noise[:-1]):
            raise UserError(
                f"grid {self.name!r}: the signal must not fall against the noise from node to node"
            )

    @property
    def steps(self) -> int:
        """N, the number of network calls of a one-call-a-step solver."""
        return len(self.timesteps)

    @property
    def noise(self) -> np.ndarray:
        """(N+1,) noise levels sigma / alpha, infinite without signal."""
        return noise_level(self.alpha, self.sigma)

    def timestep_at(self, noise: np.ndarray) -> np.ndarray:
        """The timesteps at these noise levels sigma / alpha, linear in log between known ones."""
        if self.schedule is not None:
            return self.schedule.timestep_at(noise)
        known, t = self.noise[::-1], np.append(self.timesteps, 0.0)[::-1]
        return np.interp(log_noise(noise), log_noise(known), t)

    def at_noise(self, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha, sigma at finite noise levels between the nodes, see `schedule.at_noise`."""
        if self.schedule is not None:
            return self.schedule.at_noise(noise)
        return at_noise(self.alpha[::-1], self.sigma[::-1], noise)

    @property
    def timestep_at_end(self) -> float:
        """The timestep of the last node; 0 where that has no noise."""
        return float(self.timestep_at(self.noise[-1:])[0]) if self.sigma[-1] else 0.0

    def with_midpoints(self) -> Grid:
        """The grid with a node halfway in log-SNR on every step of finite length but zero."""
        noise = self.noise
        k = np.flatnonzero(np.isfinite(noise[:-1]) & (noise[1:] > 0) & (noise[1:] < noise[:-1]))
        middle = np.sqrt(noise[k] * noise[k + 1])
        alpha, sigma = self.at_noise(middle)
        return dataclasses.replace(
            self,
            timesteps=np.insert(self.timesteps, k + 1, self.timestep_at(middle)),
            alpha=np.insert(self.alpha, k + 1, alpha), sigma=np.insert(self.sigma, k + 1, sigma),
            name=f"{self.name}-midpoints",
        )


def _end(schedule: Schedule, final: str) -> tuple[float, float]:
    if final not in FINALS:
        raise UserError(f"unknown final node {final!r}: choose one of {', '.join(FINALS)}")
    return (schedule.alpha[0], schedule.sigma[0]) if final == "abar_0" else (1.0, 0.0)


def from_timesteps(
    schedule: Schedule, timesteps: Sequence[float], final: str = "abar_0", name: str = "custom"
) -> Grid:
    """The grid that visits the given timesteps, first to last, and ends at `final`.

    Args:
        schedule: the noise schedule.
        timesteps: in [0, T-1], strictly falling; between whole numbers see `Schedule.at`.
        final: where the last step ends: "abar_0" at the schedule's first node (CompVis's, and
            diffusers' set_alpha_to_one=False and final_sigmas_type="sigma_min"), "zero" without
            noise.
        name: for the grid's name.

    Raises:
        UserError: for other timesteps or another `final`.
    """
    end = _end(schedule, final)
    t_N = np.asarray(timesteps, np.float64)
    last = schedule.num_timesteps - 1
    wrong = t_N[~((t_N >= 0) & (t_N <= last))]
    if wrong.size:
        raise UserError(f"timestep {wrong.flat[0]:g}: give numbers from {last} down to 0")
    alpha, sigma = schedule.at(t_N)
    alpha, sigma = np.append(alpha, end[0]), np.append(sigma, end[1])
    return Grid(t_N, alpha, sigma, f"{name}-{final}", schedule)


def from_sigmas(
    schedule: Schedule, sigmas: Sequence[float], final: str = "abar_0", name: str = "custom"
) -> Grid:
    """The grid that visits the given noise levels sigma / alpha, first to last.

    The network is told fractional timesteps, see `Schedule.timestep_at`.

    Args:
        schedule: the noise schedule.
        sigmas: strictly falling, within the schedule's range but for 1% that published lists are
            rounded by.
        final: see `from_timesteps`.
        name: for the grid's name.

    Raises:
        UserError: for other noise levels or another `final`.
    """
    end = _end(schedule, final)
    noise_N = np.asarray(sigmas, np.float64)
    low, high = schedule.noise[[0, -1]]
    wrong = noise_N[~((noise_N >= 0.99 * low) & (noise_N <= 1.01 * high) & (noise_N < np.inf))]
    if wrong.size and wrong.flat[0] == 0:
        raise UserError(
            "sigma 0: leave it out: the list says where the network is called, and the end without "
            "noise is the sampler's option final=zero"
        )
    if wrong.size:
        raise UserError(
            f"sigma {wrong.flat[0]:g}: schedule {schedule.name!r} has noise levels sigma / alpha "
            f"from {high:.6g} down to {low:.6g}"
        )
    inside = np.clip(noise_N, low, high)
    rises = np.flatnonzero(np.diff(inside) >= 0)
    if rises.size:
        k = rises[0]
        raise UserError(
            f"sigmas must fall strictly, within the {high:.6g} down to {low:.6g} of schedule "
            f"{schedule.name!r}, but {noise_N[k]:g} is followed by {noise_N[k + 1]:g}"
        )
    alpha, sigma = schedule.at_noise(inside)
    if final == "abar_0" and inside.size and np.isclose(inside[-1], low, rtol=1e-9):
        alpha[-1], sigma[-1] = end  # the end itself, to the last bit
    alpha, sigma = np.append(alpha, end[0]), np.append(sigma, end[1])
    return Grid(schedule.timestep_at(inside), alpha, sigma, f"{name}-{final}", schedule)


def _leading(steps: int, T: int, convention: str, offset: int) -> np.ndarray:
    dpm = convention == "dpm"
    stride = T // (steps + dpm)
    return (np.arange(steps) + dpm)[::-1] * stride + offset


def _trailing(steps: int, T: int, convention: str, shift: float | None = None) -> np.ndarray:
    if shift is not None:
        s = np.arange(steps, 0, -1) / steps
        return T * (s / (s + (1 - s) / shift)) - 1
    # As diffusers rounds it (halves to even, after float error); arange may yield one node too
    # many, at -1, for instance at 61 steps.
    return np.round(np.arange(T, 0, -T / steps))[:steps] - 1


def _linspace(steps: int, T: int, convention: str) -> np.ndarray:
    dpm = convention == "dpm"
    t_N = np.linspace(0, T - 1, steps + dpm)[::-1][:steps]
    return t_N if convention == "euler" else np.round(t_N)


def _lcm(steps: int, T: int, convention: str) -> np.ndarray:
    distilled = np.arange(_DISTILLED, 0, -1) * (T // _DISTILLED) - 1
    return distilled[np.floor(np.linspace(0, _DISTILLED, steps, endpoint=False)).astype(int)]


def _codi(steps: int, T: int, convention: str) -> np.ndarray:
    distilled = np.arange(_DISTILLED - 1, -1, -1) * (T // _DISTILLED)
    return distilled[:: -(-_DISTILLED // steps)]


_TIMESTEPS: dict[str, Callable[..., np.ndarray]] = {
    "leading": _leading, "trailing": _trailing, "linspace": _linspace, "lcm": _lcm, "codi": _codi,
}


def _karras(steps: int, noise_T: np.ndarray, rho: float = 7.0) -> np.ndarray:
    high, low = noise_T[-1] ** (1 / rho), noise_T[0] ** (1 / rho)
    return np.linspace(high, low, steps) ** rho


def _exponential(steps: int, noise_T: np.ndarray) -> np.ndarray:
    return np.exp(np.linspace(np.log(noise_T[-1]), np.log(noise_T[0]), steps))


def _ays(steps: int, noise_T: np.ndarray) -> np.ndarray:
    t = np.round(np.array(AYS_TIMESTEPS) * (len(noise_T) - 1) / AYS_TIMESTEPS[0]).astype(int)
    x = np.linspace(0, len(t) - 1, steps + 1)[:-1]
    return np.exp(np.interp(x, np.arange(len(t)), np.log(noise_T[t])))


_SIGMAS: dict[str, Callable[..., np.ndarray]] = {
    "karras": _karras, "exponential": _exponential, "ays": _ays,
}
_LISTS = {"timesteps": from_timesteps, "sigmas": from_sigmas}
# The option of a spacing, a number above 0, what it may be, and what it is unless it is told.
_OPTIONS = {"karras": ("rho", 7, 7.0), "trailing": ("shift", 3, None)}
SPACINGS = (*_TIMESTEPS, *_SIGMAS)


def canonical(spacing: str) -> str:
    """The one spelling of all texts that say the same: "karras" of "karras:rho=7.0".

    Raises:
        UserError: for an unknown spacing or option, or a list that is not of numbers.
    """
    kind, colon, text = spacing.partition(":")
    if kind not in (*SPACINGS, *_LISTS) or (colon and kind not in (*_OPTIONS, *_LISTS)):
        raise UserError(
            f"unknown spacing {spacing!r}: choose one of {', '.join(SPACINGS)}, or a list such as "
            "timesteps:999,759,499,259 or sigmas:14.6,3.9,1.4"
        )
    if kind in _LISTS:
        return f"{kind}:{','.join(map(_text, _numbers(spacing, text)))}"
    told = _option(spacing).items() if colon else ()
    return kind + "".join(f":{o}={_text(v)}" for o, v in told if v != _OPTIONS[kind][2])


def _text(number: float) -> str:
    """Its shortest spelling that gives the same float64 back."""
    return repr(number).removesuffix(".0")


def build(
    spacing: str, schedule: Schedule, steps: int, convention: str = "ddim",
    final: str = "abar_0", offset: int | None = None,
) -> Grid:
    """The grid of N steps with a named spacing.

    With T timesteps and N steps the nodes are (half-integers round to even)

    | spacing       | nodes                                                                     |
    |---------------|---------------------------------------------------------------------------|
    | leading       | (T // N) i + offset, i < N; "dpm": (T // (N+1)) i + offset, 1 <= i <= N   |
    | trailing      | round(T - i T / N) - 1; "trailing:shift=3": T s' - 1, as it is, with      |
    |               | s' = shift s / (1 + (shift - 1) s) of s = 1 - i / N                       |
    | linspace      | linspace(0, T-1, N), rounded but in "euler"; "dpm": N+1 of them without 0 |
    | lcm           | N out of the 50 of which the last is T-1                                  |
    | codi          | N out of the 50 of which the first is 0                                   |
    | karras        | even in (sigma / alpha)^(1/7) over all noise levels; "karras:rho=5"       |
    | exponential   | even in log(sigma / alpha) over all noise levels                          |
    | ays           | Align Your Steps' 10 for Stable Diffusion, log-linear between them        |
    | timesteps:... | the N that are given: "timesteps:999,759,499,259"                         |
    | sigmas:...    | the N noise levels sigma / alpha that are given: "sigmas:14.6,6.5,3.9"    |

    At the noise levels of karras, exponential, ays and sigmas the network is told fractional
    timesteps. With `final="abar_0"` karras and exponential end where their last node is.

    Sources: diffusers (leading, trailing, linspace by convention; lcm from scheduling_lcm.py);
    CoDi's public pipeline; Karras et al. 2022, eq. 5; Sabour et al. 2024; Esser et al. 2024
    (Stable Diffusion 3), eq. 23, for the shift.

    Args:
        spacing: one of `SPACINGS`, or a list as above; the grid is named by `canonical` of it.
        schedule: the noise schedule.
        steps: N.
        convention: one of `CONVENTIONS`.
        final: where the last step ends, see `from_timesteps`.
        offset: for leading only; 1 (Stable Diffusion's) if not given.

    Raises:
        UserError: for an unknown name, an offset that does not belong, or a number of steps that
            the spacing cannot make; it says which it can.
    """
    spacing = canonical(spacing)
    kind, colon, text = spacing.partition(":")
    if convention not in CONVENTIONS:
        raise UserError(
            f"unknown grid convention {convention!r}: choose one of {', '.join(CONVENTIONS)}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps={steps!r}: give a whole number of 1 or more")
    if offset is not None and kind != "leading":
        raise UserError(f"offset={offset} does not belong to {spacing} spacing: leave it out, or "
                        "use spacing 'leading'")
    if kind in _LISTS:
        listed = _LISTS[kind](schedule, _numbers(spacing, text), final, spacing)
        if listed.steps != steps:
            raise UserError(
                f"spacing {spacing!r} places {listed.steps} steps, but steps={steps}: make them "
                "agree"
            )
        return listed
    options = _option(spacing) if colon else {}
    if kind in _SIGMAS:
        if schedule.zero_terminal_snr:
            raise UserError(
                f"{spacing} spacing goes by noise levels sigma / alpha, which have no highest on "
                f"schedule {schedule.name!r}, that ends in pure noise: use spacing 'trailing'"
            )
        noise_T = schedule.noise
        if kind == "ays" and not np.allclose(noise_T[[0, -1]], sd().noise[[0, -1]], rtol=0.01):
            raise UserError(
                f"ays spacing is Stable Diffusion's, but schedule {schedule.name!r} has other "
                f"noise levels, {noise_T[-1]:.6g} down to {noise_T[0]:.6g}: use spacing 'karras'"
            )
        return from_sigmas(schedule, _SIGMAS[kind](steps, noise_T, **options), final, spacing)
    if kind == "leading":
        options["offset"] = 1 if offset is None else offset
    return _build_timesteps(spacing, schedule, steps, convention, final, options)


def _option(spacing: str) -> dict[str, float]:
    kind, _, text = spacing.partition(":")
    option, example, _ = _OPTIONS[kind]
    key, _, value = text.partition("=")
    numbers = _numbers(spacing, value) if key == option else []
    if len(numbers) != 1 or not 0 < numbers[0] < np.inf:
        raise UserError(
            f"spacing {spacing!r}: write {kind}:{option}={example}, with {option} above 0"
        )
    return {option: numbers[0]}


def _numbers(spacing: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise UserError(
            f"spacing {spacing!r}: {text!r} is not a list of numbers with commas between"
        ) from None


def _build_timesteps(
    spacing: str, schedule: Schedule, steps: int, convention: str, final: str,
    options: dict[str, float],
) -> Grid:
    name, kind = spacing, spacing.partition(":")[0]
    name += f"+{options['offset']}" if options.get("offset", 1) != 1 else ""
    name += f"-{convention}" if kind in ("leading", "linspace") else ""
    T = schedule.num_timesteps

    def place(n: int) -> np.ndarray | None:
        t = _TIMESTEPS[kind](n, T, convention, **options)
        fits = len(t) == n and t[0] < T and t[-1] >= 0 and np.all(np.diff(t) < 0)
        return t if fits else None

    t_N = place(steps)
    if t_N is None:
        can = [n for n in range(1, T + 1) if place(n) is not None]
        raise UserError(
            f"{name} spacing cannot place {steps} steps on {T} timesteps: it can place "
            f"{_ranges(can) or 'none'}; or use another spacing ({', '.join(SPACINGS)})"
        )
    return from_timesteps(schedule, t_N, final, name)


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 as "1 to 3, 5"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)

"""The samplers by name: `make("dpmpp_2m", schedule, 20)` is a table, ready for any sampler loop.

To add a solver, write a function from a grid to a `SamplerTable` and list it in `SOLVERS`; see
docs/samplers.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from ldm_scaling.diffusion import parameterization
from ldm_scaling.diffusion.schedule import Schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid as grids
from ldm_scaling.sampling.ancestral import ddim, ddpm, euler_ancestral
from ldm_scaling.sampling.dpm import dpm_solver_pp
from ldm_scaling.sampling.few import codi, lcm
from ldm_scaling.sampling.guidance import Correction
from ldm_scaling.sampling.heun import heun
from ldm_scaling.sampling.table import SamplerTable
from ldm_scaling.sampling.unipc import unipc

log = logging.getLogger(__name__)
# Of a first node's variance; leading spacing has 0.06 at 4 steps.
_MOST_SIGNAL = 0.1
# Of `SamplerTable.gain`; solvers other than heun and unipc's bh1 hardly reach it.
_MOST_GAIN = 2.0


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver under its registered name.

    Attributes:
        build: `build(grid, prediction, **options) -> SamplerTable`.
        convention: where its authors place the nodes, see `grid`.
        final: where its last step ends unless told otherwise, see `grid`.
        options: what of `build` a user may set, and the defaults, whose types are the options'.
        spacing: where no other is asked for.
    """

    build: Callable[..., SamplerTable]
    convention: str
    final: str
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    spacing: str = "leading"


_SECOND = {"solver_type": "midpoint", "lower_order_final": True}
SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "ddim", "abar_0", {"eta": 0.0}),
    "ddpm": Solver(ddpm, "ddim", "zero"),
    "ddpm_large": Solver(
        partial(ddpm, variance="fixed_large"), "ddim", "zero", {"final_noise": False}
    ),
    "euler": Solver(ddim, "euler", "zero"),
    "euler_ancestral": Solver(euler_ancestral, "euler", "zero", {"eta": 1.0}),
    "heun": Solver(heun, "euler", "zero", {"over": "noise"}),
    "dpmpp_1s": Solver(partial(dpm_solver_pp, order=1), "dpm", "zero"),
    "dpmpp_2s": Solver(
        partial(dpm_solver_pp, variant="singlestep"), "dpm", "zero",
        {**_SECOND, "midpoints": False},
    ),
    "dpmpp_2m": Solver(dpm_solver_pp, "dpm", "zero", _SECOND),
    "dpmpp_3m": Solver(
        partial(dpm_solver_pp, order=3), "dpm", "zero", {**_SECOND, "third_order": "public"}
    ),
    "dpmpp_sde": Solver(partial(dpm_solver_pp, order=1), "dpm", "zero", {"eta": 1.0}),
    "dpmpp_2m_sde": Solver(dpm_solver_pp, "dpm", "zero", {"eta": 1.0, **_SECOND}),
    # As k-diffusion's, which is where it comes from.
    "dpmpp_3m_sde": Solver(
        partial(dpm_solver_pp, order=3), "dpm", "zero",
        {"eta": 1.0, "solver_type": "heun", "lower_order_final": False, "third_order": "public"},
    ),
    "unipc": Solver(
        unipc, "dpm", "zero", {"order": 2, "variant": "bh2", "lower_order_final": True}
    ),
    "lcm": Solver(lcm, "ddim", "zero", spacing="lcm"),
    "codi": Solver(codi, "ddim", "abar_0", spacing="codi"),
}
_PACKAGED = dict(SOLVERS)

_GUIDANCE = {"guidance_low": 0.0, "guidance_high": math.inf}
_CORRECTION = {field.name: field.default for field in dataclasses.fields(Correction)}


def options_of(name: str) -> dict[str, object]:
    """All options of a registered solver and their defaults: its own, then those of every solver.

    - final: where the last step ends, see `grid.from_timesteps`.
    - offset: of leading spacing, see `grid.build`.
    - guidance_low, guidance_high: noise levels, see `SamplerTable.with_guidance_interval`.
    - rescale, threshold, threshold_max: see `guidance.Correction`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in SOLVERS:
        raise UserError(
            f"unknown sampler {name!r}{_nearest(name, SOLVERS)} choose one of {', '.join(SOLVERS)}"
        )
    solver = SOLVERS[name]
    common = {"final": solver.final, "offset": 1}
    return {**solver.options, **common, **_GUIDANCE, **_CORRECTION}


def _nearest(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(words), 1)
    return f", did you mean {close[0]!r}?" if close else ":"


def _coerced(name: str, option: str, value: object, default: object) -> object:
    """The value as the default's type, from that type or its spelling."""
    kind = type(default)
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str) and kind is not str:
        try:
            if kind is bool:
                return {"true": True, "false": False}[value.lower()]
            return kind(value)
        except (KeyError, ValueError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    elif kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    what = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]
    raise UserError(f"sampler {name!r}: {option}={value!r}: give {what}, such as {_text(default)}")


def _checked(name: str, options: Mapping[str, object]) -> dict[str, object]:
    """The options in their types. Raises `UserError` for those that there are not."""
    known = options_of(name)
    for option in options:
        if option not in known:
            has = ", ".join(f"{has}={_text(value)}" for has, value in known.items())
            raise UserError(
                f"sampler {name!r} has no option {option!r}{_nearest(option, known)} it has {has}"
            )
    return {
        option: _coerced(name, option, value, known[option]) for option, value in options.items()
    }


def parse(spec: str) -> tuple[str, dict[str, object]]:
    """The solver's name and the options that a spec spells out.

    A spec is `name` or `name:option=value,option=value`, such as "ddim:eta=0.5".

    Raises:
        UserError: for an unknown name, option or type of value; it lists what there is.
    """
    name, colon, text = spec.partition(":")
    options: dict[str, object] = {}
    for pair in text.split(",") if colon else ():
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not option or option in options:
            raise UserError(
                f"sampler {spec!r}: write name:option=value,option=value, each option once"
            )
        options[option] = value
    return name.strip(), _checked(name.strip(), options)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _spell(name: str, options: Mapping[str, object]) -> str:
    known = options_of(name)
    told = [f"{o}={_text(v)}" for o, v in sorted(options.items()) if v != known[o]]
    return name + (":" + ",".join(told) if told else "")


def canonical(spec: str) -> str:
    """The one spelling of all specs that say the same: options sorted, defaults left out.

    Raises:
        UserError: as `parse`.
    """
    return _spell(*parse(spec))


def is_own(spec: str) -> bool:
    """Whether the solver is one's own: the package registered none, or another, of that name.

    Raises:
        UserError: as `parse`.
    """
    name, _ = parse(spec)
    return SOLVERS[name] is not _PACKAGED.get(name)


def spacing_of(spec: str, spacing: str | None = None) -> str:
    """The spacing that is asked for, or else the solver's own, see `grid.canonical`.

    Raises:
        UserError: as `parse` and `grid.canonical`.
    """
    return grids.canonical(spacing or SOLVERS[parse(spec)[0]].spacing)


def make(
    spec: str, schedule: Schedule, steps: int, prediction: str = "epsilon",
    spacing: str | None = None, *, final: str | None = None, offset: int | None = None,
    **options: object,
) -> SamplerTable:
    """The table of a registered solver.

    Args:
        spec: one of `SOLVERS`, with options or without, see `parse`.
        schedule: the noise schedule that the model was trained with.
        steps: the number of steps; `SamplerTable.calls` says how many calls of the network that
            is (one each, but for heun and for dpmpp_2s with midpoints).
        prediction: what the network outputs, one of `parameterization.PREDICTIONS`.
        spacing: see `grid.build`; the solver's own if None or empty.
        final: "abar_0" or "zero", see `grid.from_timesteps`; the solver's own if not given.
        offset: for leading spacing, see `grid.build`.
        **options: more options, see `options_of`.

    Raises:
        UserError: for an unknown name, spacing or option (it lists what there is), for a number
            of steps that the spacing cannot place, and for a zero-terminal-SNR schedule with
            epsilon prediction or a spacing that does not start at the last timestep.
    """
    name, told = parse(spec)
    given = {"final": final, "offset": offset}
    options |= {option: value for option, value in given.items() if value is not None}
    twice = sorted(set(told) & set(options))
    if twice:
        raise UserError(f"sampler {spec!r} and the call both give {', '.join(twice)}: leave one")
    told |= _checked(name, options)
    table_name = _spell(name, told)
    solver = SOLVERS[name]
    parameterization.check(prediction, schedule)
    spacing = spacing or solver.spacing
    grid = grids.build(
        spacing, schedule, steps, solver.convention, told.pop("final", solver.final),
        told.pop("offset", None),
    )
    if schedule.zero_terminal_snr and grid.alpha[0] > 0:
        raise UserError(
            f"schedule {schedule.name!r} ends in pure noise at t={schedule.num_timesteps - 1}, but "
            f"{spacing} spacing with {steps} steps starts at t={grid.timesteps[0]:g}: use spacing "
            "'trailing'"
        )
    interval = _taken(told, _GUIDANCE)
    correction = Correction(**_taken(told, _CORRECTION))
    table = solver.build(grid, prediction, **{**solver.options, **told})
    table = table.with_guidance_interval(*interval.values())
    return dataclasses.replace(
        table, name=f"{table_name}-{grid.name}-{steps}", correction=correction
    )


def warn(table: SamplerTable) -> None:
    """Logs, once, what spoils the pictures of a table: its start (`warn_of_start`), and steps that
    are too long for its solver, so that samples grow many times too large."""
    warn_of_start(table)
    if (gain := table.gain) > _MOST_GAIN:
        _say_gain(table.name, gain)


@functools.cache
def _say_gain(name: str, gain: float) -> None:
    other = " or sampler 'heun:over=line'" if name.startswith("heun") else " or another sampler"
    log.warning(
        "%s takes steps that are too long for it: of normal data its samples are %.3g times too "
        "large; take more steps, another spacing%s", name, gain, other,
    )


def warn_of_start(table: SamplerTable) -> None:
    """Logs, once, that a table begins where there is much signal, with noise that has none."""
    alpha2, sigma2 = table.alpha[0] ** 2, table.sigma[0] ** 2
    if (share := alpha2 / (alpha2 + sigma2)) > _MOST_SIGNAL:
        _say_start(table.name, float(table.t[0]), share)


@functools.cache
def _say_start(name: str, t: float, share: float) -> None:
    log.warning(
        "%s begins at t=%g, where %.3g%% of the variance is signal, but from noise alone: its "
        "pictures are hardly the network's; spacing 'trailing' begins at the last timestep",
        name, t, 100 * share,
    )


def _taken(options: dict[str, object], defaults: Mapping[str, object]) -> dict[str, object]:
    """Those of the defaults' names, out of the options."""
    return {name: options.pop(name, default) for name, default in defaults.items()}

"""Things of a config that go by a name with options: "flow:shift=3".

Configs are checked before anything is computed, so names and options are here, and what is made of
them is filled in by the rooms above.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ldm_scaling.errors import UserError


class Option(NamedTuple):
    """A number: what it is unless it is told, and what it lies strictly between."""

    default: float
    low: float = 0.0
    high: float = math.inf


class Named(NamedTuple):
    """What a name stands for.

    Attributes:
        make: what is called with the options, see the table in the room that calls it, which fills
            in those of the package: `diffusion.schedule.SCHEDULES`, `timesteps.DENSITIES`, ...
        options: what may be told, by name.
    """

    make: Callable[..., Any] | None = None
    options: Mapping[str, Option] = MappingProxyType({})


Known = Mapping[str, Named]

# Names of one's own are added to these.
SCHEDULES: dict[str, Named] = {
    "sd": Named(None, {"beta_start": Option(0.00085, 0.0, 1.0), "beta_end": Option(0.012, 0, 1.0)}),
    "sd_zero_snr": Named(),
    "linear": Named(None, {"beta_start": Option(1e-4, 0.0, 1.0), "beta_end": Option(0.02, 0, 1.0)}),
    "cosine": Named(),
    "flow": Named(None, {"shift": Option(1.0)}),
    "edm": Named(None, {
        "sigma_min": Option(0.002), "sigma_max": Option(80.0), "sigma_data": Option(0.5),
    }),
}
DENSITIES: dict[str, Named] = {
    "uniform": Named(),
    "shifted": Named(None, {"shift": Option(3.0)}),
    "logit_normal": Named(None, {"mean": Option(0.0, -math.inf), "std": Option(1.0)}),
    # Beyond these the mode's map would fall somewhere (Esser et al. 2024, eq. 20).
    "mode": Named(None, {"scale": Option(1.29, -1.0, 2 / (math.pi - 2))}),
    # EDM's ln sigma ~ N(-1.2, 1.2^2) at its sigma_data = 0.5.
    "log_normal": Named(None, {
        "mean": Option(-1.2 + math.log(2), -math.inf), "std": Option(1.2),
    }),
}
WEIGHTINGS: dict[str, Named] = {
    "none": Named(), "min_snr": Named(None, {"gamma": Option(5.0)}), "snr": Named(),
    "sigma_sqrt": Named(), "cosmap": Named(),
    "p2": Named(None, {"gamma": Option(1.0), "k": Option(1.0)}), "debiased": Named(),
}
OPTIMIZERS: dict[str, Named] = {
    "adamw": Named(None, {"eps": Option(1e-8)}), "lion": Named(),
}
DECAYS: dict[str, Named] = {
    "none": Named(), "linear": Named(), "cosine": Named(),
    "inverse_sqrt": Named(None, {"after": Option(70_000.0)}),
    # A share of 1 too.
    "wsd": Named(None, {"share": Option(0.2, 0.0, math.nextafter(1, 2)), "power": Option(0.5)}),
}


def filled(table: dict[str, Named], make: Mapping[str, Callable[..., Any]]) -> dict[str, Named]:
    """The table itself, with what its names are made by."""
    table |= {name: table[name]._replace(make=function) for name, function in make.items()}
    return table


def parse(what: str, text: str, known: Known) -> tuple[str, dict[str, float]]:
    """The name and all of its options, told or not.

    Args:
        what: it is, in errors.
        text: `name` or `name:option=value,option=value`.
        known: names, and the options of each.

    Raises:
        UserError: for an unknown name or option, or a value that is none; it lists what there is.
    """
    name, colon, told = text.partition(":")
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        nearest = f", did you mean {close[0]!r}?" if close else ":"
        raise UserError(f"unknown {what} {name!r}{nearest} choose one of {', '.join(known)}")
    options = {option: has.default for option, has in known[name].options.items()}
    seen = set()
    for pair in told.split(",") if colon else ():
        option, _, value = (part.strip() for part in pair.partition("="))
        if option not in options or option in seen:
            has = ", ".join(f"{o}={v:g}" for o, v in options.items()) or "none"
            raise UserError(
                f"{what} {text!r}: write name:option=value,option=value, each option once; "
                f"{name!r} has {has}"
            )
        seen.add(option)
        low, high = known[name].options[option][1:]
        try:
            options[option] = float(value)
        except ValueError:
            options[option] = math.nan
        if not low < options[option] < high:
            raise UserError(
                f"{what} {text!r}: {option}={value!r}: give a number between {low:g} and {high:g}"
            )
    return name, options


def spell(name: str, options: Mapping[str, float], known: Known) -> str:
    """The one spelling of all texts that say the same: what is as it is unless told left out."""
    told = [f"{o}={v:.12g}" for o, v in options.items() if v != known[name].options[o].default]
    return name + (":" + ",".join(told) if told else "")

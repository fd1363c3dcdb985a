"""Costing: what drawing one picture costs, in every unit that the study speaks. Pure functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers

Unit = Literal["cost", "gflops", "seconds", "calls"]
UNITS: tuple[Unit, ...] = ("cost", "gflops", "seconds", "calls")
Part = Literal["network", "guided", "decoder", "text"]
PARTS: tuple[Part, ...] = ("network", "guided", "decoder", "text")
"""What is timed: a network call, a guided pair of calls, pictures of latents, states of captions.
"""


@dataclasses.dataclass(frozen=True)
class Price:
    """What the parts of one member cost, for one picture.

    Attributes:
      member: its name.
      gflops: 1e9 FLOPs of a network call, guidance not doubled.
      norm_cost: gflops over those of the reference member.
      decoder_gflops, text_gflops: of making a picture of latents, of the states of one caption;
        None where not known.
      device: what `seconds` were measured on; empty where nothing was.
      seconds: (part, batch size) -> measured seconds for one picture of such a batch.
      bytes: (part, batch size) -> memory that the program for such a batch needs.
    """

    member: str
    gflops: float
    norm_cost: float
    decoder_gflops: float | None = None
    text_gflops: float | None = None
    device: str = ""
    seconds: Mapping[tuple[Part, int], float] = dataclasses.field(default_factory=dict)
    bytes: Mapping[tuple[Part, int], int] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("gflops", "norm_cost"):
            if not getattr(self, name) > 0:
                raise UserError(f"{self.member}: {name}={getattr(self, name)!r} must be above 0")

    @property
    def batches(self) -> list[int]:
        """Batch sizes that a network call was measured at, rising."""
        return sorted({batch for part, batch in self.seconds if part == "network"})

    def needs(self, batch: int) -> tuple[int, str]:
        """Bytes of the largest of its programs at this batch size, and which that is, in words; 0
        where none was measured."""
        sizes = ((n, part) for (part, size), n in self.bytes.items() if size == batch)
        count, part = max(sizes, default=(0, "network"))
        return count, {"network": f"a call of {self.member}", "text": "the text encoder",
                       "guided": f"a guided pair of {self.member}", "decoder": "the decoder"}[part]


@dataclasses.dataclass(frozen=True)
class Counted:
    """What is counted.

    Attributes:
      doubled: a guided pair counts as the two calls that it is, and as one otherwise (the paper's
        convention). In seconds, doubled is the measured time of such a pair.
      decoder: making the picture of its latents too.
      text: the states of its caption too.
      batch: pictures drawn at a time; matters to seconds alone.
    """

    doubled: bool = False
    decoder: bool = False
    text: bool = False
    batch: int = 1


THE_PAPERS = Counted()
"""Network calls alone, a guided pair as one."""
ALL = Counted(doubled=True, decoder=True, text=True)
"""All that is computed for a picture."""


@functools.cache
def calls(sampler: str, steps: int) -> int:
    """Network calls of a sampler (`solvers.parse` reads its options), a guided pair as one.

    Raises:
      UserError: for a sampler or a number of steps that there is not.
    """
    return solvers.make(sampler, schedule_lib.get("sd"), steps, "epsilon").calls


def sampling(
    price: Price, calls: int, guided: bool, unit: Unit, counted: Counted = THE_PAPERS,
    guided_calls: int | None = None,
) -> float:
    """What one picture costs.

    Args:
      price: of the member.
      calls: network calls, a guided pair as one: `calls(sampler, steps)`, `Record.calls`.
      guided: whether they are guided pairs.
      unit: "cost" is the paper's normalised cost, "gflops" 1e9 FLOPs, "seconds" those of
        `price.device`, "calls" network calls.
      counted: what is counted.
      guided_calls: how many of the calls are pairs if guided, `SamplerTable.guided_calls`: with a
        guidance interval those within. None is all.

    Raises:
      UserError: for what has no such unit, or was not counted or measured.
    """
    pairs = (calls if guided_calls is None else guided_calls) if guided and counted.doubled else 0
    extra = [p for p, on in (("decoder", counted.decoder), ("text", counted.text)) if on]
    if unit == "seconds":
        kinds = {"guided": pairs, "network": calls - pairs}
        network = sum(n * _seconds(price, part, counted.batch) for part, n in kinds.items() if n)
        return network + sum(_seconds(price, part, counted.batch) for part in extra)
    times = calls + pairs
    if unit == "calls":
        if extra:
            raise UserError(
                f"{' and '.join(extra)} are no network calls: leave them out, or count in cost, "
                "gflops or seconds"
            )
        return float(times)
    if unit not in ("cost", "gflops"):
        raise UserError(f"unit={unit!r}: choose one of {', '.join(UNITS)}")
    total = price.gflops * times + sum(_gflops(price, part) for part in extra)
    # What a FLOP of the network costs, one of the others does too.
    return total if unit == "gflops" else total * price.norm_cost / price.gflops


def _gflops(price: Price, part: str) -> float:
    found = price.decoder_gflops if part == "decoder" else price.text_gflops
    if found is None:
        raise UserError(
            f"{price.member}: FLOPs of the {part} are not known: take them from what "
            "ldm-scaling cost  writes"
        )
    return found


def _seconds(price: Price, part: Part, batch: int) -> float:
    if (part, batch) not in price.seconds:
        have = sorted(b for p, b in price.seconds if p == part)
        raise UserError(
            f"{price.member}: no measured seconds of the {part} at batch size {batch}"
            f"{f' on {price.device}' if price.device else ''} (there are {have or 'none'}): run  "
            f"ldm-scaling cost --member={price.member} --batch={batch}  there"
        )
    return price.seconds[part, batch]


def label(unit: Unit, counted: Counted = THE_PAPERS, device: str = "") -> str:
    """The unit in words, with what is counted, for axes and heads of tables.

    `normalised cost × network calls, guidance not doubled`;
    `seconds a picture on NVIDIA H100, batch size 8, with decoder and text encoder`.
    """
    first = {
        "cost": "normalised cost × network calls", "gflops": "GFLOPs a picture",
        "seconds": f"seconds a picture on {device or 'one device'}, batch size {counted.batch}",
        "calls": "network calls a picture",
    }[unit]
    guidance = f"guidance {'' if counted.doubled else 'not '}doubled"
    if unit == "seconds":
        guidance = "guided pairs as measured" if counted.doubled else "guidance not doubled"
    names = [n for n, on in (("decoder", counted.decoder), ("text encoder", counted.text)) if on]
    extra = f"with {' and '.join(names)}" if names else ""
    return ", ".join(piece for piece in (first, guidance, extra) if piece)

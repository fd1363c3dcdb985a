"""What a gallery holds: members, prompts, samplers, step counts, guidance rates and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ldm_scaling import __version__, files
from ldm_scaling.config import Study
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.table import SamplerTable
from ldm_scaling.study import labels, versions

AXES = ("member", "prompt", "sampler", "steps", "guidance", "seed")
MOST_PICTURES = 4096
_LONGEST = 180  # bytes of a file's name: file systems take 255, of which others put some before it


@dataclasses.dataclass(frozen=True)
class Request:
    """What to draw: every combination of the values.

    Attributes:
      member: names of networks.
      prompt: captions.
      sampler: specs of `sampling.solvers`, such as `ddim:eta=0.5`.
      steps: step counts.
      guidance: guidance rates; 1 is none.
      seeds: of each prompt, as many for all. A seed is the number of a sample: the noise is the
        one that a sweep draws for the picture of that number.
      spacing: timestep spacing, of all.
      version: of the code that draws, see `versions.of`.
    Raises:
      UserError: for a value that cannot be, or one given twice.
    """

    member: tuple[str, ...]
    prompt: tuple[str, ...]
    sampler: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...]
    seeds: tuple[tuple[int, ...], ...]
    spacing: str
    version: str = __version__

    def __post_init__(self):
        count = math.prod(self.shape[1:])
        if count > MOST_PICTURES:
            raise UserError(
                f"this asks for {count} pictures of a network, more than {MOST_PICTURES}: give "
                "fewer values, or use  ldm-scaling sweep"
            )
        named = {axis: getattr(self, axis) for axis in AXES[:-1]} | {"seeds": self.seeds[0]}
        for name, values in named.items():
            if not values:
                raise UserError(f"{name}: give at least one")
            twice = [value for value in values if values.count(value) > 1]
            if twice and name != "prompt":  # Two pictures of a data set may have one caption.
                raise UserError(f"{name}: {twice[0]!r} is given twice")
        wrong = [seed for seeds in self.seeds for seed in seeds if not 0 <= seed < 2**31]
        if wrong:
            raise UserError(f"seeds: {wrong[0]}: give whole numbers from 0 to {2**31 - 1}")
        wrong = [rate for rate in self.guidance if not math.isfinite(rate)]
        if wrong:
            raise UserError(f"guidance: {wrong[0]}: give a finite number, 1 for none")

    @property
    def shape(self) -> tuple[int, ...]:
        """How many values each of `AXES` has."""
        return (*(len(getattr(self, axis)) for axis in AXES[:-1]), len(self.seeds[0]))

    @property
    def name(self) -> str:
        """A file name: the first prompt's words, the settings, and a hash of everything."""
        steps, rates = "-".join(map(str, self.steps)), "-".join(f"{w:g}" for w in self.guidance)
        more = f" and {len(self.prompt) - 1} more" if self.prompt[1:] else ""
        seeds = ["seeds " + span(self.seeds[0])] if len(set(self.seeds)) == 1 else []
        parts = [
            f"{self.prompt[0][:40]}{more}".lower(), "+".join(self.sampler), f"{steps}steps",
            self.spacing, f"w{rates}", *seeds, "+".join(self.member),
        ]
        decides = dataclasses.asdict(self)
        digest = files.sha256_of([decides.pop("version"), decides])[:8]
        parts = [re.sub(r"[^\w.+-]+", "-", part).strip("-")[:50] for part in parts]
        stem = "_".join(filter(None, parts)).encode()[:_LONGEST].decode(errors="ignore")
        return f"{stem}_{digest}"

    def tables(self, study: Study) -> dict[tuple[str, int], SamplerTable]:
        """The table of every (sampler, steps).

        Raises:
          UserError: naming the sampler that does not take the steps, the spacing or its options.
        """
        schedule, out = schedule_lib.get(study.diffusion.schedule), {}
        for name, steps in itertools.product(self.sampler, self.steps):
            try:
                out[name, steps] = solvers.make(
                    name, schedule, steps, study.diffusion.prediction, self.spacing
                )
            except UserError as e:
                where = f"{self.spacing or 'its own'} spacing"
                raise UserError(f"sampler {name}, {steps} steps, {where}: {e}") from e
            solvers.warn(out[name, steps])
        return out


def of(
    study: Study, prompt: str | Iterable[str], *, sampler: str | Iterable[str] | None = None,
    steps: int | Iterable[int] | None = None, guidance: float | Iterable[float] | None = None,
    seeds: int | Iterable[int] | None = None, spacing: str | None = None,
    member: str | Iterable[str] | None = None,
) -> Request:
    """A request with what is not given from the config: `config.sample`'s sampler, steps,
    guidance and spacing, all members, and seeds from 0 up, as many as make `sample.num_images`
    pictures of each network (at least one).

    Raises:
      UserError: for a value of the wrong type, a member that the config does not have, or a
        sampler that does not take its steps, spacing or options.
    """
    default = study.sample
    values = {
        "member": _values("member", study.members if member is None else member, str),
        "prompt": _values("prompt", prompt, str),
        "sampler": _values("sampler", default.sampler if sampler is None else sampler, str),
        "steps": _values("steps", default.steps if steps is None else steps, int),
        "guidance": _values("guidance", default.guidance if guidance is None else guidance, float),
    }
    unknown = [m for m in values["member"] if m not in study.trained]
    if unknown:
        raise UserError(f"member: {unknown[0]!r} is none of the config's: "
                        f"choose from {', '.join(study.trained)}")
    values["sampler"] = tuple(map(solvers.canonical, values["sampler"]))
    if seeds is None:
        others = math.prod(len(v) for name, v in values.items() if name != "member")
        seeds = range(max(1, default.num_images // max(1, others)))
    if not isinstance(spacing, str | None):
        raise UserError(f"spacing: {spacing!r} should be one text")
    out = Request(
        **values, seeds=(_values("seeds", seeds, int),) * max(1, len(values["prompt"])),
        spacing=default.spacing if spacing is None else spacing,
    )
    tables = [(name, count, out.spacing) for name, count in out.tables(study)]
    return dataclasses.replace(out, version=versions.of(study.diffusion, *tables))


def _values(name: str, given: Any, kind: type) -> tuple:
    """One value, or several, as a tuple of `kind`."""
    wanted = {str: str, int: numbers.Integral, float: numbers.Real}[kind]
    values = listed(given)
    for value in values:
        if not isinstance(value, wanted) or isinstance(value, bool):
            what = {str: "a text", int: "a whole number", float: "a number"}[kind]
            raise UserError(f"{name}: {value!r} should be {what}, or give a list of them")
    return tuple(map(kind, values))


def listed(given: Any) -> list:
    """One value, or several, as a list; of NumPy's and JAX's arrays as Python's numbers."""
    given = _plain(given)
    several = isinstance(given, Iterable) and not isinstance(given, str)
    return list(map(_plain, given)) if several else [given]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def span(seeds: Sequence[int]) -> str:
    """Seeds in words: `0 to 7`, `0, 3 and 5`, `4`."""
    first, last = seeds[0], seeds[-1]
    if len(seeds) > 2 and tuple(seeds) == tuple(range(first, last + 1)):
        return f"{first} to {last}"
    return labels.listing([str(seed) for seed in seeds])

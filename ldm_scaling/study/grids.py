"""Grids of pictures in a workdir's `samples/`: drawn once for each request, of members and of what
is made of them further."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import hosts, processes
from ldm_scaling.sampling import solvers
from ldm_scaling.study import fitting, gallery
from ldm_scaling.study import further as further_lib
from ldm_scaling.study import request as request_lib
from ldm_scaling.study.cascaded import Cascaded
from ldm_scaling.study.distilled import Distilled
from ldm_scaling.study.further import Further
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.request import Request

log = logging.getLogger(__name__)


def of_all(
    several: Sequence[Further], prompts: Sequence[str], values: dict[str, Any]
) -> list[str]:
    """The grids of all that members are made further; returns the files. Students of several kinds
    are drawn each by those of the samplers asked for that are theirs, which a warning says.

    Args:
      several: what they are made.
      prompts, values: see `of`.
    Raises:
      UserError: as `of`; for a sampler that is nobody's.
    """
    kinds = [f for f in several if isinstance(f, Distilled)]
    asked = values.get("sampler")
    if asked is None or not kinds[1:]:
        return [of(further, prompts, values) for further in several]
    names = [solvers.canonical(n) for n in ([asked] if isinstance(asked, str) else asked)]
    theirs = {d.name: [n for n in names if solvers.parse(n)[0] == d.config.sampler] for d in kinds}
    if lacking := [n for n in names if not any(n in own for own in theirs.values())]:
        raise UserError(
            f"--sampler={lacking[0]}: students are drawn by the sampler at whose nodes they are "
            f"trained: {' or '.join(dict.fromkeys(d.config.sampler for d in kinds))}"
        )
    out = []
    for distilled in kinds:
        own = theirs[distilled.name]
        if others := [n for n in names if n not in own]:
            log.warning(
                "students of %s are drawn by %s alone, not by %s", distilled.config.method,
                distilled.config.sampler, ", ".join(others))
        if own:
            out.append(of(distilled, prompts, values | {"sampler": own}))
    return out


def of(further: Further, prompts: Sequence[str], values: dict[str, Any]) -> str:
    """The grid of what members are made further; returns the file.

    Args:
      further: what they are made.
      prompts, values: see `stages.sample`.
    Raises:
      UserError: for prompts or values that it does not take.
    """
    asked = bool(prompts) or any(value is not None for value in values.values())
    if asked and isinstance(further, Distilled):
        return _students_grid(further, prompts, values)
    if asked and isinstance(further, Cascaded):
        return _cascades_grid(further, prompts, values)
    return _further_grid(further, prompts, values)


def grid(
    materials: Materials, wanted: Request, prompts: Sequence[str], values: dict[str, Any],
    whose: str, draw: Callable[[Request, Any], gallery.Gallery], most: int,
) -> str:
    """Draws a request unless its file is there, without prompts for `most` validation captions;
    returns the file."""
    study, context_PLD = materials.study, None
    stem = f"{whose}{wanted.name}"
    if not prompts:
        block = materials.prompts(study.sweep.report_block)
        n = min(most, len(block.index_N))
        own = [(seed,) for seed in block.index_N[:n].tolist()]
        seeds = own if values.get("seeds") is None else wanted.seeds * n
        wanted = dataclasses.replace(wanted, prompt=block.captions[:n], seeds=tuple(seeds))
        stem, context_PLD = f"{whose}validation_{wanted.name}", block.context_NLD[:n]
    path = materials.workdir / "samples" / f"{stem}.png"
    if not processes.from_lead("drawn", path.exists):
        if context_PLD is None:
            context_PLD = gallery.text_states(materials, wanted.prompt)
        drawn = draw(wanted, context_PLD)
        if hosts.is_lead():
            drawn.save(path)
    return str(path)


def _students_grid(distilled: Distilled, prompts: Sequence[str], values: dict[str, Any]) -> str:
    """Of members' last students, for prompts and settings of one's own."""
    materials, last = distilled.materials, distilled.stages[-1]
    theirs = dataclasses.replace(
        materials.study, sample=distilled.sample(last), diffusion=distilled.diffusion
    )
    wanted = request_lib.of(theirs, prompts or ("",), **values)
    distilled.check_drawn(last, wanted.sampler, wanted.guidance)
    # More halvings may follow: which student it is the setting does not say.
    whose = f"{distilled.setting}_" + (f"{last.name}_" if last.steps else "")
    return grid(materials, wanted, prompts, values, whose, functools.partial(
        gallery.draw, dataclasses.replace(materials, study=theirs),
        drawer=lambda member: distilled.drawer(member, last.told),
        params=lambda member: distilled.params(member, last),
    ), theirs.sample.num_images)


def _cascades_grid(cascaded: Cascaded, prompts: Sequence[str], values: dict[str, Any]) -> str:
    """Of cascades, for prompts and settings of one's own; the first stage's steps are the
    config's."""
    theirs, steps = cascaded.as_study(), cascaded.config.first_steps[-1]
    materials = dataclasses.replace(cascaded.materials, study=theirs)
    wanted = request_lib.of(theirs, prompts or ("",), **values)
    fitting.undistilled(theirs, wanted.member[0], wanted.sampler)

    def draw(wanted: Request, context_PLD: Any) -> gallery.Gallery:
        drawn = gallery.draw(
            materials, wanted, context_PLD,
            drawer=lambda name: cascaded.drawer(*cascaded.of_name(name)).after(steps),
            params=lambda name: cascaded.params(*cascaded.of_name(name)),
        )
        first = cascaded.first(cascaded.config.base[0], steps)
        calls = {key: calls + first.calls for key, calls in drawn.calls.items()}
        return dataclasses.replace(drawn, calls=calls)

    whose = f"{cascaded.drawn_with}_{steps}steps_"
    return grid(
        cascaded.materials, wanted, prompts, values, whose, draw, theirs.sample.num_images)


def _further_grid(further: Further, prompts: Sequence[str], values: dict[str, Any]) -> str:
    """Of members that are trained further; the config alone says how."""
    if prompts:
        raise UserError(
            f"the members are fine-tuned for {further.config.task}, which takes no prompt: leave "
            "out --prompt for a grid of validation pictures, or --config.finetune.task= for the "
            "pretrained members"
        )
    if given := sorted(name for name, value in values.items() if value is not None):
        raise UserError(
            f"--{given[0]}: the grid of {further.config.task} is as the config's finetune.sample "
            "says: give --config.finetune.sample.steps=N and the like"
        )
    return further_lib.grid(further)

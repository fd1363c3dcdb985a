"""Members that begin with another study's: what may be taken of it, and how, see `config.Start`."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm_scaling import files
from ldm_scaling.config import LENGTH, Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, zoo
from ldm_scaling.parallel import processes
from ldm_scaling.study import runs
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training import checkpoint, optimizer, step
from ldm_scaling.training.checkpoint import Place

if TYPE_CHECKING:
    from ldm_scaling.study.materials import Materials

# What decides the numbers of members' runs, as `Study.identity` has it.
_DECIDES = ("seed", "data", "autoencoder", "diffusion", "train", "start")
_PARTS = {"average": "ema", "weights": "params"}


def resolved(study: Study) -> Study:
    """The study with the step that its members begin with and its hash; others are returned as they
    are.

    Raises:
      UserError: for a workdir without these members, checkpoints or hash, and for members that
        another noise, autoencoder or text encoder was taught; with `run` where what a config says
        would not have made what is there.
    """
    start = study.start
    if not start.workdir:
        return study
    path = os.fspath(Path(start.workdir).expanduser().absolute())
    there = Workdir(path)
    theirs = there.last_config("start.workdir")
    if not theirs.trains_members:
        raise UserError(f"config: start.workdir={start.workdir!r} has trained no members itself")
    number = start.step or theirs.train.steps
    for member in study.members:
        folder = there.member(member) / "checkpoints"
        if number not in (have := checkpoint.steps_of(folder)):
            raise UserError(
                f"config: start.step={number}: {folder} holds {have or 'no step'}: choose of them, "
                "or train there first, with the step among train.keep_steps"
            )
        checkpoint.check_network(folder, number, runs.network(zoo.get(member).spec))
        if start.take == "run" and study.train.averages:
            _check_averages(study, folder, number)
    _check_alike(study, theirs, start.workdir)
    have = files.sha256_of([theirs.training_hash(""), number, start.take])
    if start.take == "run":
        have = theirs.start.hash
        _check_beginning(study, theirs, number)
    if start.hash not in ("", have):
        raise UserError(
            f"the members in {path} have the hash {have!r} at step {number}, but the config wants "
            f"{start.hash!r}: restore them, or leave out start.hash and choose another --workdir"
        )
    start = dataclasses.replace(start, workdir=path, step=number, hash=have)
    return dataclasses.replace(study, start=start)


def _check_alike(study: Study, theirs: Study, given: str) -> None:
    """Raises `UserError` for members that were taught other latents, texts or noise."""
    def facts(s: Study) -> dict[str, Any]:
        return {
            "diffusion.schedule": s.diffusion.schedule,
            "diffusion.prediction": s.diffusion.prediction, "data.text_hash": s.data.text_hash,
        } | {f"autoencoder.{k}": v for k, v in s.identity()["autoencoder"].items()}

    ours, its = facts(study), facts(theirs)
    for key in sorted(ours.keys() | its.keys()):
        if ours.get(key) != its.get(key):
            raise UserError(
                f"config: {key}={ours.get(key)!r}, but the members in {given} were trained with "
                f"{its.get(key)!r}: give theirs"
            )


def _check_averages(study: Study, folder: os.PathLike, number: int) -> None:
    """Raises `UserError` where a run to go on from tracked other averages, which are of all steps.
    """
    have = tuple(map(float, checkpoint.averages_of(folder, number)))
    if sorted(have) != sorted(study.train.averages):
        raise UserError(
            f"config: start.take='run': {folder}/{number} holds averages of "
            f"{', '.join(f'{n:g}' for n in have) or 'no length'}, and "
            f"train.averages={study.train.averages} cannot begin later: give "
            f"--config.train.averages='{have}'"
            + (", or () for none," if have else " --config.train.averages_every=0,")
            + " or begin a run of its own with start.take=average"
        )


def _check_beginning(study: Study, theirs: Study, number: int) -> None:
    """Raises `UserError` where the first steps of a study's runs are not these of another's."""
    def facts(s: Study) -> dict[str, Any]:
        tree, flat = s.identity(), {}
        for key in _DECIDES:
            value = tree.get(key)
            flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {
                key: value}
        return {k: v for k, v in flat.items() if k not in {f"train.{name}" for name in LENGTH}}

    def rates(s: Study) -> np.ndarray:
        taken = np.arange(number)
        return np.broadcast_to(optimizer.learning_rate(s.train)(taken), taken.shape)

    its = facts(theirs)
    ours = facts(study) | {"start": its["start"]}  # Which is what this one's own becomes.
    wrong = [
        f"{k} is {its.get(k)!r} there, {ours.get(k)!r} here"
        for k in sorted(ours.keys() | its.keys()) if ours.get(k) != its.get(k)
    ]
    there, here = rates(theirs), rates(study)
    apart = np.flatnonzero(~np.isclose(there, here, rtol=1e-6, atol=0))
    if len(apart) and not wrong:
        n = apart[0]
        wrong = [f"the learning rate after {n} steps is {there[n]:g} there, {here[n]:g} here"]
    if wrong:
        raise UserError(
            f"config: start.take='run': the first {number} steps are not those of "
            f"{study.start.workdir} ({'; '.join(wrong[:4])}): give its values, or begin a run of "
            "its own with start.take=average"
        )


def take_autoencoder(materials: Materials) -> None:
    """Copies the other study's trained autoencoder; all processes must ask together.

    Raises:
      UserError: where it is not trained there, or cannot be copied.
    """
    study, folder = materials.study, materials.workdir / "autoencoder"
    number, there = study.autoencoder.train.steps, Workdir(study.start.workdir) / "autoencoder"

    def copy() -> None:
        source = there / "checkpoints" / str(number)
        if not source.exists():
            raise UserError(
                f"the autoencoder is not trained: there is no {source}; run  ldm-scaling train  "
                "with that workdir first"
            )
        with files.atomic_folder(folder) as made:
            shutil.copytree(source, made / "checkpoints" / str(number))
            if (there / "curves.csv").exists():
                shutil.copy(there / "curves.csv", made / "curves.csv")

    processes.from_lead("autoencoder", copy)


def beginning(
    materials: Materials, member: str, spec: backbone.Spec
) -> tuple[Callable[[], Any] | None, Place | None]:
    """What gives the parameters that a member's run begins with, and the checkpoint that it goes on
    from; None where neither."""
    start = materials.study.start
    if not start.workdir:
        return None, None
    there = Workdir(start.workdir)
    folder = there.member(member) / "checkpoints"
    if start.take == "run":
        return None, Place(folder, start.step)

    def params() -> Any:
        run = there.last_config().train  # Its optimiser may carry other things.
        abstract = step.abstract_state(backbone.initializer(spec), run, materials.mesh)
        return checkpoint.average(
            folder, start.step, abstract, runs.network(spec), _PARTS[start.take]
        )

    return params, None

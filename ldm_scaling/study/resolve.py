"""A config with what its inputs decide: hashes of published weights and of prepared data."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from ldm_scaling.config import Data, Study
from ldm_scaling.data import sources
from ldm_scaling.errors import UserError
from ldm_scaling.study import preparing, published, starting, weight_files
from ldm_scaling.study.workdir import Workdir


def resolved(study: Study, workdir: Workdir) -> Study:
    """The study as its workdir is bound to it; nothing is computed or written but hashes.

    Raises:
      UserError: for weights, shards, collections and members that are not there or not supported,
        and for those that do not have the hash that the config gives.
    """
    study = _with_pretrained(published.resolved(study, workdir))
    data = preparing.resolved(_as_bound(study.data, workdir), workdir / "data")
    if data.cache:  # The workdir may be used from elsewhere.
        path = os.fspath(Path(data.cache).expanduser().absolute())
        data = dataclasses.replace(data, cache=path)
    autoencoder = study.autoencoder
    if data.text_weights:
        hash = _hash("data.text_weights", data.text_weights, data.text_hash, workdir)
        data = dataclasses.replace(data, text_hash=hash)
    if autoencoder.weights:
        given = autoencoder.weights
        hash = _hash("autoencoder.weights", given, autoencoder.weights_hash, workdir)
        autoencoder = dataclasses.replace(autoencoder, weights_hash=hash)
    return starting.resolved(dataclasses.replace(study, data=data, autoencoder=autoencoder))


def _as_bound(data: Data, workdir: Workdir) -> Data:
    """The settings with their source spelt as the workdir has it, where both name the same files:
    hashes are of what is written."""
    there = Data(source=workdir.bound_source or data.source)
    same = len(there.sources) == len(data.sources) and all(
        map(_same, there.sources, data.sources))
    return dataclasses.replace(data, source=there.source) if same else data


def _same(bound: str, given: str) -> bool:
    """Whether a source is what a workdir is bound to. Of a relative path it is not known which
    folder it was relative to."""
    if bound.rstrip("/") == given.rstrip("/"):
        return True
    path = Path(bound.partition(":")[2]).expanduser()
    return path.is_absolute() and sources.canonical(bound) == sources.canonical(given)


def _with_pretrained(study: Study) -> Study:
    """The study with the hash of the members that are fine-tuned, where another trained them."""
    given = study.finetune.pretrained
    if not given:
        return study
    there = Workdir(given)
    theirs = there.last_config("finetune.pretrained")
    # Its last command may have been of some of its members.
    have = dict.fromkeys((*theirs.members, *sorted(p.name for p in (there / "models").glob("*"))))
    lacks = [m for m in study.members if m not in have]
    if lacks:
        raise UserError(
            f"config: members={study.members}: {given} has trained no {', '.join(lacks)}, but "
            f"{', '.join(have)}"
        )
    if theirs.weights:
        raise UserError(
            f"config: finetune.pretrained={given!r} draws with the published model in "
            f"{theirs.weights} and has trained none: give --config.weights={theirs.weights} instead"
        )
    # How often a timestep is trained at, and with which weight, may differ.
    for key in ("schedule", "prediction"):
        ours, its = (getattr(s.diffusion, key) for s in (study, theirs))
        if ours != its:
            raise UserError(
                f"config: diffusion.{key}={ours!r}, but the members in {given} were trained with "
                f"{its!r}: give theirs"
            )
    if study.reference != theirs.reference:
        raise UserError(
            f"config: reference={study.reference!r}, but the costs in {given} are told in those of "
            f"{theirs.reference!r}, and a page tells both: give theirs"
        )
    have = theirs.training_hash("")  # Of all that its members share: more may be fine-tuned later.
    wanted = study.finetune.pretrained_hash
    if wanted not in ("", have):
        raise UserError(
            f"the members in {given} have the hash {have}, but the config wants those of {wanted}: "
            "restore them, or leave out finetune.pretrained_hash and choose another --workdir"
        )
    path = os.fspath(Path(given).expanduser().absolute())
    finetune = dataclasses.replace(study.finetune, pretrained=path, pretrained_hash=have)
    return dataclasses.replace(study, finetune=finetune)


def _hash(key: str, given: str, wanted: str, workdir: Workdir) -> str:
    path = Path(given).expanduser().absolute()
    if not path.exists():
        raise UserError(f"config: {key}={given!r}: there is no such file or folder")
    root = path if path.is_dir() else path.parent
    have = weight_files.hash_of(weight_files.below(path), root, workdir)
    if wanted not in ("", have):
        raise UserError(
            f"the weights in {path} have the hash {have}, but the config wants those of {wanted}: "
            "restore them, or leave out the hash and choose another --workdir"
        )
    return have

"""A published Stable Diffusion in the place of the networks that a study trains.

`config.weights` names its folder. The noise and what the U-Net predicts come from there too, and a
hash of its files stands for all training in the identity of a workdir and of its records.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ldm_scaling.config import AUTO, Diffusion, Study
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import clip_text, sd_folder, zoo
from ldm_scaling.parallel import placing, rules
from ldm_scaling.sampling import solvers
from ldm_scaling.study import encoders, subject, weight_files
from ldm_scaling.study.networks import Networks
from ldm_scaling.study.workdir import Workdir


def resolved(study: Study, workdir: Workdir) -> Study:
    """The study with what its weights decide: their hash, the noise, the prediction; and where
    their noise is `auto` and ends in pure noise, trailing spacing for what names none and cannot
    be drawn by its samplers' own. One without weights is returned as it is.

    Raises:
      UserError: for a folder that is not whole or not supported, a config that contradicts it, or
        files that are not those of the hash that the config gives.
    """
    if not study.weights:
        return study
    folder = Path(study.weights).expanduser().absolute()
    found = sd_folder.read(folder)
    for key in ("schedule", "prediction"):
        have, given = getattr(found, key), getattr(study.diffusion, key)
        if given not in (AUTO, have):
            raise UserError(
                f"config: diffusion.{key}={given!r}, but the model in {folder} has {have!r}: give "
                f"{have!r}, or {AUTO!r} for what the weights say"
            )
    have = weight_files.hash_of(sd_folder.files(folder), folder, workdir)
    if study.weights_hash not in ("", have):
        raise UserError(
            f"the weights in {folder} have the hash {have}, but the config wants those of "
            f"{study.weights_hash}: restore them, or leave out weights_hash and choose another "
            "--workdir"
        )
    diffusion = dataclasses.replace(
        study.diffusion, schedule=found.schedule, prediction=found.prediction
    )
    spaced = {}
    if study.diffusion.schedule == AUTO and schedule_lib.get(found.schedule).zero_terminal_snr:
        tables = {"sample": [study.sample.table], "sweep": subject.tables(study.sweep)}
        spaced = {
            name: dataclasses.replace(getattr(study, name), spacing="trailing")
            for name, some in tables.items() if not _fit(diffusion, some)
        }
    return dataclasses.replace(
        study, weights=os.fspath(folder), weights_hash=have, diffusion=diffusion, **spaced
    )


def _fit(diffusion: Diffusion, tables: Iterable[tuple[str, int, str]]) -> bool:
    """Whether (sampler, steps, spacing) all name one, or can be made without."""
    schedule = schedule_lib.get(diffusion.schedule)
    try:
        for name, steps, spacing in tables:
            spacing or solvers.make(name, schedule, steps, diffusion.prediction)
    except UserError:
        return False
    return True


def networks(study: Study, workdir: Workdir, mesh: Mesh) -> Networks:
    """The networks in the folder of a study's weights.

    Raises:
      UserError: as `resolved`, which must have been here before.
    """
    study = resolved(study, workdir)
    folder, (name,) = sd_folder.read(study.weights), study.members

    def place(params: Any) -> Any:
        return placing.put(params, rules.shardings(params, mesh))

    @functools.cache
    def decoder() -> tuple[Any, float]:
        params, scale = folder.decoder()
        return place(params), scale

    @functools.cache
    def encoder() -> clip_text.ClipText:
        return folder.text_encoder()

    def states(texts: Sequence[str]) -> np.ndarray:
        return encoder().states(list(texts))[0]

    @functools.cache
    def autoencoder() -> encoders.LatentEncoder:
        further = [d.train for d in study.distillations]
        if study.finetune.task:
            further = [study.finetune.train]
        if not further:
            raise UserError(
                f"{name} is the published model in {study.weights}: nothing is trained in its "
                "latents here; to train networks in them give --config.autoencoder.weights instead "
                "of weights, to fine-tune it --config.finetune.task, to distil it "
                "--config.consistency.method"
            )
        return encoders.latent_encoder_from(study.weights, further[0].compute_dtype)

    here = "Nothing was trained here"
    if study.finetune.task:
        here = f"Only the fine-tuning for {study.finetune.task} was done here"
    if study.distillations:
        here = "Only its distillation was done here"
    return Networks(
        spec=lambda member: folder.unet_spec if member == name else zoo.get(member).spec,
        tokens=folder.unet_spec.context_length,
        params=lambda member: place(folder.unet_params()),
        autoencoder=autoencoder,
        decoder_spec=folder.decoder_spec,
        decoder=lambda: decoder()[0],
        latent_scale=lambda: decoder()[1],
        states=states,
        lengths=lambda texts: encoder().tokenizer.lengths(texts),
        # As its own pipeline has them; there are as many as prompts, not as training captions.
        states_dtype=np.float32,
        text_hash=lambda: encoder().hash,
        require=lambda members: None,
        summary="A published latent diffusion model, its samplers compared at equal sampling cost.",
        about=(
            f"{here}: the U-Net, the autoencoder and the text encoder of {name} "
            f"are published weights (hash of their files {study.weights_hash}); none of them was "
            "trained on these pictures.",
        ),
    )

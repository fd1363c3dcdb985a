"""Whether a network fits a study's text, mesh, noise and samplers. Of latents, who asks knows more
to say."""

from __future__ import annotations

from collections.abc import Iterable

from ldm_scaling.config import Consistency, Diffusion, Mesh, Study
from ldm_scaling.config.check import require
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, zoo
from ldm_scaling.sampling import solvers
from ldm_scaling.tasks import drawing


def tokens(spec: backbone.Spec, whose: str, length: int) -> None:
    """Raises `UserError` for more text tokens than the network has places for."""
    most = backbone.most_tokens(spec)
    if most is not None and length > most:
        raise UserError(
            f"config: data.text_length={length}: {whose} has places for {most} text tokens: lower "
            f"it to {most}"
        )


def heads(spec: backbone.Spec, whose: str, mesh: Mesh) -> None:
    """Raises `UserError` for attention heads that do not divide as `mesh.tensor` says; what is left
    of the devices (-1) is known where the network is placed on them."""
    if mesh.tensor > 0:
        drawing.check_heads(spec, mesh.tensor, whose)


def width(spec: backbone.Spec, whose: str, width: int) -> None:
    """Raises `UserError` for text states that are wider than the network takes."""
    if width > spec.context_dim:
        raise UserError(
            f"config: data.text_weights: its text states are {width} wide, {whose} takes "
            f"{spec.context_dim}: choose a network with a wider context, or another text encoder"
        )


def noise(name: str, key: str, diffusion: Diffusion) -> None:
    """Raises `UserError` for a SiT on other noise than its own.

    Args:
      name: of the network.
      key: of the config that names it, with its value.
      diffusion: the config's.
    """
    straight = schedule_lib.get(diffusion.schedule).straight and diffusion.prediction == "flow"
    if zoo.family_of(name) == "sit" and not straight:
        raise UserError(
            f"config: {key}: a SiT is a DiT on the linear interpolant, not with "
            f"diffusion.schedule={diffusion.schedule!r} and diffusion.prediction="
            f"{diffusion.prediction!r}: give flow for both, or name {name.replace('sit', 'dit')}"
        )


def of_students(samplers: Iterable[str]) -> list[str]:
    """Those of samplers that draw with students of consistency distillation alone."""
    return [s for s in samplers if solvers.parse(s)[0] in Consistency.SAMPLERS.values()]


def undistilled(study: Study, name: str, samplers: Iterable[str]) -> None:
    """Raises `UserError` for samplers `of_students` that are asked for of a network that is none. A
    published network may be one.

    Args:
      study: the config.
      name: of the network.
      samplers: that it would be drawn by.
    """
    if (few := of_students(samplers)) and not study.weights:
        raise UserError(
            f"--sampler={few[0]} draws with students of consistency distillation, and {name} is "
            "none: choose another, such as ddim, or give --config of a study that distils"
        )


def samplers(study: Study) -> None:
    """Raises `UserError` where a config draws by samplers `of_students` with networks that are
    none. A published network may be one."""
    if study.weights:
        return
    parts = {} if study.finetune.pretrained else {"": study}
    parts |= {"finetune.": study.finetune} if study.finetune.task else {}
    parts |= {"cascade.": study.cascade} if study.cascade.base else {}
    asked = {"cascade.first_sampler": (study.cascade.first_sampler,)} if study.cascade.base else {}
    for name, part in parts.items():
        asked |= {f"{name}sample.sampler": (part.sample.sampler,),
                  f"{name}sweep.samplers": part.sweep.samplers}
    for key, names in asked.items():
        for few in of_students(names):
            require(False, key, few, "it draws with students of consistency distillation, and "
                    "these networks are none: choose another, such as ddim; students are drawn by "
                    "consistency.sample and consistency.sweep")

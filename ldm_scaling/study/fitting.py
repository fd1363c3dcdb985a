"""Whether a network fits a study's text and noise. Of latents, who asks knows more to say."""

from __future__ import annotations

from ldm_scaling.config import Diffusion
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, zoo


def tokens(spec: backbone.Spec, whose: str, length: int) -> None:
    """Raises `UserError` for more text tokens than the network has places for."""
    most = backbone.most_tokens(spec)
    if most is not None and length > most:
        raise UserError(
            f"config: data.text_length={length}: {whose} has places for {most} text tokens: lower "
            f"it to {most}"
        )


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

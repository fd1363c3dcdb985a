"""The networks that draw a study's pictures: those that it trains, see `published` for others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ldm_scaling import files
from ldm_scaling.config import DreamBooth, FineTune, Study
from ldm_scaling.models import autoencoder, backbone, zoo
from ldm_scaling.models.tiny_decoder import TinyDecoderSpec
from ldm_scaling.parallel import placing, rules
from ldm_scaling.study import encoders, runs
from ldm_scaling.study.encoders import LatentEncoder
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.training import averages, checkpoint, step

if TYPE_CHECKING:
    from ldm_scaling.study.materials import Materials


@dataclasses.dataclass(frozen=True, eq=False)
class Networks:
    """The networks of a study. What is a function loads weights, when called.

    Attributes:
      spec: name of a member, or of another of the zoo -> the network.
      tokens: of a caption's states, which networks are given.
      params: member -> its parameters.
      autoencoder: -> what makes latents of pictures. Raises `UserError` where it is not trained, or
        nothing is trained in its latents here.
      decoder_spec: the autoencoder, or another network that makes pictures of latents.
      decoder: -> its parameters.
      latent_scale: -> what latents were multiplied by.
      states: captions -> text states (P, L, D), float32.
      lengths: captions -> tokens of each, which may be more than `tokens`.
      states_dtype: in which text states are kept.
      text_hash: -> hash of what makes text states; None where that is the study's own encoder.
      require: members -> raises `UserError` naming the first that is not trained.
      summary: what they are, in a sentence under a report's heading; None for the report's own.
      about: what a report says of them further.
    """

    spec: Callable[[str], backbone.Spec]
    tokens: int
    params: Callable[[str], Any]
    autoencoder: Callable[[], LatentEncoder]
    decoder_spec: autoencoder.AutoencoderSpec | TinyDecoderSpec
    decoder: Callable[[], Any]
    latent_scale: Callable[[], float]
    states: Callable[[Sequence[str]], np.ndarray]
    lengths: Callable[[Sequence[str]], list[int]]
    states_dtype: type
    text_hash: Callable[[], str] | None
    require: Callable[[Iterable[str]], None]
    summary: str | None
    about: Sequence[str]


_OWN = "an autoencoder trained in this study"


def model_hash(study: Study, member: str) -> str:
    """Hash of all that decides a member's parameters, and of its network; of any of its runs, see
    `config.Study.trained`."""
    # The sizes of published networks are among their files.
    spec = None if study.weights else zoo.get(study.run_of(member)[0]).spec
    recipe = () if spec is None else backbone.recipe(spec)
    length = study.average_of(member)
    average = () if length is None else (["average", length],)
    return files.sha256_of([study.training_hash(member), spec, *recipe, *average])


def _averaged(study: Study) -> list[str]:
    """What a report says of the averages that members are drawn with."""
    lengths = {member: study.average_of(member) for member in study.members}
    if not any(lengths.values()):
        return []
    told = [f"{member} {'as training left it' if n is None else f'{n:g}'}"
            for member, n in lengths.items()]
    return ["Parameters are averaged over training after it (post-hoc EMA), over a relative "
            f"standard deviation of its length: {', '.join(told)}."]


def tuned_hash(study: Study, member: str, config: FineTune | DreamBooth) -> str:
    """Hash of all that decides the parameters of a member that was trained further."""
    return files.sha256_of([model_hash(study, member), config.hash])


def grown(materials: Materials, member: str, channels: int) -> Any:
    """A member's parameters for a network that sees so many channels more, see
    `backbone.grow_input`."""
    spec = materials.spec(member)
    grow = jax.jit(lambda params: backbone.grow_input(spec, params, channels))
    return grow(materials.member_params(member))


def trained(materials: Materials) -> Networks:
    """The networks that a study trains, read from its workdir."""
    study, workdir = materials.study, materials.workdir
    given = study.autoencoder.weights
    published = encoders.latent_encoder_from(given, study.autoencoder.train.compute_dtype) \
        if given else None
    spec = published.spec if given else autoencoder_task.spec_of(study.autoencoder)

    def require(members: Iterable[str]) -> None:
        if not given:
            runs.require(workdir / "autoencoder", study.autoencoder.train, "the autoencoder")
        for member in members:
            folder = workdir.member(member)
            runs.require(folder, study.train, f"member {member}")
            if (length := study.average_of(member)) is not None:
                averages.recipe(folder, study.train.steps, length)  # Raises where it cannot be.

    def spec_of(member: str) -> backbone.Spec:
        return zoo.get(study.run_of(member)[0]).spec

    def params(member: str) -> Any:
        folder, run = workdir.member(member), study.train
        runs.require(folder, run, f"member {member}")
        return runs.average(
            spec_of(member), folder, run, materials.mesh, run.steps, study.average_of(member)
        )

    @functools.cache
    def decoder() -> Any:
        if given:
            return placing.put(
                published.params, rules.shardings(published.params, materials.mesh)
            )
        run, folder = study.autoencoder.train, workdir / "autoencoder"
        runs.require(folder, run, "the autoencoder")
        abstract = step.abstract_state(autoencoder.initializer(spec), run, materials.mesh)
        return checkpoint.average(folder / "checkpoints", run.steps, abstract)

    @functools.cache
    def latent_encoder() -> LatentEncoder:
        return published if given else encoders.latent_encoder(
            spec, decoder(), compute_dtype=study.autoencoder.train.compute_dtype
        )

    def latent_scale() -> float:
        if given and published.scale:
            return published.scale
        return materials.latent_scale

    return Networks(
        spec=spec_of,
        tokens=study.data.text_length,
        params=params,
        autoencoder=latent_encoder,
        decoder_spec=spec,
        decoder=decoder,
        latent_scale=latent_scale,
        states=lambda texts: materials.text_states.states(list(texts)),
        lengths=lambda texts: materials.text_states.lengths(texts),
        states_dtype=np.float16,
        text_hash=None,
        require=require,
        summary=None,
        about=(
            "The networks are asked for things that they have never seen, by words that they may "
            "have.",
            f"The pictures pass through {'a published autoencoder' if given else _OWN} (latents "
            f"of 1/{spec.downsampling} of their side, {spec.latent_channels} channels); captions "
            f"through a frozen {'text encoder' if study.data.text_weights else 'MiniLM'}.",
            *_averaged(study),
        ),
    )

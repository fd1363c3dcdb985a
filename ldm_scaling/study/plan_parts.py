"""The programs that a job runs, built from its config alone, for devices that need not be here."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Distill, DreamBooth, Study, Train
from ldm_scaling.config.distill import Stage
from ldm_scaling.data.conditions import table
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, backbone, text_encoder, zoo
from ldm_scaling.parallel import aot, rules
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import caching, encoders
from ldm_scaling.study.encoders import LatentEncoder
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import conditioned, drawing, text_to_image
from ldm_scaling.tasks.distillation import student
from ldm_scaling.training import step as step_lib

KINDS = ("train", "sample", "encode", "decode", "text")
# Of a config that distils, or `distill:STAGE`, and of one that fine-tunes; their runs stand in the
# place of `train`, see `run_of`.
DISTILL, FINETUNE = "distill", "finetune"
# Pictures and captions that the caches are made with at a time, see `caching`.
_PICTURES, _CAPTIONS = 64, 256


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A program of a job.

    Attributes:
      kind: one of `KINDS`, `DISTILL` or `FINETUNE`.
      program: what `jax.jit` returned.
      args: its arguments as shapes with shardings.
      mesh: what one call runs on.
      examples: that one call works off: examples of a step, rows of samples, pictures, captions.
      copies: processes that run it side by side, each on devices and examples of its own.
      held: bytes on each device, by what they are, of the arguments.
    """

    kind: str
    program: Any
    args: tuple[Any, ...]
    mesh: jax.sharding.Mesh
    examples: int
    copies: int
    held: dict[str, int]


def build(study: Study, member: str, devices: list[jax.Device], kind: str) -> Part:
    """A part of a job.

    Args:
      study: the config.
      member: the network that is trained or drawn with.
      devices: of all processes.
      kind: one of `KINDS`, `DISTILL` or `FINETUNE`.

    Raises:
      UserError: for a config that does not fit its own networks or the devices.
    """
    if study.weights:
        raise UserError(
            f"weights={study.weights!r} is a published network, which is not trained here: plan is "
            "for networks that are"
        )
    makers: dict[str, Callable] = {
        "train": _train, "sample": _sample, "encode": _encode, "decode": _decode, "text": _text,
        FINETUNE: _finetune,
    }
    if kind.partition(":")[0] == DISTILL:
        return _distill(study, member, devices, kind)
    return makers[kind](study, member, devices)


def mesh_of(study: Study, devices: list[jax.Device]) -> jax.sharding.Mesh:
    """The mesh that networks are trained on."""
    mesh = study.mesh
    return mesh_lib.make(mesh.data, mesh.fsdp, mesh.tensor, mesh.slices, devices)


def own_mesh(study: Study, devices: list[jax.Device]) -> tuple[jax.sharding.Mesh, int]:
    """The mesh that frozen encoders and sweeps run on, one process's own devices, and how many
    processes there are: as `materials.Materials.own`."""
    processes = {d.process_index for d in devices}
    if len(processes) == 1:
        return mesh_of(study, devices), 1
    own = aot.one_host(devices)
    return mesh_lib.own(study.mesh.fsdp, own), len(processes)


def spec_of(study: Study, member: str) -> backbone.Spec:
    """A member's network. Raises `UserError` when it does not take the autoencoder's latents."""
    spec, latents = zoo.get(member).spec, latent_shape(study)
    if spec.latent_shape != latents:
        raise UserError(
            f"member {member} takes latents of {spec.latent_shape}, but data.side="
            f"{study.data.side} and this autoencoder make {latents}"
        )
    return spec


def latent_shape(study: Study) -> tuple[int, int, int]:
    """(H, W, C) of the latents."""
    spec = autoencoder_of(study)
    if study.data.side % spec.downsampling:
        raise UserError(
            f"config: data.side={study.data.side} is not a multiple of the autoencoder's "
            f"downsampling {spec.downsampling}"
        )
    side = study.data.side // spec.downsampling
    return (side, side, spec.latent_channels)


def autoencoder_of(study: Study) -> autoencoder.AutoencoderSpec:
    """The autoencoder, its own or the published one's."""
    given = study.autoencoder.weights
    return _published(given) if given else autoencoder_task.spec_of(study.autoencoder)


@functools.cache
def _published(path: str) -> autoencoder.AutoencoderSpec:
    return encoders.latent_encoder_from(path).spec


def context_shape(study: Study, spec: backbone.Spec) -> tuple[int, int]:
    """(L, D) of the text states; of an encoder of one's own (`data.text_weights`), which is not
    read here, as wide as the network takes."""
    own = bool(study.data.text_weights)
    width = spec.context_dim if own else text_encoder.BertSpec().width
    return (study.data.text_length, width)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _placed(tree: Any, shardings: Any) -> Any:
    def one(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: one(leaf, shardings), tree)
    return jax.tree.map(one, tree, shardings)


# --- the network ------------------------------------------------------------------------------


def _train(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """One optimiser step, see `training.step` and `tasks.text_to_image`."""
    train, mesh = study.train, mesh_of(study, devices)
    spec = spec_of(study, member)
    mesh_lib.check_batch(mesh, train.batch_size, "train.batch_size")
    denoise = drawing.denoiser(
        spec, mesh, train.compute_dtype, train.remat, train.attention
    )
    context = context_shape(study, spec)
    loss = text_to_image.loss_fn(
        denoise, spec, train, study.diffusion, 1.0, np.zeros(context, np.float32)
    )
    state = step_lib.abstract_state(backbone.initializer(spec), train, mesh)
    batch = text_to_image.batch_shapes(
        train.batch_size, spec.latent_shape, context, study.data.latent_dtype, mesh,
        study.data.text_dtype,
    )
    return Part(
        "train", step_lib.make(loss, train, mesh, state, project=backbone.project(spec)),
        (state, batch, _key()), mesh, train.batch_size, 1,
        {
            "parameters": local_bytes(state.params), "optimiser": local_bytes(state.opt_state),
            "average": local_bytes(state.ema), "batch": local_bytes(batch),
            **({"other averages": local_bytes((state.averages, state.rests))}
               if train.averages else {}),
        },
    )


def stage_of(study: Study, kind: str = DISTILL) -> tuple[Distill, Stage]:
    """What is planned of a config that distils: the stage that `distill:NAME` names; without a name
    the last one of its first distillation.

    Raises:
      UserError: for a config that distils nothing, or a stage that there is not.
    """
    if not study.distillations:
        raise UserError(
            "--kind=distill: the config distils nothing: give one of configs/distill_*.py, or "
            "--config.consistency.method=codi"
        )
    name = kind.partition(":")[2]
    several = [(d, s) for d in study.distillations for s in d.stages(study.diffusion.prediction)]
    if not name:
        return next(pair for pair in reversed(several) if pair[0] is study.distillations[0])
    for pair in several:
        if pair[1].name == name:
            return pair
    names = ", ".join(stage.name for _, stage in several)
    raise UserError(f"--stage={name}: the config has no such stage, but {names}")


def run_of(study: Study, kind: str) -> tuple[str, Train]:
    """The run that a kind is planned of, and its key. Of a distillation's stage and of fine-tuning
    it stands in the place of `train`, so that remedies and times are found as for that.

    Raises:
      UserError: as `stage_of`; for a config that fine-tunes nothing.
    """
    if kind.partition(":")[0] == DISTILL:
        distill, stage = stage_of(study, kind)
        return f"{distill.NAME}.{stage.run}", stage.train
    if kind != FINETUNE:
        return "train", study.train
    if not study.finetune.task:
        raise UserError(
            "--kind=finetune: the config fine-tunes nothing: give one as "
            "configs/super_resolution.py, or --config.finetune.task=super_resolution"
        )
    return "finetune.train", study.finetune.train


def before(study: Study, kind: str) -> list[str]:
    """What a plan of members is not of, where the config goes on from them, in words."""
    if kind not in ("train", "sample"):
        return []
    out = []
    if study.finetune.task:
        out.append(f"fine-tuning for {study.finetune.task}, planned by --kind=finetune")
    if study.distillations:
        out.append("distillation, planned by --kind=distill")
    if study.dreambooth != DreamBooth():
        out.append("DreamBooth, which is not planned (docs/dreambooth.md)")
    return out


def distilled_specs(
    study: Study, member: str, kind: str
) -> tuple[backbone.Spec, backbone.Spec]:
    """A student's network, and its teacher's."""
    distill, stage = stage_of(study, kind)
    own = spec_of(study, member)
    told = dataclasses.replace(own, guidance_dim=distill.guidance_dim) if stage.told else own
    return told, told if stage.kind == "halving" else own


def _distill(study: Study, member: str, devices: list[jax.Device], kind: str) -> Part:
    """One step of a distillation's stage, see `tasks.distillation`; the stage's run is `train`."""
    train, mesh = study.train, mesh_of(study, devices)
    distill, stage = stage_of(study, kind)
    stage = dataclasses.replace(stage, train=train)
    spec, teacher_spec = distilled_specs(study, member, kind)
    mesh_lib.check_batch(mesh, train.batch_size, f"{distill.NAME}.train.batch_size")
    context = context_shape(study, spec)
    examples, uncond = student.examples_fn(stage, spec, 1.0, np.zeros(context, np.float32))
    first = stage.trained == train.steps
    loss = student.loss_fn(
        stage, distill, study.diffusion, *student.networks(stage, spec, teacher_spec, mesh),
        study.diffusion.prediction if first else student.prediction_of(distill, study.diffusion),
        examples, uncond,
    )
    state = step_lib.abstract_state(backbone.initializer(spec), train, mesh)
    batch = text_to_image.batch_shapes(
        train.batch_size, spec.latent_shape, context, study.data.latent_dtype, mesh,
        study.data.text_dtype,
    )
    teacher: Any = ()
    if student.has_teacher(stage, distill):
        teacher = backbone.param_shapes(teacher_spec)
        teacher = _placed(teacher, rules.shardings(teacher, mesh))
    return Part(
        kind,
        step_lib.make(loss, train, mesh, state, teacher, project=backbone.project(spec)),
        (state, batch, _key(), teacher), mesh, train.batch_size, 1,
        {
            "parameters": local_bytes(state.params), "optimiser": local_bytes(state.opt_state),
            "average": local_bytes(state.ema), "teacher": local_bytes(teacher),
            "batch": local_bytes(batch),
        },
    )


def _finetune(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """One step of fine-tuning, see `tasks.conditioned`, whose run is `train`: the encoder runs in
    it, over pictures and over what is given of them."""
    train, mesh, side = study.train, mesh_of(study, devices), study.data.side
    condition = table.named(study.finetune.task)
    condition.check((side, side))
    own = spec_of(study, member)
    spec = own.grown(own.latent_shape[2] + condition.masked)
    mesh_lib.check_batch(mesh, train.batch_size, "finetune.train.batch_size")
    denoise = drawing.denoiser(spec, mesh, train.compute_dtype, train.remat, train.attention)
    encoder, frozen = _encoder(study, mesh)
    loss = conditioned.loss_fn(
        denoise, spec, study.finetune, study.diffusion, encoder.encode, 1.0,
        np.zeros(context_shape(study, spec), np.float32),
    )
    state = step_lib.abstract_state(backbone.initializer(spec), train, mesh)
    small = side // condition.scale
    shapes = {"image": (side, side, 3), "condition": (small, small, 3)}
    shapes |= {"condition_mask": (side, side, 1)} if condition.masked else {}
    batch = _placed(
        {name: jax.ShapeDtypeStruct((train.batch_size, *shape), jnp.uint8)
         for name, shape in shapes.items()},
        mesh_lib.batch_sharding(mesh),
    )
    return Part(
        FINETUNE, step_lib.make(loss, train, mesh, state, frozen, project=backbone.project(spec)),
        (state, batch, _key(), frozen), mesh, train.batch_size, 1,
        {
            "parameters": local_bytes(state.params), "optimiser": local_bytes(state.opt_state),
            "average": local_bytes(state.ema), "encoder": local_bytes(frozen),
            "batch": local_bytes(batch),
        },
    )


def _sample(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """One guided row of all lanes, see `sampling.lanes`; how many rows run is its argument."""
    mesh, copies = own_mesh(study, devices)
    spec, size = spec_of(study, member), study.sweep.batch_size
    mesh_lib.check_batch(mesh, size, "sweep.batch_size of each process")
    train = study.train
    lanes = drawing.lanes(
        spec, spec.latent_shape, size, mesh, train.compute_dtype, train.attention
    )
    context = jax.ShapeDtypeStruct(
        (1, *context_shape(study, spec)), jnp.dtype(study.data.text_dtype))
    program, rest = lanes.abstract({"context": context}, guided=True)
    params = backbone.param_shapes(spec)
    params = _placed(params, rules.shardings(params, mesh))
    return Part(
        "sample", program, (params, *rest), mesh, size, copies,
        {"parameters": local_bytes(params), "lanes": local_bytes(rest[0]),
         "prompts": local_bytes(rest[1])},
    )


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


# --- the frozen encoders ----------------------------------------------------------------------


def _autoencoder_params(study: Study) -> Any:
    spec = autoencoder_of(study)
    return jax.eval_shape(lambda: autoencoder.init(spec, jax.random.key(0)))


def _encoder(study: Study, mesh: jax.sharding.Mesh) -> tuple[LatentEncoder, Any]:
    """What makes latents of pictures, and its half of the parameters, whole on each device."""
    dtype = encoders.latent_dtype(study.autoencoder.train.compute_dtype)
    params = {"encoder": _autoencoder_params(study)["encoder"]}
    return (
        LatentEncoder(autoencoder_of(study), None, None, dtype, ""),
        _placed(params, mesh_lib.replicated(mesh)),
    )


def _encode(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """Pictures to latents, see `caching.cache_latents`."""
    mesh, copies = own_mesh(study, devices)
    encoder, params = _encoder(study, mesh)
    size, side = mesh_lib.rounded(_PICTURES, mesh), study.data.side
    images = jax.ShapeDtypeStruct(
        (size, side, side, 3), jnp.uint8, sharding=mesh_lib.batch_sharding(mesh)
    )
    return Part(
        "encode", caching.jitted(encoder), (params, images), mesh, size, copies,
        {"parameters": local_bytes(params), "pictures": local_bytes(images)},
    )


def _decode(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """Latents to pictures, see `drawing.Drawer.decode`."""
    mesh, copies = own_mesh(study, devices)
    params = _autoencoder_params(study)
    params = _placed(params, rules.shardings(params, mesh))
    size = study.sweep.batch_size
    mesh_lib.check_batch(mesh, size, "sweep.batch_size of each process")
    latents = jax.ShapeDtypeStruct(
        (size, *latent_shape(study)), jnp.float32, sharding=mesh_lib.batch_sharding(mesh)
    )
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=mesh_lib.replicated(mesh))
    return Part(
        "decode", drawing.decoder_program(autoencoder_of(study)), (params, latents, scale), mesh,
        size, copies,
        {"parameters": local_bytes(params["decoder"]), "latents": local_bytes(latents)},
    )


def _text(study: Study, member: str, devices: list[jax.Device]) -> Part:
    """Captions to text states, see `caching.cache_text`."""
    if study.data.text_weights:
        raise UserError(
            f"data.text_weights={study.data.text_weights!r} is not read by plan: only MiniLM's "
            "program is planned"
        )
    mesh, copies = own_mesh(study, devices)
    spec = text_encoder.BertSpec()
    params = _placed(text_encoder.param_shapes(spec), mesh_lib.replicated(mesh))
    size = mesh_lib.rounded(_CAPTIONS, mesh)

    def tokens(dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = mesh_lib.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((size, study.data.text_length), dtype, sharding=sharding)

    ids = tokens(jnp.int32)
    return Part(
        "text", text_encoder.encode_fn(spec), (params, ids, tokens(jnp.bool_)), mesh, size, copies,
        {"parameters": local_bytes(params), "tokens": local_bytes(ids)},
    )

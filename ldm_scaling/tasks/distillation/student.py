"""The run of one student, from the teacher's parameters, on what text-to-image networks train on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_scaling.config import Diffusion, Distill, Sample
from ldm_scaling.config.check import require
from ldm_scaling.config.distill import Stage
from ldm_scaling.diffusion import reparameterized
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, cost
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing
from ldm_scaling.sampling import grid as grids
from ldm_scaling.sampling.grid import Grid
from ldm_scaling.sampling.guidance import Denoise
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.distillation import (
    common,
    conditional_consistency,
    guided,
    latent_consistency,
    progressive,
)
from ldm_scaling.tasks.drawing import Drawer, Frozen, denoiser, pad_context
from ldm_scaling.training.task import Beside, Task


def prediction_of(distill: Distill, diffusion: Diffusion) -> str:
    """What students predict."""
    return distill.prediction or diffusion.prediction


def grid_of(distill: Distill, diffusion: Diffusion, steps: int) -> Grid:
    """The nodes of a student of so many steps and, between them, of its teacher: those of DDIM.

    Raises:
      UserError: for a spacing with which every second node of 2 N steps is none of N, and for steps
        of which there are no 2 N.
    """
    schedule, spacing = schedule_lib.get(diffusion.schedule), distill.sweep.spacing
    T = schedule.num_timesteps
    require(2 * steps <= T, f"{distill.NAME}.steps", distill.steps, "a student's teacher takes "
            f"twice its steps, on {T} timesteps: the first is at most {T // 2}")
    try:
        whole, half = (grids.build(spacing, schedule, n) for n in (2 * steps, steps))
    except UserError as e:
        raise UserError(f"config: {distill.NAME}.sweep.spacing={spacing!r}: {e}") from e
    if not np.array_equal(whole.timesteps[::2], half.timesteps):
        raise UserError(
            f"config: {distill.NAME}.sweep.spacing={spacing!r}: every second of {2 * steps} nodes "
            f"is none of {steps}, so that one step cannot do two: use trailing"
        )
    return whole


def loss_fn(
    stage: Stage, distill: Distill, diffusion: Diffusion, student: Denoise, teacher: Denoise,
    teacher_predicts: str, examples: common.Examples, uncond: Any,
) -> common.Loss:
    """The loss of a stage.

    Args:
      stage, distill, diffusion: the config's; `diffusion` is the pretrained members'.
      student, teacher: networks as they are.
      teacher_predicts: what the teacher's network outputs.
      examples: see `common.Examples`.
      uncond: the empty condition, leading axis 1.
    Raises:
      UserError: for settings that the method does not take.
    """
    schedule, predicts = schedule_lib.get(diffusion.schedule), prediction_of(distill, diffusion)
    teacher = reparameterized.reparameterized(teacher, schedule, teacher_predicts, predicts)
    rates = tuple(distill.rates) if stage.told else None
    if stage.kind == "imitation":
        return guided.loss_fn(
            student, teacher, schedule, predicts, examples, uncond, rates=rates
        )
    if stage.kind == "halving":
        grid = grid_of(distill, diffusion, stage.steps)
        return progressive.loss_fn(student, teacher, grid, predicts, examples, rates=rates)
    if stage.kind == "lcm":
        return latent_consistency.loss_fn(
            student, teacher, schedule, predicts, examples, uncond, rates=rates,
            skip=distill.skip, huber=distill.huber,
        )
    T = schedule.num_timesteps
    require(distill.skip < T, f"{distill.NAME}.skip", distill.skip,
            f"give 1 to {T - 1} timesteps, such as {T // 50}")
    return conditional_consistency.loss_fn(
        student, schedule, predicts, examples,
        teacher=teacher if distill.teacher_step else None, skip=distill.skip,
        match=distill.match, data_weight=distill.data_weight, one_timestep=distill.one_timestep,
    )


def has_teacher(stage: Stage, distill: Distill) -> bool:
    """Whether the loss calls another network than the student."""
    return stage.kind != "codi" or distill.teacher_step


def networks(
    stage: Stage, spec: backbone.Spec, teacher_spec: backbone.Spec, mesh: jax.sharding.Mesh
) -> tuple[Denoise, Denoise]:
    """Student and teacher on a mesh, as the run computes."""
    run = stage.train
    return (
        denoiser(spec, mesh, run.compute_dtype, run.remat, run.attention),
        denoiser(teacher_spec, mesh, run.compute_dtype, attention=run.attention),
    )


def _filled(denoise: Denoise, shards: int) -> Denoise:
    """A network on batches of any size: one that does not split is filled up, and the result cut,
    so that its devices share it all the same."""

    def run(params: Any, x_BHWC: jax.Array, t_B: jax.Array, cond: Any) -> jax.Array:
        batch = x_BHWC.shape[0]
        rows = np.arange(-(-batch // shards) * shards) % batch
        if len(rows) == batch:
            return denoise(params, x_BHWC, t_B, cond)
        x_BHWC, t_B, cond = jax.tree.map(
            lambda leaf: jnp.take(leaf, rows, axis=0), (x_BHWC, t_B, cond)
        )
        return denoise(params, x_BHWC, t_B, cond)[:batch]

    return run


def examples_fn(
    stage: Stage, spec: backbone.Spec, latent_scale: float, null_ctx_LD: np.ndarray
) -> tuple[common.Examples, Any]:
    """(examples, uncond): see `loss_fn`; arguments as `text_to_image.examples_fn`."""
    drawn = text_to_image.examples_fn(spec, stage.train, latent_scale, null_ctx_LD)
    null_LD = pad_context(null_ctx_LD.astype(np.float32), spec.context_dim)
    return lambda batch, key: drawn(batch, *jax.random.split(key)), {"context": null_LD[None]}


def flops_per_example(
    stage: Stage, distill: Distill, spec: backbone.Spec, teacher_spec: backbone.Spec, tokens: int
) -> float:
    """FLOPs of training on captions of so many tokens: of the student forward and backward (three
    times a call's), of its average, and of the teacher."""
    calls = {"imitation": (0, 2 if stage.told else 1), "halving": (0, 2), "lcm": (1, 2),
             "codi": (1, 1) if has_teacher(stage, distill) else (2, 0)}
    average, teacher = calls[stage.kind]
    own, its = cost.gflops(spec, tokens), cost.gflops(teacher_spec, tokens)
    return 1e9 * ((3 + average) * own + teacher * its)


def make(
    name: str, stage: Stage, distill: Distill, diffusion: Diffusion, spec: backbone.Spec,
    teacher_spec: backbone.Spec, teacher_predicts: str, teacher: Callable[[], Any],
    frozen: Frozen, drawer: Drawer, sample: Sample, validation: dict[str, np.ndarray],
) -> Task:
    """The task of one student.

    Args:
      name: in logs and progress bars.
      stage, distill, diffusion: see `loss_fn`.
      spec, teacher_spec: their networks.
      teacher_predicts: what the teacher's network outputs.
      teacher: gives its parameters on the run's mesh; the student starts from them too. Not called
        by a run that goes on without a teacher.
      frozen: autoencoder, latent scale, empty caption.
      drawer, sample: draw the student's pictures along the way.
      validation: `mean`, `logvar` (N, H, W, C), `context` (N, L, D), `index` (N,) of a fixed set.
    """
    own, its = networks(stage, spec, teacher_spec, drawer.mesh)
    examples, uncond = examples_fn(stage, spec, frozen.latent_scale, frozen.null_ctx_LD)

    def loss_of(*networks: Denoise) -> common.Loss:
        return loss_fn(stage, distill, diffusion, *networks, teacher_predicts, examples, uncond)

    shards, count = mesh_lib.shards(drawer.mesh), len(validation["index"])
    loss, exact = loss_of(own, its), loss_of(_filled(own, shards), _filled(its, shards))
    # Over any number of devices: those that fill up the last row are left out again below.
    rows = np.arange(mesh_lib.rounded(count, drawer.mesh)) % count
    held_out = placing.put_batch(
        drawer.mesh, {n: a[rows] for n, a in validation.items() if n != "index"}
    )
    beside = teacher() if has_teacher(stage, distill) else ()

    @jax.jit
    def validation_loss(params: Any, batch: Any, frozen: Any) -> Any:
        batch = jax.tree.map(lambda leaf: leaf[:count], batch)
        # The average stands for itself in the target too.
        return exact(params, batch, jax.random.key(0), Beside(frozen, params))[0]

    def validate(params: Any, step: int) -> dict[str, float]:
        return {"loss": float(validation_loss(params, held_out, beside))}

    def start() -> Any:
        params = beside if has_teacher(stage, distill) else teacher()
        if spec.guidance_dim and not teacher_spec.guidance_dim:
            return jax.jit(
                lambda params: backbone.grow_guidance(teacher_spec, params, spec.guidance_dim)
            )(params)
        # Copies: the run gives its own away from step to step.
        return jax.tree.map(lambda leaf: leaf.copy(), params)

    return Task(
        name, backbone.initializer(spec), text_to_image.make_batch, loss, validate,
        text_to_image.show_fn(drawer, sample, validation),
        lambda: flops_per_example(
            stage, distill, spec, teacher_spec, len(frozen.null_ctx_LD)), start, beside,
        common.diverges, backbone.rates(spec), backbone.project(spec), ("loss",),
    )

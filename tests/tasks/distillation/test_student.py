"""A student's run: its loss by stage, its start, and a teacher that stays what and where it is."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Consistency, Diffusion, Halving, Sample, Sweep, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import placing, rules
from ldm_scaling.tasks import text_to_image
from ldm_scaling.tasks.distillation import common, student
from ldm_scaling.training import loop, step
from tests.training import toy

SPEC = unet.UNetSpec(
    4, 16, (1,), (False,), 1, heads=2, groups=2, sample_size=4, context_length=3,
)
RUN = Train(
    steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=0, compute_dtype="float32",
    ema_decay=0.5, checkpoint_every=4, validate_every=0, sample_every=0, log_every=1,
)
NULL_LD = np.zeros((3, 16), np.float32)
DIFFUSION = Diffusion(prediction="v")


def distil(method, **more):
    if method in ("codi", "lcm"):
        return Consistency(
            method=method, train=RUN, imitation=RUN, guidance_dim=8,
            sample=Sample(sampler=method), sweep=Sweep(samplers=(method,)), **more,
        )
    return Halving(
        method=method, train=RUN, imitation=RUN, guidance_dim=8, steps=(2, 1), **more,
        sample=Sample(guidance=3.0),
    )


def specs(stage, before):
    told = dataclasses.replace(SPEC, guidance_dim=8)
    return told if stage.told else SPEC, told if before is not None and before.told else SPEC


def loss_of(distill, stage, mesh, diffusion=DIFFUSION, before=None):
    spec, teacher_spec = specs(stage, before)
    examples, uncond = student.examples_fn(stage, spec, 1.0, NULL_LD)
    predicts = diffusion.prediction if before is None else student.prediction_of(distill, diffusion)
    return student.loss_fn(
        stage, distill, diffusion, *student.networks(stage, spec, teacher_spec, mesh), predicts,
        examples, uncond,
    )


def batch(mesh, size=8):
    rng = np.random.default_rng(0)
    mean = rng.standard_normal((size, 4, 4, 4)).astype(np.float32)
    context = rng.standard_normal((size, 3, 16)).astype(np.float16)
    return placing.put_batch(
        mesh, {"mean": mean, "logvar": np.full_like(mean, -30.0), "context": context}
    )


def teacher_on(mesh, spec=SPEC, seed=1):
    # Of no zeros: what an initialisation leaves at zero would hide a mistake.
    shapes = unet.param_shapes(spec)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    params = tree.unflatten([
        0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ])
    return placing.put(params, rules.shardings(params, mesh))


def test_the_validation_loss_is_of_all_pictures_on_any_number_of_devices():
    """11 pictures: of 8 devices they fill one row, and three places of the next."""
    distill = distil("lcm")
    (stage,) = distill.stages("v")
    held = jax.device_get(batch(mesh_lib.make(devices=jax.devices()[:1]), 11))

    def validated(devices):
        mesh = mesh_lib.make(devices=jax.devices()[:devices])
        spec, teacher_spec = specs(stage, None)
        task = student.make(
            "", stage, distill, DIFFUSION, spec, teacher_spec, "v",
            lambda: teacher_on(mesh, teacher_spec),
            types.SimpleNamespace(latent_scale=1.0, null_ctx_LD=NULL_LD),
            types.SimpleNamespace(mesh=mesh, table=lambda *args: None), Sample(),
            held | {"index": np.arange(11)},
        )
        return task.validate(teacher_on(mesh, spec, seed=2), 0)["loss"]

    assert validated(8) == pytest.approx(validated(1), rel=1e-4)


@pytest.mark.parametrize("method, place, calls", [
    ("codi", 0, (5, 0)), ("lcm", 0, (4, 2)), ("guided", 0, (3, 2)), ("guided", 1, (3, 2)),
    ("progressive", 0, (3, 2)),
])
def test_operations_are_counted_as_the_loss_calls_its_networks(method, place, calls):
    """Forward and backward are three calls of the student; networks are counted where traced."""
    distill = distil(method)
    stages = distill.stages("v")
    stage, before = stages[place], stages[place - 1] if place else None
    spec, teacher_spec = specs(stage, before)
    count = {"student": 0, "teacher": 0}

    def counted(name):
        def denoise(params, x_BHWC, t_B, cond):
            # Examples, in calls of the batch's size: a guided pair is twice as large.
            count[name] += x_BHWC.shape[0] // 8
            assert ("guidance" in cond) == bool((spec if name == "student" else teacher_spec)
                                                .guidance_dim)
            return params["a"] * x_BHWC
        return denoise

    examples, uncond = student.examples_fn(stage, spec, 1.0, NULL_LD)
    loss = student.loss_fn(
        stage, distill, DIFFUSION, counted("student"), counted("teacher"), "v", examples, uncond
    )
    params = {"a": jnp.ones(())}
    mesh = toy.one_device()
    loss(params, batch(mesh), jax.random.key(0), common.Beside(params, params))
    assert (count["student"] + 2, count["teacher"]) == calls
    flops = student.flops_per_example(stage, distill, spec, spec, 3)
    assert flops == pytest.approx(1e9 * sum(calls) * student.cost.of(spec).gflops)


def test_the_teacher_stays_what_and_where_it_is():
    """The state is given away from step to step; the teacher is in the program once, split over the
    devices as the student is, and has no gradient: it ends as it began."""
    mesh = mesh_lib.make(data=1, fsdp=8)
    distill = distil("lcm")
    (stage,) = distill.stages("v")
    spec, _ = specs(stage, None)
    teacher = teacher_on(mesh)
    kept = placing.fetch(teacher)
    params = jax.jit(unet.grow_guidance, static_argnums=1)(teacher, 8)
    abstract = step.abstract_state(lambda key: unet.init(spec, key), RUN, mesh)
    state = step.init_state(
        lambda key: unet.init(spec, key), RUN, mesh, jax.random.key(0), lambda: params
    )
    run = step.make(loss_of(distill, stage, mesh), RUN, mesh, abstract, teacher)
    data, key = batch(mesh), jax.random.key(0)
    compiled = run.lower(state, data, key, teacher).compile()
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves((state, data, teacher))
    )
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(held, rel=0.02)
    for name in ("conv_in", "conv_out"):
        assert teacher[name]["kernel"].sharding == state.params[name]["kernel"].sharding
    first = placing.fetch(state.ema)
    before = state
    for _ in range(2):
        state, metrics = run(state, data, key, teacher)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(placing.fetch(teacher)), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = placing.fetch(state.ema)
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (first, moved))))
    assert {"gap", "target_rms", "error_rms", "loss", "grad_norm"} <= set(metrics)
    assert float(metrics["gap"]) > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    """Told the rate of no guidance, grown by weights of zero, it says what its teacher says; one
    that shall say it in v instead does not yet, and its teacher's words are the same."""
    mesh = toy.one_device()
    teacher = teacher_on(mesh)
    told = Halving(
        method="guided", train=RUN, imitation=RUN, guidance_dim=8, rates=(1.0, 1.0),
        sample=Sample(guidance=1.0), sweep=Sweep(
            samplers=("ddim",), guidance=(1.0,), spacing="trailing"),
    )
    stage = told.stages("v")[0]
    params = unet.grow_guidance(teacher, 8)
    value, metrics = loss_of(told, stage, mesh)(
        params, batch(mesh), jax.random.key(0), common.Beside(teacher, params)
    )
    assert float(value) == pytest.approx(0, abs=1e-10)
    changes = distil("codi", prediction="v")
    stage = changes.stages("epsilon")[0]
    assert (stage.kind, stage.told) == ("imitation", False)
    of_eps = loss_of(changes, stage, mesh, Diffusion(prediction="epsilon"))
    unlike, metrics = of_eps(
        teacher, batch(mesh), jax.random.key(0), common.Beside(teacher, teacher)
    )
    assert float(unlike) > 0.1 and np.isfinite(float(metrics["target_rms"]))
    assert changes.stages("v")[0].kind == "codi"


def test_nodes_that_do_not_halve():
    even = distil("progressive")
    grid = student.grid_of(even, DIFFUSION, 4)
    assert grid.steps == 8
    odd = dataclasses.replace(even, sweep=dataclasses.replace(even.sweep, spacing="leading"))
    with pytest.raises(UserError, match="halving.sweep.spacing='leading'.*use trailing"):
        student.grid_of(odd, DIFFUSION, 3)


def test_what_a_schedule_has_no_room_for_is_told_with_its_key():
    """A teacher of halving takes twice its student's steps, and CoDi's step ends in the data."""
    assert student.grid_of(distil("progressive"), DIFFUSION, 500).steps == 1000
    long = dataclasses.replace(distil("progressive"), steps=(1000, 500))
    with pytest.raises(UserError, match=r"halving.steps=\(1000, 500\): .* is at most 500"):
        student.grid_of(long, DIFFUSION, 1000)
    odd = dataclasses.replace(long.sweep, spacing="none")
    with pytest.raises(UserError, match="halving.sweep.spacing='none': unknown spacing"):
        student.grid_of(dataclasses.replace(long, sweep=odd), DIFFUSION, 4)
    far = distil("codi", skip=1000)
    with pytest.raises(UserError, match="consistency.skip=1000: give 1 to 999 timesteps"):
        loss_of(far, far.stages("v")[0], mesh_lib.make(devices=jax.devices()[:1]))


def test_a_run_that_is_lost_ends_early(tmp_path):
    """Before a checkpoint of it is written, in words that say what grew."""
    sizes = iter([1.0, 1.2, 40.0, 1.0])
    told = {}

    def loss(params, batch, key):
        value, _ = toy.loss(params, batch, key)
        return value, dict.fromkeys(("gap", "target_rms", "error_rms"), value / 100)

    def diverges(averages):
        told.update(averages)
        return common.diverges(averages | {"target_rms": next(sizes)})

    config = dataclasses.replace(toy.CONFIG, checkpoint_every=1)
    task = toy.task(loss, diverges=diverges)
    with pytest.raises(loop.DivergedError, match="step 3: what it learns .*40, beyond 10 .loss "
                       ".*gradient norm.*lower learning_rate.*step 2 is kept"):
        loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), 0)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()
                  if p.name.isdigit())[-1] == 2
    assert {"loss", "grad_norm", "gap"} <= set(told)


def test_averages_that_are_sound_and_those_that_are_not():
    sound = {"loss": 1.0, "grad_norm": 2.0, "gap": 0.2, "target_rms": 2.5, "error_rms": 1.0}
    assert common.diverges(sound) == ""
    for name, value in (("gap", 1.5), ("target_rms", 11.0), ("error_rms", float("nan"))):
        assert f"{value:.3g}" in common.diverges(sound | {name: value})


def test_a_batch_is_what_members_train_on():
    names = {"mean", "logvar", "context"}
    made = text_to_image.make_batch({name: np.zeros(1) for name in (*names, "index")})
    assert set(made) == names

"""The train step on every mesh is that of one device, and so is one in parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Train
from ldm_scaling.diffusion import loss as loss_lib
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.errors import UserError
from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.tasks import drawing
from ldm_scaling.training import loop, step
from tests.training import toy

SPEC = unet.UNetSpec(8, 16, (1,), (True,), 1, heads=2, groups=4, sample_size=4,
                     context_length=3)
TRAIN = Train(steps=3, batch_size=16, learning_rate=1e-3, warmup_steps=0)
STEPS = 3


def init(key):
    return unet.init(SPEC, key)


def trained(mesh, denoise=None, config=TRAIN):
    """Losses of some steps, and the state after."""
    denoise = denoise or drawing.denoiser(SPEC, mesh, "float32")
    schedule = schedule_lib.get("sd")

    def loss(params, batch, key):
        cond = {"context": batch["context"]}
        out = loss_lib.diffusion_loss(denoise, params, batch["x"], cond, key, schedule, "v")
        return jnp.mean(out), {}

    abstract = step.abstract_state(init, config, mesh)
    state = step.init_state(init, config, mesh, jax.random.key(0))
    train = step.make(loss, config, mesh, abstract)
    key = jax.device_put(jax.random.key(1), mesh_lib.replicated(mesh))
    losses = []
    for i in range(STEPS):
        rng = np.random.default_rng(i)
        batch = {
            "x": rng.normal(size=(16, 4, 4, 4)).astype(np.float32),
            "context": rng.normal(size=(16, 3, 16)).astype(np.float32),
        }
        batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
        state, metrics = train(state, batch, key)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(losses), state


@functools.cache
def alone():
    """On one device, the network with nothing around it."""
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    losses, state = trained(mesh, unet.denoise_fn(SPEC))
    return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
    "data, fsdp, tensor, ring",
    [pytest.param(8, 1, 1, 16, marks=pytest.mark.long),  # The others spread
     pytest.param(1, 8, 1, 16, marks=pytest.mark.long),  # by these too.
     (2, 4, 1, 2), (2, 2, 2, 16), (1, 1, 2, 16)],
    ids=["data", "fsdp", "data-fsdp-on-two-sides", "all-three", "tensor-alone"],
)
def test_every_mesh_trains_as_one_device(data, fsdp, tensor, ring, monkeypatch):
    monkeypatch.setattr(mesh_lib, "_RING", ring)
    mesh = mesh_lib.make(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])
    want, params = alone()
    got, state = trained(mesh)
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=1e-5)
    np.testing.assert_allclose(got[:, 1], want[:, 1], rtol=1e-4)
    kernel = state.params["mid_res_0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)
    for tree in (state.opt_state[1][0].mu, state.opt_state[1][0].nu, state.ema):
        assert tree["mid_res_0"]["conv1"]["kernel"].sharding == kernel.sharding
    # AdamW's first steps are signs: where a gradient is all rounding, so is its step.
    apart = [
        np.mean(np.abs(np.asarray(a) - b) > 1e-4)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True)
    ]
    assert np.mean(apart) < 0.01


def test_weights_are_gathered_where_they_are_used_and_nowhere_else():
    mesh = mesh_lib.make(1, 8)
    denoise = drawing.denoiser(SPEC, mesh, "bfloat16")
    abstract = step.abstract_state(init, TRAIN, mesh).params
    x, t, ctx = unet.example_inputs(SPEC, 8)

    def loss(params, x, t, ctx):
        return jnp.sum(denoise(params, x, t, {"context": ctx}))

    text = str(jax.make_jaxpr(jax.grad(loss))(abstract, x, t, ctx))
    kernels = [
        leaf for leaf in jax.tree.leaves(abstract)
        if not leaf.sharding.is_fully_replicated
    ]
    # Forward, and again backward but for what the compiler sees to be unused there.
    assert len(kernels) <= text.count("all_gather[") <= 2 * len(kernels)
    assert text.count("reduce_scatter[") == len(kernels)
    gathered = [line for line in text.splitlines() if "all_gather[" in line]
    assert all(":bf16[" in line for line in gathered)


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    mesh = mesh_lib.make(4, 2)

    def loss(params, batch, key):  # No noise: parts draw their own.
        error = batch["x"] @ params["kernel"] - 1.0
        return jnp.mean(error**2), {"mean": jnp.mean(error)}

    def init(key):
        return {"kernel": jax.random.normal(key, (4, 8))}

    batch = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)}
    batch = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    out = []
    for parts in (1, 2, 4):
        config = Train(batch_size=32, micro_batches=parts)
        abstract = step.abstract_state(init, config, mesh)
        state = step.init_state(init, config, mesh, jax.random.key(0))
        key = jax.device_put(jax.random.key(1), mesh_lib.replicated(mesh))
        state, metrics = step.make(loss, config, mesh, abstract)(state, batch, key)
        out.append((state.opt_state[1][0].mu["kernel"], metrics))
    for moment, metrics in out[1:]:
        np.testing.assert_allclose(moment, out[0][0], rtol=1e-5, atol=1e-7)
        for name in ("loss", "mean", "grad_norm"):
            np.testing.assert_allclose(metrics[name], out[0][1][name], rtol=1e-5)


def test_parts_that_do_not_split_over_the_mesh_are_refused():
    mesh = mesh_lib.make()
    config = Train(batch_size=16, micro_batches=4)
    abstract = step.abstract_state(init, config, mesh)
    with pytest.raises(UserError, match="micro_batches=4 does not split over 8 devices"):
        step.make(lambda *unused: None, config, mesh, abstract)


def test_the_first_moment_may_be_kept_in_bfloat16():
    config = Train(batch_size=16, moment_dtype="bfloat16")
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    moments = step.abstract_state(init, config, mesh).opt_state[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {np.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {np.dtype(np.float32)}


def test_what_is_frozen_is_an_argument_and_has_no_gradient():
    """loss = (p x f - average)^2 / 2 on a mesh: by hand, step by step."""
    mesh = mesh_lib.make(4, 2)
    config = Train(
        batch_size=16, learning_rate=0.1, warmup_steps=0, weight_decay=0.0, ema_decay=0.5
    )

    def init(key):
        return {"kernel": jnp.full((8, 8), 2.0)}

    def loss(params, batch, key, beside):
        error = params["kernel"] * beside.frozen["kernel"] - beside.average["kernel"]
        return 0.5 * jnp.sum(error**2) + 0 * jnp.sum(batch), {}

    abstract = step.abstract_state(init, config, mesh)
    state = step.init_state(init, config, mesh, jax.random.key(0))
    frozen = {"kernel": jax.device_put(jnp.full((8, 8), 3.0), mesh_lib.replicated(mesh))}
    train = step.make(loss, config, mesh, abstract, frozen)
    key = jax.device_put(jax.random.key(1), mesh_lib.replicated(mesh))
    batch = jax.device_put(np.zeros((16, 1), np.float32), mesh_lib.batch_sharding(mesh))
    for _ in range(2):
        p, average = state.params["kernel"], state.ema["kernel"]
        error = np.asarray(p) * 3.0 - np.asarray(average)
        state, metrics = train(state, batch, key, frozen)
        np.testing.assert_allclose(metrics["loss"], 0.5 * np.sum(error**2), rtol=1e-6)
        # Of p alone: neither the average nor what is frozen adds to it.
        np.testing.assert_allclose(
            metrics["grad_norm"], np.sqrt(np.sum((3.0 * error) ** 2)), rtol=1e-6
        )
    np.testing.assert_array_equal(frozen["kernel"], 3.0)  # It was not donated.


def test_an_accelerator_begins_as_a_cpu_does(monkeypatch):
    """There parameters are made array by array: the same state, laid out the same."""
    mesh, key = mesh_lib.make(), jax.random.key(5)
    wanted = step.init_state(toy.init, TRAIN, mesh, key)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = step.init_state(toy.init, TRAIN, mesh, key)
    assert jax.tree.map(lambda a: a.sharding, found) == jax.tree.map(lambda a: a.sharding, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_parameters_are_projected_after_each_step_and_then_averaged(tmp_path):
    """On one device and on shards; the loop hands the task's projection on."""
    def project(params):
        norm = jnp.linalg.norm(params["layer"]["kernel"], axis=0)
        return {"layer": params["layer"] | {"kernel": params["layer"]["kernel"] / norm}}

    def first(key):
        return project(toy.init(key))

    config = dataclasses.replace(toy.CONFIG, steps=2, learning_rate=0.2, warmup_steps=0,
                                 ema_ramp=False)
    task = dataclasses.replace(toy.task(project=project), init=first)
    states = [
        loop.fit(task, config, toy.Loader, tmp_path / str(mesh.size), mesh, seed=0)
        for mesh in (toy.one_device(), mesh_lib.make(1, 8))
    ]
    kernel = states[1].params["layer"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-6)
    # An average of unit vectors is shorter, by as much as they turned.
    norms = np.linalg.norm(states[1].ema["layer"]["kernel"], axis=0)
    assert norms.max() < 1 and norms.min() > 0.9
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5),
                 states[0].params, states[1].params)

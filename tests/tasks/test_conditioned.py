"""Image-conditioned fine-tuning: what networks see, where they begin, and what they learn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Diffusion, FineTune, Sweep, Train
from ldm_scaling.models import unet
from ldm_scaling.models.autoencoder import Posterior
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.tasks import conditioned
from ldm_scaling.tasks.drawing import Drawer, Frozen, denoiser
from ldm_scaling.training.task import Beside

SPEC = unet.UNetSpec(
    8, 16, (1,), (True,), 1, heads=2, groups=4, sample_size=4, context_length=3
)
SCALE, SIDE = 0.5, 16
NULL_LD = np.full((3, 16), 0.25, np.float32)


def encode(params, x_BHWC):
    """An autoencoder by hand: means of 4 x 4 pixels, and of all colours."""
    z_BHWC = x_BHWC.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4))
    z_BHWC = jnp.concatenate([z_BHWC, z_BHWC.mean(-1, keepdims=True)], -1) * params["gain"]
    return Posterior(z_BHWC, jnp.full_like(z_BHWC, -30.0))


def batch(n=8, masked=False, seed=0):
    rng = np.random.default_rng(seed)
    out = {
        "image": rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8),
        "condition": rng.integers(0, 256, (n, SIDE // 4, SIDE // 4, 3), np.uint8),
    }
    if masked:
        out["condition"] = out["image"]
        out["condition_mask"] = rng.integers(0, 2, (n, SIDE, SIDE, 1), np.uint8)
    return out


PARAMS = {"gain": jnp.ones(())}


def loss_of(spec, finetune, mesh):
    denoise = denoiser(spec, mesh, "float32")
    return conditioned.loss_fn(
        denoise, spec, finetune, Diffusion(prediction="v"), encode, SCALE, NULL_LD
    )


def test_a_grown_network_gives_what_it_gave_whatever_it_sees():
    """Exactly: the new weights are zero, and the old ones are where they were."""
    params = unet.init(SPEC, jax.random.key(0))
    grown, more = SPEC.grown(5), unet.grow_input(params, 5)
    rng = np.random.default_rng(0)
    x_BHWC, seen_BHWC = rng.normal(size=(2, 4, 4, 4)), 100 * rng.normal(size=(2, 4, 4, 5))
    t_B, ctx_BLD = jnp.array([10.0, 900.0]), rng.normal(size=(2, 3, 16))
    before = unet.denoise_fn(SPEC)(params, jnp.array(x_BHWC), t_B, {"context": ctx_BLD})
    after = unet.denoise_fn(grown)(
        more, jnp.array(x_BHWC), t_B, {"context": ctx_BLD, "condition": jnp.array(seen_BHWC)}
    )
    np.testing.assert_allclose(after, before, rtol=0, atol=5e-6)
    assert jax.tree.map(jnp.shape, more) == jax.tree.map(
        lambda s: s.shape, unet.param_shapes(grown)
    )
    assert grown.latent_shape == SPEC.latent_shape


def test_what_is_seen():
    """A small condition is enlarged to the picture's size, as Pillow does; a mask comes first, at
    the pixels that Stable Diffusion's inpainting takes."""
    given = batch(2)
    seen = conditioned.latents_of(encode, PARAMS, SCALE, given, (SIDE, SIDE))
    from PIL import Image

    for i, small in enumerate(given["condition"]):
        planes = [
            Image.fromarray(small[..., c].astype(np.float32)).resize((SIDE, SIDE), 3)
            for c in range(3)
        ]
        x = np.clip(np.stack([np.asarray(p) for p in planes], -1), 0, 255) / 127.5 - 1
        want = SCALE * encode(PARAMS, jnp.array(x[None])).mean[0]
        np.testing.assert_allclose(seen[i], want, atol=1e-5)
    given = batch(2, masked=True)
    seen = conditioned.latents_of(encode, PARAMS, SCALE, given, (SIDE, SIDE))
    assert seen.shape == (2, 4, 4, 5)
    np.testing.assert_array_equal(seen[..., :1], given["condition_mask"][:, ::4, ::4])


def test_the_loss_before_training_is_the_text_networks_own():
    """Under the empty caption, with the same noise; and only the new weights notice what is seen.
    """
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    params = unet.init(SPEC, jax.random.key(0))
    # A fresh network gives zeros: its last layer begins so.
    params["conv_out"]["kernel"] += 0.1
    loss = loss_of(SPEC.grown(4), FineTune(task="super_resolution"), mesh)
    grown, beside = unet.grow_input(params, 4), Beside(PARAMS, None)

    def gradient(b):
        return jax.value_and_grad(lambda p: loss(p, b, jax.random.key(1), beside)[0])(grown)

    one, two = batch(seed=0), batch(seed=0) | {"condition": batch(seed=1)["condition"]}
    (a, grad_a), (b, grad_b) = gradient(one), gradient(two)
    assert a == b  # Another condition of the same pictures: nothing is seen yet.
    new_a, new_b = (g["conv_in"]["kernel"][:, :, 4:] for g in (grad_a, grad_b))
    assert jnp.abs(new_a).max() > 0 and jnp.abs(new_a - new_b).max() > 1e-4
    np.testing.assert_allclose(
        grad_a["conv_in"]["kernel"][:, :, :4], grad_b["conv_in"]["kernel"][:, :, :4], atol=1e-6
    )


def test_a_condition_is_left_out_as_often_as_it_is_told():
    """A network that gives its condition back: what it sees is zero where it was left out."""
    seen = []

    def denoise(params, x_BHWC, t_B, cond):
        seen.append(cond["condition"])
        return x_BHWC * params

    finetune = FineTune(
        task="super_resolution", condition_dropout=0.5, sweep=Sweep(guidance=(1.0, 2.0)),
    )
    loss = conditioned.loss_fn(
        denoise, SPEC.grown(4), finetune, Diffusion(), encode, SCALE, NULL_LD
    )
    loss(jnp.ones(()), batch(400), jax.random.key(0), Beside(PARAMS, None))
    left_out = np.asarray(jnp.abs(seen[0]).max((1, 2, 3)) == 0)
    assert 0.4 < left_out.mean() < 0.6


def test_lanes_draw_with_a_condition_as_the_network_alone_would():
    """A network that gives its condition as x0: pictures are what was given, prompt by prompt."""
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    spec = SPEC.grown(4)
    frozen = Frozen(None, None, 1.0, (4, 4, 4), NULL_LD)
    drawer = Drawer(spec, frozen, Diffusion(prediction="x0"), 4, None, mesh)
    drawer.lanes.denoise = lambda params, x, t, cond: cond["condition"]
    given_PHWC = np.random.default_rng(0).normal(size=(6, 4, 4, 4)).astype(np.float32)
    table = drawer.table("ddim", 3, "trailing")
    configuration = Configuration(table, 1.0, np.arange(6), np.array([5, 4, 3, 2, 1, 0]))
    out = np.zeros_like(given_PHWC)
    ctx_PLD = np.zeros((6, 3, 16), np.float32)
    for finished in drawer.draw({}, [configuration], ctx_PLD, jax.random.key(0), given_PHWC):
        out[finished.position] = finished.latents_JHWC
    # The last node keeps a little noise (abar_0).
    left = 3 * float(drawer.schedule.sigma[0]) + 1e-3
    np.testing.assert_allclose(out, given_PHWC[::-1], atol=2 * left)
    with pytest.raises(ValueError, match="it takes"):
        next(drawer.draw({}, [configuration], ctx_PLD, jax.random.key(0)))


def test_settings_that_contradict_each_other_are_refused():
    from ldm_scaling.errors import UserError

    for values, message in (
        ({"budgets": (4, 2)}, "ascending"),
        ({"budgets": (2, 4), "train": Train(steps=5, warmup_steps=0)}, "ends the run"),
        ({"task": "inpainting", "sweep": Sweep(guidance=(1.0, 3.0))}, "nothing to guide away"),
        ({"task": "inpainting", "condition_dropout": 0.1,
          "sweep": Sweep(guidance=(1.0, 3.0), strategy="racing")}, "do not race"),
        ({"pretrained": "runs/x"}, "say for what"),
        ({"condition_dropout": 1.0}, r"in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            FineTune(**values)


def test_a_longer_run_is_the_same_run():
    """Its length and bookkeeping name no other network; what decides numbers does."""
    run = Train(steps=10, warmup_steps=5)
    base = FineTune(task="inpainting", train=run)
    longer = dataclasses.replace(run, steps=20, log_every=3)
    assert base.hash == FineTune(task="inpainting", train=longer, budgets=(10, 20)).hash
    for other in (
        FineTune(task="outpainting", train=run),
        FineTune(task="inpainting", train=dataclasses.replace(run, learning_rate=1.0)),
        FineTune(task="inpainting", train=run, source_side=400),
    ):
        assert other.hash != base.hash
    assert FineTune(budgets=(3, 10), train=run).run.keep_steps == (3, 10)

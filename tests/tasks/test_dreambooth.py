"""DreamBooth's loss against diffusers' formula, and its identities; what is trained of what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Diffusion, Train
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import autoencoder, lora, unet
from ldm_scaling.models.text_network import TextNetwork
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.tasks import dreambooth
from ldm_scaling.tasks.drawing import Frozen
from ldm_scaling.training import step

WHY = "compares with torch: pip install -e '.[parity]'"
SPEC = unet.UNetSpec(
    8, 16, (1,), (True,), 1, heads=2, groups=4, sample_size=4, context_length=3
)
TRAIN = Train(
    steps=2, batch_size=4, learning_rate=1e-2, warmup_steps=0, caption_dropout=0.0, ema_decay=0.0,
    compute_dtype="float32",
)
NULL = np.full((3, 16), 0.5, np.float32)
KEY = jax.random.key(5)


def example(seed, b=4):
    rng = np.random.default_rng(seed)
    return {
        "mean": rng.normal(size=(b, 4, 4, 4)).astype(np.float32),
        "logvar": np.full((b, 4, 4, 4), -60.0, np.float32),
        "context": rng.normal(size=(b, 3, 16)).astype(np.float32),
    }


def both(subject, prior):
    return subject | {dreambooth.CLASS + name: a for name, a in prior.items()}


def stub(seen):
    """A network that remembers what it is given: F = scale x + the mean of its context."""

    def denoise(params, x_BHWC, t_B, cond):
        seen.append((x_BHWC, t_B, cond["context"]))
        return params["scale"] * x_BHWC + jnp.mean(cond["context"], (1, 2))[:, None, None, None]

    return denoise


def loss_of(denoise, weight, train=TRAIN, **kw):
    return dreambooth.loss_fn(denoise, SPEC, train, Diffusion(), 2.0, NULL, weight, **kw)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_loss_is_that_of_diffusers_example(weight):
    """train_dreambooth.py: the batch in two, `mse_loss` of each, the second times the weight."""
    torch = pytest.importorskip("torch", reason=WHY)
    seen, batch = [], both(example(0), example(1))
    loss, told = loss_of(stub(seen), weight)({"unet": {"scale": 0.4}}, batch, KEY)
    x, t, ctx = map(np.asarray, seen[0])
    schedule = schedule_lib.get("sd")
    alpha, sigma = (a[t.astype(int)].reshape(-1, 1, 1, 1) for a in (schedule.alpha, schedule.sigma))
    # Ours alternate, theirs follow one another.
    z = np.stack([batch["mean"], batch["class_mean"]], 1).reshape(-1, 4, 4, 4) * 2.0
    prediction = 0.4 * x + ctx.mean((1, 2))[:, None, None, None]
    noise = (x - alpha * z) / sigma
    order = np.r_[0:8:2, 1:8:2]
    prediction, noise = (torch.from_numpy(a[order].astype("f8")) for a in (prediction, noise))
    ours, prior = torch.chunk(prediction, 2), torch.chunk(noise, 2)
    mse = functools.partial(torch.nn.functional.mse_loss, reduction="mean")
    want = mse(ours[0], prior[0]) + weight * mse(ours[1], prior[1])
    np.testing.assert_allclose(float(loss), float(want), rtol=1e-4)
    np.testing.assert_allclose(float(loss), told["subject_loss"] + weight * told["prior_loss"])
    np.testing.assert_allclose(ctx[::2], batch["context"])
    np.testing.assert_allclose(ctx[1::2], batch["class_context"])


def test_without_a_prior_the_class_is_not_looked_at():
    """Weight 0 is fine-tuning on the subject alone: no class pictures, half the work."""
    seen = []
    loss, told = loss_of(stub(seen), 0.0)({"unet": {"scale": 0.4}}, example(0), KEY)
    assert seen[0][0].shape[0] == 4 and not told and np.isfinite(loss)


def test_the_weight_is_that_of_the_priors_gradient():
    batch, params = both(example(0), example(1)), {"unet": {"scale": jnp.float32(0.4)}}

    def grad(weight):
        return float(jax.grad(lambda p: loss_of(stub([]), weight)(p, batch, KEY)[0])(params)
                     ["unet"]["scale"])

    # Linear in the weight.
    np.testing.assert_allclose(grad(2.0) - grad(1.0), grad(1.5) - grad(0.5), rtol=1e-3)
    assert abs(grad(2.0) - grad(1.0)) > 1e-4


def frozen():
    return Frozen(autoencoder.AutoencoderSpec(8, (1,), 1, groups=4), None, 2.0, (4, 4, 4), NULL)


def text_network():
    """States are rows of a table: trained, it must move."""
    rng = np.random.default_rng(7)
    table = {"tokens": {"embedding": rng.normal(size=(20, 16)).astype(np.float32)},
             "layer_0": {"out": {"kernel": np.eye(16, dtype=np.float32)}}}

    def apply(params, ids_BL, mask_BL):
        return params["tokens"]["embedding"][ids_BL] @ params["layer_0"]["out"]["kernel"]

    def tokenize(texts):
        ids = np.array([[1 + len(text) % 19, 2, 3] for text in texts], np.int32)
        return ids, np.ones_like(ids, bool)

    return TextNetwork(table, apply, tokenize)


def network():
    """With a U-Net's names, and little else, for it compiles at once."""
    rng = np.random.default_rng(3)
    kernel = [rng.normal(size=s).astype(np.float32) for s in ((4, 8), (16, 8), (8, 4))]
    return {
        "conv_in": {"kernel": kernel[0][None, None]},
        "mid_attn": {"block": {"attn2": {"to_k": {"kernel": kernel[1]}}}},
        "conv_out": {"kernel": kernel[2][None, None], "bias": np.ones(4, np.float32)},
    }


def small(params, x_BHWC, t_B, cond):
    h = x_BHWC @ params["conv_in"]["kernel"][0, 0]
    k_BD = cond["context"].mean(1) @ params["mid_attn"]["block"]["attn2"]["to_k"]["kernel"]
    out = params["conv_out"]
    return jnp.tanh(h + k_BD[:, None, None]) @ out["kernel"][0, 0] + out["bias"]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("with_text", [False, True])
def test_what_is_trained_and_what_is_not(rank, with_text):
    text = text_network() if with_text else None
    networks = {"unet": network()} | ({"text": text.params} if text else {})
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    task = dreambooth.make(
        "m", SPEC, TRAIN, Diffusion(), frozen(), small, networks, 1.0, rank,
        text=text,
    )
    batch = both(example(0), example(1))
    if text:
        for name, caption in (("", "a sks dog"), (dreambooth.CLASS, "a dog")):
            ids, mask = text.tokenize([caption] * 4)
            batch |= {f"{name}ids": ids, f"{name}mask": mask}
            del batch[f"{name}context"]
    assert set(task.make_batch(batch)) == set(batch)
    state = step.init_state(task.init, TRAIN, mesh, KEY, task.start)
    before = dreambooth.whole(state.params, task.frozen)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(networks)):
        np.testing.assert_array_equal(a, b)  # It draws what it drew.
    abstract = step.abstract_state(task.init, TRAIN, mesh)
    base = () if task.frozen is None else (jax.device_put(task.frozen, mesh_lib.replicated(mesh)),)
    train = step.make(task.loss, TRAIN, mesh, abstract, *base)
    for _ in range(2):
        state, told = train(state, batch, KEY, *base)
    assert np.isfinite(told["loss"]) and {"subject_loss", "prior_loss"} <= told.keys()
    after = dreambooth.whole(state.ema, *base)
    moved = {
        name: {jax.tree_util.keystr(p, simple=True, separator="/") for (p, a), b in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(networks[name])
        ) if (np.asarray(a) != np.asarray(b)).any()}
        for name, tree in after.items()
    }
    every = {n: {jax.tree_util.keystr(p, simple=True, separator="/")
                 for p, _ in jax.tree_util.tree_leaves_with_path(t)} for n, t in networks.items()}
    adapted = {name: {f"{layer}/kernel" for layer in lora.layers(networks[name], targets)}
               for name, targets in (("unet", lora.NETWORK_TARGETS), ("text", lora.TEXT_TARGETS))
               if name in networks}
    assert moved == (adapted if rank else every)


def test_the_empty_caption_is_the_trained_encoders():
    """Dropped captions: that of the encoder as it is now, not as it was."""
    text, seen = text_network(), []
    batch = example(0) | dict(zip(("ids", "mask"), text.tokenize(["a sks dog"] * 4)))
    train = Train(caption_dropout=0.999, warmup_steps=0)
    params = {"unet": {"scale": 0.4}, "text": jax.tree.map(lambda a: 2 * a, text.params)}
    loss_of(stub(seen), 0.0, train, text=text)(params, batch, KEY)
    want = text.apply(params["text"], *text.tokenize([""]))[0]
    np.testing.assert_allclose(seen[0][2], np.broadcast_to(want, (4, 3, 16)), rtol=1e-6)

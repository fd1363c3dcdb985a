"""The tasks' own maths: the structural loss, padding of the context, caption drop-out."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Autoencoder, Diffusion, Sample, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import attention, autoencoder, cost, edm2, unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.tasks import drawing, dreambooth, text_to_image
from ldm_scaling.tasks.autoencoder import laplacian_pyramid_l1
from ldm_scaling.training.task import Beside

SPEC = unet.UNetSpec(
    4, 16, (1,), (True,), 1, heads=2, groups=2, sample_size=4, context_length=3
)


def test_pyramid_of_a_constant_difference_is_its_size():
    """A flat difference has no band-pass part: only the coarsest level counts it, once."""
    x = jnp.zeros((2, 16, 16, 3))
    assert float(laplacian_pyramid_l1(x, x)) == 0.0
    np.testing.assert_allclose(float(laplacian_pyramid_l1(x + 0.25, x)), 0.25, rtol=1e-6)


def test_pyramid_of_the_finest_checkerboard_is_in_the_first_level():
    """Its 2x2 means vanish, so the first level holds all of it."""
    board = jnp.asarray(np.indices((16, 16)).sum(0) % 2 * 2.0 - 1.0)[None, :, :, None]
    np.testing.assert_allclose(float(laplacian_pyramid_l1(0.5 * board, 0 * board)), 0.5, rtol=1e-6)


def test_the_autoencoders_loss_at_ldms_balance_and_its_attention(monkeypatch):
    """LDM sums the error over a picture and the KL over its latent. In chunks the attention is the
    same."""
    side, weight = 8, 0.5

    def made(form):
        config = Autoencoder(
            base_channels=8, channel_mults=(1, 1), blocks_per_level=1, groups=4,
            kl_weight=weight / (3 * side**2), structure_weight=0.0,
            train=Train(compute_dtype="float32", attention=form),
        )
        return config, autoencoder_task.make(config, np.zeros((2, side, side, 3), np.uint8))

    (config, task), rng, key = made("auto"), np.random.default_rng(0), jax.random.key(1)
    image = rng.integers(256, size=(2, side, side, 3)).astype(np.uint8)
    spec, x_BHWC = autoencoder_task.spec_of(config), image / np.float32(127.5) - 1
    params = jax.tree.map(
        lambda p: rng.normal(scale=0.2, size=p.shape).astype(np.float32),
        jax.eval_shape(task.init, key),
    )

    @jax.jit
    def parts(params):
        z = autoencoder.encode(spec, params, x_BHWC)
        y_BHWC = autoencoder.decode(spec, params, z.sample(key))
        return task.loss(params, {"image": image}, key)[0], z, y_BHWC

    loss, (mean, logvar), y_BHWC = jax.tree.map(np.float64, parts(params))
    kl_B = (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).sum((1, 2, 3))
    error_B = np.abs(x_BHWC - y_BHWC).sum((1, 2, 3))
    assert loss * 3 * side**2 == pytest.approx(np.mean(error_B + weight * kl_B), rel=1e-4)

    monkeypatch.setattr(attention, "_CHUNK_LOGITS", 512)  # of 16 queries 4 at a time
    _, task = made("chunked")
    assert "scan" in str(jax.make_jaxpr(task.loss)(params, {"image": image}, key))
    found, _ = jax.jit(task.loss)(params, {"image": image}, key)
    assert float(found) == pytest.approx(loss, rel=1e-4)
    with pytest.raises(UserError, match="autoencoder.train.attention='cudnn'.*auto, plain or chu"):
        Study(autoencoder=Autoencoder(train=Train(attention="cudnn")))


def test_context_is_padded_with_zeros_or_refused():
    ctx = np.ones((2, 3, 5), np.float32)
    out = text_to_image.pad_context(ctx, 8)
    assert out.shape == (2, 3, 8)
    np.testing.assert_array_equal(out[..., :5], ctx)
    assert not out[..., 5:].any()
    with pytest.raises(UserError, match="width 5 .* context_dim=4"):
        text_to_image.pad_context(ctx, 4)


def _task(dropout, latent_scale=2.0, spec=SPEC):
    frozen = text_to_image.Frozen(
        autoencoder.AutoencoderSpec(8, (1,), 1, groups=4), None, latent_scale, (4, 4, 4),
        np.full((3, 16), 0.5, np.float32),
    )
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    drawer = text_to_image.Drawer(spec, frozen, Diffusion(), 4, None, mesh)
    validation = {
        "mean": np.zeros((4, 4, 4, 4), np.float32), "context": np.zeros((4, 3, 16), np.float32),
        "index": np.arange(4, dtype=np.int32),
    }
    train = dataclasses.replace(Train(), caption_dropout=dropout, compute_dtype="float32")
    return text_to_image.make(
        "m", spec, train, Diffusion(), Sample(steps=2), frozen, drawer, validation
    )


def test_an_edm2_is_trained_with_its_norms_and_rates():
    """By DreamBooth too, where it is not adapters that learn; no other network is."""
    spec = edm2.EDM2Spec(
        4, 16, (1,), (True,), 1, head_channels=4, sample_size=4, context_length=3
    )
    task, plain, rates = _task(0.0, spec=spec), _task(0.0), edm2.rates(spec)
    assert task.project is edm2.project and task.rates == rates
    assert plain.project is None and plain.rates is None

    ones = jax.tree.map(lambda s: np.ones(s.shape, np.float32), edm2.param_shapes(spec))
    both = {"unet": ones, "text": {"kernel": 3 * np.ones((2, 2))}}
    frozen = text_to_image.Frozen(None, None, 1.0, (4, 4, 4), np.zeros((3, 16), np.float32))
    taught, adapters = (
        dreambooth.make("m", spec, Train(), Diffusion(), frozen, None, of, rank=rank)
        for rank, of in ((0, both), (1, {"unet": both["unet"]}))
    )
    assert taught.rates == {"unet": rates, "text": {"kernel": 1.0}}
    after = jax.jit(taught.project)(both)
    np.testing.assert_array_equal(after["text"]["kernel"], both["text"]["kernel"])
    norms = np.linalg.norm(after["unet"]["time_embedding"]["kernel"], axis=0)
    np.testing.assert_allclose(norms, 1.0, atol=1e-3)
    assert adapters.project is None and adapters.rates is None


def _spread(task, params, n=256):
    """How much the loss moves when the captions do, everything else equal."""
    rng = np.random.default_rng(0)
    base = {
        "mean": rng.normal(size=(n, 4, 4, 4)).astype(np.float32),
        "logvar": np.full((n, 4, 4, 4), -30.0, np.float32),
    }
    losses = [
        float(task.loss(params, base | {"context": np.full((n, 3, 16), v, np.float32)},
                        jax.random.key(1), Beside(task.frozen, None))[0])
        for v in (-1.0, 1.0)
    ]
    return abs(losses[0] - losses[1])


def test_dropout_replaces_captions_by_the_empty_one():
    params = unet.init(SPEC, jax.random.key(0))
    # Rows with a dropped caption no longer depend on it: nearly all of them at 0.999.
    assert _spread(_task(0.999), params) < 0.1 * _spread(_task(0.0), params)


def test_a_step_is_compiled_before_the_latents_scale_is_known():
    """The scale is an argument: steps of two scales are one program, and the loss follows it."""
    params = unet.init(SPEC, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {"mean": rng.normal(size=(8, 4, 4, 4)).astype(np.float32),
             "logvar": np.full((8, 4, 4, 4), -30.0, np.float32),
             "context": np.zeros((8, 3, 16), np.float32)}

    def lowered(task):
        run = jax.jit(lambda params, frozen: task.loss(
            params, batch, jax.random.key(1), Beside(frozen, None))[0])
        return run.lower(params, task.frozen).as_text(), float(run(params, task.frozen))

    (text, loss), (other, larger) = lowered(_task(0.0, 1.0)), lowered(_task(0.0, 3.0))
    assert text == other and loss != larger


def _drawer(decode):
    mesh = mesh_lib.make(devices=jax.devices()[:1])
    frozen = types.SimpleNamespace(
        null_ctx_LD=np.zeros((3, 16), np.float32), latent_shape=(4, 4, 4), decoder_params=None
    )
    return drawing.Drawer(SPEC, frozen, Diffusion(), 4, decode, mesh)


def test_batches_are_what_the_loss_needs():
    assert set(_task(0.0).make_batch({"mean": 0, "logvar": 0, "context": 0, "x": 1})) == {
        "mean", "logvar", "context"
    }


def test_latents_are_decoded_in_full_batches_and_cut():
    sizes = []

    def decode(params, z_BHWC):
        sizes.append(len(z_BHWC))
        return z_BHWC[..., :3]

    z = np.broadcast_to(np.arange(6)[:, None, None, None] / 10.0, (6, 4, 4, 4)).astype(np.float32)
    out = _drawer(decode).decode(z, str)
    assert sizes == [4, 4] and out.shape == (6, 4, 4, 3)
    np.testing.assert_array_equal(out[:, 0, 0, 0], np.rint((np.arange(6) / 10 + 1) * 127.5))
    z = z.copy()
    z[5, 1, 2, 0] = np.inf
    with pytest.raises(UserError, match="picture 5 draws .* not finite"):
        _drawer(decode).decode(z, lambda j: f"picture {j}")
    broken = []
    out = _drawer(decode).decode(z, str, broken.append)
    assert broken == [5] and (out[5] == 128).all() and (out[:5] != 128).any()


def test_pictures_follow_their_prompt_noise_and_rate_only():
    """Each picture is that of its own prompt and number, whatever it is drawn with."""
    params, key = unet.init(SPEC, jax.random.key(0)), drawing.sampling_key(3)
    ctx = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float16)
    drawer, rows = _drawer(lambda p, z: z[..., :3]), []
    one = Configuration(drawer.table("ddim", 3, "leading"), 2.0, [7, 8, 9], [0, 4, 1])
    two = Configuration(drawer.table("ddpm", 2, "leading"), 1.0, [8, 7], [4, 0])
    first, second = drawer.pictures(params, [one, two], ctx, key, rows.append)
    assert first.shape == (3, 4, 4, 3) and second.shape == (2, 4, 4, 3) and sum(rows) == 3 * 3 + 4
    reverse = Configuration(one.table, 2.0, [9, 8, 7], [1, 4, 0])
    (again,) = drawer.pictures(params, [reverse], ctx, key)
    np.testing.assert_allclose(again[::-1].astype(int), first.astype(int), atol=1)
    other = dataclasses.replace(one, prompt_N=np.array([2, 4, 1]))
    (moved,) = drawer.pictures(params, [other], ctx, key)
    assert (moved[0] != first[0]).any()
    np.testing.assert_allclose(moved[1:].astype(int), first[1:].astype(int), atol=1)


def test_seconds_of_a_row_and_of_a_decoded_picture_are_measured():
    params = unet.init(SPEC, jax.random.key(0))
    drawer = _drawer(lambda p, z: z[..., :3])
    trial = Configuration(drawer.table("ddim", 2, "leading"), 2.0, [1])
    row, decode = drawer.seconds(params, trial, np.zeros((2, 3, 16)), jax.random.key(0))
    assert 0 < row < 10 and 0 < decode < 10


def test_training_is_counted_on_captions_as_long_as_they_are():
    null_LD = np.zeros((7, 16), np.float32)
    task = text_to_image.make(
        "", SPEC, Train(), Diffusion(), Sample(),
        types.SimpleNamespace(latent_scale=1.0, null_ctx_LD=null_LD),
        types.SimpleNamespace(mesh=mesh_lib.make(), table=lambda *args: None),
        {"mean": np.zeros((8, 4, 4, 4), np.float32), "context": np.zeros((8, 7, 16), np.float32),
         "index": np.arange(8)},
    )
    one = cost.gflops(dataclasses.replace(SPEC, context_length=7))
    assert task.flops_per_example() == 3e9 * one > 3e9 * cost.gflops(SPEC)

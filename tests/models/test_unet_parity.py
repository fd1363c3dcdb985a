"""The U-Net and the autoencoder against diffusers' own, through a checkpoint on disk."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, convert, unet, zoo
from tests.models.peers import run, shake

WHY = "compares with diffusers: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(1)


def diffusers_unet(c, context_dim, seed, **kw):
    torch.manual_seed(seed)
    return shake(
        diffusers.UNet2DConditionModel(
            sample_size=16, block_out_channels=(c, 2 * c, 4 * c, 4 * c), attention_head_dim=8,
            cross_attention_dim=context_dim, **kw,
        ),
        seed,
    )


def unet_inputs(context_dim, seed):
    rng = np.random.default_rng(seed)
    x_BHWC = 2.0 * rng.standard_normal((2, 8, 16, 4)) - 0.7
    t_B = np.array([998.75, 3.25])
    ctx_BLD = 3.0 * rng.standard_normal((2, 7, context_dim)) + 0.2
    return [a.astype(np.float32) for a in (x_BHWC, t_B, ctx_BLD)]


@pytest.mark.parametrize(
    "c, context_dim, linear", [(32, 64, False), (64, 768, True), (96, 1024, False)]
)
def test_unet_equals_diffusers(tmp_path, c, context_dim, linear):
    model = diffusers_unet(c, context_dim, seed=c, use_linear_projection=linear)
    model.save_pretrained(tmp_path)
    spec, params = convert.load_unet(tmp_path)
    assert spec == unet.UNetSpec(c, context_dim, sample_size=16)

    x_BHWC, t_B, ctx_BLD = unet_inputs(context_dim, seed=c)
    with torch.no_grad():
        want = model(
            torch.from_numpy(x_BHWC).permute(0, 3, 1, 2), torch.from_numpy(t_B),
            torch.from_numpy(ctx_BLD),
        ).sample.permute(0, 2, 3, 1).numpy()
    got = run(
        lambda p, x, t, ctx: unet.UNet(spec).apply({"params": p}, x, t, ctx),
        params, x_BHWC, t_B, ctx_BLD,
    )
    assert np.std(want) > 0.1 and np.std(want[0] - want[1]) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", [True, False])
def test_autoencoder_equals_diffusers(tmp_path, attention):
    model = shake(
        diffusers.AutoencoderKL(
            block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=16,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            mid_block_add_attention=attention, scaling_factor=0.7,
        ),
        seed=3,
    )
    model.save_pretrained(tmp_path)
    spec, params, scale = convert.load_autoencoder(tmp_path)
    assert scale == 0.7 and spec.downsampling == 4 and spec.mid_attention == attention

    rng = np.random.default_rng(4)
    x_BHWC = rng.uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    z_BHWC = rng.standard_normal((2, 4, 6, 4)).astype(np.float32)
    with torch.no_grad():
        want = model.encode(torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)).latent_dist
        mean, logvar = (a.permute(0, 2, 3, 1).numpy() for a in (want.mean, want.logvar))
        pixels = model.decode(torch.from_numpy(z_BHWC).permute(0, 3, 1, 2)).sample
        kl = want.kl().numpy()
    got = autoencoder.Posterior(
        *run(lambda p, x: jnp.stack(autoencoder.encode(spec, p, x)), params, x_BHWC)
    )
    np.testing.assert_allclose(got.mean, mean, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got.logvar, logvar, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got.kl(), kl, rtol=1e-4)
    got = run(lambda p, z: autoencoder.decode(spec, p, z), params, z_BHWC)
    assert np.std(pixels.numpy()) > 0.1
    np.testing.assert_allclose(got, pixels.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_old_names_of_the_autoencoders_attention():
    spec = autoencoder.AutoencoderSpec(8, (1, 1), blocks_per_level=1, groups=4)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )
    tensors = {name: p.numpy() for name, p in model.state_dict().items()}
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, before)
        renamed[name] = tensor
    assert set(renamed) != set(tensors)
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.autoencoder_params(spec, tensors, "new"),
        convert.autoencoder_params(spec, renamed, "old"),
    )


def test_parameters_of_stable_diffusion():
    """Counted by the peer itself, on torch's meta device."""
    from ldm_scaling.models import cost

    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    want = sum(p.numel() for p in peer.parameters())
    assert cost.of(zoo.get("sd15").spec).params == want == 859_520_964
    assert convert.unet_spec(dict(peer.config)) == zoo.get("sd15").spec
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel(
            sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True, upcast_attention=True,
        )
    spec = convert.unet_spec(dict(peer.config))
    assert spec == unet.UNetSpec(320, heads=(5, 10, 20, 20), sample_size=96)
    ours = jax.eval_shape(lambda: unet.init(spec, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(
        p.numel() for p in peer.parameters()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=6, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.save_pretrained(folder)
    return folder


def test_reads_without_torch_or_diffusers(saved):
    code = (
        "import sys; from ldm_scaling.models import convert;"
        "spec, params = convert.load_unet(sys.argv[1]);"
        "bad = {'torch', 'diffusers', 'transformers'} & set(sys.modules); assert not bad, bad;"
        "print(spec.attention_levels)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "(True, False)"


@pytest.mark.parametrize(
    "option, value, says",
    [
        ("class_embed_type", "timestep", "class_embed_type='timestep'"),
        ("act_fn", "gelu", "act_fn='gelu'"),
        ("time_cond_proj_dim", 255, "guidance_dim=255"),
        ("transformer_layers_per_block", 2, "transformer_layers_per_block=2"),
        ("attention_head_dim", [4, 8, 8], r"heads=\(4, 8, 8\).* each of the 2 levels"),
        ("attention_head_dim", [4, 3], "width 16 .* heads=3"),
        ("layers_per_block", [1, 2], r"layers_per_block=\[1, 2\]"),
        ("block_out_channels", [8, 12], "block_out_channels"),
        ("down_block_types", ["SimpleCrossAttnDownBlock2D", "DownBlock2D"], "SimpleCrossAttn"),
        ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"], "do not mirror"),
    ],
)
def test_an_option_that_changes_the_network_is_refused(saved, option, value, says):
    config = json.loads((saved / "config.json").read_text())
    convert.unet_spec(config)
    with pytest.raises(UserError, match=says):
        convert.unet_spec(config | {option: value})


def test_tensors_that_do_not_fit_are_refused(saved):
    spec, _ = convert.load_unet(saved)
    tensors = convert.pretrained.read_safetensors(saved / convert.WEIGHTS)
    name = "down_blocks.0.attentions.0.proj_in.weight"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"add_embedding.linear_1.weight": np.zeros((3, 3), np.float32)},
        tensors | {name: np.zeros((8, 8, 3, 3), np.float32)},
        tensors | {"mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.bias":
                   np.zeros(127, np.float32)},
    ):
        with pytest.raises(UserError, match="1 missing|1 surplus|1 misshapen"):
            convert.unet_params(spec, wrong, "here")


def test_an_average_over_training_is_read(saved, tmp_path):
    """As diffusers' training examples save one beside the network, in `unet_ema`."""
    from diffusers.training_utils import EMAModel

    average = EMAModel.from_pretrained(saved, diffusers.UNet2DConditionModel)
    average.step([p + 1.0 for p in average.shadow_params])
    average.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimization_step"] == 1
    spec, params = convert.load_unet(tmp_path)
    before_spec, before = convert.load_unet(saved)
    assert spec == before_spec
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, before)
    assert min(jax.tree.leaves(moved)) > 0.01


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        convert.load_unet(tmp_path)

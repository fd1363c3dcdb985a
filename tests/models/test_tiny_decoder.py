"""The tiny decoder against diffusers' and against the original's `nn.Sequential`."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.errors import UserError
from ldm_scaling.models import tiny_decoder
from ldm_scaling.models.tiny_decoder import TinyDecoderSpec
from tests.models.peers import FAST

WHY = "compares with diffusers: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)


def autoencoder(**kw):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(2, 3, 1), **kw,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.1 * torch.randn(p.shape))
    return model.eval()


def taesd(model):
    """taesd.py's `Decoder`, layer by layer, with the weights of diffusers'."""

    class Clamp(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x / 3) * 3

    class Block(torch.nn.Module):
        def __init__(self, n):
            super().__init__()
            conv, relu = torch.nn.Conv2d, torch.nn.ReLU
            self.conv = torch.nn.Sequential(
                conv(n, n, 3, padding=1), relu(), conv(n, n, 3, padding=1), relu(),
                conv(n, n, 3, padding=1),
            )
            self.skip, self.fuse = torch.nn.Identity(), relu()

        def forward(self, x):
            return self.fuse(self.conv(x) + self.skip(x))

    def conv(i, o, **kw):
        return torch.nn.Conv2d(i, o, 3, padding=1, **kw)

    def up():
        return [torch.nn.Upsample(scale_factor=2), conv(8, 8, bias=False)]

    layers = [Clamp(), conv(4, 8), torch.nn.ReLU(), *(Block(8) for _ in range(2)), *up(),
              *(Block(8) for _ in range(3)), *up(), Block(8), conv(8, 3)]
    out = torch.nn.Sequential(*layers)
    tensors = list(model.decoder.layers.state_dict().values())
    out.load_state_dict(dict(zip(out.state_dict(), tensors, strict=True)))
    return out.eval()


@pytest.mark.parametrize("layout", ["diffusers", "taesd"])
def test_equals_the_peer(tmp_path, layout):
    model, path = autoencoder(scaling_factor=1.0), tmp_path
    z_BHWC = 4.0 * np.random.default_rng(0).standard_normal((2, 4, 6, 4)).astype(np.float32)
    z_BCHW = torch.from_numpy(z_BHWC).permute(0, 3, 1, 2)
    with torch.no_grad():
        if layout == "diffusers":
            model.save_pretrained(tmp_path)
            want = model.decode(z_BCHW).sample
        else:
            path, network = tmp_path / "taesd_decoder.pth", taesd(model)
            torch.save(network.state_dict(), path)
            want = 2 * network(z_BCHW) - 1
    spec, params, scale = tiny_decoder.load(path)
    assert (spec, scale) == (TinyDecoderSpec(8, (2, 3, 1)), 1.0) and spec.downsampling == 4
    decode = jax.jit(lambda p, z: tiny_decoder.decode(spec, p, z))
    got = decode.lower(params, z_BHWC).compile(compiler_options=FAST)(params, z_BHWC)
    assert np.std(want.numpy()) > 0.1
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_the_published_size():
    """Counted by the peer, whose defaults are the published ones."""
    with torch.device("meta"):
        peer = diffusers.AutoencoderTiny().decoder
    params = jax.eval_shape(lambda: tiny_decoder.init(TinyDecoderSpec(), jax.random.key(0)))
    ours = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert ours == sum(p.numel() for p in peer.parameters()) == 1_222_531


def test_what_is_something_else_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"act_fn": "gelu"}))
    with pytest.raises(UserError, match="act_fn='gelu' is not supported"):
        tiny_decoder.load(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    lost = "decoder.layers.2.conv.2.bias"
    for wrong, match in (
        ({k: t for k, t in tensors.items() if k != lost}, "1 missing"),
        (tensors | {lost: np.zeros(9, np.float32)}, "1 misshapen"),
        (tensors | {"decoder.mid.weight": np.zeros(9, np.float32)}, "1 surplus"),
        ({"conv_in.weight": np.zeros(9)}, "no tiny decoder, but conv_in.weight.*taesd_decoder"),
    ):
        with pytest.raises(UserError, match=match):
            tiny_decoder.from_tensors(wrong, "here")

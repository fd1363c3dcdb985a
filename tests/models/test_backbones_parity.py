"""DiT, PixArt-alpha and MM-DiT against diffusers' at random weights; U-ViT against the paper's
equations on torch's own transformer layers."""

import math

import jax
import numpy as np
import pytest

from ldm_scaling.models import attention, dit, mmdit, uvit
from ldm_scaling.models.backbone_tables import PRINTED
from tests.models.peers import run, shake

WHY = "compares with diffusers: pip install -e '.[parity]'"
diffusers = pytest.importorskip("diffusers", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    torch.set_num_threads(1)


class State:
    """A torch model's parameters in this package's layout, each to be taken once."""

    def __init__(self, model):
        self.left = {name: p.detach().numpy() for name, p in model.state_dict().items()}

    def array(self, name):
        return self.left.pop(name)

    def linear(self, name):
        out = {"kernel": self.array(f"{name}.weight").T}
        if f"{name}.bias" in self.left:
            out["bias"] = self.array(f"{name}.bias")
        return out

    def conv(self, name):
        kernel = self.array(f"{name}.weight").transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self.array(f"{name}.bias")}

    def norm(self, name):
        return {"scale": self.array(f"{name}.weight"), "bias": self.array(f"{name}.bias")}

    def attention(self, name):
        return {
            **{part: self.linear(f"{name}.{part}") for part in ("to_q", "to_k", "to_v")},
            "to_out": self.linear(f"{name}.to_out.0"),
        }

    def mlp(self, name):
        return {"ff_in": self.linear(f"{name}.net.0.proj"), "ff_out": self.linear(f"{name}.net.2")}


def swapped(layer):
    """A layer that makes scales, then shifts: ours are the other way round."""
    return {
        name: np.concatenate(np.split(array, 2, axis=-1)[::-1], axis=-1)
        for name, array in layer.items()
    }


def inputs(shape, length, width, seed=0):
    rng = np.random.default_rng(seed)
    x_BHWC = 2.0 * rng.standard_normal(shape) - 0.7
    ctx_BLD = 3.0 * rng.standard_normal((shape[0], length, width)) + 0.2
    t_B = np.linspace(998.75, 3.25, shape[0])
    return [a.astype(np.float32) for a in (x_BHWC, t_B, ctx_BLD)]


def nchw(x_BHWC):
    return torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)


def check(module, spec, params, args, want_BCHW):
    shapes = jax.tree.map(lambda a: a.shape, params)
    assert shapes == jax.tree.map(lambda a: a.shape, module.param_shapes(spec))
    x, t, ctx = args
    got = run(module.denoise_fn(spec), params, x, t, {"context": ctx})
    want = want_BCHW.detach().permute(0, 2, 3, 1).numpy()
    assert np.std(want) > 0.1 and np.std(want[0] - want[1]) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())


def test_dit_equals_diffusers():
    classes = 6
    model = shake(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=classes, norm_eps=1e-6,
    ))  # fmt: skip
    first, *others = model.transformer_blocks
    for block in others:  # As in the paper's code, one embedding for all.
        block.norm1.emb = first.norm1.emb
    first.norm1.emb.time_proj.downscale_freq_shift = 0  # The paper's frequencies.
    spec = dit.DiTSpec(
        16, 2, 2, "pooled", context_dim=classes + 1, context_length=1, out_channels=8,
        sample_size=8,
    )
    s = State(model)
    emb = "transformer_blocks.0.norm1.emb"
    params = {
        "conv_in": s.conv("pos_embed.proj"),
        "time_embedding_1": s.linear(f"{emb}.timestep_embedder.linear_1"),
        "time_embedding_2": s.linear(f"{emb}.timestep_embedder.linear_2"),
        "text_embedding": {"kernel": s.array(f"{emb}.class_embedder.embedding_table.weight")},
        "modulation_out": s.linear("proj_out_1"), "proj_out": s.linear("proj_out_2"),
        **{
            f"block_{i}": {
                "modulation": s.linear(f"transformer_blocks.{i}.norm1.linear"),
                "attn1": s.attention(f"transformer_blocks.{i}.attn1"),
                **s.mlp(f"transformer_blocks.{i}.ff"),
            }
            for i in range(2)
        },
    }
    assert all(".1.norm1.emb." in name for name in s.left)
    x, t, _ = inputs((3, 8, 8, 4), 1, 1)
    labels = np.array([0, 5, classes])  # The last is no class.
    ctx = np.eye(classes + 1, dtype=np.float32)[labels][:, None]
    want = model(nchw(x), torch.from_numpy(t), torch.from_numpy(labels)).sample
    check(dit, spec, params, (x, t, ctx), want)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12)])
def test_pixart_equals_diffusers(height, width):
    model = shake(diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=12, out_channels=4,
    ))  # fmt: skip
    spec = dit.DiTSpec(16, 2, 2, context_dim=12, context_length=5, sample_size=8)
    s = State(model)
    block = "transformer_blocks."
    params = {
        "conv_in": s.conv("pos_embed.proj"),
        "time_embedding_1": s.linear("adaln_single.emb.timestep_embedder.linear_1"),
        "time_embedding_2": s.linear("adaln_single.emb.timestep_embedder.linear_2"),
        "modulation": s.linear("adaln_single.linear"),
        "text_1": s.linear("caption_projection.linear_1"),
        "text_2": s.linear("caption_projection.linear_2"),
        "modulation_out": {"bias": s.array("scale_shift_table")},
        "proj_out": s.linear("proj_out"),
        **{
            f"block_{i}": {
                "modulation": {"bias": s.array(f"{block}{i}.scale_shift_table")},
                "attn1": s.attention(f"{block}{i}.attn1"),
                "attn2": s.attention(f"{block}{i}.attn2"), **s.mlp(f"{block}{i}.ff"),
            }
            for i in range(2)
        },
    }
    assert not s.left
    x, t, ctx = inputs((2, height, width, 4), 5, 12)
    want = model(nchw(x), torch.from_numpy(ctx), torch.from_numpy(t)).sample
    check(dit, spec, params, (x, t, ctx), want)


@pytest.mark.parametrize("height, width", [(8, 8), (4, 12)])
def test_mmdit_equals_diffusers(height, width):
    model = shake(diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
        joint_attention_dim=12, caption_projection_dim=24, pooled_projection_dim=12,
        out_channels=4, pos_embed_max_size=12, qk_norm="rms_norm",
    ))  # fmt: skip
    spec = mmdit.MMDiTSpec(3, 8, context_dim=12, context_length=5, sample_size=8)
    s = State(model)

    def before(i, stream, norm, q, k, v, norm_q, norm_k, ends=False):
        block = f"transformer_blocks.{i}"
        told = s.linear(f"{block}.{norm}.linear")
        out = {
            "modulation": swapped(told) if ends else told,
            "to_k": s.linear(f"{block}.attn.{k}"), "to_v": s.linear(f"{block}.attn.{v}"),
            "norm_k": {"scale": s.array(f"{block}.attn.{norm_k}.weight")},
            "to_q": s.linear(f"{block}.attn.{q}"),
            "norm_q": {"scale": s.array(f"{block}.attn.{norm_q}.weight")},
        }
        if ends:  # What the text asks there, diffusers computes and leaves.
            del out["to_q"], out["norm_q"]
        return {stream: out}

    def block(i):
        name, last = f"transformer_blocks.{i}", i == 2
        out = {
            **before(i, "image_in", "norm1", "to_q", "to_k", "to_v", "norm_q", "norm_k"),
            **before(
                i, "text_in", "norm1_context", "add_q_proj", "add_k_proj", "add_v_proj",
                "norm_added_q", "norm_added_k", last,
            ),
            "image_out": {"to_out": s.linear(f"{name}.attn.to_out.0"), **s.mlp(f"{name}.ff")},
        }
        if not last:
            out["text_out"] = {
                "to_out": s.linear(f"{name}.attn.to_add_out"), **s.mlp(f"{name}.ff_context")
            }
        return out

    params = {
        "conv_in": s.conv("pos_embed.proj"),
        "time_embedding_1": s.linear("time_text_embed.timestep_embedder.linear_1"),
        "time_embedding_2": s.linear("time_text_embed.timestep_embedder.linear_2"),
        "text_embedding_1": s.linear("time_text_embed.text_embedder.linear_1"),
        "text_embedding_2": s.linear("time_text_embed.text_embedder.linear_2"),
        "text": s.linear("context_embedder"),
        "modulation_out": swapped(s.linear("norm_out.linear")), "proj_out": s.linear("proj_out"),
        **{f"block_{i}": block(i) for i in range(3)},
    }
    assert list(s.left) == ["pos_embed.pos_embed"]
    x, t, ctx = inputs((2, height, width, 4), 5, 12)
    pooled = torch.from_numpy(ctx.mean(axis=1))
    want = model(nchw(x), torch.from_numpy(ctx), pooled, torch.from_numpy(t)).sample
    check(mmdit, spec, params, (x, t, ctx), want)


class TorchUViT(torch.nn.Module):
    """U-ViT as the paper's section 3 and figure 1 have it, of torch's layers."""

    def __init__(self, spec):
        super().__init__()
        nn, d, p = torch.nn, spec.base_channels, spec.patch
        self.spec = spec
        self.embed, self.text = nn.Conv2d(4, d, p, p), nn.Linear(spec.context_dim, d)
        self.positions = nn.Parameter(torch.zeros(1 + spec.context_length + spec.grid**2, d))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d, spec.heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(spec.depth)
        )
        self.skips = nn.ModuleList(nn.Linear(2 * d, d) for _ in range(spec.depth // 2))
        self.norm, self.out = nn.LayerNorm(d), nn.Linear(d, p * p * 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x_BCHW, t_B, ctx_BLD):
        d, p = self.spec.base_channels, self.spec.patch
        angles = t_B[:, None] * 10_000 ** -(torch.arange(d // 2).to(t_B) / (d // 2))
        time = torch.cat([angles.cos(), angles.sin()], dim=1)[:, None]
        patches = self.embed(x_BCHW).flatten(2).transpose(1, 2)
        x = torch.cat([time, self.text(ctx_BLD), patches], dim=1) + self.positions
        kept, half = [], self.spec.depth // 2
        for i, block in enumerate(self.blocks):
            if i > half:
                x = self.skips[i - half - 1](torch.cat([x, kept.pop()], dim=2))
            x = block(x)
            if i < half:
                kept.append(x)
        x = self.out(self.norm(x[:, -patches.shape[1] :]))
        # Of each patch, rows, columns, then channels; `fold` takes channels first.
        x = x.unflatten(2, (p * p, 4)).permute(0, 3, 2, 1).flatten(1, 2)
        return self.conv(torch.nn.functional.fold(x, x_BCHW.shape[2:], p, stride=p))


def test_uvit_equals_the_papers_equations():
    spec = uvit.UViTSpec(16, 5, 2, context_dim=12, context_length=3, sample_size=8)
    model = shake(TorchUViT(spec))
    with torch.no_grad():
        for block in model.blocks:
            block.self_attn.in_proj_bias.zero_()
    s = State(model)

    def block(i):
        name = f"blocks.{i}"
        assert not s.array(f"{name}.self_attn.in_proj_bias").any()
        parts = np.split(s.array(f"{name}.self_attn.in_proj_weight"), 3)
        out = {
            "norm1": s.norm(f"{name}.norm1"), "norm2": s.norm(f"{name}.norm2"),
            "attn1": {
                **{f"to_{n}": {"kernel": w.T} for n, w in zip("qkv", parts, strict=True)},
                "to_out": s.linear(f"{name}.self_attn.out_proj"),
            },
            "ff_in": s.linear(f"{name}.linear1"), "ff_out": s.linear(f"{name}.linear2"),
        }
        return out | ({"skip": s.linear(f"skips.{i - 3}")} if i > 2 else {})

    params = {
        "conv_in": s.conv("embed"), "text": s.linear("text"), "positions": s.array("positions"),
        "norm_out": s.norm("norm"), "proj_out": s.linear("out"), "conv_out": s.conv("conv"),
        **{f"block_{i}": block(i) for i in range(5)},
    }
    assert not s.left
    x, t, ctx = inputs((2, 8, 8, 4), 3, 12)
    with torch.no_grad():
        want = model(nchw(x), torch.from_numpy(t), torch.from_numpy(ctx))
    check(uvit, spec, params, (x, t, ctx), want)


def test_uvit_blocks_equal_diffusers():
    """Those of its `UTransformer2DModel`, which other layers join."""
    from diffusers.pipelines.deprecated.unidiffuser import modeling_uvit

    model = shake(modeling_uvit.UTransformerBlock(
        16, 2, 8, activation_fn="gelu", attention_bias=False,
    ))  # fmt: skip
    s = State(model)
    params = {
        "norm1": s.norm("norm1"), "norm2": s.norm("norm3"), "attn1": s.attention("attn1"),
        **s.mlp("ff"),
    }
    assert not s.left
    x_BLD = np.random.default_rng(0).standard_normal((2, 7, 16)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x_BLD)).numpy()
    got = run(lambda p, x: uvit.Block(2, apart=3).apply({"params": p}, x), params, x_BLD)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def multiply_adds(f, *args):
    """Of the products in a function, however deep they lie."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                total += out * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            elif eqn.primitive.name == "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape  # HWIO
                total += out * math.prod(kernel[:-1])
            total += sum(count(sub) for sub in jax.core.jaxprs_in_params(eqn.params))
        return total

    return count(jax.make_jaxpr(f)(*args).jaxpr)


def ours(module, spec):
    """Parameters and multiply-adds of a network."""
    shapes = module.param_shapes(spec)
    x, t, ctx = jax.eval_shape(lambda: module.example_inputs(spec))
    denoise = module.denoise_fn(spec, attention=attention.textbook)
    macs = multiply_adds(lambda *a: denoise(*a[:3], {"context": a[3]}), shapes, x, t, ctx)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), macs


def theirs(model, *args, **kw):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*args, **kw)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def test_pixarts_counts_are_diffusers():
    spec = PRINTED["pixart_xl2"].spec
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            sample_size=32, caption_channels=4096, use_additional_conditions=False
        )
        want = theirs(
            model, torch.zeros(1, 4, 32, 32), torch.zeros(1, 120, 4096), torch.zeros(1)
        )
    assert ours(dit, spec) == want


def test_stable_diffusion_3s_counts_are_diffusers():
    """But for what the last block's text asks, which nothing hears, and for pooled states of two
    CLIP towers, 2048 wide, in place of the tokens' mean, 4096 wide."""
    spec, d = PRINTED["mmdit_24"].spec, 1536
    with torch.device("meta"):
        model = diffusers.SD3Transformer2DModel(
            sample_size=32, num_layers=24, num_attention_heads=24, caption_projection_dim=d,
            pos_embed_max_size=48, qk_norm="rms_norm",
        )
        params, macs = theirs(
            model, torch.zeros(1, 16, 32, 32), torch.zeros(1, 154, 4096), torch.zeros(1, 2048),
            torch.zeros(1),
        )
    asks = 154 * d * d + 2 * 154 * (154 + 256) * d
    assert ours(mmdit, spec) == (
        params - (d * d + d + 64) + 2048 * d, macs - asks + 2048 * d
    )


def test_uvits_counts_are_torchs():
    spec = PRINTED["uvit_s"].spec
    with torch.device("meta"):
        model = TorchUViT(spec)
    params, macs = theirs(
        model, torch.zeros(1, 4, 32, 32, device="meta"), torch.zeros(1, device="meta"),
        torch.zeros(1, 77, 768, device="meta"),
    )
    beside = 13 * 3 * 512  # Biases of queries, keys and values that torch's layer has.
    assert ours(uvit, spec) == (params - beside, macs)

"""LoRA: nothing is changed at first, torch's layers and gradients, diffusers' names and files."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ldm_scaling.errors import UserError
from ldm_scaling.models import clip, clip_text, convert, lora, text_encoder, unet
from tests.models.peers import FAST

WHY = "compares with a peer: pip install -e '.[parity]'"
SPEC = unet.UNetSpec(
    8, 16, (1, 2), (True, False), 1, heads=2, groups=4, sample_size=8, context_length=3
)
SD1 = unet.UNetSpec(320, 768)
KEY = jax.random.key(0)
EVERY = (".",)


def run(f, *args):
    return jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args)


def params_of(spec=SPEC):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: (rng.normal(size=s.shape) / max(1, np.prod(s.shape[:-1])) ** 0.5).astype("f4"),
        unet.param_shapes(spec),
    )


def moved(adapters, seed=1):
    """Adapters with nothing left at zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), "f4"), adapters)


@pytest.mark.parametrize("targets", [lora.NETWORK_TARGETS, EVERY])
def test_nothing_is_changed_at_first(targets):
    params = params_of()
    merged = lora.merge(params, lora.init(params, 2, KEY, targets))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(merged)):
        np.testing.assert_array_equal(a, b)


def test_published_number_of_parameters():
    """A Stable Diffusion 1 at rank 4: 797,184, as diffusers' example prints."""
    shapes = unet.param_shapes(SD1)
    adapters = jax.eval_shape(lambda: lora.init(shapes, 4, KEY))
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 797_184


def test_layers_are_torchs():
    """W x + B (A x), of linear layers and convolutions, with torch's gradients."""
    torch = pytest.importorskip("torch", reason=WHY)
    rng = np.random.default_rng(0)
    params = {"dense": {"kernel": rng.normal(size=(6, 5)).astype(np.float32)},
              "conv": {"kernel": rng.normal(size=(3, 3, 6, 5)).astype(np.float32)}}
    adapters = moved(lora.init(params, 2, KEY, EVERY))
    x = rng.normal(size=(2, 4, 4, 6)).astype(np.float32)
    cotangent = rng.normal(size=(2, 4, 4, 5)).astype(np.float32)

    def ours(adapters):
        kernels = lora.merge(params, adapters)
        y = x @ kernels["dense"]["kernel"] + jax.lax.conv_general_dilated(
            x, kernels["conv"]["kernel"], (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.sum(y * cotangent), y

    grads, y = jax.grad(ours, has_aux=True)(adapters)

    def there(a, linear):
        a = torch.from_numpy(np.array(a))
        return (a.T if linear else a.permute(3, 2, 0, 1)).contiguous().requires_grad_()

    t = {k: {e: there(v[e]["kernel"], k == "dense") for e in v} for k, v in adapters.items()}
    xt = torch.from_numpy(x)
    f, c = torch.nn.functional, torch.from_numpy(cotangent)
    w, k = there(params["dense"]["kernel"], True), there(params["conv"]["kernel"], False)
    yt = f.linear(xt, w) + f.linear(f.linear(xt, t["dense"]["down"]), t["dense"]["up"])
    xc = xt.permute(0, 3, 1, 2)
    low = f.conv2d(xc, t["conv"]["down"], padding=1)
    yt = yt + (f.conv2d(xc, k, padding=1) + f.conv2d(low, t["conv"]["up"])).permute(0, 2, 3, 1)
    (yt * c).sum().backward()
    np.testing.assert_allclose(y, yt.detach().numpy(), rtol=0, atol=1e-4)
    for layer, linear in (("dense", True), ("conv", False)):
        for end in ("down", "up"):
            g = t[layer][end].grad
            g = (g.T if linear else g.permute(2, 3, 1, 0)).numpy()
            np.testing.assert_allclose(grads[layer][end]["kernel"], g, rtol=0, atol=2e-3)


def test_gradients_at_the_start():
    """B at zero: A has none, and B's is A^T times the kernel's."""
    params, t = params_of(), jnp.array([3.0])
    rng = np.random.default_rng(2)
    x, _, ctx = (rng.normal(size=a.shape).astype("f4") for a in unet.example_inputs(SPEC))
    denoise = unet.denoise_fn(SPEC)
    adapters = lora.init(params, 2, KEY)

    def loss(params):
        return jnp.sum(denoise(params, x, t, {"context": ctx}) ** 2)

    def both(params, adapters):
        return jax.grad(loss)(params), jax.grad(lambda a: loss(lora.merge(params, a)))(adapters)

    kernels, grads = (
        traverse_util.flatten_dict(tree, sep="/") for tree in run(both, params, adapters)
    )
    flat = traverse_util.flatten_dict(adapters, sep="/")
    for name in lora.layers(params, lora.NETWORK_TARGETS):
        assert not grads[f"{name}/down/kernel"].any()
        np.testing.assert_allclose(
            grads[f"{name}/up/kernel"], flat[f"{name}/down/kernel"].T @ kernels[f"{name}/kernel"],
            rtol=1e-4, atol=1e-4,
        )


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, SD1])
def test_names_are_those_that_convert_reads(spec):
    """Of every layer: what is written leads back to the layer it is of."""
    rules = convert._unet_rules(spec)
    for name in lora.layers(unet.param_shapes(spec), EVERY):
        called = lora._unet_name(name, len(spec.channel_mults)).removeprefix("unet.") + ".weight"
        match, rule = next((m, r) for r in rules if (m := re.fullmatch(r.pattern, called)))
        assert match.expand(rule.target) == f"{name}/kernel"


@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_names_of_text_encoders_are_those_that_are_read(kind):
    if kind == "clip":
        spec = clip.TextSpec(8, 2, 2, 16, "gelu", None, vocabulary=20, positions=6)
        rules = clip_text.RULES
        shapes = clip_text.abstract_params(spec)
    else:
        spec, rules = text_encoder.BertSpec(width=24, layers=2, hidden=48), text_encoder.RULES
        shapes = text_encoder.param_shapes(spec)
    names = lora.layers(shapes, lora.TEXT_TARGETS)
    assert len(names) == 4 * spec.layers
    for name in lora.layers(shapes, (r"(block|layer)_\d",)):
        called = lora._text_name(name).removeprefix("text_encoder.") + ".weight"
        match, rule = next((m, r) for r in rules if (m := re.fullmatch(r.pattern, called)))
        assert match.expand(rule.target) == f"{name}/kernel"


def test_a_file_changes_diffusers_network_as_ours(tmp_path):
    """Its tensors, put into diffusers' modules by their names, give what our merged kernels do."""
    diffusers = pytest.importorskip("diffusers", reason=WHY)
    torch = pytest.importorskip("torch", reason=WHY)
    torch.set_num_threads(1)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    model.save_pretrained(tmp_path)
    spec, params = convert.load_unet(tmp_path)
    assert spec == unet.UNetSpec(**{**SPEC.__dict__, "context_length": 77})
    adapters = {"unet": moved(lora.init(
        params, 2, KEY, (*lora.NETWORK_TARGETS, "conv[12]$", "/ff_(in|gate|out)$")))}
    lora.save(tmp_path / "lora.safetensors", adapters, 2)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "lora.safetensors")
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                b = tensors[f"{stem}.lora_B.weight"]
                weight = modules[stem.removeprefix("unet.")].weight
                product = torch.einsum("or,ri...->oi...", b.flatten(1), a)
                weight += product.reshape(weight.shape)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 8, 8, 4)).astype(np.float32)
    ctx = rng.normal(size=(1, 3, 16)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor([7.0]),
                     torch.from_numpy(ctx)).sample.permute(0, 2, 3, 1).numpy()
    denoise, t = unet.denoise_fn(spec), jnp.array([7.0])

    def ours(params, adapters):
        merged = lora.merge(params, adapters)
        return [denoise(p, x, t, {"context": ctx}) for p in (params, merged)]

    before, got = run(ours, params, adapters["unet"])
    assert np.abs(want - before).max() > 0.01
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("targets", [("/ff_(in|gate)$",), ("/ff_(in|gate|out)$", "conv1$")])
def test_all_layers_of_a_file_have_one_rank(targets):
    """diffusers 0.39 gives layers of several ranks, of which no alpha is told, factors that are not
    1. Zeros fill up what is of a lower rank; the text encoder has its own."""
    targets = (*lora.NETWORK_TARGETS, *targets)
    network = moved(lora.init(params_of(), 2, KEY, targets))
    text = {"block_0": {"query": {
        "down": {"kernel": np.ones((8, 3))}, "up": {"kernel": np.ones((3, 8))}}}}
    found = lora.tensors({"unet": network, "text": text}, 2)
    ranks = {(name.split(".")[0], tensor.shape[name.endswith("B.weight")])
             for name, tensor in found.items()}
    assert ranks == {("unet", 4), ("text_encoder", 3)}
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    own = network["down_0_attn_0"]["block"]["attn1"]["to_q"]
    np.testing.assert_allclose(
        (found[f"{layer}.lora_B.weight"] @ found[f"{layer}.lora_A.weight"]).T,
        own["down"]["kernel"] @ own["up"]["kernel"], rtol=1e-5, atol=1e-5)


def test_feed_forward_layers_of_one_a_are_one_of_diffusers():
    """GEGLU's one layer there is two here, which are the halves of its product."""
    adapters = moved(lora.init(params_of(), 2, KEY, ("/ff_(in|gate)$",)))
    own = adapters["down_0_attn_0"]["block"]
    own["ff_gate"]["down"] = own["ff_in"]["down"]
    found = lora.tensors({"unet": {"down_0_attn_0": {"block": own}}}, 2)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    a, b = (found.pop(f"{layer}.lora_{end}.weight") for end in "AB")
    assert not found and a.shape == (2, 8)
    halves = convert.split_gates({"ff.net.0.proj.weight": b @ a})
    for half in ("in", "gate"):
        ends = own[f"ff_{half}"]
        np.testing.assert_allclose(
            halves[f"ff.net.0.proj[{half}].weight"].T,
            ends["down"]["kernel"] @ ends["up"]["kernel"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rank, targets, match",
    [
        (0, lora.NETWORK_TARGETS, "give 1 to 8"), (9, lora.NETWORK_TARGETS, "give 1 to 8"),
        (2, ("attn3",), "matches none of the .* layers"), (2, ("(",), "no regular expression"),
    ],
)
def test_what_cannot_be_is_refused(rank, targets, match):
    with pytest.raises(UserError, match=match):
        lora.init(unet.param_shapes(SPEC), rank, KEY, targets)

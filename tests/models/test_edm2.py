"""EDM2 against its paper's equations on torch's layers, its printed sizes, and what it keeps."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import (
    attention,
    backbone,
    backbone_tables,
    cost,
    edm2,
    magnitude,
    width,
    zoo,
)
from ldm_scaling.parallel import gathering, rules
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import optimizer
from ldm_scaling.training import state as state_lib
from ldm_scaling.training import step as step_lib
from tests.models.peers import FAST

WHY = "compares with torch: pip install -e '.[parity]'"
SPEC = edm2.EDM2Spec(
    8, context_dim=6, channel_mults=(1, 2), attention_levels=(False, True), blocks_per_level=1,
    head_channels=4, sample_size=8, context_length=3,
)


def run(f, *args):
    """Compilation outweighs these small passes; the arithmetic stays the same."""
    return jax.tree.map(np.asarray, jax.jit(f).lower(*args).compile(compiler_options=FAST)(*args))


@functools.cache
def parameters(spec=SPEC):
    """Random everywhere, gains too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape) + (not s.shape), jnp.float32),
        edm2.param_shapes(spec),
    )


def inputs(height=8, width=8, batch=4, channels=4):
    rng = np.random.default_rng(1)
    x_BHWC = rng.standard_normal((batch, height, width, channels)).astype(np.float32)
    ctx_BLD = 3 * rng.standard_normal((batch, 3, 6)).astype(np.float32)
    return x_BHWC, np.linspace(998.75, 3.25, batch, dtype=np.float32), ctx_BLD


@functools.cache
def program():
    """The network of `SPEC`, compiled once: of parameters, x, t and ctx."""
    def denoise(params, x, t, ctx):
        return edm2.denoise_fn(SPEC)(params, x, t, {"context": ctx})

    return jax.jit(denoise).lower(parameters(), *inputs()).compile(compiler_options=FAST)


@functools.cache
def plain():
    return np.asarray(program()(parameters(), *inputs()))


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


# --- parity -----------------------------------------------------------------------------------


class Restated:
    """Config G of arXiv 2312.02696, channels first, of this package's parameters by name: weights
    as the paper has them, of magnitude 1."""

    def __init__(self, torch, params, channels, mults, head, attends, blocks):
        self.torch, self.params, self.head, self.blocks = torch, params, head, blocks
        self.c, self.mults, self.attends = channels, mults, attends

    def at(self, path):
        node = self.params
        for name in path.split("/"):
            node = node[name]
        return self.torch.from_numpy(np.array(node))

    def unit(self, y, dims):  # algorithm 1
        size = math.prod(y.shape[d] for d in dims)
        return y / (1e-4 + y.square().sum(dims, keepdim=True).sqrt() / math.sqrt(size))

    def layer(self, path, x):
        """Equation 47, on a linear layer or on a convolution."""
        w = self.at(f"{path}/kernel")
        w = w.permute(3, 2, 0, 1) if w.ndim == 4 else w.T
        fan_in = w[0].numel()
        w = self.unit(w * math.sqrt(fan_in), tuple(range(1, w.ndim))) / math.sqrt(fan_in)
        if x.ndim == 2:
            return x @ w.T
        w = w if w.ndim == 4 else w[:, :, None, None]
        return self.torch.nn.functional.conv2d(x, w, padding=w.shape[-1] // 2)

    def silu(self, x):  # equation 81
        return x * self.torch.sigmoid(x) / 0.596

    def sum(self, a, b, t):  # equation 88
        return self.torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)

    def cat(self, a, b, t=0.5):  # equation 103
        m, n = a.shape[1], b.shape[1]
        rate = math.sqrt((m + n) / ((1 - t) ** 2 + t**2))
        return self.torch.cat(
            [a * rate * (1 - t) / math.sqrt(m), b * rate * t / math.sqrt(n)], dim=1
        )

    def block(self, name, x, emb, encoder, resample="", attends=False):
        F = self.torch.nn.functional
        if resample == "down":
            x = F.avg_pool2d(x, 2)
        if resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        skips = "conv_shortcut" in self.params[name]
        if encoder:
            x = self.unit(self.layer(f"{name}/conv_shortcut", x) if skips else x, (1,))
        y = self.layer(f"{name}/conv1", self.silu(x))
        told = self.layer(f"{name}/time_emb_proj", emb) * self.at(f"{name}/gain") + 1
        y = self.layer(f"{name}/conv2", self.silu(y * told[:, :, None, None]))
        if not encoder and skips:
            x = self.layer(f"{name}/conv_shortcut", x)
        x = self.sum(x, y, 0.3)
        if attends:
            b, c, h, w = x.shape
            q, k, v = (
                self.unit(
                    self.layer(f"{name}/attn1/{p}", x).reshape(b, c // self.head, self.head, h * w),
                    (2,),
                ) for p in ("to_q", "to_k", "to_v")
            )
            logits = self.torch.einsum("nhcq,nhck->nhqk", q, k) / math.sqrt(self.head)
            y = self.torch.einsum("nhqk,nhck->nhcq", logits.softmax(-1), v).reshape(b, c, h, w)
            x = self.sum(x, self.layer(f"{name}/attn1/to_out", y), 0.3)
        return x.clip(-256, 256)

    def __call__(self, x, noise, classes):
        """x (B, C, H, W), EDM2's noise label (B,), classes (B, N)."""
        torch = self.torch
        frequencies, phases = map(torch.from_numpy, edm2.waves(self.c))
        features = torch.cos(torch.outer(noise, frequencies) + phases) * math.sqrt(2)  # equation 75
        emb = self.layer("time_embedding", features)
        told = self.layer("text_embedding", classes * math.sqrt(classes.shape[1]))
        emb = self.silu(self.sum(emb, told, 0.5))
        x = self.layer("conv_in", torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips, last = [x], len(self.mults) - 1
        for i in range(last + 1):
            if i > 0:
                x = self.block(f"down_{i}_downsample", x, emb, True, "down")
                skips.append(x)
            for j in range(self.blocks):
                x = self.block(f"down_{i}_block_{j}", x, emb, True, attends=self.attends[i])
                skips.append(x)
        x = self.block("mid_block_0", x, emb, False, attends=True)
        x = self.block("mid_block_1", x, emb, False)
        for i in range(last, -1, -1):
            if i < last:
                x = self.block(f"up_{i}_upsample", x, emb, False, "up")
            for j in range(self.blocks + 1):
                x = self.cat(x, skips.pop())
                x = self.block(f"up_{i}_block_{j}", x, emb, False, attends=self.attends[i])
        assert not skips
        return self.layer("conv_out", x) * self.at("gain")


def test_equals_the_papers_equations():
    """Class-conditional, on latents that are not square, with weights of all magnitudes; times are
    told as sigmas even in their logarithm."""
    torch = pytest.importorskip("torch", reason=WHY)
    torch.set_num_threads(1)
    spec = dataclasses.replace(SPEC, context_length=1)
    params = parameters(spec)
    x, t, _ = inputs(8, 12)
    classes = np.eye(6, dtype=np.float32)[[3, 0, 5, 1]]
    got = run(edm2.denoise_fn(spec), params, x, t, {"context": classes[:, None]})

    sigma = 0.002 * (80 / 0.002) ** (t.astype(np.float64) / 1000)
    noise = torch.from_numpy((np.log(sigma / 0.002) / 4).astype(np.float32))
    model = Restated(torch, params, 8, (1, 2), 4, (False, True), 1)
    want = model(torch.from_numpy(x).permute(0, 3, 1, 2), noise, torch.from_numpy(classes))
    want = want.permute(0, 2, 3, 1).numpy()
    assert np.std(want) > 0.1 and np.std(want[0] - want[1]) > 0.1
    close(got, want, 3e-5)


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, printed, gmacs", [
    ("edm2_xs", "124.7", 46), ("edm2_s", "280.2", 102), ("edm2_m", "497.8", 181),
    ("edm2_l", "777.5", 282), ("edm2_xl", "1119.3", 406), ("edm2_xxl", "1523.2", 552),
])
def test_printed_sizes(name, printed, gmacs):
    """Parameters to the digit; multiply-adds, with taps on padding, of each kernel at its level's
    sides and of attention's two products, to a fiftieth or so."""
    row = backbone_tables.PRINTED_EDM2[name]
    assert (f"{row.params:.1f}", row.gmacs) == (printed, gmacs)
    count = total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(edm2.param_shapes(row.spec)):
        path, size = rules.path_name(path), math.prod(leaf.shape)
        level = re.match(r"(?:down|up)_(\d)_", path)
        level = int(level[1]) if level else 3 * path.startswith("mid")
        pixels = 1 if "emb" in path else (64 // 2**level) ** 2
        count += size
        if path.endswith("kernel"):
            total += size * pixels
        if path.endswith("to_q/kernel"):
            total += 2 * pixels**2 * leaf.shape[-1]
    assert f"{count / 1e6:.1f}" == printed
    assert total / 1e9 == pytest.approx(gmacs, rel=0.025)


def test_flops_are_twice_the_multiply_adds():
    """But for padding's taps, of which a side of 8 has a sixth."""
    row = backbone_tables.PRINTED_EDM2["edm2_xs"]
    assert 0.93 < cost.gflops(row.spec) / (2 * row.gmacs) < 0.97


def test_members_for_cpus_cost_about_what_the_unets_do():
    small = [b for b in backbone_tables.SMALL if b.name.startswith("edm2_")]
    assert len(small) == 5
    for b, unet in ((small[0], "c8"), (small[-1], "c32")):
        assert cost.gflops(b.spec) == pytest.approx(cost.gflops(zoo.get(unet).spec), rel=0.2)
        assert zoo.family_of(b.name) == zoo.family_of(b.name + "_s16") == "edm2"


# --- magnitudes -------------------------------------------------------------------------------


def test_operations_keep_magnitudes():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((4, 64, 64, n)).astype(np.float32) for n in (6, 10))
    for y in (
        magnitude.silu(a), magnitude.mix(a, a[::-1], 0.3), magnitude.join(a, b, 0.5),
        magnitude.normalise(7.0 * a + 2.0), edm2.time_features(np.arange(1000.0), 512),
    ):
        assert np.mean(np.square(y)) == pytest.approx(1.0, abs=0.03)
    joined = np.asarray(magnitude.join(a, b, 0.5))  # Each part weighs the same.
    assert np.sum(joined[..., :6] ** 2) == pytest.approx(np.sum(joined[..., 6:] ** 2), rel=0.02)


def test_blocks_keep_magnitudes():
    """At random weights, all ten: what attention averages and padding cuts is little of it."""
    spec = dataclasses.replace(SPEC, base_channels=32, head_channels=16)
    params = jax.tree.map(lambda w: w if w.shape else 0.0 * w, parameters(spec))  # gains: none yet
    x, t, ctx = inputs(32, 32, batch=2)

    def forward(params):
        return edm2.EDM2(spec).apply(
            {"params": params}, x, t, ctx, capture_intermediates=lambda m, _: True
        )

    out, state = run(forward, params)
    assert not np.any(out)
    found = {
        name: np.sqrt(np.mean(np.square(part["__call__"][0])))
        for name, part in state["intermediates"].items() if name != "__call__"
    }
    assert sum("block" in name or "sample" in name for name in found) == 10
    assert all(0.75 < m < 1.3 for m in found.values()), found
    assert 0.9 < np.mean(list(found.values())) < 1.1


def test_weights_magnitudes_do_not_matter():
    params = jax.tree.map(lambda w: 3.0 * w if w.ndim else w, parameters())
    x, t, ctx = inputs()
    close(program()(params, x, t, 5.0 * ctx), plain(), 2e-3)


# --- its training -----------------------------------------------------------------------------


def test_steps_turn_weights_as_the_papers_code_does():
    """Adam at one rate for weights of magnitude 1 that are set back to it before each pass, as the
    authors' layer does it, against ours by fan-in at unit norm: the same weights and gain."""
    torch = pytest.importorskip("torch", reason=WHY)
    alpha, betas, rng = 0.1, (0.9, 0.99), np.random.default_rng(3)
    drawn = {"one": rng.normal(size=(12, 8)), "two": rng.normal(size=(8, 3))}
    x, y = rng.normal(size=(10, 16, 12)), 5 * rng.normal(size=(10, 16, 3))

    kernels = [torch.nn.Parameter(torch.tensor(drawn[k].T)) for k in drawn]
    gain = torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64))
    adam = torch.optim.Adam([*kernels, gain], lr=alpha, betas=betas)

    def magnitude_1(w):
        return w / (1e-4 + w.square().mean(1, keepdim=True).sqrt())

    for step in range(10):
        h = torch.tensor(x[step])
        for k, w in enumerate(kernels):
            with torch.no_grad():
                w.copy_(magnitude_1(w))
            h = h @ (magnitude_1(w) / math.sqrt(w.shape[1])).T
            h = h if k else torch.tanh(h)
        loss = (h * gain + 1 - torch.tensor(y[step])).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    want = {k: np.array((w / w.norm(dim=1, keepdim=True)).detach()).T
            for k, w in zip(drawn, kernels)}

    def loss_of(params, batch, key):
        dense = magnitude.of_unit_norm(jnp.matmul)
        h = dense(jnp.tanh(dense(batch["x"], params["one"]["kernel"])), params["two"]["kernel"])
        return jnp.mean((h * params["gain"] + 1 - batch["y"]) ** 2), {}

    run = Train(learning_rate=alpha, warmup_steps=0, beta1=betas[0], beta2=betas[1],
                clip_norm=1e9, ema_decay=0.5, ema_ramp=False)
    own = {name: {"kernel": jnp.asarray(w, jnp.float32)} for name, w in drawn.items()}
    params = edm2.project(own | {"gain": jnp.zeros(())})
    rates = {k: {"kernel": len(w) ** -0.5} for k, w in drawn.items()} | {"gain": 1.0}
    made = optimizer.make(run, rates)
    one = jax.jit(functools.partial(
        step_lib.train_step, loss=loss_of, config=run, optimizer=made, project=edm2.project))
    state = state_lib.create(params, made)
    average = params
    for step in range(10):
        batch = {"x": np.float32(x[step]), "y": np.float32(y[step])}
        state, _ = one(state, batch, jax.random.key(0))
        average = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, average, state.params)
    for name, w in want.items():
        got = np.asarray(state.params[name]["kernel"])
        np.testing.assert_allclose(np.linalg.norm(got, axis=0), 1.0, atol=2e-4)
        np.testing.assert_allclose(got, w, atol=5e-4)
    assert float(state.params["gain"]) == pytest.approx(gain.item(), abs=5e-4) and gain.item() != 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.ema, average)


def test_rates_are_one_alpha_over_the_root_of_the_fan_in():
    """And such that all kernels together move as far as at rates of 1."""
    spec = dataclasses.replace(SPEC.grown(2), guidance_dim=12)
    shapes, rates = (
        {rules.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (edm2.param_shapes(spec), edm2.rates(spec))
    )
    plain = {"conv_condition/kernel", "guidance_embedding/kernel"}
    kernels = {k for k in shapes if k.endswith("kernel")} - plain
    alphas = {rates[k] * math.sqrt(math.prod(shapes[k].shape[:-1])) for k in kernels}
    alphas |= {rates[k] for k in shapes if k.endswith("gain")}
    assert max(alphas) == pytest.approx(min(alphas)) and {rates[k] for k in plain} == {1.0}
    moved = sum(rates[k] ** 2 * shapes[k].size for k in kernels)
    assert moved == pytest.approx(sum(shapes[k].size for k in kernels))


def test_kernels_keep_unit_norm_on_every_mesh():
    """Sharded as the rules say; gains and plain layers are left alone."""
    spec = dataclasses.replace(SPEC.grown(2), guidance_dim=12)
    params, shapes = parameters(spec), edm2.param_shapes(spec)
    mesh = mesh_lib.make(1, 4, 2)
    shardings = rules.shardings(shapes, mesh)
    project = jax.jit(edm2.project, in_shardings=(shardings,), out_shardings=shardings)
    whole, parts = run(edm2.project, params), project(jax.device_put(params, shardings))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), whole, parts)
    for path, w in jax.tree_util.tree_leaves_with_path(parts):
        name, before = rules.path_name(path), params
        for key in path:
            before = before[key.key]
        if name.endswith("gain") or "condition" in name or "guidance" in name:
            np.testing.assert_array_equal(w, before)
        else:
            norms = np.sqrt(np.sum(np.square(w), axis=tuple(range(w.ndim - 1))))
            np.testing.assert_allclose(norms, 1.0, atol=1e-3)
    close(program()(edm2.project(parameters()), *inputs()), plain(), 1e-3)


def test_width_transfer_is_the_papers_rule():
    """Its published rates, by width, and the same norms at any: nothing is drawn otherwise."""
    published = {64: 0.0170, 128: 0.0120, 256: 0.0090, 448: 0.0065}
    base = dataclasses.replace(SPEC, base_channels=128)
    for channels, rate in published.items():
        found = width.mup(dataclasses.replace(base, base_channels=channels), base)
        assert found.rates["gain"] / width.mup(base, base).rates["gain"] == pytest.approx(
            rate / published[128], rel=0.07)
        assert set(jax.tree.leaves(found.draws)) == {1.0}
    assert width.mup(base, base).rates == backbone.rates(base)
    wide = width.mup(dataclasses.replace(base, base_channels=512), base).rates
    times = jax.tree.map(lambda a, b: a / b, wide, backbone.rates(base))
    assert times["down_0_block_0"]["conv1"]["kernel"] == pytest.approx(1 / 4)
    assert times["conv_out"]["kernel"] == pytest.approx(1 / 4)
    assert times["conv_in"]["kernel"] == times["text_embedding"]["kernel"] == pytest.approx(1 / 2)


# --- as the other backbones -------------------------------------------------------------------


def test_every_input_matters_and_examples_stay_apart():
    params, args = parameters(), inputs()
    assert plain().shape == (4, 8, 8, 4) and plain().dtype == np.float32 and np.std(plain()) > 0.1
    for i in range(3):
        changed = [a.copy() for a in args]
        changed[i][1] += 50.0 if i == 1 else 0.5
        out = np.asarray(program()(params, *changed))
        close(out[0], plain()[0])
        assert np.max(np.abs(out[1] - plain()[1])) > 1e-3


def test_what_is_grown_gives_what_it_gave_until_it_learns():
    """Twice, and by the one set of functions."""
    (x, t, ctx), more = inputs(), dataclasses.replace(SPEC.grown(2).grown(1), guidance_dim=12)
    grown = backbone.grow_input(SPEC, backbone.grow_input(SPEC, parameters(), 2), 1)
    grown = backbone.grow_guidance(more, grown, 12)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), grown) == jax.tree.map(
        lambda a: (a.shape, a.dtype), backbone.param_shapes(more)
    )
    cond = {
        "context": ctx, "condition": inputs(channels=3)[0],
        "guidance": np.array([1.0, 2.0, 7.5, 14.0], np.float32),
    }
    close(run(backbone.denoise_fn(more), grown, x, t, cond), plain(), 1e-6)
    with pytest.raises(UserError, match="guidance_dim=12 needs each sample's"):
        jax.eval_shape(edm2.EDM2(more).apply, {"params": grown}, x, t, ctx)
    with pytest.raises(UserError, match="guidance_dim=0 knows no"):
        jax.eval_shape(edm2.EDM2(SPEC).apply, {"params": parameters()}, x, t, ctx, t)


def test_remat_changes_neither_output_nor_gradient():
    """And every parameter has a gradient."""
    spec = dataclasses.replace(SPEC, channel_mults=(2,), attention_levels=(True,))
    x, t, ctx = inputs(4, 4, batch=2)
    results = []
    for remat in ("none", "block"):
        denoise = edm2.denoise_fn(spec, remat=remat)

        def loss(params, denoise=denoise):
            out = denoise(params, x, t, {"context": ctx})
            return jnp.sum(jnp.sin(out)), out

        results.append(run(jax.value_and_grad(loss, has_aux=True), parameters(spec)))
    ((_, out), grads), ((_, out_remat), grads_remat) = results
    close(out_remat, out)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale),
        grads_remat, grads,
    )
    with pytest.raises(UserError, match="remat='all'"):
        jax.eval_shape(
            edm2.denoise_fn(SPEC, remat="all"), parameters(), x, t, {"context": ctx}
        )


def test_shards_and_forms_of_attention_give_the_same():
    """Over data, shards and tensor: norms are of whole kernels."""
    (x, t, ctx), shapes = inputs(), edm2.param_shapes(SPEC)
    mesh = mesh_lib.make(1, 2, 2, devices=jax.devices()[:4])

    def make(gather, apart):
        return edm2.denoise_fn(SPEC, attention=attention.chunked, gather=gather)

    shared = jax.device_put(parameters(), rules.shardings(shapes, mesh))
    close(run(gathering.spread(make, shapes, mesh), shared, x, t, {"context": ctx}), plain())


def test_bfloat16_returns_float32_nearby():
    x, t, ctx = inputs()
    rough = run(edm2.denoise_fn(SPEC, jnp.bfloat16), parameters(), x, t, {"context": ctx})
    assert rough.dtype == np.float32
    assert 0 < np.std(rough - plain()) < 0.05 * np.std(plain())


@pytest.mark.parametrize("change, says", [
    ({"blocks_per_level": 0}, "EDM2 blocks_per_level=0: give a whole number"),
    ({"head_channels": 3}, r"EDM2 width 16 \(= 8 x 2\) must be a multiple of head_channels=3"),
    ({"attention_levels": (True,)}, "need the same number of levels"),
    ({"sample_size": 9}, "EDM2 sample_size=9 must halve 1 times"),
    ({"in_channels": 3}, "EDM2 in_channels=3 must be at least out_channels=4"),
    ({"guidance_dim": 2}, "EDM2 guidance_dim=2: give 0, or an even number"),
])
def test_what_does_not_fit_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        dataclasses.replace(SPEC, **change)


def test_sides_that_do_not_halve():
    x, t, ctx = inputs(8, 7)
    with pytest.raises(UserError, match="latents of 8 x 7: give sides that are multiples of 2"):
        jax.eval_shape(edm2.denoise_fn(SPEC), parameters(), x, t, {"context": ctx})

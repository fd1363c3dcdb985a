"""Width transfer: features move alike at all widths, where otherwise wide networks' move more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, width, zoo
from ldm_scaling.models.dit import DiT, DiTSpec
from ldm_scaling.models.mmdit import MMDiTSpec
from ldm_scaling.models.unet import UNet, UNetSpec
from ldm_scaling.models.uvit import UViTSpec
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel.rules import path_name
from ldm_scaling.training import optimizer, step

REASON = "needs peers: pip install -e '.[parity]' and requirements-peers.txt"


def unet(c):
    return UNetSpec(
        c, context_dim=8, channel_mults=(1,), attention_levels=(False,), blocks_per_level=1,
        heads=2, groups=4, sample_size=4, context_length=3,
    )


def dit(d, **kw):
    return DiTSpec(d, 1, 2, context_dim=8, sample_size=4, context_length=3, **kw)


def uvit(d):
    return UViTSpec(d, 3, 2, context_dim=8, sample_size=4, context_length=3)


def mmdit(depth, head_width=8):
    return MMDiTSpec(depth, head_width, context_dim=8, sample_size=4, context_length=3)


def leaves(tree):
    return {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- the coordinate check ---


def moved(module, spec, base, steps=4, rate=2e-3):
    """How far each layer's output moves in a few steps, the root of its mean square; in the
    standard parametrisation and against a base."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8, 4, 4, 4)).astype(np.float32)
    t, ctx = np.linspace(10, 900, 8), rng.normal(size=(8, 3, 8)).astype(np.float32)
    run = Train(learning_rate=rate, warmup_steps=0)

    def loss(params):
        out, seen = module(spec).apply(
            {"params": params}, x, t, ctx, capture_intermediates=True, mutable=["intermediates"]
        )
        return jnp.mean((out - y) ** 2), seen["intermediates"]

    @jax.jit
    def take(params, state, rates):
        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.make(run, rates).update(grads, state, params)
        return optax.apply_updates(params, updates), state, seen

    transfer = width.mup(spec, base)
    first = jax.jit(lambda: backbone.init(spec, jax.random.key(0)))()
    ones = jax.tree.map(lambda _: 1.0, first)
    found = []
    for params, rates in ((first, ones), (transfer.drawn(first), transfer.rates or ones)):
        state, seen = optimizer.make(run).init(params), []
        for _ in range(steps + 1):
            params, state, features = take(params, state, rates)
            seen.append(features)
        change = jax.tree.map(lambda a, b: jnp.sqrt(jnp.mean((a - b) ** 2)), seen[-1], seen[0])
        found.append(leaves(change))
    return found


@pytest.mark.parametrize("make, module, widths", [
    (unet, UNet, (8, 32, 128)), (dit, DiT, (16, 64, 256)),
])
def test_coordinates(make, module, widths):
    runs = [moved(module, make(w), make(widths[0])) for w in widths]
    standard, transferred = (
        {
            name: np.polyfit(np.log(widths), np.log([run[k][name] for run in runs]), 1)[0]
            for name in runs[0][k]
        } for k in range(2)
    )
    # Of logits' two sides the queries carry the factor that keeps their product as it is.
    names = [name for name in standard if "to_q" not in name]
    grows = np.array([standard[name] for name in names])
    flat = np.array([transferred[name] for name in names])
    # Exponents of width. What is averaged out at large widths shrinks a little; nothing grows.
    assert np.median(grows) > 0.3 and np.percentile(grows, 90) > 0.5
    assert abs(np.median(flat)) < 0.2 and max(flat) < 0.15
    for name, standard_move in runs[0][0].items():  # At the base both are one.
        assert standard_move == runs[0][1][name]


# --- the factors ---


@pytest.mark.parametrize("make, sizes", [
    (unet, (8, 32)), (dit, (16, 48)), (uvit, (16, 64)), (mmdit, (2, 6)),
])
def test_the_base_is_as_it_was(make, sizes):
    for size in sizes:
        spec = make(size)
        same = width.mup(spec, dataclasses.replace(spec))
        assert same.rates is None and set(jax.tree.leaves(same.draws)) == {1.0}
        params = jax.eval_shape(lambda spec=spec: backbone.init(spec, jax.random.key(0)))
        assert same.drawn(params) == params  # nothing is multiplied
    there = width.mup(make(sizes[1]), make(sizes[0]))
    back = width.mup(make(sizes[0]), make(sizes[1]))
    far, near = leaves(there.rates), leaves(back.rates)
    for name in far.keys() & near.keys():  # MM-DiT's depths differ.
        np.testing.assert_allclose(far[name] * near[name], 1.0, rtol=1e-6, err_msg=name)


def test_weights_are_drawn_as_the_table_says():
    # Base width 32 and four times as wide: deviations against the base's, of what is drawn.
    base, spec = dit(32), dit(128)
    transfer = width.mup(spec, base)
    own, its = map(leaves, jax.jit(lambda: (
        transfer.drawn(backbone.init(spec, jax.random.key(1))),
        backbone.init(base, jax.random.key(2)),
    ))())
    for name, ratio in {
        "conv_in/kernel": 1.0, "text_1/kernel": 1.0, "time_embedding_1/kernel": 1.0,  # input
        "time_embedding_2/kernel": 0.5, "block_0/ff_in/kernel": 0.5, "block_0/ff_out/kernel": 0.5,
        "block_0/attn1/to_k/kernel": 0.5, "block_0/attn1/to_q/kernel": 0.25,
    }.items():
        assert np.std(own[name]) / np.std(its[name]) == pytest.approx(ratio, rel=0.06), name
    # Biases are as wide at every width, and move by the rate, also those that are not drawn as 0.
    rates = leaves(transfer.rates)
    for name in ("block_0/modulation/bias", "modulation_out/bias"):
        assert np.std(own[name]) / np.std(its[name]) == pytest.approx(1.0, rel=0.3), name
        assert np.std(own[name]) == pytest.approx(32**-0.5, rel=0.2) and rates[name] == 1.0
    for name in ("proj_out/kernel", "block_0/attn2/to_out/kernel"):
        assert not np.any(own[name])  # zeros stay


def test_what_a_unet_draws_as_zeros_stays_so_and_moves_as_else():
    own, base = (dataclasses.replace(unet(c), zero_init=True) for c in (32, 8))
    transfer, plain = width.mup(own, base), width.mup(unet(32), unet(8))
    assert leaves(transfer.rates) == leaves(plain.rates)
    key = jax.random.key(0, impl="rbg")
    drawn = leaves(jax.jit(lambda key: transfer.drawn(backbone.init(own, key)))(key))
    assert not any(np.any(drawn[name]) for name in
                   ("conv_out/kernel", "mid_attn/proj_out/kernel", "mid_res_0/conv2/kernel"))
    assert np.isfinite(drawn["conv_in/kernel"]).all() and np.any(drawn["mid_res_0/conv1/kernel"])


def test_logits_are_divided_by_the_width():
    # q k / root(W) at the base's width; q's factor makes it q k root(W0) / W at another.
    for c in (16, 64):
        rates = leaves(width.mup(unet(c), unet(8)).rates)
        queries, keys = (rates[f"mid_attn/block/attn1/to_{n}/kernel"] for n in "qk")
        scale, base_scale = (c / 2) ** -0.5, (8 / 2) ** -0.5
        assert scale * queries / keys == pytest.approx(base_scale * (8 / 2) / (c / 2))


def test_as_the_authors_package():
    mup = pytest.importorskip("mup", reason=REASON)
    torch = pytest.importorskip("torch", reason=REASON)
    spec, base = zoo.get("c32").spec, zoo.get("c8").spec
    transfer = width.mup(spec, base)

    def model(s):
        out = torch.nn.Module()
        for name, leaf in leaves(backbone.param_shapes(s)).items():
            # torch's order: what comes out first; taps of a convolution as they are.
            order = leaf.shape[::-1] if len(leaf.shape) < 4 else (
                leaf.shape[3], leaf.shape[2], *leaf.shape[:2])
            out.register_parameter(
                name.replace("/", "-"), torch.nn.Parameter(torch.zeros(order))
            )
        return out

    theirs = model(spec)
    mup.set_base_shapes(theirs, model(base), delta=model(zoo.get("c16").spec), rescale_params=False,
                        do_assert=False)
    groups = mup.MuAdamW(theirs.parameters(), lr=1.0, weight_decay=0.3).param_groups
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    decay = {id(p): g["lr"] * g["weight_decay"] for g in groups for p in g["params"]}
    for name, own in leaves(transfer.rates).items():
        their = theirs.get_parameter(name.replace("/", "-"))
        assert decay[id(their)] == pytest.approx(0.3)  # as `optimizer.make` keeps it
        if name == "conv_out/kernel" or "to_q" in name:
            continue  # They have factors in the network there.
        assert own == pytest.approx(rate[id(their)]), name

    # Their readout: what it multiplies features by, at first and after a step of Adam.
    readout, own = mup.MuReadout(32, 4, bias=False), torch.nn.Linear(32, 4, bias=False)
    own.weight.data.copy_(readout.weight.data)
    mup.set_base_shapes(readout, mup.MuReadout(8, 4, bias=False),
                        delta=mup.MuReadout(16, 4, bias=False))

    def acts():
        return readout(torch.eye(32)).detach().numpy().T

    first = acts()
    draws, rates = (leaves(tree)["conv_out/kernel"] for tree in (transfer.draws, transfer.rates))
    np.testing.assert_allclose(first, draws * own.weight.detach().numpy(), rtol=1e-5)
    adam = mup.MuAdamW(readout.parameters(), lr=1e-2, weight_decay=0.0)
    readout(torch.eye(32)).sum().backward()
    adam.step()
    np.testing.assert_allclose(first - acts(), rates * 1e-2, rtol=1e-3)


def test_the_optimiser_carries_the_same_and_decays_alike():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.full((3, 1), 2.0)}}
    grads = jax.tree.map(jnp.ones_like, params)
    run = Train(learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    rates = {"a": {"kernel": 1.0}, "b": {"kernel": 0.25}}
    plain, own = optimizer.make(run), optimizer.make(run, rates)
    before, after = (o.init(params) for o in (plain, own))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    (u, _), (v, _) = (o.update(grads, s, params) for o, s in ((plain, before), (own, after)))
    np.testing.assert_array_equal(u["a"]["kernel"], v["a"]["kernel"])
    decay = 0.1 * 0.5 * 2.0
    np.testing.assert_allclose(-u["b"]["kernel"] - decay, 0.1, rtol=1e-5)
    np.testing.assert_allclose(-v["b"]["kernel"] - decay, 0.025, rtol=1e-5)


def test_rates_on_sharded_parameters():
    params = {"a": {"kernel": np.ones((64, 512), np.float32)}, "b": {"bias": np.ones(8)}}
    rates = {"a": {"kernel": 0.125}, "b": {"bias": 1.0}}
    run = Train(steps=2, batch_size=8, learning_rate=0.1, warmup_steps=0)

    def loss(params, batch, key):
        y = batch @ params["a"]["kernel"]
        return jnp.mean(y**2) + jnp.sum(params["b"]["bias"] ** 2), {}

    def after(mesh):
        init = functools.partial(jax.tree.map, jnp.asarray, params)
        abstract = step.abstract_state(lambda key: init(), run, mesh)
        state = step.init_state(lambda key: init(), run, mesh, jax.random.key(0))
        train = step.make(loss, run, mesh, abstract, rates=rates)
        for _ in range(2):
            state, _ = train(state, np.ones((8, 64), np.float32), jax.random.key(1))
        return state.params

    one, many = after(mesh_lib.make(1, 1, devices=jax.devices()[:1])), after(mesh_lib.make(1, 8))
    assert not many["a"]["kernel"].sharding.is_fully_replicated
    for name, moves in (("a/kernel", 0.025), ("b/bias", 0.2)):
        np.testing.assert_allclose(leaves(many)[name], leaves(one)[name], rtol=1e-5)
        np.testing.assert_allclose(1 - leaves(one)[name], moves, rtol=0.1)


# --- what does not fit ---


@pytest.mark.parametrize("spec, base, told", [
    ("edm2_c14", "c8", "base_member is a U-Net, and a member is a EDM2"),
    ("c16", "dit_w40", "base_member is a DiT, and a member is a U-Net"),
    ("c16", "39m", "context_dim=1024"),
])
def test_refused(spec, base, told):
    with pytest.raises(UserError, match=told):
        width.mup(zoo.get(spec).spec, zoo.get(base).spec)


def test_heads_that_do_not_fit():
    with pytest.raises(UserError, match="head_width=8, and a member 16"):
        width.mup(mmdit(4, 16), mmdit(4, 8))
    levels = functools.partial(
        UNetSpec, context_dim=8, channel_mults=(1, 2), attention_levels=(True, True), groups=4,
        blocks_per_level=1, sample_size=4,
    )
    with pytest.raises(UserError, match="must grow alike"):
        width.mup(levels(16, heads=(2, 2)), levels(8, heads=(2, 4)))
    grown = width.mup(levels(16, heads=(2, 4)), levels(8, heads=(1, 2)))  # As SD v2: more heads.
    rates = leaves(grown.rates)
    assert rates["mid_attn/block/attn1/to_q/kernel"] == rates["mid_attn/block/attn1/to_k/kernel"]

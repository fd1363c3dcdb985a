"""A network of one's own, the one of docs/backbones.md: trained, sharded, costed and compared."""

import dataclasses
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest

from ldm_scaling import recipes
from ldm_scaling.config import Diffusion, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import backbone, cost, functional, zoo, zoo_table
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.parallel import rules
from ldm_scaling.study import families
from ldm_scaling.tasks import drawing, text_to_image
from ldm_scaling.training import step

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "backbones.md"


@pytest.fixture
def tables():
    """What is registered is taken back."""
    kept = [(table, dict(table))
            for table in (zoo.MEMBERS, zoo.FAMILIES, zoo.LABELS, backbone._KINDS)]
    added = list(rules._ADDED)
    yield
    for table, before in kept:
        table.clear()
        table.update(before)
    rules._ADDED[:] = added


@pytest.fixture
def mine(tables, monkeypatch):
    """The example's module."""
    text = DOCS.read_text().partition("## A network of your own")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len(code.splitlines()) <= 45
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)  # Dataclasses look there.
    exec(code, module.__dict__)
    return module


def trained(spec, mesh):
    """Losses of three steps."""
    train = Train(steps=3, batch_size=8, learning_rate=1e-2, warmup_steps=0)
    context = (spec.context_length, spec.context_dim)
    loss = text_to_image.loss_fn(
        drawing.denoiser(spec, mesh, "float32"), spec, train, Diffusion(), 1.0, np.zeros(context)
    )
    init, rng = backbone.initializer(spec), np.random.default_rng(0)
    abstract = step.abstract_state(init, train, mesh)
    state = step.init_state(init, train, mesh, jax.random.key(0))
    run = step.make(loss, train, mesh, abstract)
    latent = rng.normal(size=(8, *spec.latent_shape)).astype(np.float32)
    batch = jax.device_put(
        {"mean": latent, "logvar": 0 * latent, "context": rng.normal(size=(8, *context))},
        mesh_lib.batch_sharding(mesh),
    )
    key = jax.device_put(jax.random.key(1), mesh_lib.replicated(mesh))
    losses = []
    for _ in range(3):
        state, metrics = run(state, batch, key)
        losses.append(float(metrics["loss"]))
    return losses, state


def test_it_trains_alike_on_every_mesh(mine):
    """Plain Flax layers, whose shards are the compiler's."""
    spec = zoo.get("mine_8").spec
    want, _ = trained(spec, mesh_lib.make(devices=jax.devices()[:1]))
    got, state = trained(spec, mesh_lib.make(1, 2, 2, devices=jax.devices()[:4]))
    assert want[0] != want[1] and all(map(np.isfinite, want))
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert not state.params["Conv_0"]["kernel"].sharding.is_fully_replicated
    assert state.params["gamma"].sharding.is_fully_replicated


def test_an_output_or_a_condition_that_is_none_is_refused(mine):
    class Other(mine.Mine):
        def __call__(self, *inputs):
            return super().__call__(*inputs)[..., :1]

    spec = mine.MineSpec(8)
    x_BHWC, t_B, ctx_BLD = backbone.example_inputs(spec)
    init, _, denoise_fn = functional.of(Other)
    params = jax.eval_shape(lambda: init(spec, jax.random.key(0)))
    for cond, told in (
        ({"context": ctx_BLD}, r"Other gives \(1, 8, 8, 1\), .* give \(1, 8, 8, 4\)"),
        (ctx_BLD, r"cond is \w+: give a dict with .* context \(B, L, D\)"),
        ({"text": ctx_BLD}, r"cond is \['text'\]"),
    ):
        with pytest.raises(UserError, match=told):
            jax.eval_shape(denoise_fn(spec), params, x_BHWC, t_B, cond)


def test_it_is_a_member_of_a_family(mine):
    names = ["mine_8", "mine_16", "mine_32"]
    costs = zoo.norm_costs(names, "mine_32")
    assert costs["mine_8"] < costs["mine_16"] < costs["mine_32"] == 1
    assert [row["name"] for row in zoo_table.rows("mine")] == names
    assert families.parted(["mine_8", "c8"]) == {"U-Net": ["c8"], "Mine": ["mine_8"]}
    assert recipes.text_to_image("mine_8", "local").members == ("mine_8",)
    with pytest.raises(UserError, match="give grow_guidance to"):
        backbone.grow_guidance(zoo.get("mine_8").spec, {}, 4)


def test_its_steps_may_be_its_own(mine):
    """As EDM2's are."""
    held = dataclasses.make_dataclass("HeldSpec", [], bases=(mine.MineSpec,), frozen=True)
    backbone.register(held, mine.Mine, project=lambda params: 2 * params, rates=lambda spec: 3.0)
    assert (backbone.project(held(8))(4), backbone.rates(held(8))) == (8, 3.0)
    assert backbone.project(mine.MineSpec(8)) is None and not backbone.gathers(held(8))


def test_more_sizes_of_a_known_family(tables):
    zoo.register(zoo.Member("c8_mine", zoo.get("c8").spec, "c64"), family="unet")
    assert zoo.family_of("c8_mine") == "unet" and zoo.LABELS["unet"] == "U-Net"
    assert zoo_table.rows("unet")[-1]["name"] == "c8_mine"


def test_what_does_not_fit_is_refused(mine):
    spec, member = zoo.get("mine_8").spec, zoo.Member
    for members, kw, told in (
        ([member("c8", spec, "c64")], {"family": "mine"}, "called c8 already"),
        ([member("a", spec, "a"), member("a", spec, "a")], {"family": "mine"}, "called a already"),
        ([member("a", spec, "b")], {"family": "mine"}, "'b', which no network is called"),
        ([member("a", spec, "a")], {"family": "new"}, "a new family needs one"),
        ([member("a", spec, "a")], {"family": "mine", "label": "Own"}, "another keeps its own"),
        ([member("a", types.SimpleNamespace(), "a")], {"family": "mine"}, "frozen=True"),
    ):
        with pytest.raises(UserError, match=told):
            zoo.register(*members, **kw)
    assert zoo.family_of("a") == ""
    with pytest.raises(UserError, match="MineSpec has a network already"):
        backbone.register(mine.MineSpec, mine.Mine)
    del backbone._KINDS[mine.MineSpec]
    with pytest.raises(UserError, match="no network is known for a MineSpec: register it"):
        cost.of(mine.MineSpec(12))
    bare = dataclasses.make_dataclass("Bare", [("heads", tuple)], frozen=True)
    with pytest.raises(UserError, match="Bare lacks base_channels, .*guidance_dim, grown, see"):
        zoo.register(member("a", bare(()), "a"), family="mine")


def test_without_a_rule_the_parameter_is_named(mine):
    rules._ADDED.clear()
    with pytest.raises(UserError, match=r'1 parameters: /gamma \(8,\); .*add\(\(r"/gamma\$", \('):
        rules.specs(backbone.param_shapes(zoo.get("mine_8").spec))

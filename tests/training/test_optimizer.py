"""The learning rate and the average's decay over a run."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_scaling.config import FineTune, Study, Train, named
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, backbone, zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import optimizer, step
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]


def rates(**settings):
    run = Train(steps=100, learning_rate=2.0, **settings)
    return np.array([float(optimizer.learning_rate(run)(n)) for n in range(run.steps + 1)])


def test_the_rate_rises_and_stays_or_falls_to_nothing_at_the_end():
    stays, falls = rates(warmup_steps=20), rates(warmup_steps=20, learning_rate_decay="linear")
    np.testing.assert_allclose(stays[:21], falls[:21], rtol=1e-6)
    np.testing.assert_allclose(stays[:21], np.linspace(0, 2, 21), rtol=1e-6)
    assert (stays[20:] == 2.0).all()
    # No step is taken at 100: the last one, number 99, still learns.
    np.testing.assert_allclose(falls[20:], np.linspace(2, 0, 81), rtol=1e-5, atol=1e-6)
    at_once = rates(warmup_steps=0, learning_rate_decay="linear")
    np.testing.assert_allclose(at_once, np.linspace(2, 0, 101), rtol=1e-5, atol=1e-6)


def test_a_rate_that_is_never_reached_is_refused():
    for decay in ("none", "linear"):
        with pytest.raises(UserError, match="warmup_steps=10: below steps=10, or training ends"):
            Train(steps=10, warmup_steps=10, learning_rate_decay=decay)
    shortest = Train(steps=11, warmup_steps=10, learning_rate=2.0)
    assert float(optimizer.learning_rate(shortest)(shortest.steps - 1)) == 2.0  # its last step's
    with pytest.raises(UserError, match="unknown train.learning_rate_decay 'cosin', did you mean"):
        Train(learning_rate_decay="cosin")
    for decay, told in (
        ("wsd:share=0.9", "the last 90 of steps=100 .* none of warmup_steps=20"),
        ("wsd:share=0.001", "the last 0 of steps=100"),
        ("wsd:share=1.5", "between 0 and 1"),
        ("inverse_sqrt", "after=70000: not within warmup_steps=20, and before steps=100"),
        ("inverse_sqrt:after=10", "after=10: not within warmup_steps=20"),
    ):
        with pytest.raises(UserError, match=told):
            rates(warmup_steps=20, learning_rate_decay=decay)


def test_every_decay_rises_alike_and_falls_as_published():
    """Curves at their defining points, after the same warm-up."""
    stays = rates(warmup_steps=20)
    found = {
        name: rates(warmup_steps=20, learning_rate_decay=decay) for name, decay in {
            "cosine": "cosine", "wsd": "wsd", "straight": "wsd:share=0.4,power=1",
            "inverse_sqrt": "inverse_sqrt:after=25",
        }.items()
    }
    for curve in found.values():
        np.testing.assert_allclose(curve[:21], stays[:21], rtol=1e-6)
        assert (np.diff(curve[20:]) <= 0).all()
    # Half of the cosine lies behind halfway, and a third of the angle is half of the way down.
    np.testing.assert_allclose(found["cosine"][[60, 100]], [1.0, 0.0], atol=1e-6)
    assert found["cosine"][20 + 80 // 4] == pytest.approx(1 + np.cos(np.pi / 4))
    # Stable, then Haegele et al.'s 1 - sqrt: half of it is lost in a quarter of the cooldown.
    assert (found["wsd"][20:81] == 2.0).all() and found["wsd"][100] == 0.0
    assert found["wsd"][85] == pytest.approx(1.0)
    np.testing.assert_allclose(found["straight"][60:], np.linspace(2, 0, 41), atol=1e-6)
    # Four times the reference's steps, half of its rate.
    assert (found["inverse_sqrt"][20:26] == 2.0).all()
    assert found["inverse_sqrt"][100] == pytest.approx(1.0)
    # A run of a cooldown alone.
    np.testing.assert_allclose(
        rates(warmup_steps=0, learning_rate_decay="wsd:share=1,power=1"), np.linspace(2, 0, 101),
        atol=1e-6,
    )


@pytest.mark.parametrize("heading, known", [
    ("decay", named.DECAYS), ("optimiser", named.OPTIMIZERS),
])
def test_the_tables_of_the_docs_are_all_there_are(heading, known):
    text = (ROOT / "docs" / "training.md").read_text().split(f"| {heading} | options |")[1]
    rows = [line.split("|") for line in text.split("\n\n")[0].splitlines()[2:]]
    listed = {}
    for _, name, options, *_ in rows:
        pairs = (pair.split("=") for pair in re.findall(r"`([^`]*)`", options))
        listed[name.strip(" `")] = {option: float(value) for option, value in pairs}
    assert listed == {
        name: {option: has.default for option, has in one.options.items()}
        for name, one in known.items()
    }


def test_what_is_carried_lies_on_the_mesh_as_parameters_do():
    mesh = mesh_lib.make(1, 8)
    for name in optimizer.OPTIMIZERS:
        config = Train(batch_size=16, optimizer=name, moment_dtype="bfloat16")
        abstract = step.abstract_state(toy.init, config, mesh)
        want = {p.shape: p.sharding for p in jax.tree.leaves(abstract.params)}
        assert not want[8, 8].is_fully_replicated
        carried = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
        assert carried and all(leaf.sharding == want[leaf.shape] for leaf in carried)
        moments = [leaf for leaf in carried if leaf.dtype == jnp.bfloat16]
        assert len(moments) == len(want)


@pytest.mark.parametrize("name, theirs", [
    ("adamw", lambda rate: optax.adamw(rate, 0.8, 0.9, 1e-3, weight_decay=0.1)),
    ("lion", lambda rate: optax.lion(rate, 0.8, 0.9, weight_decay=0.1)),
])
def test_optimisers_step_as_optaxs_own(name, theirs):
    params = {"layer": {"kernel": jnp.ones((4, 4))}}  # All of it decays.
    options = ":eps=0.001" if name == "adamw" else ""
    config = Train(steps=9, warmup_steps=0, learning_rate=0.5, beta1=0.8, beta2=0.9, clip_norm=1e9,
                   weight_decay=0.1, optimizer=name + options)
    made, peer = optimizer.make(config), theirs(0.5)
    state, peers = made.init(params), peer.init(params)
    # The standard parametrisation's rates are 1: the same steps by the other way.
    scaled = optimizer.make(config, jax.tree.map(lambda _: 1.0, params))
    for n in range(3):
        grads = {"layer": {"kernel": jax.random.normal(jax.random.key(n), (4, 4))}}
        again, _ = scaled.update(grads, state, params)
        step, state = made.update(grads, state, params)
        want, peers = peer.update(grads, peers, params)
        for found in (step, again):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, want)


def test_parameters_may_be_slower_or_stay():
    """By the first expression that is found; decay too. What finds none is told."""
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    config = Train(steps=9, warmup_steps=0, weight_decay=0.1)
    named = dataclasses.replace(config, rate_factors=("a/kernel$=0", "^a=0.5"))
    found = []
    for run in (config, named):
        made = optimizer.make(run)
        grads = jax.tree.map(jnp.ones_like, params)
        found.append(made.update(grads, made.init(params), params)[0])
    plain, slow = found
    np.testing.assert_array_equal(slow["a"]["kernel"], 0)
    np.testing.assert_allclose(slow["a"]["bias"], plain["a"]["bias"] / 2)
    np.testing.assert_array_equal(slow["b"]["kernel"], plain["b"]["kernel"])
    for factors, told in (
        (("b=0", "c=1"), "c=1: no parameter is left for it: .* paths such as a/bias"),
        (("a=0", "kernel=1", "b=1"), "b=1: no parameter is left"),
    ):
        with pytest.raises(UserError, match=told):
            optimizer.make(dataclasses.replace(config, rate_factors=factors)).init(params)
    for wrong in ("a", "a=", "=1", "a=-1", "a=nan", "(=1"):
        with pytest.raises(UserError, match="train.rate_factors=.* write REGEX=FACTOR"):
            Train(rate_factors=(wrong,))


def test_an_optimiser_and_a_decay_of_ones_own(monkeypatch):
    monkeypatch.setitem(optimizer.OPTIMIZERS, "sgd", named.Named(
        lambda config, momentum: optax.trace(momentum), {"momentum": named.Option(0.9, -1.0, 1.0)}
    ))
    monkeypatch.setitem(optimizer.DECAYS, "half", named.Named(
        lambda config: optax.constant_schedule(config.learning_rate / 2)
    ))
    config = Train(steps=9, warmup_steps=0, learning_rate=2.0, weight_decay=0.0, clip_norm=1e9,
                   optimizer="sgd:momentum=0", learning_rate_decay="half")
    params = {"kernel": jnp.ones(3)}
    made = optimizer.make(config)
    step, _ = made.update({"kernel": jnp.full(3, 0.25)}, made.init(params), params)
    np.testing.assert_allclose(step["kernel"], -0.25)
    with pytest.raises(UserError, match="unknown train.optimizer 'lyon', did you mean 'lion'"):
        Train(optimizer="lyon")


def test_a_run_that_starts_from_trained_parameters_needs_no_short_average():
    run = Train(ema_decay=0.9)
    assert float(optimizer.ema_decay(run, jnp.int32(0))) == pytest.approx(0.1)
    assert float(optimizer.ema_decay(run, jnp.int32(1000))) == pytest.approx(0.9)
    assert optimizer.ema_decay(Train(ema_decay=0.9, ema_ramp=False), jnp.int32(0)) == 0.9


def test_what_came_later_changes_no_hash_at_its_neutral_value():
    """A workdir and a fine-tuned run are what they were before there was a falling rate."""
    names = {"learning_rate_decay", "ema_ramp", "optimizer", "rate_factors"}
    assert not names & set(Study().identity()["train"])
    falls = {"train": Train(steps=200_000, learning_rate_decay="linear")}
    assert names & set(Study(**falls).identity()["train"]) == {"learning_rate_decay"}
    # A fine-tuning may be made longer, unless its rate falls to its end.
    long, longer = (Train(steps=n, caption_dropout=0.0) for n in (20_000, 30_000))
    tunes = [FineTune(task="deblurring", train=run).hash for run in (long, longer)]
    assert tunes[0] == tunes[1]
    fall = [FineTune(task="deblurring", train=Train(steps=n, learning_rate_decay="linear")).hash
            for n in (20_000, 30_000)]
    assert len({*tunes, *fall}) == 3
    # Not so where it falls by the steps taken; and one spelling is one identity.
    slow = [FineTune(task="deblurring", train=Train(
        steps=n, learning_rate_decay="inverse_sqrt:after=15_000")).hash for n in (20_000, 30_000)]
    assert slow[0] == slow[1] and slow[0] not in tunes
    assert Train(learning_rate_decay="wsd:share=0.20,power=0.5") == Train(learning_rate_decay="wsd")


def test_weight_decay_is_for_kernels_and_what_else_multiplies():
    """Of the project's own networks for kernels alone, as it always was; lists have no names."""
    for shapes in (
        *(backbone.param_shapes(zoo.get(m).spec)
          for m in ("c8", "dit_w40", "uvit_w32", "mmdit_d5", "edm2_c14")),
        jax.eval_shape(lambda: autoencoder.init(autoencoder.AutoencoderSpec(), jax.random.key(0))),
    ):
        decays = optimizer.decays(shapes)
        for path, decay in jax.tree_util.tree_leaves_with_path(decays):
            assert decay == (path[-1].key == "kernel"), path
    own = {"w": jnp.ones((2, 3)), "gamma": jnp.ones(3), "layers": [jnp.ones((3, 3)), jnp.ones(3)]}
    assert optimizer.decays(own) == {"w": True, "gamma": False, "layers": [True, False]}
    made = optimizer.make(Train(warmup_steps=0, weight_decay=0.5))
    updates, _ = made.update(jax.tree.map(jnp.zeros_like, own), made.init(own), own)
    assert jnp.all(updates["w"] < 0) and not jnp.any(updates["layers"][1])

"""Two networks in a row: what the second sees, what each draws, and what the sum of both costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Cascade, Diffusion, Train
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.models import unet
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import solvers
from ldm_scaling.sampling.guidance import Correction
from ldm_scaling.sampling.packing import Configuration
from ldm_scaling.study.small import reduced
from ldm_scaling.tasks import cascade as cascade_task
from ldm_scaling.tasks.cascade_drawing import CascadeDrawer
from ldm_scaling.tasks.drawing import Drawer, Frozen, denoiser, sampling_key

SMALL = unet.UNetSpec(4, 8, (1,), (False,), 1, heads=1, groups=2, sample_size=4, context_length=3)
LARGE = dataclasses.replace(SMALL, sample_size=8)
CASCADE = Cascade(base=("small",), first_spacing="trailing")
DIFFUSION = Diffusion(prediction="v")
RNG = np.random.default_rng(0)
NULL_LD = RNG.normal(size=(3, 8)).astype(np.float32)
CTX_PLD = RNG.normal(size=(6, 3, 8)).astype(np.float32)
KEY = sampling_key(3)


@pytest.fixture(scope="module")
def mesh():
    return mesh_lib.make(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])


def one(spec, mesh, size=4):
    side = spec.sample_size
    frozen = Frozen(None, None, 1.0, (side, side, 4), NULL_LD)
    return Drawer(spec, frozen, DIFFUSION, size, None, mesh, "float32")


def params_of(spec, seed):
    shapes = unet.param_shapes(spec)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def single(mesh):
    return one(LARGE, mesh)


@pytest.fixture(scope="module")
def drawer(mesh):
    return CascadeDrawer(one(SMALL, mesh), one(LARGE.grown(4), mesh), CASCADE)


@pytest.fixture(scope="module")
def params():
    return params_of(SMALL, 1), params_of(LARGE.grown(4), 2)


def configuration(drawer, guidance=1.0, steps=3, index=(5, 2, 9), prompt=(0, 4, 1), sampler="ddpm"):
    table = drawer.table(sampler, steps, "trailing")
    return Configuration(table, guidance, np.array(index), np.array(prompt))


def drawn(drawer, params, *configurations, key=KEY):
    shape = drawer.frozen.latent_shape
    out = [np.zeros((len(c.index_N), *shape), np.float32) for c in configurations]
    for done in drawer.draw(params, configurations, CTX_PLD, key):
        for i, j, z in zip(done.configuration, done.position, done.latents_JHWC):
            out[i][j] = z
    return out


def test_a_second_stage_that_ignores_the_small_picture_is_the_single_network(drawer, single):
    """Exactly what it draws alone, whatever stands before it: the same noise, and nothing else."""
    alone = params_of(LARGE, 2)
    deaf = params_of(SMALL, 1), unet.grow_input(alone, 4)
    (expected,) = drawn(single, alone, configuration(single))
    for steps, rate in ((2, 1.0), (4, 3.0)):
        (found,) = drawn(drawer.after(steps), deaf, configuration(drawer, rate))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_first_stage_is_a_network_of_its_own(drawer, params, mesh):
    """It draws what it draws where nothing follows, and what follows does not change it."""
    after = drawer.after(4)
    low = after.small(params[0], configuration(drawer, 2.0), CTX_PLD, KEY)
    same = after.small(params[0], configuration(drawer, 2.0, steps=7), CTX_PLD, KEY)
    np.testing.assert_array_equal(low, same)
    alone = one(SMALL, mesh)
    spoken = configuration(alone, 2.0, steps=4, sampler=CASCADE.first_sampler)
    (expected,) = drawn(alone, params[0], spoken, key=jax.random.fold_in(KEY, 1))
    np.testing.assert_allclose(low, expected, rtol=0, atol=1e-6)


def test_a_picture_depends_on_its_number_alone(drawer, params):
    """Not on what else is drawn, in which order, at which rates, or in how many lanes."""
    after = drawer.after(2)
    several = [configuration(drawer, w, n) for w in (1.0, 9.0) for n in (2, 3)]
    together = drawn(after, params, *several)
    for c, expected in zip(several, together):
        back = dataclasses.replace(c, index_N=c.index_N[::-1], prompt_N=c.prompt_N[::-1])
        (found,) = drawn(after, params, back)
        np.testing.assert_allclose(found[::-1], expected, rtol=0, atol=2e-5)
    # What the first stage draws matters: its rate, and its steps.
    assert np.abs(together[0] - together[2]).max() > 1e-3
    (other,) = drawn(drawer.after(5), params, several[0])
    assert np.abs(other - together[0]).max() > 1e-3


def test_a_rate_is_whole_before_the_next_begins(drawer, params):
    """And each rate's first stage, which is drawn once for all its tables, is told in rows."""
    several = [configuration(drawer, w, n) for n in (2, 3) for w in (9.0, 1.0)]
    told = list(drawer.after(4).draw(params, several, CTX_PLD, KEY))
    stages = [(d.first, sorted({several[i].guidance for i in d.configuration})) for d in told]
    kept = [stage for k, stage in enumerate(stages)
            if stage not in stages[k - 1 : k] and (stage[0] or stage[1])]
    assert kept == [(True, []), (False, [9.0]), (True, []), (False, [1.0])]
    assert sum(d.rows for d in told if d.first) == 2 * 4 * 3
    assert not any(len(d.position) for d in told if d.first)
    assert {d.guided for d in told if d.first} == {True, False}
    plans = drawer.after(4).plans(several)
    assert sum(p.useful_rows for p in plans) == sum(d.rows for d in told if not d.first)


def test_every_program_is_timed():
    """Guided or not, and with each correction of the table: the sweep asks for each."""
    asked = []

    class Timed:
        frozen, mesh, batch_size, decode, program = None, None, 4, None, {}

        def __init__(self, name):
            self.name, self.frozen = name, Frozen(None, None, 1.0, (8, 8, 4), NULL_LD)

        def table(self, name, steps, spacing):
            return dataclasses.replace(table(steps), correction=Correction())

        def seconds(self, params, one, *_):
            asked.append((self.name, one.guidance, one.table.correction))
            return float(len(asked)), 0.5

    def table(steps, **correction):
        made = solvers.make("ddim", schedule_lib.get("sd"), steps, "v", "trailing")
        return dataclasses.replace(made, correction=Correction(**correction))

    def seconds(**correction):
        shown = Configuration(table(2, **correction), 3.0, np.arange(2))
        return cascade.seconds((None, None), shown, CTX_PLD, KEY)

    upper = dataclasses.replace(CASCADE, upper_guidance=2.0)
    cascade = CascadeDrawer(Timed("first"), Timed("second"), upper).after(4)
    assert seconds() == seconds() == (2.0, 4 * 1.0 + 0.5)
    assert seconds(rescale=0.7) == (3.0, 4 * 1.0 + 0.5)
    assert asked == [("first", 3.0, Correction()), ("second", 2.0, Correction()),
                     ("second", 2.0, Correction(rescale=0.7))]


def test_guidance_of_the_second_stage_keeps_the_small_picture(drawer, params):
    """With no caption both of its evaluations see the same, so no rate changes anything."""
    guided = CascadeDrawer(
        drawer.first, drawer.second, dataclasses.replace(CASCADE, upper_guidance=4.0)).after(2)
    shown = configuration(drawer)
    empty = np.broadcast_to(NULL_LD, CTX_PLD.shape)
    out = {}
    for name, which in (("plain", drawer.after(2)), ("guided", guided)):
        for ctx in (empty, CTX_PLD):
            done = [d for d in which.draw(params, [shown], ctx, KEY) if not d.first]
            assert {d.guided for d in done} == {name == "guided"}
            z = np.concatenate([d.latents_JHWC for d in done])
            out[name, ctx is empty] = z
    np.testing.assert_allclose(out["guided", True], out["plain", True], rtol=0, atol=2e-5)
    assert np.abs(out["guided", False] - out["plain", False]).max() > 1e-3


def test_noise_on_the_small_latents_is_told_and_keyed(drawer, params, mesh):
    noisy = dataclasses.replace(CASCADE, augment=0.8, level=0.6)
    second = one(LARGE.grown(5), mesh)
    weights = params[0], params_of(LARGE.grown(5), 2)
    after = CascadeDrawer(drawer.first, second, noisy).after(2)
    shown = configuration(drawer)
    (found,) = drawn(after, weights, shown)
    flipped = dataclasses.replace(shown, index_N=shown.index_N[::-1], prompt_N=shown.prompt_N[::-1])
    (back,) = drawn(after, weights, flipped)
    np.testing.assert_allclose(back[::-1], found, rtol=0, atol=2e-5)
    clean = CascadeDrawer(drawer.first, second, dataclasses.replace(noisy, level=0.0)).after(2)
    assert np.abs(drawn(clean, weights, shown)[0] - found).max() > 1e-3


def test_noise_keeps_the_variance_and_ends_in_noise():
    low, noise = RNG.normal(size=(2, 64, 16, 16, 4)).astype(np.float32)
    for level in (0.0, 0.3, 0.9, 1.0):
        mixed = cascade_task.noised(low, noise, level)
        assert abs(np.var(mixed) - 1) < 0.02
        # The share of its variance that is the noise's.
        assert np.mean(mixed * noise) == pytest.approx(level, abs=0.02)
    np.testing.assert_array_equal(cascade_task.noised(low, noise, 0.0), low)
    each = cascade_task.noised(low, noise, np.linspace(0, 1, 64))
    np.testing.assert_array_equal(each[-1], noise[-1])


@pytest.mark.parametrize("augment", [0.0, 0.5])
def test_what_is_seen_holds_the_small_latents_and_the_level(augment):
    cascade = dataclasses.replace(CASCADE, factor=3, augment=augment)
    low = RNG.normal(size=(2, 4, 5, 4)).astype(np.float32)
    level_B = np.array([0.25, 0.5], np.float32)
    seen = cascade_task.seen(low, level_B, cascade)
    assert seen.shape == (2, 12, 15, cascade_task.channels(cascade, 4))
    parts = seen[..., :4].reshape(2, 4, 3, 5, 3, 4)
    assert (parts == low[:, :, None, :, None]).all()
    if augment:
        assert (seen[0, ..., 4] == 0.25).all() and (seen[1, ..., 4] == 0.5).all()
    traced = jax.jit(lambda a, b: cascade_task.seen(a, b, cascade, jnp))(low, level_B)
    np.testing.assert_array_equal(traced, seen)


def test_small_pictures_keep_the_mean():
    image = RNG.integers(0, 256, (3, 12, 8, 3), np.uint8)
    small = reduced(image, 4)
    assert small.shape == (3, 3, 2, 3)
    assert abs(small.mean() - image.mean()) < 0.5  # Rounding alone.
    np.testing.assert_array_equal(reduced(small.repeat(4, 1).repeat(4, 2), 4), small)


def test_the_second_stage_learns_from_the_small_latents(mesh):
    """Its loss has a gradient by the weights that see them, and does not change with them while
    these are zero."""
    spec = LARGE.grown(4)
    cascade = dataclasses.replace(CASCADE, train=Train(caption_dropout=0.0))
    loss = cascade_task.loss_fn(
        denoiser(spec, mesh, "float32"), spec, cascade, DIFFUSION, 0.5, NULL_LD)

    def batch(seed):
        rng = np.random.default_rng(seed)
        low = rng.normal(size=(2, 2, 4, 4, 4))
        return {
            "mean": np.zeros((2, 8, 8, 4)), "logvar": np.full((2, 8, 8, 4), -30.0),
            "context": CTX_PLD[:2], "low_mean": low[0], "low_logvar": np.full_like(low[0], -30.0),
        }

    both = jax.jit(jax.value_and_grad(lambda p, batch: loss(p, batch, KEY)[0]))
    deaf = unet.grow_input(params_of(LARGE, 2), 4)
    (value, gradient), (same, _) = (both(deaf, batch(seed)) for seed in (0, 1))
    assert value == same and np.isfinite(value)
    weights = [g for g in jax.tree.leaves(gradient) if g.ndim == 4 and g.shape[2] == 8]
    assert any(np.abs(g[:, :, 4:]).max() > 0 for g in weights)
    hearing = params_of(spec, 2)
    assert both(hearing, batch(0))[0] != both(hearing, batch(1))[0]

"""Lanes: whatever the batch, lane, devices or order, a sample is the plain sampler's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.lanes import Lanes
from ldm_scaling.sampling.packing import Configuration

SD = schedule.get("sd")
EXPLODING = schedule.Schedule("exploding", np.ones(1000), SD.noise)
SHAPE = (3, 3, 4)
RNG = np.random.default_rng(0)
MIX = RNG.standard_normal((4, 4)).astype("f4") / 2
CONTEXT = RNG.standard_normal((60, 2, 3)).astype("f2")
EMPTY = {"context": RNG.standard_normal((1, 2, 3)).astype("f4")}
KEY = jax.random.key(7)


def denoise(params, x_BHWC, t_B, cond):
    """Depends on everything: the sample, its neighbours, the time and the prompt."""
    c_B4 = jnp.pad(cond["context"].mean(1), ((0, 0), (0, 1)))
    wave_B = jnp.sin(t_B / 300.0)[:, None, None, None]
    return jnp.tanh(x_BHWC @ params + c_B4[:, None, None]) + 0.3 * wave_B * x_BHWC.mean((1, 2, 3),
                                                                                      keepdims=True)


def admit(cond):
    return {"context": cond["context"].astype(jnp.float32)}


def make_lanes(size, devices=1, **options):
    mesh = mesh_lib.make(devices=jax.devices()[:devices])
    return Lanes(denoise, SHAPE, size, mesh, admit, **options)


def cond_of(prompt_M):
    return {"context": CONTEXT[prompt_M]}


def grid(samples=5):
    """Every registered solver, several step counts, with guidance and without."""
    out = []
    more = ("heun:final=abar_0", "dpmpp_2s:midpoints=true", "unipc:order=3")
    for k, name in enumerate((*solvers.SOLVERS, *more)):
        for steps in (1, 2, 7):
            index = 3 * k + np.arange(samples)
            own = solvers.spacing_of(name) != "leading"
            table = solvers.make(name, SD, steps, spacing=None if own else "trailing")
            out.append(Configuration(table, 1.0 if steps == 2 else 1.5 + k, index, index % 60))
    limited = solvers.make("ddim", SD, 6, spacing="trailing", guidance_low=0.3, guidance_high=6)
    rescaled = solvers.make("ddim", SD, 6, spacing="trailing", rescale=0.7)
    for spacing in ("karras", "timesteps:999,850,400,30"):
        steps = 4
        table = solvers.make("dpmpp_2m", SD, steps, spacing=spacing)
        out.append(Configuration(table, 3.0, np.arange(2)))
    for name, prediction in (("flow", "flow"), ("exploding", "v")):  # the latter from 15 z
        given = schedule.get("flow") if name == "flow" else EXPLODING
        table = solvers.make("euler", given, 5, prediction, "trailing")
        out.append(Configuration(table, 2.0, np.arange(4)))
    return [*out, Configuration(limited, 4.0, np.arange(7)), Configuration(rescaled, 4.0, [3, 1])]


@pytest.fixture(scope="module")
def expected():
    """Each configuration by itself, with the plain sampler."""
    plain, out = sampler.make_sampler(denoise, SHAPE), []
    for c in grid():
        guidance = None if c.guidance == 1 else jnp.full(len(c.index_N), c.guidance)
        uncond = None if c.guidance == 1 else EMPTY
        out.append(np.asarray(plain(
            MIX, c.table.padded(30), guidance, admit(cond_of(c.prompt_N)), uncond, KEY, c.index_N
        )))
    return out


def gather(finished, configurations):
    out = [np.full((len(c.index_N), *SHAPE), np.nan, "f4") for c in configurations]
    for some in finished:
        for i, j, z in zip(some.configuration, some.position, some.latents_JHWC):
            assert np.isnan(out[i][j]).all(), "drawn twice"
            out[i][j] = z
    return out


@pytest.mark.parametrize("size, devices, max_rows", [(4, 1, 32), (24, 8, 5), (64, 4, 16)])
def test_a_sample_is_the_plain_samplers(size, devices, max_rows, expected):
    configurations, lanes = grid(), make_lanes(size, devices, max_rows=max_rows)
    got = gather(lanes.run(MIX, configurations, cond_of, EMPTY, KEY), configurations)
    for c, ours, plain in zip(configurations, got, expected):
        assert np.abs(ours - plain).max() <= 1e-4 * np.abs(plain).max(), (c.table.name, size)


def test_order_of_jobs_does_not_matter(expected):
    order = np.random.default_rng(1).permutation(len(expected))
    configurations = [grid()[i] for i in order]
    got = gather(make_lanes(16, 2).run(MIX, configurations, cond_of, EMPTY, KEY), configurations)
    for i, ours in zip(order, got):
        assert np.abs(ours - expected[i]).max() <= 1e-4 * np.abs(expected[i]).max()


def compilations(run):
    """How many programs XLA compiles in a call."""
    count = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            count.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(count)


def test_one_compilation_for_each_kind_of_guidance():
    lanes = make_lanes(8, 8)
    plain = [c for c in grid() if c.table.correction.rescale == 0]
    jax.block_until_ready(KEY)

    def run(configurations):
        return compilations(
            lambda: list(lanes.run(MIX, configurations, cond_of, EMPTY, KEY, in_flight=1))
        )

    assert run([c for c in plain if c.guidance == 1]) == 1
    assert run([c for c in plain if c.guidance != 1 and not c.table.partly]) == 1
    assert run([c for c in plain if c.table.partly]) == 1
    other = [Configuration(solvers.make("heun", SD, n), w, np.arange(9))
             for n in (3, 50) for w in (1.0, 2.5)]
    assert run(other) == 0


def test_rows_outside_an_interval_evaluate_the_network_once():
    """Lanes that run one table in step; samples are the plain sampler's, see above."""
    ran = []

    def counted(params, x_BHWC, *rest):
        jax.debug.callback(lambda: ran.append(x_BHWC.shape[0]))
        return denoise(params, x_BHWC, *rest)

    table = solvers.make("ddim", SD, 6, spacing="trailing", guidance_low=0.3, guidance_high=4)
    assert (table.calls, table.guided_calls) == (6, 4)
    lanes = Lanes(counted, SHAPE, 4, mesh_lib.make(devices=jax.devices()[:1]), admit, max_rows=5)
    done = list(lanes.run(MIX, [Configuration(table, 4.0, np.arange(8))], cond_of, EMPTY, KEY))
    jax.effects_barrier()
    assert (ran.count(8), ran.count(4)) == (2 * 4, 2 * 2)
    assert sum(d.rows for d in done) == 48 and sum(d.evaluations for d in done) == 8 * (6 + 4)


def test_the_host_stays_a_bounded_number_of_chunks_ahead():
    asked = []

    def counting(prompt_M):
        asked.append(len(prompt_M))
        return cond_of(prompt_M)

    table = solvers.make("ddim", SD, 4)
    many = [Configuration(table, 1.0, np.arange(400), np.arange(400) % 60)]
    lanes = make_lanes(8, max_rows=4)
    for k, finished in enumerate(lanes.run(MIX, many, counting, None, KEY, in_flight=2)):
        assert len(finished.position) == 8 and finished.rows == 32 and not finished.guided
        assert len(asked) <= 1 + k + 3  # the example's, then chunk by chunk
    assert sum(asked) == 1 + 400  # nobody's prompt is looked up twice


def test_a_lane_forgets_what_ran_in_it_before():
    """A sample that overflows leaves nothing to the next one in its lane."""
    wild = Configuration(solvers.make("ddim", SD, 20), 3e38, np.arange(4))
    tame = Configuration(solvers.make("dpmpp_2m", SD, 3), 2.0, np.arange(4))
    got = gather(make_lanes(4).run(MIX, [wild, tame], cond_of, EMPTY, KEY), [wild, tame])
    alone = gather(make_lanes(4).run(MIX, [tame], cond_of, EMPTY, KEY), [tame])
    assert not np.isfinite(got[0]).all()
    np.testing.assert_array_equal(got[1], alone[0])


def test_errors():
    with pytest.raises(UserError, match="lanes=3 does not split over 2 devices"):
        make_lanes(3, 2)
    with pytest.raises(UserError, match="max_rows=0"):
        make_lanes(2, max_rows=0)
    guided = [Configuration(solvers.make("ddim", SD, 2), 2.0, np.arange(2))]
    for uncond in (None, {}):
        with pytest.raises(UserError, match="give uncond"):
            next(make_lanes(2).run(MIX, guided, cond_of, uncond, KEY))
    flat = Lanes(lambda p, x, t, c: x[..., :1], SHAPE, 2, mesh_lib.make(devices=jax.devices()[:1]))
    plain = [Configuration(solvers.make("ddim", SD, 2), 1.0, np.arange(2))]
    with pytest.raises(UserError, match=r"gives \(2, .*1\) for x_BHWC of shape"):
        next(flat.run(None, plain, cond_of, None, KEY))

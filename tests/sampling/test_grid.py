"""Grids: the nodes of the published samplers, and what cannot be placed."""

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, solvers

SD = schedule.get("sd")
STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 20, 50, 250)


@pytest.mark.parametrize(
    ("steps", "first", "abar", "ve_sigma"),
    [(4, 751, 0.0557, 4.12), (5, 801, None, None), (6, 831, None, None), (8, 876, None, None),
     (10, 901, None, None), (20, 951, None, None), (50, 981, None, 13.1)],
)
def test_leading_starts_where_stable_diffusion_does(steps, first, abar, ve_sigma):
    g = grid.build("leading", SD, steps)
    assert g.timesteps[0] == first and g.timesteps[-1] == 1 and g.steps == steps
    if abar:
        np.testing.assert_allclose(g.alpha[0] ** 2, abar, atol=5e-5)
    if ve_sigma:
        np.testing.assert_allclose(g.sigma[0] / g.alpha[0], ve_sigma, rtol=5e-3)


WHOLE = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("convention", ["ddim", "dpm"])
@pytest.mark.parametrize("final", grid.FINALS)
@pytest.mark.parametrize("spacing", WHOLE)
def test_nodes_are_the_schedules_and_end_as_told(spacing, final, convention):
    for steps in STEP_COUNTS:
        g = grid.build(spacing, SD, steps, convention, final)
        t = g.timesteps.astype(int)
        assert len(t) == steps and g.alpha.shape == (steps + 1,)
        np.testing.assert_array_equal(t, g.timesteps)
        np.testing.assert_allclose(g.alpha[:-1], SD.alpha[t])
        np.testing.assert_allclose(g.sigma[:-1], SD.sigma[t])
        end = 0 if final == "zero" else SD.sigma[0]
        np.testing.assert_allclose(g.sigma[-1], end)
        if spacing == "trailing" or (convention == "dpm" and spacing == "linspace"):
            assert t[0] == 999
    assert spacing in g.name and final in g.name
    assert convention in g.name or spacing == "trailing"  # which is the same in all


REASON = "parity needs: pip install -e '.[parity]'"
SD_SETTINGS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_matches_diffusers_for_every_step_count():
    schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)

    kinds = (
        ("ddim", schedulers.DDIMScheduler), ("dpm", schedulers.DPMSolverMultistepScheduler),
        ("euler", schedulers.EulerDiscreteScheduler),
    )
    one_too_many = []
    for convention, scheduler in kinds:
        for spacing in WHOLE:
            peer = scheduler(timestep_spacing=spacing, steps_offset=1)
            for steps in range(1, 999):
                peer.set_timesteps(steps)
                theirs = peer.timesteps.numpy()
                if len(theirs) == steps + 1:
                    # The peer's own defect: float error in its arange adds a node at -1.
                    assert spacing == "trailing" and theirs[-1] == -1
                    one_too_many.append(steps)
                    theirs = theirs[:-1]
                ours = grid.build(spacing, SD, steps, convention)
                np.testing.assert_allclose(ours.timesteps, theirs, atol=0, rtol=1e-6)
    assert 61 in one_too_many


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_matches_diffusers_between_timesteps():
    schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)
    euler = schedulers.EulerDiscreteScheduler(**SD_SETTINGS, timestep_spacing="linspace")
    for steps in STEP_COUNTS:
        euler.set_timesteps(steps)
        g = grid.build("linspace", SD, steps, "euler", "zero")
        np.testing.assert_allclose(g.noise, euler.sigmas, rtol=2e-5)  # its schedule is float32


def test_matches_diffusers_lcm():
    peer = pytest.importorskip("diffusers.schedulers", reason=REASON).LCMScheduler()
    for steps in range(1, 51):
        peer.set_timesteps(steps)
        ours = grid.build("lcm", SD, steps).timesteps
        np.testing.assert_array_equal(ours, peer.timesteps.numpy())
    assert grid.build("lcm", SD, 4).timesteps.tolist() == [999, 759, 499, 259]


def test_align_your_steps():
    g = grid.build("ays", SD, 10, final="zero")
    np.testing.assert_allclose(g.timesteps, grid.AYS_TIMESTEPS[:-1], atol=1e-9)
    # As published, to its digits: research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0]
    np.testing.assert_allclose(g.noise, published, atol=3.5e-3)
    # Twice as many steps: those nodes, and others halfway in the logarithm.
    twice = np.log(np.append(grid.build("ays", SD, 20).noise[:-1], SD.sigma[0] / SD.alpha[0]))
    once = np.log(grid.build("ays", SD, 10).noise)
    np.testing.assert_allclose(twice[::2], once, atol=1e-12)
    np.testing.assert_allclose(twice[1::2], (once[1:] + once[:-1]) / 2, atol=1e-12)


@pytest.mark.parametrize("final", grid.FINALS)
def test_spacings_by_noise_level(final):
    def even(values):
        np.testing.assert_allclose(np.diff(values, 2), 0, atol=1e-12)

    low, high = (SD.sigma / SD.alpha)[[0, -1]]
    for steps in STEP_COUNTS:
        karras = grid.build("karras", SD, steps, final=final).noise[:-1]
        even(karras ** (1 / 7))
        even(grid.build("karras:rho=3", SD, steps, final=final).noise[:-1] ** (1 / 3))
        exponential = grid.build("exponential", SD, steps, final=final).noise[:-1]
        even(np.log(exponential))
        for noise in (karras, exponential):
            np.testing.assert_allclose(noise[0], high)
            if steps > 1:
                np.testing.assert_allclose(noise[-1], low)
    assert grid.build("karras:rho=3", SD, 4).name != grid.build("karras", SD, 4).name


def test_the_network_is_told_the_fraction_between_timesteps():
    g = grid.build("karras", SD, 20)
    t = np.floor(g.timesteps[1:-1]).astype(int)
    share = g.timesteps[1:-1] - t
    log_noise = np.log(SD.sigma / SD.alpha)
    between = (1 - share) * log_noise[t] + share * log_noise[t + 1]
    np.testing.assert_allclose(np.log(g.noise[1:-2]), between, rtol=1e-10)
    assert g.timesteps[0] == 999 and g.timesteps[-1] == pytest.approx(0, abs=1e-9)
    assert g.timestep_at_end == 0 and np.any(share > 0.01)


def test_lists():
    g = grid.build("timesteps:999,759,499,259", SD, 4, final="zero")
    assert g.timesteps.tolist() == [999, 759, 499, 259] and g.sigma[-1] == 0
    g = grid.build("sigmas:14.615,6.5,3.9", SD, 3)
    np.testing.assert_allclose(g.noise, [14.6146, 6.5, 3.9, SD.sigma[0] / SD.alpha[0]], rtol=1e-5)
    for spacing, message in (
        ("timesteps:999,759,499,259", "places 4 steps, but steps=3"),
        ("sigmas:14.6,3.9", "places 2 steps, but steps=3"),
        ("sigmas:3.9,6.5,1", "must fall strictly.* 3.9 is followed by 6.5"),
        # Both within the 1% above the highest, and so the same.
        ("sigmas:14.7,14.65,3", "within the 14.6146 down to .* 14.7 is followed by 14.65"),
        ("sigmas:20,6.5,1", "sigma 20: .*14.6146 down"),
        ("sigmas:3,2,0", "sigma 0: leave it out.*final=zero"),
        ("sigmas:14.6,6.5,3.9,0", "sigma 0: leave it out"), ("timesteps:1000,2,1", "timestep 1000"),
        ("timesteps:3,two,1", "not a list of numbers"), ("timesteps:", "not a list of numbers"),
        ("timesteps", "not a list of numbers"), ("sigmas:nan,1,0.5", "sigma nan"),
    ):
        with pytest.raises(UserError, match=message):
            grid.build(spacing, SD, 3)


def test_codi_has_its_authors_nodes_and_no_other_step_counts():
    g = grid.build("codi", SD, 4)
    assert g.timesteps.tolist() == [980, 720, 460, 200]
    np.testing.assert_allclose(g.noise[-1], SD.sigma[0] / SD.alpha[0])
    with pytest.raises(UserError, match="it can place 1 to 10, 13, 17, 25, 50;"):
        grid.build("codi", SD, 20)


def test_midpoints_halve_every_step_in_log_snr():
    g = grid.build("leading", SD, 5, "dpm", "zero")
    middle = g.with_midpoints()
    assert middle.steps == 9 and middle.sigma[-1] == 0
    np.testing.assert_array_equal(middle.timesteps[::2], g.timesteps)
    h = np.diff(np.log(middle.noise[:-1]))
    np.testing.assert_allclose(h[::2], h[1::2], atol=1e-12)
    assert grid.build("leading", SD, 5).with_midpoints().steps == 10
    pure = grid.build("trailing", schedule.get("sd_zero_snr"), 5, "dpm", "abar_0")
    assert pure.with_midpoints().steps == 9  # half of an infinite step is nowhere
    # Without a schedule: between its own nodes.
    own = grid.Grid([2, 1], [0.6, 0.8, 1], [0.8, 0.6, 0], "mine").with_midpoints()
    np.testing.assert_allclose(own.timesteps, [2, 1.5, 1])


def test_midpoints_next_to_pure_noise():
    whole = grid.from_timesteps(schedule.get("sd_zero_snr"), [999, 998.9, 998.2, 500], "zero")
    t = whole.with_midpoints().timesteps
    assert t.size == 4 + 2 and 998.2 < t[2] < 998.9 and 500 < t[4] < 998
    # alpha / sigma is linear here, and the middle in log of both.
    assert 999 - t[2] == pytest.approx(np.sqrt(0.1 * 0.8), rel=1e-9)


def test_offset_belongs_to_leading():
    assert grid.build("leading", SD, 4, offset=0).timesteps.tolist() == [750, 500, 250, 0]
    assert grid.build("leading", SD, 4, offset=0).name != grid.build("leading", SD, 4).name
    with pytest.raises(UserError, match="offset=1 does not belong to trailing"):
        grid.build("trailing", SD, 4, offset=1)


@pytest.mark.parametrize(
    ("spacing", "convention", "steps", "most"),
    [("leading", "ddim", 1000, 999), ("leading", "dpm", 1000, 998), ("leading", "ddim", 5000, 999),
     ("trailing", "ddim", 1001, 1000), ("linspace", "ddim", 1001, 1000),
     ("linspace", "dpm", 1000, 999), ("linspace", "euler", 10**4, None), ("lcm", "dpm", 51, 50)],
)
def test_too_many_steps_are_refused_with_what_there_can_be(spacing, convention, steps, most):
    if most is None:
        assert grid.build(spacing, SD, steps, convention).steps == steps
        return
    message = f"{steps} steps on 1000 timesteps: it can place 1 to {most};"
    with pytest.raises(UserError, match=message):
        grid.build(spacing, SD, steps, convention)
    assert grid.build(spacing, SD, most, convention).steps == most


def test_a_shift_moves_trailing_nodes():
    """To s' with s' / (1 - s') = shift s / (1 - s), of s = (t + 1) / T; the first stays the last
    timestep."""
    flow = schedule.get("flow")
    for shift, steps in ((3, 4), (0.1, 7), (6.5, 13), (1.7, 250)):
        g = grid.build(f"trailing:shift={shift}", flow, steps, final="zero")
        assert g.timesteps[0] == 999 and g.alpha[0] == 0 and g.steps == steps
        s = np.linspace(1, 1 / steps, steps)[1:]
        odds = g.sigma[1:-1] / g.alpha[1:-1]
        np.testing.assert_allclose(odds, shift * s / (1 - s), rtol=1e-9)
    names = {grid.build(f"trailing{o}", flow, 4).name for o in ("", ":shift=3", ":shift=2")}
    assert len(names) == 3
    # The schedule's shift and the spacing's come one on top of the other.
    both = grid.build("trailing:shift=2", schedule.get("flow:shift=1.5"), 8, final="zero")
    one = grid.build("trailing:shift=3", flow, 8, final="zero")
    np.testing.assert_allclose(both.sigma, one.sigma, atol=1e-3)  # linear between timesteps
    for steps in (8, 13):  # 13 is rounded without a shift alone
        shifted, plain = (grid.build(f"trailing{o}", SD, steps) for o in (":shift=1", ""))
        np.testing.assert_allclose(
            shifted.timesteps, plain.timesteps, atol=1e-9 if steps == 8 else 0.51
        )
    zero = grid.build("trailing:shift=3", schedule.get("sd_zero_snr"), 40)
    assert zero.alpha[0] == 0 and np.isfinite(zero.sigma).all()
    with pytest.raises(UserError, match="it can place 1 to 100;"):
        grid.build("trailing:shift=0.1", SD, 500)


def test_spacings_that_say_the_same_have_one_name():
    """And so one key of records; to two that differ in the last digit belong two."""
    for spacing, other in (
        ("karras", "karras:rho=7"), ("karras:rho=5", "karras:rho=5.0"),
        ("trailing:shift=3", "trailing:shift=3.0"), ("trailing:shift=1", "trailing:shift= 1"),
        ("timesteps:999,612.25,3.5", "timesteps:999.0, 612.25, 3.50"),
        ("sigmas:14.6,6.5,3.9", "sigmas:14.60,6.5,3.9"),
    ):
        whole, again = grid.build(spacing, SD, 3), grid.build(other, SD, 3)
        np.testing.assert_array_equal(again.timesteps, whole.timesteps)
        assert again.name == whole.name == f"{spacing}-abar_0"
        assert solvers.spacing_of("ddim", other) == solvers.spacing_of("ddim", spacing) == spacing
    for spacing in (*grid.SPACINGS, "timesteps:999,759,499,259", "trailing:shift=0.1"):
        assert grid.canonical(spacing) == spacing
    assert grid.canonical("sigmas:0.1,0.01") != grid.canonical("sigmas:0.1,0.010000000000000002")


def test_other_user_errors():
    for args, message in (
        (("edm", SD, 4), "unknown spacing 'edm': choose one of leading, trailing, linspace, "),
        (("leading:3", SD, 4), "unknown spacing"), (("karras:tau=7", SD, 4), "write karras:rho=7"),
        (("karras:rho=7,5", SD, 4), "write karras:rho=7"),
        (("trailing:shift=0", SD, 4), "write trailing:shift=3, with shift above 0"),
        (("trailing:shft=3", SD, 4), "write trailing:shift=3"),
        (("karras:rho=-1", SD, 4), "rho above 0"), (("karras:rho=x", SD, 4), "not a list"),
        (("leading", SD, 4, "edm"), "choose one of ddim, dpm, euler"),
        (("leading", SD, 4, "ddim", "one"), "choose one of abar_0, zero"),
        (("karras", SD, 4, "ddim", "one"), "choose one of abar_0, zero"),
        (("leading", SD, 0), "steps=0"), (("leading", SD, 2.5), "steps=2.5"),
        (("leading", SD, True), "steps=True"),
    ):
        with pytest.raises(UserError, match=message):
            grid.build(*args)
    for spacing in ("karras", "exponential", "ays"):
        with pytest.raises(UserError, match="ends in pure noise: use spacing 'trailing'"):
            grid.build(spacing, schedule.get("sd_zero_snr"), 4)
    short = schedule.sd(num_timesteps=20)
    with pytest.raises(UserError, match="it can place none"):
        grid.build("lcm", short, 4)
    for timesteps, message in (
        ([1000, 0], "timestep 1000: .* 999 down to 0"), ([np.nan], "timestep nan"),
        ([5, 7], "5 is followed by 7"), ([], "one or more"), ([[3]], "shape"),
    ):
        with pytest.raises(UserError, match=message):
            grid.from_timesteps(SD, timesteps)
    with pytest.raises(UserError, match="signal must not fall"):
        grid.Grid([1], [1.0, 0.0], [0.0, 1.0], "mine")
    for alpha, sigma in (
        ([-0.5, 1.0], [0.5, 0.0]), ([0.0, 1.0], [0.0, 0.0]), ([1, 1], [np.nan, 0]),
    ):
        with pytest.raises(UserError, match="alpha >= 0 and sigma >= 0 and not both 0"):
            grid.Grid([1], alpha, sigma, "mine")
    with pytest.raises(UserError, match="need 2 nodes"):
        grid.Grid([1], [1.0], [0.0], "mine")

"""Grids: the nodes of the published samplers, and what cannot be placed."""

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid

SD = schedule.get("sd")
STEP_COUNTS = (1, 2, 3, 4, 6, 7, 10, 13, 20, 50, 250)


@pytest.mark.parametrize(
    ("steps", "first", "abar", "ve_sigma"),
    [(4, 751, 0.0557, 4.12), (5, 801, None, None), (6, 831, None, None), (8, 876, None, None),
     (10, 901, None, None), (20, 951, None, None), (50, 981, None, 13.1)],
)
def test_leading_starts_where_stable_diffusion_does(steps, first, abar, ve_sigma):
    g = grid.leading(SD, steps)
    assert g.timesteps[0] == first and g.timesteps[-1] == 1 and g.steps == steps
    if abar:
        np.testing.assert_allclose(g.alpha[0] ** 2, abar, atol=5e-5)
    if ve_sigma:
        np.testing.assert_allclose(g.sigma[0] / g.alpha[0], ve_sigma, rtol=5e-3)


@pytest.mark.parametrize("convention", grid.CONVENTIONS)
@pytest.mark.parametrize("final", grid.FINALS)
@pytest.mark.parametrize("spacing", grid.SPACINGS)
def test_nodes_are_the_schedules_and_end_as_told(spacing, final, convention):
    for steps in STEP_COUNTS:
        g = grid.build(spacing, SD, steps, convention, final)
        t = g.timesteps.astype(int)
        assert len(t) == steps and g.alpha.shape == (steps + 1,)
        np.testing.assert_allclose(g.alpha[:-1], SD.alpha[t])
        np.testing.assert_allclose(g.sigma[:-1], SD.sigma[t])
        end = 0 if final == "zero" else SD.sigma[0]
        np.testing.assert_allclose(g.sigma[-1], end)
        if spacing == "trailing" or (convention == "dpm" and spacing == "linspace"):
            assert t[0] == 999
    assert spacing in g.name and final in g.name and convention in g.name


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_matches_diffusers_for_every_step_count():
    pytest.importorskip("diffusers", reason="parity needs: pip install -e '.[parity]'")
    from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler

    kinds = (("ddim", DDIMScheduler), ("dpm", DPMSolverMultistepScheduler))
    one_too_many = []
    for convention, scheduler in kinds:
        for spacing in grid.SPACINGS:
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
                np.testing.assert_array_equal(ours.timesteps, theirs)
    assert 61 in one_too_many


def test_offset_belongs_to_leading():
    assert grid.leading(SD, 4, offset=0).timesteps.tolist() == [750, 500, 250, 0]
    assert grid.leading(SD, 4, offset=0).name != grid.leading(SD, 4).name
    with pytest.raises(UserError, match="offset=1 does not belong to trailing"):
        grid.build("trailing", SD, 4, offset=1)


@pytest.mark.parametrize(
    ("spacing", "convention", "steps", "most"),
    [("leading", "ddim", 1000, 999), ("leading", "dpm", 1000, 998), ("leading", "ddim", 5000, 999),
     ("trailing", "ddim", 1001, 1000), ("linspace", "ddim", 1001, 1000),
     ("linspace", "dpm", 1000, 999)],
)
def test_too_many_steps_are_refused_with_the_most_there_can_be(spacing, convention, steps, most):
    message = f"{steps} steps on 1000 timesteps: use at most {most} steps"
    with pytest.raises(UserError, match=message):
        grid.build(spacing, SD, steps, convention)
    assert grid.build(spacing, SD, most, convention).steps == most


def test_the_users_own_timesteps():
    g = grid.from_timesteps(SD, [999, 759, 499, 259], "zero", "lcm")
    assert g.timesteps.tolist() == [999, 759, 499, 259] and g.sigma[-1] == 0
    for timesteps, message in (
        ([1000, 0], "timestep 1000: .* 999 down to 0"), ([10.5], "timestep 10.5"),
        ([5, 7], "5 is followed by 7"), ([], "one or more"), ([[3]], "shape"),
    ):
        with pytest.raises(UserError, match=message):
            grid.from_timesteps(SD, timesteps)


def test_other_user_errors():
    for args, message in (
        (("karras", SD, 4), "choose one of leading, trailing, linspace"),
        (("leading", SD, 4, "edm"), "choose one of ddim, dpm"),
        (("leading", SD, 4, "ddim", "one"), "choose one of abar_0, zero"),
        (("leading", SD, 0), "steps=0"), (("leading", SD, 2.5), "steps=2.5"),
        (("leading", SD, True), "steps=True"),
    ):
        with pytest.raises(UserError, match=message):
            grid.build(*args)
    with pytest.raises(UserError, match="signal must not fall"):
        grid.Grid([1], [1.0, 0.0], [0.0, 1.0], "mine")
    with pytest.raises(UserError, match=r"alpha\^2 \+ sigma\^2"):
        grid.Grid([1], [0.5, 1.0], [0.5, 0.0], "mine")
    with pytest.raises(UserError, match="need 2 nodes"):
        grid.Grid([1], [1.0], [0.0], "mine")

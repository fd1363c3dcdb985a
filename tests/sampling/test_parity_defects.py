"""Where diffusers is wrong, as released: what it does, and what ours does instead.

The comparisons in test_parity_diffusers.py are with these set right from outside. (A peer that
comes to be right fails here: then its correction in diffusers_peers.py can go.)
"""

import numpy as np
import pytest

from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.table import COLUMNS
from tests.sampling import peers
from tests.sampling.diffusers_peers import (
    CASES,
    SIGMAS,
    assert_same_steps,
    in_double,
    make,
    peer_of,
    run,
    schedulers,
    set_timesteps,
    walk,
)
from tests.sampling.peers import SD, SHAPE, schedule_of

REASON = "parity needs: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def test_ddim_misses_its_neighbour():
    """4 linspace steps visit 999, 666, 333, 0. Given the right output, x must be at 666 after the
    first step: ours is, the peer's has the noise of 749 = 999 - 1000 // 4."""
    peer = peer_of(CASES["ddim"], "linspace")
    peer.set_timesteps(4)
    given = schedule_of(peer.alphas_cumprod)
    x0, eps = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype("f4")

    def at(t):
        return (given.alpha[t] * x0 + given.sigma[t] * eps).astype("f4")

    theirs = peer.step(torch.from_numpy(eps), 999, torch.from_numpy(at(999))).prev_sample.numpy()
    table = solvers.make("ddim", given, 4, spacing="linspace")
    row = {column: getattr(table, column)[0] for column in COLUMNS}
    ours = sampler.update(row, sampler.State.start(at(999)), eps, 0.0).x
    np.testing.assert_allclose(ours, at(666), atol=1e-5)
    np.testing.assert_allclose(theirs, at(749), atol=1e-5)


def test_ancestral_ddim_is_nan_at_zero_terminal_snr():
    """From pure noise at eta=1 nothing of x is kept: the peer takes the root of 1 - abar' - std^2,
    a rounded zero, which for many step counts is negative. Ours has a = 0."""
    peer = peer_of(CASES["ddim_eta1"], "trailing", "v", rescale_betas_zero_snr=True)
    x = torch.ones(1, 2, 2, 1)
    nan = 0
    for steps in range(1, 51):
        peer.set_timesteps(steps)
        after = peer.step(x, peer.timesteps[0], x, eta=1.0, variance_noise=x).prev_sample
        nan += bool(after.isnan().all())
        assert make(CASES["ddim_eta1"], peer, steps, "v", "trailing").a[0] == 0
    assert nan > 3


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler", "unipc_2"])
def test_trailing_spacing_goes_beyond_its_end(name):
    """Its arange ends at 1e-13 instead of 0, and -1 is its last node, at 62 of the step counts up
    to 1000: 61, 103, 121, ..."""
    peer = peer_of(CASES[name], "trailing")
    peer.set_timesteps(61)
    assert len(peer.timesteps) == 62 and peer.timesteps[-1] == -1
    # DDIM reads the schedule there from behind, where it is noisiest.
    assert peer.alphas_cumprod[-1] == peer.alphas_cumprod.min()
    table = make(CASES[name], peer, 61, "epsilon", "trailing")
    assert table.calls == 61 and table.t[-1] == 15


@pytest.mark.parametrize(
    "name", ["euler", "dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "unipc_2"]
)
def test_sigmas_that_end_at_the_lowest_end_with_a_step_of_no_length(name):
    """The peers' Karras and exponential sigmas hold the lowest already: then it comes twice. With
    one step they have the highest only, and UniPC takes that one twice."""
    case = CASES[name]._replace(steps=(2, 7, 14, 15, 20))
    for spacing in SIGMAS:
        assert_same_steps(case, spacing, "abar_0", ("epsilon",))


@pytest.mark.parametrize("name", ["dpmpp_2m_heun", "dpmpp_3m", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_a_step_of_no_length_is_nan(name):
    """From 15 steps on, for it divides by h; ours stays where it is."""
    peer = peer_of(CASES[name], "karras", final="abar_0")
    table = make(CASES[name], peer, 20, "epsilon", "karras", "abar_0")
    set_timesteps(peer, 20, table, "karras")
    x = walk(peer, table).x
    assert np.isnan(x[-1]).all() and not np.isnan(x[:-1]).any()
    assert (table.a[-1], table.b0[-1], table.b1[-1], table.b2[-1], table.c[-1]) == (1, 0, 0, 0, 0)


def test_exponential_sigmas_come_with_timesteps_cut_off():
    """DPM-Solver and UniPC count in whole timesteps; those of Karras sigmas are rounded. Even at
    the first node the network is told 998, for 998.9999. Ours is told the fraction."""
    for name in ("dpmpp_2m", "unipc_2"):
        peer = peer_of(CASES[name], "exponential")
        table = make(CASES[name], peer, 13, "epsilon", "exponential")
        peer.set_timesteps(13)
        assert table.t[0] == 999 and peer.timesteps[0] == 998
        np.testing.assert_array_equal(peer.timesteps[1:], np.floor(table.t[1:]))


def test_an_odd_number_of_steps_changes_the_singlestep_solver_for_good():
    """It sets lower_order_final, which is off unless asked for, in its own configuration."""
    peer = schedulers.DPMSolverSinglestepScheduler(**SD, final_sigmas_type="sigma_min")
    orders = []
    for steps in (4, 3, 4):
        peer.set_timesteps(steps)
        orders.append(peer.order_list)
    assert orders == [[1, 2, 1, 2], [1, 2, 1], [1, 2, 1, 1]]


def test_third_order_sde_does_not_vanish_with_the_step():
    """The weight of the oldest x0 must go to zero with the step; the peer's goes to -alpha' / 2."""
    case = CASES["dpmpp_3m_sde"]
    peer = schedulers.DPMSolverMultistepScheduler(
        **SD, **case.config, prediction_type="sample", timestep_spacing="trailing"
    )
    theirs, ours = [], []
    for steps in (50, 250, 1000):
        peer.set_timesteps(steps)
        table = make(case, peer, steps, "x0", "trailing")
        in_double(peer, table)
        r, zero = steps // 2, np.zeros(SHAPE, "f4")

        def output(k, x, t, r=r):
            return torch.full(SHAPE, float(k == r - 2))

        x = run(peer, table, zero, output, [zero] * steps)
        theirs.append((x[r] - table.a[r] * x[r - 1]).mean() / table.alpha[r + 1])
        ours.append(table.b2[r] / table.alpha[r + 1])
    assert np.all(np.diff(np.abs(ours)) < 0) and abs(ours[-1]) < 0.01
    assert abs(theirs[-1] + 0.5) < 0.01


def test_unipc_bh1_ends_in_nan():
    """It multiplies an infinite h by no residual; ours takes x' = m0 there as everywhere."""
    case = CASES["unipc_2_bh1"]
    peer = peer_of(case, "trailing")
    table = make(case, peer, 7, "epsilon", "trailing")
    set_timesteps(peer, 7, table, "trailing")
    path = walk(peer, table)
    assert np.isnan(path.x[-1]).all() and not np.isnan(path.x[:-1]).any()
    (ours,) = peers.teacher_forced([path])
    m0 = table.p[-1] * path.x[-2] + table.q[-1] * path.F[-1]
    np.testing.assert_allclose(ours[-1], m0, rtol=1e-5, atol=1e-6)

"""Flow matching and EDM, step by step and whole, against diffusers' schedulers."""

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.sampling import solvers
from tests.sampling import peers

REASON = "parity needs: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)
torch.set_num_threads(1)

STEP_COUNTS = (2, 3, 4, 7, 10, 20, 28, 50)
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
FLOW_CASES = {
    "euler": ("euler", EULER), "ddim": ("ddim:final=zero", EULER), "heun": ("heun:over=line", HEUN),
}


def run(peer, table, x, output):
    """The peer's x after every row."""
    x, xs = torch.from_numpy(x), []
    for r, t in enumerate(peer.timesteps):
        x = peer.step(output(r, x), t, x, return_dict=False)[0]
        xs.append(x.numpy())
    return np.stack(xs)


def walk(peer, table):
    path = peers.start(table)
    path.x[1:] = run(peer, table, path.x[0], lambda r, x: torch.from_numpy(path.F[r]))
    return path


def flow_of(name, shift, steps):
    """The peer at its own nodes, and our table there.

    Asked for N steps a peer with a shift shifts its lowest node twice; linspace is where it does
    without.
    """
    spec, scheduler = FLOW_CASES[name]
    peer = getattr(schedulers, scheduler)(shift=shift)
    least = float(peer.sigma_min)
    peer.set_timesteps(steps)
    given = schedule.get(f"flow:shift={shift}")
    spacing = "linspace"
    if shift != 1 or name == "ddim":
        values = 1000 * np.linspace(1, least, steps) - 1
        spacing = "timesteps:" + ",".join(f"{np.clip(t, 0, 999):.9f}" for t in values)
    table = solvers.make(spec, given, steps, "flow", spacing)
    # The peer counts timesteps from 1, and tells the network those of the shifted time.
    np.testing.assert_allclose(table.sigma[:-1], peer.timesteps / 1000, rtol=1e-5, atol=2e-6)
    if shift == 1:
        np.testing.assert_allclose(table.t + 1, peer.timesteps, rtol=1e-5)
    peer.sigmas = torch.tensor(table.sigma)  # theirs in float64; its samples stay in float32
    return peer, table


@pytest.mark.parametrize("name", FLOW_CASES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_steps(name, shift):
    peers.assert_same_steps([walk(*flow_of(name, shift, steps)) for steps in STEP_COUNTS])


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_flow_matching_as_the_pipelines_space_it(shift):
    """Even from 1 to 1 / N, then shifted: trailing spacing, of a shifted schedule or shifted
    itself."""
    paths = []
    for steps in (2, 4, 5, 8, 10, 20, 28, 50):
        peer = schedulers.FlowMatchEulerDiscreteScheduler(shift=shift)
        for name, spacing in ((f"flow:shift={shift}", "trailing"),
                              ("flow", f"trailing:shift={shift}")):
            if name != "flow" and 1000 % steps:
                continue  # those nodes are rounded
            peer.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
            table = solvers.make("euler", schedule.get(name), steps, "flow", spacing)
            np.testing.assert_allclose(table.sigma, peer.sigmas, rtol=1e-6)
            paths.append(walk(peer, table))
        # What the network is told, too, by a schedule without a shift.
        np.testing.assert_allclose(table.t + 1, peer.timesteps, rtol=1e-6)
    peers.assert_same_steps(paths)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_whole_flow_trajectories_with_guidance(name):
    start, _ = peers.noise_of_samples()
    for steps, shift in ((4, 1.0), (14, 3.0)):
        peer, table = flow_of(name, shift, steps)

        def output(r, x, table=table):
            return peers.guided_in_torch(torch, x, torch.tensor(table.t[r], dtype=torch.float32))

        theirs = run(peer, table, start, output)
        assert peers.relative_errors(peers.sample(table)[None], theirs[-1:])[0] < 3e-5


def edm_of(steps, spacing, final="zero", **config):
    peer = schedulers.EDMEulerScheduler(
        prediction_type="v_prediction", sigma_schedule=spacing,
        final_sigmas_type={"zero": "zero", "abar_0": "sigma_min"}[final], **config,
    )
    peer.set_timesteps(steps)
    told = ",".join(f"{o}={peer.config[o]}" for o in ("sigma_min", "sigma_max", "sigma_data"))
    table = solvers.make("euler", schedule.get(f"edm:{told}"), steps, "v", spacing, final=final)
    data = peer.config.sigma_data
    np.testing.assert_allclose(data * table.sigma / table.alpha, peer.sigmas, rtol=1e-5)
    return peer, table


def run_edm(peer, table, x, output):
    """The peer's x after every row, in our scale: c_in times it, and unit variance at its end."""
    size = (peer.sigmas.double() ** 2 + peer.config.sigma_data**2).sqrt().float()
    x, xs = size[0] * torch.from_numpy(x), []
    for r, t in enumerate(peer.timesteps):
        F = output(r, peer.scale_model_input(x, t))
        x = peer.step(F, t, x, return_dict=False)[0]
        xs.append((x / size[r + 1]).numpy())
    return np.stack(xs)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("config", [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 1.0}])
def test_edm_steps(spacing, config):
    paths = []
    for steps in STEP_COUNTS:
        peer, table = edm_of(steps, spacing, **config)
        path = peers.start(table)
        path.x[1:] = run_edm(
            peer, table, path.x[0], lambda r, x, path=path: torch.from_numpy(path.F[r])
        )
        paths.append(path)
    # On x / alpha = 160 x the peer loses digits.
    peers.assert_same_steps(paths, max(1e-5, 2**-22 * table.sigma[0] / table.alpha[0]))


def test_whole_edm_trajectories_with_guidance():
    """The network is fed the same, scaled by c_in, and samples come out of unit variance."""
    start, _ = peers.noise_of_samples()
    for steps, spacing in ((4, "karras"), (14, "exponential")):
        peer, table = edm_of(steps, spacing)

        def output(r, x, table=table):
            return peers.guided_in_torch(torch, x, torch.tensor(table.t[r], dtype=torch.float32))

        theirs = run_edm(peer, table, start, output)
        assert peers.relative_errors(peers.sample(table)[None], theirs[-1:])[0] < 3e-5

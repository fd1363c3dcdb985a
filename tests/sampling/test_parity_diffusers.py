"""Every solver, step by step and whole, against diffusers' schedulers with the same noise.

The schedule is the peer's own (it is built in float32), so what is compared is the solver.
"""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.sampling import few, guidance
from tests.sampling import peers
from tests.sampling.diffusers_peers import (
    CASES,
    DDIM,
    DDPM,
    LCM,
    SIGMAS,
    VARIANCE_EXPLODING,
    Case,
    assert_same_steps,
    in_double,
    make,
    peer_of,
    run,
    schedulers,
    set_timesteps,
    walk,
)
from tests.sampling.peers import PREDICTIONS, SD

REASON = "parity needs: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


@pytest.mark.parametrize(
    ("name", "spacing", "final"),
    [(name, spacing, final) for name, case in CASES.items() for spacing in case.spacings
     # There the peers repeat a node at the end: test_parity_defects.py has it.
     for final in case.finals if spacing not in SIGMAS or final == "zero"],
)
def test_steps(name, spacing, final):
    assert_same_steps(CASES[name], spacing, final, CASES[name].predictions)


ZERO_SNR = [
    name for name, case in CASES.items() if name != "ddim_eta1"  # the peer is NaN
    and "rescale_betas_zero_snr" in inspect.signature(getattr(schedulers, case.peer)).parameters
]


@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr(name):
    """Some of the peers put 2^-24 in place of 0; that is then the schedule compared on."""
    case = CASES[name]
    peer = peer_of(case, "trailing", "v", rescale_betas_zero_snr=True)
    assert peer.alphas_cumprod[-1] == (0 if case.peer in (DDIM, DDPM, LCM) else 2**-24)
    # On x / alpha = 4096 x the peers lose digits.
    tolerance = 4096 * 2**-22 if case.peer in VARIANCE_EXPLODING else 1e-5
    spacing, final = (None if name == "lcm" else "trailing"), case.finals[-1]
    predictions = [prediction for prediction in ("v", "x0") if prediction in case.predictions]
    assert_same_steps(
        case, spacing, final, predictions or ["v"], tolerance, rescale_betas_zero_snr=True
    )


@pytest.mark.parametrize("name", CASES)
def test_whole_trajectories_with_guidance(name):
    """Our jitted loop against the peer's as it is, with the same network, guidance and noise.

    Started from x of unit variance, as all of ours are. (The peers of Euler and Heun start from
    sigma z where they should from sqrt(sigma^2 + 1) z, 0.2% less, in all spacings but leading.)
    """
    case = CASES[name]
    start, noise = peers.noise_of_samples()
    first, *_, last = case.spacings * 2
    for steps, spacing, final in ((4, first, "zero"), (14, last, "zero"), (20, first, "abar_0")):
        final = final if final in case.finals else case.finals[0]
        peer = peer_of(case, spacing, final=final)
        table = make(case, peer, steps, "epsilon", spacing, final)
        set_timesteps(peer, steps, table, spacing)

        def output(r, x, t, table=table):
            return peers.guided_in_torch(torch, x, torch.tensor(table.t[r], dtype=torch.float32))

        theirs = run(peer, table, start, output, noise, **case.arguments)
        error = peers.relative_errors(peers.sample(table)[None], theirs[-1:])[0]
        assert error < 3e-5, (table.name, error)


def test_guidance_rescale():
    """Of the pipelines: with it the whole trajectory is the same too."""
    module = pytest.importorskip(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", reason=REASON
    )
    case = CASES["ddim"]
    start, noise = peers.noise_of_samples()
    for rescale in (0.3, 0.7, 1.0):
        peer = peer_of(case, "leading", final="abar_0")
        table = make(case, peer, 10, "epsilon", "leading", "abar_0", rescale=rescale)
        set_timesteps(peer, 10, table, "leading")

        def output(r, x, t, rescale=rescale):
            conditional, unconditional = peers.outputs_in_torch(torch, x, t.float())
            F = unconditional + peers.GUIDANCE * (conditional - unconditional)
            theirs = module.rescale_noise_cfg(F, conditional, rescale)
            ours = guidance.Correction(rescale=rescale).output(
                jnp.asarray(F.numpy()), jnp.asarray(conditional.numpy())
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
            return theirs

        theirs = run(peer, table, start, output, noise)
        error = peers.relative_errors(peers.sample(table)[None], theirs[-1:])[0]
        assert error < 3e-5, (table.name, error)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995])
@pytest.mark.parametrize("most", [1.0, 1.5, 10.0])
def test_dynamic_thresholding(ratio, most):
    x = 2 * np.random.default_rng(0).standard_normal((5, 8, 8, 4)).astype("f4")
    peer = schedulers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=most
    )
    ours = guidance.Correction(threshold=ratio, threshold_max=most).x0(jnp.asarray(x))
    np.testing.assert_allclose(ours, peer._threshold_sample(torch.from_numpy(x)), rtol=2e-6)


def listed(kind, values):
    return f"{kind}:" + ",".join(map(repr, values))


AYS = schedulers.AysSchedules
AYS_TIMESTEPS, AYS_SIGMAS = AYS["StableDiffusionTimesteps"], AYS["StableDiffusionSigmas"]


def test_listed_nodes():
    """Timesteps and sigmas spelled out, as the pipelines take them."""
    paths = []
    for name, values in (
        ("dpmpp_2m", AYS_TIMESTEPS), ("dpmpp_2m", [999, 759, 499, 259]), ("heun", AYS_TIMESTEPS),
        ("euler", [999, 500, 3]),
    ):
        peer = peer_of(CASES[name], "leading")
        table = make(CASES[name], peer, len(values), "epsilon", listed("timesteps", values))
        peer.set_timesteps(timesteps=values)
        np.testing.assert_array_equal(peer.timesteps, table.t)
        in_double(peer, table)
        paths.append(walk(peer, table))
    for values in (AYS_SIGMAS, [9.5, 2.25, 0.4, 0.0]):
        peer = peer_of(CASES["euler"], "leading")
        spacing = listed("sigmas", values[:-1])
        table = make(CASES["euler"], peer, len(values) - 1, "epsilon", spacing)
        peer.set_timesteps(sigmas=values)
        np.testing.assert_allclose(peer.timesteps, table.t, atol=2e-3)
        in_double(peer, table)
        paths.append(walk(peer, table))
    peers.assert_same_steps(paths)


def test_align_your_steps():
    """The 10 published nodes, and for other counts the authors' recipe: the noise levels and the
    lowest, log-linear, without the last of N + 1."""
    peer = peer_of(CASES["euler"], "leading")
    table = make(CASES["euler"], peer, 10, "epsilon", "ays")
    np.testing.assert_allclose(table.t, AYS_TIMESTEPS, atol=1e-9)
    np.testing.assert_allclose(table.sigma / table.alpha, AYS_SIGMAS, rtol=5e-3)
    for steps in (4, 7, 25):
        table = make(CASES["euler"], peer, steps, "epsilon", "ays")
        log_sigmas = np.log([*AYS_SIGMAS[:-1], 0.029])
        wanted = np.exp(np.interp(np.linspace(0, 10, steps + 1), np.arange(11), log_sigmas))
        np.testing.assert_allclose((table.sigma / table.alpha)[:-1], wanted[:-1], rtol=1e-2)


def test_boundary_scalings():
    """Of LCM and CoDi; c_skip is too small to be seen in an x."""
    peer = schedulers.LCMScheduler()
    for t in (0, 1, 19, 259, 999):
        theirs = peer.get_scalings_for_boundary_condition_discrete(t)
        np.testing.assert_allclose(few.boundary(t), theirs, rtol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_codi(prediction):
    """CoDi's sampler is in no package; its public code goes from the boundary-conditioned x0, with
    LCM's scalings, along the predicted eps. So written out here, with LCM's scalings the peer's."""
    peer = schedulers.LCMScheduler(**SD)
    case = Case("codi", LCM)
    for steps in (1, 2, 4, 8):
        table = make(case, peer, steps, prediction, None, None)
        path = peers.start(table)
        for r in range(steps):
            x, F, alpha, sigma = path.x[r], path.F[r], table.alpha[r], table.sigma[r]
            c_skip, c_out = peer.get_scalings_for_boundary_condition_discrete(table.t[r])
            x0_of = {"epsilon": (x - sigma * F) / alpha, "v": alpha * x - sigma * F, "x0": F}
            x0 = x0_of[prediction]
            eps = (x - alpha * x0) / sigma
            after = table.alpha[r + 1] * (c_out * x0 + c_skip * x) + table.sigma[r + 1] * eps
            # At t = 0, which is where it ends, theirs adds the node's noise a second time.
            path.x[r + 1] = after if table.t[r] else x
        peers.assert_same_steps([path])
    assert make(case, peer, 4, prediction, None, None).t.tolist() == [980, 720, 460, 200]

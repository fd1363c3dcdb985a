"""The solvers that k-diffusion has, against its own sampling functions in float64.

Its functions work on any dtype, so in float64 what is left is the formulas: there our rows must
agree to 1e-11. Our float32 rows must agree with the same float64 path to 1e-5 a step.
"""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import types
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.sampling import sampler, solvers
from ldm_scaling.sampling.table import COLUMNS
from tests.sampling import peers
from tests.sampling.peers import FEWER, STEP_COUNTS

REASON = "parity needs: pip install -e '.[parity]' && pip install --no-deps k-diffusion"
torch = pytest.importorskip("torch", reason=REASON)
torch.set_num_threads(1)
SD = schedule.get("sd")
ABAR = torch.from_numpy(SD.alpha**2)


@pytest.fixture(scope="module")
def k_diffusion():
    """k_diffusion.external and .sampling without the package's __init__.

    That imports torchvision, CLIP and more; these two need none of it but by name.
    """
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip(REASON)
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchdiffeq", "torchsde", "torchvision", "torchvision.transforms"):
            patch.setitem(sys.modules, name, mock.MagicMock())
        patch.setitem(sys.modules, "k_diffusion", package)
        external = importlib.import_module("k_diffusion.external")
    for name in [name for name in sys.modules if name.startswith("k_diffusion.")]:
        del sys.modules[name]
    return external


class Case(NamedTuple):
    """A solver of ours, the function that is its peer, and the arguments of both."""

    solver: str
    peer: str
    options: dict = {}
    arguments: dict = {}
    fewest: int = 1


def sde(name, eta, solver_type=None):
    """The peer fails with one step that ends without noise: it uses h before it is set."""
    order = {"dpmpp_2m_sde": 2, "dpmpp_3m_sde": 3}[name]
    options = {"eta": eta, "solver_type": solver_type or "heun", "lower_order_final": False}
    arguments = {"eta": eta} | ({"solver_type": solver_type} if order == 2 else {})
    return Case(name, f"sample_{name}", options, arguments, 2)


FULL_ORDER = {"lower_order_final": False}
CASES = {
    "ddim": Case("ddim", "sample_euler"),
    "ddim_eta0.3": Case("ddim", "sample_euler_ancestral", {"eta": 0.3}, {"eta": 0.3}),
    "euler": Case("euler", "sample_euler"),
    "euler_ancestral_eta0.3": Case(
        "euler_ancestral", "sample_euler_ancestral", {"eta": 0.3}, {"eta": 0.3}
    ),
    "euler_ancestral_eta1": Case("euler_ancestral", "sample_euler_ancestral", {"eta": 1.0}),
    # Here the noise is held to what the node may have.
    "euler_ancestral_eta1.5": Case(
        "euler_ancestral", "sample_euler_ancestral", {"eta": 1.5}, {"eta": 1.5}
    ),
    "heun": Case("heun", "sample_heun"),
    "dpmpp_2s": Case(
        "dpmpp_2s", "sample_dpmpp_2s_ancestral", {"midpoints": True}, {"eta": 0.0}
    ),
    "dpmpp_2m": Case("dpmpp_2m", "sample_dpmpp_2m", FULL_ORDER),
    "dpmpp_3m": Case(
        "dpmpp_3m", "sample_dpmpp_3m_sde", FULL_ORDER | {"solver_type": "heun"}, {"eta": 0.0}, 2
    ),
    **{
        f"dpmpp_2m_sde_{kind}_eta{eta:g}": sde("dpmpp_2m_sde", eta, kind)
        for kind in ("midpoint", "heun") for eta in (0.0, 0.5, 1.0)
    },
    **{f"dpmpp_3m_sde_eta{eta:g}": sde("dpmpp_3m_sde", eta) for eta in (0.0, 0.5, 1.0)},
}
SPACINGS = ("karras", "exponential", "sigmas")


def sigmas_of(k_diffusion, spacing, steps):
    """The peer's own noise levels, zero at the end, and what ours calls them."""
    ends = float(((1 - ABAR[0]) / ABAR[0]) ** 0.5), float(((1 - ABAR[-1]) / ABAR[-1]) ** 0.5)
    if spacing == "sigmas":
        # Its wrappers of discrete models: even timesteps, log sigma interpolated; any list will do.
        sigmas = k_diffusion.DiscreteEpsDDPMDenoiser(None, ABAR, False).get_sigmas(steps)
        return sigmas, "sigmas:" + ",".join(repr(float(sigma)) for sigma in sigmas[:-1])
    make = getattr(k_diffusion.sampling, f"get_sigmas_{spacing}")
    with torch_default(torch.float64):
        return make(steps, *ends), spacing


@contextlib.contextmanager
def torch_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def denoiser(k_diffusion, prediction, model):
    """The peer's wrapper around a network that takes x of unit variance and a timestep."""
    if prediction == "x0":  # it has none
        c_in = lambda sigma: 1 / (sigma**2 + 1).sqrt().reshape(-1, 1, 1, 1)  # noqa: E731
        return lambda x, sigma: model(x * c_in(sigma), None)
    wrappers = {
        "epsilon": k_diffusion.DiscreteEpsDDPMDenoiser, "v": k_diffusion.DiscreteVDDPMDenoiser
    }
    return wrappers[prediction](model, ABAR, quantize=False)


def sample(k_diffusion, case, prediction, model, x, sigmas, noise):
    """What the peer makes of x = alpha x0 + sigma eps; `noise()` is drawn once a step."""
    function = getattr(k_diffusion.sampling, case.peer)
    arguments = dict(case.arguments)
    if "noise_sampler" in inspect.signature(function).parameters:
        arguments["noise_sampler"] = lambda *sigmas: noise()
    alpha = 1 / (1 + sigmas**2).sqrt()
    wrapper = denoiser(k_diffusion, prediction, model)
    return alpha[-1] * function(wrapper, x / alpha[0], sigmas, disable=True, **arguments)


def walk(k_diffusion, case, prediction, table, sigmas):
    """The peer's path through the table's rows."""
    path = peers.start(table, "f8")
    calls = []

    def model(x, t):
        r = len(calls)
        calls.append(t)
        path.x[r] = x.numpy()
        if t is not None:
            np.testing.assert_allclose(t, table.t[r], rtol=1e-9, atol=1e-6)
        return torch.from_numpy(path.F[r])

    def noise():
        return torch.from_numpy(path.noise[len(calls) - 1])

    x = torch.from_numpy(path.x[0].copy())
    path.x[-1] = sample(k_diffusion, case, prediction, model, x, sigmas, noise)
    assert len(calls) == table.calls
    return path


def in_float64(path):
    """Our x' of every row from the peer's x, all rows at once."""
    columns = {
        column: getattr(path.table, column).reshape(-1, 1, 1, 1, 1) for column in COLUMNS
    }
    x, zero = path.x[:-1], np.zeros_like(path.F)
    m0 = sampler.update(columns, sampler.State(x, *[zero] * 4), path.F, zero).m1
    behind = [np.concatenate([zero[:k], m0[:-k]])[: len(m0)] for k in (1, 2, 3)]
    return sampler.update(columns, sampler.State(x, zero, *behind), path.F, path.noise).x


def assert_same_steps(paths):
    """In float64 and in float32."""
    for path in paths:
        error_R = peers.relative_errors(in_float64(path), path.x[1:])
        assert error_R.max() < 1e-11, (path.table.name, error_R.argmax(), error_R.max())
    peers.assert_same_steps(paths)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", CASES)
def test_steps(case, spacing, k_diffusion):
    case = CASES[case]
    for prediction in ("epsilon", "v", "x0") if spacing == "sigmas" else ("epsilon",):
        paths = []
        for steps in STEP_COUNTS if prediction == "epsilon" else FEWER:
            if steps < case.fewest:
                continue
            sigmas, name = sigmas_of(k_diffusion, spacing, steps)
            table = solvers.make(
                case.solver, SD, steps, prediction, name, final="zero", **case.options
            )
            paths.append(walk(k_diffusion, case, prediction, table, sigmas))
        assert_same_steps(paths)


@pytest.mark.parametrize("case", CASES)
def test_whole_trajectories_with_guidance(case, k_diffusion):
    """Our jitted loop in float32 against the peer's in float64."""
    case = CASES[case]
    start, noise = (torch.from_numpy(z).double() for z in peers.noise_of_samples())
    for steps, spacing in ((4, "sigmas"), (7, "karras"), (20, "exponential")):
        sigmas, name = sigmas_of(k_diffusion, spacing, steps)
        table = solvers.make(case.solver, SD, steps, "epsilon", name, final="zero", **case.options)
        drawn = iter(noise)  # in step with the rows: none of these draws and calls twice a step

        def model(x, t):
            return peers.guided_in_torch(torch, x, t[0])

        x = sample(
            k_diffusion, case, "epsilon", model, start, sigmas, lambda drawn=drawn: next(drawn)
        )
        error = peers.relative_errors(peers.sample(table)[None], x.numpy()[None])
        assert error < 3e-5, (table.name, error)


def test_karras_of_another_curvature(k_diffusion):
    table = solvers.make("euler", SD, 9, spacing="karras:rho=5", final="zero")
    ends = float(table.sigma[-2] / table.alpha[-2]), float(table.sigma[0] / table.alpha[0])
    theirs = k_diffusion.sampling.get_sigmas_karras(9, *ends, rho=5.0)
    np.testing.assert_allclose(table.sigma / table.alpha, theirs, rtol=1e-6)


@pytest.mark.parametrize("case", ["dpmpp_2m_sde_heun_eta1", "dpmpp_3m_sde_eta1"])
def test_the_peer_fails_with_one_step(case, k_diffusion):
    """It reads h before it is set, the only step being the last: ours is x' = m0."""
    case = CASES[case]
    sigmas, name = sigmas_of(k_diffusion, "karras", 1)
    table = solvers.make(case.solver, SD, 1, "epsilon", name, final="zero", **case.options)
    with pytest.raises(UnboundLocalError):
        walk(k_diffusion, case, "epsilon", table, sigmas)
    assert (table.a, table.b0, table.c) == (0, 1, 0)

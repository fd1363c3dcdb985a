"""diffusers' schedulers as peers of our solvers: which of which, and their path through our rows.

Where a scheduler is wrong it is set right here from outside; test_parity_defects.py shows each.
"""

from __future__ import annotations

import fractions
import inspect
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest

from ldm_scaling.sampling import solvers
from tests.sampling import peers
from tests.sampling.peers import FEWER, PREDICTIONS, SD, STEP_COUNTS, schedule_of

REASON = "parity needs: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
schedulers = pytest.importorskip("diffusers.schedulers", reason=REASON)

torch.set_num_threads(1)

SPACINGS = ("leading", "trailing", "linspace")
SIGMAS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas"}
FINALS = {  # what the schedulers call them
    "zero": {"set_alpha_to_one": True, "final_sigmas_type": "zero"},
    "abar_0": {"set_alpha_to_one": False, "final_sigmas_type": "sigma_min"},
}


class Case(NamedTuple):
    """A solver of ours, the scheduler that is its peer, and where the two are compared."""

    solver: str
    peer: str
    options: dict = {}
    config: dict = {}
    arguments: dict = {}
    spacings: tuple = SPACINGS
    finals: tuple = ("zero",)
    predictions: tuple = tuple(PREDICTIONS)
    steps: tuple = STEP_COUNTS


EVERY = (*SPACINGS, *SIGMAS)
DDIM, DDPM, LCM = "DDIMScheduler", "DDPMScheduler", "LCMScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
HEUN, UNIPC = "HeunDiscreteScheduler", "UniPCMultistepScheduler"
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
VARIANCE_EXPLODING = (EULER, ANCESTRAL, HEUN)
# For variants of a solver: what x0 is made of and hundreds of steps are theirs in common.
VARIANT = {"predictions": ("epsilon",), "steps": FEWER}


def dpm(solver, order, solver_type="midpoint", lower_order_final=True, **common):
    """DPM-Solver++, with options that both sides call the same."""
    options = {"lower_order_final": lower_order_final}
    config = {**options, "solver_order": order, "solver_type": solver_type}
    options = {} if order == 1 else {**options, "solver_type": solver_type}
    if "sde" in solver:
        config["algorithm_type"] = "sde-dpmsolver++"
    # At a last node without noise the peer's order is lower whatever it is told.
    spacings, finals = (EVERY, tuple(FINALS)) if lower_order_final else (SPACINGS, ("abar_0",))
    peer = SINGLE if solver == "dpmpp_2s" else MULTI
    return Case(solver, peer, options, config, spacings=spacings, finals=finals, **common)


def unipc(order, variant="bh2", **common):
    options = {"order": order, "variant": variant}
    config = {"solver_order": order, "solver_type": variant}
    # At a last node without noise the peer's bh1 is not a number.
    spacings, finals = (SPACINGS, ("abar_0",)) if variant == "bh1" else (EVERY, tuple(FINALS))
    return Case("unipc", UNIPC, options, config, spacings=spacings, finals=finals, **common)


THRESHOLD = {"threshold": 0.9, "threshold_max": 1.5}
THRESHOLDING = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
EVEN = {**VARIANT, "steps": (2, 4, 6, 10, 14, 20, 50)}
CASES = {
    "ddim": Case("ddim", DDIM, finals=tuple(FINALS)),
    "ddim_eta0.3": Case("ddim", DDIM, {"eta": 0.3}, {}, {"eta": 0.3}),
    "ddim_eta1": Case("ddim", DDIM, {"eta": 1.0}, {}, {"eta": 1.0}, finals=("abar_0",)),
    # Unless told so, the peer's DDIM keeps the noise of the x0 before thresholding.
    "ddim_threshold": Case(
        "ddim", DDIM, THRESHOLD, THRESHOLDING, {"use_clipped_model_output": True}, ("leading",)
    ),
    "ddpm": Case("ddpm", DDPM),
    "ddpm_large": Case("ddpm_large", DDPM, {"final_noise": True}, {"variance_type": "fixed_large"}),
    "euler": Case("euler", EULER, spacings=EVERY, finals=tuple(FINALS)),
    # The peer knows no x0 prediction here, and no eta.
    "euler_ancestral": Case("euler_ancestral", ANCESTRAL, predictions=("epsilon", "v")),
    "heun": Case("heun", HEUN, spacings=EVERY),
    "dpmpp_1s": dpm("dpmpp_1s", 1),
    "dpmpp_2s": dpm("dpmpp_2s", 2),
    "dpmpp_2s_heun": dpm("dpmpp_2s", 2, "heun", **VARIANT),
    # An odd number of steps sets the peer's lower_order_final, and for good.
    "dpmpp_2s_full_order": dpm("dpmpp_2s", 2, lower_order_final=False, **EVEN),
    "dpmpp_2m": dpm("dpmpp_2m", 2),
    "dpmpp_2m_heun": dpm("dpmpp_2m", 2, "heun", **VARIANT),
    "dpmpp_2m_full_order": dpm("dpmpp_2m", 2, lower_order_final=False, **VARIANT),
    "dpmpp_2m_threshold": Case("dpmpp_2m", MULTI, THRESHOLD, THRESHOLDING, spacings=("leading",)),
    "dpmpp_3m": dpm("dpmpp_3m", 3),
    "dpmpp_3m_heun": dpm("dpmpp_3m", 3, "heun", **VARIANT),
    "dpmpp_3m_full_order": dpm("dpmpp_3m", 3, lower_order_final=False, **VARIANT),
    "dpmpp_sde": dpm("dpmpp_sde", 1, **VARIANT),
    "dpmpp_2m_sde": dpm("dpmpp_2m_sde", 2),
    "dpmpp_2m_sde_heun": dpm("dpmpp_2m_sde", 2, "heun", **VARIANT),
    "dpmpp_3m_sde": dpm("dpmpp_3m_sde", 3, **VARIANT),
    "unipc_1": unipc(1, **VARIANT),
    "unipc_2": unipc(2),
    "unipc_3": unipc(3, **VARIANT),
    "unipc_1_bh1": unipc(1, "bh1", **VARIANT),
    "unipc_2_bh1": unipc(2, "bh1", **VARIANT),
    "unipc_3_bh1": unipc(3, "bh1", **VARIANT),
    "lcm": Case("lcm", LCM, spacings=(None,), steps=(1, 2, 3, 4, 6, 7, 10, 13, 14, 20, 50)),
}


def peer_of(case, spacing, prediction="epsilon", final="zero", **more):
    """The scheduler, told what of all these settings it knows."""
    scheduler = getattr(schedulers, case.peer)
    settings = {
        "clip_sample": False, "steps_offset": 1, "prediction_type": PREDICTIONS[prediction],
        **FINALS[final],
    }
    if spacing in SIGMAS:
        settings |= {SIGMAS[spacing]: True, "timestep_spacing": "linspace"}
    elif spacing is not None:
        settings["timestep_spacing"] = spacing
    known = inspect.signature(scheduler.__init__).parameters
    settings = {option: value for option, value in settings.items() if option in known}
    peer = scheduler(**SD, **settings | case.config | more)
    if case.solver == "dpmpp_3m_sde":
        set_sign_right(peer)
    return peer


def make(case, peer, steps, prediction, spacing, final="zero", **options):
    return solvers.make(
        case.solver, schedule_of(peer.alphas_cumprod), steps, prediction, spacing, final=final,
        **case.options | options,
    )


def set_timesteps(peer, steps, table, spacing):
    """The peer's own nodes, which must be ours."""
    if "timestep_spacing" in peer.config or spacing in ("linspace", *SIGMAS):
        peer.set_timesteps(steps)
    else:
        peer.set_timesteps(timesteps=table.t.astype(int).tolist())
    if spacing == "trailing" and len(peer.timesteps) > table.calls:
        drop_the_last_node(peer, table.calls)
    # With sigmas of their own making, the schedulers that count in whole timesteps round what they
    # tell the network (Karras) or cut it off (exponential).
    whole = not peer.timesteps.is_floating_point()
    slack = {"karras": 0.5, "exponential": 1.0}.get(spacing, 0.0) if whole else 0.0
    np.testing.assert_allclose(peer.timesteps, table.t, rtol=0, atol=slack + 2e-3)
    if hasattr(peer, "sigmas"):
        np.testing.assert_allclose(peer.sigmas, table.sigma / table.alpha, rtol=1e-6)


def in_double(peer, table):
    """The scheduler with coefficients in float64; its samples stay in float32.

    In float32 differences such as 1 - abar' - std^2 or exp(-h) - 1 + h leave it few digits.
    """
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(peer, name):
            setattr(peer, name, getattr(peer, name).double())
    if hasattr(peer, "sigmas"):
        peer.sigmas = torch.from_numpy(table.sigma / table.alpha)


def run(peer, table, x, output, noise, **arguments):
    """The peer's x after every row, where ours is: Euler and Heun work on x / alpha.

    `output(r, x, t)` is the network; where the peer draws noise, it gets that of the row.
    """
    alpha = torch.ones(table.calls + 1)
    if type(peer).__name__ in VARIANCE_EXPLODING:
        alpha = (1 / (1 + peer.sigmas.double() ** 2).sqrt()).float()
    x, xs, strides = torch.from_numpy(x) / alpha[0], [], true_strides(peer, table)

    def draw(*args, **kwargs):
        return torch.from_numpy(noise[len(xs)])

    with mock.patch(f"{type(peer).__module__}.randn_tensor", draw, create=True):
        for r, (t, stride) in enumerate(zip(peer.timesteps, strides, strict=True)):
            if stride is not None:
                peer.num_inference_steps = fractions.Fraction(1000, stride)
            F = output(r, peer.scale_model_input(x, t), t)
            x = peer.step(F, t, x, **arguments).prev_sample
            xs.append((alpha[r + 1] * x).numpy())
    return np.stack(xs)


def walk(peer, table, **arguments):
    """The peer's path under random outputs."""
    path = peers.start(table)

    def output(r, x, t):
        return torch.from_numpy(path.F[r])

    path.x[1:] = run(peer, table, path.x[0], output, path.noise, **arguments)
    return path


def assert_same_steps(case, spacing, final, predictions, tolerance=1e-5, **config):
    """Step by step, for all step counts; hundreds of them with the first prediction only.

    The peer's coefficients are in float64.
    """
    for prediction in predictions:
        peer = peer_of(case, spacing, prediction, final, **config)
        counts = [n for n in case.steps if n in FEWER or prediction == predictions[0]]
        # Before the peer's schedule goes to float64.
        tables = {n: make(case, peer, n, prediction, spacing, final) for n in counts}
        paths = []
        for steps, table in tables.items():
            if steps == 1 and spacing in SIGMAS and case.peer in VARIANCE_EXPLODING:
                continue  # these begin where linspace does, which with one step is at t = 0
            set_timesteps(peer, steps, table, spacing)
            in_double(peer, table)
            paths.append(walk(peer, table, **case.arguments))
        peers.assert_same_steps(paths, tolerance)


def true_strides(peer, table):
    """DDIM's peer steps to t - 1000 // N, which misses the true neighbour in linspace spacing and
    in trailing where N does not divide 1000 (its issues 11347 and 12633): there it is told the
    true stride, as a number of steps that yields it. None where nothing need be told."""
    n, spacing = table.calls, peer.config.get("timestep_spacing")
    honest = spacing == "leading" or (spacing == "trailing" and 1000 % n == 0)
    if type(peer).__name__ != DDIM or honest:
        return [None] * n
    return [int(t) for t in -np.diff([*table.t, -1])]


def drop_the_last_node(peer, n):
    """In trailing spacing the peers visit a node too many, t = -1, at 62 of the step counts up to
    1000 (61 is the first): their arange ends at 1e-13 instead of 0."""
    assert peer.timesteps[-1] == -1
    peer.timesteps = peer.timesteps[:n]
    peer.num_inference_steps = n
    if hasattr(peer, "sigmas"):
        peer.sigmas = torch.cat([peer.sigmas[:n], peer.sigmas[-1:]])


def second_difference(peer, outputs):
    """alpha' D2 of a third-order step, from x0 at three nodes, the latest last."""
    k = peer.step_index
    h1, h0, h = torch.diff(-torch.log(peer.sigmas[k - 2 : k + 2]))
    m2, m1, m0 = outputs
    r0, r1 = h0 / h, h1 / h
    D2 = ((m0 - m1) / r0 - (m1 - m2) / r1) / (r0 + r1)
    return D2 / (1 + peer.sigmas[k + 1] ** 2).sqrt()


def set_sign_right(peer):
    """The peer's third-order SDE step weighs the second difference with -alpha' (phi3 + 1) where
    -alpha' phi3 belongs: a -0.5 that should be +0.5. Then it is k-diffusion's."""
    theirs = peer.multistep_dpm_solver_third_order_update

    def update(outputs, *, sample, noise):
        return theirs(outputs, sample=sample, noise=noise) + second_difference(peer, outputs)

    peer.multistep_dpm_solver_third_order_update = update

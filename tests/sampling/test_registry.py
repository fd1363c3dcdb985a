"""Samplers by name: specs, options, names of tables, and what a mistake is told."""

import numpy as np
import pytest

from ldm_scaling.diffusion import schedule
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, solvers
from ldm_scaling.sampling.guidance import NONE, Correction

SD = schedule.get("sd")
COMMON = {
    "offset": 1, "guidance_low": 0.0, "guidance_high": np.inf, "rescale": 0.0, "threshold": 0.0,
    "threshold_max": np.inf,
}


def test_specs_are_parsed_into_the_defaults_types():
    for spec, name, options in (
        ("ddim", "ddim", {}), ("ddim:eta=1", "ddim", {"eta": 1.0}),
        (" ddim : eta = 0.5 , final = zero ", "ddim", {"eta": 0.5, "final": "zero"}),
        ("dpmpp_2m:solver_type=heun,lower_order_final=false", "dpmpp_2m",
         {"solver_type": "heun", "lower_order_final": False}),
        ("unipc:order=3", "unipc", {"order": 3}),
        ("ddim:guidance_low=0.28,guidance_high=2.9", "ddim",
         {"guidance_low": 0.28, "guidance_high": 2.9}),
    ):
        got_name, got = solvers.parse(spec)
        assert (got_name, got) == (name, options)
        assert [type(value) for value in got.values()] == [type(v) for v in options.values()]


def test_canonical_is_one_spelling():
    for spec, wanted in (
        ("ddim", "ddim"), ("ddim:eta=0", "ddim"), ("ddim:eta=.50", "ddim:eta=0.5"),
        ("ddim:eta=1.0", "ddim:eta=1"), ("ddim:final=abar_0", "ddim"),
        ("ddim:final=zero", "ddim:final=zero"), ("dpmpp_2m:final=zero", "dpmpp_2m"),
        ("ddim:offset=1", "ddim"), ("unipc:variant=bh1,order=3", "unipc:order=3,variant=bh1"),
        ("dpmpp_2s:midpoints=True", "dpmpp_2s:midpoints=true"),
        ("ddim:guidance_high=inf,rescale=0.7", "ddim:rescale=0.7"),
        ("ddim:threshold_max=inf,threshold=0.9", "ddim:threshold=0.9"),
        ("ddim:threshold_max=1,threshold=0.9", "ddim:threshold=0.9,threshold_max=1"),
        ("ddim:eta=1e-7", "ddim:eta=1e-07"), ("ddim:eta=0.12345678901", "ddim:eta=0.12345678901"),
    ):
        assert solvers.canonical(spec) == wanted == solvers.canonical(wanted)


def test_a_spec_and_options_are_the_same_table():
    one = solvers.make("ddim:eta=0.5,final=zero,offset=0", SD, 7)
    other = solvers.make("ddim", SD, 7, eta=0.5, final="zero", offset=0)
    assert one.name == other.name == "ddim:eta=0.5,final=zero,offset=0-leading+0-ddim-zero-7"
    np.testing.assert_array_equal(one.rows(), other.rows())
    assert solvers.make("ddim", SD, 7, eta=1).name == solvers.make("ddim:eta=1", SD, 7).name


def test_options_that_every_solver_has():
    assert solvers.options_of("ddim") == {"eta": 0.0, "final": "abar_0", **COMMON}
    assert solvers.options_of("ddpm") == {"final": "zero", **COMMON}
    for name in solvers.SOLVERS:
        table = solvers.make(
            name, SD, 5, spacing="leading", final="abar_0", offset=0, guidance_low=0.3,
            guidance_high=3.0, rescale=0.7, threshold=0.99, threshold_max=2.0,
        )
        assert table.correction == Correction(0.7, 0.99, 2.0) != NONE
        noise = table.sigma[:-1] / table.alpha[:-1]
        np.testing.assert_array_equal(table.g, (noise >= 0.3) & (noise <= 3.0))
        assert 0 < table.g.sum() < table.calls
        assert table.sigma[-1] == SD.sigma[0] and table.t[0] < 999
        assert solvers.make(name, SD, 5).correction == NONE


def test_every_registered_solver_makes_tables_with_telling_names():
    names = set()
    spacings = ("leading", "trailing", "linspace", "karras", "karras:rho=5", "exponential", "ays",
                "lcm", "codi")
    for name in solvers.SOLVERS:
        for spacing in spacings:
            for steps in (1, 2, 5, 10):
                table = solvers.make(name, SD, steps, "epsilon", spacing)
                assert spacing in table.name and table.name.startswith(f"{name}-")
                names.add(table.name)
    assert len(names) == len(solvers.SOLVERS) * len(spacings) * 4
    for name, options in (("ddim", {"eta": 0.5}), ("dpmpp_2m", {"lower_order_final": False}),
                          ("ddim", {"final": "zero"}), ("ddim", {"offset": 0}),
                          ("ddpm_large", {"final_noise": True}), ("ddim", {"rescale": 0.7}),
                          ("ddim", {"guidance_high": 3.0})):
        assert solvers.make(name, SD, 10, **options).name not in names


def test_a_start_with_much_signal_is_logged_once(caplog):
    """Few steps of leading spacing, and many, begin far from the noise that samples begin as."""
    solvers._say_start.cache_clear()

    def said(*args, **options):
        caplog.clear()
        for _ in range(2):
            solvers.warn_of_start(solvers.make(*args, **options))
        return [record.getMessage() for record in caplog.records]

    (line,) = said("ddim", SD, 1)
    assert "ddim-leading-ddim-abar_0-1 begins at t=1, where 99.8% of the variance" in line
    for args in (("ddim", SD, 3), ("ddpm", SD, 501), ("ddim", SD, 334), ("ddim", SD, 337),
                 ("dpmpp_2m", SD, 1), ("ddim", SD, 1, "v", "linspace")):
        assert len(said(*args)) == 1, args
    for args in (("ddim", SD, 4), ("ddim", SD, 333), ("ddim", SD, 338), ("ddim", SD, 500),
                 ("ddim", SD, 1, "v", "trailing"),
                 ("codi", SD, 1, "v"), ("euler", schedule.get("flow"), 1, "flow", "trailing")):
        assert not said(*args), args


def test_steps_too_long_for_a_solver_are_logged_once(caplog):
    """Heun's second slope counts by the ratio of noise levels, of which cosine's first is vast."""
    solvers._say_gain.cache_clear()

    def said(spec, name, steps, spacing):
        caplog.clear()
        for _ in range(2):
            solvers.warn(solvers.make(spec, schedule.get(name), steps, "v", spacing))
        return [record.getMessage() for record in caplog.records]

    (line,) = said("heun", "cosine", 10, "trailing")
    assert "heun-trailing-zero-10 takes steps that are too long" in line
    assert "times too large; take more steps, another spacing or sampler 'heun:over=line'" in line
    for args in (("heun", "cosine", 10, "karras"), ("heun", "edm", 5, "karras"),
                 ("unipc:variant=bh1", "edm", 5, "karras")):
        assert len(said(*args)) == 1, args
    for args in (("heun:over=line", "cosine", 10, "trailing"), ("heun", "cosine", 50, "trailing"),
                 ("heun", "cosine", 10, "leading"), ("heun", "sd", 4, "leading"),
                 ("heun", "sd", 5, "karras"), ("heun", "flow", 2, "trailing"),
                 ("euler", "cosine", 2, "trailing"), ("unipc", "edm", 5, "karras")):
        assert not said(*args), args


def test_a_solvers_own_spacing():
    for name in solvers.SOLVERS:
        spacing = solvers.SOLVERS[name].spacing
        own, told = (solvers.make(name, SD, 4, spacing=s) for s in (None, spacing))
        assert own.name == told.name
        assert spacing == (name if name in ("lcm", "codi") else "leading")


def test_the_users_own_nodes():
    table = solvers.make("euler", SD, 3, spacing="timesteps:999,500,20")
    assert table.t.tolist() == [999, 500, 20]
    table = solvers.make("heun", SD, 3, spacing="sigmas:14.6,3.9,0.4")
    np.testing.assert_allclose(
        table.sigma / np.maximum(table.alpha, 1e-9), [14.6, 3.9, 3.9, 0.4, 0.4, 0]
    )
    with pytest.raises(UserError, match="places 3 steps, but steps=4"):
        solvers.make("euler", SD, 4, spacing="timesteps:999,500,20")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("plms", "unknown sampler 'plms': choose one of ddim, ddpm, ddpm_large, euler, "),
     ("dpmpp_2n", "unknown sampler 'dpmpp_2n', did you mean 'dpmpp_2.* choose one of ddim"),
     ("dpmpp_1", "did you mean 'dpmpp_1s'"), ("", "unknown sampler ''"),
     ("ddim:etta=1", "no option 'etta', did you mean 'eta'.* it has eta=0, final=abar_0, offset"),
     ("dpmpp_2m:order=3", "no option 'order'.* it has solver_type=midpoint, lower_order_final="),
     ("ddim:eta=much", "eta='much': give a number, such as 0"),
     ("unipc:order=2.5", "order='2.5': give a whole number, such as 2"),
     ("dpmpp_2s:midpoints=1", "midpoints='1': give true or false, such as false"),
     ("ddim:eta", "write name:option=value,option=value"), ("ddim:", "write name:option=value"),
     ("ddim:eta=0,eta=1", "each option once"), ("ddim:=1", "write name:option"),
     ("ddim:eta=1.5", "eta=1.5: give 0"), ("ddim:eta=nan", "eta=nan"),
     ("euler_ancestral:eta=-1", "eta=-1"), ("euler_ancestral:eta=1e200", "eta=1e.200: give 0 to"),
     ("dpmpp_2m_sde:eta=inf", "eta=inf"),
     ("dpmpp_2m:solver_type=euler", "solver_type='euler': choose one of midpoint, heun"),
     ("dpmpp_3m:third_order=best", "choose one of public, exact"),
     ("unipc:order=4", "order=4: choose 1, 2 or 3"), ("unipc:variant=bh3", "one of bh1, bh2"),
     ("ddim:final=one", "unknown final node 'one': choose one of abar_0, zero"),
     ("ddim:rescale=2", "rescale=2.0"), ("ddim:guidance_low=3,guidance_high=1", "the lower first")],
)
def test_mistakes_in_a_spec(spec, message):
    with pytest.raises(UserError, match=message):
        solvers.make(spec, SD, 20)


def test_mistakes_in_a_call():
    for args, options, message in (
        (("ddim", SD, 20, "epsilon", "karas"), {}, "unknown spacing 'karas': choose one of lea"),
        (("ddim", SD, 20, "noise"), {}, "epsilon, v, x0, flow"),
        (("ddim", SD, 1000), {}, "it can place 1 to 999;"), (("ddim", SD, 0), {}, "steps=0"),
        (("lcm", SD, 60, "v", None), {}, "it can place 1 to 50;"),
        (("codi", SD, 20, "v", None), {}, "it can place 1 to 10, 13, 17, 25, 50;"),
        (("ddim", SD, 20, "v", "trailing"), {"offset": 0}, "offset=0 does not belong"),
        (("ddim:eta=0", SD, 20), {"eta": 1.0}, "both give eta"),
        (("ddim", SD, 20), {"eta": True}, "eta=True: give a number"),
        (("ddim", SD, 20), {"offset": 1.5}, "offset=1.5: give a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            solvers.make(*args, **options)
    g = grid.build("leading", SD, 4)
    for options, message in (
        ({"order": 4}, "order=4: choose 1, 2 or 3"), ({"variant": "ab"}, "multistep, singlestep"),
        ({"variant": "singlestep", "order": 3}, "order 2 and eta 0 only"),
        ({"variant": "singlestep", "eta": 1.0}, "order 2 and eta 0 only"),
        ({"midpoints": True}, "belongs to variant='singlestep'"),
    ):
        with pytest.raises(UserError, match=message):
            solvers.dpm_solver_pp(g, "v", **options)
    with pytest.raises(UserError, match="fixed_small, fixed_large"):
        solvers.ddpm(g, "v", variance="learned")
    with pytest.raises(UserError, match="only its end"):
        solvers.ddim(grid.Grid([2, 1], [0.5, 1, 1], [0.75**0.5, 0, 0], "mine"), "v")

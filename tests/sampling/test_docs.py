"""docs/samplers.md: its code runs and its tables are the registry's."""

import contextlib
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from ldm_scaling.config import Diffusion, named
from ldm_scaling.diffusion import parameterization, schedule, timesteps, weighting
from ldm_scaling.errors import UserError
from ldm_scaling.sampling import grid, solvers

SD = schedule.get("sd")
TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "samplers.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def rows_of(first_heading):
    table = TEXT[TEXT.index(f"\n| {first_heading} |"):].split("\n\n")[0].splitlines()[3:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


@pytest.fixture
def namespace(monkeypatch):
    """What the page's code leaves behind; what it registers is gone afterwards."""
    monkeypatch.setattr(solvers, "SOLVERS", dict(solvers.SOLVERS))
    tables = named.SCHEDULES, named.DENSITIES, named.WEIGHTINGS
    before = [dict(table) for table in tables]
    names = {}
    for block in blocks("python"):
        exec(compile(block, "docs/samplers.md", "exec"), names)
    yield names
    for table, known in zip(tables, before):
        table.clear()
        table.update(known)


def test_the_first_example(namespace, capsys):
    exec(blocks("python")[0], {})
    printed = capsys.readouterr().out.strip()
    assert re.search(r"# (.*)", blocks("python")[0]).group(1) == printed


def test_what_is_of_ones_own_goes_by_name(namespace):
    told = re.findall(r"--config\.diffusion\.(\w+)=(\S+)`", TEXT)
    assert len(told) == 3
    given = Diffusion(**dict(told))
    own = schedule.get(given.schedule)
    np.testing.assert_allclose(own.noise[-1], np.tan(1.4))
    weight_T = weighting.weights(given.weighting, own, "x0")
    snr = own.noise**-2.0
    np.testing.assert_allclose(1 / weight_T, 1 / snr + 1 / 5)
    t_B = timesteps.draw(given.timesteps, jax.random.key(0), 4000, own)
    assert abs(float(t_B.mean()) / 1000 - 3 / 4) < 0.02


def test_the_slope_is_one(namespace):
    loss, slope = namespace["loss"], namespace["slope"]
    assert abs(slope - (loss(0.51) - loss(0.49)) / 0.02) < 1e-2 * abs(slope)


def test_the_new_solver_is_one_of_them(namespace):
    lines = [line for line in blocks("python")[-1].splitlines() if line]
    assert len([line for line in lines if "import" not in line]) <= 10
    for above, eta in (("0", 1.0), ("inf", 0.0)):
        ours = solvers.make(f"ddim_early:above={above}", SD, 9)
        ddim = solvers.make("ddim", SD, 9, final="zero", eta=eta)
        np.testing.assert_allclose(ours.rows(), ddim.rows(), atol=1e-6)
    some = solvers.make("ddim_early", SD, 9, spacing="karras")
    noise = some.sigma[:-1] / some.alpha[:-1]
    np.testing.assert_array_equal(some.c != 0, noise > 1)


def test_the_table_of_samplers_is_the_registry():
    listed = {}
    for name, _, calls, options, final, spacing in rows_of("name"):
        own = dict(pair.split("=") for pair in re.findall(r"`([^`]*)`", options))
        listed[name.strip("`")] = (calls, own, final, spacing)
    assert list(listed) == list(solvers.SOLVERS)
    for name, (calls, own, final, spacing) in listed.items():
        solver = solvers.SOLVERS[name]
        assert (final, spacing) == (solver.final, solver.spacing)
        spec = name + (":" if own else "") + ",".join(f"{o}={v}" for o, v in own.items())
        assert solvers.parse(spec) == (name, dict(solver.options))
        count = solvers.make(name, SD, 8, spacing=None).calls
        assert count == {"N": 8, "2N - 1": 15}[calls], name


def test_the_table_of_common_options_is_the_registrys():
    listed = {}
    for options, defaults, _ in rows_of("option"):
        for option, default in zip(options.split(", "), defaults.split(", "), strict=True):
            listed[option.strip("`")] = default
    known = solvers.options_of("ddpm")
    assert set(listed) == set(known)
    for option, default in listed.items():
        if option != "final":
            assert math.isclose(float(default), known[option])


def test_the_tables_of_schedules_and_predictions_are_all_there_are():
    for heading, known in (
        ("schedule", named.SCHEDULES), ("density", named.DENSITIES),
        ("weighting", named.WEIGHTINGS),
    ):
        listed = {}
        for name, _, options, *_ in rows_of(heading):
            pairs = (pair.split("=") for pair in re.findall(r"`([^`]*)`", options))
            listed[name.strip("`")] = {option: float(value) for option, value in pairs}
        defaults = {
            name: {option: float(f"{has.default:g}") for option, has in one.options.items()}
            for name, one in known.items()
        }
        assert listed == defaults
    listed = [row[0].strip("`") for row in rows_of("prediction")]
    assert tuple(listed) == parameterization.PREDICTIONS


def test_every_schedule_takes_the_spacings_that_are_said():
    every = {*grid.SPACINGS} - {"codi"}
    for name, _, _, end, spacings in rows_of("schedule"):
        given = schedule.get(name.strip("`"))
        if end == "pure noise":
            assert given.zero_terminal_snr
        else:
            assert math.isclose(float(end.split("=")[1]), given.noise[-1], rel_tol=2e-3)
        said = every - {"ays"} if spacings.startswith("all but") else every
        said = said if spacings.startswith("all") else set(spacings.split(", "))
        fits = set()
        for spacing in every:
            with contextlib.suppress(UserError):
                solvers.make("dpmpp_2m", given, 5, "v", spacing)
                fits.add(spacing)
        assert fits == said, name


def test_every_spec_and_spacing_is_one():
    for spec in blocks("text")[0].split():
        solvers.make(spec, SD, 20)
    spacings = [re.findall(r"`([^`]*)`", row[0]) for row in rows_of("spacing")]
    spacings = [spacing for cell in spacings for spacing in cell]
    assert set(grid.SPACINGS) <= set(spacings)
    for spacing in spacings:
        steps = 1 + spacing.count(",") if ":" in spacing and "=" not in spacing else 5
        assert solvers.make("ddim", SD, steps, spacing=spacing).calls == steps

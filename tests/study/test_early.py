"""Members along their training: what is measured, and checkpoints that were not kept."""

import dataclasses

import pytest

from ldm_scaling.config import Early, Study, Sweep, Train
from ldm_scaling.errors import UserError
from ldm_scaling.study import early
from ldm_scaling.study import subject as subject_lib
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir

STUDY = Study(
    members=("c8", "c16"), train=Train(steps=9, warmup_steps=2, keep_steps=(6, 3, 9)),
    sweep=Sweep(samplers=("ddim", "dpmpp_2m"), steps=(2, 50), guidance=(1.5, 3.0), num_images=16),
    early=Early("ddim", 2),
)


def test_every_member_is_measured_at_each_step_that_is_kept_before_the_end():
    """By one table, at all guidance rates: a rate is chosen as at the end."""
    found = early.subjects(STUDY)
    assert [(s.member, s.train_step) for s in found] == [
        ("c8", 3), ("c8", 6), ("c16", 3), ("c16", 6)]
    for s in found:
        assert subject_lib.tables(s.sweep) == [("ddim", 2, "")]
        end = subject_lib.of_member(STUDY, s.member)
        assert dataclasses.replace(s, train_step=9, sweep=end.sweep) == end
        ours, theirs = ({(i.guidance, i.seed_block) for i in subject_lib.selection(x, "r")}
                        for x in (s, end))
        assert ours == theirs
    keys = {i.key for s in found for i in subject_lib.planned(s)}
    assert len(keys) == 4 * 3


def test_none_is_measured_where_none_is_asked_for_or_nothing_is_trained():
    for values in (
        {"early": Early()}, {"train": dataclasses.replace(STUDY.train, keep_steps=(9,))},
        {"weights": "sd", "members": ("c8",)},
    ):
        assert early.subjects(dataclasses.replace(STUDY, **values)) == []
    # Nor does it decide a network, or a workdir.
    assert dataclasses.replace(STUDY, early=Early()).identity() == STUDY.identity()


@pytest.mark.parametrize("how", [Early("ddpm", 2), Early("ddim", 4), Early("dpmpp_2m", 50)])
def test_what_the_end_is_not_measured_by_is_refused(how):
    told = f"early.sampler={how.sampler!r}, early.steps={how.steps}: the end.*'dpmpp_2m': 20"
    with pytest.raises(UserError, match=told):
        early.subjects(dataclasses.replace(STUDY, early=how))


def test_a_checkpoint_that_was_not_kept_is_told(tmp_path, monkeypatch):
    """Before a run goes on beyond it, and before a sweep that would measure it; not where it has
    been measured."""
    materials, kept = Materials(STUDY, Workdir(tmp_path)), {}
    monkeypatch.setattr(
        early.checkpoint, "steps_of", lambda path: kept.get(path.parent.name, []))
    for there in ([], [2], [3, 5]):  # Not begun, not so far, kept.
        kept["c8"] = there
        early.require_ahead(materials, "c8")
    kept["c8"] = [4, 5]
    with pytest.raises(UserError, match="c8 is to be measured after 3 steps.*leave 3 out of train"):
        early.require_ahead(materials, "c8")
    kept |= {"c8": [3, 6, 9], "c16": [3, 9]}
    with pytest.raises(UserError, match="c16 is to be measured after 6 steps"):
        early.require_kept(materials, "r")
    monkeypatch.setattr(
        early.subject_lib, "existing", lambda subject, *_: subject_lib.planned(subject))
    early.require_kept(materials, "r")


def test_snapshots_that_do_not_give_the_average_along_training_are_told(tmp_path):
    """Before anything is measured: what is there at the end may not be there early on."""
    tracked = dataclasses.replace(STUDY.train, averages=(0.05, 0.1))
    study = dataclasses.replace(STUDY, train=tracked, average="c8=0.25")
    for member in STUDY.members:
        for n in (3, 6, 9):
            (tmp_path / "models" / member / "checkpoints" / str(n)).mkdir(parents=True)
    with pytest.raises(UserError, match="c8 is to be measured after 3 steps of training: averages "
                                        "at step 3: .*no snapshots.*early.sampler="):
        early.require_kept(Materials(study, Workdir(tmp_path)), "r")
    early.require_kept(Materials(STUDY, Workdir(tmp_path)), "r")

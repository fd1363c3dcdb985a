"""Studies from Python: what is told before anything is done."""

import pytest

from ldm_scaling import config
from ldm_scaling.errors import UserError
from ldm_scaling.study import api, stages, study_checks
from ldm_scaling.study.workdir import Workdir


@pytest.mark.parametrize("given, stage, told", [
    ({}, "sweeep", "no stage is called 'sweeep'; choose prepare, .*study"),
    (None, "study", "study.json is not there: .*give --config=FILE"),
    ({"train": {"clip_norm": -1.0}}, "train", "config: train.clip_norm=-1.0"),
    ({"members": ("c8",), "reference": "c8"}, "report", "there are no records in"),
])  # fmt: skip
def test_a_mistake_is_told_before_anything_is_written(tmp_path, monkeypatch, given, stage, told):
    monkeypatch.setattr(study_checks, "check", lambda study, place, **_: _Materials(place))
    with pytest.raises(UserError, match=told):
        api.run(given, tmp_path / "run", stage)
    assert not list(tmp_path.iterdir())


class _Materials:
    def __init__(self, place):
        self.workdir, self.study = place, None


def test_a_stage_holds_the_workdir_and_leaves_its_config(tmp_path, monkeypatch):
    tree = config.default()
    tree.members, tree.reference = ("c8",), "c8"

    def sweep(materials):
        with pytest.raises(UserError, match="another process works in"):
            materials.workdir.lock()
        seen.append(materials.study)

    def check(study, place, **needs):
        asked.update(needs)
        found = _Materials(place)
        found.study = study
        return found

    seen, asked = [], {}
    monkeypatch.setattr(study_checks, "check", check)
    monkeypatch.setattr(stages, "run_sweep", sweep)
    assert api.run(tree, tmp_path, "sweep") == api.run(None, tmp_path, "sweep") == []
    assert seen[0] == seen[1] == Workdir(tmp_path).last_config() and seen[0].members == ("c8",)
    assert asked == {"measured": True, "trains": False, "pictures": False, "text": False}

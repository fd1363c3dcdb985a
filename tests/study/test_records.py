"""A folder of records: what is damaged is named, what is no record is left alone."""

import json
import logging

import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.study import records
from tests.study import fake_records as fake


@pytest.fixture
def folder(tmp_path):
    for r in fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4,)}, replicates=4):
        records.write(tmp_path, r)
    return tmp_path


def test_what_is_no_record_is_left_alone_and_named_once(folder, caplog):
    before = records.read_all(folder)
    for name in ("index.json", "0123456789abcdef (1).json", ".hidden.json", "notes.txt"):
        (folder / name).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert records.read_all(folder) == before
    (said,) = caplog.messages
    assert "index.json" in said and "(1).json" in said
    assert "hidden" not in said and "notes" not in said


def test_records_from_before_guided_calls_were_counted_are_read(folder):
    path = sorted(folder.glob("*.json"))[0]
    kept = json.loads(path.read_text())
    del kept["guided_calls"]
    path.write_text(json.dumps(kept))
    assert records.read(path).guided_calls is None
    path.write_text(json.dumps(kept | {"guided_calls": 3}))
    assert records.read(path).guided_calls == 3


def test_several_damaged_records_are_counted_and_the_first_is_named(folder):
    first, second, *_ = sorted(folder.glob("*.json"))
    second.write_text(second.read_text()[:-40])
    with pytest.raises(UserError, match=f"^the record .*{second.name} is damaged"):
        records.read_all(folder)
    first.write_text("")
    with pytest.raises(UserError, match=f"^2 records in {folder} are damaged.*/{first.name} is "
                       "damaged.*restore .* or delete .* ldm-scaling sweep "):
        records.read_all(folder)


@pytest.mark.parametrize("changed", [
    {"metrics": {"fd_effnetlite0": "x"}}, {"metrics": {"fd_effnetlite0": float("nan")}},
    {"metrics": {"fd_effnetlite0": None}}, {"metrics": [1]}, {"norm_cost": "1"},
    {"norm_cost": 0}, {"calls": 0}, {"replicates": None},
    {"replicates": {"fd_effnetlite0": ["x"]}}, {"seconds_per_image": float("inf")},
    {"intervals": {"fd_effnetlite0": [1.0, None]}}, {"gflops": [1]}, {"guided_calls": 5},
    {"guided_calls": "4"}, {"seconds_per_image": -1.0},
], ids=str)
def test_a_value_that_is_none_names_the_file(folder, changed):
    path = sorted(folder.glob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        records.read_all(folder)

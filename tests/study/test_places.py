"""Places of records: how they are named, and what two of them say of one configuration."""

import dataclasses

import pytest

from ldm_scaling.cli import program
from ldm_scaling.errors import UserError
from ldm_scaling.study import curves, places, records
from tests.study import fake_records as fake


@pytest.fixture(scope="module")
def study():
    return fake.make(models=("c8",), samplers=("ddim",), steps={"ddim": (4, 10)}, replicates=0)


def _changed(record, **fields):
    return dataclasses.replace(record, identity=dataclasses.replace(record.identity, **fields))


def test_a_place_may_have_commas(tmp_path, study):
    commas, plain = tmp_path / "one, two" / "w", tmp_path / "three"
    for folder, r in ((commas, study[0]), (plain, study[1])):
        records.write(folder, r)
    assert places.read([str(commas)]).homes == [commas]
    assert places.read([str(commas), str(plain)]).homes == [commas, plain]
    assert places.read([f"{plain}, {plain}"]).homes == [plain]
    with pytest.raises(UserError, match="--records=x0: there is no such folder"):
        places.read([",".join(f"x{k}" for k in range(3000))])


def test_a_member_of_two_places_is_named_with_both(tmp_path, study, capsys):
    """Where the two are of other trainings: a file that was deleted would leave the rest."""
    one, two = tmp_path / "one", tmp_path / "two"
    for r in study:
        records.write(one / "records", r)
        other = _changed(r, model_hash="other")
        records.write(two, other)
    for command in (["figure", "winners", f"--to={tmp_path / 'to'}"], ["advise"]):
        assert program.main([*command, f"--records={one},{two}"]) == 2
        said = capsys.readouterr().err
        assert f"{one / 'records'}/" in said and f"{two}/" in said
        assert f"{len(study)} configurations clash so" in said and "each place alone" in said
    lone, again = tmp_path / "lone", tmp_path / "again"
    records.write(lone, r)
    records.write(again, other)
    assert program.main(["advise", f"--records={lone},{again}"]) == 2
    assert "1 configuration clashes so. The places" in capsys.readouterr().err
    # Of one place it is the files that are named.
    records.write(one / "records", other)
    assert program.main(["advise", f"--records={one}"]) == 2
    said = capsys.readouterr().err
    assert f"keep one of {r.identity.key}.json and {other.identity.key}.json" in said


def test_the_files_of_arms_that_clash_are_named(study):
    """Of several spacings arms have names that no file's key is made of."""
    first = study[0]
    again = _changed(first, model_hash="other")
    with pytest.raises(UserError, match=f"{first.identity.key}.json and {again.identity.key}.json"):
        curves.distinct([first, _changed(first, spacing="another"), again])

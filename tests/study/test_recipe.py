"""What a network's training has of its own is in its hash and in its checkpoints."""

import dataclasses

import pytest

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.study import networks, runs
from ldm_scaling.training import checkpoint, loop
from tests.training import toy


def test_hashes_of_what_is_trained_otherwise_alone_are_others_than_before():
    study = Study(members=("c8",), reference="c8")
    for member in ("c8", "sd15", "dit_w40", "sit_w40", "uvit_w32", "mmdit_d5", "edm2_c14", "39m"):
        spec = zoo.get(member).spec
        said = {"__class__": type(spec).__name__, **dataclasses.asdict(spec)}
        said.pop("zero_init", None)  # which specs did not have
        before = files.sha256_of([study.training_hash(member), said])
        assert (networks.model_hash(study, member) == before) == (member not in ("edm2_c14", "39m"))


@pytest.mark.parametrize("member, what", [
    ("edm2_c14", "rates by fan-in"), ("39m", "zeros that the last layers of blocks begin at"),
])
def test_checkpoints_of_what_was_trained_without_are_refused(tmp_path, member, what):
    """And go on being good for a network that has no training of its own."""
    own = runs.network(zoo.get(member).spec)
    assert own["recipe"][-1] == what and "recipe" not in runs.network(zoo.get("c8").spec)
    earlier = {k: v for k, v in own.items() if k not in ("recipe", "zero_init")}
    for name, about in (("now", {"network": own}), ("told", {"network": earlier}), ("before", {})):
        loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path / name, toy.one_device(), 0, about)
    checkpoint.check_network(tmp_path / "now" / "checkpoints", 6, own)
    for name in ("told", "before"):
        checkpoint.check_network(tmp_path / name / "checkpoints", 6, earlier)
        with pytest.raises(UserError, match=f"another version, .* {what}: train it again"):
            checkpoint.check_network(tmp_path / name / "checkpoints", 6, own)


def test_checkpoints_from_before_a_network_could_begin_with_zeros(tmp_path):
    """Are good for one that does not."""
    own = runs.network(zoo.get("c8").spec)
    about = {"network": {k: v for k, v in own.items() if k != "zero_init"}}
    loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path, toy.one_device(), 0, about)
    checkpoint.check_network(tmp_path / "checkpoints", 6, own)

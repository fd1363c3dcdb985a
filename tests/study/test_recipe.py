"""What a network's training has of its own is in its hash and in its checkpoints."""

import pytest

from ldm_scaling import files
from ldm_scaling.config import Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import edm2, zoo
from ldm_scaling.study import networks, runs
from ldm_scaling.training import checkpoint, loop
from tests.training import toy


def test_hashes_of_edm2_alone_are_others_than_before():
    study = Study(members=("c8",), reference="c8")
    for member in ("c8", "dit_w40", "sit_w40", "uvit_w32", "mmdit_d5", "edm2_c14"):
        before = files.sha256_of([study.training_hash(member), zoo.get(member).spec])
        assert (networks.model_hash(study, member) == before) == (member != "edm2_c14")


def test_checkpoints_of_an_edm2_that_was_trained_without_are_refused(tmp_path):
    """And go on being good for a network that has no training of its own."""
    own = runs.network(zoo.get("edm2_c14").spec)
    assert own["recipe"] == edm2.RECIPE and "recipe" not in runs.network(zoo.get("c8").spec)
    earlier = {k: v for k, v in own.items() if k != "recipe"}
    for name, about in (("now", {"network": own}), ("told", {"network": earlier}), ("before", {})):
        loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path / name, toy.one_device(), 0, about)
    checkpoint.check_network(tmp_path / "now" / "checkpoints", 6, own)
    for name in ("told", "before"):
        checkpoint.check_network(tmp_path / name / "checkpoints", 6, earlier)
        with pytest.raises(UserError, match="another version, .* rates by fan-in: train it again"):
            checkpoint.check_network(tmp_path / name / "checkpoints", 6, own)

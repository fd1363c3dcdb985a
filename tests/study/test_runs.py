"""A run is of one network: weights of others are refused, whatever their shapes."""

import dataclasses

import jax
import pytest

from ldm_scaling import config
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import runs, stages
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.training import checkpoint, loop, step
from tests.training import toy

SPEC = zoo.get("c8").spec
OTHER = dataclasses.replace(SPEC, heads=2)  # Its parameters have the same shapes.


def _fit(folder, about, steps=2):
    run = dataclasses.replace(toy.CONFIG, steps=steps, warmup_steps=1)
    loop.fit(toy.task(), run, toy.Loader, folder, toy.one_device(), seed=0, about=about)
    return run


def test_weights_of_another_network_are_refused(tmp_path):
    study = config.Study()
    run = _fit(tmp_path, runs.about(study, SPEC))
    assert runs.done(tmp_path, run, SPEC) and runs.done(tmp_path, run)
    folder = tmp_path / "checkpoints"
    abstract = step.abstract_state(toy.init, run, mesh_lib.make(devices=jax.devices()[:1]))
    checkpoint.average(folder, 2, abstract, runs.network(SPEC))
    for reads in (
        lambda: runs.done(tmp_path, run, OTHER),
        lambda: checkpoint.average(folder, 2, abstract, runs.network(OTHER)),
        lambda: _fit(tmp_path, runs.about(study, OTHER), steps=3),
    ):
        with pytest.raises(UserError, match=r"checkpoints/2 .*: heads was 4 and is 2; give"):
            reads()
    # A run that is not done yet is none of it.
    assert not runs.done(tmp_path, dataclasses.replace(run, steps=3), OTHER)
    with pytest.raises(UserError, match="kind was 'UNetSpec' and is 'DiTSpec'"):
        runs.done(tmp_path, run, zoo.get("dit_w40").spec)


@pytest.mark.parametrize("about", [
    None, dataclasses.asdict(config.Study()),
    runs.about(config.Study(), SPEC) | {"network": {"heads": 4, "of_a_later_version": 1}},
], ids=["nothing", "a config", "another version"])
def test_what_says_nothing_of_it_passes(tmp_path, about):
    run = _fit(tmp_path, about)
    assert runs.done(tmp_path, run, SPEC)


def test_a_factor_of_no_parameter_is_told_before_anything_is_computed(tmp_path):
    study = config.parse({
        "members": ("c8",), "reference": "c8", "data": {"side": 64},
        "train": {"rate_factors": ("no_such_layer=0",)}})
    with pytest.raises(UserError, match="rate_factors=no_such_layer=0: no parameter is left"):
        stages.check(study, Workdir(tmp_path), measured=False)
    assert not list(tmp_path.iterdir())

"""A run is of one network: weights of others are refused, whatever their shapes."""

import dataclasses

import jax
import pytest

from ldm_scaling import config
from ldm_scaling.errors import UserError
from ldm_scaling.models import zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import runs, study_checks
from ldm_scaling.study.workdir import Workdir
from ldm_scaling.tasks import autoencoder
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


_NO_FACTOR = {"rate_factors": ("no_such_layer=0",)}
_NO_METRIC = {"keep_best": 1, "keep_metric": "nosuch"}


@pytest.mark.parametrize("tree, told", [
    ({"train": _NO_FACTOR}, "train.rate_factors=no_such_layer=0: no parameter is left"),
    ({"autoencoder": {"train": _NO_FACTOR}}, "autoencoder.train.rate_factors=no_such_layer=0: no"),
    ({"finetune": {"task": "inpainting", "train": _NO_FACTOR}}, "finetune.train.rate_factors=no_s"),
    ({"halving": {"method": "guided", "imitation": _NO_FACTOR}}, "halving.imitation.rate_factors="),
    ({"members": ("c8_s16",), "reference": "c8_s16", "data": {"side": 128},
      "cascade": {"base": ("c8",), "base_train": _NO_FACTOR}}, "cascade.base_train.rate_factors="),
    ({"train": _NO_METRIC}, r"train.keep_metric='nosuch' .*\['loss'\]"),
    ({"autoencoder": {"train": {"keep_best": 1, "keep_metric": "psnr"}}},
     r"autoencoder.train.keep_metric='psnr' .*\['l1'\]"),
    ({"mesh": {"data": 8}, "train": {"batch_size": 16, "micro_batches": 4}},
     "train.batch_size / micro_batches=4 does not split over 8 devices"),
    ({"mesh": {"tensor": 8}}, "mesh.tensor=8 does not divide the 4 attention heads of member c8"),
])  # fmt: skip
def test_what_no_run_could_do_is_told_before_anything_is_computed(tmp_path, tree, told):
    study = config.parse({
        "members": ("c8",), "reference": "c8", "data": {"side": 64},
        "autoencoder": {"base_channels": 32, "blocks_per_level": 1} | tree.pop("autoencoder", {}),
    } | tree)
    with pytest.raises(UserError, match=f"config: {told}"):
        study_checks.check(study, Workdir(tmp_path), measured=False)
    assert not list(tmp_path.iterdir())


def test_what_was_trained_can_be_used_where_its_batches_do_not_split(tmp_path):
    study = config.parse({
        "members": ("c8",), "reference": "c8", "data": {"side": 64}, "mesh": {"data": 8},
        "autoencoder": {"base_channels": 32, "blocks_per_level": 1},
        "train": {"batch_size": 12, "micro_batches": 2},
    })
    study_checks.check(study, Workdir(tmp_path), measured=False, trains=False)
    with pytest.raises(UserError, match="train.batch_size=12 does not split over 8 devices"):
        study_checks.check(study, Workdir(tmp_path), measured=False)


def test_the_best_autoencoders_are_told_by_a_scalar_that_there_is():
    plain = config.parse({"autoencoder": {"train": {"keep_best": 1}}})
    assert plain.autoencoder.train.keep_metric == "l1"
    given = config.default()
    given.autoencoder.train.keep_best = 1
    study = config.parse(given)
    runs.check("autoencoder.train", study.autoencoder.train, toy.one_device(), autoencoder.RANKS)


@pytest.mark.parametrize("weights, counts, passes, words", [
    ((), [10_000], 0.512, "5,120 examples are 0.51 passes over 10,000 pictures"),
    ((), [10, 30], 128.0, "5,120 examples are 128.00 passes over 40 pictures"),
    # A quarter of the examples is of 1,000 pictures, the rest of 10.
    ((0.25, 0.75), [1_000, 10], 384.0,
     "384.00 passes over the 10 pictures of the source that is seen most often"),
])  # fmt: skip
def test_a_run_says_how_often_it_sees_its_pictures(caplog, weights, counts, passes, words):
    data = config.Data(source=",".join(f"shards:{n}" for n in counts), weights=weights)
    study, run = config.Study(data=data), config.Train(steps=320, batch_size=16, warmup_steps=1)
    assert runs.passes(study, run, counts)[0] == pytest.approx(passes)
    caplog.set_level("INFO")
    runs.tell_passes("c8", study, run, counts)
    assert words in caplog.messages[0]
    warned = any("may draw its pictures again" in m for m in caplog.messages)
    assert warned == (passes > 100)

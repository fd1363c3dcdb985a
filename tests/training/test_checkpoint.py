"""Checkpoints: which are kept, what is in them, and what a crash leaves."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import checkpoint, loop, step
from tests.training import toy


def _steps(directory):
    return sorted(int(p.name) for p in (directory / "checkpoints").iterdir() if p.name.isdigit())


def test_the_newest_every_nth_and_the_best_are_kept(tmp_path):
    scores = {1: 5.0, 2: 0.5, 3: 4.0, 4: float("nan"), 5: 0.1, 6: 3.0, 7: 2.0, 8: 1.0}
    config = dataclasses.replace(
        toy.CONFIG, steps=8, checkpoint_every=1, validate_every=1, keep=2, keep_every=3,
        keep_best=2, keep_metric="score",
    )
    task = toy.task(validate=lambda params, step: {"score": scores[step], "other": -step})
    loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    # The newest two; multiples of three; the two lowest scores.
    assert _steps(tmp_path) == sorted({7, 8} | {3, 6} | {5, 2})


def test_the_best_are_known_after_a_restart(tmp_path):
    scores = {1: 0.1, 2: 3.0, 3: 2.0, 4: 0.2, 5: 9.0, 6: 9.0}
    task = toy.task(validate=lambda params, step: {"loss": scores[step]})
    config = dataclasses.replace(
        toy.CONFIG, steps=3, checkpoint_every=1, validate_every=1, keep=1, keep_best=2
    )
    for steps in (3, 6):
        config = dataclasses.replace(config, steps=steps)
        loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert _steps(tmp_path) == [1, 4, 6]


def test_the_best_by_another_metric_than_before(tmp_path):
    task = toy.task(validate=lambda params, step: {"loss": step})
    config = dataclasses.replace(
        toy.CONFIG, steps=3, checkpoint_every=1, validate_every=1, keep=1, keep_best=1
    )
    loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    task = toy.task(validate=lambda params, step: {"score": step})
    config = dataclasses.replace(config, steps=6, keep_metric="score")
    loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert _steps(tmp_path) == [4, 6]


def test_steps_to_be_kept_that_the_run_has_passed_are_told(tmp_path, caplog):
    config = dataclasses.replace(toy.CONFIG, steps=3, keep_steps=(1,))
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert "keep_steps" not in caplog.text
    config = dataclasses.replace(config, steps=5, keep_steps=(1, 2, 3, 5))
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "gone")
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert "of train.keep_steps [2] are not on disk, and the run is at step 3" in caplog.text
    assert _steps(tmp_path) == [1, 3, 4, 5]


def test_a_metric_that_validation_does_not_give_is_refused(tmp_path):
    config = dataclasses.replace(
        toy.CONFIG, steps=3, validate_every=1, checkpoint_every=1, keep_best=1
    )
    task = toy.task(validate=lambda params, step: {"psnr": 1.0})
    with pytest.raises(UserError, match=r"keep_metric='loss'.*\['psnr'\]"):
        loop.fit(task, config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    # Before the first step, where a task says what it gives.
    task = dataclasses.replace(task, ranks=("psnr",))
    with pytest.raises(UserError, match=r"keep_metric='loss'.*\['psnr'\]"):
        loop.fit(task, config, toy.Loader, tmp_path / "none", toy.one_device(), seed=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("values, what", [
    ({"keep_every": 3}, "train.keep_every=3: a multiple of checkpoint_every=2"),
    ({"keep_best": 1}, "set validate_every"),
    ({"keep_best": 1, "validate_every": 3}, "train.checkpoint_every=2: with keep_best a multiple"),
    ({"checkpoint_patience": 2}, "above checkpoint_every=2"),
    ({"keep_steps": (2, 7)}, r"train.keep_steps=\(2, 7\): .* at most steps=6: leave out"),
    ({"stall_seconds": -1.0}, "train.stall_seconds"),
    ({"profile_steps": (3, 2)}, "train.profile_steps"),
    ({"profile_steps": (3,)}, "train.profile_steps"),
    ({"profile_steps": (5, 7)}, r"train.profile_steps=\(5, 7\): at most steps=6"),
])
def test_contradictions_of_the_config_are_refused(values, what):
    with pytest.raises(UserError, match=what):
        dataclasses.replace(toy.CONFIG, **values)


def test_the_config_lies_beside_the_state(tmp_path):
    about = {"name": "study", "train": {"steps": 6, "betas": [0.9, 0.999]}}
    loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path, toy.one_device(), seed=0, about=about)
    for at in _steps(tmp_path):
        assert checkpoint.config_of(tmp_path / "checkpoints", at) == about
    bare = tmp_path / "bare"
    loop.fit(toy.task(), toy.CONFIG, toy.Loader, bare, toy.one_device(), seed=0)
    with pytest.raises(UserError, match="checkpoints/6 holds no config"):
        checkpoint.config_of(bare / "checkpoints", 6)


def test_what_a_crash_left_half_written_is_no_checkpoint(tmp_path):
    """A save that was cut short is passed over, and the run goes on from the one before."""
    mesh = toy.one_device()
    whole = loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path / "whole", mesh, seed=3)
    cut = tmp_path / "cut"
    config = dataclasses.replace(toy.CONFIG, steps=4)
    loop.fit(toy.task(), config, toy.Loader, cut, mesh, seed=3)
    # As a process that is killed before the rename leaves it.
    (cut / "checkpoints" / "4").rename(cut / "checkpoints" / "4.orbax-checkpoint-tmp")
    assert checkpoint.latest(cut / "checkpoints") == 2
    toy.equal(whole, loop.fit(toy.task(), toy.CONFIG, toy.Loader, cut, mesh, seed=3))
    assert not list((cut / "checkpoints").glob("*tmp*"))


def test_a_checkpoint_of_eight_devices_is_restored_by_one(tmp_path):
    config = dataclasses.replace(toy.CONFIG, steps=4)
    state = loop.fit(
        toy.task(), config, toy.Loader, tmp_path, mesh_lib.make(data=2, fsdp=4), seed=0
    )
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        abstract = step.abstract_state(toy.init, config, toy.one_device())
        restored, iterator = checkpoints.restore(abstract)
    toy.equal(state, restored)
    kernel = restored.params["layer"]["kernel"]
    assert kernel.sharding.device_set == {jax.devices()[0]}
    assert iterator == {"count": 4}


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_nothing_is_compiled_to_save_what_is_replicated(tmp_path, data, fsdp):
    config, mesh = toy.CONFIG, mesh_lib.make(data=data, fsdp=fsdp)

    def init(key):  # Of a size that no other test has saved.
        return {"layer": {"kernel": jax.random.normal(key, (8 * data, 24)), "bias": jnp.ones(24)}}

    state = jax.block_until_ready(step.init_state(init, config, mesh, jax.random.key(0)))
    compiled = []

    def listen(event, duration, **unused):
        compiled.append(event)

    with checkpoint.Checkpoints(tmp_path) as found:
        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            found.save(1, state, {})
            found.poll(60)
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert not [event for event in compiled if "compile" in event]
        restored, _ = found.restore(step.abstract_state(init, config, mesh))
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim)


def test_processes_at_different_places_in_the_data_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint.consensus, "everyone", lambda *values: np.asarray([values, [0.0]])
    )
    state = step.init_state(toy.init, toy.CONFIG, toy.one_device(), jax.random.key(0))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="step 1 processes are at different places"):
            checkpoints.save(1, state, {"count": 1})


def test_new_bookkeeping_is_not_in_the_hash_of_a_network():
    from ldm_scaling.config import Study

    study = Study()
    train = dataclasses.replace(
        study.train, keep_every=5_000, keep_best=3, keep_metric="x", checkpoint_patience=20_000,
        stall_seconds=1.0, profile_steps=(2, 3),
    )
    other = dataclasses.replace(study, train=train)
    assert json.dumps(study.identity()) == json.dumps(other.identity())
    assert study.training_hash("866m") == other.training_hash("866m")


def test_the_average_is_read_alone(tmp_path):
    mesh = toy.one_device()
    state = loop.fit(toy.task(), toy.CONFIG, toy.Loader, tmp_path, mesh, seed=0)
    abstract = step.abstract_state(toy.init, toy.CONFIG, mesh)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state.ema))
    before, folder = jax.live_arrays(), tmp_path / "checkpoints"
    average = checkpoint.average(folder, 6, abstract)
    assert toy.new_bytes(before) == nbytes
    jax.tree.map(np.testing.assert_array_equal, average, state.ema)
    last = checkpoint.average(folder, 6, abstract, part="params")
    jax.tree.map(np.testing.assert_array_equal, last, state.params)
    assert not np.array_equal(last["layer"]["kernel"], average["layer"]["kernel"])
    with pytest.raises(UserError, match="not of this network"):
        checkpoint.average(folder, 6, abstract._replace(ema={"other": abstract.ema}))


def test_another_checkpoint_at_the_same_place_is_read_as_itself(tmp_path):
    def other(key):
        return {"layer": {"kernel": np.zeros((8, 4)), "bias": np.zeros(4)}}

    mesh, config = toy.one_device(), toy.CONFIG
    abstract, wide = (step.abstract_state(init, config, mesh) for init in (toy.init, other))
    for folder, init in (("one", toy.init), ("two", other)):
        state = jax.tree.map(
            lambda s: np.zeros(s.shape, s.dtype), step.abstract_state(init, config, mesh))
        with checkpoint.Checkpoints(tmp_path / folder) as kept:
            kept.save(2, state, {}, {})
    assert checkpoint.average(tmp_path / "one", 2, abstract)["layer"]["bias"].shape == (8,)
    (tmp_path / "one").rename(tmp_path / "gone")
    (tmp_path / "two").rename(tmp_path / "one")
    assert checkpoint.average(tmp_path / "one", 2, wide)["layer"]["bias"].shape == (4,)
    with pytest.raises(UserError, match=r"bias is \(4,\), should be \(8,\)"):
        checkpoint.average(tmp_path / "one", 2, abstract)


def test_arrays_are_not_opened_for_their_shapes_where_a_file_lists_them(tmp_path, monkeypatch):
    mesh = toy.one_device()
    abstract = step.abstract_state(toy.init, toy.CONFIG, mesh)
    with checkpoint.Checkpoints(tmp_path) as kept:
        kept.save(2, jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), abstract), {}, {})
    with monkeypatch.context() as patched:
        patched.delattr(checkpoint.ocp, "StandardCheckpointer")
        assert checkpoint.average(tmp_path, 2, abstract)["layer"]["bias"].sum() == 8
    (tmp_path / "2" / "state" / "_METADATA").unlink()
    with pytest.raises(UserError, match="2 is damaged .*delete"):
        checkpoint.average(tmp_path, 2, abstract)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 50), os.unlink])
def test_arrays_that_are_cut_short_or_gone_are_damage(tmp_path, damage):
    def init(key):  # Small arrays lie in the list of them.
        return {"kernel": jax.random.normal(key, (64, 64))}

    mesh = toy.one_device()
    abstract = step.abstract_state(init, toy.CONFIG, mesh)
    with checkpoint.Checkpoints(tmp_path) as kept:
        kept.save(2, step.init_state(init, toy.CONFIG, mesh, jax.random.key(0)), {}, {})
    for file in (tmp_path / "2" / "state" / "ocdbt.process_0" / "d").iterdir():
        if file.stat().st_size > 4096:
            damage(file)
    with checkpoint.Checkpoints(tmp_path) as kept:
        for read in (
            lambda: kept.restore(abstract), lambda: checkpoint.average(tmp_path, 2, abstract),
            lambda: checkpoint.read(checkpoint.Place(tmp_path, 2), abstract),
        ):
            with pytest.raises(UserError, match=rf"checkpoint {tmp_path}/2 is damaged .*: delete"):
                read()

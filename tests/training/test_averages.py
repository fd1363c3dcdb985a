"""Averages of any length: tracked by the step, kept as snapshots, made again after training."""

import dataclasses
import functools
import os
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.config import Study
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import runs
from ldm_scaling.training import averages, checkpoint, loop, profiles, saver, step
from tests.training import toy

CONFIG = dataclasses.replace(
    toy.CONFIG, steps=48, checkpoint_every=10, averages=(0.05, 0.1), averages_every=4, log_every=20
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, its last state, and its parameters after every step, (S, 8, 8) and (S, 8)."""
    folder, seen = tmp_path_factory.mktemp("run"), []
    make, config = step.make, CONFIG

    def watched(*args, **kwargs):
        train = make(*args, **kwargs)

        def one(*args):
            state, metrics = train(*args)
            seen.append(jax.device_get(state.params["layer"]))
            return state, metrics

        return one

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step, "make", watched)
        state = loop.fit(toy.task(), config, toy.Loader, folder, toy.one_device(), seed=0)
    return folder, state, {k: np.stack([p[k] for p in seen]) for k in seen[0]}


def _brute(values_S, length):
    """The average by its definition: parameters stay as they are within a step."""
    gamma, steps = profiles.gamma_of(length), len(values_S)
    edges = (np.arange(steps + 1) / steps) ** (gamma + 1)
    return np.tensordot(np.diff(edges), values_S.astype(np.float64), 1)


def _abstract(config=CONFIG, mesh=None):
    return step.abstract_state(toy.init, config, mesh or toy.one_device())


def _steps(folder):
    return checkpoint.steps_of(folder / "averages")


def test_what_is_tracked_is_the_average_by_its_definition(run):
    folder, state, seen = run
    assert sorted(state.averages) == ["0.05", "0.1"]
    for length, tree in state.averages.items():
        for name, values in seen.items():
            np.testing.assert_allclose(
                tree["layer"][name], _brute(values, float(length)), rtol=1e-5, atol=1e-6)
    for length in (0.05, 0.1):  # Exact where the profile is one that is tracked.
        found = averages.average(folder, 48, length, _abstract().params)
        toy.equal(found, state.averages[f"{length:g}"])


def test_a_folder_may_be_named_from_here(run, monkeypatch):
    folder = run[0]
    monkeypatch.chdir(folder.parent)
    toy.equal(*(averages.average(place, 48, 0.07, _abstract().params)
                for place in (folder, folder.name)))


@pytest.mark.parametrize("at, length, within", [
    (48, 0.04, 0.02), (48, 0.07, 0.01), (48, 0.15, 0.01), (48, 0.2, 0.03),
    (24, 0.07, 0.02), (24, 0.15, 0.05),
])
def test_other_lengths_are_close_to_their_definition(run, at, length, within):
    folder, _, seen = run
    found = averages.average(folder, at, length, _abstract().params)["layer"]
    wanted = {k: _brute(v[:at], length) for k, v in seen.items()}
    last = {k: v[at - 1] for k, v in seen.items()}
    off = np.sqrt(sum(np.sum((found[k] - wanted[k]) ** 2) for k in wanted))
    moved = np.sqrt(sum(np.sum((last[k] - wanted[k]) ** 2) for k in wanted))
    assert off < within * moved


def _tracked(walk, first):
    """A step at a time, as training does: the average of 0.05, and what it is in float64."""
    update = jax.jit(averages.updated)
    found = {"0.05": jnp.asarray(walk[0])}, {"0.05": jnp.zeros(walk[0].shape, jnp.bfloat16)}
    want, power = walk[0].astype(np.float64), profiles.gamma_of(0.05) + 1
    for t, value in enumerate(walk, first):
        found = update(*found, value, jnp.int32(t))
        want += -np.expm1(power * np.log1p(-1 / t)) * (value.astype(np.float64) - want)
    return found[0]["0.05"], want


def test_a_long_random_walk_in_float32():
    """A million steps in, where 1 - beta is 1e-5: the rate itself is not rounded away."""
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(size=(3_000, 64)), 0).astype(np.float32) + 100
    found, want = _tracked(walk, 10**6)
    np.testing.assert_allclose(found, want, rtol=2e-7)


@pytest.mark.parametrize("far", [1e-5, 1e-4, 1e-3])
def test_steps_below_what_float32_tells_are_not_lost(far):
    """Half a million steps in an average goes 4e-5 of the way to parameters that lie so far off."""
    start = np.random.default_rng(0).uniform(1, 2, 64).astype(np.float32)
    walk = np.stack([start, *[start * np.float32(1 + far)] * 3_000])
    found, want = _tracked(walk, 500_000)
    assert np.all(want / start - 1 > far / 20)
    np.testing.assert_allclose(found, want, rtol=1e-7)


def test_snapshots_are_where_they_should_be(tmp_path):
    config = dataclasses.replace(
        toy.CONFIG, steps=10, averages=(0.1,), averages_every=4, keep_steps=(3,))
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0,
             about={"name": "study"})
    assert _steps(tmp_path) == [3, 4, 8, 10]
    assert checkpoint.config_of(tmp_path / "averages", 8) == {"name": "study"}
    long = dataclasses.replace(config, steps=1_600, averages_every=0, keep_steps=())
    assert [n for n in range(1, 1_601) if long.snapshot_due(n)] == list(range(100, 1_601, 100))


def test_off_changes_nothing(tmp_path):
    """The same program, the same files in a checkpoint, and each restores what the other left."""
    mesh = toy.one_device()
    on = dataclasses.replace(CONFIG, steps=4, checkpoint_every=2)
    off = dataclasses.replace(on, averages=(), averages_every=0)
    plain = loop.fit(toy.task(), off, toy.Loader, tmp_path / "off", mesh, seed=0)
    tracked = loop.fit(toy.task(), on, toy.Loader, tmp_path / "on", mesh, seed=0)
    assert plain.averages == () and not (tmp_path / "off" / "averages").exists()
    assert plain.rests == ()
    toy.equal(plain, tracked._replace(averages=(), rests=()))
    assert sorted(p.name for p in (tmp_path / "off" / "checkpoints" / "4").iterdir()) == sorted(
        p.name for p in (tmp_path / "on" / "checkpoints" / "4").iterdir()
        if p.name not in ("averages", "averages_rests"))
    for name in ("off", "on"):  # Who does not track reads both.
        folder = tmp_path / name / "checkpoints"
        with checkpoint.Checkpoints(folder) as kept:
            toy.equal(kept.restore(_abstract(off), 4)[0], plain)
        toy.equal(checkpoint.average(folder, 4, _abstract(off)), plain.ema)
        toy.equal(checkpoint.average(folder, 4, _abstract(on)), plain.ema)
    # What is lowered has no argument, result or operation more than what four fields give.
    abstract, batch = _abstract(off), {"x": jax.ShapeDtypeStruct((16, 8), np.float32)}
    train = step.make(toy.loss, off, mesh, abstract)
    jaxpr = jax.make_jaxpr(train)(abstract, batch, jax.eval_shape(lambda: jax.random.key(0)))
    assert len(jaxpr.out_avals) == len(jax.tree.leaves(tuple(abstract)[:4])) + 2


def test_a_workdir_is_not_bound_to_them():
    study = Study()
    other = dataclasses.replace(study, train=dataclasses.replace(
        study.train, averages=(0.05, 0.1), averages_every=1_000))
    assert study.identity() == other.identity()
    assert study.training_hash("866m") == other.training_hash("866m")


def test_a_checkpoint_that_lost_its_rests_is_refused(tmp_path):
    config, mesh = dataclasses.replace(CONFIG, steps=4), toy.one_device()
    loop.fit(toy.task(), config, toy.Loader, tmp_path, mesh, seed=1)
    place = checkpoint.Place(tmp_path / "checkpoints", 4)
    shutil.rmtree(place.directory / "4" / "averages_rests")
    with checkpoint.Checkpoints(place.directory) as kept:
        for read in (kept.restore, functools.partial(checkpoint.read, place)):
            with pytest.raises(UserError, match="4 is damaged"):
                read(_abstract(config))


@pytest.mark.parametrize("stop", [5, 9, 12, 13])
def test_a_run_that_was_killed_ends_as_an_unbroken_one(tmp_path, stop):
    config, mesh = dataclasses.replace(CONFIG, steps=16), toy.one_device()
    whole = loop.fit(toy.task(), config, toy.Loader, tmp_path / "whole", mesh, seed=1)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        loop.fit(toy.task(), config, lambda: toy.Loader(stop_after=stop), cut, mesh, seed=1)
    # As a process that is killed before the rename leaves it.
    if (cut / "averages" / "12").exists():
        (cut / "averages" / "12").rename(cut / "averages" / "12.orbax-checkpoint-tmp")
    toy.equal(whole, loop.fit(toy.task(), config, toy.Loader, cut, mesh, seed=1))
    assert _steps(cut) == _steps(tmp_path / "whole") == [4, 8, 12, 16]
    assert not list((cut / "averages").glob("*tmp*"))
    for at in _steps(cut):
        for length in ("0.05", "0.1"):
            toy.equal(*(
                checkpoint.read_part(tmp_path / run / "averages" / str(at), "averages", length,
                                     _abstract().params)
                for run in ("whole", "cut")
            ))


def test_snapshots_beyond_where_a_run_goes_on_from_are_made_again(tmp_path):
    config, mesh = dataclasses.replace(CONFIG, steps=8, checkpoint_every=2), toy.one_device()
    loop.fit(toy.task(), config, toy.Loader, tmp_path, mesh, seed=1)
    (tmp_path / "checkpoints" / "8").rename(tmp_path / "gone")
    (tmp_path / "checkpoints" / "6").rename(tmp_path / "gone too")
    other = dataclasses.replace(config, averages=(0.1, 0.2))
    loop.fit(toy.task(), other, toy.Loader, tmp_path, mesh, seed=2)  # From its beginning.
    assert _steps(tmp_path) == [4, 8]
    assert checkpoint.parts_of(tmp_path / "averages" / "4", "averages") == ["0.1", "0.2"]


def test_they_cannot_begin_later(tmp_path):
    mesh, off = toy.one_device(), dataclasses.replace(CONFIG, averages=(), averages_every=0)
    loop.fit(toy.task(), dataclasses.replace(off, steps=4), toy.Loader, tmp_path, mesh, seed=0)
    with pytest.raises(UserError, match=r"/4 holds none of train.averages=\(0.05, 0.1\): .*give "
                       r"--config.train.averages='\(\)' --config.train.averages_every=0, or train"):
        loop.fit(toy.task(), CONFIG, toy.Loader, tmp_path, mesh, seed=0)
    on = tmp_path / "on"
    loop.fit(toy.task(), dataclasses.replace(CONFIG, steps=4), toy.Loader, on, mesh, seed=0)
    other = dataclasses.replace(CONFIG, averages=(0.1,))
    with pytest.raises(UserError, match=r"holds averages of 0.05, 0.1 of train.averages=\(0.1,\)"):
        loop.fit(toy.task(), other, toy.Loader, on, mesh, seed=0)
    # Without them it goes on, and with them no more.
    loop.fit(toy.task(), dataclasses.replace(off, steps=6), toy.Loader, on, mesh, seed=0)
    with pytest.raises(UserError, match="cannot begin later"):
        loop.fit(toy.task(), CONFIG, toy.Loader, on, mesh, seed=0)


def test_a_run_that_goes_on_from_anothers_takes_them_along(tmp_path):
    mesh = toy.one_device()
    config = dataclasses.replace(CONFIG, steps=12, checkpoint_every=4)
    whole = loop.fit(toy.task(), config, toy.Loader, tmp_path / "whole", mesh, seed=1)
    half = dataclasses.replace(config, steps=8)
    loop.fit(toy.task(), half, toy.Loader, tmp_path / "half", mesh, seed=1)
    place = checkpoint.Place(tmp_path / "half" / "checkpoints", 8)
    found = loop.fit(
        toy.task(), config, toy.Loader, tmp_path / "on", mesh, seed=1, after=place)
    toy.equal(whole, found)
    plain = dataclasses.replace(config, averages=(), averages_every=0)
    loop.fit(toy.task(), dataclasses.replace(plain, steps=8), toy.Loader, tmp_path / "bare", mesh,
             seed=1)
    with pytest.raises(UserError, match="cannot begin later"):
        loop.fit(toy.task(), config, toy.Loader, tmp_path / "none", mesh, seed=1,
                 after=checkpoint.Place(tmp_path / "bare" / "checkpoints", 8))


def test_in_shards_they_are_what_they_are_on_one_device(run, tmp_path):
    folder, state, _ = run
    mesh = mesh_lib.make(2, 4)
    found = loop.fit(toy.task(), CONFIG, toy.Loader, tmp_path, mesh, seed=0)
    kernel = found.averages["0.05"]["layer"]["kernel"]
    assert kernel.sharding == found.params["layer"]["kernel"].sharding
    assert not kernel.sharding.is_fully_replicated
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(found.averages), jax.device_get(state.averages))
    # The same snapshots, read onto shards and onto one device.
    one = averages.average(folder, 48, 0.07, _abstract().params)
    several = averages.average(folder, 48, 0.07, _abstract(mesh=mesh).params)
    assert several["layer"]["kernel"].sharding == kernel.sharding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
                 jax.device_get(one), jax.device_get(several))


def test_two_trees_are_held_at_most(run, monkeypatch):
    folder, state, _ = run
    read, most = checkpoint.read_part, []
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state.params))
    before = jax.live_arrays()

    def watched(*args):
        tree = read(*args)
        most.append(toy.new_bytes(before))
        return tree

    monkeypatch.setattr(checkpoint, "read_part", watched)
    averages.average(folder, 48, 0.07, _abstract().params)
    assert len(most) == 24 and max(most) <= 3 * nbytes


def test_a_last_snapshot_that_is_gone_is_said_to_be_written_again(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    for at, told in ((48, r"steps 4, .*: run  ldm-scaling train .* step 48 again"), (44, "40$")):
        shutil.rmtree(folder / "averages" / str(at))
        with pytest.raises(UserError, match=told):
            averages.require(folder, at)


@pytest.mark.parametrize("at, length, told", [
    (48, 0.4, r"length 0.4: give a relative standard deviation from 0.005 to 0.285"),
    (48, 0.0, r"length 0: give"),
    (47, 0.1, r"averages at step 47: .*averages holds snapshots of steps 4, 8, "),
    (48, 0.005, r"length 0.005 at step 48: the 24 averages in .*averages up to there miss its "
                r"profile by \d\d%, and 10% is allowed: choose a length from 0.02\d to 0.2\d, or"),
])
def test_what_cannot_be_is_refused(run, at, length, told):
    with pytest.raises(UserError, match=told):
        averages.average(run[0], at, length, _abstract().params)


def test_lengths_that_a_refusal_names_are_given(run, tmp_path):
    """Two lengths far apart, of one snapshot: what lies between them is not."""
    config = dataclasses.replace(CONFIG, steps=4, averages=(0.02, 0.25))
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    for folder, at, ranges in ((tmp_path, 4, 2), (run[0], 4, 1), (run[0], 48, 1)):
        with pytest.raises(UserError) as caught:
            averages.recipe(folder, at, 0.005)
        named = re.search(r"choose a length (.*), or train", str(caught.value))[1]
        numbers = [float(n) for n in re.findall(r"[\d.]+", named)]
        assert all(averages.recipe(folder, at, n).parts for n in numbers)
        assert len(named.split(" or ")) == ranges
    with pytest.raises(UserError, match="miss its profile"):
        averages.recipe(tmp_path, 4, 0.07)
    assert [averages._above(r) for r in (0.734, 0.104, 0.1004)] == ["73%", "10.4%", "10.04%"]


def test_a_run_without_snapshots_and_damaged_ones(run, tmp_path):
    with pytest.raises(UserError, match=r"averages holds no snapshots: .*train.averages=\(0.05"):
        averages.recipe(tmp_path, 4, 0.1)
    config = dataclasses.replace(CONFIG, steps=4)
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    wide = jax.eval_shape(lambda: {"layer": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}})
    with pytest.raises(UserError, match=r"not of this network .*bias is \(8,\), should be \(4,\)"):
        averages.average(tmp_path, 4, 0.1, wide)
    (tmp_path / "averages" / "4" / "averages" / "_METADATA").unlink()
    with pytest.raises(UserError, match="4 is damaged .*delete .*averages/4, then run  ldm-scaling "
                       "train .* writes it again"):
        averages.average(tmp_path, 4, 0.1, _abstract().params)
    with pytest.raises(UserError, match="damaged .*delete .*averages/4, .*snapshots that are left"):
        shutil.rmtree(tmp_path / "checkpoints" / "4")  # Of a run that is further by now.
        averages.average(tmp_path, 4, 0.1, _abstract().params)


def test_the_last_snapshot_that_is_gone_is_written_again(tmp_path):
    config = dataclasses.replace(CONFIG, steps=8)

    def fit(config=config):
        return loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)

    fit()
    assert runs.done(tmp_path, config)
    found = averages.average(tmp_path, 8, 0.1, _abstract().params)
    shutil.rmtree(tmp_path / "averages" / "8")
    assert not runs.done(tmp_path, config)
    assert runs.done(tmp_path, dataclasses.replace(config, averages=(), averages_every=0))
    assert runs.done(tmp_path, dataclasses.replace(config, averages=(0.07,)))
    fit()
    assert _steps(tmp_path) == [4, 8] and runs.done(tmp_path, config)
    toy.equal(found, averages.average(tmp_path, 8, 0.1, _abstract().params))
    shutil.rmtree(tmp_path / "averages")  # Whoever wants none of them is given none.
    assert runs.done(tmp_path, config)


def test_a_full_disk_is_told_as_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "_AT_THE_END", 0.2)
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 0.0)

    def full(self, step, trees, about=None):
        until = time.monotonic() + 60
        while checkpoint.latest(tmp_path / "checkpoints") != 2 and time.monotonic() < until:
            time.sleep(0.01)
        raise UserError("cannot write a checkpoint in DIR: No space left on device")

    monkeypatch.setattr(checkpoint.Checkpoints, "save_trees", full)
    with pytest.raises(saver.StoreError, match="toy: stopped at step 4, whose averages cannot be .*"
                       "No space left on device.* goes on from step 2"):
        config = dataclasses.replace(CONFIG, checkpoint_every=2)
        loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert not os.path.exists(tmp_path / "averages" / "4")


def _full_at(monkeypatch, at, heard=lambda: None):
    """The snapshot of a step cannot be written until what this returns is cleared."""
    real = checkpoint.Checkpoints.save_trees

    def save(self, step, trees, about=None):
        if step == at and broken:
            heard()
            raise UserError("cannot write a checkpoint in DIR: No space left on device")
        real(self, step, trees, about)

    broken = [True]
    monkeypatch.setattr(checkpoint.Checkpoints, "save_trees", save)
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 5.0)
    monkeypatch.setattr(saver, "_GLANCE", 0.01)
    return broken


def test_while_a_snapshot_cannot_be_written_that_is_what_is_told(
        tmp_path, monkeypatch, caplog, capfd):
    broken = _full_at(monkeypatch, 8)
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 0.0)
    pause = saver.Saver._pause
    monkeypatch.setattr(saver.Saver, "_pause", lambda *args: broken.clear() or pause(*args))
    config = dataclasses.replace(CONFIG, steps=9)
    loop.fit(toy.task(), config, toy.Loader, tmp_path, toy.one_device(), seed=0)
    assert re.search("toy: the snapshot of step 8 was not written, attempt 1 .*Training waits; .*"
                     "the newest snapshot is of step 4", caplog.text)
    assert "toy: snapshots are written again, at step 8" in caplog.text
    assert "snapshot NOT SAVED since step 4; training waits" in capfd.readouterr().err
    assert _steps(tmp_path) == [4, 8, 9]


def test_a_run_that_waits_for_a_snapshot_hears_sigterm(tmp_path, monkeypatch):
    """A launcher's notice ends it as any other, and it goes on from its checkpoint."""
    broken = _full_at(monkeypatch, 12, lambda: signal.raise_signal(signal.SIGTERM))
    config = dataclasses.replace(CONFIG, steps=16)
    began = time.monotonic()

    def fit(folder):
        return loop.fit(toy.task(), config, toy.Loader, folder, toy.one_device(), seed=0)

    with pytest.raises(Interrupted, match="toy stopped by SIGTERM at step 12, whose averages cannot"
                       ".*No space left.*; step 10 is saved"):
        fit(tmp_path / "cut")
    assert time.monotonic() - began < 60 and _steps(tmp_path / "cut") == [4, 8]
    broken.clear()
    toy.equal(fit(tmp_path / "cut"), fit(tmp_path / "whole"))
    assert _steps(tmp_path / "cut") == _steps(tmp_path / "whole")


@pytest.mark.parametrize("values, told", [
    ({"averages": (0.5,)}, r"train.averages=\(0.5,\): lengths are relative .* from 0.005 to 0.285"),
    ({"averages": (0.1, 0.1)}, "train.averages=.*: has a length twice"),
    ({"averages": (0.1, 0.05, 0.102)}, "train.averages=.*: 0.1 and 0.102 are nearly one: .* by 5%"),
    ({"averages": (), "averages_every": 5}, "train.averages_every=5: of which averages.*or give 0"),
    ({"averages_every": -1}, "train.averages_every=-1: not below 0"),
])
def test_contradictions_of_the_config_are_refused(values, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(CONFIG, **values)

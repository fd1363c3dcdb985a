"""The loop: resuming is exact, sharding changes nothing, a bad loss stops the run."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.training import checkpoint, loop, step
from ldm_scaling.training.events import read_curves
from tests import curves
from tests.training.toy import CONFIG, Loader, one_device
from tests.training.toy import equal as _equal
from tests.training.toy import init as _init
from tests.training.toy import loss as _loss
from tests.training.toy import task as _task


def test_resumed_run_equals_unbroken_run(tmp_path):
    mesh = one_device()
    whole = loop.fit(_task(), CONFIG, Loader, tmp_path / "whole", mesh, seed=3)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(_task(), CONFIG, lambda: Loader(stop_after=5), tmp_path / "cut", mesh, seed=3)
    resumed = loop.fit(_task(), CONFIG, Loader, tmp_path / "cut", mesh, seed=3)
    _equal(whole, resumed)
    assert int(resumed.step) == 6
    # The curves too: no row twice, none missing.
    assert curves.of(tmp_path / "whole") == curves.of(tmp_path / "cut")
    steps = [step for step, name, _ in read_curves(tmp_path / "cut") if name == "train/loss"]
    assert steps == list(range(1, 7))


def test_a_run_that_branches_off_another_equals_one_that_did_it_all(tmp_path):
    """A rate that stays and cools down: its first steps are those of a run whose rate stays."""
    mesh = one_device()
    cools = dataclasses.replace(CONFIG, learning_rate_decay="wsd:share=0.3")  # the last two
    whole = loop.fit(_task(), cools, Loader, tmp_path / "whole", mesh, seed=3)
    longer = dataclasses.replace(CONFIG, steps=9, keep_steps=(4,))
    stays = loop.fit(_task(), longer, Loader, tmp_path / "stays", mesh, seed=3)
    assert not np.array_equal(stays.ema["layer"]["bias"], whole.ema["layer"]["bias"])
    there = tmp_path / "stays" / "checkpoints"
    before = {p: p.stat().st_mtime_ns for p in there.rglob("*")}
    after = checkpoint.Place(there, 4)

    def refuse(key):
        raise AssertionError("parameters are not drawn")

    task = dataclasses.replace(_task(), start=refuse)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(task, cools, lambda: Loader(stop_after=5), tmp_path / "cut", mesh, 3, after=after)
    branch = loop.fit(task, cools, Loader, tmp_path / "cut", mesh, seed=3, after=after)
    _equal(whole, branch)
    assert curves.of(tmp_path / "cut") == [r for r in curves.of(tmp_path / "whole") if r[0] > 4]
    assert before == {p: p.stat().st_mtime_ns for p in there.rglob("*")}
    # Its own checkpoints come first.
    again = checkpoint.Place(tmp_path / "gone", 4)
    _equal(branch, loop.fit(task, cools, Loader, tmp_path / "cut", mesh, seed=3, after=again))
    with pytest.raises(UserError, match="4 is damaged|4 cannot be read"):
        loop.fit(task, cools, Loader, tmp_path / "other", mesh, seed=3, after=again)


def test_sigterm_saves_the_step_in_hand_and_stops(tmp_path):
    def validate(params, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    mesh, before = one_device(), signal.getsignal(signal.SIGTERM)
    config = dataclasses.replace(CONFIG, checkpoint_every=5, validate_every=2)
    whole = loop.fit(_task(), config, Loader, tmp_path / "whole", mesh, seed=3)
    task = dataclasses.replace(_task(), validate=validate)
    with pytest.raises(loop.Interrupted, match="SIGTERM after step 3"):
        loop.fit(task, config, Loader, tmp_path / "cut", mesh, seed=3)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 3
    _equal(whole, loop.fit(_task(), config, Loader, tmp_path / "cut", mesh, seed=3))
    assert curves.of(tmp_path / "whole") == curves.of(tmp_path / "cut")


def test_what_is_logged_after_a_stop_is_of_all_steps_since_the_last_log(tmp_path):
    def validate(params, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return {}

    config = dataclasses.replace(CONFIG, log_every=4, checkpoint_every=10, validate_every=2)
    quiet = dataclasses.replace(_task(), validate=lambda params, step: {})
    loop.fit(quiet, config, Loader, tmp_path / "whole", one_device(), seed=3)
    task = dataclasses.replace(_task(), validate=validate)
    with pytest.raises(loop.Interrupted, match="after step 3"):
        loop.fit(task, config, Loader, tmp_path / "cut", one_device(), seed=3)
    loop.fit(quiet, config, Loader, tmp_path / "cut", one_device(), seed=3)
    assert curves.of(tmp_path / "whole") == curves.of(tmp_path / "cut")
    assert [s for s, name, _ in curves.of(tmp_path / "cut") if name == "train/loss"] == [4, 6]


def test_sigterm_while_the_last_step_is_looked_at_ends_what_comes_after_too(tmp_path):
    """The run is whole, and whoever would go on after it hears of it."""
    def validate(params, step):
        if step == CONFIG.steps:
            signal.raise_signal(signal.SIGTERM)
        return {}

    config = dataclasses.replace(CONFIG, validate_every=2)
    task = dataclasses.replace(_task(), validate=validate)
    with pytest.raises(loop.Interrupted, match=f"SIGTERM after step {CONFIG.steps}"):
        loop.fit(task, config, Loader, tmp_path, one_device(), seed=3)
    assert checkpoint.latest(tmp_path / "checkpoints") == CONFIG.steps
    assert int(loop.fit(task, config, Loader, tmp_path, one_device(), seed=3).step) == CONFIG.steps


def test_finished_run_is_not_run_again(tmp_path):
    mesh = one_device()
    first = loop.fit(_task(), CONFIG, Loader, tmp_path, mesh, seed=0)

    def refuse():
        raise AssertionError("a finished run asked for data")

    _equal(first, loop.fit(_task(), CONFIG, refuse, tmp_path, mesh, seed=0))


def test_loss_goes_down(tmp_path):
    config = dataclasses.replace(CONFIG, steps=200, log_every=10, checkpoint_every=200)
    loop.fit(_task(), config, Loader, tmp_path, one_device(), seed=0)
    losses = [v for _, name, v in read_curves(tmp_path) if name == "train/loss"]
    assert losses[-1] < 0.1 * losses[0]


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    def loss(params, batch, key):
        value, metrics = _loss(params, batch, key)
        return jnp.where(batch["x"][0, 0] == bad, jnp.nan, value), metrics

    bad = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)[0, 0]
    with pytest.raises(loop.NonFiniteLossError, match="at step 4.*step 2 is kept"):
        loop.fit(_task(loss), CONFIG, Loader, tmp_path, one_device(), seed=0)
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 2
        state, _ = checkpoints.restore(step.abstract_state(_init, CONFIG, one_device()))
    assert np.isfinite(state.params["layer"]["kernel"]).all()


def test_checkpoint_of_another_network_is_refused_with_a_diff(tmp_path):
    mesh = one_device()
    loop.fit(_task(), CONFIG, Loader, tmp_path, mesh, seed=0)

    def other(key):
        return {"layer": {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(8)}}

    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(UserError, match=r"layer/kernel is \(8, 8\), should be \(8, 4\)"):
            checkpoints.restore(step.abstract_state(other, CONFIG, mesh))


@pytest.mark.parametrize("victim", ["state/_METADATA", "state/manifest.ocdbt", "state/d/*"])
def test_damaged_checkpoint_is_refused(tmp_path, victim):
    mesh = one_device()
    loop.fit(_task(), CONFIG, Loader, tmp_path, mesh, seed=0)
    for path in (tmp_path / "checkpoints" / "6").glob(victim):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoints/6 is damaged.*delete"):
        loop.fit(_task(), dataclasses.replace(CONFIG, steps=8), Loader, tmp_path, mesh, seed=0)


@pytest.mark.parametrize("harm", [
    lambda text: text[: len(text) // 2].rpartition(",")[0], lambda text: text.rstrip()[:-2],
    lambda text: "", lambda text: text.replace("train/loss,", "train/loss,x"),
    lambda text: text.partition("\n")[2],
], ids=["a row short of its value", "a value cut", "empty", "no number", "no head"])
def test_damaged_curves_stop_a_run_that_goes_on_and_a_removed_file_does_not(tmp_path, harm):
    loop.fit(_task(), CONFIG, Loader, tmp_path, one_device(), seed=0)
    path, longer = tmp_path / "curves.csv", dataclasses.replace(CONFIG, steps=8)
    path.write_text(harm(path.read_text()))
    with pytest.raises(UserError, match=f"the curves {path} are damaged.*restore .* or delete it"):
        loop.fit(_task(), longer, Loader, tmp_path, one_device(), seed=0)
    path.unlink()
    loop.fit(_task(), longer, Loader, tmp_path, one_device(), seed=0)
    assert [step for step, name, _ in read_curves(tmp_path) if name == "train/loss"] == [7, 8]


def test_pictures_that_cannot_be_shown_hold_no_run(tmp_path, caplog):
    def show(params, step):
        if step < 5:
            raise UserError("ddim draws pictures that are not finite: lower the guidance")
        return {"samples": np.zeros((4, 4, 3), np.uint8)}

    config = dataclasses.replace(CONFIG, sample_every=2)
    loop.fit(_task(show=show), config, Loader, tmp_path, one_device(), seed=0)
    assert checkpoint.latest(tmp_path / "checkpoints") == 6
    assert caplog.text.count("not finite") == 1
    assert "toy: nothing is shown at step 2: ddim draws" in caplog.text
    assert list((tmp_path / "samples").iterdir())


def test_the_first_batch_of_another_bucket_may_compile(tmp_path, monkeypatch):
    """Tracing moves constants, as splash attention does with its masks, which no other step may."""
    def loss(params, batch, key):
        with jax.ensure_compile_time_eval():
            mask = jnp.asarray(np.ones(len(batch["x"]), np.float32))
        traced.append(mask.shape)
        return _loss(params, {"x": batch["x"] * mask[:, None]}, key)

    class Buckets(Loader):
        def __next__(self):
            self.size = 8 if self.count in (3, 5) else 16
            return super().__next__()

    traced, compiled = [], []
    monkeypatch.setattr(loop.Watchdog, "compiles", lambda self, step: compiled.append(step))
    loop.fit(_task(loss), CONFIG, Buckets, tmp_path, one_device(), seed=0)
    assert traced == [(16,), (8,)] and compiled == [1, 4]


def test_a_loader_that_ends_is_refused_and_what_was_trained_is_kept(tmp_path):
    class Ends(Loader):
        def __next__(self):
            if self.count == 5:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="the loader ends before step 6 of 6, .*step 4 is kept"):
        loop.fit(_task(), CONFIG, Ends, tmp_path, one_device(), seed=0)
    assert checkpoint.latest(tmp_path / "checkpoints") == 4


def test_batches_of_another_size_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"batch's \['x'\] has 8 rows .* batch_size is 16"):
        loop.fit(_task(), CONFIG, lambda: Loader(size=8), tmp_path, one_device(), seed=0)


def test_batch_that_does_not_split_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, batch_size=12)
    with pytest.raises(UserError, match="batch_size=12 does not split over 8 devices"):
        loop.fit(_task(), config, Loader, tmp_path, mesh_lib.make(), seed=0)

"""Two and four processes on this machine train as one; what four saved fewer can go on from; one
reads by itself; SIGTERM to one ends all."""

import functools
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from ldm_scaling.config import Train
from ldm_scaling.models import autoencoder, converted
from ldm_scaling.training import averages, checkpoint, step
from ldm_scaling.training.events import read_curves
from tests.distributed import driving
from tests.training import toy

TRAIN = {
    "steps": 6, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9,
    "compute_dtype": "float32", "log_every": 1, "validate_every": 0, "checkpoint_every": 3,
    "sample_every": 0, "averages": (0.05, 0.1), "averages_every": 2,
}
DEVICES = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in ("linear", "unet"):
        driving.write_data(folder / f"{task}.array_record")
    return folder


def _job(directory, data, task, processes, fsdp, tensor=1):
    return {
        "task": task, "mesh": {"fsdp": fsdp, "tensor": tensor},
        "devices": DEVICES // processes, "train": TRAIN,
        "data": str(data / f"{task}.array_record"), "directory": str(directory),
        "out": str(directory / "params.npz"),
    }


def _losses(directory):
    return [value for _, name, value in read_curves(directory) if name == "train/loss"]


@pytest.fixture(scope="module")
def run(nursery, data, tmp_path_factory):
    """Runs once, with four devices in all, and gives the directory."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(task, processes, fsdp, tensor=1):
        directory = root / f"{task}_{processes}_{fsdp}_{tensor}"
        job = _job(directory, data, task, processes, fsdp, tensor)
        nursery.finish(job, processes, directory / "logs")
        return directory

    return run


@pytest.mark.parametrize(
    "task, processes, fsdp, tensor",
    [
        # Weights are gathered from the other process too, with `tensor` within each besides.
        pytest.param("unet", 2, 2, 2, marks=pytest.mark.long),
        ("linear", 2, 1, 1), ("linear", 4, 1, 1), ("linear", 4, 4, 1),
    ],
)
def test_processes_train_as_one(run, task, processes, fsdp, tensor):
    one, several = _losses(run(task, 1, 1)), _losses(run(task, processes, fsdp, tensor))
    assert len(one) == 6
    np.testing.assert_allclose(several, one, rtol=1e-5)


def test_snapshots_of_four_are_those_of_one(run):
    """Written together in shards, and read by this process alone."""
    mesh = toy.one_device()
    params = step.abstract_state(toy.init, Train(**TRAIN), mesh).params
    found = []
    for place in (run("linear", 1, 1), run("linear", 4, 4)):
        assert checkpoint.steps_of(place / "averages") == [2, 4, 6]
        found.append(averages.average(place, 6, 0.12, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *found)


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoint_of_four_is_gone_on_from_by_others(nursery, run, data, tmp_path, processes):
    """Saved by four processes in shards, restored by fewer; the end is that of the four."""
    directory, four = tmp_path / "run", run("linear", 4, 4)
    shutil.copytree(four / "checkpoints" / "3", directory / "checkpoints" / "3")
    nursery.finish(_job(directory, data, "linear", processes, 4), processes, directory / "logs")
    found = driving.params(directory / "params.npz")
    expected = driving.params(four / "params.npz")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    log = [row for row in read_curves(directory) if row[1] == "train/loss"]
    assert [step for step, *_ in log] == [4, 5, 6]  # It did not begin anew.
    np.testing.assert_allclose([v for *_, v in log], _losses(four)[3:], rtol=1e-5)


def test_one_reads_while_the_other_waits_for_its_word(nursery, data, tmp_path, monkeypatch):
    """Orbax's own reading waits for the devices of both."""
    params = {"encoder": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    kind = converted.KINDS["sd_autoencoder"]._replace(
        load=lambda path: (autoencoder.AutoencoderSpec(), params, {"scale": 1.0})
    )
    monkeypatch.setitem(converted.KINDS, "sd_autoencoder", kind)
    (tmp_path / "source").touch()
    given = converted.write("sd_autoencoder", tmp_path / "source", tmp_path / "converted")
    job = _job(tmp_path / "run", data, "linear", 2, 4) | {"reads": str(given)}
    run = nursery.start(job, 2, tmp_path / "logs")
    assert run.wait(60) == [0, 0], driving.output(tmp_path / "logs")


def test_sigterm_to_one_ends_all_wherever_they_are(nursery, data, tmp_path):
    """The lead is busy by itself; the other is told, as it waits for the devices of both."""
    late = tmp_path / "late"
    job = _job(tmp_path / "run", data, "linear", 2, 1) | {"late": str(late)}
    run = nursery.start(job, 2, tmp_path / "logs")
    while not late.exists() and run.poll() == [None, None]:
        time.sleep(0.05)
    time.sleep(0.5)
    run.signal(signal.SIGTERM, 1)
    began = time.monotonic()
    assert run.wait(60) == [75, 75], driving.output(tmp_path / "logs")
    assert time.monotonic() - began < 20
    assert "stopped by SIGTERM; the same command" in driving.output(tmp_path / "logs")

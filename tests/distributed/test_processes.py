"""Two and four processes on this machine train as one; what four saved fewer can go on from."""

import functools
import shutil

import numpy as np
import pytest

from ldm_scaling.training.events import read_curves, without_times
from tests.distributed import driving

TRAIN = {
    "steps": 6, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9,
    "compute_dtype": "float32", "log_every": 1, "validate_every": 0, "checkpoint_every": 3,
    "sample_every": 0,
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
    rows = without_times(read_curves(directory))
    return [value for _, name, value in rows if name == "train/loss"]


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
        ("unet", 2, 2, 2),
        ("linear", 2, 1, 1), ("linear", 4, 1, 1), ("linear", 4, 4, 1),
    ],
)
def test_processes_train_as_one(run, task, processes, fsdp, tensor):
    one, several = _losses(run(task, 1, 1)), _losses(run(task, processes, fsdp, tensor))
    assert len(one) == 6
    np.testing.assert_allclose(several, one, rtol=1e-5)


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
    log = [row for row in without_times(read_curves(directory)) if row[1] == "train/loss"]
    assert [step for step, *_ in log] == [4, 5, 6]  # It did not begin anew.
    np.testing.assert_allclose([v for *_, v in log], _losses(four)[3:], rtol=1e-5)

"""Four processes, killed and hindered again and again, end with an unbroken run's parameters."""

import random
import shutil
import signal
import time

import numpy as np
import pytest

from tests.distributed import driving

PROCESSES, RECORDS, STEPS = 4, 256, 160
TRAIN = {
    "steps": STEPS, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.9,
    "compute_dtype": "float32", "log_every": 4, "validate_every": 0, "checkpoint_every": 4,
    "sample_every": 0, "keep": 3,
}
# Those of a kind that the run may survive come often.
FAULTS = (
    ["one is killed"] * 2 + ["all are told to end"] * 2 + ["all are killed"]
    + ["the disk is full"] + ["the newest checkpoint is damaged"]
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Examples of which one is cut into."""
    path = tmp_path_factory.mktemp("data") / "linear.array_record"
    driving.write_data(path, RECORDS)
    driving.damage(path, RECORDS)
    return path


def _job(directory, data, **more):
    return {
        "task": "linear", "mesh": {"fsdp": 2}, "devices": 1, "train": TRAIN, "data": str(data),
        "directory": str(directory), "out": str(directory / "params.npz"), "max_corrupt": 0.2,
        **more,
    }


def _newest(directory):
    steps = [int(p.name) for p in (directory / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(steps, default=0)


def _wait_for_step(run, directory, step):
    """Returns when a later checkpoint than `step` is there, or a process has ended."""
    while _newest(directory) <= step and not any(s is not None for s in run.poll()):
        time.sleep(0.01)


class Driver:
    """Starts the processes of a run again and again, as a launcher does, and does them harm."""

    def __init__(self, nursery, directory, data, seed):
        self.nursery, self.directory, self.data = nursery, directory, data
        self.random, self.attempts, self.ends = random.Random(seed), 0, []

    def start(self, **more):
        self.attempts += 1
        self.logs = self.directory / "logs" / f"{self.attempts:02d}"
        job = _job(self.directory, self.data, pause=0.03, **more)
        return self.nursery.start(job, PROCESSES, self.logs)

    def fault(self, kind):
        """One start that ends by a fault, and what the fault must look like from outside."""
        before = _newest(self.directory)
        if kind == "the newest checkpoint is damaged" and before:
            self.damaged(before)
            return
        if kind == "the disk is full":
            self.full(before)
            return
        run, victim = self.start(), self.random.randrange(PROCESSES)
        # Now and then before the first step, mostly after a few.
        if self.random.random() < 0.8:
            _wait_for_step(run, self.directory, before)
        time.sleep(self.random.uniform(0, 0.4))
        began = _newest(self.directory) > before
        if kind == "one is killed":
            run.signal(signal.SIGKILL, victim)
        else:
            run.signal(signal.SIGTERM if kind == "all are told to end" else signal.SIGKILL)
        statuses = run.wait(grace=90 if began else 3)
        self.ends.append((kind, before, _newest(self.directory), statuses))
        assert 0 not in statuses and _newest(self.directory) >= before, self.told()
        if kind == "one is killed" and began:
            # The others noticed: the watchdog ended them, or jax did. Those that still wait for all
            # to come would do so for longer; a launcher ends them.
            others = {s for k, s in enumerate(statuses) if k != victim}
            assert statuses[victim] == -signal.SIGKILL, self.told()
            assert others <= {76, 1, 2, -signal.SIGABRT}, self.told()
        if 75 in statuses and began:  # Before the first step there is nothing to save.
            # One that is slow to leave may be aborted by jax, which sees that others are gone.
            assert set(statuses) <= {75, -signal.SIGABRT}, self.told()
            assert "stopped by SIGTERM after step" in self.told()

    def full(self, newest):
        """Nothing can be written: the run stops, says so and has lost nothing."""
        statuses = self.start(largest=64).wait()
        self.ends.append(("the disk is full", newest, _newest(self.directory), statuses))
        assert _newest(self.directory) == newest
        assert 0 not in statuses and 2 in statuses, self.told()
        assert "free space" in self.told() or "no checkpoint was written" in self.told()

    def damaged(self, newest):
        """The newest checkpoint cannot be read: that is said, and the remedy named helps."""
        folder = self.directory / "checkpoints" / str(newest)
        for path in (folder / "state").glob("**/*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        statuses = self.start().wait()
        self.ends.append(("the newest checkpoint is damaged", newest, newest, statuses))
        assert 2 in statuses and 0 not in statuses, self.told()
        assert f"the checkpoint {folder} is damaged" in self.told()
        assert f"delete {folder} to go on from the checkpoint before it" in self.told()
        assert _newest(self.directory) == newest  # Nothing is done behind the user's back.
        shutil.rmtree(folder)

    def told(self):
        """What the last start's processes wrote."""
        time.sleep(0.2)  # for what is still in their pipes
        return driving.output(self.logs)


@pytest.fixture(scope="module")
def whole(nursery, data, tmp_path_factory):
    """Where the unbroken run ended."""
    directory = tmp_path_factory.mktemp("whole")
    nursery.finish(_job(directory, data), PROCESSES, directory / "logs")
    assert "left out a corrupt example" in driving.output(directory / "logs")
    return directory


@pytest.mark.parametrize("count", [7, pytest.param(28, marks=pytest.mark.long)])
def test_run_that_is_harmed_ends_as_an_unbroken_one(nursery, data, whole, tmp_path, count):
    driver = Driver(nursery, tmp_path / "harmed", data, seed=0)
    faults = FAULTS * (count // len(FAULTS))
    driver.random.shuffle(faults)
    for kind in faults:
        driver.fault(kind)
    print(*driver.ends, sep="\n")
    assert len(driver.ends) == count and {kind for kind, *_ in driver.ends} == set(FAULTS)
    assert [75] * PROCESSES in [statuses for *_, statuses in driver.ends]
    assert 0 < _newest(driver.directory) < STEPS
    assert driver.start().wait() == [0] * PROCESSES, driver.told()
    ours, theirs = (driving.params(d / "params.npz") for d in (driver.directory, whole))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)

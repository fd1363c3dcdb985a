"""The local launcher, really run: restarts, ends, signals. The jobs are a few lines of Python."""

import os
import signal
import subprocess
import sys
import time

import pytest

from launch import common, local
from launch.common import LaunchError
from ldm_scaling import errors
from tests.launch.programs import LAUNCH, call, environment, until

# What every job starts with: its number, and the start it is in (1, 2, ...), counted in a file. It
# goes on when all have come, as jax does.
HEAD = """
import os, signal, sys, time, pathlib
where, k, n = sys.argv[-1].removeprefix("--distributed=").split(",")
folder = pathlib.Path(os.environ["FOLDER"])
with open(folder / f"starts{k}", "a") as f: f.write(where + chr(10))
start = len((folder / f"starts{k}").read_text().split())
def here(j):
    path = folder / f"starts{j}"
    return path.exists() and where in path.read_text().split()
while not all(here(j) for j in range(int(n))): time.sleep(0.01)  # all have started
def note(text):
    with open(folder / f"notes{k}", "a") as f: f.write(text + chr(10))
"""


def command(job, *flags, processes=2):
    return ["local.py", "--raw", f"--processes={processes}", "--pause=0", *flags, "--",
            sys.executable, "-c", HEAD + job]  # fmt: skip


def run(folder, job, *flags, processes=2):
    return call(*command(job, *flags, processes=processes), env=environment(FOLDER=str(folder)))


def starts(folder, k):
    path = folder / f"starts{k}"
    return path.read_text().split() if path.exists() else []


def notes(folder, k):
    path = folder / f"notes{k}"
    return path.read_text().split() if path.exists() else []


def background(folder, job, *flags, processes=2, **how):
    name, *rest = command(job, *flags, processes=processes)
    return subprocess.Popen([sys.executable, str(LAUNCH / name), *rest],
                            env=environment(FOLDER=str(folder)), **how)


def test_processes_get_one_address_and_their_numbers(tmp_path):
    assert run(tmp_path, 'note(f"{k}/{n}")', processes=3).returncode == 0
    assert [notes(tmp_path, k) for k in range(3)] == [["0/3"], ["1/3"], ["2/3"]]
    assert len({starts(tmp_path, k)[0] for k in range(3)}) == 1


@pytest.mark.parametrize("status", [common.SAVED, errors.STALLED, 1])
def test_all_start_again_when_one_ends_with(tmp_path, status):
    job = f"""
if start == 1:
    if k == "1": sys.exit({status})
    time.sleep(60)
"""
    began = time.monotonic()
    ran = run(tmp_path, job)
    assert ran.returncode == 0, ran.stderr
    assert time.monotonic() - began < 20
    # The one that did not fail was ended and started again; nothing of the old start is joined.
    for k in range(2):
        first, second = starts(tmp_path, k)
        assert first != second
    assert starts(tmp_path, 0) == starts(tmp_path, 1)


def test_all_start_again_when_one_is_killed(tmp_path):
    job = """
if start == 1:
    if k == "0": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""
    assert run(tmp_path, job).returncode == 0
    assert [len(starts(tmp_path, k)) for k in range(2)] == [2, 2]


def test_one_that_ignores_sigterm_is_killed_after_grace(tmp_path):
    job = """
if start == 1 and k == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("deaf")
    time.sleep(60)
if start == 1:
    while not (folder / "notes0").exists(): time.sleep(0.01)
    sys.exit(76)
"""
    began = time.monotonic()
    assert run(tmp_path, job, "--grace=0.3").returncode == 0
    assert time.monotonic() - began < 20
    assert len(starts(tmp_path, 0)) == 2


@pytest.mark.parametrize("status", [common.USER, common.INTERRUPTED])
def test_never_again_after(tmp_path, status):
    ran = run(tmp_path, f"""
if k == "1": sys.exit({status})
time.sleep(60)
""")
    assert ran.returncode == status
    assert [len(starts(tmp_path, k)) for k in range(2)] == [1, 1]


def test_a_2_that_follows_anothers_end_is_no_users_mistake(tmp_path):
    # A process that notices another's end reports it as an error of its own.
    job = """
if start == 1:
    if k == "0":
        while not (folder / "notes1").exists(): time.sleep(0.01)
        sys.exit(1)
    signal.signal(signal.SIGTERM, lambda *a: sys.exit(2))
    note("ready")
    time.sleep(60)
"""
    assert run(tmp_path, job).returncode == 0
    assert len(starts(tmp_path, 0)) == 2


def test_restarts_are_bounded_and_the_status_is_the_first_failures(tmp_path):
    ran = run(tmp_path, 'sys.exit(76) if k == "1" else time.sleep(60)', "--max-restarts=2")
    assert ran.returncode == 76
    assert [len(starts(tmp_path, k)) for k in range(2)] == [3, 3]
    assert "no more restarts" in ran.stderr
    killed = run(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--max-restarts=0", processes=1)
    assert killed.returncode == 137


def test_an_attempt_that_lasted_counts_from_zero_again(tmp_path):
    # With every attempt long enough, one restart in a row is all that ever counts.
    ran = run(tmp_path, "sys.exit(76 if start < 5 else 0)", "--max-restarts=1", "--stable=0",
              processes=1)
    assert ran.returncode == 0
    assert len(starts(tmp_path, 0)) == 5


SAVES = """
def save(*a):
    note("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
note("ready")
time.sleep(60)
"""


def test_sigterm_goes_on_to_all_and_nothing_starts_again(tmp_path):
    launcher = background(tmp_path, SAVES)
    until(lambda: all(notes(tmp_path, k) == ["ready"] for k in range(2)))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == common.SAVED
    for k in range(2):
        assert notes(tmp_path, k) == ["ready", "saved"]
        assert len(starts(tmp_path, k)) == 1


def test_one_that_does_not_end_is_killed_after_saving(tmp_path):
    job = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("ready")
time.sleep(60)
"""
    launcher = background(tmp_path, job, "--saving=0.3")
    until(lambda: all(notes(tmp_path, k) == ["ready"] for k in range(2)))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == 137
    assert [len(starts(tmp_path, k)) for k in range(2)] == [1, 1]


def test_ctrl_c_reaches_each_process_once(tmp_path):
    job = """
def stop(*a):
    note("stop")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
note("ready")
time.sleep(60)
"""
    launcher = background(tmp_path, job)
    until(lambda: all(notes(tmp_path, k) == ["ready"] for k in range(2)))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == common.INTERRUPTED
    assert [notes(tmp_path, k) for k in range(2)] == [["ready", "stop"]] * 2


def test_sigterm_in_the_pause_ends_it(tmp_path):
    launcher = background(tmp_path, "sys.exit(76)", "--pause=60", processes=1,
                          stderr=subprocess.PIPE, text=True)
    assert any(" in 60 s" in line for line in launcher.stderr)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(20) == common.SAVED
    assert len(starts(tmp_path, 0)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_nothing_outlives_a_killed_launcher(tmp_path):
    launcher = background(tmp_path, SAVES)
    until(lambda: all(notes(tmp_path, k) == ["ready"] for k in range(2)))
    launcher.kill()
    launcher.wait()
    until(lambda: all("saved" in notes(tmp_path, k) for k in range(2)))


def test_devices_and_logs(tmp_path):
    job = 'print(os.environ.get("JAX_NUM_CPU_DEVICES"), os.environ.get("CUDA_VISIBLE_DEVICES"))'
    env = environment(FOLDER=str(tmp_path),
                      XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_dump_to=x")
    env.pop("CUDA_VISIBLE_DEVICES", None)
    logs = tmp_path / "logs"
    assert call(*command(job, "--gpus=2", f"--logs={logs}"), env=env).returncode == 0
    assert [(logs / f"{k}.log").read_text() for k in range(2)] == ["None 0,1\n", "None 2,3\n"]
    job = 'print(os.environ["JAX_NUM_CPU_DEVICES"], os.environ["XLA_FLAGS"])'
    assert call(*command(job, "--cpu-devices=3", f"--logs={logs}"), env=env).returncode == 0
    # A count in XLA_FLAGS would be refused by jax beside its own setting.
    assert (logs / "1.log").read_text().splitlines()[-1] == "3 --xla_dump_to=x"


def test_gpus_are_those_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-1a, MIG-2b,0,3")
    plan = local.Plan(("train",), processes=2, gpus=2)
    shown = [plan.variables(k)["CUDA_VISIBLE_DEVICES"] for k in range(2)]
    assert shown == ["5,GPU-1a", "MIG-2b,0"]
    for text in ("5,GPU-1a,MIG-2b", "0,1,-1,2,3", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        with pytest.raises(LaunchError, match="need 4 GPUs, and CUDA_VISIBLE_DEVICES names [023]"):
            local.Plan(("train",), processes=2, gpus=2)


def test_what_stands_behind_the_jobs_own_dashes_stays_there():
    job = ["prepare", "--workdir=x", "--", "--workers=4", "--distributed"]  # Beam's own, if so
    assert common.job_command(job) == ["ldm-scaling", "prepare", "--distributed", *job[1:]]
    first, where, *rest = local.Plan(tuple(job)).arguments(0, 7)[1:]
    assert (first, rest) == ("prepare", job[1:]) and where.startswith("--distributed=127.0.0.1:7,")
    with pytest.raises(LaunchError, match="--workdir"):
        common.check_job(["prepare", "--", "--workdir=x"])


def test_jax_takes_the_fake_devices(tmp_path):
    job = "import jax; print(jax.device_count())"
    ran = call("local.py", "--raw", "--cpu-devices=3", "--", sys.executable, "-c", job,
               env=environment(XLA_FLAGS="--xla_force_host_platform_device_count=8"))
    assert ran.stdout == "3\n", ran.stderr


def test_dry_run_starts_nothing(tmp_path):
    ran = call("local.py", "--processes=4", "--cpu-devices=2", "--dry-run", f"--logs={tmp_path}/no",
               "--", "train", "--config=configs/demo.py", "--workdir=/nowhere/x")
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert lines[-1] == "wait" and len(lines) == 5
    for k, line in enumerate(lines[:-1]):
        assert f"--distributed=127.0.0.1:PORT,{k},4" in line
        assert "ldm-scaling train --distributed" in line and "JAX_NUM_CPU_DEVICES=2" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments, part", [
    (["--processes=0", "--", "train", "--workdir=x"], "--processes=0"),
    (["--cpu-devices=1", "--gpus=1", "--", "train", "--workdir=x"], "not both"),
    (["--", "train"], "--workdir"),
    (["--", "train", "--workdir=gs://b/x"], "--workdir=gs://b/x: buckets are not written"),
    (["--", "train", "--workdir=x", "--distributed"], "the launcher gives it"),
    (["--", "rates", "--workdir=x"], "rates is none of what several processes do: prepare"),
    ([], "after  --  goes the job"),
    (["--raw", "--", "no-such-program-anywhere"], "cannot be started"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(arguments, part):
    ran = call("local.py", *arguments)
    assert ran.returncode == 2
    assert part in ran.stderr and ran.stderr.count("\n") == 1


def test_a_status_is_the_programs():
    assert common.SAVED == errors.SAVED


def test_the_commands_are_those_that_processes_share():
    from ldm_scaling.cli import commands

    assert common.SHARED == commands.STAGES

"""The Slurm script with stand-ins for srun, scontrol and scancel: what it does after every status,
and when it is told to end."""

import os
import signal
import subprocess
import time

import pytest

from launch import common
from tests.launch.programs import LAUNCH, call, environment, fake

JOB = ["train", "--config=configs/t2i_39m.py", "--workdir=/shared/x"]
# Ends with the next status of the list; the last for ever. Writes what it was called with.
SRUN = r"""
echo "$JAX_LOCAL_DEVICE_IDS $SRUN_CPUS_PER_TASK $*" >> "$FOLDER/srun"
count=$(wc -l < "$FOLDER/srun")
set -- $STATUSES
(( count <= $# )) || count=$#
exit "${!count}"
"""
# As the real one does at SIGTERM: it kills what it runs. The step's own process is in a file.
SRUN_OF_TASK = r"""
bash "$FOLDER/task" &
child=$!
trap 'kill -KILL "$child"' TERM
echo "$child" > "$FOLDER/step"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
wait "$child"
"""
# Signals the steps and not the script. A controller is busy as often as a file says.
SCANCEL = r"""
echo "$*" >> "$FOLDER/scancel"
[[ ! -s $FOLDER/busy ]] || { sed -i 1d "$FOLDER/busy"; exit 1; }
kill -TERM "$(< "$FOLDER/step")"
"""


def prepared(folder, statuses="0", srun=SRUN, **variables):
    fake(folder / "bin", "srun", srun)
    fake(folder / "bin", "scontrol", 'echo "$*" >> "$FOLDER/scontrol"')
    fake(folder / "bin", "scancel", SCANCEL)
    fixed = {"LDM_PAUSE": "0", "SLURM_JOB_ID": "77", "SLURM_GPUS_ON_NODE": "4",
             "SLURM_CPUS_PER_TASK": "12"}
    return environment(folder / "bin", FOLDER=str(folder), STATUSES=statuses, **fixed | variables)


def lines(folder, name):
    path = folder / name
    return path.read_text().splitlines() if path.exists() else []


def run(folder, statuses, **variables):
    return call("slurm.sbatch", *JOB, env=prepared(folder, statuses, **variables))


def test_one_process_a_node_that_sees_all_its_gpus(tmp_path):
    assert run(tmp_path, "0").returncode == 0
    (line,) = lines(tmp_path, "srun")
    devices, cpus, *words = line.split()
    assert (devices, cpus) == ("0,1,2,3", "12")
    assert "--ntasks-per-node=1" in words
    assert words[-5:] == common.job_command(JOB)
    assert lines(tmp_path, "scontrol") == []


def test_what_stands_behind_the_jobs_own_dashes_stays_there(tmp_path):
    job = ["prepare", "--workdir=/shared/x", "--runner=DirectRunner", "--", "--workers=4"]
    assert call("slurm.sbatch", *job, env=prepared(tmp_path)).returncode == 0
    (line,) = lines(tmp_path, "srun")
    assert line.endswith(" ldm-scaling prepare --distributed --workdir=/shared/x "
                         "--runner=DirectRunner -- --workers=4")


@pytest.mark.parametrize("status", [2, 130])
def test_never_again_after(tmp_path, status):
    assert run(tmp_path, str(status)).returncode == status
    assert len(lines(tmp_path, "srun")) == 1
    assert lines(tmp_path, "scontrol") == []


def test_saved_goes_back_into_the_queue(tmp_path):
    assert run(tmp_path, "75").returncode == 75
    assert lines(tmp_path, "scontrol") == ["requeue 77"]
    assert len(lines(tmp_path, "srun")) == 1


def test_requeues_are_bounded(tmp_path):
    ran = run(tmp_path, "75", SLURM_RESTART_COUNT="3", LDM_MAX_REQUEUES="3")
    assert ran.returncode == 75
    assert lines(tmp_path, "scontrol") == []


@pytest.mark.parametrize("status", [1, 76, 137])
def test_the_step_starts_again_in_the_same_allocation(tmp_path, status):
    assert run(tmp_path, f"{status} {status} 0").returncode == 0
    assert len(lines(tmp_path, "srun")) == 3
    assert lines(tmp_path, "scontrol") == []


def test_restarts_are_bounded(tmp_path):
    assert run(tmp_path, "76", LDM_MAX_RESTARTS="2").returncode == 76
    assert len(lines(tmp_path, "srun")) == 3


def until(folder, name):
    limit = time.monotonic() + 20
    while not (folder / name).exists():
        assert time.monotonic() < limit
        time.sleep(0.02)


def background(folder, task, **variables):
    (folder / "task").write_text(f"""
{task}
touch "$FOLDER/ready"
for _ in {{1..400}}; do sleep 0.05; done
""")
    script = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *JOB],
                              env=prepared(folder, srun=SRUN_OF_TASK, **variables),
                              stderr=subprocess.DEVNULL)
    until(folder, "ready")
    return script


@pytest.mark.parametrize("status", [75, 143])
def test_sigterm_reaches_the_processes_and_the_job_goes_back_into_the_queue(tmp_path, status):
    # It takes a while to save: the script waits for it.
    task = f"trap 'sleep 0.5; echo saved >> \"$FOLDER/saved\"; exit {status}' TERM"
    script = background(tmp_path, task)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == status
    assert lines(tmp_path, "saved") == ["saved"]
    assert lines(tmp_path, "scancel") == ["--signal=TERM 77"]
    assert lines(tmp_path, "scontrol") == ["requeue 77"]


def test_processes_that_heard_nothing_are_signalled_again(tmp_path):
    (tmp_path / "busy").write_text("x\n" * 2)
    script = background(tmp_path, "trap 'exit 75' TERM", LDM_REPEAT="0")
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 75
    assert lines(tmp_path, "scancel") == ["--signal=TERM 77"] * 3
    assert lines(tmp_path, "scontrol") == ["requeue 77"]


def test_sigterm_to_a_job_that_then_is_done_puts_nothing_back(tmp_path):
    script = background(tmp_path, "trap 'exit 0' TERM")
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 0
    assert lines(tmp_path, "scontrol") == []


LAST = {"SLURM_RESTART_COUNT": "3", "LDM_MAX_REQUEUES": "3"}


def test_requeues_are_bounded_where_nothing_was_saved(tmp_path):
    script = background(tmp_path, "trap 'exit 143' TERM", **LAST)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    assert lines(tmp_path, "scontrol") == []


@pytest.mark.parametrize("variables, requeued", [({}, ["requeue 77"]), (LAST, [])])
def test_sigterm_between_two_starts(tmp_path, variables, requeued):
    env = prepared(tmp_path, "76", LDM_PAUSE="60", **variables)
    fake(tmp_path / "bin", "sleep", 'touch "$FOLDER/pausing"; exec /bin/sleep 3')
    script = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), *JOB], env=env,
                              stderr=subprocess.DEVNULL)
    until(tmp_path, "pausing")
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 75
    assert lines(tmp_path, "scontrol") == requeued
    assert len(lines(tmp_path, "srun")) == 1


def test_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    for directive in ("--requeue", "--open-mode=append", "--signal=B:TERM@300",
                      "--ntasks-per-node=1"):
        assert f"#SBATCH {directive}\n" in text
    # Slurm reads no directive after the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo")


def test_submitting(tmp_path):
    fake(tmp_path / "bin", "sbatch", 'printf "%s\\n" "$@" > "$FOLDER/sbatch"')
    env = environment(tmp_path / "bin", FOLDER=str(tmp_path))
    flags = ["--nodes=4", "--gpus=8", "--name=t2i-39m", "--partition=gpu", "--account=a",
             "--cpus=32", "--time=2-00:00:00", f"--logs={tmp_path}/logs"]
    dry = call("slurm.sh", *flags, "--dry-run", "--", *JOB, env=env)
    assert dry.returncode == 0 and not (tmp_path / "sbatch").exists()
    assert not (tmp_path / "logs").exists()
    assert call("slurm.sh", *flags, "--", *JOB, env=env).returncode == 0
    words = lines(tmp_path, "sbatch")
    for word in ("--nodes=4", "--gpus-per-node=8", "--job-name=t2i-39m", "--partition=gpu",
                 "--account=a", "--cpus-per-task=32", "--time=2-00:00:00"):
        assert word in words and word in dry.stdout
    assert words[-4:] == [str(LAUNCH / "slurm.sbatch"), *JOB]
    assert "ldm-scaling train" in dry.stdout and "--distributed" in dry.stdout


@pytest.mark.parametrize("arguments, part", [
    (["--gpus=8", "--", *JOB], "--nodes"),
    (["--nodes=2", "--gpus=all", "--", *JOB], "--gpus=all"),
    (["--nodes=2", "--gpus=8", "--node=3", "--", *JOB], "unknown argument --node=3"),
    (["--nodes=2", "--gpus=8"], "after  --  goes the job"),
    (["--nodes=2", "--gpus=8", "--", "train", "--workdir=gs://b/x"], "gs://b/x"),
    (["--nodes=2", "--gpus=8", "--", *JOB], "sbatch is not here"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(arguments, part):
    ran = call("slurm.sh", *arguments, env=os.environ | {"PATH": os.defpath + ":/usr/local/bin"})
    assert ran.returncode == 2
    assert part in ran.stderr and ran.stderr.count("\n") == 1

"""One job for each size, with the chips that its plan recommends."""

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from launch import common, family
from launch.common import LaunchError
from tests.launch.programs import LAUNCH, ROOT, call, environment, fake, until

ON = {
    "tpu-vm": ["--zone=z", "--bucket=b"],
    "gke": ["--image=i", "--bucket=b"],
    "slurm": ["--nodes=2", "--gpus=8"],
    "local": ["--processes=2"],
}


def dry(*flags, workdir="/mnt/ldm/family", **options):
    return call("family.py", f"--workdir={workdir}", "--dry-run", *flags, **options)


def plan(folder, member, topology, days, fits=True, **more):
    folder.mkdir(exist_ok=True)
    number = more.get("num_slices", 1)
    name = f"{member}_{topology.replace(':', '-')}_{more.get('kind', 'train')}_{number}.json"
    (folder / name).write_text(json.dumps({
        "member": member, "topology": topology, "num_slices": number, "kind": "train",
        "fits": fits, "seconds_per_step_bound": 0.1, "days_bound": days, "hbm_gb": 8.0,
        "mesh": {"data": 1, "fsdp": 256}, "remedies": [], **more,
    }))  # fmt: skip


@pytest.mark.parametrize("on", ON)
def test_one_job_for_each_size(on):
    ran = dry(f"--on={on}", *ON[on], *(["--topology=v5e:16x16"] if on in ("tpu-vm", "gke") else []))
    assert ran.returncode == 0, ran.stderr
    for member in family.PAPER:
        assert f"configs/t2i_{member}.py" in ran.stdout
        assert f"/mnt/ldm/family/t2i_{member}" in ran.stdout
    if on != "local":
        assert all(f"t2i-{member}" in ran.stdout for member in family.PAPER)


@pytest.mark.parametrize("on", ON)
def test_a_job_is_called_after_its_member_as_launchers_allow(on, tmp_path):
    """Names of members have underscores, names of jobs none."""
    chips = ["--topology=v5e:16x16"] if on in ("tpu-vm", "gke") else []
    logs = [] if on in ("tpu-vm", "gke") else [f"--logs={tmp_path}"]
    ran = dry(f"--on={on}", *ON[on], *chips, *logs, "--members=dit_b2,uvit_s_deep")
    assert ran.returncode == 0, ran.stderr
    for member, name in (("dit_b2", "t2i-dit-b2"), ("uvit_s_deep", "t2i-uvit-s-deep")):
        assert f"configs/t2i_{member}.py" in ran.stdout and f"family/t2i_{member}" in ran.stdout
        assert name in ran.stdout and f"t2i-{member}" not in ran.stdout


def test_every_name_is_one_before_the_first_job_is_started(tmp_path, monkeypatch):
    long = "dit_" + 40 * "x"
    monkeypatch.setattr(family, "members_known", lambda: ["39m", long])
    monkeypatch.setattr(family, "start_in_turn", lambda *_: pytest.fail("it was started"))
    with pytest.raises(LaunchError, match="--name=t2i-dit-xxx"):
        family.main(["--on=slurm", *ON["slurm"], f"--members=39m,{long}", f"--workdir={tmp_path}"])


def test_every_member_of_the_paper_has_a_config_and_a_plan():
    from ldm_scaling.models import zoo

    assert family.PAPER == tuple(member.name for member in zoo.PAPER)
    known = family.members_known()
    assert tuple(known[: len(family.PAPER)]) == family.PAPER
    # Other backbones run where they are named.
    assert set(known) <= set(zoo.MEMBERS) and "dit_xl2" in known
    for member in family.PAPER:
        # The paper's batch splits evenly.
        chips = family.chips_for(member, "", 1)
        assert 2048 % (chips.tpu.chips * chips.num_slices) == 0 and chips.why.startswith("plan ")


def test_the_plan_of_fewest_chip_hours_that_fits_decides(tmp_path):
    folder = tmp_path / "plans"
    plan(folder, "5b", "v5e:16x16", days=1.0, fits=False)
    plan(folder, "5b", "v5p:4x8x8", days=3.0)
    plan(folder, "5b", "v6e:8x8", days=9.0)  # 64 chips: fewer hours of chips, more days
    plan(folder, "5b", "v6e:4x4", days=0.1, kind="sample")
    chips = family.chips_for("5b", "", 1, folder)
    assert str(chips.tpu) == "v6e:8x8" and chips.num_slices == 1
    assert "5b_v6e-8x8" in chips.why and "bound" in chips.why
    assert chips.flags == ()
    # Two slices cost twice the chips.
    plan(folder, "5b", "v6e:8x8", days=4.0, num_slices=2)
    assert family.chips_for("5b", "", 1, folder).num_slices == 2
    plan(folder, "5b", "v6e:8x8", days=5.0, num_slices=2)
    assert family.chips_for("5b", "", 1, folder).num_slices == 1
    # A plan is of one member; --topology goes before all.
    with pytest.raises(LaunchError, match="39m has no plan in .*: give --topology=KIND:SHAPE"):
        family.chips_for("39m", "", 1, folder)
    asked = family.chips_for("5b", "v5e:16x16", 2, folder, unplanned=True)
    assert (str(asked.tpu), asked.num_slices, asked.why) == ("v5e:16x16", 2, "--topology, no plan")


def test_what_makes_it_fit_goes_with_it(tmp_path):
    flags = ["--config.train.remat=block", "--config.mesh.data=2"]
    plan(tmp_path, "5b", "v5e:16x16", days=3.0, remedies=flags)
    chips = family.chips_for("5b", "", 1, tmp_path)
    assert "--config.train.remat=block" in chips.why
    command = family.launch_command("gke", "5b", chips, "/w", "train", ["--image=i"], ["--x=1"])
    at = command.index("--")
    assert "--image=i" in command[:at] and command[at + 1] == "train"
    # What the user says comes last, so that it wins.
    assert command[-3:] == [*flags, "--x=1"]


def test_a_topology_that_is_asked_for_gets_its_own_plans_flags(tmp_path):
    plan(tmp_path, "5b", "v5e:16x16", days=5.0, remedies=["--config.train.remat=block"])
    plan(tmp_path, "5b", "v5p:4x8x8", days=1.0)
    plan(tmp_path, "5b", "v6e:8x8", days=1.0, fits=False)
    assert family.chips_for("5b", "v5e:16x16", 1, tmp_path).flags == ("--config.train.remat=block",)
    assert family.chips_for("5b", "v5e:16x16", 2, tmp_path, unplanned=True).flags == ()
    assert "does not fit" in family.chips_for("5b", "v6e:8x8", 1, tmp_path).why


def test_a_topology_without_a_plan_is_refused_where_there_are_others(tmp_path):
    plan(tmp_path, "5b", "v5e:16x16", days=5.0, hbm_capacity_gb=16.9)
    plan(tmp_path, "5b", "v6e:8x8", days=1.0)
    with pytest.raises(LaunchError) as caught:
        family.chips_for("5b", "v5e-64", 2, tmp_path)
    told = str(caught.value)
    assert "5b has no plan for 2 x v5e:8x8, 128 chips; on 1 x v5e:16x16, 256 chips, it takes 8.0 " \
           "of 16.9 GB a chip (5b_v5e-16x16_train_1.json)" in told
    assert "ldm-scaling plan --config=configs/t2i_5b.py --topology=v5e:8x8 --num-slices=2 " \
           f"--kind=train --to={tmp_path}/5b_2xv5e-8x8_train.json" in told
    assert str(family.chips_for("5b", "v5e-64", 1, tmp_path, unplanned=True).tpu) == "v5e:8x8"
    assert family.chips_for("39m", "v5e:8x8", 1, tmp_path).why == "--topology, no plan"
    # Of what is launched: by default, and of small arms, which no plan is of.
    ran = dry("--on=gke", *ON["gke"], "--members=5b", "--topology=v5e:8x8")
    assert ran.returncode == 2 and "or give --unplanned" in ran.stderr
    for flag in ("--unplanned", "--arm=local", "--job=sweep"):
        ran = dry("--on=gke", *ON["gke"], "--members=5b", "--topology=v5e:8x8", flag)
        assert ran.returncode == 0 and "64 chips (--topology, no plan)" in ran.stdout


def test_plans_of_ldm_scaling_plan_are_found(tmp_path):
    from ldm_scaling.study import plan, plan_family

    target = plan.Target("v6e:16x16", 2)
    body = {"member": "866m", "topology": target.topology, "num_slices": target.num_slices,
            "kind": "train", "fits": True, "days_bound": 2.0, "remedies": [], "key": "k"}
    plan_family.write(tmp_path / plan_family.file_name("866m", target, "train"), body)
    chips = family.chips_for("866m", "", 1, tmp_path)
    assert (str(chips.tpu), chips.num_slices) == ("v6e:16x16", 2)


def test_plans_for_what_is_not_launched_here_are_passed_over(tmp_path):
    for topology in ("h100:8", "tpu7x:4x4x4"):
        plan(tmp_path, "39m", topology, days=0.1)
    with pytest.raises(LaunchError, match="39m has no plan"):
        family.chips_for("39m", "", 1, tmp_path)
    plan(tmp_path, "39m", "v5e:16x16", days=1.0)
    assert str(family.chips_for("39m", "", 1, tmp_path).tpu) == "v5e:16x16"


def test_plans_that_do_not_help_stop_it(tmp_path):
    plan(tmp_path, "5b", "v5e:16x16", days=1.0, fits=False)
    with pytest.raises(LaunchError, match="fits none"):
        family.chips_for("5b", "", 1, tmp_path)
    (tmp_path / "5b_v5p-4x8x8.json").write_text('{"member": "5b"')
    with pytest.raises(LaunchError, match="5b_v5p-4x8x8.json is no plan"):
        family.chips_for("5b", "", 1, tmp_path)


def test_it_says_what_it_used():
    ran = dry("--on=gke", *ON["gke"], "--members=39m,5b", "--topology=v5p:4x8x8", "--num-slices=2",
              "--unplanned")
    said = [line for line in ran.stdout.splitlines() if "chips" in line and line.startswith("#")]
    for member, line in zip(("39m", "5b"), said, strict=True):
        assert line.startswith(f"# {member}: 2 x v5p:4x8x8, 512 chips (--topology")


def test_flags_and_the_rest_reach_every_job():
    ran = dry("--on=tpu-vm", *ON["tpu-vm"], "--spot", "--members=39m,83m", "--job=study", "--",
              "--config.train.steps=9")
    assert ran.returncode == 0, ran.stderr
    creates = [line for line in ran.stdout.splitlines() if "resources create" in line]
    runs = [line for line in ran.stdout.splitlines() if "tpu_worker.sh run" in line]
    assert len(creates) == len(runs) == 2
    assert all("--spot" in shlex.split(line) and "--zone=z" in line for line in creates)
    assert all("run -- study" in line and "--config.train.steps=9" in line for line in runs)


def test_an_arm_is_of_every_config():
    ran = dry("--on=local", "--processes=2", "--members=39m,83m", "--arm=local")
    for member in ("39m", "83m"):
        assert f"--config=configs/t2i_{member}.py:local --workdir" in ran.stdout


def test_all_watch_at_once_and_a_failure_is_told(tmp_path):
    # Each waits until all have been asked for: one after the other would never end.
    fake(tmp_path / "bin", "gcloud", r"""
if [[ $4 == describe ]]; then
  [[ -e $FOLDER/$5 ]] || { echo NOT_FOUND >&2; exit 1; }
  until (( $(ls "$FOLDER" | grep -c ^t2i-) == 2 )); do command sleep 0.05; done
  echo ACTIVE
elif [[ $4 == create ]]; then touch "$FOLDER/$5"
elif [[ "$*" == *"tpu_worker.sh state"* ]]; then
  if [[ ! -e $FOLDER/run-$5 ]]; then echo absent
  elif [[ $5 == t2i-83m ]]; then echo failed
  else echo done; fi
elif [[ "$*" == *"tpu_worker.sh run"* ]]; then touch "$FOLDER/run-$5"
fi
""")
    fake(tmp_path / "bin", "sleep", "exit 0")
    ran = call("family.py", "--on=tpu-vm", "--zone=z", "--members=39m,83m", "--workdir=/w",
               f"--logs={tmp_path}/logs",
               env=environment(tmp_path / "bin", FOLDER=str(tmp_path)))
    assert ran.returncode == 1, ran.stderr
    assert "39m: status 0" in ran.stdout and "83m: status 1" in ran.stdout
    assert "the job is done" in (tmp_path / "logs" / "t2i-39m.log").read_text()


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, common.SAVED), (signal.SIGINT, common.INTERRUPTED),
])  # fmt: skip
def test_signals_go_on_to_what_runs_and_nothing_more_is_started(tmp_path, number, status):
    # A second signal would kill it: it comes once.
    fake(tmp_path / "bin", "ldm-scaling", """
trap 'echo saves >> "$FOLDER/log"; sleep 0.3; echo saved >> "$FOLDER/log"; exit 75' TERM
trap 'echo saves >> "$FOLDER/log"; sleep 0.3; echo saved >> "$FOLDER/log"; exit 130' INT
echo ready >> "$FOLDER/log"
while true; do sleep 0.05; done
""")
    log, logs = tmp_path / "log", tmp_path / "logs"
    log.touch()
    launcher = subprocess.Popen(
        [sys.executable, LAUNCH / "family.py", "--on=local", "--members=39m,83m", f"--logs={logs}",
         f"--workdir={tmp_path}/w"], env=environment(tmp_path / "bin", FOLDER=str(tmp_path)),
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )
    until(lambda: log.read_text())
    os.killpg(launcher.pid, number)  # as a terminal's Ctrl-C: all of its session
    said = launcher.communicate(timeout=20)[1]
    assert launcher.returncode == status and said == f"launch/family.py: 39m ended with {status}\n"
    assert log.read_text().split() == ["ready", "saves", "saved"]
    assert [str(p.relative_to(logs)) for p in logs.rglob("*.log")] == ["t2i-39m/0.log"]


def test_watches_end_with_it(tmp_path):
    """Also where the command that Ctrl-C comes in makes a failure of it, as gcloud does."""
    fake(tmp_path / "bin", "gcloud", """
case "$*" in *describe*) echo ACTIVE ;; *state*) echo running ;; esac
""")
    fake(tmp_path / "bin", "sleep", f"""
exec {sys.executable} -c 'import signal, sys, time, os
signal.signal(signal.SIGINT, lambda *a: sys.exit(1))
open(os.environ["FOLDER"] + "/sleeps" + str(os.getpid()), "w")
time.sleep(60)'
""")
    launcher = subprocess.Popen(
        [sys.executable, LAUNCH / "family.py", "--on=tpu-vm", "--members=39m,83m", "--zone=z",
         f"--logs={tmp_path}/logs", "--workdir=/w"], stdout=subprocess.PIPE, text=True,
        env=environment(tmp_path / "bin", FOLDER=str(tmp_path)),
    )
    until(lambda: len(list(tmp_path.glob("sleeps*"))) == 2)
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=20)[0]
    assert launcher.returncode == common.INTERRUPTED
    assert "39m: status 130" in said and "83m: status 130" in said
    assert len(list(tmp_path.glob("sleeps*"))) == 2


@pytest.mark.parametrize("number, status", [
    (signal.SIGTERM, common.SAVED), (signal.SIGINT, common.INTERRUPTED),
])  # fmt: skip
def test_a_signal_while_watches_are_started_starts_no_more(tmp_path, monkeypatch, number, status):
    opened = []

    def start(self, command, **options):
        opened.append(command)
        if len(opened) == 2:
            self.running[0].wait()
            os.kill(os.getpid(), number)
        return before(self, command, **options)

    before = family.Launchers.start
    monkeypatch.setattr(family.Launchers, "start", start)
    ended = ["sh", "-c", f'echo started >> "{tmp_path}/log"']
    commands = dict.fromkeys(("39m", "83m", "145m"), ended)
    assert family.start_all(commands, tmp_path / "logs") == status
    assert (tmp_path / "log").read_text() == "started\n" and len(opened) == 2
    opened.clear()
    assert family.start_in_turn(commands, dry=False) == status
    assert (tmp_path / "log").read_text() == 2 * "started\n" and len(opened) == 2


@pytest.mark.parametrize("command", [
    ["local.py", "--dry-run", "--", "train", "--workdir=runs/x"],
    ["family.py", "--on=local", "--workdir=runs/x", "--members=39m,83m", "--dry-run"],
])  # fmt: skip
def test_output_that_nobody_reads_any_more_ends_it_quietly(command):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as unread:
        ran = subprocess.run([sys.executable, LAUNCH / command[0], *command[1:]], stdout=unread,
                             stderr=subprocess.PIPE, timeout=60)
    assert ran.returncode == common.UNREAD and not ran.stderr


def test_a_job_whose_output_is_not_read_any_more_ends_it_quietly(capfd):
    assert family.start_in_turn({"39m": ["sh", "-c", "exit 141"]}, dry=False) == common.UNREAD
    assert not capfd.readouterr().err


def test_logs_are_where_they_are_asked_for(tmp_path):
    ran = dry("--on=slurm", *ON["slurm"], "--members=39m", "--logs=out", cwd=tmp_path)
    assert f"--output={tmp_path}/out/t2i-39m-%j.log" in ran.stdout
    ran = dry("--on=local", *ON["local"], "--members=39m,83m", "--logs=out", cwd=tmp_path)
    assert f"{tmp_path}/out/t2i-39m/1.log" in ran.stdout
    assert f"{tmp_path}/out/t2i-83m/1.log" in ran.stdout


@pytest.mark.parametrize("flags, part", [
    (["--on=gke", "--members=40m"], "no config of '40m'"),
    (["--on=slurm", "--topology=v5e:4x4"], "takes no --topology"),
    (["--on=tpu-vm", "--bucket=b", "--topology=v5e:5x5"], "v5e:5x5 is no slice"),
    (["--on=tpu-vm", "--zone=z"], "--workdir=/mnt/ldm/family: nothing is mounted there"),
    (["--on=tpu-vm", "--zone=z", "--name=x"], "leave out --name"),
    (["--on=gke", "--logs=out"], "--logs=out: on gke"),
    (["--on=gke", "--num-slices=2"], "--num-slices=2: give --topology"),
    (["--on=local", "--num-slices=1"], "no --num-slices"),
    (["--on=tpu-vm", "--workdir=gs://b/x"], "gs://b/x: buckets are not written"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(flags, part):
    ran = dry(*flags)
    assert ran.returncode == 2
    assert part in ran.stderr and ran.stderr.count("\n") == 1


def test_a_workdir_of_this_machine_is_where_it_was_said(tmp_path):
    # The jobs run in the repository, where configs/ is; a path is meant from here.
    ran = dry("--on=local", "--members=39m", workdir="runs", cwd=tmp_path)
    assert f"--workdir={tmp_path}/runs/t2i_39m" in ran.stdout
    assert not os.path.exists(tmp_path / "runs") and (ROOT / "configs/t2i_39m.py").exists()

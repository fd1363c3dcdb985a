"""A host of a TPU slice, with stand-ins for what needs a real one: its service and its mounts."""

import subprocess
import time

import pytest

from launch import common
from tests.launch.programs import call, environment, fake

JOB = ["train", "--config=configs/t2i_866m.py", "--workdir=/mnt/ldm/x", "--config.a=(1, 'two')"]


@pytest.fixture
def host(tmp_path):
    """A host's home, with stand-ins for what needs a real one."""
    home = tmp_path / "home"
    fake(home / "ldm_venv" / "bin", "ldm-scaling",
         'printf "%s\\n" "$HF_TOKEN" "$@" > "$HOME/started"; exit 75')
    fake(tmp_path / "bin", "sudo", 'exec "$@"')
    fake(tmp_path / "bin", "gcloud", "echo hf_value")
    fake(tmp_path / "bin", "systemctl", r"""
echo "$*" >> "$HOME/systemctl"
case $1 in
  is-active) echo "$ACTIVE"; [[ $ACTIVE == active ]] ;;
  show) [[ $2 == *Status ]] && echo "$STATUS" || echo "$ENDED" ;;
esac
""")
    (tmp_path / "units").mkdir()

    def run(*arguments, **options):
        variables = {"ACTIVE": "inactive", "STATUS": "0", "ENDED": "0"} | options.pop("states", {})
        env = environment(tmp_path / "bin", HOME=str(home), LDM_UNITS=str(tmp_path / "units"),
                          **variables)
        return call("tpu_worker.sh", *arguments, env=env, **options)

    run.home, run.units, run.bin = home, tmp_path / "units", tmp_path / "bin"
    return run


def test_the_service_starts_the_job_and_fetches_secrets_then(host):
    lines = call("common.py", "variables", "--secret=HF_TOKEN=hf-token").stdout
    assert host("run", "--", *JOB, input=lines).returncode == 0
    start = host.home / "ldm_start.sh"
    assert "hf_value" not in start.read_text()
    assert start.stat().st_mode & 0o077 == 0
    # The job's status is the service's.
    ran = subprocess.run([start], env=environment(host.bin, HOME=str(host.home)))
    assert ran.returncode == 75
    started = (host.home / "started").read_text().splitlines()
    assert started == ["hf_value", *common.job_command(JOB)[1:]]
    calls = (host.home / "systemctl").read_text().splitlines()
    assert "daemon-reload" in calls and calls[-1] == "start --no-block ldm-scaling"


def test_the_service_starts_again_after_the_right_ends(host):
    unit = dict(line.split("=", 1) for line in host("unit").stdout.splitlines() if "=" in line)
    assert unit["Restart"] == "on-failure"
    assert set(unit["RestartPreventExitStatus"].split()) == {"2", "130"}
    assert {"75", "76", "SIGTERM"} <= set(unit["RestartForceExitStatus"].split())
    assert unit["SuccessExitStatus"] == "75"  # or what saved at  stop  would be "failed"
    assert unit["StartLimitIntervalSec"] == "0"  # it counts for itself, see below
    assert unit["KillMode"] == "mixed" and unit["WantedBy"] == "multi-user.target"


def test_the_service_gives_up_after_failures_in_a_row(host):
    def start():
        env = environment(host.bin, HOME=str(host.home), HF_TOKEN="")
        return subprocess.run([host.home / "ldm_start.sh"], env=env, capture_output=True, text=True)

    host("run", "--", *JOB, input="")
    assert [start().returncode for _ in range(21)] == [75] * 21
    last = start()
    assert last.returncode == 2 and "21 times in a row" in last.stderr
    # An hour of running counts from zero again, and so does the next  run.
    starts = host.home / "ldm_starts"
    starts.write_text(f"21 {int(time.time()) - 3600}\n")
    assert [start().returncode for _ in range(2)] == [75, 75]
    assert starts.read_text().split()[0] == "2"
    host("run", "--", *JOB, input="")
    assert not starts.exists()


def test_what_stands_behind_the_jobs_own_dashes_stays_there(host):
    host("run", "--", "prepare", "--workdir=/x", "--", "--workers=4", input="export HF_TOKEN=\n")
    subprocess.run([host.home / "ldm_start.sh"], env=environment(host.bin, HOME=str(host.home)))
    started = (host.home / "started").read_text().splitlines()
    assert started == ["", "prepare", "--distributed", "--workdir=/x", "--", "--workers=4"]


@pytest.mark.parametrize("installed, states, said", [
    (False, {}, "absent"),
    (True, {"ACTIVE": "active"}, "running"),
    (True, {"ACTIVE": "activating", "STATUS": "75", "ENDED": "5"}, "running"),
    (True, {"ACTIVE": "inactive", "STATUS": "0", "ENDED": "5"}, "done"),
    (True, {"ACTIVE": "inactive", "STATUS": "75", "ENDED": "5"}, "stopped"),
    (True, {"ACTIVE": "inactive", "STATUS": "0", "ENDED": "0"}, "stopped"),
    (True, {"ACTIVE": "failed", "STATUS": "2", "ENDED": "5"}, "failed"),
])  # fmt: skip
def test_what_a_host_says_of_its_job(host, installed, states, said):
    if installed:
        (host.units / "ldm-scaling.service").write_text("")
    ran = host("state", states=states)
    assert ran.returncode == 0 and ran.stdout.splitlines()[0] == said


@pytest.fixture
def bare(host):
    """The host before `setup`, which mounts a bucket."""
    for name in ("python3", "mountpoint", "mount", "gcsfuse"):
        fake(host.bin, name, f'echo "{name} $*" >> "$HOME/calls"')
    fake(host.bin, "findmnt", 'cat "$HOME/mounted"')
    fake(host.home / ".local" / "bin", "uv", 'echo "uv $*" >> "$HOME/calls"')
    # /etc/fstab is the host's own: what would be written is caught.
    fake(host.bin, "sudo", r"""
echo "sudo $*" >> "$HOME/calls"
case $1 in
  tee) cat >> "$HOME/fstab" ;;
  umount) [[ ! -e $HOME/busy ]] ;;
esac
""")
    fake(host.home / "ldm_venv" / "bin", "python", "exit 0")
    return host


def test_setup_installs_and_mounts_once(bare):
    host = bare
    assert host("setup", "my-bucket").returncode == 0
    calls = (host.home / "calls").read_text()
    assert "umount" not in calls
    assert "jax[tpu]" in calls and "requirements.lock" in calls
    entry = (host.home / "fstab").read_text().split()
    assert entry[:3] == ["my-bucket", "/mnt/ldm", "gcsfuse"]
    assert "_netdev" in entry[3].split(",") and "allow_other" in entry[3].split(",")


def test_setup_mounts_another_bucket_in_the_place_of_one_that_nothing_uses(bare):
    (bare.home / "mounted").write_text("my-bucket\n")
    assert bare("setup", "my-bucket").returncode == 0
    assert "umount" not in (bare.home / "calls").read_text()
    (bare.home / "mounted").write_text("other\n")
    assert bare("setup", "my-bucket").returncode == 0
    assert "sudo umount /mnt/ldm" in (bare.home / "calls").read_text()


@pytest.mark.parametrize("busy, states, part", [
    (True, {}, "other is in use"),
    (False, {"ACTIVE": "activating"}, "the job runs on other"),
])  # fmt: skip
def test_a_bucket_that_is_in_use_stays(bare, busy, states, part):
    (bare.home / "mounted").write_text("other\n")
    (bare.units / "ldm-scaling.service").write_text("")
    if busy:
        (bare.home / "busy").write_text("")
    ran = bare("setup", "my-bucket", states=states)
    assert ran.returncode == 78 and part in ran.stderr
    assert not (bare.home / "fstab").exists()

"""Cloud TPU VMs, with stand-ins for gcloud and the host: what is called, in which order, when."""

import os
import pathlib
import shlex
import subprocess

import pytest

from tests.launch.programs import LAUNCH, ROOT, call, environment, fake

WHERE = ["--name=t2i-866m", "--zone=us-west4-a"]
JOB = ["train", "--config=configs/t2i_866m.py", "--workdir=/mnt/ldm/x", "--config.a=(1, 'two')"]
# The state of the request and of the job: the next line of a file at each call, the last for ever.
GCLOUD = r"""
next() {
  head -n 1 "$FOLDER/$1"
  [[ $(wc -l < "$FOLDER/$1") == 1 ]] || sed -i 1d "$FOLDER/$1"
}
words="$4"
for word in "$@"; do [[ $word == --command=* ]] && words="$words ${word##*tpu_worker.sh }"; done
words=$(head -n 1 <<< "$words" | cut -d' ' -f 1-2)
case $words in
  describe)
    state=$(next states)
    [[ $state != ABSENT ]] || { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }
    echo "$state"
    exit
    ;;
  "ssh state") next jobs; exit ;;
esac
echo "$words" >> "$FOLDER/calls"
printf '%s\0' "$@" >> "$FOLDER/arguments"
"""


@pytest.fixture
def cloud(tmp_path):
    fake(tmp_path / "bin", "gcloud", GCLOUD)
    fake(tmp_path / "bin", "sleep", "exit 0")

    def run(command, *flags, states="ACTIVE", jobs="running", job=JOB):
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "jobs").write_text("\n".join(jobs.split()) + "\n")
        for name in ("calls", "arguments"):
            (tmp_path / name).write_text("")
        ran = call("tpu_vm.sh", command, *WHERE, *flags, *(["--", *job] if job else []),
                   env=environment(tmp_path / "bin", FOLDER=str(tmp_path)))
        return ran, (tmp_path / "calls").read_text().split("\n")[:-1]

    run.folder = tmp_path
    return run


SIZE = ("--topology=v5e:16x16", "--spot")
INSTALL = ["scp", "ssh setup", "ssh run"]


def test_up_from_nothing(cloud):
    ran, calls = cloud("up", *SIZE, states="ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE",
                       jobs="absent")
    assert ran.returncode == 0, ran.stderr
    assert calls == ["create", *INSTALL]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert state in ran.stderr


def test_up_leaves_a_job_that_runs(cloud):
    ran, calls = cloud("up", *SIZE, jobs="running")
    assert ran.returncode == 0 and calls == []
    assert "runs already" in ran.stderr


def test_up_of_a_request_that_failed_ends_with_an_error(cloud):
    ran, calls = cloud("up", *SIZE, states="ABSENT FAILED")
    assert ran.returncode == 1 and calls == ["create"]
    assert "FAILED" in ran.stderr


def test_resume_after_a_preemption_starts_from_nothing(cloud):
    ran, calls = cloud("resume", *SIZE, states="SUSPENDED ABSENT ACTIVE", jobs="absent")
    assert ran.returncode == 0, ran.stderr
    assert calls == ["delete", "create", *INSTALL]


def test_resume_of_slices_that_are_there_starts_the_job(cloud):
    ran, calls = cloud("resume", *SIZE, jobs="stopped")
    assert ran.returncode == 0 and calls == INSTALL


def test_watch_goes_through_a_preemption_until_the_job_is_done(cloud):
    # resume: the state, up's, wait's; then one a look.
    ran, calls = cloud(
        "watch", *SIZE, "--delete",
        states="ABSENT ABSENT ACTIVE ACTIVE ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE ACTIVE",
        jobs="absent running running absent running done",
    )
    assert ran.returncode == 0, ran.stderr
    assert calls == ["create", *INSTALL, "delete", "create", *INSTALL, "delete"]
    assert "the job is done" in ran.stderr


def test_watch_keeps_the_slices_of_a_job_that_failed(cloud):
    ran, calls = cloud("watch", *SIZE, "--delete", states="ACTIVE", jobs="absent running failed")
    assert ran.returncode == 1
    assert calls == INSTALL
    assert "the job is failed" in ran.stderr


def test_watch_does_not_take_a_host_without_a_job_for_a_done_one(cloud):
    ran, calls = cloud("watch", *SIZE, "--delete", states="ACTIVE",
                       jobs="absent absent absent running done")
    assert ran.returncode == 0
    assert calls == [*INSTALL, *INSTALL, "delete"]


def test_watch_ends_at_a_users_mistake(cloud):
    ran, calls = cloud("watch", states="ABSENT")
    assert ran.returncode == 2 and calls == []
    assert "--topology" in ran.stderr


def test_the_job_arrives_as_it_was_given(cloud):
    ran, _ = cloud("run", "--env=MODE=a 'b'", "--secret=HF_TOKEN=hf-token")
    assert ran.returncode == 0, ran.stderr
    arguments = (cloud.folder / "arguments").read_text().split("\0")[:-1]
    assert {"--node=all", "--worker=all"} <= set(arguments)
    command = next(a for a in arguments if a.startswith("--command=")).removeprefix("--command=")
    # Run it as a host's shell would, with a worker that shows what it got.
    host = cloud.folder / "host" / "ldm_scaling" / "launch"
    fake(host, "tpu_worker.sh", 'printf "%s\\n" "$@"; echo ==; cat')
    ran = subprocess.run(["bash", "-c", command], cwd=cloud.folder / "host", capture_output=True,
                         text=True)
    got, _, lines = ran.stdout.partition("==\n")
    assert got.splitlines() == ["run", "--", *JOB]
    shell = subprocess.run(["bash", "-c", lines + 'printf "%s|%s" "$MODE" "$HF_TOKEN"'],
                           env=environment(fake(cloud.folder / "secrets", "gcloud",
                                                'echo "got ${@: -1}"').parent),
                           capture_output=True, text=True)
    assert shell.stdout == "a 'b'|got --secret=hf-token"


def test_what_create_asks_for(cloud):
    ran, _ = cloud("create", "--topology=v5p:4x8x8", "--num-slices=4", "--reserved",
                   "--project=p", "--service-account=a@b", "--network=n", "--internal-ips")
    assert ran.returncode == 0
    arguments = (cloud.folder / "arguments").read_text().split("\0")[:-1]
    assert arguments[:5] == ["compute", "tpus", "queued-resources", "create", "t2i-866m"]
    assert {"--accelerator-type=v5p-512", "--runtime-version=v2-alpha-tpuv5", "--node-count=4",
            "--node-prefix=t2i-866m", "--reserved", "--project=p", "--zone=us-west4-a",
            "--service-account=a@b", "--network=n", "--internal-ips"} <= set(arguments)
    # One slice is a node with a name: gcloud takes a count only above 1.
    _, _ = cloud("create", "--topology=v5e:16x16")
    arguments = (cloud.folder / "arguments").read_text().split("\0")[:-1]
    assert "--node-id=t2i-866m" in arguments
    assert not any(a.startswith(("--node-count", "--spot", "--reserved")) for a in arguments)


@pytest.mark.parametrize("command, parts", [
    ("logs", ["--node=1", "--worker=3", "tpu_worker.sh logs"]),
    ("stop", ["--node=all", "--worker=all", "tpu_worker.sh stop"]),
    ("status", ["describe", "tpu_worker.sh state"]),
    ("delete", ["delete t2i-866m", "--force", "--quiet"]),
    ("setup", ["archive", "scp", "tpu_worker.sh setup my-bucket", "--worker=all"]),
    ("wait", ["describe", "ACTIVE"]),
    ("watch", ["create", "scp", "tpu_worker.sh setup my-bucket", "tpu_worker.sh run",
               "tpu_worker.sh state"]),
    ("resume", ["SUSPENDED", "delete", "create"]),
])  # fmt: skip
def test_dry_runs_print_and_call_nothing(cloud, command, parts):
    ran, calls = cloud(command, "--topology=v5e:16x16", "--bucket=my-bucket", "--node=1",
                       "--worker=3", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert calls == []
    for part in parts:
        assert part in ran.stdout
    assert not (pathlib.Path.cwd() / "ldm_scaling.tar.gz").exists()


@pytest.mark.parametrize("command, flags, part", [
    ("up", [], "unknown command up-and-away"),
    ("create", ["--spot", "--reserved"], "not both"),
    ("create", [], "--topology"),
    ("create", ["--topology=v5e:3x3"], "v5e:3x3 is no slice"),
    ("create", ["--topology=v5e:4x4", "--num-slices=0"], "--num-slices=0"),
    ("create", ["--topolgy=v5e:4x4"], "unknown argument --topolgy"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(cloud, command, flags, part):
    if "unknown command" in part:
        command = "up-and-away"
    ran, calls = cloud(command, *flags, job=None)
    assert ran.returncode == 2 and calls == []
    assert part in ran.stderr and ran.stderr.count("\n") == 1


def test_a_name_and_a_zone_are_needed():
    for flags, part in ((["--zone=z"], "--name"), (["--name=x"], "--zone"),
                        (["--name=X_y", "--zone=z"], "--name=X_y")):
        ran = call("tpu_vm.sh", "status", *flags)
        assert ran.returncode == 2 and part in ran.stderr


def test_the_committed_tree_holds_what_a_host_calls():
    assert os.access(LAUNCH / "tpu_worker.sh", os.R_OK)
    assert (ROOT / "requirements.lock").exists()


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
    assert (host.home / "started").read_text().splitlines() == ["hf_value", *JOB, "--distributed"]
    calls = (host.home / "systemctl").read_text().splitlines()
    assert "daemon-reload" in calls and calls[-1] == "start --no-block ldm-scaling"


def test_the_service_starts_again_after_the_right_ends(host):
    unit = dict(line.split("=", 1) for line in host("unit").stdout.splitlines() if "=" in line)
    assert unit["Restart"] == "on-failure"
    assert set(unit["RestartPreventExitStatus"].split()) == {"2", "130"}
    assert {"75", "76", "SIGTERM"} <= set(unit["RestartForceExitStatus"].split())
    assert int(unit["StartLimitBurst"]) * int(unit["RestartSec"]) < int(
        unit["StartLimitIntervalSec"]
    ), "else the limit is never reached"
    assert unit["KillMode"] == "mixed" and unit["WantedBy"] == "multi-user.target"


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


def test_setup_installs_and_mounts_once(host):
    for name in ("python3", "mountpoint", "mount", "gcsfuse"):
        fake(host.bin, name, f'echo "{name} $*" >> "$HOME/calls"')
    fake(host.home / ".local" / "bin", "uv", 'echo "uv $*" >> "$HOME/calls"')
    # /etc/fstab is the host's own: what would be written is caught.
    fake(host.bin, "sudo", r"""
echo "sudo $*" >> "$HOME/calls"
case $1 in tee) cat >> "$HOME/fstab" ;; esac
""")
    fake(host.home / "ldm_venv" / "bin", "python", "exit 0")
    assert host("setup", "my-bucket").returncode == 0
    calls = (host.home / "calls").read_text()
    assert "jax[tpu]" in calls and "requirements.lock" in calls
    entry = (host.home / "fstab").read_text().split()
    assert entry[:3] == ["my-bucket", "/mnt/ldm", "gcsfuse"]
    assert "_netdev" in entry[3].split(",") and "allow_other" in entry[3].split(",")


def test_the_dry_runs_job_can_be_pasted():
    ran = call("tpu_vm.sh", "run", *WHERE, "--dry-run", "--", *JOB)
    words = shlex.split(ran.stdout)
    command = next(w for w in words if w.startswith("--command="))
    assert shlex.split(command.split(" -- ")[1].split(" <<")[0]) == JOB

"""Cloud TPU VMs, with a stand-in for gcloud: what is called, in which order, when."""

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
  "ssh state")
    job=$(next jobs)
    [[ $job != unreachable ]] || { echo "ERROR: no route to host" >&2; exit 255; }
    echo "$job"
    exit
    ;;
esac
echo "$words" >> "$FOLDER/calls"
printf '%s\0' "$@" >> "$FOLDER/arguments"
[[ $words != "$FAILS" ]] || { echo "ERROR: PERMISSION_DENIED" >&2; exit "$WITH"; }
if [[ $words == "$SKIPS" ]]; then
  echo "WARNING: Could not prepare all 2 nodes, attempting to ssh into the rest." >&2
fi
"""


@pytest.fixture
def cloud(tmp_path):
    fake(tmp_path / "bin", "gcloud", GCLOUD)
    fake(tmp_path / "bin", "sleep", 'echo "$1" >> "$FOLDER/sleeps"')

    def run(command, *flags, states="ACTIVE", jobs="running", job=JOB, fails="", most=20,
            status=1, skips=""):
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "jobs").write_text("\n".join(jobs.split()) + "\n")
        for name in ("calls", "arguments", "sleeps"):
            (tmp_path / name).write_text("")
        ran = call("tpu_vm.sh", command, *WHERE, *flags, *(["--", *job] if job else []),
                   env=environment(tmp_path / "bin", FOLDER=str(tmp_path), FAILS=fails,
                                   WITH=str(status), SKIPS=skips, LDM_MAX_FAILURES=str(most)))
        return ran, (tmp_path / "calls").read_text().split("\n")[:-1]

    run.folder = tmp_path
    return run


SIZE = ("--topology=v5e:16x16", "--spot", "--bucket=b")
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


def test_watch_waits_longer_after_each_failure_and_gives_up(cloud):
    ran, calls = cloud("watch", *SIZE, states="ABSENT", fails="create", most=3)
    assert ran.returncode == 1
    assert calls == ["create"] * 4
    assert (cloud.folder / "sleeps").read_text().split() == ["60", "120", "240"]
    assert "PERMISSION_DENIED" in ran.stderr and "4 times in a row" in ran.stderr


@pytest.mark.parametrize("step", INSTALL)
def test_watch_tries_again_after_any_status_of_a_host(cloud, step):
    # uv and tar end with 2 where a registry does not answer, and gcloud passes it on.
    ran, calls = cloud("watch", *SIZE, jobs="absent", fails=step, status=2, most=1)
    assert ran.returncode == 1
    assert calls == INSTALL[: INSTALL.index(step) + 1] * 2


def test_watch_ends_at_what_a_host_says_must_be_mended(cloud):
    ran, calls = cloud("watch", *SIZE, jobs="absent", fails="ssh setup", status=78)
    assert ran.returncode == 2 and calls == INSTALL[:2]


@pytest.mark.parametrize("step", INSTALL)
def test_a_slice_that_was_left_out_is_a_failure(cloud, step):
    # gcloud warns of it and ends with 0.
    ran, calls = cloud("up", *SIZE, "--num-slices=2", jobs="absent", skips=step)
    assert ran.returncode == 1 and calls == INSTALL[: INSTALL.index(step) + 1]
    assert "Could not prepare all 2 nodes" in ran.stderr and "not reached" in ran.stderr
    assert cloud("stop", job=None, skips="ssh stop")[0].returncode == 1


def test_watch_counts_setups_after_which_the_job_does_not_run(cloud):
    ran, calls = cloud("watch", *SIZE, jobs="absent", most=1)
    assert ran.returncode == 1 and calls == INSTALL * 2


def test_a_job_that_was_seen_running_counts_from_zero_again(cloud):
    # Nothing is set up beneath it meanwhile.
    ran, calls = cloud("watch", *SIZE, most=1,
                       jobs="absent running unreachable running unreachable running done")
    assert ran.returncode == 0, ran.stderr
    assert calls == INSTALL and "no route to host" in ran.stderr


@pytest.mark.parametrize("command", ["up", "resume", "setup"])
def test_nothing_is_set_up_on_hosts_that_cannot_be_asked(cloud, command):
    ran, calls = cloud(command, *SIZE, jobs="unreachable")
    assert ran.returncode == 1 and calls == []
    assert "nothing is set up" in ran.stderr
    # Hosts that have just come answer after a while.
    ran, calls = cloud(command, *SIZE, jobs="unreachable unreachable absent")
    assert ran.returncode == 0
    assert calls == (INSTALL[:2] if command == "setup" else INSTALL)


def test_setup_by_hand_leaves_a_job_that_runs(cloud):
    ran, calls = cloud("setup", jobs="running", job=None)
    assert ran.returncode == 2 and calls == []
    assert "stop  it first" in ran.stderr


def test_a_host_without_the_tree_says_absent(cloud):
    ran, _ = cloud("watch", *SIZE, "--dry-run")
    line = next(line for line in ran.stdout.splitlines() if "tpu_worker.sh state" in line)
    command = shlex.split(line)[-1].removeprefix("--command=")
    said = subprocess.run(["bash", "-c", command], cwd=cloud.folder, capture_output=True, text=True)
    assert (said.stdout, said.returncode) == ("absent\n", 0)
    fake(cloud.folder / "ldm_scaling" / "launch", "tpu_worker.sh", 'echo "$1 is told"')
    said = subprocess.run(["bash", "-c", command], cwd=cloud.folder, capture_output=True, text=True)
    assert said.stdout == "state is told\n"


def test_a_bucket_is_a_name(cloud):
    cloud("setup", "--bucket=gs://my-bucket/", jobs="absent", job=None)
    arguments = (cloud.folder / "arguments").read_text().split("\0")
    assert any(a.endswith("tpu_worker.sh setup my-bucket") for a in arguments)


def test_watch_ends_at_a_users_mistake(cloud):
    ran, calls = cloud("watch", "--bucket=b", states="ABSENT")
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
    ("setup", ["--bucket=gs://b/folder"], "without a folder"),
    ("setup", ["--bucket=BUCKET"], "--bucket=BUCKET: give a bucket's name, of small letters"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(cloud, command, flags, part):
    if "unknown command" in part:
        command = "up-and-away"
    ran, calls = cloud(command, *flags, job=None)
    assert ran.returncode == 2 and calls == []
    assert part in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.parametrize("workdir, flags, part", [
    ("runs/x", ["--bucket=b"], "runs/x: on each host that is a folder of its own"),
    ("~/x", [], "give a path from /"),
    ("/mnt/ldm/x", [], "/mnt/ldm/x: nothing is mounted there"),
    ("/nfs/../mnt/ldm", [], "give --bucket=B"),
    ("/nfs/x", [], None),
    ("/mnt/ldm/x", ["--bucket=b"], None),
])  # fmt: skip
def test_a_workdir_is_one_that_hosts_share(cloud, workdir, flags, part):
    job = [*JOB[:2], f"--workdir={workdir}"]
    for command in ("up", "watch", "resume", "run"):
        # An earlier setup may have mounted what `run` finds there.
        right = part is None or (command == "run" and "mnt" in workdir)
        ran, calls = cloud(command, *SIZE[:2], *flags, "--dry-run", job=job)
        assert (ran.returncode, calls) == (0 if right else 2, []), ran.stderr
        assert right or (part in ran.stderr and ran.stderr.count("\n") == 1)


def test_a_name_and_a_zone_are_needed():
    for flags, part in ((["--zone=z"], "--name"), (["--name=x"], "--zone"),
                        (["--name=X_y", "--zone=z"], "--name=X_y")):
        ran = call("tpu_vm.sh", "status", *flags)
        assert ran.returncode == 2 and part in ran.stderr


def test_the_committed_tree_holds_what_a_host_calls():
    assert os.access(LAUNCH / "tpu_worker.sh", os.R_OK)
    assert (ROOT / "requirements.lock").exists()


def test_the_dry_runs_job_can_be_pasted():
    ran = call("tpu_vm.sh", "run", *WHERE, "--dry-run", "--", *JOB)
    words = shlex.split(ran.stdout)
    command = next(w for w in words if w.startswith("--command="))
    assert shlex.split(command.split(" -- ")[1].split(" <<")[0]) == JOB

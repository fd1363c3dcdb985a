"""JobSets: against the published schemas, and what Kubernetes does with every exit status.

Two packages carry the schemas: kubernetes-validate those of Kubernetes (JSON Schema, strict: an
unknown field fails), kubeflow-trainer-api the JobSet API's (pydantic, made from its OpenAPI).
"""

import copy
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml

from launch import common, gke
from launch.common import LaunchError
from launch.tpu import Slice
from ldm_scaling import errors
from tests.launch.programs import LAUNCH, call, environment, fake, until

JOB = ["train", "--config=configs/t2i_866m.py", "--workdir=/mnt/ldm/x"]
COMMAND = ("ldm-scaling", JOB[0], "--distributed", *JOB[1:])


def made(topology="v5e:16x16", slices=1, command=COMMAND, **more):
    if not more.keys() & {"bucket", "claim"}:
        more["bucket"] = "b"
    return gke.manifest(gke.Job("t2i-866m", Slice.parse(topology), slices, "image:1", command,
                                **more))


KINDS = [
    made(),
    made("v5e:2x4"),
    made("v5p:4x8x8", 4, bucket="b", service_account="a"),
    made("v6e:4x4", 2, claim="c", environment={"A": "1"}, secrets={"B": "s", "C": "s:key"}),
    made("v4:2x2x4", grace=0, max_restarts=0),
]


def strictly(model, data):
    """A model's object of the data, and all fields of the data are in it."""
    out = model.from_dict(data)
    assert out.to_dict() == data
    return out


@pytest.mark.parametrize("jobset", KINDS, ids=range(len(KINDS)))
def test_manifests_are_valid(jobset):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -e '.[test]'")
    # What kubectl reads is the text.
    jobset = yaml.safe_load(yaml.safe_dump(jobset, sort_keys=False))
    strictly(models.JobsetV1alpha2JobSet, jobset)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
               **replicated["template"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
               "spec": job["spec"]["template"]["spec"]}
        for version in ("1.31", "1.34"):
            validate.validate(job, version, strict=True)
            validate.validate(pod, version, strict=True)


@pytest.mark.parametrize("path, value", [
    (("spec", "template", "spec", "nodeSelectors"), {}),
    (("spec", "podFailurePolicy", "rules", 0, "onExitCode"), {}),
    (("spec", "backoffLimit"), "none"),
    (("spec", "template", "spec", "containers", 0, "env"), {"A": "1"}),
])  # fmt: skip
def test_the_schemas_catch_mistakes(path, value):
    # Else the test above would prove nothing.
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e '.[test]'")
    template = copy.deepcopy(KINDS[3]["spec"]["replicatedJobs"][0]["template"])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
    at = job
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)


def test_the_jobset_schema_catches_mistakes():
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -e '.[test]'")
    for key, value in (("maxRestart", 3), ("maxRestarts", "3")):
        wrong = copy.deepcopy(KINDS[0])
        wrong["spec"]["failurePolicy"][key] = value
        with pytest.raises((ValueError, AssertionError)):
            strictly(models.JobsetV1alpha2JobSet, wrong)


@pytest.mark.parametrize("jobset", KINDS, ids=range(len(KINDS)))
def test_what_the_jobset_controller_demands_besides(jobset):
    # Of its webhook: names of rules, reasons, lengths of names; of Kubernetes: policy and pods.
    rules = jobset["spec"]["failurePolicy"]["rules"]
    assert len({rule["name"] for rule in rules}) == len(rules)
    for rule in rules:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert set(rule["onJobFailureReasons"]) <= {
            "BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes",
            "MaxFailedIndexesExceeded", "PodFailurePolicy",
        }
        assert rule["action"] in ("FailJobSet", "RestartJobSet",
                                  "RestartJobSetAndIgnoreMaxRestarts")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pods, jobs = job["completions"], replicated["replicas"]
    pod = f"{jobset['metadata']['name']}-{replicated['name']}-{jobs - 1}-{pods - 1}-abcde"
    assert len(pod) <= 63
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["completions"] == job["parallelism"]


def controller(jobset, end):
    """What happens to the JobSet when a pod ends: by the rules of both controllers, as documented.

    `end` is an exit status, or `taken` for a pod whose node was taken away before it ended.
    """
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for i, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and end in codes["values"]:
            message = (f"Container {codes['containerName']} for pod default/t2i-866m-slice-2-75-x "
                       f"failed with exit code {end} matching {rule['action']} rule at index {i}")
        elif end == "taken" and {"type": "DisruptionTarget", "status": "True"} in rule.get(
            "onPodConditions", []
        ):
            message = (f"Pod default/t2i-866m-slice-0-2-x has condition DisruptionTarget matching "
                       f"{rule['action']} rule at index {i}")
        else:
            continue
        assert rule["action"] == "FailJob"
        reason = "PodFailurePolicy"
        break
    assert job["backoffLimit"] == 0
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [])
        if reason in rule["onJobFailureReasons"] and (
            not patterns or any(re.search(p, message) for p in patterns)
        ):
            return rule["action"]
    return "RestartJobSet"  # the default: at most maxRestarts times


@pytest.mark.parametrize("end, action", [
    (common.USER, "FailJobSet"),
    (common.SAVED, "RestartJobSetAndIgnoreMaxRestarts"),
    ("taken", "RestartJobSetAndIgnoreMaxRestarts"),
    (errors.STALLED, "RestartJobSet"),
    (1, "RestartJobSet"),
    (137, "RestartJobSet"),
    (12, "RestartJobSet"),
    (175, "RestartJobSet"),
])  # fmt: skip
def test_what_an_exit_status_does(end, action):
    assert controller(made("v5p:4x8x8", 3), end) == action


def test_slices_hosts_and_chips():
    jobset = made("v5p:4x8x8", 4)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert replicated["replicas"] == 4
    assert replicated["template"]["spec"]["completions"] == 64
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x8x8",
    }
    assert container["command"] == list(COMMAND)
    annotations = jobset["metadata"]["annotations"]
    assert annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] == (
        "cloud.google.com/gke-nodepool"
    )
    whole = made("v5e:2x4")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert whole["completions"] == 1
    limits = whole["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"google.com/tpu": 8}


def test_volumes_and_secrets():
    def pod_of(jobset):
        return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]

    bucket, claim = pod_of(KINDS[2]), pod_of(KINDS[3])
    assert bucket["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    attributes = bucket["spec"]["volumes"][0]["csi"]["volumeAttributes"]
    assert attributes["bucketName"] == "b"
    assert bucket["spec"]["serviceAccountName"] == "a"
    assert claim["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "c"}
    for pod in (bucket, claim):
        mount = pod["spec"]["containers"][0]["volumeMounts"][0]
        assert mount["mountPath"] == "/mnt/ldm"
        assert mount["name"] == pod["spec"]["volumes"][0]["name"]
    references = {v["name"]: v["valueFrom"]["secretKeyRef"]
                  for v in claim["spec"]["containers"][0]["env"] if "valueFrom" in v}
    assert references == {"B": {"name": "s", "key": "B"}, "C": {"name": "s", "key": "key"}}


@pytest.mark.parametrize("change, part", [
    ({"topology": "v5e:2x4", "slices": 2}, "one host"),
    ({"slices": 0}, "--num-slices=0"),
    ({"bucket": "b", "claim": "c"}, "not both"),
    ({"bucket": ""}, "give --bucket=B or --claim=C"),
    *(({"command": (*COMMAND[:4], f"--workdir={path}")}, f"{path}: a pod keeps and shares nothing")
      for path in ("/shared/x", "mnt/ldm/x", "/mnt/ldm/../x", "/mnt/ldm2")),
    ({"max_restarts": -1}, "--max-restarts"),
])  # fmt: skip
def test_what_cannot_run_is_refused(change, part):
    with pytest.raises(LaunchError, match=part):
        made(**change)


FLAGS = ["--name=t2i-866m", "--topology=v5e:4x4", "--image=i", "--bucket=b"]


@pytest.fixture
def cluster(tmp_path):
    for name in ("kubectl", "gcloud"):
        fake(tmp_path / "bin", name,
             f'echo "{name} $*" >> "$FOLDER/calls"; [[ $* != *apply* ]] || cat > "$FOLDER/applied"')

    def run(command, *flags, job=()):
        ran = call("gke.py", command, *FLAGS, *flags, *(["--", *job] if job else []),
                   env=environment(tmp_path / "bin", FOLDER=str(tmp_path)))
        calls = tmp_path / "calls"
        return ran, calls.read_text().splitlines() if calls.exists() else []

    run.folder = tmp_path
    return run


def test_apply_gives_the_manifest_and_resume_replaces_it(cluster):
    ran, calls = cluster("apply", job=JOB)
    assert ran.returncode == 0, ran.stderr
    assert calls == ["kubectl --namespace=default apply --filename=-"]
    applied = yaml.safe_load((cluster.folder / "applied").read_text())
    assert applied["metadata"]["name"] == "t2i-866m"
    ran, _ = cluster("manifest", job=JOB)
    assert yaml.safe_load(ran.stdout) == applied
    (replicated,) = applied["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == list(COMMAND)
    _, calls = cluster("resume", "--namespace=ns", job=JOB)
    assert [c.split()[2] for c in calls[-2:]] == ["delete", "apply"]
    assert "--namespace=ns" in calls[-1]


def test_node_pools_one_for_each_slice(cluster):
    ran, calls = cluster("nodes", "--num-slices=2", "--cluster=c", "--location=us-west4-a",
                         "--spot")
    assert ran.returncode == 0 and len(calls) == 2
    for i, line in enumerate(calls):
        assert f"create t2i-866m-{i} " in line
        for flag in ("--machine-type=ct5lp-hightpu-4t", "--tpu-topology=4x4", "--num-nodes=4",
                     "--cluster=c", "--location=us-west4-a", "--spot"):
            assert flag in line.split()
        assert "--node-locations" not in line
    ran, calls = cluster("nodes", "--cluster=c", "--location=us-central1-ai1a")  # a zone too
    assert ran.returncode == 0 and "--location=us-central1-ai1a" in calls[-1].split()
    # --num-nodes is of each zone: a region's three would make three times the slice.
    _, calls = cluster("nodes", "--cluster=c", "--location=us-west4", "--node-locations=us-west4-b")
    assert {"--location=us-west4", "--node-locations=us-west4-b"} <= set(calls[-1].split())


def test_ctrl_c_is_a_status(cluster):
    """As a terminal sends it, to all that it runs: no traceback."""
    fake(cluster.folder / "bin", "kubectl", 'touch "$FOLDER/follows"; exec sleep 60')
    process = subprocess.Popen(
        [sys.executable, LAUNCH / "gke.py", "logs", "--name=x"], stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=environment(cluster.folder / "bin", FOLDER=str(cluster.folder)),
    )
    until((cluster.folder / "follows").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == common.INTERRUPTED


@pytest.mark.parametrize("command, job, part", [
    ("apply", JOB, "kind: JobSet"),
    ("resume", JOB, "delete jobset t2i-866m"),
    ("delete", (), "delete jobset t2i-866m"),
    ("status", (), "get jobset t2i-866m"),
    ("logs", (), "--follow"),
])  # fmt: skip
def test_dry_runs_print_and_call_nothing(cluster, command, job, part):
    ran, calls = cluster(command, "--dry-run", job=job)
    assert ran.returncode == 0 and calls == []
    assert part in ran.stdout


@pytest.mark.parametrize("arguments, part", [
    (["apply", "--name=x", "--topology=v5e:4x4", "--", *JOB], "--image"),
    (["apply", "--name=x", "--topology=v5e:4x4", "--image=i"], "after  --  goes the job"),
    (["apply", "--name=x", "--image=i", "--", *JOB], "KIND:SHAPE"),
    (["apply", "--name=X", "--topology=v5e:4x4", "--image=i", "--", *JOB], "--name=X"),
    (["nodes", "--name=x", "--topology=v5e:4x4"], "--cluster"),
    (["nodes", "--name=x", "--topology=v5e:4x4", "--cluster=c", "--location=us-west4"],
     "us-west4 is a region: give --node-locations=ZONE"),
    (["status", "--name=x"], "kubectl is not installed"),
    (["apply", *FLAGS, "--bucket=gs://b/folder", "--", *JOB], "without a folder"),
    (["apply", *FLAGS, "--bucket=BUCKET", "--", *JOB],
     "--bucket=BUCKET: give a bucket's name, of small letters"),
    (["apply", *FLAGS, "--", "train", "--workdir=gs://b/x"], "gs://b/x"),
    (["apply", *FLAGS, "--", "train", "--workdir=/shared/x"], "give /mnt/ldm/NAME, with --bucket"),
    (["manifest", *FLAGS[:-1], "--", *JOB], "give --bucket=B or --claim=C"),
])  # fmt: skip
def test_mistakes_are_one_line_and_status_2(tmp_path, arguments, part):
    ran = call("gke.py", *arguments, env=os.environ | {"PATH": str(tmp_path)})
    assert ran.returncode == 2
    assert part in ran.stderr and ran.stderr.count("\n") == 1

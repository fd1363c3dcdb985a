"""A job on GKE's TPUs as a JobSet: one Job for each slice, one pod for each host.

    python3 launch/gke.py COMMAND --name=NAME --topology=v5e:16x16 --image=IMAGE
        [--num-slices=2] [--bucket=my-bucket | --claim=C] [--dry-run] [-- train --config=... ]

    nodes      creates the node pools, one for each slice: --cluster=C --location=L [--spot]
               [--node-locations=ZONE], which a region needs: each of its zones would get a slice
    manifest   prints the JobSet
    apply      gives it to the cluster
    resume     deletes the JobSet that is there and applies it again: the same job goes on
    status, logs (--slice=0 --host=0), delete

A bucket, or a claim of a shared volume, is mounted at /mnt/ldm; the workdir must lie there, for all
else goes with the pod. `--secret=VARIABLE=NAME[:KEY]`
names a Kubernetes secret; its value is in no manifest. `--dry-run` prints all, runs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import yaml

from launch import common
from launch.common import MOUNT, LaunchError, entry
from launch.tpu import Slice

CONTAINER = "main"
REPLICATED = "slice"
LABEL = "jobset.sigs.k8s.io/jobset-name"
PORTS = (8471, 8482, 8080)  # of libtpu, of jax's coordinator, of what slices talk over
COMMANDS = ("nodes", "manifest", "apply", "resume", "status", "logs", "delete")
# A checkpoint is made final by renaming its folder, which gcsfuse does up to a number of files.
BUCKET_OPTIONS = "implicit-dirs,rename-dir-limit=200000"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a JobSet is made of.

    Attributes:
      name: of the JobSet.
      tpu: every slice.
      num_slices: how many.
      image: container image that holds the package, see launch/Dockerfile.
      command: of every pod.
      environment: plain variables.
      secrets: variable -> NAME or NAME:KEY of a Kubernetes secret.
      bucket, claim: what is mounted at /mnt/ldm, where the workdir lies; one of them.
      service_account: of the pods; a bucket needs one that may use it.
      max_restarts: after statuses 1, 76 and others, of all slices together. 75 does not count.
      grace: seconds to save in before a pod is killed. A spot node gives less.
    """

    name: str
    tpu: Slice
    num_slices: int
    image: str
    command: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    secrets: dict[str, str] = dataclasses.field(default_factory=dict)
    bucket: str = ""
    claim: str = ""
    service_account: str = ""
    max_restarts: int = 50
    grace: int = 300

    def __post_init__(self):
        # A pod is called NAME-slice-I-J-xxxxx, and a name has 63 letters.
        common.check_name(self.name, most=40)
        if not self.image:
            raise LaunchError("give --image=IMAGE; launch/Dockerfile makes one")
        if self.num_slices < 1:
            raise LaunchError(f"--num-slices={self.num_slices}: at least 1")
        if self.num_slices > 1 and self.tpu.hosts == 1:
            raise LaunchError(
                f"{self.tpu} is one host, and GKE joins slices of several hosts only: take a "
                "larger topology"
            )
        if self.bucket and self.claim:
            raise LaunchError(f"give --bucket or --claim, not both: both are mounted at {MOUNT}")
        for workdir in common.workdirs(self.command):
            if not common.is_mounted(workdir):
                raise LaunchError(
                    f"--workdir={workdir}: a pod keeps and shares nothing but what is mounted: "
                    f"give {MOUNT}/NAME, with --bucket=B or --claim=C"
                )
        if not (self.bucket or self.claim):
            raise LaunchError(
                f"give --bucket=B or --claim=C, which is mounted at {MOUNT}: without one the "
                "workdir would be each pod's own, and go with it"
            )
        if self.max_restarts < 0 or self.grace < 0:
            raise LaunchError("--max-restarts and --grace: at least 0")


def manifest(job: Job) -> dict[str, Any]:
    """The JobSet (jobset.x-k8s.io/v1alpha2)."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # Each slice has a node pool of its own: two never share one.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                # All pods of the last start are gone before the next begins.
                "restartStrategy": "BlockingRecreate",
                "rules": _jobset_rules(),
            },
            "replicatedJobs": [
                {
                    "name": REPLICATED,
                    "replicas": job.num_slices,
                    "template": {
                        "spec": {
                            "completionMode": "Indexed",
                            "completions": job.tpu.hosts,
                            "parallelism": job.tpu.hosts,
                            # A pod alone is never started again: all slices are, together.
                            "backoffLimit": 0,
                            "podFailurePolicy": {"rules": _pod_rules()},
                            "template": _pod(job),
                        }
                    },
                }
            ],
        },
    }


def _pod_rules() -> list[dict[str, Any]]:
    """Which ends of a pod fail its Job with a message that `_jobset_rules` can tell apart."""

    def status(value: int) -> dict[str, Any]:
        match = {"containerName": CONTAINER, "operator": "In", "values": [value]}
        return {"action": "FailJob", "onExitCodes": match}

    taken = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        status(common.USER),
        status(common.SAVED),
        {"action": "FailJob", "onPodConditions": taken},
    ]


def _jobset_rules() -> list[dict[str, Any]]:
    """2 ends all at once; 75 and a pod that was taken away do not count; all else counts.

    The messages are the Job controller's: `... failed with exit code 2 matching FailJob rule ...`,
    `Pod ... has condition DisruptionTarget matching FailJob rule ...`.
    """

    def rule(name: str, action: str, message: str) -> dict[str, Any]:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [message],
        }

    again = "RestartJobSetAndIgnoreMaxRestarts"
    return [
        rule("userMustMend", "FailJobSet", f"exit code {common.USER} matching"),
        rule("savedAndEnded", again, f"exit code {common.SAVED} matching"),
        rule("takenAway", again, "condition DisruptionTarget matching"),
    ]


def _pod(job: Job) -> dict[str, Any]:
    chips = {"google.com/tpu": job.tpu.chips_per_host}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": job.image,
        "command": list(job.command),
        "ports": [{"containerPort": port, "protocol": "TCP"} for port in PORTS],
        "resources": {"requests": dict(chips), "limits": dict(chips)},
    }
    variables: list[dict[str, Any]] = [
        {"name": name, "value": value} for name, value in job.environment.items()
    ]
    for variable, text in job.secrets.items():
        name, _, key = text.partition(":")
        reference = {"name": name, "key": key or variable}
        variables.append({"name": variable, "valueFrom": {"secretKeyRef": reference}})
    if variables:
        container["env"] = variables
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": job.tpu.kind.gke,
            "cloud.google.com/gke-tpu-topology": job.tpu.shape,
        },
        "containers": [container],
    }
    if job.service_account:
        spec["serviceAccountName"] = job.service_account
    out: dict[str, Any] = {"spec": spec}
    if job.bucket:
        out["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
        attributes = {"bucketName": job.bucket, "mountOptions": BUCKET_OPTIONS}
        volume = {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    else:
        volume = {"persistentVolumeClaim": {"claimName": job.claim}}
    spec["volumes"] = [{"name": "shared", **volume}]
    container["volumeMounts"] = [{"name": "shared", "mountPath": MOUNT}]
    return out


def node_pools(name: str, tpu: Slice, num_slices: int, cluster: str, location: str,
               spot: bool, zone: str = "") -> list[list[str]]:
    """The commands that make a node pool for each slice.

    `--num-nodes` counts those of each zone, so of a region's `zone` is the one that has them.
    """
    if not cluster or not location:
        raise LaunchError("nodes needs --cluster=C and --location=ZONE_OR_REGION")
    if not zone and not re.fullmatch(r".+-(ai\d+)?[a-z]", location):
        raise LaunchError(
            f"--location={location} is a region: give --node-locations=ZONE, one that has the TPUs,"
            f" for example {location}-a"
        )
    out = []
    for i in range(num_slices):
        command = [
            "gcloud", "container", "node-pools", "create", f"{name}-{i}",
            f"--cluster={cluster}", f"--location={location}",
            f"--machine-type={tpu.machine_type}", f"--num-nodes={tpu.hosts}",
            "--scopes=cloud-platform",
        ]
        if zone:
            command.append(f"--node-locations={zone}")
        if tpu.hosts > 1:
            command.append(f"--tpu-topology={tpu.shape}")
        out.append([*command, "--spot"] if spot else command)
    return out


def arguments_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("launch/gke.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=COMMANDS)
    p.add_argument("--name", required=True)
    p.add_argument("--topology", default="")
    p.add_argument("--num-slices", type=int, default=1)
    p.add_argument("--image", default="")
    p.add_argument("--bucket", default="")
    p.add_argument("--claim", default="")
    p.add_argument("--service-account", default="")
    p.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    p.add_argument("--secret", action="append", default=[], metavar="VARIABLE=NAME[:KEY]")
    p.add_argument("--max-restarts", type=int, default=50)
    p.add_argument("--grace", type=int, default=300, help="seconds to save in")
    p.add_argument("--namespace", default="default")
    p.add_argument("--cluster", default="")
    p.add_argument("--location", default="")
    p.add_argument("--node-locations", default="", metavar="ZONE")
    p.add_argument("--spot", action="store_true")
    p.add_argument("--slice", type=int, default=0)
    p.add_argument("--host", type=int, default=0)
    p.add_argument("--dry-run", action="store_true")
    return p


def main(arguments: list[str]) -> int:
    own, rest = common.parted(arguments)
    given = arguments_parser().parse_args(own)
    common.check_name(given.name)
    kubectl = ["kubectl", f"--namespace={given.namespace}"]
    delete = [*kubectl, "delete", "jobset", given.name, "--ignore-not-found", "--wait=true"]
    if given.command == "delete":
        return common.run(delete, given.dry_run)
    if given.command == "status":
        pods = [*kubectl, "get", "pods", f"--selector={LABEL}={given.name}", "--output=wide"]
        return (common.run([*kubectl, "get", "jobset", given.name], given.dry_run)
                or common.run(pods, given.dry_run))
    if given.command == "logs":
        # Not a pod's name, which ends differently after every start.
        selector = (f"{LABEL}={given.name},jobset.sigs.k8s.io/job-index={given.slice},"
                    f"batch.kubernetes.io/job-completion-index={given.host}")
        return common.run(
            [*kubectl, "logs", f"--selector={selector}", f"--container={CONTAINER}", "--follow",
             "--tail=200"], given.dry_run,
        )
    tpu = Slice.parse(given.topology)
    if given.command == "nodes":
        pools = node_pools(given.name, tpu, given.num_slices, given.cluster, given.location,
                           given.spot, given.node_locations)
        return next((s for s in (common.run(c, given.dry_run) for c in pools) if s), 0)
    job = Job(
        given.name, tpu, given.num_slices, given.image, tuple(common.job_command(rest)),
        common.plain_environment(given.env), common.secret_names(given.secret),
        common.bucket_name(given.bucket), given.claim, given.service_account, given.max_restarts,
        given.grace,
    )
    text = yaml.safe_dump(manifest(job), sort_keys=False)
    if given.command == "manifest":
        print(text, end="")
        return 0
    if given.command == "resume":
        status = common.run(delete, given.dry_run)
        if status:
            return status
    return common.run([*kubectl, "apply", "--filename=-"], given.dry_run, text)


if __name__ == "__main__":
    entry(main)

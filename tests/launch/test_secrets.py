"""No launcher prints or writes the value of a secret; names are enough."""

import pytest

from launch import common
from launch.common import LaunchError
from tests.launch.programs import call, environment

VALUE = "hf_planted0123456789"
JOB = ["--", "train", "--config=configs/t2i_39m.py", "--workdir=/mnt/ldm/x"]
GKE = ["gke.py", "manifest", "--name=x", "--topology=v5e:4x4", "--image=i", "--bucket=b"]
TPU_VM = ["tpu_vm.sh", "up", "--name=x", "--zone=z", "--topology=v5e:4x4", "--bucket=b",
          "--dry-run"]


@pytest.mark.parametrize("command", [GKE, TPU_VM])
def test_names_of_secrets_are_passed_and_values_are_not(command):
    ran = call(*command, "--secret=HF_TOKEN=hf-token", *JOB, env=environment(HF_TOKEN=VALUE))
    assert ran.returncode == 0, ran.stderr
    assert "HF_TOKEN" in ran.stdout and "hf-token" in ran.stdout
    assert VALUE not in ran.stdout + ran.stderr


@pytest.mark.parametrize("command", [
    [*GKE, f"--env=MODE={VALUE}", *JOB],
    [*GKE, f"--secret=HF_TOKEN={VALUE}", *JOB],
    [*GKE, f"--env=HF_TOKEN={VALUE}", *JOB],
    [*GKE, *JOB, f"--config.data.source=x:{VALUE}"],
    [*TPU_VM, f"--env=MODE={VALUE}", *JOB],
    [*TPU_VM, *JOB, f"--config.data.source=x:{VALUE}"],
    ["slurm.sh", "--nodes=1", "--gpus=1", "--dry-run", *JOB, f"--config.x={VALUE}"],
    ["local.py", "--dry-run", *JOB, f"--config.x={VALUE}"],
])  # fmt: skip
def test_a_value_of_the_environment_is_refused_and_not_repeated(command):
    ran = call(*command, env=environment(HF_TOKEN=VALUE))
    assert ran.returncode == 2
    assert VALUE not in ran.stdout + ran.stderr
    assert "--secret=VARIABLE=NAME" in ran.stderr


def test_a_secret_is_known_by_its_name_too():
    for text in ("API_KEY=x", "--db-password=x", "AWS_SECRET_ACCESS_KEY=x", "my_token=x"):
        with pytest.raises(LaunchError):
            common.check_no_secret([text], environment={})
    common.check_no_secret(["--config.data.keys=3", "KEYBOARD=x", "--monkey=1"], environment={})


def test_a_secrets_name_that_looks_like_no_name_is_refused():
    with pytest.raises(LaunchError) as e:
        common.secret_names(["HF_TOKEN=not a name$"])
    assert "not a name" not in str(e.value)

"""All shell is clean by shellcheck; the service's file is by systemd; gcloud knows every flag."""

import functools
import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.programs import LAUNCH, call

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
JOB = ["--", "train", "--config=configs/t2i_39m.py", "--workdir=/mnt/ldm/x"]


def test_shell_is_clean():
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(os.sys.executable))
    if shellcheck is None:
        pytest.skip("shellcheck: pip install -e '.[test]'")
    assert len(SCRIPTS) >= 4
    ran = subprocess.run([shellcheck, "--enable=avoid-nullary-conditions", *map(str, SCRIPTS)],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_stop_at_errors_and_can_be_run(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_the_service_is_one_by_systemd(tmp_path):
    start = tmp_path / "ldm_start.sh"
    start.write_text("#!/bin/sh\n")
    start.chmod(0o755)
    (tmp_path / "ldm_scaling").mkdir()
    unit = call("tpu_worker.sh", "unit", env=os.environ | {"HOME": str(tmp_path)}).stdout
    assert f"ExecStart={start}" in unit
    (tmp_path / "ldm.service").write_text(unit)
    ran = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "ldm.service")],
                         capture_output=True, text=True)
    assert ran.returncode == 0 and "ldm.service" not in ran.stderr, ran.stderr


@functools.cache
def _help(gcloud: str, words: tuple[str, ...], config: str) -> str:
    ran = subprocess.run([gcloud, *words, "--help"], capture_output=True, text=True,
                         env=os.environ | {"CLOUDSDK_CONFIG": config, "PAGER": "cat",
                                              "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1"})
    return re.sub(r"\x1b\[[0-9;]*m", "", ran.stdout)


def test_gcloud_knows_every_command_and_flag(tmp_path):
    gcloud = shutil.which("gcloud")
    if gcloud is None:
        pytest.skip("gcloud is not here")
    where = ["--name=x", "--zone=z", "--project=p", "--dry-run"]
    wanted = [
        ("tpu_vm.sh", "watch", *where, "--topology=v5e:16x16", "--num-slices=2", "--spot",
         "--bucket=b", "--service-account=a", "--network=n", "--internal-ips", "--delete", *JOB),
        ("tpu_vm.sh", "create", *where, "--topology=v4:4x4x4", "--reserved"),
        ("gke.py", "nodes", "--name=x", "--topology=v5e:4x4", "--cluster=c", "--location=l",
         "--spot", "--dry-run"),
    ]
    lines = [line for command in wanted for line in _lines(call(*command).stdout)]
    checked = 0
    for line in lines:
        words = shlex.split(line)[1:]
        at = next(i for i, w in enumerate(words) if w in ("create", "delete", "describe", "ssh",
                                                            "scp"))
        text = _help(gcloud, tuple(words[: at + 1]), str(tmp_path))
        assert "SYNOPSIS" in text, words[: at + 1]
        for word in words[at + 1 :]:
            if word.startswith("--"):
                flag = word.split("=")[0]
                assert re.search(rf"{flag}\b", text), (words[: at + 1], flag)
                checked += 1
    assert checked > 20


def _lines(text: str) -> list[str]:
    """gcloud's commands of a dry run; one may span lines, inside quotes."""
    out: list[str] = []
    for line in text.splitlines():
        if out and out[-1].count("'") % 2:
            out[-1] += f"\n{line}"
        elif line.startswith("gcloud "):
            out.append(line)
    return out

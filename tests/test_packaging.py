"""What others are given: a source distribution."""

import fnmatch
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_source_distribution_is_the_repository():
    # setuptools adds the package, and these files, by itself.
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    folders = {"ldm_scaling", *(line[1] for line in lines if line[0] == "graft")}
    names = ["LICENSE", "MANIFEST.in", "pyproject.toml"]
    names += [name for line in lines if line[0] == "include" for name in line[1:]]
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is no git repository")
    for path in tracked.stdout.splitlines():
        top, _, below = path.partition("/")
        assert top in folders if below else any(fnmatch.fnmatch(path, name) for name in names), path

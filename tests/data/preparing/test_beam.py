"""Apache Beam with several workers makes the same bytes as one machine without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ldm_scaling import errors
from ldm_scaling.data.preparing import beam, prepare
from ldm_scaling.data.preparing.filters import Filters
from ldm_scaling.data.preparing.prepare import Options
from tests.data.preparing.folder_of_pairs import FolderOfPairs, put
from tests.data.preparing.test_prepare import HERE, crowd, files_of

pytest.importorskip("apache_beam", reason="Beam's runners: pip install -e '.[beam]'")

THREADS = ["--direct_num_workers=2", "--direct_running_mode=multi_threading"]
PROCESSES = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
SCRIPT = """
import json, logging, sys
from folder_of_pairs import FolderOfPairs
from ldm_scaling.data.preparing import prepare
if __name__ == "__main__":
    logging.disable()
    root, destination, options, *flags = sys.argv[1:]
    options = prepare.Options(**json.loads(options))
    prepare.run(FolderOfPairs(root), destination, options, "DirectRunner", flags)
"""


def test_workers_in_threads_make_the_same_bytes(tmp_path):
    collection = put(tmp_path / "from", crowd())
    options = Options(limit=45, validation_share=0.3, workers=1)
    here = prepare.run(collection, tmp_path / "here", options)
    there = prepare.run(collection, tmp_path / "there", options, "DirectRunner", THREADS)
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")
    assert here.hash == there.hash
    dropped = [
        json.loads((tmp_path / folder / "report.json").read_text())["dropped"]
        for folder in ("here", "there")
    ]
    assert dropped[0] == dropped[1] and "near-duplicate" in dropped[0]


def test_workers_in_processes_make_the_same_bytes(tmp_path):
    collection = put(tmp_path / "from", crowd())
    prepare.run(collection, tmp_path / "here", Options(workers=1))
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(HERE.parents[2]), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), collection.root, str(tmp_path / "there"),
         "{}", *PROCESSES],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_it_goes_on_with_what_another_run_began(tmp_path, monkeypatch):
    """Begun without Beam and stopped, then finished by it: the facts are not found out again."""
    collection = put(tmp_path / "from", crowd())
    prepare.run(collection, tmp_path / "here", Options(workers=1))

    def stop(job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "decide", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.run(collection, tmp_path / "there", Options(workers=1))
    facts = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "there/.work").glob("facts*")}
    assert len(facts) == 4
    monkeypatch.setattr(prepare, "_tidy", lambda *_: None)
    prepare.run(collection, tmp_path / "there", Options(), "DirectRunner")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "there/.work").glob("facts*")}
    assert facts == after
    (tmp_path / "there/.lock").unlink()
    assert files_of(tmp_path / "here") == files_of(tmp_path / "there")


def test_what_a_user_can_mend_comes_as_one_line(tmp_path):
    collection = put(tmp_path / "from", crowd())
    with pytest.raises(errors.UserError, match="no runner 'NoSuchRunner'") as caught:
        prepare.run(collection, tmp_path / "a", Options(), "NoSuchRunner")
    assert "\n" not in str(caught.value)
    nothing = Options(filters=Filters(min_side=999), limit=3)
    with pytest.raises(errors.UserError, match="none of the 54 pairs"):
        prepare.run(collection, tmp_path / "b", nothing, "DirectRunner")
    broken = os.path.join(collection.root, "part2", "00003.json")
    with open(broken, "w") as file:
        file.write('{"broken": "the tar ends early"}')
    wanted = "part2 is broken: the tar ends early; mend it"
    with pytest.raises(errors.UserError, match=wanted) as caught:
        prepare.run(FolderOfPairs(collection.root), tmp_path / "c", Options(), "DirectRunner")
    assert "\n" not in str(caught.value)


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    job, _ = prepare.begin(put(tmp_path / "from", crowd()), tmp_path / "to", Options())
    with pytest.raises(errors.MissingPackageError, match=r"'\.\[beam\]'"):
        beam.run(job, "DirectRunner")

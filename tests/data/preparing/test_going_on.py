"""What goes on after a part that was broken; who may be at work in a folder, and with how much."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
import json
import os
import pickle
import tarfile

import pytest

from ldm_scaling import errors
from ldm_scaling.data import sources
from ldm_scaling.data.preparing import preparation, prepare
from ldm_scaling.data.preparing.filters import CODE, Filters
from ldm_scaling.data.preparing.prepare import Duplicates, Options
from ldm_scaling.data.sources import folder
from tests.data.preparing.folder_of_pairs import encoded, plain_pairs, put, scene

pytest.importorskip("webdataset", reason="tars: pip install -e '.[data]'")

PLAIN = Options(validation_share=0, duplicates=Duplicates(perceptual=None), workers=1)
SKIPPING = dataclasses.replace(PLAIN, skip_broken=True)


def tar(path, numbers):
    """A tar of these pictures, with a caption each."""
    with tarfile.open(path, "w") as file:
        for i in numbers:
            for end, data in (("png", encoded(scene(i))), ("txt", b"picture %d" % i)):
                info = tarfile.TarInfo(f"{path.stem}{i:04d}.{end}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    """A folder of three tars; the second is cut short."""
    root = tmp_path / "tars"
    root.mkdir()
    for number in range(3):
        tar(root / f"{number:05d}.tar", range(4 * number, 4 * number + 4))
    broken = root / "00001.tar"
    broken.write_bytes(broken.read_bytes()[:9000])
    return root


@pytest.fixture
def examined(monkeypatch):
    """The parts that are examined, as they are."""
    seen, scan = [], preparation.facts_lib.scan

    def watched(collection, part, *options):
        seen.append(part.name)
        return scan(collection, part, *options)

    monkeypatch.setattr(preparation.facts_lib, "scan", watched)
    return seen


def go(root, to, options=PLAIN):
    return prepare.run(sources.collection(f"webdataset:{root}"), to, options)


def stopped(root, to):
    """A preparation that a broken tar stopped, after all were examined."""
    with pytest.raises(errors.UserError, match=r"00001.tar .*data.prepare.skip_broken=True"):
        go(root, to)


def test_a_tar_that_is_mended_is_examined_alone(root, tmp_path, examined):
    stopped(root, tmp_path / "to")
    assert examined == ["00000.tar", "00001.tar", "00002.tar"]
    examined.clear()
    tar(root / "00001.tar", range(4, 8))
    assert go(root, tmp_path / "to").count("train") == 12 and examined == ["00001.tar"]
    examined.clear()
    whole = go(root, tmp_path / "again")
    assert whole.hash == go(root, tmp_path / "to").hash and len(examined) == 3


def test_a_broken_tar_is_left_out_without_examining_the_others_again(root, tmp_path, examined):
    stopped(root, tmp_path / "to")
    examined.clear()
    found = go(root, tmp_path / "to", SKIPPING)
    assert found.count("train") == 8 and examined == []
    assert found.manifest["broken"] == ["00001.tar"]
    assert found.manifest["options"]["skip_broken"] is True
    with pytest.raises(errors.UserError, match="made without 00001.tar, which could not be read"):
        go(root, tmp_path / "to")
    assert go(root, tmp_path / "to", SKIPPING).hash == found.hash
    # Where nothing was left out, both are the same.
    tar(root / "00001.tar", range(4, 8))
    whole = go(root, tmp_path / "whole", SKIPPING)
    assert go(root, tmp_path / "whole").hash == whole.hash


def test_tars_may_be_taken_out_and_added_while_it_is_under_way(root, tmp_path, examined):
    stopped(root, tmp_path / "to")
    examined.clear()
    (root / "00001.tar").unlink()
    tar(root / "00003.tar", range(12, 16))
    assert go(root, tmp_path / "to").count("train") == 12 and examined == ["00003.tar"]


def test_what_another_version_has_begun_is_not_gone_on_with(root, tmp_path, monkeypatch):
    """It may have read other pairs of the same files."""
    with monkeypatch.context() as before:
        before.setattr(preparation, "_FORMAT", "ldm_scaling preparation 1")
        stopped(root, tmp_path / "to")
    with pytest.raises(errors.UserError, match="begun by another version .*1.: remove it"):
        go(root, tmp_path / "to")


def test_a_shard_is_written_anew_where_what_is_kept_is_other(root, tmp_path):
    job, _ = preparation.begin(sources.collection(f"webdataset:{root}"), tmp_path / "to", SKIPPING)
    for i in range(3):
        job.scan(i)
    prepare.decide(job)
    (named, *_) = job.shard_files([job.counts(i) for i in range(3)])
    assert (job.write(0, named), job.write(0, named)) == (4, 0)
    verdict = job.verdict(0)
    verdict.reason[1] = CODE["duplicate"]
    job.save_verdict(0, verdict)
    assert (job.write(0, named), len(job.written(0)["train"])) == (3, 3)


def test_no_shard_is_left_of_parts_that_were_others(root, tmp_path, monkeypatch):
    """Stopped after writing, and gone on with a tar more."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.prepare_report, "gather", stop)
        with pytest.raises(KeyboardInterrupt):
            go(root, tmp_path / "to", SKIPPING)
    assert len(list((tmp_path / "to").glob("pairs-train.*"))) == 2
    tar(root / "00001.tar", range(4, 8))
    found, afresh = (go(root, tmp_path / to, SKIPPING) for to in ("to", "afresh"))
    assert found.hash == afresh.hash
    shards = [{p.name for p in (tmp_path / to).iterdir()} for to in ("to", "afresh")]
    assert shards[0] == shards[1]


def test_facts_of_another_form_are_refused(root, tmp_path):
    stopped(root, tmp_path / "to")
    begun = tmp_path / "to/.work/begun.json"
    begun.write_text(json.dumps({**json.loads(begun.read_text()), "format": "of 2031"}))
    with pytest.raises(errors.UserError, match=r"begun by another version \(of 2031\): remove it"):
        go(root, tmp_path / "to")


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(5)])
    job, _ = prepare.begin(collection, tmp_path / "to", PLAIN)
    with prepare.lock(job):
        job.scan(0)
        (tmp_path / "to/.tmp-of-the-first").touch()
        with pytest.raises(errors.UserError, match=f"another .*at work in {tmp_path / 'to'}"):
            prepare.run(collection, tmp_path / "to", PLAIN)
        assert job.facts(0) and (tmp_path / "to/.tmp-of-the-first").exists()
    assert prepare.run(collection, tmp_path / "to", PLAIN).count("train") == 5
    assert not list((tmp_path / "to").glob(".*"))


def test_as_many_processes_as_cores_that_may_be_used(tmp_path, monkeypatch):
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 9})
    collection = put(tmp_path / "from", [plain_pairs(1, i) for i in range(4)])
    job, _ = prepare.begin(collection, tmp_path / "to", Options())
    assert prepare._how_many(job) == (3, 1)
    job, _ = prepare.begin(collection, tmp_path / "to", Options(workers=2))
    assert prepare._how_many(job) == (2, 1)


class Elsewhere:
    """A pool of processes, done here: what they get has been through a pickle."""

    inside = False

    def __init__(self, processes, context, begin, arguments):
        prepare._job[:] = pickle.loads(pickle.dumps(arguments))
        self.most = 0

    def submit(self, work, *arguments):
        work, arguments = pickle.loads(pickle.dumps((work, arguments)))
        future = concurrent.futures.Future()
        Elsewhere.inside = True
        try:
            future.set_result(work(*arguments))
        except concurrent.futures.process.BrokenProcessPool as e:
            future.set_exception(e)
        finally:
            Elsewhere.inside = False
        return future

    def shutdown(self, cancel_futures):
        prepare._job.clear()


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of 20 parts, and processes that are here."""
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Elsewhere)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        (tmp_path / f"pictures/{i:02d}.png").write_bytes(encoded(scene(i)))
        (tmp_path / f"pictures/{i:02d}.txt").write_text(f"picture {i}")
    (tmp_path / "pictures/from_a_phone.heic").touch()
    return sources.collection(f"folder:{tmp_path / 'pictures'}", sources.Options(part_size=2))


def test_a_folder_is_listed_by_one_process_alone(pictures, tmp_path, monkeypatch):
    calls, listed = [], folder.Folder._list

    def watched(self):
        calls.append(Elsewhere.inside)
        return listed(self)

    monkeypatch.setattr(folder.Folder, "_list", watched)
    found = prepare.run(pictures, tmp_path / "to", dataclasses.replace(PLAIN, workers=2))
    assert found.count("train") == 40 and calls == [False]
    text = (tmp_path / "to/report.md").read_text()
    assert "Files that are no pictures by their suffix are not read: 1 .heic." in text


def test_a_worker_that_is_killed_says_how_many_there_were(pictures, tmp_path, monkeypatch):
    def killed(*_):
        raise concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(preparation.Preparation, "scan", killed)
    with pytest.raises(errors.UserError, match="fewer than --workers=3; it goes on"):
        prepare.run(pictures, tmp_path / "to", dataclasses.replace(PLAIN, workers=3))


def test_keys_are_named_whole_where_nothing_is_left(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(2)])
    options = Options(validation_share=0.999999, filters=Filters(captions=False), workers=1)
    with pytest.raises(errors.UserError, match="data.prepare.validation_share .*data.seed"):
        prepare.run(collection, tmp_path / "to", options)

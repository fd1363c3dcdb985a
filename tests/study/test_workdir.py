"""The workdir keeps its config whole."""

import io
import json
import logging
import os
import runpy
from unittest import mock

import pytest

from ldm_scaling import config, files
from ldm_scaling.errors import Interrupted, UserError
from ldm_scaling.study.workdir import Workdir

STUDIES = {
    "default": lambda: config.default(),
    "tiny": lambda: runpy.run_path("configs/demo.py")["get_config"]("tiny"),
    "paper": lambda: runpy.run_path("configs/t2i_866m.py")["get_config"](""),
    "odd": lambda: {
        "name": "Größe", "sweep": {"guidance": [1.1, 1e-3], "max_steps": {"ddim": 7}},
        "train": {"learning_rate": 3e-05, "compute_dtype": "bfloat16"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_last_config_is_the_one_that_was_bound(name, tmp_path):
    study = config.parse(STUDIES[name]())
    Workdir(tmp_path).bind(study)
    assert Workdir(tmp_path).last_config() == study
    before = (tmp_path / "study.json").stat().st_mtime_ns
    Workdir(tmp_path).bind(study)
    assert (tmp_path / "study.json").stat().st_mtime_ns == before


def test_a_study_is_that_of_the_config_given_or_the_last(tmp_path):
    last, other = {"name": "last"}, {"name": "other"}
    Workdir(tmp_path).bind(config.parse(last))
    assert Workdir(tmp_path).study() == config.parse(last)
    assert Workdir(tmp_path).study(other) == config.parse(other)


def test_one_process_holds_a_workdir_of_its_study(tmp_path):
    workdir, study = Workdir(tmp_path), config.parse({})
    with workdir.held(study):
        logging.getLogger("ldm_scaling").info("what was done")
        assert workdir.last_config() == study
        with pytest.raises(UserError, match="another process works in"):
            workdir.lock()
    assert "what was done" in workdir.log_file().read_text()
    with workdir.held(config.parse({"sweep": {"num_images": 64}}), keep_last=True):
        assert workdir.last_config() == study
    other = config.parse({"seed": 7})
    (tmp_path / "records").mkdir()
    for _ in range(2):  # What is refused holds nothing.
        with pytest.raises(UserError, match="belongs to another config"), workdir.held(other):
            pass


def test_what_is_at_its_default_differs_in_what_changed_alone(tmp_path):
    def of(**keys):
        return config.parse({"data": {"source": "folder:pics", **keys}})

    Workdir(tmp_path).bind(of())
    (tmp_path / "text").mkdir()
    for changed, said in (
        ({"prepare": {"validation_share": 0.3}}, "prepare.validation_share is 0.05 there, 0.3"),
        ({"flip": True}, "flip is False there, True"),
    ):
        with pytest.raises(UserError, match=rf"another config \(data.{said} here\): choose"):
            Workdir(tmp_path).bind(of(**changed))


def test_a_workdir_without_anything_made_by_its_config_takes_another(tmp_path, caplog):
    first, second = config.parse({"seed": 1}), config.parse({"seed": 2})
    with Workdir(tmp_path).held(first):
        (tmp_path / "data").mkdir()
    with Workdir(tmp_path).held(second, keep_last=True):
        assert Workdir(tmp_path).last_config() == second
    assert "is of this config from now on (seed is 1 there, 2 here)" in caplog.text
    with pytest.raises(UserError, match="seed=-1: from 0"):
        Workdir(tmp_path).bind(config.parse({"seed": -1}))
    for made in ("autoencoder", "models", "latents", "text", "records", "finetuned"):
        (tmp_path / made).mkdir()
        with pytest.raises(UserError, match="belongs to another config"):
            Workdir(tmp_path).bind(first)
        (tmp_path / made).rmdir()
    Workdir(tmp_path).bind(first)


def test_longer_training_is_told_its_way(tmp_path):
    first = config.parse({"train": {"steps": 40, "warmup_steps": 4}})
    Workdir(tmp_path).bind(first)
    (tmp_path / "models").mkdir()
    longer = {"steps": 80, "warmup_steps": 4, "learning_rate_decay": "wsd"}
    with pytest.raises(UserError, match=f"start.workdir={tmp_path} --config.start.take=run"):
        Workdir(tmp_path).bind(config.parse({"train": longer}))
    with pytest.raises(UserError, match="config it was made with$"):
        Workdir(tmp_path).bind(config.parse({"train": {**longer, "batch_size": 3}}))


def test_a_log_holds_every_sign_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *unused: encoding or "ascii")
    with Workdir(tmp_path).log_to_file():
        logging.getLogger("ldm_scaling").info("Größe \udcff")
    assert "Größe \\udcff" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_bucket_is_no_workdir():
    for url in ("gs://bucket/x", "s3://bucket"):
        with pytest.raises(UserError, match=f"{url}.*mount it"):
            Workdir(url)


def test_config_that_cannot_be_read_again(tmp_path):
    Workdir(tmp_path).bind(config.parse({}))
    marker = tmp_path / "study.json"
    body = json.loads(marker.read_text())
    body["config"]["train"]["stepz"] = 3  # of another version
    marker.write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"study.json: .*train.stepz.*give --config=FILE anew"):
        Workdir(tmp_path).last_config()
    for broken in ("{", "[]", "{}", '{"identity": 3}'):
        marker.write_text(broken)
        with pytest.raises(UserError, match="study.json is damaged"):
            Workdir(tmp_path).last_config()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".tmp-autoencoder/checkpoints").mkdir(parents=True)  # of `files.atomic_folder`
    (tmp_path / ".tmp-autoencoder/checkpoints/half").touch()
    checkpoint = "models/c8/checkpoints/4"
    for folder in ("records", "seconds", "finetuned/hash/c8/after/cup", f"{checkpoint}/state"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ".tmp-12345678-key.json").touch()
    (tmp_path / checkpoint / "_CHECKPOINT_METADATA").touch()
    for path in [*tmp_path.rglob(".tmp-*")]:
        os.utime(path, (0, 0))
    with Workdir(tmp_path).lock():  # Of no study.
        assert len([*tmp_path.rglob(".tmp-*")]) == 5
    (tmp_path / "study.json").touch()
    with Workdir(tmp_path).lock():
        (left,) = tmp_path.rglob(".tmp-*")
        assert left.parent.name == "state"


def test_what_is_being_written_without_the_lock_is_left_alone(tmp_path):
    path = tmp_path / "figures" / "scaling.png"
    (tmp_path / "study.json").touch()
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"of a figure")
        with Workdir(tmp_path).lock():
            pass
    assert path.read_bytes() == b"of a figure"


def test_what_has_a_name_is_on_disk(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(os, "fsync", lambda number: held.append(os.fstat(number).st_ino))
    files.atomic_write_text(tmp_path / "a.json", "{}")
    assert held == [(tmp_path / "a.json").stat().st_ino]


@pytest.mark.parametrize("change", [{"seed": -1}, {"seed": 2**32}, {"sweep": {"replicates": 1}}])
def test_what_no_study_begins_with_is_no_bar_to_one_from_before(tmp_path, change):
    study = config.parse(change)
    with pytest.raises(UserError, match="config: (seed=.*: from 0|sweep.replicates=1: at least 2)"):
        Workdir(tmp_path / "new").bind(study)
    with mock.patch.object(config.Study, "require_new"):
        Workdir(tmp_path / "old").bind(study)
    assert Workdir(tmp_path / "old").last_config() == study
    Workdir(tmp_path / "old").bind(study)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk_hides_no_error(tmp_path, capfd):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(Interrupted, match="the error"), Workdir(tmp_path).log_to_file():
        for line in "ab":
            logging.getLogger("ldm_scaling").info(line)
        raise Interrupted("the error")
    said = capfd.readouterr().err
    assert said.count("cannot write") == said.count("\n") == 1
    assert f"{tmp_path}/log.txt: No space left on device" in said


def test_a_log_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(UserError, match="cannot use the workdir"), Workdir(tmp_path).log_to_file():
        pass

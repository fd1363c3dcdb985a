"""The prepared data set: whole or absent, the same each time, and split by concept."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from ldm_scaling import errors
from ldm_scaling.data.composed import builder, compose
from ldm_scaling.data.loading import loader

SPEC = builder.ComposedSpec(side=16, train=60, validation=24)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return builder.prepare(tmp_path_factory.mktemp("data"), SPEC)


def contents(prepared) -> list:
    """All that is in a data set, plainly comparable."""
    return [
        [(image.tobytes(), str(caption), str(concept), int(index))
         for image, caption, concept, index in zip(*map(found.get, loader.FIELDS))]
        for found in (source.batch(range(len(source))) for source in (
            loader.image_source(prepared, split, loader.FIELDS) for split in compose.SPLITS
        ))
    ]  # fmt: skip


def test_the_splits_hold_what_was_asked_for_in_order(prepared):
    train, validation = contents(prepared)
    assert (len(train), len(validation)) == (60, 24)
    assert [r[3] for r in train] == list(range(60))
    assert [r[3] for r in validation] == list(range(24))


def test_the_splits_share_no_concept(prepared):
    train, validation = ({c for r in rows for c in r[2].split()} for rows in contents(prepared))
    assert train and validation and not train & validation


def test_pictures_are_the_composers(prepared):
    from ldm_scaling.data.composed import openmoji

    source = loader.image_source(prepared, "validation", loader.FIELDS)
    picture = compose.Composer(openmoji.load(), 16).compose("validation", 5)
    found = source.batch([5])
    np.testing.assert_array_equal(found["image"], picture.image_HWC[None])
    assert found["image"].dtype == np.uint8 and found["image"].shape == (1, 16, 16, 3)
    assert found["caption"] == picture.caption


def test_preparing_elsewhere_gives_the_same_contents_and_hash(prepared, tmp_path):
    again = builder.prepare(tmp_path, SPEC)
    assert again.hash == prepared.hash
    assert contents(again) == contents(prepared)


def test_another_seed_or_count_is_another_data_set_beside_it(tmp_path):
    small = builder.ComposedSpec(side=16, train=8, validation=4)
    hashes = {
        builder.prepare(tmp_path, spec).hash
        for spec in (small, builder.ComposedSpec(side=16, train=8, validation=4, seed=1))
    }
    assert len(hashes) == 2
    assert len(list((tmp_path / "openmoji_composed").iterdir())) == 2


def test_a_second_preparation_touches_nothing(prepared, monkeypatch):
    def fail(*_):
        raise AssertionError("composed again")

    monkeypatch.setattr(compose.Composer, "compose", fail)
    before = {p: p.stat().mtime for p in prepared.path.iterdir()}
    again = builder.prepare(prepared.path.parents[2], SPEC)
    assert again.hash == prepared.hash
    assert {p: p.stat().mtime for p in prepared.path.iterdir()} == before


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    builder.prepare(tmp_path, builder.ComposedSpec(side=16, train=4, validation=2))


def test_the_attribution_that_the_licence_asks_for_is_kept(prepared):
    assert "OpenMoji" in (prepared.path / "LICENSE").read_text()
    assert "CC BY-SA 4.0" in (prepared.path / "LICENSE").read_text()


def test_an_error_midway_leaves_nothing_that_reads_as_finished(prepared, tmp_path, monkeypatch):
    compose_one = compose.Composer.compose

    def stop(self, split, index):
        if (split, index) == ("validation", 12):
            raise KeyboardInterrupt
        return compose_one(self, split, index)

    with monkeypatch.context() as patch:
        patch.setattr(compose.Composer, "compose", stop)
        with pytest.raises(KeyboardInterrupt):
            builder.prepare(tmp_path, SPEC)
    assert not list(tmp_path.rglob("dataset_info.json"))
    assert contents(builder.prepare(tmp_path, SPEC)) == contents(prepared)


def test_kill_9_midway_then_the_same_call(prepared, tmp_path):
    program = """
        import os, signal, sys
        from ldm_scaling.data.composed import builder, compose
        whole = compose.Composer.compose
        def kill(self, split, index):
            if (split, index) == ("validation", 12):
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(self, split, index)
        compose.Composer.compose = kill
        builder.prepare(sys.argv[1], builder.ComposedSpec(side=16, train=60, validation=24))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], capture_output=True
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    left = list(tmp_path.rglob("*incomplete*"))
    assert left and not list(tmp_path.rglob("dataset_info.json"))
    for folder in left:  # as if it had happened long ago
        os.utime(folder, (0, 0))
    assert builder.prepare(tmp_path, SPEC).hash == prepared.hash
    assert not list(tmp_path.rglob("*incomplete*"))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("openmoji_composed-train.array_record-00000-of-00001", _cut),
        ("openmoji_composed-validation.array_record-00000-of-00001", lambda p: p.unlink()),
        ("dataset_info.json", _cut),
        ("dataset_info.json", lambda p: p.unlink()),
        ("metadata.json", _cut),
        ("metadata.json", lambda p: p.unlink()),
    ],
)
def test_a_damaged_data_set_is_named_with_its_remedy(prepared, tmp_path, name, damage):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.path.parents[2], folder)
    damage(folder / prepared.path.relative_to(prepared.path.parents[2]) / name)
    with pytest.raises(errors.UserError, match="copy.*remove the folder") as e:
        builder.prepare(folder, SPEC)
    assert "\n" not in str(e.value)


def test_a_damaged_record_is_found_when_it_is_read(prepared, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(prepared.path.parents[2], folder)
    (path,) = folder.rglob("*-train.array_record*")
    data = bytearray(path.read_bytes())
    for place in range(2000, 30_000, 300):
        data[place] ^= 0xFF
    path.write_bytes(data)
    source = loader.image_source(builder.prepare(folder, SPEC), "train")
    with pytest.raises(errors.UserError, match="train split.*copy.*damaged.*remove"):
        source.batch(range(len(source)))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="file.*choose a folder"):
        builder.prepare(tmp_path / "file" / "data", SPEC)


@pytest.mark.parametrize(
    "wrong", [{"side": 8}, {"side": 4096}, {"train": 0}, {"validation": -1}, {"seed": -1}]
)
def test_impossible_specs_are_refused(wrong):
    with pytest.raises(errors.UserError, match=str(next(iter(wrong.values())))):
        builder.ComposedSpec(**wrong)


@pytest.mark.parametrize(("split", "fields"), [("test", ("image",)), ("train", ("pixels",))])
def test_unknown_splits_and_fields_are_refused(prepared, split, fields):
    with pytest.raises(errors.UserError, match="test|pixels"):
        loader.image_source(prepared, split, fields)


def test_the_metadata_says_what_was_left_out(prepared):
    metadata = json.loads((prepared.path / "metadata.json").read_text())
    assert metadata["left_out"]["country flag"] > 250
    assert metadata["composer"] == compose.VERSION

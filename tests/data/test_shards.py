"""Prepared shards: any record comes back, TFDS reads the same, and damage is never silent."""

from __future__ import annotations

import dataclasses
import math
import pickle
import shutil
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from ldm_scaling import errors
from ldm_scaling.data import corrupt, record, shards
from ldm_scaling.data.record import Record
from tests.data.preparing.folder_of_pairs import encoded, scene


def records(count: int, first: int = 0) -> list[Record]:
    return [
        Record(
            f"kéy{i}", encoded(scene(i, 8, 8 + i)), tuple(f"caption {k}" for k in range(i % 3)),
            f"group{i // 2}", 8 + i, 8, i / 10, math.nan if i % 2 else 0.5,
        )
        for i in range(first, first + count)
    ]  # fmt: skip


def same(a: Record, b: Record) -> bool:
    return repr(dataclasses.astuple(a)) == repr(dataclasses.astuple(b))  # NaN is like NaN


@pytest.fixture
def folder(tmp_path):
    shards.write(tmp_path / "set", {"train": records(20), "validation": records(5, 20)}, "demo")
    return tmp_path / "set"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    key=TEXT.filter(bool), image=st.binary(max_size=50), captions=st.lists(TEXT, max_size=4),
    group=TEXT, size=st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)),
    scores=st.tuples(st.floats(width=32), st.floats(width=32)),
)  # fmt: skip
def test_any_record_is_the_same_after_its_bytes(key, image, captions, group, size, scores):
    one = Record(key, image, tuple(captions), group, *size, *scores)
    data = one.to_bytes()
    assert same(Record.from_bytes(data), one)
    assert Record.from_bytes(data).to_bytes() == data


def test_tfds_writes_records_that_are_read_as_they_are():
    one = records(3)[2]
    example = dataclasses.asdict(one) | {"captions": list(one.captions)}
    features = record.features()
    serializer = ExampleSerializer(features.get_serialized_info())
    found = Record.from_bytes(serializer.serialize_example(features.encode_example(example)))
    assert found.captions == one.captions and found.image == one.image
    assert found.aesthetic == pytest.approx(one.aesthetic)


def test_records_come_in_the_order_asked_for(folder):
    found = shards.open(folder)
    assert (found.count("train"), found.count("validation")) == (20, 5)
    order = [3, 19, 0, 3]
    wanted = records(20)
    for one, index in zip(found.records("train").read(order), order):
        assert one.key == wanted[index].key and one.image == wanted[index].image
        assert one.captions == wanted[index].captions and one.group == wanted[index].group
    assert found.sizes("train").tolist() == [[8 + i, 8] for i in range(20)]
    assert found.captions("train").tolist() == [i % 3 for i in range(20)]
    assert found.records("train").read([]) == []


def test_tfds_reads_the_folder(folder):
    builder = tfds.builder_from_directory(str(folder))
    source = builder.as_data_source("train")
    for i, one in enumerate(records(20)):
        example = source[i]
        assert example["key"].decode() == one.key
        assert [text.decode() for text in example["captions"]] == list(one.captions)
        np.testing.assert_array_equal(example["image"], scene(i, 8, 8 + i))
    assert len(builder.as_data_source("validation")) == 5


def test_a_split_may_be_empty(tmp_path):
    found = shards.write(tmp_path, {"train": records(2), "validation": []})
    assert found.count("validation") == 0 and len(found.records("validation")) == 0
    assert found.sizes("validation").shape == (0, 2)
    assert len(tfds.builder_from_directory(str(tmp_path)).as_data_source("train")) == 2


def test_numbers_outside_are_refused(folder):
    source = shards.open(folder).records("train")
    for index in (-1, 20):
        with pytest.raises(IndexError, match="0..19"):
            source.read([0, index])
    with pytest.raises(errors.UserError, match="no split 'test'"):
        shards.open(folder).records("test")


def test_it_may_be_sent_to_processes_and_shared_by_threads(folder):
    source = pickle.loads(pickle.dumps(shards.open(folder).records("train")))
    found: list[list[str]] = []

    def read() -> None:
        found.append([r.key for i in range(20) for r in source.read([i])])

    threads = [threading.Thread(target=read) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == [[r.key for r in records(20)]] * 8


@pytest.mark.parametrize("change", ["key", "image", "captions", "group", "width", "aesthetic"])
def test_the_hash_changes_with_every_field_and_the_order(tmp_path, change):
    base = records(4)
    values = {"key": "k", "image": b"x", "captions": ("y",), "group": "g", "width": 3}
    other = dataclasses.replace(base[2], **{change: values.get(change, 0.75)})
    variants = [base, [*base[:2], other, base[3]], [base[1], base[0], *base[2:]], base[:3]]
    hashes = [
        shards.write(tmp_path / str(i), {"train": rows}).hash for i, rows in enumerate(variants)
    ]
    assert len(set(hashes)) == 4
    assert shards.write(tmp_path / "again", {"train": base}).hash == hashes[0]


def damaged_at(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_record_is_named_and_the_others_are_read(folder):
    path = next(folder.glob("demo-train*"))
    damaged_at(path, path.read_bytes().index(records(20)[7].image) + 30)
    source = shards.open(folder).records("train")
    with pytest.raises(corrupt.CorruptRecords, match="record 7 of .*demo-train") as caught:
        source.read([5, 7, 9])
    assert list(caught.value.failures) == [7]
    assert list(pickle.loads(pickle.dumps(caught.value)).failures) == [7]
    assert [r.key for r in source.read([5, 9])] == ["kéy5", "kéy9"]


def test_no_flipped_bit_goes_unseen(folder, tmp_path):
    path = next(folder.glob("demo-train*"))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    wanted = shards.open(folder).records("train").read(range(20))
    for position in rng.integers(len(whole), size=60).tolist():
        path.write_bytes(whole)
        damaged_at(path, position)
        try:
            source = shards.open(folder).records("train")
            failures = {}
            for index in range(20):
                try:
                    assert same(source.read([index])[0], wanted[index])
                except corrupt.CorruptRecords as e:
                    failures |= e.failures
            assert len(failures) <= 1
        except errors.UserError as e:
            assert path.name in str(e) and "\n" not in str(e)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "bytes instead of"),
    ],
)
def test_missing_and_cut_shards_are_named(folder, spoil, match):
    path = next(folder.glob("demo-train*"))
    spoil(path)
    with pytest.raises(errors.UserError, match=f"{path.name} .*{match}"):
        shards.open(folder)


def test_a_shard_of_another_set_is_refused(folder, tmp_path):
    source = shards.open(folder).records("train")
    shutil.copy(next(folder.glob("demo-validation*")), next(folder.glob("demo-train*")))
    with pytest.raises(errors.UserError, match="has 5 records instead of 20"):
        source.read([0])


@pytest.mark.parametrize(
    "name, content",
    [
        ("prepared.json", b"{"), ("prepared.json", b"[]"), ("prepared.json", b"\xff"),
        ("index_train.npz", b""), ("index_train.npz", b"PK\x03\x04"),
    ],
)  # fmt: skip
def test_damaged_metadata_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(errors.UserError, match="is damaged") as caught:
        shards.open(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_prepared_folder_is_refused(tmp_path, folder):
    with pytest.raises(errors.UserError, match="no prepared data set"):
        shards.open(tmp_path)
    (folder / "prepared.json").write_text('{"format": "ldm_scaling prepared 9"}')
    with pytest.raises(errors.UserError, match="prepared 9"):
        shards.open(folder)

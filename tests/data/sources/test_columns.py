"""Parquet and arrow files: Hugging Face's layouts and others, in parts of whole row groups."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scaling.data import sources
from ldm_scaling.errors import UserError
from tests.data.sources import made

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def noted(schema, features):
    """The schema with the notes that `datasets` keeps in it."""
    info = {"info": {"features": features}}
    return schema.with_metadata({"huggingface": json.dumps(info)})


def hub(numbers, captions=None):
    """A table as `Dataset.to_parquet` and `push_to_hub` make it of Image and Value features."""
    captions = captions or [f"picture {i}" for i in numbers]
    schema = noted(
        pa.schema([("image", IMAGE), ("label", pa.int64()), ("text", pa.string())]),
        {"image": {"_type": "Image"}, "label": {"names": ["a"], "_type": "ClassLabel"},
         "text": {"dtype": "string", "_type": "Value"}},
    )  # fmt: skip
    rows = [
        {"image": {"bytes": made.image(i), "path": f"{i}.png"}, "label": 0, "text": text}
        for i, text in zip(numbers, captions)
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def save_to_disk(folder, tables, split=None):
    """What `Dataset.save_to_disk` writes: arrow streams, and a state that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(
            sink, table.schema) as writer:  # fmt: skip
            writer.write_table(table, max_chunksize=3)
    state = {
        "_data_files": [{"filename": name} for name in names], "_fingerprint": "3f2b",
        "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
        "_output_all_columns": False, "_split": split,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def check(pairs, numbers):
    assert [pair.error for pair in pairs] == [""] * len(pairs)
    assert [pair.image for pair in pairs] == [made.image(i) for i in numbers]
    assert [pair.captions for pair in pairs] == [(f"picture {i}",) for i in numbers]


def test_the_hubs_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, numbers in {
        "data/train-00000-of-00002.parquet": range(5),
        "data/train-00001-of-00002.parquet": range(5, 12),
        "data/test-00000-of-00001.parquet": range(20, 22),
        ".cache/left-00000-of-00001.parquet": range(50, 52),
    }.items():
        pq.write_table(hub(numbers), tmp_path / name, row_group_size=2)
    check(made.read(f"huggingface:{tmp_path}", part_size=3), [20, 21, *range(12)])
    pairs = made.read(f"huggingface:{tmp_path}#train", part_size=4)
    check(pairs, range(12))
    assert pairs[5].key == "data/train-00001-of-00002/0"
    with pytest.raises(UserError, match="no split 'valid'.*test, train"):
        made.read(f"huggingface:{tmp_path}#valid")


def test_what_save_to_disk_writes(tmp_path):
    save_to_disk(tmp_path / "one", [hub(range(7)), hub(range(7, 9))])
    check(made.read(f"huggingface:{tmp_path}/one", part_size=4), range(9))
    save_to_disk(tmp_path / "both/train", [hub(range(7))], "train")
    save_to_disk(tmp_path / "both/test", [hub(range(7, 9))], "test")
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    check(made.read(f"huggingface:{tmp_path}/both#test"), range(7, 9))
    check(made.read(f"huggingface:{tmp_path}/both"), [7, 8, *range(7)])


def test_images_that_are_only_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "data/a b.png").write_bytes(made.image(1))
    (tmp_path / "pictures/2.png").write_bytes(made.image(2))
    paths = ["a b.png", "pictures/2.png", str(tmp_path / "pictures/2.png"), "gone.png",
             "http://example.org/1.png", None, "iVBORw0KGgo" * 999, "a\0b"]  # fmt: skip
    structs = pa.array([{"bytes": None, "path": path} for path in paths], IMAGE)
    for images in (structs, pa.array(paths)):
        pq.write_table(pa.table({"image": images, "text": ["x"] * 8}), tmp_path / "data/0.parquet")
        pairs = made.read(f"huggingface:{tmp_path}")
        assert [pair.image for pair in pairs[:3]] == [made.image(i) for i in (1, 2, 2)]
        errors = [pair.error for pair in pairs[3:]]
        assert str(tmp_path / "data/gone.png") in errors[0] and "row 3 of" in errors[0]
        assert "fetch it first" in errors[1] and "holds no image" in errors[2]
        assert "base64" in errors[3] and len(errors[3]) < 300 and errors[4]


@pytest.mark.parametrize("rows", [3, 40])
def test_paths_beside_bytes(tmp_path, rows):
    """Bytes of any name go before paths where they are an image's, and only there."""
    (tmp_path / "a.png").write_bytes(made.image(1))
    for name, values in (
        ("embedding", [None, b"\0\0\2\0some 30 bytes of numbers...."]),
        ("content", [None, b"<html>404</html>", made.image(2)]),
    ):
        values = [*values, *[values[-1]] * (rows - len(values))]
        table = pa.table({name: values, "image": ["a.png"] * rows, "text": ["x"] * rows})
        pq.write_table(table, tmp_path / "x.parquet")
        found = {pair.image for pair in made.read(f"parquet:{tmp_path}", part_size=20)}
        assert found - {b"", b"<html>404</html>"} == {made.image(1 if name == "embedding" else 2)}


@pytest.mark.parametrize("change, words", [
    (lambda d: (d / "data-00001-of-00002.arrow").unlink(), "data-00001-of-00002.arrow"),
    (lambda d: (d / "state.json").write_text("{"), "state.json"),
    (lambda d: (d / "state.json").write_text("[]"), "state.json"),
    (lambda d: (d / "state.json").write_text('{"_data_files": 7}'), "state.json"),
    (lambda d: (d / "state.json").write_text('{"_indices_data_files": [{}]}'), "flatten_indices"),
    (lambda d: (d / "data-00000-of-00002.arrow").write_bytes(b""), "data-00000-of-00002.arrow"),
    (lambda d: (d / "data-00000-of-00002.arrow").write_bytes(b"ARROW1"), "data-00000-of-00002"),
])  # fmt: skip
def test_a_damaged_folder(tmp_path, change, words):
    save_to_disk(tmp_path / "x", [hub(range(3)), hub(range(3))])
    change(tmp_path / "x")
    with pytest.raises(UserError, match=words):
        made.read(f"huggingface:{tmp_path}/x")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_parts_of_any_row_groups(tmp_path_factory, groups, part_size):
    path = tmp_path_factory.mktemp("x") / "a.parquet"
    schema = pa.schema([("jpg", pa.binary()), ("caption", pa.string())])
    rows = iter(range(100))
    with pq.ParquetWriter(path, schema) as writer:
        for count in groups:
            numbers = [next(rows) for _ in range(count)]
            writer.write_table(pa.table(
                {"jpg": [b"%d" % i for i in numbers], "caption": [str(i) for i in numbers]}, schema
            ), row_group_size=max(count, 1))  # fmt: skip
    total = sum(groups)
    collection = sources.collection(f"parquet:{path}", sources.Options(part_size=part_size))
    if not total:
        with pytest.raises(UserError, match="no row"):
            collection.parts()
        return
    parts = collection.parts()
    found = [[pair.captions[0] for pair in collection.read(part)] for part in parts]
    assert [[str(i) for i in range(part.start, part.stop)] for part in parts] == found
    assert [int(text) for texts in found for text in texts] == list(range(total))
    assert all(len(texts) <= part_size for texts in found)


@pytest.mark.parametrize("order", [1, -1])
def test_a_large_row_group_is_decoded_once_and_not_for_each_part(tmp_path, monkeypatch, order):
    """By one process that reads part after part; in any order the rows are right."""
    rows, part_size, decoded = 3000, 100, []
    numbers = [str(i) for i in range(rows)]
    pq.write_table(pa.table({"jpg": [b"x"] * rows, "caption": numbers}), tmp_path / "a.parquet")

    class Counted(pq.ParquetFile):
        def iter_batches(self, *args, **kwargs):
            for batch in super().iter_batches(*args, **kwargs):
                decoded.append(batch.num_rows)
                yield batch

    monkeypatch.setattr(pq, "ParquetFile", Counted)
    collection = sources.collection(f"parquet:{tmp_path}", sources.Options(part_size=part_size))
    parts = collection.parts()[::order]
    found = [[pair.captions[0] for pair in collection.read(part)] for part in parts]
    assert len(parts) == 30 and [text for texts in found[::order] for text in texts] == numbers
    assert order == -1 or sum(decoded) == rows
    # One that stops early, as the writing of what is kept does, and two at once.
    assert [next(collection.read(p)).captions[0] for p in parts[:3]] == [t[0] for t in found[:3]]
    one, two = collection.read(parts[3]), collection.read(parts[3])
    assert [a.captions == b.captions for a, b in zip(one, two)] == [True] * part_size


def test_another_file_of_the_same_name_is_read_anew(tmp_path):
    """What is left of the reading of a row group is that file's."""
    for word in ("one", "another"):
        table = pa.table({"jpg": [b"x"] * 80, "caption": [f"{word} {i}" for i in range(80)]})
        pq.write_table(table, tmp_path / "a.parquet")
        collection = sources.collection(f"parquet:{tmp_path}", sources.Options(part_size=50))
        first, second = collection.parts()
        part = first if word == "one" else second
        assert all(p.captions[0].startswith(word) for p in collection.read(part))


@pytest.mark.parametrize("name, kind", [
    ("image", pa.binary()), ("jpg", pa.large_binary()), ("picture of it", pa.binary()),
    ("image_bytes", pa.binary()), ("thing", IMAGE),
])  # fmt: skip
@pytest.mark.parametrize("caption, values", [
    ("caption", pa.array(["a", None, "b"])), ("TEXT", pa.array(["a", " ", "b"], pa.large_string())),
    ("texts", pa.array([["a"], [], ["b"]])), ("text", pa.array([b"a", b"", b"b"])),
    ("prompt", pa.array(["a", None, "b"]).dictionary_encode()),
    ("captions", pa.array([[{"text": "a", "id": 1}], None, [{"text": "b", "id": 2}]])),
])  # fmt: skip
def test_columns_by_name_and_type(tmp_path, name, kind, caption, values):
    images = [made.image(i) for i in range(3)]
    if pa.types.is_struct(kind):
        images = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"hash": [b"8bytes"] * 3, name: pa.array(images, kind), caption: values})
    pq.write_table(table if name in ("image", "jpg") else table.drop_columns("hash"),
                   tmp_path / "x.parquet")  # fmt: skip
    pairs = made.read(f"parquet:{tmp_path}")
    assert [pair.captions for pair in pairs] == [("a",), (), ("b",)]
    assert [pair.image for pair in pairs] == [made.image(i) for i in range(3)]


@pytest.mark.parametrize("columns, words", [
    ({"url": ["a"], "caption": ["b"]}, "no column of image bytes.*url .string., caption"),
    ({"one": [b"a"], "two": [b"b"], "caption": ["c"]}, "several columns.*one .binary., two"),
    ({"image": [b"a"], "alt": ["b"]}, "no column of captions.*image .binary., alt .string."),
    ({"image": [b"a"], "caption": [7]}, "no column of captions.*caption .int64."),
])  # fmt: skip
def test_columns_that_are_missing(tmp_path, columns, words):
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"x.parquet holds {words}"):
        made.read(f"parquet:{tmp_path}")


def test_columns_that_are_named(tmp_path):
    table = {"image": [b"x"], "alt": ["a"], "title": ["t"], "beauty": [4], "pwatermark": [0.5]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    text = f"parquet:{tmp_path / 'x.parquet'}"
    scores = {"aesthetic": "beauty"}
    (pair,) = made.read(text, caption_columns=("title", "alt"), score_columns=scores)
    assert pair.captions == ("t", "a") and pair.scores == {"aesthetic": 4, "watermark": 0.5}
    (pair,) = made.read(text, captions=False)
    assert pair.captions == () and pair.image == b"x"
    with pytest.raises(UserError, match="captions 'name'.*alt .string."):
        made.read(text, caption_columns=("alt", "name"))
    with pytest.raises(UserError, match="scores 'charm'.*beauty .int64."):
        made.read(text, captions=False, score_columns={"aesthetic": "charm"})


def test_rows_that_cannot_be_used(tmp_path):
    """NaN and None are no caption and no score; text that is no UTF-8 is said to be so."""
    texts = pa.array([b"fine", b"\xfcber", b"fine", b"fine", b"fine"]).view(pa.string())
    table = pa.table({
        "image": [b"0", b"1", b"", None, b"4"], "caption": texts,
        "aesthetic": [np.nan, 1.0, 2.0, None, np.inf],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "x.parquet")
    pairs = made.read(f"parquet:{tmp_path}")
    assert pairs[0].captions == ("fine",) and pairs[0].scores == {}
    where = f"of {tmp_path / 'x.parquet'}"
    assert f"row 1 {where} holds text that is no UTF-8" in pairs[1].error
    assert pairs[2].error == f"row 2 {where} holds no image"
    assert pairs[3].error == f"row 3 {where} holds no image"
    assert "no number but inf" in pairs[4].error


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_that_is_cut(tmp_path_factory, suffix, data):
    """The footer of parquet and the end of a stream come last: any cut is seen at once."""
    root = tmp_path_factory.mktemp("cut")
    path = root / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(hub(range(4)), path, row_group_size=2)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, hub([]).schema) as writer:
            writer.write_table(hub(range(4)), max_chunksize=2)
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(UserError, match=f"x.{suffix}"):
        sources.collection(f"huggingface:{root}").parts()


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_parquet_file_gives_no_wrong_pair(tmp_path_factory, compression, data):
    """Where the writer kept checksums of its pages."""
    root = tmp_path_factory.mktemp("damaged")
    path = root / "x.parquet"
    pq.write_table(hub(range(4)), path, compression=compression, write_page_checksum=True)
    whole = made.read(f"parquet:{root}")
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    at = data.draw(st.integers(0, len(content) - footer - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    collection = sources.collection(f"parquet:{root}")
    try:
        pairs = [pair for part in collection.parts() for pair in collection.read(part)]
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert pairs == whole

"""Images in folders: captions beside them or in tables, each found or said why it was not."""

import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm_scaling.errors import UserError
from tests.data.sources import made

NAMES = ["0 a.png", "b(1).jpg", "c[2].webp", "dæ/é.PNG", "x.y.z.png", "猫/🐈 .jpeg"]


def put(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(made.image(i))


def test_sidecars(tmp_path):
    put(tmp_path, NAMES)
    (tmp_path / "0 a.txt").write_bytes(b"\r\none cat \r\n\r\nanother\n")
    (tmp_path / "b(1).Caption").write_bytes("zwölf Katzen".encode("utf-16"))
    (tmp_path / "c[2].json").write_text(json.dumps(
        {"captions": ["a", "b"], "aesthetic_score": "5.5", "watermark": None}))  # fmt: skip
    (tmp_path / "dæ/é.txt").write_bytes(b"\xfcber")
    (tmp_path / "x.y.z.TXT").write_text("")
    (tmp_path / "x.y.z.json").write_text('{"prompt": "three dots", "pwatermark": 0.5}')
    pairs = made.read(f"folder:{tmp_path}", part_size=4)
    assert [pair.key for pair in pairs] == NAMES
    assert [pair.captions for pair in pairs] == [
        ("one cat", "another"), ("zwölf Katzen",), ("a", "b"), (), ("three dots",), (),
    ]  # fmt: skip
    assert [i for i, pair in enumerate(pairs) if pair.image == made.image(i)] == [0, 1, 2, 4, 5]
    assert pairs[3].error.startswith(f"{tmp_path}/dæ/é.txt is not in utf-8")
    assert pairs[2].scores == {"aesthetic": 5.5} and pairs[4].scores == {"watermark": 0.5}
    assert made.read(f"folder:{tmp_path}", caption_encoding="latin-1")[3].captions == ("über",)


@pytest.mark.parametrize("text, why", [
    ("{", "no JSON"), ('{"caption": 3}', "no text"), ('{"aesthetic": "x"}', "no number"),
    ('{"caption": "\\ud800"}', "surrogate"), ("[]", "no JSON object"),
])  # fmt: skip
def test_a_broken_sidecar_is_named(tmp_path, text, why):
    put(tmp_path, ["a.png"])
    (tmp_path / "a.json").write_text(text)
    (pair,) = made.read(f"folder:{tmp_path}")
    assert str(tmp_path / "a.json") in pair.error and why in pair.error


def write_csv(path, rows, encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def write_jsonl(path, rows, encoding="utf-8"):
    head, *rows = rows
    with open(path, "w", encoding=encoding) as file:
        for row in rows:
            file.write(json.dumps(dict(zip(head, row)), ensure_ascii=False) + "\n")


def write_parquet(path, rows, encoding=None):
    head, *rows = rows
    pq.write_table(pa.Table.from_pylist([dict(zip(head, row)) for row in rows]), path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("write, name", [
    (write_csv, "metadata.csv"), (write_jsonl, "metadata.jsonl"),
    (write_parquet, "metadata.parquet"),
])  # fmt: skip
def test_tables_in_any_order(tmp_path, write, name, encoding):
    """Two rows of an image are two captions; one that is not named may have a sidecar."""
    put(tmp_path, NAMES)
    put(tmp_path / "train", ["1.png", "2.png"])
    (tmp_path / "b(1).txt").write_text("beside")
    rows = [
        ["file_name", "caption", "aesthetic", "url"],
        ["x.y.z.png", 'comma, "quote"\nand line', "6.5", "u"],
        ["猫/🐈 .jpeg", "Katze über 猫", "", "u"],
        ["./0 a.png", "first", None, "u"],
        ["gone.png", "nothing there", "1", "u"],
        [str(tmp_path / "train/2.png"), "in its place", "", "u"],
        ["0 a.png", " second ", "3", "u"],
    ]
    write(tmp_path / name, rows, encoding)
    write(tmp_path / "train" / name, [["path", "text"], ["1.png", "below"]], encoding)
    pairs = {pair.key: pair for pair in made.read(f"folder:{tmp_path}", part_size=3)}
    assert list(pairs) == sorted([*NAMES, "gone.png", "train/1.png", "train/2.png"])
    assert pairs["x.y.z.png"].captions == ('comma, "quote"\nand line',)
    assert pairs["x.y.z.png"].image == made.image(4)
    assert pairs["猫/🐈 .jpeg"].captions == ("Katze über 猫",)
    assert pairs["0 a.png"].captions == ("first", "second")
    assert pairs["0 a.png"].scores == {"aesthetic": 3}
    assert pairs["train/1.png"].captions == ("below",)
    assert pairs["b(1).jpg"].captions == ("beside",)
    assert pairs["train/2.png"].captions == ("in its place",)
    assert pairs["c[2].webp"].captions == () and not pairs["c[2].webp"].error
    assert f"there is no file {tmp_path / 'gone.png'}" in pairs["gone.png"].error


def test_rows_that_cannot_be_used(tmp_path):
    put(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    (tmp_path / "metadata.csv").write_bytes(
        b"file_name,caption,aesthetic\na.png,gar\xe7on,\nb.png,two, three,5\nc.png\n,no name,\n"
        b"../d.png,outside,\nd.png,fine,1e999\n"
    )
    found = made.plain(made.read(f"folder:{tmp_path}"))
    where = f"of {tmp_path / 'metadata.csv'}"
    assert f"row 2 {where} is not in utf-8" in found["a.png"]
    assert f"row 3 {where} has 4 fields instead of 3" in found["metadata.csv#3"]
    assert f"row 4 {where} has 1 fields instead of 3" in found["metadata.csv#4"]
    assert f"row 5 {where} names no image" in found["metadata.csv#5"]
    assert "is not in" in found["../d.png"] and "no number" in found["d.png"]
    assert made.read(f"folder:{tmp_path}", caption_encoding="cp1252")[1].captions == ("garçon",)


@pytest.mark.parametrize("name, data, words", [
    ("metadata.csv", b"", "no column of the images' names"),
    ("metadata.csv", b"file_name,alt\na.png,b\n", "file_name, alt"),
    ("metadata.csv", b"caption\nb\n", "caption"),
    ("metadata.csv", b'file_name,caption\n\na.png,"b\nc"\n"a.png" b,c\n', "begins in line 5"),
    ("metadata.csv", b'file_name,caption\na.png,"b\nb.png,c\n', "begins in line 2"),
    ("metadata.csv", "file_name,caption\n".encode("utf-16")[:-1], "metadata.csv"),
    ("metadata.jsonl", b'{"file_name": "a.png", "caption": "b"}\n{"file', "line 2"),
    ("metadata.jsonl", b'[1]\n', "line 1"),
    ("metadata.jsonl", b'{"file_name": "a.png", "alt": "b"}\n', "alt, file_name"),
    ("metadata.parquet", b"PAR1 and so on", "metadata.parquet"),
    ("metadata.parquet", b"", "metadata.parquet"),
])  # fmt: skip
def test_a_table_that_cannot_be_read(tmp_path, name, data, words):
    put(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as e:
        made.read(f"folder:{tmp_path}")
    assert str(tmp_path / name) in str(e.value) and words in str(e.value)
    assert "\n" not in str(e.value)


def test_two_tables_side_by_side(tmp_path):
    put(tmp_path, ["a.png"])
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="metadata.csv and metadata.jsonl"):
        made.read(f"folder:{tmp_path}")


def test_columns_that_are_named_must_be_there(tmp_path):
    put(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text("file_name,alt,beauty\na.png,one,2\n")
    (pair,) = made.read(
        f"folder:{tmp_path}", caption_columns=("alt",), score_columns={"aesthetic": "beauty"}
    )
    assert (pair.captions, pair.scores) == (("one",), {"aesthetic": 2})
    with pytest.raises(UserError, match="'title'.*file_name, alt, beauty"):
        made.read(f"folder:{tmp_path}", caption_columns=("alt", "title"))


@pytest.mark.parametrize("kind", ["folder", "photos", "coco"])
def test_scores_that_are_named_where_there_can_be_none(tmp_path, kind):
    put(tmp_path, ["a.png"])
    (tmp_path / "a.txt").write_text("a thing")
    with pytest.raises(UserError, match="leave out data.prepare.aesthetic_column"):
        made.read(f"{kind}:{tmp_path}", score_columns={"aesthetic": "beauty"})
    if kind == "folder":
        (tmp_path / "a.JSON").write_text('{"beauty": 6.5}')
        (pair,) = made.read(f"{kind}:{tmp_path}", score_columns={"aesthetic": "beauty"})
        assert pair.scores == {"aesthetic": 6.5}


def test_files_that_are_no_images(tmp_path):
    put(tmp_path, ["a.png"])
    (tmp_path / "empty.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in (b"\xff.png", b"\xfe\n.png"):
        with open(os.fsencode(tmp_path / "x")[:-1] + name, "wb") as file:
            file.write(made.image(3))
    with open(os.fsencode(tmp_path / "x")[:-1] + b"\xfe\n.txt", "wb") as file:
        file.write(b"\xff")
    found = {pair.key: pair for pair in made.read(f"folder:{tmp_path}")}
    assert found["empty.jpg"].error == f"{tmp_path / 'empty.jpg'} is empty"
    assert found["pipe.jpg"].error == f"{tmp_path / 'pipe.jpg'} is no file"
    assert found["\\xff.png"].image == made.image(3)
    assert "\\xfe .txt is not in utf-8" in found["\\xfe\n.png"].error


def test_photographs_are_groups(tmp_path):
    """Plasma's packages, sizes in names and other folders, as Debian's wallpapers have them."""
    shown = {
        "mate/nature/Aqua.jpg": "mate/nature/Aqua",
        "plasma/Altai/contents/images/1080x1920.png": "plasma/Altai",
        "plasma/Altai/contents/images/5120x2880.png": "plasma/Altai",
        "plasma/Altai/contents/images_dark/5120x2880.png": "plasma/Altai",
        "plasma/Altai/contents/screenshot.jpg": "plasma/Altai",
        "plasma/Path/contents/images/2560x1600.jpg": "plasma/Path",
        "xfce/shapes-1920x1080.png": "xfce/shapes",
        "xfce/shapes_3840x2160.png": "xfce/shapes",
    }
    put(tmp_path, shown)
    (tmp_path / "mate/nature/Aqua.txt").write_text("not read")
    (tmp_path / "mate/nature.xml").write_text("<background/>")
    (tmp_path / "default.jpg").symlink_to(tmp_path / "mate/nature/Aqua.jpg")
    pairs = made.read(f"photos:{tmp_path}", part_size=3)
    assert {pair.key: pair.group for pair in pairs} == shown
    assert [pair.image for pair in pairs] == [made.image(i) for i in range(len(shown))]
    assert not any(pair.captions for pair in pairs)

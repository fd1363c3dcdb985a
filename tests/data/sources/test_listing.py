"""Parts cover everything once; a fingerprint notices what changes; kinds and paths are checked."""

import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import features

from ldm_scaling.data import sources
from ldm_scaling.data.preparing import stored
from ldm_scaling.data.sources import folder, listing
from ldm_scaling.errors import UserError
from tests.data.sources import made


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 1000))
def test_pieces_are_few_and_even(count, most):
    pieces = listing.cut(count, most)
    assert [i for a, b in pieces for i in range(a, b)] == list(range(count))
    sizes = [b - a for a, b in pieces]
    assert len(sizes) == -(-count // most)
    assert not sizes or (max(sizes) <= most and max(sizes) - min(sizes) <= 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 50))
def test_groups_are_kept_whole_where_they_fit(groups, most):
    runs = listing.gather(groups, most)
    assert [i for a, b in runs for i in range(a, b)] == list(range(sum(groups)))
    assert all(b - a <= most for a, b in runs)
    ends = [sum(groups[: i + 1]) for i in range(len(groups))]
    for rows, end in zip(groups, ends):
        whole = any(a <= end - rows and end <= b for a, b in runs)
        assert whole or rows > most or rows == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 7))
def test_a_folder_in_parts_of_any_size(tmp_path_factory, count, part_size):
    root = tmp_path_factory.mktemp("x")
    for i in range(count):
        (root / f"{i:03d}.png").write_bytes(b"%d" % i)
    collection = sources.collection(f"folder:{root}", sources.Options(part_size=part_size))
    parts = collection.parts()
    assert [[p.image for p in collection.read(part)] for part in parts] == [
        [b"%d" % i for i in range(part.start, part.stop)] for part in parts
    ]
    assert [i for p in parts for i in range(p.start, p.stop)] == list(range(count))


def test_the_fingerprint_notices_changes(tmp_path):
    (tmp_path / "a.png").write_bytes(made.image(0))
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "notes.md").write_text("not part of it")
    text = f"folder:{tmp_path}"
    seen = [sources.collection(text).fingerprint()]
    (tmp_path / "notes.md").write_text("changed")
    assert sources.collection(text).fingerprint() == seen[0]
    seen.append(sources.collection(text, sources.Options(caption_encoding="cp1252")).fingerprint())
    (tmp_path / "a.txt").write_text("a dog")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    seen.append(sources.collection(text).fingerprint())
    (tmp_path / "b.png").write_bytes(made.image(1))
    seen.append(sources.collection(text).fingerprint())
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    seen.append(sources.collection(text).fingerprint())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("text, words", [
    ("foldr:X", "did you mean folder:PATH"),
    ("X", "webdataset, huggingface"),
    ("folder:", "KIND:PATH"),
    ("X", "data.source=shards:PATH"),
    ("gs://bucket/x", "mount it"),
    ("folder:X/none", "there is no X/none"),
    ("webdataset:X/none", "there is no X/none"),
    ("coco:X/none#val2014", "there is no X/none"),
    ("coco:X#test2015", "val2014, train2014"),
    ("folder:X/a.png", "name the folder"),
    ("photos:X/a.png", "name the folder"),
    ("huggingface:X/a.png", "name the folder"),
    ("webdataset:X/a.png", "is no tar"),
    ("tfds:X/", "tfds:NAME"),
    ("folder:gs://bucket/x", "mount it"),
    ("webdataset:s3://bucket/{0000..0003}.tar", "mount it"),
    ("tfds:coco@gs://bucket/x", "mount it"),
])  # fmt: skip
def test_what_is_no_collection(tmp_path, text, words):
    (tmp_path / "a.png").write_bytes(made.image(0))
    with pytest.raises(UserError) as e:
        sources.collection(text.replace("X", str(tmp_path)))
    assert words.replace("X", str(tmp_path)) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "kind", ["folder", "photos", "webdataset", "huggingface", "parquet", "arrayrecord", "coco"]
)
def test_a_folder_with_nothing_in_it(tmp_path, kind):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match=str(tmp_path)):
        made.read(f"{kind}:{tmp_path}")


@pytest.mark.parametrize("suffix, kind", [
    ("jfif", "JPEG"), ("JPE", "JPEG"), ("avif", "AVIF"), ("jp2", "JPEG2000"),
])  # fmt: skip
def test_pictures_by_other_suffixes(tmp_path, suffix, kind):
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(kind, "jpg")):
        pytest.skip(f"this Pillow reads no {kind}")
    (tmp_path / f"a.{suffix}").write_bytes(made.image(0, kind))
    (pair,) = made.read(f"folder:{tmp_path}")
    assert stored.decode(pair.image).image_HWC.shape == (4, 5, 3)


@pytest.mark.parametrize("kind, counts", [
    ("folder", {".heic": 2, "": 1}), ("photos", {".heic": 2, "": 1, ".txt": 1}),
    ("webdataset", {".heic": 2, "": 1}),
])  # fmt: skip
def test_what_is_left_out_is_counted(tmp_path, kind, counts):
    (tmp_path / "a.png").write_bytes(made.image(0))
    for name in ("a.txt", "b.heic", "c.HEIC", "notes", ".hidden"):
        (tmp_path / name).touch()
    assert sources.collection(f"{kind}:{tmp_path}").left_out() == counts


def test_a_folders_part_travels_with_its_own_files_alone(tmp_path, monkeypatch):
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(made.image(i))
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "metadata.csv").write_text("file_name,text\n4.png,four\n8.png,eight\n")
    collection = sources.collection(f"folder:{tmp_path}", sources.Options(part_size=3))
    parts = collection.parts()
    wanted = [list(collection.read(part)) for part in parts]
    sent = [pickle.dumps(collection.share(part)) for part in parts]
    monkeypatch.setattr(folder.Folder, "_list", None)  # Nobody lists anything.
    assert [list(pickle.loads(s).read(part)) for s, part in zip(sent, parts)] == wanted
    assert b"7.png" not in sent[1]


def test_links_are_followed_once(tmp_path):
    (tmp_path / "x/deep").mkdir(parents=True)
    (tmp_path / "x/deep/a.png").write_bytes(made.image(0))
    (tmp_path / "x/deep/round").symlink_to(tmp_path / "x")
    (tmp_path / "y").symlink_to(tmp_path / "x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / ".hidden.png").write_bytes(made.image(1))
    found = made.plain(made.read(f"folder:{tmp_path}"))
    assert found == {
        "gone.png": f"there is no file {tmp_path / 'gone.png'}",
        "x/deep/a.png": (),
    }

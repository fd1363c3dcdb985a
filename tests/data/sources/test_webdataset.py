"""Tars, files and tables as img2dataset writes them; a broken tar never gives a wrong pair."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scaling.data import sources
from ldm_scaling.errors import UserError
from tests.data.sources import made

FAILED = 3  # of each shard img2dataset could not fetch this one


def meta(shard, i):
    """A row as img2dataset has it, with the columns of LAION's users."""
    failed = i == FAILED
    return {
        "url": f"http://example.org/{shard}/{i}.jpg",
        "caption": f"caption {shard} {i}\nin two lines",
        "AESTHETIC_SCORE": 4 + i / 8, "pwatermark": None if i == 1 else i / 16,
        "key": f"{shard:05d}{i:04d}", "status": "failed_to_download" if failed else "success",
        "error_message": "HTTP Error 404" if failed else None,
        "width": None if failed else 5, "height": None if failed else 4,
    }  # fmt: skip


def table(path, rows, jpg=None):
    """By its schema, with row groups of 100 rows at most."""
    found = pa.Table.from_pylist(rows)
    if jpg is not None:
        found = found.append_column("jpg", pa.array(jpg, pa.binary()))
    pq.write_table(found, path, row_group_size=100)


def img2dataset(root, kind, shards=3, count=7):
    """What its three writers do."""
    for shard in range(shards):
        rows = [meta(shard, i) for i in range(count)]
        jpgs = [None if i == FAILED else made.image(10 * shard + i) for i in range(count)]
        (root / f"{shard:05d}_stats.json").write_text('{"count": 7}')
        table(root / f"{shard:05d}.parquet", rows, jpgs if kind == "parquet" else None)
        if kind == "webdataset":
            with wds.TarWriter(str(root / f"{shard:05d}.tar")) as tar:
                for row, jpg in zip(rows, jpgs):
                    if jpg:
                        tar.write({
                            "__key__": row["key"], "jpg": jpg, "txt": row["caption"],
                            "json": json.dumps(row, indent=4),
                        })  # fmt: skip
        elif kind == "files":
            folder = root / f"{shard:05d}"
            folder.mkdir()
            for row, jpg in zip(rows, jpgs):
                if jpg:
                    (folder / f"{row['key']}.jpg").write_bytes(jpg)
                    (folder / f"{row['key']}.txt").write_text(row["caption"])
                    (folder / f"{row['key']}.json").write_text(json.dumps(row, indent=4))


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_img2dataset(tmp_path, kind):
    """All three forms hold the same pairs; only the table knows of what could not be fetched."""
    img2dataset(tmp_path, kind)
    pairs = made.read(f"webdataset:{tmp_path}", part_size=4)
    good = [pair for pair in pairs if not pair.error]
    assert [pair.key for pair in good] == [
        f"{shard:05d}{i:04d}" for shard in range(3) for i in range(7) if i != FAILED
    ]
    for pair in good:
        shard, i = int(pair.key[:5]), int(pair.key[5:])
        assert pair.image == made.image(10 * shard + i)
        assert pair.captions == (f"caption {shard} {i}\nin two lines",)
        assert pair.score("aesthetic") == 4 + i / 8
        assert pair.score("watermark") == i / 16 or (i == 1 and np.isnan(pair.score("watermark")))
    bad = [pair for pair in pairs if pair.error]
    assert len(bad) == (3 if kind == "parquet" else 0)
    assert all("no image (failed_to_download, HTTP Error 404)" in pair.error for pair in bad)
    collection = sources.collection(f"webdataset:{tmp_path}", sources.Options(part_size=4))
    assert len(collection.parts()) == (3 if kind == "webdataset" else 6)


def test_a_single_tar_and_a_pattern(tmp_path):
    img2dataset(tmp_path, "webdataset")
    whole = made.read(f"webdataset:{tmp_path}")
    assert made.read(f"webdataset:{tmp_path}/00001.tar") == whole[6:12]
    assert made.read(f"webdataset:{tmp_path}/{{00001..00002}}.tar") == whole[6:]
    above = f"webdataset:{tmp_path.parent}/{{{tmp_path.name},none}}/00000.tar"
    with pytest.raises(UserError, match=r"none/00000.tar is not there \(1 of 2"):
        made.read(above)
    with pytest.raises(UserError, match=r"00003.tar is not there \(1 of 4"):
        made.read(f"webdataset:{tmp_path}/{{00000..00003}}.tar")


def write(path, samples, mode="w"):
    """A tar of (name, bytes) by tarfile; `None` for bytes is a folder."""
    with tarfile.open(path, mode) as tar:
        for name, data in samples:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_other_peoples_tars(tmp_path, suffix):
    """Keys with folders, any case and script, without captions or images, with several images."""
    mode = {"tar": "w", "tgz": "w:gz"}.get(suffix, f"w:{suffix[4:]}")
    for name in ("a", "bc"):
        write(tmp_path / f"{name}.{suffix}", [
            ("__notes__", b"none"), ("./dir", None), ("./dir/1.JPG", made.image(1)),
            ("./dir/1.caption", b"one"), ("猫 (2).png", made.image(2)), ("README", b"text"),
            ("3.txt", b"no image"), ("4.left.png", made.image(4)), ("4.right.png", made.image(5)),
            ("5.png", b""), ("6.json", b"{"), ("6.png", made.image(6)),
            ("7.txt", b"\xe9t\xe9"), ("7.webp", made.image(7)), ("8.seg.png", made.image(9)),
            ("8.jpg", made.image(8)), ("8.txt", b""), ("8.json", b'{"text": ["x", "y"]}'),
        ], mode)  # fmt: skip
    found = {pair.key: pair for pair in made.read(f"webdataset:{tmp_path}")}
    assert [key for key in found if key.startswith("a/")] == [
        "a/dir/1", "a/猫 (2)", "a/3", "a/4", "a/5", "a/6", "a/7", "a/8"
    ]  # fmt: skip
    assert found["bc/dir/1"].captions == ("one",) and found["bc/dir/1"].image == made.image(1)
    assert found["a/猫 (2)"].captions == () and found["a/猫 (2)"].image == made.image(2)
    path = tmp_path / f"a.{suffix}"
    assert found["a/3"].error == f"3 in {path} holds no image"
    assert found["a/4"].error.startswith(f"4 in {path} holds several images, left.png, right.png: ")
    assert found["a/5"].error == f"the image of 5 in {path} is empty"
    assert f"the JSON of 6 in {path} is no JSON" in found["a/6"].error
    assert f"7 in {path} is not in utf-8" in found["a/7"].error
    assert found["a/8"].captions == ("x", "y") and found["a/8"].image == made.image(8)


def read(path):
    """What is in a tar, by the name of its sample."""
    return {
        key.partition("/")[2]: found for key, found in made.plain(made.read(f"webdataset:{path}"))
        .items()
    }  # fmt: skip


def test_names_with_dots(tmp_path):
    """webdataset's name of a sample ends at the first dot, up to which dates are the same."""
    days = [f"IMG_2023.01.{day:02d}" for day in range(1, 4)]
    files = [
        (f"{day}.{end}", data) for i, day in enumerate(days)
        for end, data in (("jpg", made.image(i)), ("txt", day.encode()))
    ]  # fmt: skip
    path = tmp_path / "x.tar"
    write(path, [*files, ("img.v1.jpg", made.image(5)), ("img.v1.txt", b"a version")])
    assert read(path) == {**{day: (day,) for day in days}, "img": ("a version",)}
    # Some without a caption; notes of others.
    write(path, [f for f in files if f[0] != f"{days[1]}.txt"])
    assert read(path) == {days[0]: (days[0],), days[1]: (), days[2]: (days[2],)}
    notes = b'{"text": "x"}'
    write(path, [("a.v1.jpg", made.image(5)), ("a.txt", b"of all"), ("a.v1.json", notes)])
    assert read(path) == {"a": ("of all",)}
    # A text of all of them tells no two apart.
    write(path, [*files, ("IMG_2023.txt", b"of all")])
    (error,) = read(path).values()
    assert str(path) in error and "ends at its first dot" in error
    write(path, [(f"a.{i}.png", made.image(i)) for i in range(40)])
    (error,) = read(path).values()
    assert "0.png, 1.png, 2.png, 3.png, ...: " in error


def test_keys_that_differ_by_their_tar_only(tmp_path):
    """Tars 1 and 10 both may hold a key that begins with 1."""
    for name in ("1", "10"):
        write(tmp_path / f"{name}.tar", [("10.png", made.image(1)), ("100.png", made.image(2))])
    assert [p.key for p in made.read(f"webdataset:{tmp_path}")] == [
        "1/10", "1/100", "10/10", "10/100"
    ]  # fmt: skip
    write(tmp_path / "1.tar.gz", [("10.png", made.image(3))], "w:gz")
    keys = [p.key for p in made.read(f"webdataset:{tmp_path}")]
    assert keys == ["1.tar/10", "1.tar/100", "1.tar.gz/10", "10/10", "10/100"]


def test_scores_of_a_table_beside(tmp_path):
    write(tmp_path / "00000.tar", [(f"{i}.png", made.image(i)) for i in range(3)])
    table(tmp_path / "00000.parquet", [{"key": "2", "aesthetic": 7.5, "text": "two", "alt": "z"}])
    found = {pair.key: pair for pair in made.read(f"webdataset:{tmp_path}")}
    assert found["00000/2"].scores == {"aesthetic": 7.5} and found["00000/2"].captions == ("two",)
    assert found["00000/1"].scores == {} and found["00000/1"].captions == ()
    assert made.read(f"webdataset:{tmp_path}", caption_columns=("alt",))[2].captions == ("z",)
    table(tmp_path / "00000.parquet", [{"name": "2", "aesthetic": 7.5}])
    with pytest.raises(UserError, match="00000.parquet.*'key'.*name .string., aesthetic"):
        made.read(f"webdataset:{tmp_path}")


def test_a_table_beside_that_names_no_sample(tmp_path):
    """As where pandas took keys for numbers: its captions would be lost without a word."""
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000/000000000.png").write_bytes(made.image(0))
    table(tmp_path / "00000.parquet", [{"key": 0, "caption": "a"}])
    why = "00000.parquet has keys such as '0', and none of 1 samples .* '000000000'"
    with pytest.raises(UserError, match=why):
        made.read(f"webdataset:{tmp_path}")
    write(tmp_path / "00000.tar", [("000000000.png", made.image(0))])
    with pytest.raises(UserError, match=why):
        made.read(f"webdataset:{tmp_path}")


def test_a_table_beside_of_other_samples(tmp_path):
    """It is let be where samples have all that it could tell of them."""
    (tmp_path / "00000").mkdir()
    for name, data in (("0.png", made.image(0)), ("0.txt", b"own")):
        (tmp_path / "00000" / name).write_bytes(data)
    row = {"key": "z", "caption": "a"}
    table(tmp_path / "00000.parquet", [row])
    assert [p.captions for p in made.read(f"webdataset:{tmp_path}")] == [("own",)]
    path, files = tmp_path / "00000.tar", [("0.png", made.image(0)), ("0.txt", b"own")]
    write(path, files)
    assert read(path) == {"0": ("own",)}
    table(tmp_path / "00000.parquet", [{**row, "aesthetic": 7.5}])
    with pytest.raises(UserError, match="keys such as 'z'"):
        read(path)
    write(path, [*files, ("0.json", b'{"aesthetic": 5}')])
    assert read(path) == {"0": ("own",)}


def test_a_file_that_is_listed_twice(tmp_path):
    """GNU tar writes it again as a hard link to itself."""
    path = tmp_path / "x.tar"
    write(path, [(f"{i}.{end}", made.image(i) if end == "png" else b"a") for i in range(2)
                 for end in ("png", "txt")])  # fmt: skip
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("./0.png")
        info.type, info.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(info)
    assert read(path) == {"0": ("a",), "1": ("a",)}


def test_links_are_called_so(tmp_path):
    path = tmp_path / "x.tar"
    write(path, [("a.png", made.image(1)), ("c.png", made.image(2)), ("c.txt", b"c")])
    with tarfile.open(path, "a") as tar:
        for name, kind in (("b.png", tarfile.LNKTYPE), ("d.cls", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("d.png"), io.BytesIO())
    found = made.plain(made.read(f"webdataset:{path}"))
    assert found["x/a"] == () and found["x/c"] == ("c",)
    assert found["x/b"].startswith(f"b.png in {path} is a link to a.png: ")
    assert "is empty" in found["x/d"]


@pytest.mark.parametrize("names, why", [
    (["1.png", "2.png", "1.txt", "2.txt"], "do not lie together"),
    (["1.png", "1.png"], "duplicate file name"),
])  # fmt: skip
def test_files_of_a_sample_that_are_apart(tmp_path, names, why):
    path = tmp_path / "x.tar"
    write(path, [(name, b"x") for name in names])
    with pytest.raises(UserError) as e:
        made.read(f"webdataset:{path}")
    assert str(path) in str(e.value) and why in str(e.value)


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\0" * 100, b"x" * 2000, b"\x1f\x8b"])
def test_what_is_no_tar(tmp_path, data):
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(UserError, match="00000.tar"):
        made.read(f"webdataset:{tmp_path}")


def test_an_empty_tar_holds_no_pairs(tmp_path):
    write(tmp_path / "00000.tar", [])
    assert made.read(f"webdataset:{tmp_path}") == []


def before_the_cut(path, whole):
    """Reads a damaged tar: the pairs that were given are the first of the whole one's."""
    collection = sources.collection(f"webdataset:{path}")
    given = []
    try:
        for part in collection.parts():
            given += collection.read(part)
        error = None
    except UserError as e:
        error = str(e)
        assert str(path) in error and "\n" not in error
    assert given == whole[: len(given)]
    return given, error


@pytest.fixture(scope="module", params=["tar", "tar.gz", "tar.bz2", "tar.xz"])
def tar(request, tmp_path_factory):
    """A tar, its bytes and its pairs; images end in zero bytes, as the end of a tar does."""
    root = tmp_path_factory.mktemp("tar")
    path = root / f"00000.{request.param}"
    samples = [
        (f"00000{i:04d}.{suffix}", data)
        for i in range(6)
        for suffix, data in (
            ("jpg", made.image(i) + b"\0" * 700 * i), ("txt", b"text"), ("json", b'{"url": "u"}'),
        )
    ]  # fmt: skip
    write(path, samples, f"w:{request.param[4:]}")
    return path, path.read_bytes(), made.read(f"webdataset:{path}")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_tar_that_is_cut(tar, data, tmp_path_factory):
    """Wherever it is cut: an error that names it, after whole pairs only, or all of them."""
    path, content, whole = tar
    last = len(content) - 1
    at = data.draw(st.one_of(
        st.integers(0, last), st.integers(0, last // 512).map(lambda n: 512 * n)
    ))  # fmt: skip
    cut = tmp_path_factory.mktemp("cut") / path.name
    cut.write_bytes(content[:at])
    given, error = before_the_cut(cut, whole)
    assert error or given == whole


def test_a_tar_that_is_cut_between_two_files(tmp_path):
    """Where Python's own reader sees no error, and a pair would lose its caption."""
    path = tmp_path / "00000.tar"
    write(path, [(f"{i}.{s}", made.image(i)) for i in range(2) for s in ("jpg", "txt")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset for member in tar][1:]
    for end in ends:
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="00000.tar.*cut short"):
            made.read(f"webdataset:{path}")


def test_a_tar_that_seems_to_end_before_its_end(tmp_path):
    """Zeros in the place of a header, two tars in one, or a file of which half has arrived."""
    path = tmp_path / "00000.tar"
    write(path, [(f"{i}.{s}", made.image(i)) for i in range(9) for s in ("jpg", "txt")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmembers()[8].offset
    hole = content[:at] + bytes(512) + content[at + 512 :]
    for data in (hole, content + content, content[:at] + bytes(20_000_000)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="00000.tar.*damaged at byte "):
            made.read(f"webdataset:{path}")
    with pytest.raises(UserError, match=f"damaged at byte {at}: 20000000 zeros"):
        made.read(f"webdataset:{path}")
    for record in (1 << 20, 16 << 20):  # as tar -b fills the last one up
        path.write_bytes(content + bytes(-len(content) % record))
        assert len(made.read(f"webdataset:{path}")) == 9


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_header_that_is_damaged(tmp_path_factory, data):
    """Python's own reader takes it for the end of the tar; some of its bytes mean nothing."""
    path = tmp_path_factory.mktemp("damaged") / "00000.tar"
    write(path, [(f"{i}.{s}", made.image(i)) for i in range(3) for s in ("jpg", "txt")])
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    whole = made.read(f"webdataset:{path}")
    content = bytearray(path.read_bytes())
    at = data.draw(st.sampled_from(offsets)) + data.draw(st.integers(0, 299))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    given, error = before_the_cut(path, whole)
    assert error or given == whole


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_compressed_tar_that_is_damaged(tar, data, tmp_path_factory):
    """Compressed files have checksums: a wrong pair is at least followed by an error."""
    path, content, whole = tar
    if path.suffix == ".tar":
        return
    content = bytearray(content)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = tmp_path_factory.mktemp("damaged") / path.name
    damaged.write_bytes(content)
    try:
        given = list(sources.collection(f"webdataset:{damaged}").read(
            sources.collection(f"webdataset:{damaged}").parts()[0]))  # fmt: skip
    except UserError as e:
        assert str(damaged) in str(e) and "\n" not in str(e)
    else:
        assert given == whole

"""Preparation: what is stored looks as the original, all is accounted for, and kills do no harm."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ldm_scaling import errors
from ldm_scaling.data import image_folder, shards
from ldm_scaling.data.collection import Pair
from ldm_scaling.data.preparing import prepare, stored
from ldm_scaling.data.preparing.duplicates import Duplicates
from ldm_scaling.data.preparing.filters import Filters
from ldm_scaling.data.preparing.prepare import Options
from tests.data.preparing.folder_of_pairs import FolderOfPairs, encoded, plain_pairs, put, scene

pytest.importorskip("pyarrow", reason="parquet: pip install -e '.[data]'")
pytest.importorskip("imagehash", reason="perceptual hashes: pip install -e '.[data]'")

ALL = Options(duplicates=Duplicates(exact=False, perceptual=None), validation_share=0, workers=1)
HERE = Path(__file__).parent
# What a process of its own runs: the collection's module must be found by its worker processes.
SCRIPT = """
import json, sys
from folder_of_pairs import FolderOfPairs
from ldm_scaling.data.preparing import prepare
if __name__ == "__main__":
    options = prepare.Options(**json.loads(sys.argv[3]))
    prepare.run(FolderOfPairs(sys.argv[1]), sys.argv[2], options, *sys.argv[4:5])
"""


def start(tmp_path: Path, root: str, destination: Path, **options) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(HERE.parents[2]), str(HERE)])
    return subprocess.Popen(
        [sys.executable, str(script), root, str(destination), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    """What must be the same in every run: all but the report's seconds."""
    return {
        p.name: p.read_bytes() for p in folder.iterdir()
        if p.is_file() and not p.name.startswith("report")
    }  # fmt: skip


def apng() -> bytes:
    frames = [Image.fromarray(scene(seed)) for seed in (0, 1)]
    return encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])


def deep_png() -> bytes:
    """A PNG of 16 bits a channel in RGB, which Pillow does not write."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rng = np.random.default_rng(0)
    rows = b"".join(b"\0" + rng.bytes(12 * 3 * 2) for _ in range(8))
    head = struct.pack(">IIBBBBB", 12, 8, 16, 2, 0, 0, 0)
    whole = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(scene(orientation), "JPEG", exif=exif)


def odd_images() -> dict[str, bytes]:
    """Images that are readable, most of them not plain."""
    rgb = Image.fromarray(scene(3))
    alpha = np.dstack([scene(4), np.tile(np.arange(48, dtype=np.uint8) * 5, (40, 1))])
    palette = Image.fromarray(alpha).quantize(16)
    frames = [Image.fromarray(scene(seed)) for seed in (5, 6)]
    grey16 = Image.fromarray(np.arange(40 * 48, dtype=np.uint16).reshape(40, 48) * 34)
    return {
        "jpeg": encoded(rgb, "JPEG"), "progressive": encoded(rgb, "JPEG", progressive=True),
        "grey jpeg": encoded(rgb.convert("L"), "JPEG"), "png": encoded(rgb),
        "webp": encoded(rgb, "WEBP"), "lossless webp": encoded(rgb, "WEBP", lossless=True),
        "grey png": encoded(rgb.convert("L")), "16-bit png": encoded(grey16),
        "16-bit rgb png": deep_png(), "1-bit png": encoded(rgb.convert("1")),
        "cmyk jpeg": encoded(rgb.convert("CMYK"), "JPEG"),
        "palette with transparency": encoded(palette), "rgba png": encoded(Image.fromarray(alpha)),
        "rgba webp": encoded(Image.fromarray(alpha), "WEBP"),
        "grey and alpha": encoded(Image.fromarray(alpha).convert("LA")),
        "colour key": encoded(rgb, "PNG", transparency=tuple(scene(3)[0, 0].tolist())),
        "gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "apng": apng(), "bmp": encoded(rgb, "BMP"), "tiff": encoded(rgb, "TIFF"),
        "mpo": encoded(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "one pixel": encoded(scene(7, 1, 1)), "wide": encoded(scene(8, 3, 20_000), "JPEG"),
        **{f"turned {i}": turned(i) for i in range(9)},
    }  # fmt: skip


def broken_images() -> dict[str, bytes]:
    jpeg, png = encoded(scene(0, 200, 200), "JPEG"), encoded(scene(0, 200, 200))
    cut = {
        f"cut {kind} {share}": data[: int(len(data) * share)]
        for kind, data in (("jpeg", jpeg), ("png", png)) for share in (0.01, 0.3, 0.9)
    }  # fmt: skip
    spoilt = png[: len(png) // 2] + bytes(64) + png[len(png) // 2 + 64 :]
    return {
        **cut, "empty": b"", "zeros": bytes(5000), "text": b"no image", "spoilt png": spoilt,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "html": b"<html>404</html>",
        "float tiff": encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    }  # fmt: skip


PLAIN = {
    "jpeg", "progressive", "grey jpeg", "png", "webp", "lossless webp", "grey png", "mpo",
    "turned 0", "turned 1", "one pixel", "wide",
}  # fmt: skip
# Of what was kept with loss a PNG would be several times as large.
AS_JPEG = {"cmyk jpeg", "animated webp", *(f"turned {i}" for i in range(2, 9))}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    everything = odd_images() | broken_images()
    pairs = [Pair(name, data, (f"a {name}",)) for name, data in everything.items()]
    prepared = prepare.run(put(root / "from", [pairs]), root / "to", ALL)
    return prepared, json.loads((root / "to" / "report.json").read_text())


def test_what_is_stored_looks_as_the_original(fuzzed):
    prepared, _ = fuzzed
    originals = odd_images()
    records = prepared.records("train").read(range(prepared.count("train")))
    assert {record.key for record in records} == set(originals)
    for record in records:
        with Image.open(io.BytesIO(originals[record.key])) as image:
            wanted_HWC = image_folder.to_rgb(image)
        with Image.open(io.BytesIO(record.image)) as image:
            # as any decoder does it: no turning, no transparency, no choice of a frame
            found_HWC = np.asarray(image.convert("RGB"))
            assert image.format in ("JPEG", "MPO", "PNG", "WEBP") and image.mode in ("RGB", "L")
            assert image.format == "JPEG" or record.key not in AS_JPEG
        if record.key in AS_JPEG:
            assert found_HWC.shape == wanted_HWC.shape
            error = np.abs(found_HWC.astype(int) - wanted_HWC).mean()
            assert error < 2, record.key
        else:
            np.testing.assert_array_equal(found_HWC, wanted_HWC, err_msg=record.key)
        assert (record.height, record.width) == wanted_HWC.shape[:2]
        assert (record.image == originals[record.key]) == (record.key in PLAIN), record.key


def test_webp_without_loss_stays_so():
    odd = odd_images()
    assert stored.decode(odd["webp"]).lossy and not stored.decode(odd["lossless webp"]).lossy


def test_avif_is_stored_without_loss():
    """Its file does not say whether it was kept so."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    decoded = stored.decode(encoded(scene(3), "AVIF", quality=100, subsampling="4:4:4"))
    assert not decoded.plain and not decoded.lossy


def test_what_cannot_be_read_is_named_with_why(fuzzed):
    _, report = fuzzed
    entry = report["dropped"]["unreadable"]
    assert entry["count"] == len(broken_images())
    for example in entry["examples"]:
        key, why = example.split(": ", 1)
        assert key in broken_images() and len(why) > 5 and "\n" not in why


@pytest.mark.parametrize("seed", range(3))
def test_spoilt_files_never_crash_without_a_name(seed):
    rng = np.random.default_rng(seed)
    for name, data in odd_images().items():
        for _ in range(4):
            spoilt = bytearray(data)
            for at in rng.integers(len(spoilt), size=3):
                spoilt[at] = rng.integers(256)
            try:
                assert stored.decode(bytes(spoilt)).image_HWC.dtype == np.uint8, name
            except stored.BrokenImage as e:
                assert str(e) and "\n" not in str(e)


def test_smaller_copies_are_stored_where_they_are_asked_for(tmp_path):
    pairs = [
        Pair("photo", encoded(scene(0, 120, 160), "JPEG", quality=98), ("x",)),
        Pair("drawing", encoded(scene(1, 160, 120)), ("x",)),
        Pair("small", encoded(scene(2, 64, 200), "JPEG"), ("x",)),
    ]
    options = Options(store_side=64, validation_share=0, workers=1)
    prepared = prepare.run(put(tmp_path / "from", [pairs]), tmp_path / "to", options)
    found = {r.key: r for r in prepared.records("train").read(range(3))}
    assert {key: (r.width, r.height) for key, r in found.items()} == {
        "photo": (85, 64), "drawing": (64, 85), "small": (200, 64)
    }  # fmt: skip
    assert found["small"].image == pairs[2].image
    for key, kind, worst in (("photo", "JPEG", 3), ("drawing", "PNG", 0)):
        record = found[key]
        original = Image.open(io.BytesIO({p.key: p.image for p in pairs}[key]))
        wanted = original.resize((record.width, record.height), Image.Resampling.LANCZOS)
        image = Image.open(io.BytesIO(record.image))
        assert image.format == kind
        error = np.abs(np.asarray(image, int) - np.asarray(wanted, int)).mean()
        assert error <= worst


def test_tiles_put_together_are_the_photograph(tmp_path):
    pairs = [Pair(f"p{i}", encoded(scene(i, 70, 100))) for i in range(6)]
    pairs.append(Pair("small", encoded(scene(9, 31, 90))))
    options = Options(
        tile=32, filters=Filters(captions=False), validation_share=0.4, workers=1,
        duplicates=Duplicates(perceptual=None),
    )  # fmt: skip
    prepared = prepare.run(put(tmp_path / "from", [pairs]), tmp_path / "to", options)
    seen: dict[str, set[str]] = {}
    for split in shards.SPLITS:
        for record in prepared.records(split).read(range(prepared.count(split))):
            name, _, at = record.key.partition("#")
            y, x = map(int, at.split("_"))
            found_HWC = np.asarray(Image.open(io.BytesIO(record.image)))
            wanted_HWC = scene(int(name[1:]), 70, 100)[y : y + 32, x : x + 32]
            np.testing.assert_array_equal(found_HWC, wanted_HWC)
            assert record.group == name
            seen.setdefault(name, set()).add(split)
    assert prepared.count("train") + prepared.count("validation") == 6 * 2 * 3
    assert all(len(splits) == 1 for splits in seen.values())
    report = json.loads((tmp_path / "to" / "report.json").read_text())
    assert report["dropped"]["tile"]["examples"] == ["small"]


def crowd() -> list[list[Pair]]:
    """Sound pairs in several parts, with duplicates and what filters drop among them."""
    parts = [plain_pairs(12, 12 * i) for i in range(4)]
    parts[1].append(Pair("the copy", encoded(scene(2, 42, 48), compress_level=1), ("the same",)))
    parts[2].append(Pair("likeness", encoded(scene(5, 34, 36)), ("nearly the same",)))
    parts[3].append(Pair("the copy again", encoded(scene(2, 42, 48)), ("the same", "one more")))
    parts[3].append(Pair("pair0001", encoded(scene(77)), ("the key of another",)))
    parts[3].append(Pair("silent", encoded(scene(78))))
    parts[3].append(Pair("late", b"", (), error="its file is missing"))
    return parts


def test_every_pair_is_kept_or_dropped_for_a_reason(tmp_path):
    options = Options(validation_share=0.3, limit=45, workers=1)
    prepared = prepare.run(put(tmp_path / "from", crowd()), tmp_path / "to", options)
    report = json.loads((tmp_path / "to" / "report.json").read_text())
    counts = {name: entry["count"] for name, entry in report["dropped"].items()}
    assert counts == {
        "unreadable": 1, "no caption": 1, "key": 1, "duplicate": 2, "near-duplicate": 1, "limit": 3
    }  # fmt: skip
    assert report["dropped"]["duplicate"]["examples"] == ["the copy", "the copy again"]
    assert report["dropped"]["near-duplicate"]["examples"] == ["likeness"]
    assert report["read"] == sum(counts.values()) + 45
    assert prepared.count("train") + prepared.count("validation") == 45
    assert report["kept"] == {s: prepared.count(s) for s in shards.SPLITS}
    originals = {pair.key: pair for part in crowd()[:3] for pair in part}
    originals |= {pair.key: pair for pair in plain_pairs(48)}
    for split in shards.SPLITS:
        records = prepared.records(split).read(range(prepared.count(split)))
        for record, size in zip(records, prepared.sizes(split).tolist()):
            others = ("the same", "one more") if record.key == "pair0002" else ()
            assert record.captions == (*originals[record.key].captions, *others)
            assert record.image == originals[record.key].image
            assert [record.width, record.height] == size
            score = originals[record.key].score("aesthetic")
            assert record.aesthetic == score or np.isnan(score) and np.isnan(record.aesthetic)
    text = (tmp_path / "to" / "report.md").read_text()
    assert "| train |" in text and "likeness" in text
    for sheet in ("sample.png", "duplicates.png"):
        assert Image.open(tmp_path / "to" / sheet).width > 200
    assert not list((tmp_path / "to").glob(".*"))


@pytest.mark.parametrize("tile, count", [(None, 33), (32, 1)])
def test_a_row_for_each_caption_is_one_picture(tmp_path, tile, count):
    """Of a picture that says "not found" some captions are kept; of a tile of sky its own."""
    pairs = [Pair(f"k{i:02}", encoded(scene(1, 40, 48)), (f"caption {i}",)) for i in range(40)]
    options = Options(validation_share=0, tile=tile, workers=1)
    prepared = prepare.run(put(tmp_path / "from", [pairs]), tmp_path / "to", options)
    (record,) = prepared.records("train").read([0])
    assert prepared.count("train") == 1
    assert record.captions == tuple(f"caption {i}" for i in range(count))
    report = json.loads((tmp_path / "to" / "report.json").read_text())
    assert report["percentiles"]["captions of an image"] == [count] * 7


def test_groups_lie_in_one_split_and_the_share_is_about_met(tmp_path):
    pairs = [
        Pair(f"k{i}", encoded(scene(i, 6, 6)), ("x",), group=f"g{i // 3}") for i in range(600)
    ]  # fmt: skip
    options = Options(
        validation_share=0.25, workers=1, duplicates=Duplicates(perceptual=None)
    )  # fmt: skip
    prepared = prepare.run(put(tmp_path / "from", [pairs]), tmp_path / "to", options)
    groups = {
        split: {r.group for r in prepared.records(split).read(range(prepared.count(split)))}
        for split in shards.SPLITS
    }
    assert not groups["train"] & groups["validation"]
    assert 30 <= len(groups["validation"]) <= 70  # 50 of 200, six deviations of 6
    other = Options(**{**vars(options), "salt": "other"})
    again = prepare.run(FolderOfPairs(str(tmp_path / "from")), tmp_path / "other", other)
    assert again.hash != prepared.hash


def test_workers_and_parts_in_any_number_give_the_same_bytes(tmp_path):
    collection = put(tmp_path / "from", crowd())
    prepare.run(collection, tmp_path / "one", Options(workers=1))
    process = start(tmp_path, collection.root, tmp_path / "two", workers=2)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output.decode()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    flat = [pair for part in crowd() for pair in part]
    threads = prepare.run(put(tmp_path / "flat", [flat]), tmp_path / "three", Options(workers=3))
    one = shards.open(tmp_path / "one")
    for split in shards.SPLITS:
        keys = [
            {r.key for r in found.records(split).read(range(found.count(split)))}
            for found in (one, threads)
        ]
        assert keys[0] == keys[1]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    collection = put(tmp_path / "from", crowd())
    prepare.run(collection, tmp_path / "whole", Options(workers=1))
    rng, kills, destination = np.random.default_rng(0), 0, tmp_path / "killed"
    for attempt in range(8):
        process = start(tmp_path, collection.root, destination, workers=1)
        # as soon as so many files are there, or a little later
        while process.poll() is None and len(list(destination.rglob("*"))) <= 2 * attempt:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
        for path in destination.glob("pairs-*.array_record*"):  # whole or not there
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    prepare.run(collection, destination, Options(workers=1))
    assert kills
    assert shards.open(destination).hash == shards.open(tmp_path / "whole").hash
    assert files_of(destination) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("step", ["scan", "decide", "write", "report", "finish"])
def test_stopped_before_each_step_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, step):
    from ldm_scaling.data.preparing import preparation
    from ldm_scaling.data.preparing import report as prepare_report

    collection = put(tmp_path / "from", crowd())
    prepare.run(collection, tmp_path / "whole", Options(workers=1))
    calls = []

    def stop(*args, **kwargs):
        calls.append(args)
        if step not in ("scan", "write") or len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    where = {
        "scan": (preparation.facts_lib, "scan"), "decide": (prepare, "decide"),
        "write": (preparation.shards, "write_shard"), "report": (prepare_report, "write"),
        "finish": (preparation.shards, "finish"),
    }[step]  # fmt: skip
    original = getattr(*where)
    with monkeypatch.context() as patch:
        patch.setattr(*where, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.run(collection, tmp_path / "stopped", Options(workers=1))
    with pytest.raises(errors.UserError, match="no prepared data set"):
        shards.open(tmp_path / "stopped")
    prepare.run(collection, tmp_path / "stopped", Options(workers=1))
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_worker_processes_end_with_the_process_that_started_them(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(150, 150 * i) for i in range(6)])
    process = start(tmp_path, collection.root, tmp_path / "to", workers=2)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("to/.work/facts*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # the parent alone
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # the workers hold the pipe until they end
        os.set_blocking(process.stdout.fileno(), False)
        if process.stdout.read() == b"":
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("the workers go on without their parent")


def test_a_finished_preparation_is_found_without_reading_a_pair(tmp_path, monkeypatch):
    collection = put(tmp_path / "from", [plain_pairs(5)])
    first = prepare.run(collection, tmp_path / "to", ALL)
    monkeypatch.setattr(FolderOfPairs, "read", None)
    assert prepare.run(collection, tmp_path / "to", ALL).hash == first.hash


def test_other_options_files_and_sources_are_refused(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(5)])
    prepare.run(collection, tmp_path / "to", ALL)
    with pytest.raises(errors.UserError, match='name "pairs", not "other"'):
        prepare.run(collection, tmp_path / "to", Options(**{**vars(ALL), "name": "other"}))
    other = put(tmp_path / "elsewhere", [plain_pairs(5)])
    with pytest.raises(errors.UserError, match=f"is of test:{tmp_path}/from"):
        prepare.run(other, tmp_path / "to", ALL)
    (tmp_path / "holds").mkdir()
    (tmp_path / "holds" / "thesis.txt").touch()
    with pytest.raises(errors.UserError, match=r"holds other files \(thesis.txt\)"):
        prepare.run(collection, tmp_path / "holds", ALL)
    (Path(collection.root) / "part0" / "00000.bin").write_bytes(encoded(scene(50)))
    with pytest.raises(errors.UserError, match="were others"):
        prepare.run(collection, tmp_path / "to", ALL)


def test_files_that_change_while_they_are_prepared_are_noticed(tmp_path, monkeypatch):
    collection = put(tmp_path / "from", [plain_pairs(5)])
    image = Path(collection.root) / "part0" / "00003.bin"

    def change(job) -> None:
        decide(job)
        image.write_bytes(encoded(scene(50)))

    decide = prepare.decide
    monkeypatch.setattr(prepare, "decide", change)
    with pytest.raises(errors.UserError, match="changed while they were prepared"):
        prepare.run(collection, tmp_path / "to", ALL)
    monkeypatch.undo()
    with pytest.raises(errors.UserError, match="were others"):
        prepare.run(collection, tmp_path / "to", ALL)


def test_a_broken_part_stops_it_or_is_left_out(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(5), plain_pairs(3, 5)])
    broken = Path(collection.root) / "part1" / "00002.json"
    broken.write_text('{"broken": "the tar ends early"}')
    with pytest.raises(errors.UserError, match="part1 is broken: the tar ends early"):
        prepare.run(collection, tmp_path / "to", ALL)
    options = Options(**{**vars(ALL), "skip_broken": True})
    prepared = prepare.run(collection, tmp_path / "without", options)
    assert prepared.count("train") == 5
    assert "the tar ends early" in (tmp_path / "without" / "report.md").read_text()


def test_with_nothing_left_it_says_why(tmp_path):
    collection = put(tmp_path / "from", [plain_pairs(5)])
    options = Options(filters=Filters(min_side=1000), workers=1)
    with pytest.raises(errors.UserError, match=r"none of the 5 pairs .* \(5 small\)"):
        prepare.run(collection, tmp_path / "to", options)
    bare = put(tmp_path / "bare", [[Pair("a", encoded(scene(0)))]])
    wanted = r"\(1 no caption\): keep them without by data.prepare.captions=False"
    with pytest.raises(errors.UserError, match=wanted):
        prepare.run(bare, tmp_path / "of_bare", Options(workers=1))
    scored = Options(filters=Filters(min_aesthetic=5.0, captions=False), workers=1)
    with pytest.raises(errors.UserError, match=r"\(1 no aesthetic score\): .*aesthetic_column"):
        prepare.run(bare, tmp_path / "scored", scored)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match="there is nothing in test:"):
        prepare.run(FolderOfPairs(str(tmp_path / "empty")), tmp_path / "nothing", ALL)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    import resource

    noise = np.random.default_rng(0).integers(0, 256, (12, 120, 120, 3), dtype=np.uint8)
    collection = put(
        tmp_path / "from", [[Pair(str(i), encoded(x), ("x",)) for i, x in enumerate(noise)]]
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # writes beyond fail, as on a disk
    try:
        with pytest.raises(errors.UserError, match="cannot write") as caught:
            prepare.run(collection, tmp_path / "to", ALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "to").glob("pairs-*"))
    assert prepare.run(collection, tmp_path / "to", ALL).count("train") == 12


def test_a_full_disk_while_a_shard_is_written(tmp_path, monkeypatch):
    from ldm_scaling.data import array_records

    class Full(array_records.ArrayRecordWriter):
        def write(self, data: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device\nmore")

    collection = put(tmp_path / "from", [plain_pairs(5)])
    with monkeypatch.context() as patch:
        patch.setattr(array_records, "ArrayRecordWriter", Full)
        with pytest.raises(errors.UserError, match="cannot write .*No space left") as caught:
            prepare.run(collection, tmp_path / "to", ALL)
    assert "\n" not in str(caught.value)
    assert {p.name for p in (tmp_path / "to").iterdir()} == {".work", ".lock"}
    assert prepare.run(collection, tmp_path / "to", ALL).count("train") == 5


def test_texts_that_are_no_unicode_are_named(tmp_path):
    pairs = [*plain_pairs(3), Pair("half", encoded(scene(9)), ("a \ud83d b",)),
             Pair("odd\udcff", encoded(scene(10)), ("x",)), Pair("", encoded(scene(11)), ("x",))]
    prepared = prepare.run(put(tmp_path / "from", [pairs]), tmp_path / "to", ALL)
    assert prepared.count("train") == 3
    report = json.loads((tmp_path / "to" / "report.json").read_text())
    assert report["dropped"]["unreadable"]["examples"] == [
        "half: its caption 'a ? b' is no valid Unicode",
        "odd?: its key 'odd?' is no valid Unicode", ": it has no key",
    ]  # fmt: skip


def test_captions_outside_the_bounds_are_removed(tmp_path):
    pair = Pair("p", encoded(scene(0)), ("no", "good caption", "far too long a caption"))
    options = Options(filters=Filters(min_caption=3, max_caption=15), validation_share=0)
    prepared = prepare.run(put(tmp_path / "from", [[pair]]), tmp_path / "to", options)
    assert prepared.records("train").read([0])[0].captions == ("good caption",)
    assert prepared.captions("train").tolist() == [1]


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"name": "My set"}, "'My set'"), ({"validation_share": 1.0}, "1.0 is outside"),
        ({"limit": 0}, "limit is 0"), ({"tile": 32, "store_side": 64}, "both set"),
        ({"workers": -1}, "workers is -1"),
    ],
)  # fmt: skip
def test_senseless_options_are_refused(wrong, match):
    with pytest.raises(errors.UserError, match=match):
        Options(**wrong)


def test_a_destination_in_a_bucket_is_refused(tmp_path):
    with pytest.raises(errors.UserError, match="mount it"):
        prepare.run(put(tmp_path / "from", [plain_pairs(1)]), "gs://bucket/set", ALL)

"""Any image becomes the pixels that it is meant to show; broken ones are named."""

import os
import struct

import numpy as np
import pytest
from PIL import Image, features

from ldm_scaling.data import image_folder, pair_making
from ldm_scaling.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def grey3(x_HW):
    return np.repeat(np.asarray(x_HW)[..., None], 3, axis=2)


def clear(x_HWC, hidden):
    """RGBA whose left half is opaque and whose right half, of the colour `hidden`, is not there."""
    rgba = np.dstack([x_HWC, np.full(x_HWC.shape[:2], 255, np.uint8)])
    rgba[:, 5:] = [*hidden, 0]
    return rgba


def on_white(x_HWC):
    out = x_HWC.copy()
    out[:, 5:] = 255
    return out


def palette(transparent=None):
    image = Image.fromarray(GREY % 4, "P")
    image.putpalette([0, 0, 0, 250, 10, 20, 30, 240, 50, 60, 70, 230])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


COLOURS = np.array([[0, 0, 0], [250, 10, 20], [30, 240, 50], [60, 70, 230]], np.uint8)
HOLE = np.array([[0, 0, 0], [250, 10, 20], [255, 255, 255], [60, 70, 230]], np.uint8)
CMYK = np.stack([255 - RGB[..., 0], 255 - RGB[..., 1], 255 - RGB[..., 2], 0 * GREY], axis=-1)


@pytest.mark.parametrize("names, wanted", [
    (["0.png", "1.jpg", "10.png", "11.png", "2.png"], [0, 1, 4, 2, 3]),
    (["a_1.png", "a_10.png", "a_9.png"], [0, 2, 1]),
    (["sd15_1.png", "sd15_100.png", "sd15_20.png"], [0, 2, 1]),
    (["000.png", "001.png", "010.png"], [0, 1, 2]),
    (["1.png", "10_b.png", "9.png"], [0, 1, 2]),
    (["10.png", "9.png", "a.png"], [0, 1, 2]),
    (["one.png"], [0]),
])
def test_order_of_numbers(tmp_path, names, wanted):
    folder = image_folder.ImageFolder(tmp_path, tuple(names))
    assert image_folder.by_number(folder).names == tuple(names[i] for i in wanted)


@pytest.mark.parametrize("suffix, image, expected", [
    ("png", Image.fromarray(RGB), RGB),
    ("webp", Image.fromarray(RGB), RGB),
    ("png", Image.fromarray(GREY), grey3(GREY)),
    ("png", Image.fromarray(GREY > 99), grey3((GREY > 99) * np.uint8(255))),
    ("png", palette(), COLOURS[GREY % 4]),
    ("png", palette(2), HOLE[GREY % 4]),
    ("png", Image.fromarray(clear(RGB, (200, 0, 0)), "RGBA"), on_white(RGB)),
    ("png", Image.fromarray(np.dstack([GREY, clear(RGB, (0, 0, 0))[..., 3]]), "LA"),
     on_white(grey3(GREY))),
    # 16 bits: 257 times as much is the same grey.
    ("png", Image.fromarray(GREY.astype(np.uint16) * 257), grey3(GREY)),
    ("tiff", Image.fromarray(CMYK, "CMYK"), RGB),
], ids=["rgb", "webp", "grey", "bits", "palette", "hole", "alpha", "grey alpha", "16", "cmyk"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modes(tmp_path, suffix, image, expected):
    path = tmp_path / f"x.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    got = image_folder.read_image(path)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


def save_turned(path, orientation, *others):
    """An image with EXIF's entries (tag, type, value or where it lies) as they are, and `RGB`."""
    kinds = {3: b"\x06\0\0\0", 2: b"6\0\0\0", 5: struct.pack("<I", 26 + 12 * len(others))}
    entries = [(0x0112, *orientation), *((tag, kind, kinds[kind]) for tag, kind in others)]
    table = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + bytes(4)
    Image.fromarray(RGB).save(path, exif=b"Exif\0\0" + exif + struct.pack("<II", 2, 1))


@pytest.mark.parametrize("name, orientation, others, turns", [
    ("x.png", (3, b"\x06\0\0\0"), (), -1),
    ("x.webp", (3, b"\x03\0\0\0"), (), 2),
    ("x.png", (3, b"\x06\0\0\0"), ((0x0128, 5),), -1),  # a unit that is a fraction
    ("x.png", (3, b"\x99\x01\0\0"), (), 0),
    ("x.png", (2, b"6\0\0\0"), (), 0),
], ids=["6", "3", "odd", "409", "text"])
def test_orientation(tmp_path, name, orientation, others, turns):
    """EXIF's 6 is a camera held on its side: shown, the image is turned clockwise. What else it
    says, and what has no meaning, is left aside."""
    save_turned(tmp_path / name, orientation, *others)
    found, wanted = image_folder.read_image(tmp_path / name), np.rot90(RGB, turns)
    assert found.shape == wanted.shape
    if name.endswith("png"):
        np.testing.assert_array_equal(found, wanted)
    given = pair_making.photographs((name,), tmp_path, 1)
    assert given.sizes == (wanted.shape[:2],)


def test_a_tiff_that_is_turned_as_it_is_opened_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "x.tiff", exif=exif)
    found = image_folder.read_image(tmp_path / "x.tiff")
    np.testing.assert_array_equal(found, np.rot90(RGB, -1))
    assert pair_making.photographs(("x.tiff",), tmp_path, 1).sizes == (found.shape[:2],)


def test_square_is_the_middle():
    """The margin is halved and rounded to even, as torchvision's `center_crop` does."""
    rows = np.arange(7, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 3), np.uint8)
    assert image_folder.square(rows, 4)[:, 0, 0].tolist() == [2, 3, 4, 5]  # 1.5 rounds to 2
    assert image_folder.square(rows[:5], 4)[:, 0, 0].tolist() == [0, 1, 2, 3]  # 0.5 to 0
    flat = np.full((40, 70, 3), 77, np.uint8)
    flat[:, :15], flat[:, 55:] = 0, 255
    out = image_folder.square(flat, 16)
    assert out.shape == (16, 16, 3) and (out == 77).all()


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "sub/a.JPG", ".hidden/c.png", "a.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(RGB).save(path)
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_listing(folder):
    found = image_folder.listing(folder)
    assert found.names == ("a.png", "b.png", "sub/a.JPG")
    assert found.sizes == [(9, 6)] * 3
    assert found.hashes[0] == found.hashes[1] != found.hashes[2]
    for path in (folder / "none", folder / ".hidden" / "c.png"):
        with pytest.raises(UserError, match="there is no folder"):
            image_folder.listing(path)
    os.mkdir(folder / "empty")
    with pytest.raises(UserError, match="there is no image in"):
        image_folder.listing(folder / "empty")


def test_broken_images_are_named(folder):
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((3, 3), np.float32)).save(folder / "float.tif")
    names = ["cut.png", "text.jpg", "float.tif"]
    if features.check("avif"):
        Image.fromarray(np.tile(RGB, (8, 8, 1))).save(folder / "cut.avif")
        header, name, pixels = (folder / "cut.avif").read_bytes().partition(b"mdat")
        (folder / "cut.avif").write_bytes(header + name + bytes(len(pixels)))
        names.append("cut.avif")
    found = image_folder.listing(folder)
    for name in names:
        with pytest.raises(UserError, match=f"{name} .*fetch or draw it again, or leave it out"):
            found.read(found.names.index(name))
    good, broken = image_folder.sound(found)
    assert good.names == ("a.png", "b.png", "sub/a.JPG")
    assert broken == tuple(sorted(names))
    with pytest.raises(UserError, match=f"none of the {len(names)} images"):
        image_folder.sound(found.take([found.names.index(name) for name in broken]))


def test_only_changed_files_are_read_again(folder, monkeypatch):
    first = image_folder.listing(folder)
    image_folder.remember(first, folder / "memo.json")
    assert first.hashes == image_folder.listing(folder).hashes
    Image.fromarray(255 - RGB).save(folder / "b.png")
    read = []
    facts = image_folder._facts
    monkeypatch.setattr(
        image_folder, "_facts", lambda path: (read.append(path.name), facts(path))[1]
    )
    second = image_folder.listing(folder)
    image_folder.remember(second, folder / "memo.json")
    assert read == ["b.png"]
    assert [a == b for a, b in zip(first.hashes, second.hashes)] == [True, False, True]
    assert second.hashes == image_folder.listing(folder).hashes

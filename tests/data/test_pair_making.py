"""Pairs out of photographs: the same bytes however they were made, and crops spread evenly."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import cli
from ldm_scaling.data import image_folder, pair_making, pairs
from ldm_scaling.data.conditions import table
from ldm_scaling.errors import UserError
from tests.data.conditions.made import photograph

SIZES = {"large": (90, 150), "tall": (130, 70), "small": (40, 200)}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(photograph(*size, seed=i)).save(folder / f"{name}.png")
    return folder


def _bytes(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def _make(photos, to, *flags, status=0):
    arguments = ["--count=5", "--side=64", *flags]
    assert cli.main(["pairs", f"--source=photos:{photos}", f"--to={to}", *arguments]) == status
    return to


def test_pairs_are_crops_with_their_condition(photos, tmp_path, capsys):
    to = _make(photos, tmp_path / "a")
    assert "1 of 3 photographs are smaller than 64 pixels and were left out: small.png" in (
        capsys.readouterr().out
    )
    found, facts = pairs.read(to), json.loads((to / "pairs.json").read_text())
    assert len(found.high) == 5 and facts["skipped"] == ["small.png"]
    request = pair_making.Request("super_resolution", 5, 64, 0)
    names, keys = [*facts["photographs"]], request.keys()
    for i, (number, top, left) in enumerate(facts["crops"]):
        whole = image_folder.read_image(photos / names[number])
        high = found.high.read(i)
        np.testing.assert_array_equal(high, whole[top : top + 64, left : left + 64])
        wanted = table.named("super_resolution")(high, int(keys[i])).image
        np.testing.assert_array_equal(found.low.read(i), wanted)


def test_crops_sum_the_photographs_once(photos, monkeypatch):
    calls, cumsum = [], np.cumsum
    monkeypatch.setattr(np, "cumsum", lambda x: calls.append(x) or cumsum(x))
    given = pair_making.photographs(tuple(f"{name}.png" for name in SIZES), photos, 64)
    assert given.skipped == ("small.png",)
    assert len({given.crop(key) for key in range(20)}) == 20 and len(calls) == 1


def test_sizes_of_turned_photographs(tmp_path, monkeypatch):
    """As they are read; a TIFF alone is decoded for it."""
    exif, decode, seen = Image.Exif(), image_folder.to_rgb, []
    exif[0x0112] = 6
    names = ("a.jpg", "b.png", "c.tif")
    for name in names:
        Image.fromarray(photograph(90, 150)).save(tmp_path / name, exif=exif)
    monkeypatch.setattr(
        image_folder, "to_rgb", lambda x, ground: seen.append(x.format) or decode(x, ground))
    given = pair_making.photographs(names, tmp_path, 64)
    assert given.sizes == ((150, 90),) * 3 and seen == ["TIFF"]
    assert all(image_folder.read_image(tmp_path / name).shape == (150, 90, 3) for name in names)


def test_the_same_bytes_whatever_was_there_before(photos, tmp_path):
    whole = _bytes(_make(photos, tmp_path / "a"))
    again = _make(photos, tmp_path / "b")
    for name in ("HR/000001.png", "LR/000003.png", "LR/000004.png"):
        (again / name).unlink()
    assert _bytes(_make(photos, again)) == whole
    # A pair is that of its number, however many there are.
    more = _bytes(_make(photos, tmp_path / "c", "--count=7"))
    assert all(more[n] == data for n, data in whole.items() if n != "pairs.json")
    other = _bytes(_make(photos, tmp_path / "d", "--seed=1"))
    assert not any(other[n] == data for n, data in whole.items())


def test_masks_lie_beside_their_images(photos, tmp_path):
    to = _make(photos, tmp_path / "a", "--condition=inpainting")
    for i in range(5):
        mask, low, high = (
            image_folder.read_image(to / folder / f"{i:06d}.png") for folder in ("mask", "LR", "HR")
        )
        assert set(np.unique(mask)) == {0, 255}
        np.testing.assert_array_equal(low[mask == 0], high[mask == 0])
        assert (low[mask == 255] == 128).all()


def test_any_place_is_as_likely_as_any_other(tmp_path):
    given = pair_making.Photographs(
        tmp_path, ("a", "b"), ((10, 12), (8, 8)), ("", ""), (), 8
    )
    keys = pair_making.Request("colourisation", 4_000, 32, 0).keys()
    crops = [given.crop(int(key)) for key in keys]
    places, counts = np.unique([(c.photograph, c.top, c.left) for c in crops], axis=0,
                               return_counts=True)  # fmt: skip
    assert len(places) == 3 * 5 + 1
    mean = 4_000 / 16
    assert (np.abs(counts - mean) < 5 * mean**0.5).all()


def test_mistakes(photos, tmp_path, capsys):
    def error(*flags, source=None, to="a"):
        arguments = [f"--source={source or f'photos:{photos}'}", f"--to={tmp_path / to}"]
        assert cli.main(["pairs", *arguments, "--count=2", "--side=64", *flags]) == 2
        return capsys.readouterr().err

    assert "none of the 3 images" in error("--side=400") and "tall" not in error("--side=44444")
    assert "pairs needs --source" in (cli.main(["pairs"]), capsys.readouterr().err)[1]
    assert "pairs are made of photos:DIR" in error(source=f"folder:{photos}")
    assert "did you mean 'deblurring'" in error("--condition=deblurrin")
    assert "sides must be multiples of 4" in error("--side=66")
    _make(photos, tmp_path / "a")
    assert "holds other pairs, they differ in 'count' (5, now 2)" in error()
    assert "is not empty, and holds no pairs.json" in error(to="photos")
    with pytest.raises(UserError, match="there is no"):
        image_folder.listing(tmp_path / "b")
    (photos / "broken.png").write_bytes(b"none")
    assert "cannot read the image" in error(to="e")

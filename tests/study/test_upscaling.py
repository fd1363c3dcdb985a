"""`ldm-scaling upscale`: three ways, pictures of any size, and folders that are gone on with."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from ldm_scaling import cli
from ldm_scaling.data import image_folder
from ldm_scaling.errors import UserError
from ldm_scaling.models import rrdbnet
from ldm_scaling.study import upscaling
from tests.data.conditions.made import photograph


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "low"
    (folder / "below").mkdir(parents=True)
    for name, size in {"a": (20, 30), "b": (24, 24), "below/c": (20, 30)}.items():
        Image.fromarray(photograph(*size)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def weights(tmp_path):
    """A small network of ESRGAN's kind with random weights, whose pictures are not clipped."""
    spec = rrdbnet.RRDBNetSpec(1, 8, 4)
    rng, tensors = np.random.default_rng(0), {}
    for name, (i, o) in spec.widths().items():
        name = name.replace("body_0/", "body.0.").replace("/", ".")
        kernel = rng.normal(size=(o, i, 3, 3)) / (9 * i) ** 0.5
        tensors[f"{name}.weight"] = kernel.astype(np.float32)
        tensors[f"{name}.bias"] = np.zeros(o, np.float32)
    _, params = rrdbnet.from_tensors(tensors, "here")
    out = np.asarray(rrdbnet.apply(params, photograph(20, 30)[None].astype(np.float32) / 255))
    scale_C = 0.12 / out.std((0, 1, 2))
    tensors["conv_last.weight"] *= scale_C[:, None, None, None]
    tensors["conv_last.bias"] = 0.5 - scale_C * out.mean((0, 1, 2))
    path = tmp_path / "small.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


def _run(*arguments, status=0):
    assert cli.main(["upscale", *map(str, arguments)]) == status


def _read(folder):
    return {
        p.relative_to(folder).as_posix(): image_folder.read_image(p) for p in folder.rglob("*.png")
    }


def test_bicubic_is_pillows(images, tmp_path):
    _run(images, f"--to={tmp_path / 'high'}", "--by=bicubic")
    found = _read(tmp_path / "high")
    assert {n: x.shape for n, x in found.items()} == {
        "a.png": (80, 120, 3), "b.png": (96, 96, 3), "below/c.png": (80, 120, 3)
    }  # fmt: skip
    given = Image.open(images / "a.png")
    np.testing.assert_array_equal(found["a.png"], given.resize((120, 80), Image.BICUBIC))


def test_a_folder_within_is_not_enlarged_again(images, capsys):
    for _ in range(2):
        _run(images, f"--to={images / 'large'}", "--by=bicubic")
        assert set(_read(images / "large")) == {"a.png", "b.png", "below/c.png"}


def test_a_picture_that_cannot_be_is_told_before_one_is_drawn(images, tmp_path):
    """What was drawn of the others would be of another folder of pictures once it is mended."""
    def check(size):
        if min(size) < 24:
            raise UserError("too small")

    def enlarge(*unused):
        raise AssertionError("it was drawn")

    way = dataclasses.replace(upscaling.bicubic(), check=check, enlarge=enlarge)
    with pytest.raises(UserError, match="a.png: too small"):
        upscaling.write(way, image_folder.listing(images), tmp_path / "high")
    assert not (tmp_path / "high").exists()


def test_a_published_network_goes_on_where_it_was(images, tmp_path, weights):
    high = tmp_path / "high"
    _run(images, f"--to={high}", f"--by={weights}")
    whole = _read(high)
    (high / "b.png").unlink()
    before = (high / "a.png").stat().st_mtime_ns
    _run(images, f"--to={high}", f"--by={weights}")
    after = _read(high)
    assert all((after[name] == image).all() for name, image in whole.items())
    assert (high / "a.png").stat().st_mtime_ns == before
    _, params = rrdbnet.load(weights)
    x = image_folder.read_image(images / "b.png")[None].astype(np.float32) / 255
    wanted = np.rint(255 * np.clip(np.asarray(jax.jit(rrdbnet.apply)(params, x))[0], 0, 1))
    assert np.abs(whole["b.png"] - wanted).max() <= 1


def test_pictures_may_be_added(images, tmp_path):
    """Each that is there keeps its number, whose noise it has; of a changed one or a changed mask
    nothing is made."""
    drawn, high, masks = [], tmp_path / "high", {"a.png": "one", "b.png": "two", "below/c.png": "x"}

    def enlarge(images_NhwC, index_N):
        drawn.extend(index_N.tolist())
        return images_NhwC

    way = dataclasses.replace(upscaling.bicubic(), enlarge=enlarge)

    def made(*names):
        drawn.clear()
        given = image_folder.ImageFolder(images, names)
        upscaling.write(way, given, high, beside=[masks[name] for name in names])
        return sorted(drawn)

    assert made("a.png", "below/c.png") == [0, 1]
    first = (high / "upscale.json").read_text()
    assert made("a.png", "below/c.png") == [] and (high / "upscale.json").read_text() == first
    # In the order of names it is between them.
    assert made("a.png", "b.png", "below/c.png") == [2]
    (high / "below" / "c.png").unlink()
    assert made("b.png", "below/c.png") == [1]
    masks["b.png"] = "another"
    with pytest.raises(UserError, match="b.png made of another picture or mask than"):
        made("a.png", "b.png")
    with pytest.raises(UserError, match="made in another way, 'beside' differs"):
        upscaling.write(way, image_folder.listing(images), high)


def test_tiles_of_a_large_picture_show_no_seams(weights, monkeypatch):
    """What a network sees of a picture ends at a tile's border; the weights hide that."""
    x_HWC = photograph(60, 88)
    whole = upscaling.esrgan(weights).enlarge(x_HWC[None], np.zeros(1, int))[0].astype(float)
    monkeypatch.setattr(upscaling, "ESRGAN_TILE", 32)
    monkeypatch.setattr(upscaling, "ESRGAN_OVERLAP", 16)
    tiled = upscaling.esrgan(weights).enlarge(x_HWC[None], np.zeros(1, int))[0].astype(float)
    assert whole.std() > 20
    assert np.abs(tiled - whole).max() <= 2  # of 255
    monkeypatch.setattr(upscaling, "ESRGAN_OVERLAP", 0)
    apart = upscaling.esrgan(weights).enlarge(x_HWC[None], np.zeros(1, int))[0].astype(float)
    assert np.abs(apart - whole).max() > 10


def test_mistakes(images, tmp_path, weights, capsys):
    def error(*arguments):
        _run(*arguments, status=2)
        return capsys.readouterr().err

    to = f"--to={tmp_path / 'high'}"
    assert "needs a picture and --to" in error(images)
    assert "either --by=bicubic" in error(images, to)
    assert "either --by=bicubic" in error(images, to, "--by=bicubic", "--workdir=x")
    assert "--steps needs --workdir=DIR" in error(images, to, "--by=bicubic", "--steps=3")
    assert "there is no image" in error(tmp_path / "none.png", to, "--by=bicubic")
    assert "is a folder: give one folder" in error(images, images / "a.png", to, "--by=bicubic")
    assert "there is no such file" in error(images, to, "--by=none.pth")
    wrong = tmp_path / "wrong.safetensors"
    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, wrong)
    assert "holds no network of ESRGAN's kind, but x" in error(images, to, f"--by={wrong}")
    _run(images / "a.png", to, "--by=bicubic")
    assert "made in another way" in error(images / "a.png", to, f"--by={weights}")
    Image.fromarray(photograph(24, 24, 1)).save(images / "a.png")
    assert "holds a.png made of another picture than" in error(images, to, "--by=bicubic")
    (images / "a.bmp").write_bytes((images / "a.png").read_bytes())
    assert "two pictures are called 'a'" in error(images / "a.bmp", to, "--by=bicubic")
    for given in (images, images / "a.png"):
        assert "is where the pictures are" in error(given, f"--to={images}", "--by=bicubic")
    assert "is not empty, and holds no upscale.json" in error(
        images / "a.png", f"--to={images / 'below'}", "--by=bicubic"
    )
    assert json.loads((tmp_path / "high" / "upscale.json").read_text())["by"] == "bicubic"

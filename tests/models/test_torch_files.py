"""torch's files and files in parts: what is read is what was saved, and nothing in them is run."""

import argparse
import builtins
import collections
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from ldm_scaling.errors import UserError
from ldm_scaling.models import pretrained, torch_files

WHY = "compares with torch: pip install -e '.[parity]'"
torch = pytest.importorskip("torch", reason=WHY)


def state():
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    kinds = "float64 float16 bfloat16 int64 int32 uint8 bool".split()
    return {
        "whole": base, "view of the same storage": base[1:, ::2, 1:4], "ä.名": torch.ones(1),
        "transposed": base.permute(2, 0, 1), "scalar": torch.tensor(7), "empty": torch.zeros(0, 3),
        "bfloat16 scalar": torch.tensor(1.5, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    } | {k: torch.tensor([[0, 1], [2, 100]]).to(getattr(torch, k)) for k in kinds}  # fmt: skip


def assert_equal(tensors, table):
    assert set(tensors) == set(table)
    for name, tensor in table.items():
        ours, theirs = tensors[name], tensor.detach().double().numpy()
        assert type(ours) is np.ndarray and ours.shape == theirs.shape
        assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(ours.astype(np.float64), theirs)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", torch_files.SUFFIXES)
def test_equals_torch(tmp_path, suffix, zipped):
    path = tmp_path / f"w{suffix}"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    assert_equal(pretrained.read_torch(path), state())


def fake(monkeypatch, module, name):
    """A class that pickles by reference to a module which is not installed."""
    made = types.ModuleType(module)
    kind = type(name, (), {"__module__": module})
    setattr(made, name, kind)
    parents = module.split(".")
    for i in range(1, len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[:i]), types.ModuleType(parents[i - 1]))
    monkeypatch.setitem(sys.modules, module, made)
    return kind


def test_weights_are_found_beside_other_things(tmp_path, monkeypatch):
    """As in the checkpoints of Stable Diffusion and DINO."""
    callback = fake(monkeypatch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    used = callback()
    used.best = 3
    short = fake(monkeypatch, "pytorch_lightning.callbacks", "ModelCheckpoint")
    others = {
        "args": argparse.Namespace(arch="vit_small"), "epoch": 100, "used": used,
        "callbacks": {callback: {"best_model_score": np.float64(0.3), "name": "x"}, short: {}},
        "losses": np.arange(3.0), "folder": pathlib.PosixPath("x"),
        "seen": collections.defaultdict(int, {"a": 1}), "rest": collections.defaultdict(dict),
        "optimizer": {"state": [torch.ones(1)]},
    }  # fmt: skip
    w = {"w": torch.ones(2, 3)}
    wrappers = [
        {"state_dict": w}, {"teacher": w, "student": {"w": torch.zeros(2, 3)}}, {"model": w},
        {"model": {"state_dict": w, "epoch": 3}},
        {"state_dict": collections.defaultdict(list, w)},
    ]  # fmt: skip
    for i, table in enumerate(wrappers):
        torch.save(table | others, tmp_path / f"{i}.ckpt")
    monkeypatch.undo()
    assert "pytorch_lightning" not in sys.modules
    for i in range(len(wrappers)):
        assert_equal(pretrained.read_torch(tmp_path / f"{i}.ckpt"), w)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "function", [os.system, builtins.eval, builtins.getattr, subprocess.Popen, torch.load]
)
def test_runs_nothing(tmp_path, monkeypatch, function, zipped):
    monkeypatch.chdir(tmp_path)
    table = {"w": torch.ones(1), "x": Calls(function, "touch hacked")}
    torch.save({"state_dict": table}, "w.pth", _use_new_zipfile_serialization=zipped)
    # Of what has no business in such a file torch says that it is blocked.
    remedy = "save its state_dict alone" if function is torch.load else ""
    says = f"torch refused to read w.pth.*{function.__name__}.*{remedy}"
    with pytest.raises(UserError, match=says):
        pretrained.read_torch("w.pth")
    assert os.listdir(tmp_path) == ["w.pth"]


def test_what_is_no_table_of_tensors_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    for content, says in (
        ({"w": torch.ones(1), "epoch": 3}, "beside tensors it holds 'epoch', a int"),
        ({"w": {"x": torch.ones(1)}}, "beside tensors it holds 'w', a dict"),
        ({3: torch.ones(1)}, "beside tensors it holds 3"),
        ([torch.ones(1)], "it holds a list"),
        (torch.ones(1), "it holds a Tensor"),
        ({"state_dict": {"w": argparse.Namespace()}}, "holds 'w', a _Empty"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"w.pt: .*{says}.*as a .safetensors file"):
            pretrained.read_torch(path)
    torch.save({"w": torch.ones(2).to(torch.float8_e5m2)}, path)
    with pytest.raises(UserError, match="w.pt keeps w as torch.float8_e5m2.* fetch the float16"):
        pretrained.read_torch(path)
    torch.save(state(), path)
    whole, zip_start = path.read_bytes(), b"PK\x03\x04 and the rest"
    for broken in (whole[: len(whole) // 2], zip_start, b"", b"nothing", whole[9:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"w\.pt.*fetch it again"):
            pretrained.read_torch(path)


def test_names_and_places(tmp_path):
    with pytest.raises(UserError, match="cannot read the weights .*nowhere.pth: No such file"):
        pretrained.read_torch(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="w.onnx is no file of weights.*.safetensors or in .pth"):
        pretrained.read_torch(tmp_path / "w.onnx")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(UserError, match="cannot read the weights .*folder.bin"):
        pretrained.read_torch(tmp_path / "folder.bin")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installed", [True, False])
def test_torchscript_is_refused_with_a_remedy_that_works(tmp_path, monkeypatch, installed):
    """As OpenAI's CLIP comes."""
    module = torch.nn.Linear(3, 2)
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 3)), tmp_path / "net.pt")
    if not installed:
        monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="is a TorchScript archive, a program") as e:
        pretrained.read_torch(tmp_path / "net.pt")
    if installed:
        assert_equal(remedied(tmp_path, e, "net"), module.state_dict())


def remedied(folder, error, name):
    """What the file holds that the error's own command makes."""
    code = re.search('python -c "(.*)"  and give', str(error.value)).group(1)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return pretrained.read_torch(folder / f"{name}.safetensors")


def test_without_torch(tmp_path, monkeypatch):
    table = {"b": torch.ones(2), "a": torch.arange(6.0).reshape(2, 3).T}
    torch.save(table, tmp_path / "new.pth")
    torch.save(table, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_equal(pretrained.read_torch(tmp_path / "old.pth"), table)
    with pytest.raises(UserError, match="new.pth can be read only by torch.*pip install") as e:
        pretrained.read_torch(tmp_path / "new.pth")
    assert_equal(remedied(tmp_path, e, "new"), table)


# --- folders ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three tensors in two parts, as safetensors; and the same in torch's, in another folder."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=(2, 3)).astype(np.float32) for name in ("a", "b", "c.d")}
    parts = {"-00001-of-00002": ["a", "c.d"], "-00002-of-00002": ["b"]}
    for name, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        (tmp_path / suffix).mkdir()
        part_of = {k: f"{name}{part}.{suffix}" for part, keys in parts.items() for k in keys}
        index = tmp_path / suffix / f"{name}.{suffix}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": part_of}))
        for part, keys in parts.items():
            some, file = {k: tensors[k] for k in keys}, tmp_path / suffix / f"{name}{part}.{suffix}"
            if suffix == "bin":
                torch.save({k: torch.tensor(v) for k, v in some.items()}, file)
            else:
                safetensors.numpy.save_file(some, file)
    return tmp_path, tensors


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts(folder, suffix):
    place, tensors = folder[0] / suffix, folder[1]
    read = pretrained.read_weights(place)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor, strict=True)
    # A part of which nothing is wanted need not be there.
    (second,) = place.glob("*-00002-of-*")
    second.unlink()
    assert set(pretrained.read_weights(place, ignore=["b", r"c\..*"])) == {"a"}
    with pytest.raises(UserError, match=f"cannot read the weights .*{second.name}"):
        pretrained.read_weights(place)


def test_one_file_and_other_stems(folder):
    place, tensors = folder[0] / "safetensors", folder[1]
    assert set(pretrained.read_weights(place)) == set(tensors)
    safetensors.numpy.save_file({"a": tensors["a"]}, place / "other.safetensors")
    assert set(pretrained.read_weights(place, names=("other.safetensors",))) == {"a"}
    assert pretrained.read_weights(place, ["a"], ("other.safetensors",)) == {}
    safetensors.numpy.save_file({"x": tensors["a"]}, place / "model.safetensors")
    assert set(pretrained.read_weights(place)) == {"x"}  # the whole one goes before parts
    assert set(pretrained.read_weights(place / "other.safetensors")) == {"a"}
    with pytest.raises(UserError, match="no weights in .*: it needs one of model.saf.*fp16.bin"):
        pretrained.read_weights(folder[0])
    with pytest.raises(UserError, match="cannot read the weights .*none.safetensors"):
        pretrained.read_weights(place / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m | {"lost": m["a"]}, "disagree about 1 tensors, among them 'lost'"),
        (lambda m: {k: v for k, v in m.items() if k != "a"}, "among them 'a'"),
        (lambda m: m | {"a": "../safetensors/" + m["a"]}, "which is no file beside it"),
        (lambda m: m | {"a": "/etc/passwd"}, "which is no file beside it"),
        (lambda m: m | {"a": 3}, "cannot read the index"),
        (lambda m: [*m], "cannot read the index"),
    ],
)
def test_an_index_that_is_wrong_is_refused(folder, change, says):
    index = folder[0] / "safetensors/model.safetensors.index.json"
    table = json.loads(index.read_text())
    index.write_text(json.dumps(table | {"weight_map": change(table["weight_map"])}))
    with pytest.raises(UserError, match=says):
        pretrained.read_weights(folder[0] / "safetensors")
    index.write_text("{")
    with pytest.raises(UserError, match="cannot read the index .*fetch it again"):
        pretrained.read_weights(folder[0] / "safetensors")


def test_hash_of_parameters():
    tree = {"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.ones(2, jnp.bfloat16)}
    first = pretrained.hash_of(tree)
    again = jax.tree.map(np.asfortranarray, pickle.loads(pickle.dumps(tree)))
    assert pretrained.hash_of(dict(reversed(again.items()))) == first
    kernel = tree["a"]["kernel"]
    for other in (kernel.T.reshape(2, 3), kernel.reshape(3, 2), kernel.astype(np.float32)):
        assert pretrained.hash_of(tree | {"a": {"kernel": other}}) != first
    assert pretrained.hash_of({"a": {"weight": kernel}, "b": tree["b"]}) != first

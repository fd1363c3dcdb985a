"""Reference files say what they are of; the field's own files are read."""

import dataclasses
import pickle

import numpy as np
import pytest

from ldm_scaling.errors import UserError
from ldm_scaling.metrics import moments, reference
from ldm_scaling.metrics.frechet import frechet_distance, frechet_from_features
from ldm_scaling.metrics.moments import Moments
from ldm_scaling.metrics.reference import Origin
from tests.metrics import peers
from tests.metrics.peers import features

ORIGIN = Origin("net-1", "clean", 256, 90, reference.list_hash(["b.png", "a.png"]))


def test_a_file_gives_back_what_was_saved(tmp_path):
    m = Moments.of(features(0, 90, 6))
    path = tmp_path / "coco.npz"
    reference.save(path, m, ORIGIN)
    read = reference.load(path, ORIGIN)
    assert read.moments.hash == m.hash and read.extractor == "net-1" and read.counted
    assert reference.origin_of(path) == ORIGIN
    assert reference.list_hash(["a.png", "b.png"]) == ORIGIN.images
    assert reference.list_hash(["a.png"]) != ORIGIN.images


@pytest.mark.parametrize("field,value", [
    ("extractor", "net-2"), ("resizer", "tf2015"), ("resolution", 512), ("count", 91),
    ("images", "other"),
])
def test_a_mismatch_is_refused_with_both_values(tmp_path, field, value):
    reference.save(tmp_path / "r.npz", Moments.of(features(0, 90, 6)), ORIGIN)
    held = getattr(ORIGIN, field)
    with pytest.raises(UserError, match=f"{field} {held!r} instead of {value!r}"):
        reference.load(tmp_path / "r.npz", dataclasses.replace(ORIGIN, **{field: value}))


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    m = Moments.of(features(0, 90, 6))
    with pytest.raises(UserError, match="90 images cannot be saved as those of 80"):
        reference.save(tmp_path / "r.npz", m, dataclasses.replace(ORIGIN, count=80))
    with pytest.raises(UserError, match="No such file"):
        reference.load(tmp_path / "none.npz", ORIGIN)
    moments.save(tmp_path / "m.npz", m, "net-1")
    with pytest.raises(UserError, match="holds feature moments, not reference statistics"):
        reference.load(tmp_path / "m.npz", ORIGIN)
    reference.save(tmp_path / "r.npz", m, ORIGIN)
    whole = (tmp_path / "r.npz").read_bytes()
    (tmp_path / "r.npz").write_bytes(whole[:100] + b"x" + whole[101:])
    with pytest.raises(UserError, match="damaged"):
        reference.load(tmp_path / "r.npz", ORIGIN)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_fields_statistics(tmp_path, save):
    # pytorch-fid and clean-fid: savez_compressed(mu=, sigma=); ADM's have more arrays beside.
    x, y = features(1, 200, 20), features(2, 300, 20, 0.4, 0.1)
    mu, sigma = y.mean(axis=0), np.cov(y, rowvar=False)
    save(tmp_path / "stats.npz", mu=mu, sigma=sigma, mu_s=np.zeros(3))
    read = reference.load_published(tmp_path / "stats.npz", extractor="inception")
    assert read.extractor == "inception" and not read.counted
    assert read.hash != dataclasses.replace(read, counted=True).hash
    np.testing.assert_allclose(read.moments.covariance(), sigma, rtol=1e-12)
    exact = frechet_distance(Moments.of(x), Moments.of(y))
    assert frechet_from_features(x, read) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(read.moments, Moments.of(x)) == pytest.approx(exact, rel=1e-9)


def test_statistics_written_by_clean_fids_own_lines(tmp_path):
    pytest.importorskip("cleanfid", reason="needs pip install -e '.[parity]' and clean-fid")
    x, y = features(3, 200, 20), features(4, 300, 20, 0.4, 0.1)
    np.savez_compressed(tmp_path / "c.npz", mu=np.mean(y, axis=0), sigma=np.cov(y, rowvar=False))
    np.savez_compressed(tmp_path / "c_kid.npz", feats=y)
    read = reference.load_published(tmp_path / "c.npz", extractor="clean")
    theirs = peers.clean_fid().frechet_distance(
        x.mean(0), np.cov(x, rowvar=False), read.moments.mean_D, read.moments.covariance()
    )
    assert frechet_from_features(x, read) == pytest.approx(theirs, rel=1e-9)
    np.testing.assert_array_equal(reference.load_features(tmp_path / "c_kid.npz"), y)
    np.save(tmp_path / "plain.npy", y)
    np.testing.assert_array_equal(reference.load_features(tmp_path / "plain.npy"), y)


@pytest.mark.parametrize("held,match", [
    ({"mean": np.zeros(3)}, "holds no 'mu', only .'mean'."),
    ({"mu": np.zeros(3), "sigma": np.eye(2)}, "no mean and covariance"),
    ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
    ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "not finite"),
    ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "variance is negative"),
])
def test_files_that_are_no_statistics(tmp_path, held, match):
    np.savez(tmp_path / "s.npz", **held)
    with pytest.raises(UserError, match=match):
        reference.load_published(tmp_path / "s.npz", extractor="x")
    with pytest.raises(UserError, match="'feats'"):
        reference.load_features(tmp_path / "s.npz")


def test_files_that_are_no_arrays(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 cut off")
    for name in "ab":
        with pytest.raises(UserError, match="no file of numpy arrays"):
            reference.load_published(tmp_path / f"{name}.npz", extractor="x")
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": [0.0], "sigma": [[1.0]]}}))
    with pytest.raises(UserError, match=r"edm2.pkl is a pickle, .*\['fid'\]; numpy.savez"):
        reference.load_published(tmp_path / "edm2.pkl", extractor="x")
    with pytest.raises(UserError, match="cannot read"):
        reference.load_published(tmp_path / "none.npz", extractor="x")

"""FID of two folders by pytorch-fid's and clean-fid's path: their own resize and network, and
torch-fidelity's distance, for `sqrtm` of so many features takes minutes.
The peers: pip install -e '.[parity]'."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from ldm_scaling import cli
from ldm_scaling.study import weights as published
from tests.metrics import peers
from tests.models import test_inception as inception_tests
from tests.models.conftest import torch  # noqa: F401
from tests.models.test_inception import fidelity, pytorch_fid, weights  # noqa: F401
from tests.study.test_evaluate import write_images


def features_of(folder: pathlib.Path, network, prepare, torch) -> np.ndarray:  # noqa: F811
    """Features of the images of a folder, one by one, sorted by name."""
    out = []
    with torch.inference_mode():
        for path in sorted(folder.iterdir()):
            image = np.asarray(Image.open(path).convert("RGB"))
            (found,) = network(prepare(image))
            out.append(found.numpy().ravel().astype(np.float64))
    return np.stack(out)


@pytest.mark.parametrize("name", ["fid_pytorch", "fid_clean"])
def test_folders_score_as_by_the_peer(
    name, torch, weights, pytorch_fid, tmp_path, monkeypatch,  # noqa: F811
):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a = write_images(tmp_path / "a", 4, 0, side=50)
    b = write_images(tmp_path / "b", 4, 1, side=64, low=60)
    (tmp_path / published.PUBLISHED["inception"].names[0]).symlink_to(weights)
    if name == "fid_pytorch":
        network = pytorch_fid()

        def prepare(image):
            return inception_tests.nchw(torch, image[None] / np.float32(255))
    else:
        resize = inception_tests.import_without_init("cleanfid", "resize").build_resizer("clean")
        network = pytorch_fid(resize_input=False, normalize_input=False)

        def prepare(image):
            return (inception_tests.nchw(torch, resize(image)[None]) - 128) / 128

    x, y = (features_of(folder, network, prepare, torch) for folder in (a, b))
    statistics = [{"mu": z.mean(0), "sigma": np.cov(z.T)} for z in (x, y)]
    metric = peers.torch_fidelity("metric_fid.py").fid_statistics_to_metric(*statistics, False)
    (theirs,) = metric.values()
    out = tmp_path / "out.json"
    assert cli.main(["evaluate", str(a), str(b), f"--metrics={name}", f"--weights={tmp_path}",
                     "--replicates=0", f"--output={out}"]) == 0  # fmt: skip
    (score,) = json.loads(out.read_text())["scores"]
    assert score["value"] == pytest.approx(theirs, rel=1e-5)

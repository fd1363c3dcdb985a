"""Our feature networks against their peers' on the same weights: interleaved, parity first.

    python benchmarks/metrics.py --what=inception [--resizer=fid_tf2015 --images=16 --side=256]
    python benchmarks/metrics.py --what=lpips --net=vgg [--images=4 --side=256]

Inception's peer is torch-fidelity, uint8 pictures to features, resizing included; LPIPS' is the
lpips package, pairs of pictures to distances. Weights are random, of the right sizes. Both sides
run float32 with every core, or the GPU where each of them finds one. Needs the `parity` extra and
`pip install --no-deps torch-fidelity lpips`; torchvision is not needed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import types
from unittest import mock

import numpy as np
import torch
from torch import nn

from ldm_scaling.models import inception, lpips
from ldm_scaling.parallel import hosts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def randomise(network: nn.Module) -> nn.Module:
    """Weights that keep signals alive: neither zeros nor the slow numbers next to zero."""
    torch.manual_seed(0)
    for m in network.modules():
        if isinstance(m, nn.Conv2d) and m.out_channels > 1:
            nn.init.kaiming_normal_(m.weight)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return network.eval().to(DEVICE)


def nchw(images_BHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).contiguous().to(DEVICE)


def torch_fidelity() -> nn.Module:
    """Its Inception, past the package's __init__, which imports torchvision."""
    package = types.ModuleType("torch_fidelity")
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(network, "load_state_dict"),
        mock.patch.object(module, "load_state_dict_from_url"),
    ):
        return randomise(network("peer", ["2048", "logits_unbiased"]))


def run_inception(args: argparse.Namespace):
    peer = torch_fidelity()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(peer.state_dict(), file.name)
        network = inception.load(file.name, args.resizer, args.batch)
    shape = (args.images, args.side, args.side, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def ours():
        return network.features(images)["pool"]

    def theirs():
        with torch.inference_mode():
            return peer(nchw(images))[0].cpu().numpy()

    # Another resizer gives other features: then only the times are comparable.
    tolerance = 1e-4 if args.resizer == "fid_tf2015" else np.inf
    return "torch-fidelity", ours, theirs, tolerance


def torchvision(name: str) -> nn.Module:
    """The layers of torchvision's AlexNet or VGG16 that LPIPS uses."""
    layers, inputs, net = [], 3, lpips.NETS[name]
    for pooled, convs in net.stages:
        layers += [nn.MaxPool2d(net.window, 2)] * pooled
        for width, kernel, stride, padding in convs:
            layers += [nn.Conv2d(inputs, width, kernel, stride, padding), nn.ReLU(inplace=True)]
            inputs = width
    return nn.Sequential(*layers)


def run_lpips(args: argparse.Namespace):
    models = types.ModuleType("torchvision.models")
    for function, name in (("alexnet", "alex"), ("vgg16", "vgg")):
        trunk = types.SimpleNamespace(features=torchvision(name))
        setattr(models, function, lambda trunk=trunk, **_: trunk)
    stand_in = types.ModuleType("torchvision")
    stand_in.models = models
    with mock.patch.dict(sys.modules, {"torchvision": stand_in, "torchvision.models": models}):
        package = importlib.import_module("lpips")
    peer = randomise(package.LPIPS(net=args.net, pnet_rand=True, verbose=False))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(peer.state_dict(), file.name)
        network = lpips.load(args.net, file.name, batch=args.batch)
    rng, shape = np.random.default_rng(0), (2, args.images, args.side, args.side, 3)
    a, b = rng.uniform(-1, 1, shape).astype(np.float32)

    def ours():
        return network.distance(a, b)

    def theirs():
        with torch.inference_mode():
            return peer(nchw(a), nchw(b)).cpu().numpy().ravel()

    return "lpips", ours, theirs, 1e-4


RUNS = {"inception": run_inception, "lpips": run_lpips}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=RUNS, required=True)
    parser.add_argument("--images", type=int, default=16, help="pictures, or pairs, a call")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--resizer", choices=inception.CONVENTIONS, default="fid_tf2015")
    parser.add_argument("--net", choices=("alex", "vgg"), default="alex")
    parser.add_argument("--batch", type=int, help="ours; the peer takes all pictures at once")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    hosts.use_cpu_cores()

    peer, ours, theirs, tolerance = RUNS[args.what](args)
    a, b = ours(), theirs()
    difference = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert difference < tolerance, f"outputs differ by {difference} of their size"
    print(f"relative difference {difference:.1e}; {vars(args)}; {hosts.describe()}, torch {DEVICE}")

    seconds: dict[str, list[float]] = {"ldm_scaling": [], peer: []}
    for _ in range(args.repeats):
        for name, run in zip(seconds, (ours, theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {}
    for name, values in seconds.items():
        medians[name] = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:16s} median {1e3 * medians[name]:8.1f} ms  quartiles {1e3 * low:.1f} to "
              f"{1e3 * high:.1f}  {args.images / medians[name]:.2f} a second")  # fmt: skip
    print(f"ratio {medians[peer] / medians['ldm_scaling']:.2f} (above 1: ours is faster)")


if __name__ == "__main__":
    main()

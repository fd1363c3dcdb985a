"""Our feature networks against their peers' on the same weights: interleaved, parity first.

    python benchmarks/metrics.py --what=inception [--resizer=fid_tf2015 --images=16 --side=256]
    python benchmarks/metrics.py --what=lpips --net=vgg [--images=4 --side=256]
    python benchmarks/metrics.py --what=clip --tower=text --peer=transformers [--images=64]

Inception's peer is torch-fidelity, uint8 pictures to features, resizing included; LPIPS' is the
lpips package, pairs of pictures to distances; CLIP ViT-B/32's are open_clip and transformers,
scaled pictures or tokens to the projected embedding. Weights are random, of the right sizes. Both
sides run float32 with every core that the process may use (`taskset -c 0` for one), or the GPU
where each of them finds one. Needs the `parity` extra and
`pip install --no-deps torch-fidelity lpips open_clip_torch`; torchvision is not needed.
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
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from torch import nn

from ldm_scaling.models import (
    clip,
    clip_checkpoint,
    clip_image,
    clip_text,
    inception,
    lpips,
    pretrained,
)
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


def open_clip(both: clip.Clip) -> nn.Module:
    """Its CLIP with OpenAI's activation, past the package's __init__, which imports torchvision."""
    package = types.ModuleType("open_clip")
    package.__path__ = importlib.util.find_spec("open_clip").submodule_search_locations
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = nn.BatchNorm2d
    stand_ins = {"open_clip": package, "torchvision.ops.misc": misc, "timm": None}
    with mock.patch.dict(sys.modules, stand_ins):
        model = importlib.import_module("open_clip.model")
    image, text = both.image, both.text
    return model.CLIP(
        embed_dim=image.projection,
        vision_cfg={"image_size": image.side, "patch_size": image.patch, "width": image.width,
                    "layers": image.layers, "head_width": image.width // image.heads},
        text_cfg={"width": text.width, "layers": text.layers, "heads": text.heads},
        quick_gelu=True,
    )  # fmt: skip


def transformers_clip(both: clip.Clip) -> nn.Module:
    import transformers

    configs = (
        {"hidden_size": s.width, "num_hidden_layers": s.layers, "num_attention_heads": s.heads,
         "intermediate_size": s.hidden, "hidden_act": s.activation}
        for s in (both.text, both.image)
    )  # fmt: skip
    text, image = configs
    text |= {"bos_token_id": 49406, "eos_token_id": 49407}
    image |= {"image_size": both.image.side, "patch_size": both.image.patch}
    projection = both.image.projection
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=projection)
    )


def run_clip(args: argparse.Namespace):
    both, rng = clip.PUBLISHED["ViT-B/32"], np.random.default_rng(0)
    torch.manual_seed(0)
    make = {"open_clip": open_clip, "transformers": transformers_clip}[args.peer]
    peer = make(both).eval().to(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {k: v.contiguous().cpu() for k, v in peer.state_dict().items()}
        weights = Path(folder) / "model.safetensors"
        safetensors.torch.save_file(tensors, weights)
        if args.tower == "image":
            tower = clip_image.load_image(weights, model="ViT-B/32", batch=args.batch)
        else:
            checkpoint = clip_checkpoint.read(weights, "text", clip_text.IGNORE, "ViT-B/32")
            params = pretrained.fill(
                clip_text.abstract_params(both.text), checkpoint.tensors, clip_text.RULES,
                source=weights,
            )  # fmt: skip
            tokens = types.SimpleNamespace(hash="", eos=49407)  # ids are made below, not read
            kw = {} if args.batch is None else {"batch": args.batch}
            tower = clip_text.assemble(both.text, params, tokens, **kw)
    name = f"get_{args.tower}_features" if args.peer == "transformers" else f"encode_{args.tower}"
    encode = getattr(peer, name)
    if args.tower == "image":
        shape = (args.images, both.image.side, both.image.side, 3)
        inputs = rng.normal(size=shape).astype(np.float32)
    else:
        inputs = rng.integers(1, 49406, (args.images, both.text.positions)).astype(np.int32)
        inputs[:, rng.integers(5, 77)] = 49407  # the end of the text

    def ours():
        if args.tower == "image":
            return tower.features_of_scaled(inputs, ["projected"])["projected"]
        return tower._run(inputs, ("projected",))["projected"]

    def theirs():
        with torch.inference_mode():
            x = nchw(inputs) if args.tower == "image" else torch.from_numpy(inputs).to(DEVICE)
            out = encode(x)
            return getattr(out, "pooler_output", out).cpu().numpy()

    return args.peer, ours, theirs, 1e-4


RUNS = {"inception": run_inception, "lpips": run_lpips, "clip": run_clip}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=RUNS, required=True)
    parser.add_argument("--images", type=int, default=16, help="pictures, or pairs, a call")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--resizer", choices=inception.CONVENTIONS, default="fid_tf2015")
    parser.add_argument("--net", choices=("alex", "vgg"), default="alex")
    parser.add_argument("--tower", choices=("image", "text"), default="image")
    parser.add_argument("--peer", choices=("open_clip", "transformers"), default="open_clip")
    parser.add_argument("--batch", type=int, help="ours; the peer takes all pictures at once")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    hosts.use_cpu_cores()

    peer, ours, theirs, tolerance = RUNS[args.what](args)
    a, b = ours(), theirs()
    difference = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert difference < tolerance, f"outputs differ by {difference} of their size"
    print(f"relative difference {difference:.1e}; {vars(args)}; {hosts.describe()}, torch {DEVICE}")

    wall, used = ({"ldm_scaling": [], peer: []} for _ in range(2))
    for _ in range(args.repeats):
        for name, run in zip(wall, (ours, theirs)):
            # Threads of the other side spin for some milliseconds after their work.
            settled = time.perf_counter() + 0.05
            while time.perf_counter() < settled:
                run()
            start, cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - cpu)
    for name in wall:
        low, median, high = statistics.quantiles(wall[name], n=4)
        print(f"{name:14s} median {1e3 * median:8.1f} ms  quartiles {1e3 * low:.1f} to "
              f"{1e3 * high:.1f}  {args.images / median:.2f} a second  "
              f"processor {1e3 * statistics.median(used[name]):.1f} ms")  # fmt: skip
    ratios = [
        statistics.median(t[peer]) / statistics.median(t["ldm_scaling"]) for t in (wall, used)
    ]
    print(f"{peer} / ours: {ratios[0]:.2f} on the wall, {ratios[1]:.2f} of the processor")


if __name__ == "__main__":
    main()

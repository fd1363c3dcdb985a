"""Our U-Net against diffusers' on the same weights: one forward pass, interleaved, parity first.

    python benchmarks/unet.py [--channels=32 --batch=8 --side=32 --repeats=9]

Needs the `parity` extra. Both run float32 with every core of the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import jax
import numpy as np
import torch
from diffusers import UNet2DConditionModel

from ldm_scaling.models import convert, unet


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())

    c = args.channels
    peer = UNet2DConditionModel(
        sample_size=args.side, block_out_channels=(c, 2 * c, 4 * c, 4 * c), attention_head_dim=8,
        cross_attention_dim=1024,
    ).eval()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        spec, params = convert.load_unet(folder)
    params = jax.device_put(params)
    denoise = jax.jit(unet.denoise_fn(spec))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(args.batch, args.side, args.side, 4)).astype(np.float32)
    t = rng.uniform(0, 999, args.batch).astype(np.float32)
    ctx = rng.normal(size=(args.batch, 77, 1024)).astype(np.float32)
    x_torch = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    t_torch, ctx_torch = torch.from_numpy(t), torch.from_numpy(ctx)
    peer = peer.to(memory_format=torch.channels_last)

    def ours():
        return np.asarray(denoise(params, x, t, {"context": ctx}))

    def theirs():
        with torch.inference_mode():
            return peer(x_torch, t_torch, ctx_torch).sample.permute(0, 2, 3, 1).numpy()

    difference = float(np.abs(ours() - theirs()).max())
    assert difference < 1e-4, f"outputs differ by {difference}"
    print(f"largest difference {difference:.1e}; c={c}, batch {args.batch}, side {args.side}")

    seconds = {"ldm_scaling (XLA)": [], "diffusers (torch eager)": []}
    for _ in range(args.repeats):
        for name, run in zip(seconds, (ours, theirs)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {}
    for name, values in seconds.items():
        medians[name] = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:26s} median {1e3 * medians[name]:8.1f} ms  quartiles "
              f"{1e3 * low:.1f} to {1e3 * high:.1f}  {args.batch / medians[name]:.2f} images/s")
    ours_s, theirs_s = medians.values()
    print(f"ratio {theirs_s / ours_s:.2f} (above 1: ours is faster)")


if __name__ == "__main__":
    main()

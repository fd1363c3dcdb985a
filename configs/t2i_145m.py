"""The 145M U-Net of arXiv 2404.01367 (base width 128), trained as there.

    ldm-scaling study --config=configs/t2i_145m.py --workdir=/mnt/disk/t2i_145m

Hardware: 256 TPU v5e chips (16x16).
Hours: about 38 for the U-Net, an optimistic estimate that nothing has measured: 500k steps of
0.27 s, 0.24 s of it for what plain attention reads and writes (scaled from the 866M step).
Expected: the paper has FID 24.18 and CLIP .310 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_145m.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("145m", arg)

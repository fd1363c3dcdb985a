"""The 2B U-Net of arXiv 2404.01367 (base width 512), trained as there.

    ldm-scaling study --config=configs/t2i_2b.py --workdir=/mnt/disk/t2i_2b

Hardware: 256 TPU v5e chips (16x16), each block recomputed in the backward pass.
Hours: about 97 for the U-Net, an optimistic estimate that nothing has measured: 500k steps of
0.70 s, 0.24 s of it for what plain attention reads and writes (scaled from the 866M step).
Expected: the paper has FID 20.98 and CLIP .312 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_2b.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("2b", arg, remat="block")

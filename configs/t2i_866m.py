"""The 866M U-Net of arXiv 2404.01367 (base width 320), trained as there.

    ldm-scaling study --config=configs/t2i_866m.py --workdir=/mnt/disk/t2i_866m

Hardware: 256 TPU chips. Hours: 500k steps take at least 22 on v5e (16x16; 8.6 GB a chip), 9 on v5p
(4x8x8; 8.7 GB a chip), 7 on v6e (16x16; 8.6 GB a chip). These are bounds by the TPU compiler's
figures, not measurements: launch/plans.
Expected: the paper has FID 21.55 and CLIP .312 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_866m.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("866m", arg)

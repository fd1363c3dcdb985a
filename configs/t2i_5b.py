"""The 5B U-Net of arXiv 2404.01367 (base width 768), trained as there.

    ldm-scaling study --config=configs/t2i_5b.py --workdir=/mnt/disk/t2i_5b

Hardware: 256 TPU chips. Hours: 500k steps take at least 90 on v5e (16x16; 15.3 GB a chip), 40 on
v5p (4x8x8; 18.0 GB a chip), 24 on v6e (16x16; 17.7 GB a chip). These are bounds by the TPU
compiler's figures, not measurements: launch/plans.
Expected: the paper has FID 20.14 and CLIP .314 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_5b.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("5b", arg)

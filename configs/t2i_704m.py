"""The 704M U-Net of arXiv 2404.01367 (base width 288), trained as there.

    ldm-scaling study --config=configs/t2i_704m.py --workdir=/mnt/disk/t2i_704m

Hardware: 256 TPU chips. Hours: 500k steps take at least 19 on v5e (16x16; 8.3 GB a chip), 8 on v5p
(4x8x8; 8.4 GB a chip), 7 on v6e (16x16; 8.3 GB a chip). These are bounds by the TPU compiler's
figures, not measurements: launch/plans.
Expected: the paper has FID 21.82 and CLIP .312 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_704m.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("704m", arg)

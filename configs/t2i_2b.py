"""The 2B U-Net of arXiv 2404.01367 (base width 512), trained as there.

    ldm-scaling study --config=configs/t2i_2b.py --workdir=/mnt/disk/t2i_2b

Hardware: 256 TPU chips. Hours: 500k steps take at least 43 on v5e (16x16; 12.1 GB a chip), 19 on
v5p (4x8x8; 12.3 GB a chip), 13 on v6e (16x16; 11.9 GB a chip). These are bounds by the TPU
compiler's figures, not measurements: launch/plans.
Expected: the paper has FID 20.98 and CLIP .312 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

Earlier versions computed its blocks again in the backward pass: a workdir of theirs goes on with
--config.train.remat=block, in half of the memory at 1.2 times the seconds.

`configs/t2i_2b.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("2b", arg)

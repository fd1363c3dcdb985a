"""The 5B U-Net of arXiv 2404.01367 (base width 768), trained as there.

    ldm-scaling study --config=configs/t2i_5b.py --workdir=/mnt/disk/t2i_5b

Hardware: 256 TPU v5p chips (4x8x8; on 256 v5e chips its step does not fit in 16 GB).
Hours: about 47 for the U-Net, an optimistic estimate that nothing has measured: 500k steps of
0.34 s: 0.28 s with fused attention, by the TPU compiler's figures, and 0.07 s for what plain
attention reads and writes.
Expected: the paper has FID 20.14 and CLIP .314 (COCO-2014, 50-step DDIM, guidance 7.5). Its data
cannot be had; what this run reports is measured on its own pictures, with other networks.

`configs/t2i_5b.py:local` trains a tiny network on a CPU for a few steps.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("5b", arg)

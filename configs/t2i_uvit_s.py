"""U-ViT-S, text as tokens (arXiv 2209.12152), under the recipe of the paper's U-Nets.

    ldm-scaling train --config=configs/t2i_uvit_s.py --workdir=runs/t2i_uvit_s

The argument `local` is a small arm of the same for a CPU. Hardware and hours: `ldm-scaling plan`
says what fits; not run. Expected: whether the finding belongs to the U-Net is the paper's first
open question.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("uvit_s", arg)

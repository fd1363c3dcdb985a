"""SiT-S/2: the network of configs/t2i_dit_s2.py on the linear interpolant, predicting velocity
(arXiv 2401.08740), else under the recipe of the paper's U-Nets.

    ldm-scaling train --config=configs/t2i_sit_s2.py --workdir=runs/t2i_sit_s2

The argument `local` is a small arm of the same for a CPU. Hardware and hours: `ldm-scaling plan`
says what fits; not run. Expected: whether the finding belongs to the U-Net is the paper's first
open question.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("sit_s2", arg)

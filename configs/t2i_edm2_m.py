"""EDM2-M, the magnitude-preserving U-Net (arXiv 2312.02696), conditioned on text as EDM2 is on
classes, under the recipe of the paper's U-Nets.

    ldm-scaling train --config=configs/t2i_edm2_m.py --workdir=runs/t2i_edm2_m

The argument `local` is a small arm of the same for a CPU. Hardware and hours: `ldm-scaling plan`
says what fits; not run. Expected: whether the finding belongs to that U-Net is the paper's first
open question.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.text_to_image("edm2_m", arg)

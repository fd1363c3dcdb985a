"""Outpainting: stripes along one to four sides are filled in.

    ldm-scaling study --config=configs/outpainting.py:866m --workdir=runs/outpainting \
        --config.finetune.pretrained=runs/t2i_866m --config.data.source=photos:DIR

The argument is the size, any of configs/t2i_*.py; `866m,local` is a small arm of the same for a
CPU. Hardware and hours: as those of the size's own config, for a tenth of its steps at an eighth of
its batch; not run. Expected: not in the paper; nothing published is measured alike.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.conditioned("outpainting", arg)

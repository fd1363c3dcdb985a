"""Colourisation of grey images.

    ldm-scaling study --config=configs/colourisation.py:866m --workdir=runs/colourisation \
        --config.finetune.pretrained=runs/t2i_866m --config.data.source=photos:DIR

The argument is the size, any of configs/t2i_*.py; `866m,local` is a small arm of the same for a
CPU. Hardware: as that of the size's own config. Hours: a tenth of its steps at an eighth of its
batch, and in each the frozen encoder over every picture and its condition, which is 13 times
the FLOPs of training 39m, 0.9 of 866m, 0.2 of 5b; `ldm-scaling plan` says the least. Not run.
Expected: not in the paper; nothing published is measured alike.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.conditioned("colourisation", arg)

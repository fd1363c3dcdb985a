"""Four-fold super-resolution of real images, after Real-ESRGAN's degradation (section 3.2 of arXiv
2404.01367; Fig. 4, 5, 12 and 17).

    ldm-scaling study --config=configs/super_resolution.py:866m --workdir=runs/super_resolution \
        --config.finetune.pretrained=runs/t2i_866m --config.data.source=photos:DIR

The argument is the size, any of configs/t2i_*.py; `866m,local` is a small arm of the same for a
CPU. Hardware: as that of the size's own config. Hours: a tenth of its steps at an eighth of its
batch, and in each the frozen encoder over every picture and its condition, which is 13 times
the FLOPs of training 39m, 0.9 of 866m, 0.2 of 5b; `ldm-scaling plan` says the least. Not run.
Expected: quality grows with the pretrained size more than with the length of fine-tuning (Fig. 4).
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.conditioned("super_resolution", arg)

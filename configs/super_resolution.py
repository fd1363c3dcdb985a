"""Four-fold super-resolution of real images, after Real-ESRGAN's degradation (section 3.2 of arXiv
2404.01367; Fig. 4, 5, 12 and 17).

    ldm-scaling study --config=configs/super_resolution.py:866m --workdir=runs/super_resolution \
        --config.finetune.pretrained=runs/t2i_866m --config.data.source=photos:DIR

The argument is the size, any of configs/t2i_*.py; `866m,local` is a small arm of the same for a
CPU. Hardware and hours: as those of the size's own config, for a tenth of its steps at an eighth of
its batch; not run. Expected: quality grows with the pretrained size more than with the length of
fine-tuning (Fig. 4).
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.conditioned("super_resolution", arg)

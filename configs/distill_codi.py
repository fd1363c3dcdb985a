"""Conditional consistency distillation of one size (section 3.4 and Fig. 13 of arXiv 2404.01367).

    ldm-scaling study --config=configs/distill_codi.py:866m --workdir=runs/t2i_866m

The argument is the size, any of configs/t2i_*.py; the workdir is that of its training, which is
done there first where it is not done yet. `866m,local` is a small arm of the same for a CPU.
Hardware: as the size's own config; `ldm-scaling plan --kind=distill` says what fits. Hours: a
step takes 5/3 times the operations of one of training, at an eighth of its batch; not run.
Expected: four-step students as good as their teachers in 20 steps, at every size (Fig. 13).
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.distilled("codi", arg)

"""Latent consistency distillation of one size (arXiv 2310.04378): its student is told a guidance
rate.

    ldm-scaling study --config=configs/distill_lcm.py:866m --workdir=runs/t2i_866m

The argument is the size, any of configs/t2i_*.py; the workdir is that of its training, which is
done there first where it is not done yet. `866m,local` is a small arm of the same for a CPU.
Hardware: as the size's own config; `ldm-scaling plan --kind=distill` says what fits. Hours: a
step takes 2 times the operations of one of training, at an eighth of its batch; not run.
Expected: as with configs/distill_codi.py, the paper's method; a guided call is one evaluation.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.distilled("lcm", arg)

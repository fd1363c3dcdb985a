"""Guided distillation of one size (arXiv 2210.03142) to 16, 8 and 4 steps: Fig. 19 of arXiv
2404.01367.

    ldm-scaling study --config=configs/distill_guided.py:866m --workdir=runs/t2i_866m

The argument is the size, any of configs/t2i_*.py; the workdir is that of its training, which is
done there first where it is not done yet. `866m,local` is a small arm of the same for a CPU.
Hardware: as the size's own config; `ldm-scaling plan --kind=distill` says what fits. Hours: a
step takes 5/3 times the operations of one of training, at an eighth of its batch; not run.
Expected: students that gain at some sizes and lose at others (Fig. 19).
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    return recipes.distilled("guided", arg)

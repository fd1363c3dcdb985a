"""The whole study on a laptop: four widths, three samplers, in about 13 minutes on 2 CPU cores.

    ldm-scaling study --config=configs/demo.py --workdir=runs/demo

Expected: `report.html` in the workdir. What it shares with other demos is in
ldm_scaling/recipes.py.

The argument takes other backbones: `configs/demo.py:dit` (or sit, uvit, mmdit, edm2) has four
networks whose operations are those of the four U-Nets within a fifth, so that it should take about
as long (not timed); `configs/demo.py:families` a small and a large one of U-Net, DiT and U-ViT,
compared at equal cost. Costs are in units of the largest U-Net's. `sit` are DiT's networks on the
linear interpolant; any other becomes one of rectified flow too by
--config.diffusion.schedule=flow --config.diffusion.prediction=flow
--config.diffusion.timesteps=logit_normal.

`configs/demo.py:tiny` is the same in about a minute, for tests: its pictures are noise; `dit,tiny`
and the like are of that family.
"""

from ldm_scaling import recipes

MEMBERS = {
    "": ("c8", "c16", "c24", "c32"),
    "dit": ("dit_w40", "dit_w72", "dit_w104", "dit_w128"),
    "sit": ("sit_w40", "sit_w72", "sit_w104", "sit_w128"),
    "uvit": ("uvit_w32", "uvit_w56", "uvit_w80", "uvit_w104"),
    "mmdit": ("mmdit_d5", "mmdit_d7", "mmdit_d8", "mmdit_d10"),
    "edm2": ("edm2_c14", "edm2_c24", "edm2_c32", "edm2_c44"),
    "families": ("c8", "dit_w40", "uvit_w32", "c24", "dit_w104", "uvit_w80"),
}


def get_config(arg: str = ""):
    family, _, rest = arg.partition(",")
    if family == "tiny" and not rest:
        family, rest = "", "tiny"
    if family not in MEMBERS or rest not in ("", "tiny"):
        names = ", ".join(filter(None, MEMBERS))
        raise ValueError(
            f"configs/demo.py:{arg}: the argument is one of (none), tiny, {names}, or one of these "
            "with ,tiny behind it"
        )
    config = recipes.demo("_".join(filter(None, ("demo", family))))
    config.members = MEMBERS[family]
    config.reference = "c32"
    if family == "sit":
        recipes.straight(config)
    if family == "families":
        config.sweep.samplers = ("ddim", "dpmpp_2m")

    if rest == "tiny":
        recipes.tiny(config, *config.members[:2], pictures=128, steps=8, sample_every=8)
        config.reference = "c16"
        config.train.keep_steps = (4,)
        config.early.sampler, config.early.steps = "ddim", 2
        config.sample.num_images = 8
        config.sweep.samplers = ("ddim", "dpmpp_2m")
    return config

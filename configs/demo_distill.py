"""Distillation on a laptop: three widths pretrained from text, each the teacher of students that
need four steps, by consistency (the paper's Fig. 13) and by guided distillation (its Fig. 19).

    ldm-scaling study --config=configs/demo_distill.py --workdir=runs/distill

The networks are those of configs/demo.py, so that --workdir=runs/demo goes on from them. Hours:
about 23 minutes on two free cores, reckoned; docs/distillation.md has what a larger run of it took
and found.

`configs/demo_distill.py:tiny` is one width in a minute or two, for tests: its pictures are noise.
"""

from ldm_scaling import recipes


def get_config(arg: str = ""):
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/demo_distill.py:{arg}: the argument is one of: (none), tiny")
    config = recipes.demo("demo_distill")
    config.members = ("c8", "c12", "c16")
    config.reference = "c32"
    config.sweep.samplers = ("ddim",)
    config.sweep.steps = (4, 10, 20, 50)

    codi = config.consistency
    codi.method = "codi"
    codi.train.steps = 200
    codi.train.learning_rate = 5e-4
    codi.train.ema_decay = 0.95
    codi.sample.guidance = 2.0
    codi.sweep.steps = (1, 2, 4, 8)
    codi.sweep.guidance = (1.0, 2.0, 4.0)

    guided = config.halving
    guided.method = "guided"
    guided.rates = (1.0, 8.0)
    guided.guidance_dim = 32
    guided.steps = (8, 4)
    guided.imitation.steps = 100
    guided.imitation.learning_rate = 1e-3
    guided.imitation.ema_decay = 0.95
    guided.train.steps = 80
    guided.train.learning_rate = 5e-4
    guided.sample.guidance = 2.0
    guided.sweep.steps = (4,)
    guided.sweep.guidance = (1.0, 2.0, 4.0)

    for run in (codi.train, guided.imitation, guided.train):
        run.batch_size = 64
        run.warmup_steps = 20
        run.log_every = 20
        run.validate_every = 100
        run.checkpoint_every = 100
        run.sample_every = 200
    for part in (codi, guided):
        part.sweep.num_images = config.sweep.num_images
        part.sweep.batch_size = config.sweep.batch_size
        part.sweep.feature_side = config.sweep.feature_side

    if arg == "tiny":
        recipes.tiny(
            config, "c8", runs=(codi.train, guided.imitation, guided.train),
            samples=(codi.sample, guided.sample), sweeps=(codi.sweep, guided.sweep),
        )
        guided.steps = (2, 1)
        guided.sweep.steps = (1,)
    return config

"""The commands, and which module runs those that have a command line of their own."""

from __future__ import annotations

COMMANDS = {
    "zoo": "print the family: parameters, GFLOPs and cost, the published figures beside them",
    "prepare": "compose pictures or turn any collection of pairs into shards; encode the captions",
    "cache-latents": "encode all pictures and captions by the frozen encoders, over all devices",
    "train": "train the autoencoder, encode the pictures, train every member",
    "sample": "draw a labelled grid of pictures with trained members",
    "sweep": "measure every sampler, step count and guidance rate",
    "report": "draw the plots and write report.html from the records",
    "study": "all of these in order; started again, it goes on where it was",
    "dreambooth": "teach members subjects by a few pictures of each, then draw and score these",
    "figure": "draw the paper's figures and their tables of numbers from records alone",
    "convert": "turn published weights into an Orbax checkpoint that tells where it is from",
    "evaluate": "score any folder of images by FID and others, or by a published protocol",
    "pairs": "cut pairs for super-resolution and other conditions out of photographs",
    "upscale": "make pictures four times larger: bicubic, an ESRGAN, or a fine-tuned member",
    "restore": "fill in, colour, sharpen or clean pictures by a fine-tuned member",
    "plan": "what a job will need on TPUs or GPUs that are not here, by their own compiler",
    "cost": "parameters, FLOPs and measured seconds of each member on the device that is here",
    "rates": "train members at several learning rates: which is best at which width",
    "averages": "measure members with averages of several lengths: which is best at which size",
    "advise": "which size, sampler, steps and guidance for a budget, from records",
}

# Commands with flags of their own. `run(arguments, parse)` of the module does all with what stands
# after the command, and raises `UserError` for what the user can mend; `parse` reads the flags that
# are everyone's (--config, its overrides, --workdir) from those that it hands over.
OWN = {
    "evaluate": "ldm_scaling.study.evaluate_cli", "plan": "ldm_scaling.study.plan_cli",
    "cost": "ldm_scaling.study.cost_cli", "advise": "ldm_scaling.study.advise_cli",
    "figure": "ldm_scaling.study.figure_cli", "pairs": "ldm_scaling.study.pairs_cli",
    "rates": "ldm_scaling.study.rates_cli", "averages": "ldm_scaling.study.averages_cli",
    "upscale": "ldm_scaling.study.upscale_cli", "restore": "ldm_scaling.study.restore_cli",
}
# Those that keep nothing before they end; `plan --all` does.
KEEP_NOTHING = ("plan", "advise", "figure", "zoo", "convert")
# Commands that work in a workdir, in this order; they may run as several processes.
STAGES = tuple(c for c in COMMANDS if c not in ("zoo", "convert", *OWN))

"""The flags: who takes them, and how they are read."""

from __future__ import annotations

import os
import re
import sys

from ldm_scaling.cli.commands import STAGES
from ldm_scaling.errors import UserError, with_type
from ldm_scaling.study.arguments import pieces

# Those that take a config, and a workdir; the commands with flags of their own read these here too.
_CONFIGURED = (*STAGES, "evaluate", "plan", "cost", "rates", "averages", "upscale", "restore")
_IN_WORKDIR = (*STAGES, "evaluate", "advise", "figure", "rates", "averages", "upscale", "restore")
# Flags: the commands that take them, how they are written, what they are.
FLAGS = {
    "config": (
        _CONFIGURED, "--config=FILE[:argument]",
        "a file of configs/, e.g. configs/demo.py or configs/t2i_866m.py:local; a workdir knows "
        "the one that was last used in it",
    ),
    "workdir": (
        _IN_WORKDIR, "--workdir=DIR",
        "where everything is written; the same command goes on from what is there",
    ),
    "distributed": (
        STAGES, "--distributed[=HOST:PORT,K,N]",
        "runs as one of several processes, which the TPU pod, GKE or Slurm names, or process K "
        "of N where process 0 listens at HOST:PORT; all share the workdir",
    ),
    "prompt": (
        ("sample",), "--prompt=TEXT",
        "a caption, may be given several times; validation captions if not given",
    ),
    "sampler": (("sample",), "--sampler=dpmpp_2m,ddim:eta=1", "samplers, with their options"),
    "steps": (("sample",), "--steps=4,12,50", "step counts"),
    "guidance": (("sample",), "--guidance=1,3,5", "guidance rates; 1 is none"),
    "seeds": (
        ("sample",), "--seeds=0:8 | 0,3,5 | 4", "the seeds 0 to 7; these three; the one seed 4"
    ),
    "spacing": (("sample",), "--spacing=trailing", "timestep spacing"),
    "member": (("sample",), "--member=NAME", "networks; all of the config's if not given"),
    "kind": (
        ("convert",), "--kind=NAME",
        "sd_unet, sd_autoencoder, sd_text, tiny_decoder, clip_text, clip_image, t5, dino",
    ),
    "from": (
        ("convert",), "--from=PATH",
        "the published folder or file: .safetensors, or .ckpt, .pth, .bin, which torch reads",
    ),
    "ema": (("convert",), "--ema", "sd_unet of an original file: its average over training"),
    "side": (
        ("convert",), "--side=96",
        "sd_unet of an original file: of its latents, which no tensor tells; 64 if not given, 96 "
        "of a version 2 for pictures of 768",
    ),
    "model": (
        ("convert",), "--model=NAME", "clip_*, dino: which one, where the weights do not tell"
    ),
    "source": (
        ("prepare",), "--source=KIND:PATH",
        "a collection, in place of the config's; docs/data.md lists the kinds",
    ),
    "to": (
        ("convert", "prepare"), "--to=PATH",
        "the folder to make: of a converted network, or of shards for several workdirs",
    ),
    "workers": (
        ("prepare",), "--workers=N",
        "processes that examine pictures and write shards; one for each core if not given",
    ),
    "runner": (
        ("prepare",), "--runner=NAME",
        "prepares by Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, ...; what follows "
        "  --  are Beam's own options",
    ),
    "dry_run": (
        ("prepare",), "--dry-run",
        "only says what caching latents and text states would cost and save",
    ),
    "family": (
        ("zoo",), "--family=unet|dit|sit|uvit|mmdit|edm2", "which networks; the U-Nets if not given"
    ),
    "format": (("zoo", "prepare"), "--format=text|json", "how to print a table"),
}


def _define_flags():
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    for name in (
        "workdir", "spacing", "kind", "from", "to", "model", "source", "runner", "distributed",
        "family",
    ):
        flags.DEFINE_string(name, None, name, flag_values=values)
    for name in ("prompt", "sampler", "steps", "guidance", "seeds", "member"):
        flags.DEFINE_multi_string(name, [], name, flag_values=values)
    for name in ("ema", "dry_run"):
        flags.DEFINE_boolean(name, False, name, flag_values=values)
    flags.DEFINE_integer("workers", None, "processes", flag_values=values)
    flags.DEFINE_integer("side", None, "of latents", lower_bound=1, flag_values=values)
    flags.DEFINE_enum("format", "text", ["text", "json"], "of tables", flag_values=values)
    return values


def values_of(command: str, arguments: list[str]):
    """A command's flags, parsed. Raises `UserError` for one that it does not take."""
    values = _parse(arguments)
    for name, (commands, *_) in FLAGS.items():
        if values[name].present and command not in commands:
            raise UserError(
                f"ldm-scaling {command} takes no --{name}: it belongs to {', '.join(commands)}"
            )
    return values


def _number(name: str, piece: str, kind: type, example: str):
    try:
        return kind(piece)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name}: {piece!r} is not {what}; write  {example}") from None


def _seeds(texts: list[str]) -> list[int]:
    """`0:8` is 0 to 7, as a Python slice; a single number is that one seed."""
    example, out = "--seeds=0:8, --seeds=0,3,5 or --seeds=4", []
    for piece in pieces("--seeds", texts):
        start, *stop = (_number("seeds", part, int, example) for part in piece.split(":"))
        if len(stop) > 1 or (stop and not 0 <= start < stop[0]):
            raise UserError(f"--seeds: {piece!r} is no range of seeds; write  {example}")
        if stop and stop[0] - start > 10**6:
            raise UserError(f"--seeds: {piece!r} are too many; write  {example}")
        out += range(start, stop[0]) if stop else [start]
    return out


def sample_values(values) -> dict[str, object]:
    """The flags of `sample`, typed; those that are not given are None."""
    readers = {
        "sampler": lambda texts: pieces("--sampler", texts),
        "member": lambda texts: pieces("--member", texts),
        "seeds": _seeds,
        "steps": lambda texts: [
            _number("steps", piece, int, "--steps=12 or --steps=4,8,12")
            for piece in pieces("--steps", texts)
        ],
        "guidance": lambda texts: [
            _number("guidance", piece, float, "--guidance=5 or --guidance=1,3,5")
            for piece in pieces("--guidance", texts)
        ],
    }
    out = {name: read(values[name].value) if values[name].present else None
           for name, read in readers.items()}
    return {"prompts": values.prompt, "spacing": values.spacing, **out}


# What Python says of a value that does not fit, and what is said here.
_UNFIT = {
    r"invalid literal for int\(\) with base 10: (.*)": r"\1 is not a whole number",
    r"could not convert string to float: (.*)": r"\1 is not a number",
    r"\('Non-boolean argument to boolean flag', (.*)\)": r"\1 is neither true nor false",
}
_SHORT = {"--dry-run": "--dry_run", "--distributed": "--distributed=auto"}


def _home(argument: str) -> str:
    """A flag that names a config file, with its `~` expanded: few shells do so behind a `=`."""
    name, sign, value = argument.partition("=")
    return name + sign + os.path.expanduser(value) if name.lstrip("-") == "config" else argument


def _parse(arguments: list[str]):
    """Flags of a command line. Raises `UserError` in one line, with the nearest name."""
    from absl import flags

    values = _define_flags()
    arguments = [_home(_SHORT.get(argument, argument)) for argument in arguments]
    names = [argument.lstrip("-").split("=", 1)[0] for argument in arguments]
    overrides = [name for name in names if name.startswith("config.")]
    if overrides and "config" not in names:
        raise UserError(
            f"--{overrides[0]} changes a key of --config=FILE: give that too (what the workdir "
            "keeps is changed by no other way)"
        )
    for argument in arguments:
        # The config file is imported while flags are parsed: say first if it is not there.
        if argument.startswith("--config=") or argument.startswith("-config="):
            path = argument.split("=", 1)[1].split(":", 1)[0]
            if not os.path.isfile(path):
                away = path.startswith("configs/") and not os.path.isdir("configs")
                comes = "; configs/ comes with the repository, not with the package" if away else ""
                raise UserError(f"--config={path}: there is no such file{comes}")
    command_line, argv = ["ldm-scaling", *arguments], sys.argv
    try:
        sys.argv = command_line  # config_flags looks for its overrides there
        rest = values(command_line)
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        message = str(e.args[0] if e.args else e).strip()
        if message.startswith(("'", '"')):  # A KeyError shows the repr of its message.
            message = message[1:-1].replace("\\n", ": ").replace("\\'", "'")
        if "Traceback (most recent call last)" in message:  # of the config file
            message = message.splitlines()[-1].split("Error: ", maxsplit=1)[-1]
        message = " ".join(message.split())
        for theirs, ours in _UNFIT.items():
            message = re.sub(theirs, ours, message)
        raise UserError(f"{message} (see ldm-scaling --help)") from e
    except Exception as e:  # Whatever the config file raises.
        raise UserError(f"the config file cannot be read: {with_type(e)}") from e
    finally:
        sys.argv = argv
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; see  ldm-scaling --help")
    return values

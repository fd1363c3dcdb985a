"""The command line: `ldm-scaling COMMAND --workdir=DIR [--config=FILE[:argument] [overrides]]`."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable

COMMANDS = {
    "zoo": "print the family: parameters, GFLOPs and cost, the published figures beside them",
    "prepare": "compose pictures or turn any collection of pairs into shards; encode the captions",
    "cache-latents": "encode all pictures and captions by the frozen encoders, over all devices",
    "train": "train the autoencoder, encode the pictures, train every member",
    "sample": "draw a labelled grid of pictures with trained members",
    "sweep": "measure every sampler, step count and guidance rate",
    "report": "draw the plots and write report.html from the records",
    "study": "all of these in order; started again, it goes on where it was",
    "convert": "turn published weights into an Orbax checkpoint that tells where it is from",
    "evaluate": "score any folder of images by FID and others, or by a published protocol",
}

log = logging.getLogger("ldm_scaling")


class InternalError(Exception):
    """Something that is not the user's doing; the message says where the traceback is."""


STAGES = tuple(command for command in COMMANDS if command not in ("zoo", "convert"))
# Flags: the commands that take them, how they are written, what they are.
FLAGS = {
    "config": (
        STAGES, "--config=FILE[:argument]",
        "a file of configs/, e.g. configs/demo.py or configs/t2i_866m.py:local; a workdir knows "
        "the one that was last used in it",
    ),
    "workdir": (
        STAGES, "--workdir=DIR",
        "where everything is written; the same command goes on from what is there",
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
    "runner": (
        ("prepare",), "--runner=NAME",
        "prepares by Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, ...; what follows "
        "  --  are Beam's own options",
    ),
    "dry_run": (
        ("prepare",), "--dry-run",
        "only says what caching latents and text states would cost and save",
    ),
    "format": (("zoo", "prepare"), "--format=text|json", "how to print a table"),
}


def _table(rows: Iterable[tuple[str, str]], width: int = 29) -> list[str]:
    """Two columns of text, the right one broken so that lines stay under 100 characters."""
    out = []
    for left, right in rows:
        first, *rest = textwrap.wrap(right, 92 - width)
        out += [f"  {left:<{width}}  {first}", *(f"  {'':<{width}}  {line}" for line in rest)]
    return out


def usage() -> str:
    """The help text."""
    flags = {
        name: _table([(written, text)]) for name, (_, written, text) in FLAGS.items()
    }
    of = {
        command: [
            line for name, (commands, *_) in FLAGS.items()
            if command in commands and commands != STAGES for line in flags[name]
        ]
        for command in ("prepare", "sample", "convert", "zoo")
    }
    return "\n".join(
        [
            "ldm-scaling COMMAND --workdir=DIR [--config=FILE[:argument] [--config.KEY=VALUE ...]]",
            "",
            "A scaling study of latent diffusion models. The commands:",
            "",
            *_table(COMMANDS.items(), max(map(len, COMMANDS))),
            "",
            *flags["config"],
            *_table([("--config.KEY=VALUE", "changes a key of it, e.g. --config.train.steps=200")]),
            *flags["workdir"],
            *_table([("--help", "this text")]),
            "",
            "prepare takes besides; with --to or --dry-run it needs no workdir:",
            "",
            *of["prepare"],
            "",
            "sample draws one labelled grid. Several values, with commas or in a flag given again,",
            "make its axes; what is not given is as the config's sample says:",
            "",
            *of["sample"],
            "",
            "zoo and convert need neither config nor workdir:",
            "",
            *of["zoo"],
            *of["convert"],
            "",
            "evaluate has flags of its own: ldm-scaling evaluate --help",
        ]
    )


def _define_flags():
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    for name in ("workdir", "spacing", "kind", "from", "to", "model", "source", "runner"):
        flags.DEFINE_string(name, None, name, flag_values=values)
    for name in ("prompt", "sampler", "steps", "guidance", "seeds", "member"):
        flags.DEFINE_multi_string(name, [], name, flag_values=values)
    for name in ("ema", "dry_run"):
        flags.DEFINE_boolean(name, False, name, flag_values=values)
    flags.DEFINE_enum("format", "text", ["text", "json"], "of tables", flag_values=values)
    return values


def _values(command: str, arguments: list[str]):
    """A command's flags, parsed. Raises `UserError` for one that it does not take."""
    from ldm_scaling.errors import UserError

    values = _parse(arguments)
    for name, (commands, *_) in FLAGS.items():
        if values[name].present and command not in commands:
            raise UserError(
                f"ldm-scaling {command} takes no --{name}: it belongs to {', '.join(commands)}"
            )
    return values


def _pieces(name: str, texts: list[str]) -> list[str]:
    """The values of a flag that takes a list, given once or several times.

    A comma parts samplers except before `option=`: `ddim:eta=0.5,final=zero,heun` are two.
    """
    from ldm_scaling.errors import UserError

    comma = r",(?!\s*\w+=)" if name == "sampler" else ","
    out = [piece.strip() for text in texts for piece in re.split(comma, text)]
    if "" in out:
        raise UserError(f"--{name}={','.join(texts)}: a value is missing")
    return out


def _number(name: str, piece: str, kind: type, example: str):
    from ldm_scaling.errors import UserError

    try:
        return kind(piece)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"--{name}: {piece!r} is not {what}; write  {example}") from None


def _seeds(texts: list[str]) -> list[int]:
    """`0:8` is 0 to 7, as a Python slice; a single number is that one seed."""
    from ldm_scaling.errors import UserError

    example, out = "--seeds=0:8, --seeds=0,3,5 or --seeds=4", []
    for piece in _pieces("seeds", texts):
        start, *stop = (_number("seeds", part, int, example) for part in piece.split(":"))
        if len(stop) > 1 or (stop and not 0 <= start < stop[0]):
            raise UserError(f"--seeds: {piece!r} is no range of seeds; write  {example}")
        if stop and stop[0] - start > 10**6:
            raise UserError(f"--seeds: {piece!r} are too many; write  {example}")
        out += range(start, stop[0]) if stop else [start]
    return out


def _sample_values(values) -> dict[str, object]:
    """The flags of `sample`, typed; those that are not given are None."""
    readers = {
        "sampler": lambda texts: _pieces("sampler", texts),
        "member": lambda texts: _pieces("member", texts),
        "seeds": _seeds,
        "steps": lambda texts: [
            _number("steps", piece, int, "--steps=12 or --steps=4,8,12")
            for piece in _pieces("steps", texts)
        ],
        "guidance": lambda texts: [
            _number("guidance", piece, float, "--guidance=5 or --guidance=1,3,5")
            for piece in _pieces("guidance", texts)
        ],
    }
    out = {name: read(values[name].value) if values[name].present else None
           for name, read in readers.items()}
    return {"prompts": values.prompt, "spacing": values.spacing, **out}


def _parse(arguments: list[str]):
    """Flags of a command line. Raises `UserError` in one line, with the nearest name."""
    from absl import flags

    from ldm_scaling.errors import UserError

    values = _define_flags()
    arguments = ["--dry_run" if a == "--dry-run" else a for a in arguments]
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
                raise UserError(f"--config={path}: there is no such file")
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
        raise UserError(f"{message} (see ldm-scaling --help)") from e
    except Exception as e:  # Whatever the config file raises.
        raise UserError(f"the config file cannot be read: {_first_line(e)}") from e
    finally:
        sys.argv = argv
    if len(rest) > 1:
        raise UserError(f"unknown argument {rest[1]!r}; see  ldm-scaling --help")
    return values


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _run(command: str, arguments: list[str]) -> None:
    from ldm_scaling.errors import UserError

    if command == "evaluate":
        from ldm_scaling.study import evaluate_cli

        evaluate_cli.run(arguments, functools.partial(_values, command))
        return
    arguments, rest = _parted(arguments)
    values = _values(command, arguments)
    if rest and not values.runner:
        raise UserError("what follows  --  are options of Apache Beam: give --runner=NAME too")
    if command == "zoo":
        from ldm_scaling.models import zoo_table

        if values.format == "json":
            print(json.dumps(zoo_table.rows(), indent=1))
        else:
            print(zoo_table.text())
        return
    if command == "convert":
        from ldm_scaling.models import converted

        missing = [name for name in ("kind", "from", "to") if not values[name].value]
        if missing:
            raise UserError(f"ldm-scaling convert needs --{missing[0]}; see  ldm-scaling --help")
        place = values["from"].value, values["to"].value
        print(converted.write(values.kind, *place, ema=values.ema, model=values.model))
        return
    if command == "prepare" and values.to and values.dry_run:
        raise UserError("--dry-run makes nothing, and --to says where to: leave out one of them")
    elsewhere = command == "prepare" and bool(values.to or values.dry_run)
    if not (values.workdir or (elsewhere and values.config)):
        what = "--config or --workdir" if elsewhere else "--workdir"
        raise UserError(f"ldm-scaling {command} needs {what}; see  ldm-scaling --help")
    sample_values = _sample_values(values)

    from ldm_scaling import config
    from ldm_scaling.parallel import hosts

    hosts.use_cpu_cores()
    from ldm_scaling.study import prepare_cli, stages
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(values.workdir or ".")
    study = config.parse(values.config) if values.config else workdir.last_config()
    study = prepare_cli.with_source(study, values.source)
    if values.to:
        prepare_cli.to_folder(study, values.to, values.runner, rest)
        return
    materials = stages.check(study, workdir, measured=not values.dry_run)
    if values.dry_run:
        print(prepare_cli.dry_run(materials, values.format))
        return
    if command == "report":
        stages.require_records(materials)
    lock = workdir.lock()
    workdir.bind(materials.study)
    with lock, workdir.log_to_file():
        started = time.perf_counter()
        log.info("ldm-scaling %s %s", command, " ".join(arguments))
        try:
            if command == "prepare":
                prepare_cli.in_workdir(materials, values.runner, rest)
                stages.prepare(materials)
            elif command == "cache-latents":
                print("\n".join(stages.cache_latents(materials)))
            elif command == "train":
                stages.train(materials)
            elif command == "sample":
                print("\n".join(stages.sample(materials, **sample_values)))
            elif command == "sweep":
                stages.run_sweep(materials)
            elif command == "report":
                print(stages.run_report(materials))
            else:
                print(stages.study_all(materials))
        except UserError:
            log.error("%s stopped:\n%s", command, traceback.format_exc())
            raise
        except Exception as e:
            log.error("%s stopped:\n%s", command, traceback.format_exc())
            raise InternalError(
                f"{_first_line(e)} (unexpected; the traceback is in {workdir / 'log.txt'}; what "
                "was finished is kept, the same command goes on from it)"
            ) from e
        log.info("%s took %.1f s", command, time.perf_counter() - started)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status.

    0; 2 after a one-line error that the user can mend; 1 after one that is not the user's doing;
    130 after Ctrl-C; 143 after SIGTERM in training, when its checkpoint is written.
    """
    argv = sys.argv[1:] if argv is None else argv
    asked = "--help" in argv and argv[0] != "evaluate"
    if not argv or argv[0] in ("help", "-h", "-help") or asked:
        print(usage())
        return 0 if argv else 2
    command, arguments = argv[0], argv[1:]
    from ldm_scaling.errors import Interrupted, UserError

    try:
        if command not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {hint}")
        _run(command, arguments)
    except UserError as e:
        message = "; ".join(line.strip() for line in str(e).splitlines())
        print(f"ldm-scaling: error: {message}", file=sys.stderr)
        return 2
    except InternalError as e:
        print(f"ldm-scaling: error: {e}", file=sys.stderr)
        return 1
    except Exception as e:  # Before there is a workdir to log to.
        print(f"ldm-scaling: error: {_first_line(e)} (unexpected)", file=sys.stderr)
        return 1
    except Interrupted as e:
        print(f"ldm-scaling: {e}; the same command goes on from here", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("ldm-scaling: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())

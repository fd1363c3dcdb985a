"""The command line: `ldm-scaling COMMAND --config=FILE[:argument] --workdir=DIR [overrides]`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback

COMMANDS = {
    "zoo": "print the family: parameters, GFLOPs and cost, the published figures beside them",
    "prepare": "render and caption the pictures, encode the captions",
    "train": "train the autoencoder, encode the pictures, train every member",
    "sample": "draw a grid of pictures with every trained member",
    "sweep": "measure every sampler, step count and guidance rate",
    "report": "draw the plots and write report.html from the records",
    "study": "all of these in order; started again, it goes on where it was",
}

log = logging.getLogger("ldm_scaling")


class InternalError(Exception):
    """Something that is not the user's doing; the message says where the traceback is."""


def usage() -> str:
    """The help text."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "ldm-scaling COMMAND --config=FILE[:argument] --workdir=DIR [--config.KEY=VALUE ...]",
            "",
            "A scaling study of latent diffusion models. The commands:",
            "",
            *lines,
            "",
            "  --config=FILE[:argument]   a file of configs/, e.g. configs/demo.py or",
            "                             configs/t2i_866m.py:local",
            "  --config.KEY=VALUE         changes one key, e.g. --config.train.steps=200",
            "  --workdir=DIR              where everything is written; the same command goes on",
            "                             from what is there",
            "  --prompt=TEXT              sample: a caption to draw, may be given several times",
            "  --format=text|json         zoo: how to print",
            "  --help                     this text",
        ]
    )


def _define_flags():
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "config file", flag_values=values)
    flags.DEFINE_string("workdir", None, "workdir", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "captions", flag_values=values)
    flags.DEFINE_enum("format", "text", ["text", "json"], "of the zoo", flag_values=values)
    return values


def _parse(arguments: list[str]):
    """Flags of a command line. Raises `UserError` in one line, with the nearest name."""
    from absl import flags

    from ldm_scaling.errors import UserError

    values = _define_flags()
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


def _run(command: str, arguments: list[str]) -> None:
    from ldm_scaling.errors import UserError

    values = _parse(arguments)
    if command == "zoo":
        from ldm_scaling.models import zoo_table

        if values.format == "json":
            print(json.dumps(zoo_table.rows(), indent=1))
        else:
            print(zoo_table.text())
        return
    for name in ("config", "workdir"):
        if not values[name].value:
            raise UserError(f"ldm-scaling {command} needs --{name}; see  ldm-scaling --help")

    from ldm_scaling import config
    from ldm_scaling.parallel import hosts

    hosts.use_cpu_cores()
    from ldm_scaling.study import stages
    from ldm_scaling.study.workdir import Workdir

    study, workdir = config.parse(values.config), Workdir(values.workdir)
    materials = stages.check(study, workdir)
    if command == "report":
        stages.require_records(materials)
    workdir.bind(study)
    with workdir.lock(), workdir.log_to_file():
        started = time.perf_counter()
        log.info("ldm-scaling %s %s", command, " ".join(arguments))
        try:
            if command == "prepare":
                stages.prepare(materials)
            elif command == "train":
                stages.train(materials)
            elif command == "sample":
                print("\n".join(stages.sample(materials, list(values.prompt))))
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
    130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("help", "-h", "-help", "--help") or "--help" in argv:
        print(usage())
        return 0 if argv else 2
    command, arguments = argv[0], argv[1:]
    from ldm_scaling.errors import UserError

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
    except KeyboardInterrupt:
        print("ldm-scaling: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())

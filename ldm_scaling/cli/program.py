"""A command line from its words to the exit status."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from ldm_scaling import __version__, machine
from ldm_scaling.cli import flags
from ldm_scaling.cli.commands import COMMANDS, KEEP_NOTHING, OWN
from ldm_scaling.cli.usage import usage
from ldm_scaling.errors import (
    AGAIN,
    ANEW,
    SAVED,
    STALLED,
    UNREAD,
    ApartError,
    Interrupted,
    UserError,
    with_type,
)

log = logging.getLogger("ldm_scaling")

# Python waits for threads at its end, and one that writes to a store which hangs never ends.
_ENDING_S = 30.0
# After so long a SIGTERM that was not heard ends the process where it is.
_UNHEARD_S = 20.0
# What stopped the process. Where it came into JAX's tracing or compiling, some of what its frames
# hold cannot be taken down, and would crash.
_STOPPED: list[BaseException] = []
# What signals are written to, and what handles SIGTERM then: see `_terminated_is_raised`.
_MOUTHS: dict[int, Callable[..., None]] = {}
# What the system says of a path that is another kind of thing, or another user's.
_PLACES = (NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)


class InternalError(Exception):
    """Something that is not the user's doing; the message says where the traceback is."""


def _parted(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and after `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _run(command: str, arguments: list[str]) -> None:
    machine.quiet_cuda()
    # Whether there are others, `processes` says later.
    several = any(a.lstrip("-").split("=", 1)[0] == "distributed" for a in arguments)
    with _told(not several, _after(command, arguments)):
        if command in OWN:
            module = importlib.import_module(OWN[command])
            module.run(arguments, functools.partial(flags.values_of, command))
        else:
            _by_flags(command, arguments)


def _told(alone: bool, after: str = AGAIN) -> contextlib.AbstractContextManager[None]:
    """What hears of SIGTERM in one process. Several leave it to jax's service, which training's
    loop and `processes` ask."""
    return _terminated_is_raised(after) if alone else contextlib.nullcontext()


def _by_flags(command: str, arguments: list[str]) -> None:
    """A command whose flags are `flags`' own."""
    arguments, rest = _parted(arguments)
    values = flags.values_of(command, arguments)
    if rest and not values.runner:
        raise UserError("what follows  --  are options of Apache Beam: give --runner=NAME too")
    if values.runner:  # First: its extra holds what collections need too.
        from ldm_scaling.data.preparing import beam

        beam.require()
    if command == "zoo":
        from ldm_scaling.models import zoo_table

        if values.format == "json":
            print(json.dumps(zoo_table.rows(values.family or "unet"), indent=1))
        else:
            print(zoo_table.text(values.family or "unet"))
        return
    if command == "convert":
        from ldm_scaling.models import converted

        missing = [name for name in ("kind", "from", "to") if not values[name].value]
        if missing:
            raise UserError(f"ldm-scaling convert needs --{missing[0]}; see  ldm-scaling --help")
        place = values["from"].value, values["to"].value
        options = {name: values[name].value for name in ("ema", "side", "model")}
        print(converted.write(values.kind, *place, **options))
        return
    if command == "prepare" and values.to and values.dry_run:
        raise UserError("--dry-run makes nothing, and --to says where to: leave out one of them")
    elsewhere = command == "prepare" and bool(values.to or values.dry_run)
    if not (values.workdir or (elsewhere and values.config)):
        what = "--config or --workdir" if elsewhere else "--workdir"
        raise UserError(f"ldm-scaling {command} needs {what}; see  ldm-scaling --help")
    if elsewhere and values.distributed:
        raise UserError(
            f"prepare --{'to' if values.to else 'dry-run'} is the work of one process: leave out "
            "--distributed (Apache Beam shares it out, see --runner)"
        )
    _in_workdir(command, arguments, rest, values)


def _in_workdir(command: str, arguments: list[str], rest: list[str], values: Any) -> None:
    """A command on a study; `arguments` are told in its log."""
    if values.distributed == "":  # Such as of a variable that is not set.
        raise UserError(
            "--distributed= says nothing: write --distributed=HOST:PORT,K,N, --distributed alone, "
            "or leave it out"
        )
    sample_values = flags.sample_values(values)

    import jax

    from ldm_scaling import files
    from ldm_scaling.parallel import hosts, processes

    hosts.begin(values.workdir if values.distributed else None)
    if values.distributed:
        processes.initialize(values.distributed)
        files.show_progress(hosts.is_lead())
    from ldm_scaling.study import api, prepare_cli, stages
    from ldm_scaling.study.workdir import Workdir

    workdir = Workdir(values.workdir or ".")
    study = workdir.study(values.config, values.source or "")
    if values.to:
        prepare_cli.to_folder(study, values.to, values.runner, rest, values.workers)
        return
    with processes.lead_first("check"):
        prompted = command == "sample" and bool(values.prompt)
        materials = api.check(command, study, workdir, prompted, dry=values.dry_run)
    if values.dry_run:
        print(prepare_cli.dry_run(materials, values.format))
        return
    if command == "report":
        stages.require_records(materials)
    with processes.lead_first("bind"):
        lock = contextlib.nullcontext()
        if hosts.is_lead():
            lock = workdir.lock()
            workdir.bind(materials.study)
    told = _told(bool(values.distributed) and not processes.several())  # Else it hears already.
    with lock, workdir.log_to_file(jax.process_index()), told:
        started = time.perf_counter()
        log.info("ldm-scaling %s %s", command, " ".join(arguments))
        try:
            lines = _stage(command, materials, values, rest, sample_values)
            processes.barrier("done")
        except UserError:
            log.error("%s stopped:\n%s", command, traceback.format_exc())
            raise
        except Exception as e:
            log.error("%s stopped:\n%s", command, traceback.format_exc())
            raise InternalError(
                f"{with_type(e)} (unexpected; the traceback is in "
                f"{workdir.log_file(jax.process_index())}; what was finished is kept, the same "
                "command goes on from it)"
            ) from e
        log.info("%s took %.1f s", command, time.perf_counter() - started)
    if hosts.is_lead():
        print("\n".join(lines), end="\n" if lines else "")


def _stage(
    command: str, materials: Any, values: Any, rest: list[str], sample_values: dict[str, Any]
) -> list[str]:
    """Runs a command; returns what it prints."""
    from ldm_scaling.parallel import processes
    from ldm_scaling.study import api, prepare_cli

    if command == "prepare":
        processes.from_lead(
            "prepare",
            lambda: prepare_cli.in_workdir(materials, values.runner, rest, values.workers),
        )
    return api.do(command, materials, **(sample_values if command == "sample" else {}))


def _after(command: str, arguments: list[str]) -> str:
    """What follows on a command that was told to end."""
    keeps = command not in KEEP_NOTHING or (command == "plan" and "--all" in arguments)
    return AGAIN if keeps else ANEW


@contextlib.contextmanager
def _terminated_is_raised(after: str = AGAIN) -> Iterator[None]:
    """SIGTERM raises `Interrupted` inside, where this thread gets signals. All files are written
    whole or not at all, so nothing is lost but what is under way; training's own loop saves that.

    Python raises once this thread is back from what it calls, which XLA's compiling keeps for
    minutes, and drops what is raised while garbage is collected, where JAX has a callback. A thread
    hears of the signal as it comes, and ends the process where it is if it is still inside after
    `_UNHEARD_S`; not where another handler, such as training's, has taken this one's place.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    why, came, left = "stopped by SIGTERM", threading.Event(), threading.Event()
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def stop(*unused) -> None:
        came.set()
        raise Interrupted(why)

    def listen() -> None:
        while (number := os.read(ear, 1)) and not left.is_set():
            if others != -1:
                with contextlib.suppress(OSError):
                    os.write(others, number)
            told = ord(number) == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is stop
            if told and not left.wait(_UNHEARD_S):
                _say(f"{why}{after}")
                os._exit(SAVED)

    others = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    _MOUTHS[mouth] = stop
    before = signal.signal(signal.SIGTERM, stop)
    listener = threading.Thread(target=listen, daemon=True, name="sigterm")
    listener.start()
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if came.is_set():  # C code that the signal's exception passes may make another of it.
            raise Interrupted(why) from e
        raise
    finally:
        left.set()
        signal.signal(signal.SIGTERM, before)
        signal.set_wakeup_fd(others)
        del _MOUTHS[mouth]
        with contextlib.suppress(BlockingIOError):  # Full: it wakes all the same.
            os.write(mouth, b"\0")
        listener.join()
        os.close(mouth)
        os.close(ear)


def _forked() -> None:
    """What a forked process hears is not its parent's, whose pipe it has too, and ends it."""
    if signal.getsignal(signal.SIGTERM) in _MOUTHS.values():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (mouth := signal.set_wakeup_fd(-1)) not in {-1, *_MOUTHS}:
        signal.set_wakeup_fd(mouth)


os.register_at_fork(after_in_child=_forked)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status.

    0; 2 after a one-line error that the user can mend; 1 after one that is not the user's doing;
    130 after Ctrl-C; 75 after SIGTERM, when what is done is saved: the same command goes on from
    there, or begins anew where it keeps nothing. 76 where processes do not come together or lose
    each other, and, by training's watchdog, when a step stalls: the same command goes on from the
    last checkpoint. 141, without a word, where whoever read the output, `head` say, has ended. One
    of several processes ends at once instead of returning, unless all is done.
    """
    machine.print_any_sign()
    argv = sys.argv[1:] if argv is None else argv
    asked = not argv or argv[0] in ("-h", "-help") or ("--help" in argv and argv[0] not in OWN)
    status, why = _status("help" if asked else argv[0], argv[1:])
    if why:
        _say(why)
        if (processes := sys.modules.get("ldm_scaling.parallel.processes")) is not None:
            processes.leave(status, why.removesuffix(AGAIN))  # Each process says it once.
    return status if argv else status or 2


def _say(why: str) -> None:
    """Writes a line to standard error, below progress bars that nobody has closed."""
    if (bars := sys.modules.get("tqdm")) is not None:
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            bar.close()
    print(f"ldm-scaling: {why}", file=sys.stderr, flush=True)


def _status(command: str, arguments: list[str]) -> tuple[int, str]:
    """The exit status of a command, and what is to be said of it."""
    try:
        if command == "help":
            print(usage())
            return 0, ""
        if command == "--version":
            print(f"ldm-scaling {__version__}, jax {importlib.metadata.version('jax')}")
            return 0, ""
        if command not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {command!r}; {hint}")
        _run(command, arguments)
    except UserError as e:
        return 2, "error: " + "; ".join(line.strip() for line in str(e).splitlines())
    except InternalError as e:
        return 1, f"error: {e}"
    except Exception as e:  # Before there is a workdir to log to.
        if isinstance(e, _PLACES) and e.filename:
            return 2, f"error: cannot use {e.filename}: {e.strerror}; name another place"
        if isinstance(e, BrokenPipeError) and _unread():
            return UNREAD, ""
        return 1, f"error: {with_type(e)} (unexpected)"
    except ApartError as e:
        return STALLED, f"error: {e}"
    except Interrupted as e:
        _STOPPED.append(e)
        return SAVED, f"{e}{_after(command, arguments)}"
    except KeyboardInterrupt as e:
        _STOPPED.append(e)
        return 130, f"stopped{_after(command, arguments)}"
    return 0, ""


def _unread() -> bool:
    """Whether whoever read the output has ended."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def entry() -> None:
    """The console script. After an error its end takes `_ENDING_S` at most."""
    status = main()
    if status:
        ending = threading.Timer(_ENDING_S, os._exit, (status,))
        ending.daemon = True
        ending.start()
    try:
        sys.stdout.flush()
    except OSError as e:
        if not status and not isinstance(e, BrokenPipeError):
            print(f"ldm-scaling: error: cannot write the output: {e.strerror}", file=sys.stderr)
        status = status or (UNREAD if isinstance(e, BrokenPipeError) else 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more.
    if _STOPPED:
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

"""What all launchers share: exit statuses, the job's command, names, secrets, dry runs.

    python3 launch/common.py check-job -- ARGUMENTS    # status 2 if they make no job
    python3 launch/common.py check-job --on-hosts [--mounted] -- ARGUMENTS    # or none of hosts
    python3 launch/common.py variables --env=NAME=VALUE ... --secret=VARIABLE=NAME ...

Standard library only: a launcher runs on a laptop that has nothing installed.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOUNT = "/mnt/ldm"  # where launchers mount a bucket

# Exit statuses of `ldm-scaling`, see docs/launch.md.
DONE = 0
USER = 2  # the user must mend something: never start again
SAVED = 75  # saved after SIGTERM or a preemption notice: the same command goes on
INTERRUPTED = 130  # Ctrl-C
UNREAD = 141  # who read the output has ended

# Commands of `ldm-scaling` that several processes share; each of the others is one process's.
SHARED = ("prepare", "cache-latents", "train", "sample", "sweep", "report", "study", "dreambooth")

# Names of variables and flags whose values are not for manifests, logs or the screen.
SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private_?key", re.I)


class LaunchError(ValueError):
    """Something the user gave is wrong; the message is one line and says what to do."""


def entry(main: Callable[[list[str]], int]) -> None:
    """Runs a script's `main`; a `LaunchError` is one line and status 2, Ctrl-C is 130, output that
    nobody reads any more 141."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(status)
    except LaunchError as e:
        print(f"launch/{pathlib.Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(USER)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more.
        sys.exit(UNREAD)


def parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and after `--` the job's."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def check_job(job: Sequence[str]) -> None:
    """Raises `LaunchError` when a command of `ldm-scaling` and its flags are no job: something is
    missing, a secret stands in it, or one process does it alone."""
    if not job or job[0].startswith("-"):
        raise LaunchError("after  --  goes the job: -- train --config=FILE --workdir=DIR")
    if job[0] not in SHARED:
        raise LaunchError(f"{job[0]} is none of what several processes do: {', '.join(SHARED)}")
    own, _ = parted(job)
    if any(a.split("=")[0] == "--distributed" for a in own):
        raise LaunchError("leave out --distributed: the launcher gives it")
    there = workdirs(job)
    if not there:
        raise LaunchError("the job needs --workdir=DIR, on a file system that all hosts see")
    for workdir in there:
        check_workdir(workdir)
    check_no_secret(job)


def workdirs(job: Sequence[str]) -> list[str]:
    """Those that a job is given, one if it is right."""
    own, _ = parted(job)
    return [a.removeprefix("--workdir=") for a in own if a.startswith("--workdir=")]


def job_command(job: Sequence[str], distributed: str = "--distributed") -> list[str]:
    """`train --config=... --workdir=...` -> the command of every process.

    The flag comes right behind the command's name: behind a job's own `--` it would be Beam's.
    Raises as `check_job`.
    """
    check_job(job)
    return ["ldm-scaling", job[0], distributed, *job[1:]]


def check_workdir(path: str) -> None:
    """Raises `LaunchError` for a URL: a bucket must be mounted."""
    if "://" in path:
        raise LaunchError(
            f"--workdir={path}: buckets are not written directly: mount it (launchers do by "
            "--bucket=NAME, at /mnt/ldm; elsewhere gcsfuse) and give the path there"
        )


def is_mounted(path: str) -> bool:
    """Whether a path lies where launchers mount a bucket."""
    path = posixpath.normpath(path)
    return path == MOUNT or path.startswith(f"{MOUNT}/")


def check_on_hosts(workdir: str, mounted: bool) -> None:
    """Raises `LaunchError` for a workdir that each host would have for itself.

    Args:
      workdir: of a job on TPU VMs.
      mounted: whether the launcher mounts a bucket there, or did; what a user mounts elsewhere is
        the user's.
    """
    if not workdir.startswith("/"):
        raise LaunchError(
            f"--workdir={workdir}: on each host that is a folder of its own, which the next setup "
            f"may delete: give a path from / on what all hosts share, such as {MOUNT}/NAME with "
            "--bucket=B"
        )
    if is_mounted(workdir) and not mounted:
        raise LaunchError(
            f"--workdir={workdir}: nothing is mounted there, so that each host would have its own, "
            f"which goes with it: give --bucket=B, which is mounted at {MOUNT}"
        )


def bucket_name(text: str) -> str:
    """`B` or `gs://B` -> `B`. Raises `LaunchError` for what is no bucket's name."""
    name = text.removeprefix("gs://").removesuffix("/")
    if text and not re.fullmatch(r"[a-z0-9][-a-z0-9_.]*", name):
        raise LaunchError(
            f"--bucket={text}: give a bucket's name, of small letters, digits, -_., without a "
            "folder"
        )
    return name


def check_name(name: str, most: int = 40) -> str:
    """A job's name: what Kubernetes, Slurm and the TPU API all take."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > most:
        raise LaunchError(
            f"--name={name}: use small letters, digits and -, a letter first, at most {most}"
        )
    return name


def check_no_secret(texts: Iterable[str], environment: Mapping[str, str] = os.environ) -> None:
    """Raises `LaunchError` when a text holds a secret: by its own name or by a variable's value.

    The message names the flag or the variable, never the value.
    """
    known = {n: v for n, v in environment.items() if SECRET.search(n) and len(v) >= 8}
    remedy = "pass the names: --secret=VARIABLE=NAME, see docs/launch.md"
    for text in texts:
        name, equals, _ = text.partition("=")
        if equals and SECRET.search(name):
            raise LaunchError(f"{name}: a secret's value would be written down; {remedy}")
        for variable, value in known.items():
            if value in text:
                raise LaunchError(f"an argument holds the value of ${variable}; {remedy}")


def plain_environment(pairs: Sequence[str]) -> dict[str, str]:
    """`--env=NAME=VALUE` flags. Raises `LaunchError` for a secret."""
    check_no_secret(pairs)
    return dict(_pair("env", pair, "NAME=VALUE") for pair in pairs)


def secret_names(pairs: Sequence[str]) -> dict[str, str]:
    """`--secret=VARIABLE=NAME` flags: the variable, and what the store calls its value."""
    out = dict(_pair("secret", pair, "VARIABLE=NAME") for pair in pairs)
    check_no_secret(out.values())
    for name in out.values():
        if not re.fullmatch(r"[A-Za-z0-9][-A-Za-z0-9_.]*(:[-A-Za-z0-9_.]+)?", name):
            raise LaunchError("--secret: after VARIABLE= goes the secret's name, not its value")
    return out


def _pair(flag: str, text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise LaunchError(f"--{flag}: write  --{flag}={example}")
    return name, value


def run(command: Sequence[str], dry: bool, text: str | None = None) -> int:
    """Runs a command, or only prints it (and what would go to its standard input)."""
    if dry:
        if text is not None:
            print(text.rstrip())
        print(shlex.join(command))
        return 0
    try:
        return subprocess.run(command, input=text, text=True).returncode
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not installed; docs/launch.md says what is") from None


def main(arguments: list[str]) -> int:
    """What the shell scripts ask for."""
    own, rest = parted(arguments)
    if own[:1] == ["check-job"] and set(own[1:]) <= {"--on-hosts", "--mounted"}:
        check_job(rest)
        for workdir in workdirs(rest) if "--on-hosts" in own else ():
            check_on_hosts(workdir, "--mounted" in own)
    elif own[:1] == ["variables"]:
        given = {flag: [a.removeprefix(flag) for a in own[1:] if a.startswith(flag)]
                 for flag in ("--env=", "--secret=")}
        for name, value in plain_environment(given["--env="]).items():
            print(f"export {name}={shlex.quote(value)}")
        for variable, name in secret_names(given["--secret="]).items():
            fetch = f"gcloud secrets versions access latest --secret={shlex.quote(name)}"
            print(f'{variable}="$({fetch})"; export {variable}')
    else:
        raise LaunchError("write  python3 launch/common.py check-job -- ARGUMENTS")
    return 0


if __name__ == "__main__":
    # The very module that others import: its LaunchError is theirs.
    sys.path.insert(0, str(ROOT))
    from launch import common

    common.entry(common.main)

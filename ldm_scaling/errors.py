"""Errors that a user can mend, and the word that a process should end."""

import pathlib

# Exit statuses that tell a launcher to start the same command again: what was done is saved
# (sysexits.h calls it a temporary failure); processes stalled or lost each other, and nothing was
# saved since the last checkpoint.
SAVED = 75
STALLED = 76
# As a shell tells of SIGPIPE: who read the output has ended.
UNREAD = 141
# Said after what ended a process that was told to end.
AGAIN = "; the same command goes on from here"
# The same, of one that keeps nothing before its end.
ANEW = "; the same command begins anew"

# There where the package is used from the repository that it lies in.
_CHECKOUT = pathlib.Path(__file__).parents[1] / "pyproject.toml"


class UserError(ValueError):
    """Something the user gave is wrong: a config key, a file, a missing package.

    The message is one line that names the value or the file, says what is wrong with it and what
    to do. The command line prints it without a traceback and exits with status 2.
    """


class MissingPackageError(UserError):
    """A package that carries data or weights is not installed."""

    def __init__(self, package: str, needed_for: str, extra: str = "demo"):
        # The extra, not the package: pyproject.toml says in which version, and with what beside it.
        what = f"-e '.[{extra}]'" if _CHECKOUT.is_file() else f"'ldm_scaling[{extra}]'"
        super().__init__(
            f"the package {package!r}, needed for {needed_for}, is not installed: "
            f"run  pip install {what}"
        )


class ApartError(BaseException):
    """Several processes did not come together, or lost each other: nothing that the user gave is
    wrong, and all are to be started again."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end (SIGTERM): what it keeps is saved, the same command goes on."""


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of at most so many letters; its type where it says nothing.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def with_type(error: BaseException) -> str:
    """An error's type and what it says, in one line; the type alone where it says nothing."""
    kind, said = type(error).__name__, first_line(error, most=300)
    return kind if said == kind else f"{kind}: {said}"


def read_error(error: Exception) -> BaseException:
    """What went wrong where Orbax read an array: it raises a bare `Exception` from that."""
    return error.__cause__ if type(error) is Exception and error.__cause__ else error

"""Code of one's own that a config names: imported before anything else of it is looked at, so that
what it registers goes by name as the package's own does; see docs/extending.md."""

from __future__ import annotations

import filecmp
import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from ldm_scaling.errors import UserError


def load(plugins: Iterable[str]) -> tuple[str, ...]:
    """Imports plugins, each once in a process.

    A file is imported under its own name, of several files alike the first, and its folder is
    searched for modules last: processes that are started for pieces of the work find what is
    defined in it.

    Args:
      plugins: dotted names of modules, and `.py` files.
    Returns:
      The same, files by their absolute paths.
    Raises:
      UserError: for one that is missing or cannot be imported.
    """
    plugins = tuple(plugins)
    for name in plugins:
        if not name.endswith(".py") and not all(p.isidentifier() for p in name.split(".")):
            raise UserError(
                f"config: plugins: {name!r} is neither a dotted name of a module nor a file, which "
                "ends in .py"
            )
    return tuple(_load_file(name) if name.endswith(".py") else _load_module(name)
                 for name in plugins)


def _load_file(name: str) -> str:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"config: plugins: there is no file {path}: restore it, or name it where it is now"
        )
    if "." in path.stem:
        raise UserError(
            f"config: plugins: {path} is imported by its name: leave out the dots before .py"
        )
    if os.fspath(path.parent) not in sys.path:
        sys.path.append(os.fspath(path.parent))
    found = getattr(_import(path.stem, os.fspath(path)), "__file__", None)
    if found is None or not _alike(found, path):
        raise UserError(
            f"config: plugins: {path}: another module is called {path.stem}, "
            f"{found or 'one of Python'}: rename the file, and give --config with the new name "
            "once to a workdir that knows the old one"
        )
    return os.fspath(path)


def _load_module(name: str) -> str:
    _import(name, name)
    return name


def _import(module: str, name: str):
    """A module; `name` is what the config calls it."""
    importlib.invalidate_caches()  # The file may be a moment old.
    try:
        return importlib.import_module(module)
    except Exception as e:  # Whatever code of one's own raises.
        if isinstance(e, ModuleNotFoundError) and e.name and f"{module}.".startswith(f"{e.name}."):
            raise UserError(
                f"config: plugins: there is no module {name!r}: install its package, or give a "
                "file, which ends in .py"
            ) from e
        *_, at = (f for f in traceback.extract_tb(e.__traceback__) if "importlib" not in f.filename)
        where = "" if at.filename == __file__ else f" ({at.filename}, line {at.lineno})"
        why = (str(e).strip().splitlines() or [""])[0]
        raise UserError(
            f"config: plugins: {name} cannot be imported: {type(e).__name__}: {why}{where}: mend it"
        ) from e


def _alike(found: str, path: Path) -> bool:
    try:
        return os.path.samefile(found, path) or filecmp.cmp(found, path, shallow=False)
    except OSError:
        return False

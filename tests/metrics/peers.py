"""Peers' functions of features and statistics, read from their files.

Importing their packages would import torchvision, which has no CPU build for every torch and
which these functions do not use.
"""

import ast
import importlib.util
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

INSTALL = "pip install -e '.[parity]' && pip install --no-deps {}"


def functions(package: str, file: str, **given) -> SimpleNamespace:
    """All functions and constants of one file of a package, with `given` for its imports."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: " + INSTALL.format(package.replace("_", "-")))
    source = (pathlib.Path(spec.origin).parent / file).read_text()
    body = [
        node for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.FunctionDef))
    ]
    for node in body:
        if isinstance(node, ast.FunctionDef):  # Types name modules that are not imported.
            node.returns = None
            for argument in node.args.args:
                argument.annotation = None
    names = {"np": np, **given}
    exec(compile(ast.Module(body, []), file, "exec"), names)
    return SimpleNamespace(**names)


def torch_fidelity(file: str) -> SimpleNamespace:
    """One file of torch-fidelity, with its own defaults."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    defaults = functions("torch_fidelity", "defaults.py").DEFAULTS

    def check(condition, message):
        assert condition, message

    return functions(
        "torch_fidelity", file, torch=torch, tqdm=lambda items, **_: items, vassert=check,
        vprint=lambda *_: None, get_kwarg=lambda name, given: given.get(name, defaults[name]),
    )


def clean_fid() -> SimpleNamespace:
    """clean-fid's distances; scipy's `sqrtm` no longer takes its `disp=False`."""
    linalg = SimpleNamespace(sqrtm=lambda matrix, disp=True: (scipy.linalg.sqrtm(matrix), 0.0))
    device = SimpleNamespace(device=lambda *_: None)
    return functions("cleanfid", "fid.py", linalg=linalg, torch=device, os=None)


def torchmetrics(file: str) -> SimpleNamespace:
    """Functions of one file of torchmetrics."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    there = {"_MATPLOTLIB_AVAILABLE": True, "_TORCH_FIDELITY_AVAILABLE": True}
    return functions("torchmetrics", file, torch=torch, **there)


def features(seed, n, d, power=0.5, offset=0.3):
    """Correlated features with a falling spectrum."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    return (rng.normal(size=(n, d)) * np.arange(1, d + 1.0) ** -power) @ rotation + offset

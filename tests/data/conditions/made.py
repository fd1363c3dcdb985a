"""Pictures for the tests of conditions, and basicsr's functions without what it would import."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import random

import numpy as np
import pytest
from scipy import special

from ldm_scaling.data.conditions.pixels import opencv
from tests.metrics import peers

INSTALL = (
    "basicsr is not installed: pip install -e '.[parity]' && "
    "pip install --no-deps --no-build-isolation basicsr==1.4.2"
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8: noise of a photograph's spectrum, amplitude over frequency, colours correlated."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None, None], np.fft.fftfreq(width)[None, :, None]
    white = rng.normal(size=(height, width, 1)) + 0.5 * rng.normal(size=(height, width, 3))
    spectrum = np.fft.fft2(white, axes=(0, 1)) / (np.hypot(fy, fx) + 1 / max(height, width))
    pixels = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of images in [0, 1], dB."""
    return -10 * np.log10(np.mean((a.astype(float) - b.astype(float)) ** 2))


def basicsr(file: str):
    """The functions of one file of basicsr."""
    if importlib.util.find_spec("basicsr") is None:
        pytest.skip(INSTALL)
    torch = pytest.importorskip("torch")
    return peers.functions(
        "basicsr", file, cv2=opencv(), math=math, random=random, special=special, torch=torch,
        F=torch.nn.functional,
    )


def diff_jpeg():
    """basicsr's module `utils/diffjpeg.py`."""
    spec = importlib.util.find_spec("basicsr")
    if spec is None:
        pytest.skip(INSTALL)
    path = pathlib.Path(spec.origin).parent / "utils/diffjpeg.py"
    spec = importlib.util.spec_from_file_location("diffjpeg", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

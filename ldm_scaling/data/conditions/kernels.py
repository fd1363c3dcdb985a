"""Blur kernels: Real-ESRGAN's Gaussians, plateaus and sinc, and linear motion.

A `Kernel` is a small record of what was drawn, and `weights()` the array; so that what is drawn can
be counted and logged without an image.

Source: Wang et al. 2021, "Real-ESRGAN: Training real-world blind super-resolution with pure
synthetic data", sections 3.1 to 3.3, with the numbers of its code's train_realesrgan_x4plus.yml.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy

SIDE = 21  # all weights are padded to it
SIZES = tuple(range(7, SIDE + 1, 2))
# How often a kernel that is not a sinc is of each kind.
KINDS = {
    "gaussian_iso": 0.45, "gaussian_aniso": 0.25, "generalized_iso": 0.12,
    "generalized_aniso": 0.03, "plateau_iso": 0.12, "plateau_aniso": 0.03,
}  # fmt: skip
SINC = 0.1  # how often it is one
BETAS = {"gaussian": (1.0, 1.0), "generalized": (0.5, 4.0), "plateau": (1.0, 2.0)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One blur kernel.

    Attributes:
      kind: one of `KINDS`, "sinc", or "identity", which changes nothing.
      size: pixels of its side; odd.
      sigma_x, sigma_y: pixels, along its axes.
      rotation: of the axes, radians.
      beta: exponent of the shape; 1 is a Gaussian, or a plateau of the second power.
      cutoff: of the sinc, radians per pixel; pi is the highest frequency that there is.
    """

    kind: str
    size: int = 1
    sigma_x: float = 1.0
    sigma_y: float = 1.0
    rotation: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi

    def weights(self) -> np.ndarray:
        """float64 (SIDE, SIDE), rows along y; their sum is 1."""
        if self.kind == "identity":
            weights_KK = np.ones((1, 1))
        elif self.kind == "sinc":
            weights_KK = sinc(self.size, self.cutoff)
        else:
            shape = plateau if self.kind.startswith("plateau") else gaussian
            weights_KK = shape(self.size, self.sigma_x, self.sigma_y, self.rotation, self.beta)
        return np.pad(weights_KK, (SIDE - len(weights_KK)) // 2)


IDENTITY = Kernel("identity")


def gaussian(
    size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0
) -> np.ndarray:
    """exp(-q^beta / 2), q the squared Mahalanobis distance from the middle: float64 (size, size).

    Source: the generalised Gaussian of Pascal et al. 2013; its sum is 1.
    """
    q_KK = _distances(size, sigma_x, sigma_y, rotation)
    return _normalized(np.exp(-0.5 * q_KK**beta))


def plateau(
    size: int, sigma_x: float, sigma_y: float, rotation: float = 0.0, beta: float = 1.0
) -> np.ndarray:
    """1 / (1 + q^beta), as in `gaussian`."""
    return _normalized(1 / (1 + _distances(size, sigma_x, sigma_y, rotation) ** beta))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """The circular low-pass filter, cut off at `size`: float64 (size, size), its sum 1.

    Source: Real-ESRGAN equation 6, w J1(w r) / (2 pi r); w^2 / (4 pi) in the middle.
    """
    x_K = np.arange(size) - size // 2
    r_KK = np.hypot(x_K[:, None], x_K)
    r_KK[size // 2, size // 2] = 1.0
    weights_KK = cutoff * scipy.special.j1(cutoff * r_KK) / (2 * np.pi * r_KK)
    weights_KK[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    return _normalized(weights_KK)


def motion(length: float, angle: float) -> np.ndarray:
    """A camera's even motion on a line while the shutter is open: float64, odd side, its sum 1.

    Args:
      length: of the line, pixels.
      angle: from the x axis towards the y axis, radians.
    """
    steps = np.linspace(-0.5, 0.5, 8 * math.ceil(length) + 1) * length
    half = math.ceil(length / 2) + 1
    weights_KK = np.zeros((2 * half + 1, 2 * half + 1))
    x, y = (half + steps * f(angle) for f in (np.cos, np.sin))
    left, top = (np.floor(v).astype(int) for v in (x, y))
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each point is shared out by its four pixels
        share = (1 - np.abs(y - top - dy)) * (1 - np.abs(x - left - dx))
        np.add.at(weights_KK, (top + dy, left + dx), share)
    return _normalized(weights_KK)


def draw(rng: np.random.Generator, sigmas: tuple[float, float]) -> Kernel:
    """A kernel as both orders blur with.

    Args:
      rng: of the example.
      sigmas: the lowest and the highest sigma, pixels.
    """
    size = int(rng.choice(SIZES))
    if rng.random() < SINC:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return Kernel("sinc", size, cutoff=rng.uniform(lowest, math.pi))
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    shape, axes = kind.split("_")
    sigma_x = sigma_y = rng.uniform(*sigmas)
    rotation = 0.0
    if axes == "aniso":
        sigma_y, rotation = rng.uniform(*sigmas), rng.uniform(-math.pi, math.pi)
    low, high = BETAS[shape]
    beta = rng.uniform(low, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, high)
    return Kernel(kind, size, sigma_x, sigma_y, rotation, beta)


def draw_final(rng: np.random.Generator) -> Kernel:
    """The sinc that makes ringing at the end, or, one time in five, none."""
    if rng.random() >= 0.8:
        return IDENTITY
    return Kernel("sinc", int(rng.choice(SIZES)), cutoff=rng.uniform(math.pi / 3, math.pi))


def _distances(size: int, sigma_x: float, sigma_y: float, rotation: float) -> np.ndarray:
    x_K = np.arange(size) - size // 2
    y_KK, x_KK = np.meshgrid(x_K, x_K, indexing="ij")
    cos, sin = math.cos(rotation), math.sin(rotation)
    along, across = cos * x_KK + sin * y_KK, cos * y_KK - sin * x_KK
    return (along / sigma_x) ** 2 + (across / sigma_y) ** 2


def _normalized(weights_KK: np.ndarray) -> np.ndarray:
    return weights_KK / weights_KK.sum()

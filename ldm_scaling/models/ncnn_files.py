"""Weights in ncnn's files: NAME.param lists the layers, NAME.bin holds their numbers in that order.

Format: github.com/Tencent/ncnn/wiki/param-and-model-file-structure. Only the convolutions are read,
and only where no other layer of the file has numbers of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ldm_scaling.errors import UserError

SUFFIXES = (".param", ".bin")
_MAGIC = "7767517"
# Before a weight: float16, or float32 as it is.
_HALF, _FLOAT = 0x01306B47, (0x00000000, 0x0002C056)
# Layers without numbers in the .bin, of those that networks of convolutions have.
_BARE = (
    "Input", "Split", "Concat", "Eltwise", "BinaryOp", "Interp", "ReLU", "PixelShuffle", "Noop",
)  # fmt: skip
# Parameters of a layer by their number, with ncnn's defaults.
_OUTPUTS, _KERNEL_W, _KERNEL_H, _BIASED, _WEIGHTS, _QUANTISED = 0, 1, 11, 5, 6, 8


def read_convolutions(path: str | os.PathLike[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight [out, in, kernel, kernel] and bias of all convolutions in their order, float32.

    Args:
      path: one of the two files; the other one lies beside it.
    Raises:
      UserError: for files that are missing, not whole or of other layers.
    """
    text, numbers = (Path(path).with_suffix(suffix) for suffix in SUFFIXES)
    try:
        lines, data = text.read_text(encoding="utf-8").splitlines(), numbers.read_bytes()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"cannot read {text} and {numbers}, which belong together: "
            f"{getattr(e, 'strerror', None) or e}"
        ) from e
    if not lines or lines[0].strip() != _MAGIC:
        raise UserError(f"{text} is no text file of ncnn: it should begin with {_MAGIC}")
    out, at = [], 0
    try:
        for line in lines[2:]:
            kind, _, inputs, outputs, *rest = line.split()
            if kind != "Convolution":
                if kind not in _BARE:
                    raise ValueError(f"a layer {kind}, which is not known here")
                continue
            named = (piece.split("=") for piece in rest[int(inputs) + int(outputs) :])
            given = {int(number): value for number, value in named}
            weight_OIHW, at = _weight(given, data, at)
            bias_O = np.zeros(len(weight_OIHW), np.float32)
            if int(given.get(_BIASED, 0)):
                bias_O, at = _take(data, at, "<f4", len(weight_OIHW))
            out.append((weight_OIHW, bias_O))
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes are left over in {numbers.name}")
    except ValueError as e:
        raise UserError(
            f"{text} and {numbers} are no network of convolutions as ncnn has it ({e}): fetch them "
            "again, or give the same weights as .pth or .safetensors"
        ) from e
    return out


def _weight(given: dict[int, str], data: bytes, at: int) -> tuple[np.ndarray, int]:
    """A layer's weight, and where the next numbers begin."""
    outputs, width, count = (int(given.get(k, 0)) for k in (_OUTPUTS, _KERNEL_W, _WEIGHTS))
    height = int(given.get(_KERNEL_H, width))
    if min(outputs, width, height) < 1 or count % (outputs * width * height) or not count:
        raise ValueError(f"{count} weights of {outputs} kernels of {height}x{width}")
    if int(given.get(_QUANTISED, 0)):
        raise ValueError("weights of 8 bits")
    (kind,), at = _take(data, at, "<u4", 1)
    if kind == _HALF:
        values, at = _take(data, at, "<f2", count)
        at += -at % 4
    elif kind in _FLOAT:
        values, at = _take(data, at, "<f4", count)
    else:
        raise ValueError(f"weights of a kind {kind:#x}")
    return values.astype(np.float32).reshape(outputs, -1, height, width), at


def _take(data: bytes, at: int, dtype: str, count: int) -> tuple[np.ndarray, int]:
    end = at + count * np.dtype(dtype).itemsize
    if end > len(data):
        raise ValueError(f"the numbers end at byte {len(data)}, inside a layer")
    return np.frombuffer(data[at:end], dtype), end

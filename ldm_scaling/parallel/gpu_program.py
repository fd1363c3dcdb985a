"""What the kernels of a program that XLA compiled for a GPU do, by its text: XLA has no cost
analysis of these programs.

The text is that of the compiled program: instructions that are not fused away are kernels, those of
cuDNN and cuBLAS custom calls.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from ldm_scaling.parallel import hlo

_NO_KERNEL = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "partition-id", "replica-id", "async-start",
    "async-update", "async-done",
}  # fmt: skip
_EXCHANGES = (
    "all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all",
    "collective-broadcast",
)
_WIDE = ("f32", "f64")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction that runs by itself.

    Attributes:
      name: the instruction's.
      kind: convolution, attention, product, reduction, transpose, elementwise, copy, or exchange,
        which is between devices.
      times: how often it runs in a call of the program.
      flops: of its products, once: see `products`.
      bytes: that it reads and writes, once.
      exponentials: of attention, once.
      wide: whether its products take float32 operands.
      turn: whether it is run by a loop of an unknown number of iterations, once in each.
      what: the layer it is from, as far as the text tells.
    """

    name: str
    kind: str
    times: int
    flops: float
    bytes: float
    exponentials: float
    wide: bool
    what: str
    turn: bool = False

    def once(
        self, flops: float, wide_flops: float, bandwidth: float, exponentials: float
    ) -> float:
        """Seconds of one run at a device's peaks: FLOP/s in bfloat16 and of float32 operands,
        bytes/s, exponentials/s; whichever takes longest."""
        return max(
            self.flops / (wide_flops if self.wide else flops), self.bytes / bandwidth,
            self.exponentials / exponentials,
        )


def kernels(module: hlo.Module) -> list[Kernel]:
    """Of a program, in no order."""
    fused = {
        name for _, i in module.instructions() if i.opcode == "fusion" or _applied(i)
        for name in hlo.called_by(i)
    }
    out = []
    for name, i in module.instructions():
        if name in fused or i.opcode in _NO_KERNEL or i.opcode.endswith(("-done", "-update")):
            continue
        out.append(kernel(module, name, i))
    return out


def kernel(module: hlo.Module, computation: str, i: hlo.Instruction) -> Kernel:
    """What an instruction of a computation does, if it runs by itself."""
    return Kernel(
        i.name, kind(module, i), module.times[computation], products(module, computation, i),
        _moved(module, computation, i), exponentials(module, computation, i),
        _wide(module, computation, i), what(i), computation in module.turns,
    )


def _applied(i: hlo.Instruction) -> bool:
    """Whether the computations that an instruction names are applied to elements."""
    return i.opcode not in ("while", "conditional", "call", "async-start")


def _moved(module: hlo.Module, name: str, i: hlo.Instruction) -> float:
    if i.opcode != "custom-call":
        return hlo.moved_by(module, name, i)
    # The last result of a library's kernel is its workspace.
    results = [shape for shape in i.shapes if shape[0] != "u8"]
    return hlo.size_of(tuple(results)) + hlo.size_of(module.operand_shapes(name, i))


def _wide(module: hlo.Module, computation: str, i: hlo.Instruction) -> bool:
    """Whether an instruction's products, those inside a fusion included, are of float32."""
    if i.opcode == "fusion":
        inside = [name for name in hlo.called_by(i) if name in module.computations]
        return any(
            _wide(module, name, j)
            for name in inside for j in module.computations[name].values() if j.opcode == "dot"
        )
    shapes = module.operand_shapes(computation, i)
    return bool(shapes) and shapes[0][0] in _WIDE


def what(i: hlo.Instruction) -> str:
    """The end of an instruction's name in the traced program, or its opcode."""
    told = re.search(r'op_name="([^"]*)"', i.attributes)
    return "/".join(told.group(1).split("/")[-3:]) if told else i.opcode


def products(module: hlo.Module, computation: str, i: hlo.Instruction) -> float:
    """FLOPs of an instruction's products, those inside a fusion included; 0 where it has none.

    Of a product of sizes (m, k), (k, n) and (m, n), b of them at once, the three arrays together
    have b^3 (m k n)^2 elements; of a convolution, whichever of its three arrays is the result, the
    square of its multiply-adds over the window's taps, those on padding included. Attention's
    kernels are told by their name: two products forward, five backward.
    """
    called = i.attributes if i.opcode == "custom-call" else ""
    shapes = [dims for _, dims in (*module.operand_shapes(computation, i), *i.shapes)]
    if "fmha" in called:
        logits, width = _attended(shapes)
        return 2.0 * logits * width * (5 if "Backward" in called else 2)
    if i.opcode == "fusion":
        inside = [name for name in hlo.called_by(i) if name in module.computations]
        return sum(
            products(module, name, j)
            for name in inside for j in module.computations[name].values()
        )
    convolves = i.opcode == "convolution" or "cudnn$conv" in called
    if not convolves and i.opcode != "dot" and "gemm" not in called and "matmul" not in called:
        return 0.0
    if len(shapes) < 3:
        return 0.0
    three = (shapes[0], shapes[1], i.shapes[0][1])
    elements = math.prod(math.prod(dims) for dims in three)
    if convolves:
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
        if not labels:
            return 0.0
        # A window larger than its map is never seen: XLA lets the two change places.
        taps, small, large = sorted(
            math.prod(size for size, label in zip(dims, text) if label.isdigit())
            for dims, text in zip(three, labels.groups())
        )
        return 2.0 * math.sqrt(elements * taps * small / large)
    batched = re.search(r'lhs_batch_dim\w*"?[:=]\s*[{\[]([\d,"\s]*)[}\]]', i.attributes)
    dims = hlo.ints(batched.group(1).replace('"', "")) if batched else []
    return 2.0 * math.sqrt(elements / math.prod(shapes[0][d] for d in dims))


def exponentials(module: hlo.Module, computation: str, i: hlo.Instruction) -> float:
    """Of an attention kernel, one a logit, forward and backward; 0 of others."""
    if i.opcode != "custom-call" or "fmha" not in i.attributes:
        return 0.0
    return _attended([d for _, d in (*module.operand_shapes(computation, i), *i.shapes)])[0]


def _attended(shapes: Any) -> tuple[float, float]:
    """Logits and width of a head of an attention kernel; 0 where its arrays are not told. Its
    queries and keys are (B, length, heads, width) or (B, heads, length, width)."""
    whole = [dims for dims in shapes if len(dims) == 4]
    if len(whole) < 3:
        return 0.0, 0.0
    (batch, *one, width), (_, *other, _) = whole[:2]
    heads = min(set(one) & set(other), default=0)
    if not heads:
        return 0.0, 0.0
    return float(batch * heads) * (math.prod(one) // heads) * (math.prod(other) // heads), width


def kind(module: hlo.Module, i: hlo.Instruction) -> str:
    """What sort of kernel an instruction is, see `Kernel`."""
    called = i.attributes if i.opcode == "custom-call" else ""
    if i.opcode.startswith(_EXCHANGES):
        return "exchange"
    if "fmha" in called:
        return "attention"
    if i.opcode == "convolution" or "cudnn$conv" in called:
        return "convolution"
    if i.opcode == "dot" or "gemm" in called or "matmul" in called:
        return "product"
    inside = {i.opcode}
    for name in hlo.called_by(i) if i.opcode == "fusion" else ():
        inside |= {j.opcode for j in module.computations.get(name, {}).values()}
    for opcodes, told in (
        ({"convolution"}, "convolution"), ({"dot"}, "product"),
        ({"reduce", "reduce-window"}, "reduction"), ({"transpose"}, "transpose"),
    ):
        if inside & opcodes:
            return told
    return "copy" if inside <= {"copy", "fusion", "parameter"} else "elementwise"

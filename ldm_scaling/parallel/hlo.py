"""A compiled program's text (HLO): its instructions, how often each runs, and custom calls.

XLA's own cost analysis counts a loop's body once and a custom call as nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_SIZES = {"pred": 1, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_OPCODE = re.compile(r"[\s)}\]]([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"
}  # fmt: skip

Shape = tuple[str, tuple[int, ...]]


def size_of(shapes: tuple[Shape, ...]) -> float:
    """Bytes of arrays, without padding."""
    return sum(_size(kind) * math.prod(dims) for kind, dims in shapes)


@functools.cache
def _size(kind: str) -> float:
    bits = re.search(r"\d+", kind)
    return _SIZES[kind] if kind in _SIZES else int(bits.group()) / 8 if bits else 0


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        (kind, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
        for kind, dims in _SHAPE.findall(text)
    )


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: unique in its computation.
      opcode: e.g. `fusion`, `all-gather-start`.
      shapes: (element type, dimensions) of the result; several of a tuple.
      operands: names.
      attributes: what follows the operands.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A program.

    Attributes:
      computations: name -> instructions by name, in order.
      entry: name of the computation that runs.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def operand_shapes(self, computation: str, instruction: Instruction) -> tuple[Shape, ...]:
        """Of all operands; of what is not found, nothing."""
        own = self.computations[computation]
        return tuple(s for name in instruction.operands if name in own for s in own[name].shapes)

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs; what is called from several places, their sum."""
        return self._count(lambda loop: self.trips(loop) or 1)

    @functools.cached_property
    def times_once(self) -> dict[str, int]:
        """The same with each loop's body counted once, as XLA's cost analysis does."""
        return self._count(lambda loop: 1)

    @functools.cached_property
    def turns(self) -> set[str]:
        """Computations that loops of an unknown number of iterations run."""
        out: set[str] = set()
        todo = [
            name for _, i in self.instructions() if i.opcode == "while" and self.trips(i) is None
            for name in called_by(i)
        ]
        while todo:
            name = todo.pop()
            if name not in out:
                out.add(name)
                todo += [c for i in self.computations.get(name, {}).values() for c in called_by(i)]
        return out

    @functools.cached_property
    def unknown_loops(self) -> int:
        """Loops whose number of iterations the text does not tell; they count once."""
        loops = [i for c in self.times for i in self.computations[c].values()]
        return sum(i.opcode == "while" and self.trips(i) is None for i in loops)

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """All that is reached, with the names of their computations."""
        for name in self.times:
            for instruction in self.computations.get(name, {}).values():
                yield name, instruction

    def _count(self, trips) -> dict[str, int]:
        times = collections.Counter({self.entry: 1})
        for name in self._in_order():
            for i in self.computations[name].values():
                if i.opcode.endswith(("-done", "-update")):
                    continue  # names the computation that its -start has called
                by = trips(i) if i.opcode == "while" else 1
                for called in called_by(i):
                    times[called] += times[name] * by
        return dict(times)

    def _in_order(self) -> list[str]:
        """Computations that are reached, callers before what they call."""
        out, seen = [], set()

        def visit(name: str) -> None:
            if name in seen or name not in self.computations:
                return
            seen.add(name)
            for i in self.computations[name].values():
                for called in called_by(i):
                    visit(called)
            out.append(name)

        visit(self.entry)
        return out[::-1]

    def trips(self, loop: Instruction) -> int | None:
        """Iterations of a while loop: as the compiler says, or the constant that its condition
        compares a counter with, which JAX starts at 0; None where neither is there."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
        own = self.computations.get(condition.group(1), {}) if condition else {}
        reached = [own] + [self.computations.get(c, {}) for i in own.values() for c in called_by(i)]
        compares = [i for c in reached for i in c.values() if i.opcode == "compare"]
        less = len(compares) == 1 and "direction=LT" in compares[0].attributes
        constants = [
            i.operands[0] for c in reached for i in c.values()
            if i.opcode == "constant" and i.shapes and i.shapes[0][0] in ("s32", "u32", "s64")
        ]
        if less and len(constants) == 1 and constants[0].isdecimal():
            return int(constants[0])
        return None


def called_by(instruction: Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    found = _CALLED.findall(instruction.attributes)
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if branches:
        found += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
    return found


def parse(text: str) -> Module:
    """The program that `Compiled.as_text()` prints."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current, lines = "", None, []

    def end() -> None:
        if current is not None and lines:
            found = _instruction("\n".join(lines))
            if found:
                current[found.name] = found
        lines.clear()

    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            end()
            current = computations.setdefault(head.group(2), {})
            entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == "}" and not (lines and _is_open(lines)):
            end()
            current = None
        elif line.startswith(("  %", "  ROOT ")) or re.match(r"^  [\w.\-]+ = ", line):
            end()
            lines.append(line)
        elif lines:
            lines.append(line)  # attributes that hold line breaks
    return Module(computations, entry)


def _is_open(lines: list[str]) -> bool:
    """Whether an instruction's text has braces left to close."""
    text = "".join(lines)
    return text.count("{") > text.count("}")


def _instruction(text: str) -> Instruction | None:
    match = _INSTRUCTION.match(text)
    if not match:
        return None
    root, name, rest = match.groups()
    rest = re.sub(r"/\*.*?\*/", "", rest)
    opcode = _OPCODE.search(rest)
    if not opcode:
        return None
    depth, at = 1, opcode.end()
    while at < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[at], 0)
        at += 1
    inside, attributes = rest[opcode.end() : at - 1], rest[at:]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        piece.split()[-1] for piece in inside.split(",") if piece.strip()
    )
    return Instruction(
        name, opcode.group(1), _shapes(rest[: opcode.start() + 1]), operands, attributes,
        bool(root),
    )


def ints(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(piece) for piece in text.split(",") if piece.strip()]


# --- custom calls -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CustomCall:
    """A kernel that XLA does not see into, such as Pallas's.

    Attributes:
      name: of the instruction, without its number.
      times: how often it runs in a call of the program.
      operands, results: shapes.
    """

    name: str
    times: int
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


def custom_calls(module: Module) -> list[CustomCall]:
    """The calls of Pallas's kernels on a TPU."""
    out = []
    for name, i in module.instructions():
        if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            operands = module.operand_shapes(name, i)
            kernel = re.sub(r"[.\d]+$", "", i.name)
            out.append(CustomCall(kernel, module.times[name], operands, i.shapes))
    return out


# --- loops ------------------------------------------------------------------------------------


def loop_factors(module: Module) -> tuple[float, float]:
    """What XLA's counts of FLOPs and of bytes are to be multiplied by, for it counts each loop's
    body once.

    Each is a ratio of this module's own counts with and without the iterations: of products (dots
    and convolutions), and of the operands and results of what is not fused away, see `moved_by`.
    """
    flops, flops_once, moved, moved_once = 0.0, 0.0, 0.0, 0.0
    fused = {
        called for _, i in module.instructions() if i.opcode == "fusion" for called in called_by(i)
    }
    for name, i in module.instructions():
        times, once = module.times[name], module.times_once[name]
        if i.opcode in ("dot", "convolution"):
            one = _product_flops(module, name, i)
            flops, flops_once = flops + times * one, flops_once + once * one
        if name not in fused and i.opcode not in _FREE and not i.opcode.endswith("-done"):
            one = moved_by(module, name, i)
            moved, moved_once = moved + times * one, moved_once + once * one
    return (flops / flops_once if flops_once else 1.0), (moved / moved_once if moved_once else 1.0)


def moved_by(module: Module, computation: str, i: Instruction) -> float:
    """Bytes that an instruction reads and writes: its operands and results.

    Of an operand that it, or what it fuses, only takes slices of, the slices; of one that it
    writes slices into in place, those slices, once: a loop that goes through a stack of arrays
    moves it once, not in every iteration.
    """
    if 'custom_call_target="AllocateBuffer"' in i.attributes:
        return 0.0  # a loop's stack, before anything is in it
    own = module.computations[computation]
    read = sum(
        _read(module, own, i, place) for place, name in enumerate(i.operands) if name in own
    )
    if i.opcode == "dynamic-update-slice":
        return read + size_of(own[i.operands[1]].shapes)
    body = _fused_by(module, i)
    roots = [one for one in body.values() if one.root]
    return read + (_written(body, roots[0]) if roots else size_of(i.shapes))


def _fused_by(module: Module, i: Instruction) -> dict[str, Instruction]:
    names = called_by(i) if i.opcode == "fusion" else []
    return module.computations.get(names[0], {}) if names else {}


def _read(module: Module, own: dict[str, Instruction], i: Instruction, place: int) -> float:
    """Bytes of an operand that an instruction of `own` reads."""
    if place == 0 and i.opcode in ("slice", "dynamic-slice", "gather"):
        return min(size_of(i.shapes), size_of(own[i.operands[0]].shapes))
    if place == 0 and i.opcode == "dynamic-update-slice":
        return 0.0
    body = _fused_by(module, i)
    for one in body.values():
        if one.opcode == "parameter" and one.operands == (str(place),):
            return _read_of(module, body, one, updated=False)
    return size_of(own[i.operands[place]].shapes)


def _read_of(
    module: Module, body: dict[str, Instruction], value: Instruction, updated: bool
) -> float:
    """Bytes of a fusion's parameter, or of one that it has `updated` in place, that it reads."""
    whole, total = size_of(value.shapes), 0.0
    if value.root and not updated:
        return whole
    for user in body.values():
        for place in (k for k, name in enumerate(user.operands) if name == value.name):
            if user.opcode == "bitcast":
                total += _read_of(module, body, user, updated)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += _read_of(module, body, user, updated=True)
            elif user.opcode != "tuple" or not updated:
                total += _read(module, body, user, place)
    return min(total, whole)


def _written(body: dict[str, Instruction], value: Instruction) -> float:
    """Bytes of a fusion's result that it writes."""
    if value.opcode == "tuple":
        return sum(_written(body, body[name]) for name in value.operands if name in body)
    total, at = 0.0, value
    while at.opcode in ("bitcast", "dynamic-update-slice") and at.operands[0] in body:
        if at.opcode == "dynamic-update-slice":
            total += size_of(body[at.operands[1]].shapes)
        at = body[at.operands[0]]
    whole = size_of(value.shapes)
    return min(total, whole) if total and at.opcode == "parameter" else whole


def _product_flops(module: Module, computation: str, i: Instruction) -> float:
    shapes = module.operand_shapes(computation, i)
    if len(shapes) < 2 or not i.shapes:
        return 0.0
    (_, left), (_, right), (_, out) = shapes[0], shapes[1], i.shapes[0]
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * math.prod(out) * math.prod(
            left[d] for d in ints(contracted.group(1) if contracted else "")
        )
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return 0.0
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(p.split("=", 1) for p in window.group(1).split()) if window else {}
    total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    for number, digit in enumerate(sorted(c for c in of_out if c.isdigit())):

        def field(name: str, default: str, number=number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        total *= _taps(
            left[of_left.index(digit)], right[of_right.index(digit)], out[of_out.index(digit)],
            int(field("stride", "1")), low, int(field("lhs_dilate", "1")),
            int(field("rhs_dilate", "1")),
        )
    return total


@functools.cache
def _taps(size: int, window: int, out: int, stride: int, low: int, spread: int, gap: int) -> int:
    """Pairs of a place of the result and a place of the window that meet an element, not padding
    nor the zeros between elements that lie `spread` apart."""
    at = np.arange(out)[:, None] * stride - low + np.arange(window)[None] * gap
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))

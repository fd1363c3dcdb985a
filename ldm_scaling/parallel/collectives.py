"""What devices exchange in a compiled program: kinds and volumes, read out of its text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np

from ldm_scaling.parallel import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What a device sends of each byte that it gives to an exchange between s slices, at least.
_BETWEEN = {
    "all-reduce": lambda s: 2 * (s - 1) / s, "all-gather": lambda s: s - 1,
    "reduce-scatter": lambda s: (s - 1) / s, "all-to-all": lambda s: (s - 1) / s,
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`; `..., slices` of what a TPU's hosts exchange between slices.
      times: how often it runs in a call of the program.
      bytes: of the whole that is gathered, reduced or exchanged, once.
      group: devices that take part together.
      sent: bytes that each device must send, once, at least: of n devices an all-gather or
        reduce-scatter of S bytes sends S (n - 1) / n, an all-reduce twice that.
      slice_sent: the part of a device's that must leave its slice, once, at least.
    """

    kind: str
    times: int
    bytes: float
    group: int
    sent: float
    slice_sent: float


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """(groups, devices in each) of a collective, by the program's numbers of devices."""
    mesh = re.search(
        r"replica_groups=@?\w*mesh\w*\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^)]*\))*)\))?"
        r"\s*\{([^}]*)\}", attributes,
    )
    if mesh:
        return _mesh_groups(*mesh.groups(), devices)
    iota = re.search(r"replica_groups=\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota.group(2)).reshape(hlo.ints(iota.group(1)))
    lists = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if lists:
        return np.array([hlo.ints(one) for one in re.findall(r"\{([\d,]*)\}", lists.group(1))])
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """`<=[2,4]T(1,0)`: counted up, in that shape, transposed, flat."""
    shape = hlo.ints(re.search(r"\[([\d,]+)\]", text).group(1))
    order = re.search(r"T\(([\d,]+)\)", text)
    found = np.arange(math.prod(shape)).reshape(shape)
    return (found.transpose(hlo.ints(order.group(1))) if order else found).reshape(-1)


def _mesh_groups(axes: str, ids: str | None, which: str, devices: int) -> np.ndarray:
    """Groups along some axes of a named mesh; `'x':(2)4` is a part of an axis, of size 4 after 2
    before it."""
    sizes = dict(re.findall(r"['\"]([^'\"]+)['\"]=(\d+)", axes))
    number = np.arange(devices)
    if ids:
        number = _iota(ids) if "[" in ids else np.array(hlo.ints(ids))
    taken: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for name, before, size in re.findall(r"['\"]([^'\"]+)['\"](?::\((\d+)\)(\d+))?", which):
        taken[name].append((int(before or 1), int(size or sizes[name])))
    shape, chosen = [], []
    for name, size in sizes.items():
        done = 1
        for before, part in sorted(taken.get(name, [])):
            shape += [before // done, part]
            chosen.append(len(shape) - 1)
            done = before * part
        shape.append(int(size) // done)
    left = [axis for axis in range(len(shape)) if axis not in chosen]
    group = math.prod(shape[axis] for axis in chosen)
    return number.reshape(shape).transpose(left + chosen).reshape(-1, group)


def of(
    module: hlo.Module, devices: int, slice_of: list[int] | None = None
) -> list[Collective]:
    """All exchanges of a program, those in loops as often as they run.

    Args:
      module: the program.
      devices: how many it runs on.
      slice_of: each device's slice, where there are several.
    """
    out = []
    for name, i in module.instructions():
        between = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.attributes)
        if i.opcode == "send" and between:
            out.append(_between(module, name, i, between.group(1), len(set(slice_of or [0]))))
            continue
        kind = next((k for k in KINDS if i.opcode in (k, f"{k}-start")), None)
        if kind is None:
            continue
        operand = hlo.size_of(module.operand_shapes(name, i))
        # A TPU's reduce-scatter is an all-reduce fused with the slice that each device keeps.
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            kind = "reduce-scatter"
        slices = 1
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes.partition("metadata=")[0])
            moved = [(int(a), int(b)) for a, b in pairs if a != b]
            group, sent, whole = 2, operand if moved else 0, operand
            if slice_of and any(slice_of[a] != slice_of[b] for a, b in moved):
                slices = 2
            outside = sent if slices > 1 else 0
        else:
            groups = replica_groups(i.attributes, devices)
            group = groups.shape[1]
            if slice_of:
                slices = max(len({slice_of[d] for d in one}) for one in groups)
            whole = operand * group if kind == "all-gather" else operand
            twice = 2 if kind == "all-reduce" else 1
            sent = twice * whole * (group - 1) / group
            # Of a slice's devices in the group each carries its part.
            outside = twice * whole * (slices - 1) / slices / (group / slices)
        out.append(Collective(kind, module.times[name], whole, group, sent, outside))
    return out


def _between(
    module: hlo.Module, name: str, i: hlo.Instruction, kind: str, slices: int
) -> Collective:
    """What a TPU's hosts send to other slices for it."""
    kind = kind.lower().replace("_", "-")
    operand = hlo.size_of(module.operand_shapes(name, i))
    sent = operand * _BETWEEN.get(kind, lambda s: 1)(slices)
    whole = operand * slices if kind == "all-gather" else operand
    return Collective(f"{kind}, slices", module.times[name], whole, slices, sent, sent)

"""One table of chips: what each can hold and do at most, by the makers' own pages.

The figures are peaks: a bound on what a program can do, not what one does. Sources, by their keys
in the table:

- `cloud-tpu`: Google Cloud's pages on each TPU version, https://docs.cloud.google.com/tpu/docs/v5e
  (v5p, v6e, tpu7x): compute, memory, its bandwidth, bidirectional ICI per chip (halved here), and
  the data-centre network (of a v5e pod 6.4 Tbit/s, shared by 256 chips; v4's is not given there).
  v5p's 95 GB are 96 GiB less what the system keeps: libtpu gives programs 95.74 GiB.
- `tpu-v4`: Jouppi et al. 2023, "TPU v4: An Optically Reconfigurable Supercomputer" (arXiv
  2304.01433), Table 4: 275 TFLOP/s, 32 GiB, 1200 GB/s, 6 links of 50 GB/s.
- `a100`, `h100`, `h200`, `b200`, `l4`, `l40s`, `4090`: NVIDIA's data sheets of each (tensor
  cores, dense: without sparsity, sums in float32; NVLink's, or PCIe's, two directions together are
  halved here). Between hosts: the compute networks of NVIDIA's DGX servers, by their data sheets,
  200 Gbit/s a GPU (A100) or 400. Memory is what CUDA reports.
"""

from __future__ import annotations

import dataclasses
import os

import jax.numpy as jnp

from ldm_scaling.errors import UserError

# What says how much of a GPU JAX takes, and what said so before.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, and how JAX sees it. What is not said to be per device is per chip.

    Attributes:
      name: the short name, as in topologies' names for TPUs (`v5e`).
      kinds: JAX's `device_kind`s, each written in full, or its beginning for GPUs.
      hbm_bytes: memory.
      usable_bytes: what of it a program may take, as libtpu 0.0.42 says; of a GPU what CUDA
        reports, of which JAX takes a part, see `share_of_gpu`.
      bf16_flops: peak FLOP/s in bfloat16.
      f32_flops: peak FLOP/s of float32 operands at JAX's default precision: bfloat16 passes on a
        TPU, TF32 on a GPU.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s that leave a chip over all its links (ICI, NVLink), one way.
      network_bandwidth: bytes/s that leave a chip for other slices; None where not known.
      devices_per_chip: JAX devices on one chip.
      source: see the module's list.
    """

    name: str
    kinds: tuple[str, ...]
    hbm_bytes: float
    usable_bytes: float
    bf16_flops: float
    f32_flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None
    devices_per_chip: int
    source: str


def _tpu(
    name, kinds, hbm_gib, usable_gib, tflops, hbm_gb_s, ici_gb_s, dcn_gbit_s, devices=1,
    source="cloud-tpu",
) -> Chip:
    network = dcn_gbit_s / 8 * _GIGA if dcn_gbit_s else None
    return Chip(
        name, kinds, hbm_gib * _GIB, usable_gib * _GIB, tflops * _TERA, tflops * _TERA,
        hbm_gb_s * _GIGA, ici_gb_s * _GIGA, network, devices, source,
    )


def _gpu(
    name, kind, hbm_gib, usable_gib, tflops, tf32, hbm_gb_s, link_gb_s, network_gbit_s, source
) -> Chip:
    network = network_gbit_s / 8 * _GIGA if network_gbit_s else None
    return Chip(
        name, (kind,), hbm_gib * _GIB, usable_gib * _GIB, tflops * _TERA, tf32 * _TERA,
        hbm_gb_s * _GIGA, link_gb_s * _GIGA, network, 1, source,
    )


# fmt: off
CHIPS = (
    #     name     kinds                         GiB usable TFLOP/s HBM, ICI GB/s DCN Gbit/s
    _tpu("v4",    ("TPU v4",),                    32,  30.75,  275, 1200, 300, None, 1, "tpu-v4"),
    _tpu("v5e",   ("TPU v5 lite", "TPU v5e"),     16,  15.75,  197,  819, 200,   25),
    _tpu("v5p",   ("TPU v5", "TPU v5p"),          96,  95.74,  459, 2765, 600,   50),
    _tpu("v6e",   ("TPU v6 lite", "TPU v6e"),     32,  31.25,  918, 1638, 400,  100),
    _tpu("tpu7x", ("TPU7x",),                    192, 189.5,  2307, 7380, 600,  100, devices=2),
    #     name         kind (its beginning)      GiB usable TFLOP/s TF32 HBM, link GB/s Gbit/s
    _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB",    40,  39.4,  312,  156, 1555, 300,  200, "a100"),
    _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB",    80,  79.2,  312,  156, 2039, 300,  200, "a100"),
    _gpu("a100-pcie", "NVIDIA A100 80GB PCIe",    80,  79.2,  312,  156, 1935, 300, None, "a100"),
    _gpu("l4",        "NVIDIA L4",                24,  22.0,  121,   60,  300,  32, None, "l4"),
    _gpu("l40s",      "NVIDIA L40S",              48,  44.4,  362,  183,  864,  32, None, "l40s"),
    _gpu("rtx4090",   "NVIDIA GeForce RTX 4090",  24,  23.5,  165, 82.6, 1008,  32, None, "4090"),
    _gpu("h100-pcie", "NVIDIA H100 PCIe",         80,  79.1,  756,  378, 2000, 300, None, "h100"),
    _gpu("h100-nvl",  "NVIDIA H100 NVL",          94,  93.1,  835,  417, 3900, 300, None, "h100"),
    _gpu("h100",      "NVIDIA H100 80GB HBM3",    80,  79.1,  989,  494, 3350, 450,  400, "h100"),
    _gpu("h200-nvl",  "NVIDIA H200 NVL",         141, 139.8,  835,  417, 4800, 450, None, "h200"),
    _gpu("h200",      "NVIDIA H200",             141, 139.8,  989,  494, 4800, 450,  400, "h200"),
    _gpu("b200",      "NVIDIA B200",             180, 178.3, 2250, 1125, 8000, 900,  400, "b200"),
)
# fmt: on
_HALF = (jnp.bfloat16, jnp.float16)


def by_kind(device_kind: str) -> Chip | None:
    """The chip of a JAX `device_kind`, e.g. `TPU v5 lite`; None for one that is not in the table.

    Where several GPUs' names begin it (`NVIDIA H200`, `NVIDIA H200 NVL`), the longest one is meant;
    `NVIDIA L40` is no `NVIDIA L4`, and neither a part of a GPU (MIG) nor a laptop's is that GPU.
    """
    found = [
        (len(kind), chip) for chip in CHIPS for kind in chip.kinds
        if device_kind == kind or (
            kind.startswith("NVIDIA") and device_kind.startswith(kind)
            and not device_kind[len(kind)].isalnum()
            and not {"MIG", "Laptop", "D"} & set(device_kind[len(kind) :].split())
        )
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def by_name(name: str) -> Chip | None:
    """The chip of a short name, e.g. `v5e`; None for one that is not in the table."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def share_of_gpu() -> float:
    """The part of a GPU's memory that JAX takes as it starts, from which programs are served: 3/4,
    or what `XLA_CLIENT_MEM_FRACTION` says (`XLA_PYTHON_CLIENT_MEM_FRACTION` before jax 0.10).

    Raises:
      UserError: where it says no fraction.
    """
    name = next((name for name in _FRACTIONS if os.environ.get(name)), _FRACTIONS[0])
    given = os.environ.get(name) or "0.75"
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"{name}={given}: give a fraction above 0 and up to 1, such as 0.92")
    return share


def capacity(chip: Chip) -> float:
    """Bytes of a chip that its programs may take; of a GPU the part that JAX takes."""
    gpu = chip.kinds[0].startswith("NVIDIA")
    return chip.usable_bytes * (share_of_gpu() if gpu else 1.0)


def peak_flops(device_kind: str, dtype: str | jnp.dtype) -> float | None:
    """Peak FLOP/s of one JAX device; None for a kind or type that is not in the table.

    Args:
      device_kind: of `jax.Device.device_kind`.
      dtype: of the operands: `bfloat16`, `float16`, or `float32` at JAX's default precision.
    """
    chip, dtype = by_kind(device_kind), jnp.dtype(dtype)
    if chip is None or dtype not in (*_HALF, jnp.float32):
        return None
    flops = chip.f32_flops if dtype == jnp.float32 else chip.bf16_flops
    return flops / chip.devices_per_chip

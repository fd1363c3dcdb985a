"""What XLA's compiler must know of an NVIDIA GPU to compile for it where there is none.

Per streaming multiprocessor by compute capability: NVIDIA's CUDA C++ Programming Guide, "Compute
Capabilities" (shared memory, threads, registers). Per chip: multiprocessors, boost clock and L2 by
NVIDIA's data sheets and architecture papers (the H200's 60 MB of L2 as the card says); memory as
CUDA reports it (`totalGlobalMem`), which is less than what is sold by what error correction and the
driver keep.
"""

from __future__ import annotations

import dataclasses

from ldm_scaling.parallel import chips

_KIB, _MIB = 2**10, 2**20
# Exponentials of a multiprocessor in a cycle: its units for special functions (CUDA C++ Programming
# Guide, throughput of arithmetic instructions), on all of these.
_EXPONENTIALS = 16
# What kernels are chosen for; nothing of it is loaded.
CUDNN, CUDA = (9, 12, 0), (13, 0, 0)
_PER_HOST = 8  # GPUs, as in the makers' servers
_MOST = 1024


@dataclasses.dataclass(frozen=True)
class Multiprocessor:
    """Of a compute capability.

    Attributes:
      capability: (major, minor).
      fpus: float32 units.
      threads: that it holds.
      shared, shared_block: bytes of shared memory, and of these for one block.
      accelerated: whether there are instructions of this very architecture (`sm_90a`).
    """

    capability: tuple[int, int]
    fpus: int
    threads: int
    shared: int
    shared_block: int
    accelerated: bool


_AMPERE = Multiprocessor((8, 0), 64, 2048, 164 * _KIB, 163 * _KIB, False)
_ADA = Multiprocessor((8, 9), 128, 1536, 100 * _KIB, 99 * _KIB, False)
_HOPPER = Multiprocessor((9, 0), 128, 2048, 228 * _KIB, 227 * _KIB, True)
_BLACKWELL = Multiprocessor((10, 0), 128, 2048, 228 * _KIB, 227 * _KIB, True)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as a compiler sees it.

    Attributes:
      name: as in `chips.CHIPS`.
      each: a multiprocessor.
      count: of them.
      clock: GHz.
      l2: bytes.
    """

    name: str
    each: Multiprocessor
    count: int
    clock: float
    l2: int

    @property
    def chip(self) -> chips.Chip:
        """Its peaks."""
        return chips.by_name(self.name)

    @property
    def exponentials(self) -> float:
        """Exponentials a second, at most."""
        return self.count * _EXPONENTIALS * self.clock * 1e9


# fmt: off
GPUS = {
    gpu.name: gpu for gpu in (
        Gpu("a100-40gb", _AMPERE,    108, 1.410,  40 * _MIB),
        Gpu("a100-80gb", _AMPERE,    108, 1.410,  40 * _MIB),
        Gpu("a100-pcie", _AMPERE,    108, 1.410,  40 * _MIB),
        Gpu("l4",        _ADA,        58, 2.040,  48 * _MIB),
        Gpu("l40s",      _ADA,       142, 2.520,  96 * _MIB),
        Gpu("rtx4090",   _ADA,       128, 2.520,  72 * _MIB),
        Gpu("h100-pcie", _HOPPER,    114, 1.755,  50 * _MIB),
        Gpu("h100-nvl",  _HOPPER,    132, 1.785,  50 * _MIB),
        Gpu("h100",      _HOPPER,    132, 1.980,  50 * _MIB),
        Gpu("h200-nvl",  _HOPPER,    132, 1.785,  60 * _MIB),
        Gpu("h200",      _HOPPER,    132, 1.980,  60 * _MIB),
        Gpu("b200",      _BLACKWELL, 148, 1.965, 126 * _MIB),
    )
}
# fmt: on


def split(topology: str) -> tuple[Gpu, int, int] | None:
    """GPU, hosts and GPUs of each, of e.g. `h100:16`, or None where that is not said so.

    Up to 8 GPUs are of one host, more of hosts of 8.
    """
    name, _, number = topology.lower().partition(":")
    count = int(number) if number.isdecimal() else 0
    hosts = max(1, count // _PER_HOST)
    if name not in GPUS or not 1 <= count <= _MOST or (count > _PER_HOST and count % _PER_HOST):
        return None
    return GPUS[name], hosts, count // hosts


def config(gpu: Gpu) -> str:
    """XLA's `GpuTargetConfigProto`, as text."""
    each, chip = gpu.each, gpu.chip
    (major, minor), dnn, cuda = each.capability, CUDNN, ".".join(map(str, CUDA))
    extension = "ACCELERATED_FEATURES" if each.accelerated else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * _KIB}
  shared_memory_per_core: {each.shared}
  shared_memory_per_block_optin: {each.shared_block}
  threads_per_core_limit: {each.threads}
  core_count: {gpu.count}
  fpus_per_core: {each.fpus}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {int(chip.hbm_bandwidth)}
  device_memory_size: {int(chip.usable_bytes)}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_address_bits: 64
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  name: "{chip.kinds[0]}"
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{".".join(map(str, dnn))}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {dnn[0]} minor: {dnn[1]} patch: {dnn[2]} }}
device_description_str: "{chip.kinds[0]}"
"""

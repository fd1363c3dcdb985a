"""What to change where a job does not fit its devices' memory, in order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from ldm_scaling.config import Study
from ldm_scaling.parallel import aot
from ldm_scaling.parallel import mesh as mesh_lib
from ldm_scaling.study import plan_parts


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that takes less memory.

    Attributes:
      name: which kind.
      keys: the keys of the config that it changes, and their values.
      study: the config with it and those before it.
    """

    name: str
    keys: dict[str, Any]
    study: Study

    def of_run(self, name: str) -> Remedy:
        """The same with keys of `train` said to be those of another run, such as
        `consistency.train`."""
        keys = {k.replace("train", name) if k.startswith("train.") else k: v
                for k, v in self.keys.items()}
        return dataclasses.replace(self, keys=keys)

    @property
    def flags(self) -> list[str]:
        """As a command line takes it."""
        return [f"--config.{key}={value}" for key, value in self.keys.items()]


def of(study: Study, kind: str, devices: list[jax.Device]) -> Iterator[Remedy]:
    """Changes to try where a part does not fit, in order, each on top of those before it.

    In training, distillation and fine-tuning (`plan_parts.run_of`): the attention kernel,
    rematerialisation, all devices as shards, gradient accumulation in 2, 4 and 8 parts, the
    optimiser's type. In sampling and decoding: fewer lanes.
    """
    if kind in ("sample", "decode"):
        while study.sweep.batch_size % 2 == 0:
            size = study.sweep.batch_size // 2
            study = changed(study, "sweep", batch_size=size)
            try:
                mesh, _ = plan_parts.own_mesh(study, devices)
                mesh_lib.check_batch(mesh, size, "sweep.batch_size")
            except ValueError:
                return
            yield Remedy("lanes", {"sweep.batch_size": size}, study)
        return
    if kind.partition(":")[0] not in ("train", plan_parts.DISTILL, plan_parts.FINETUNE):
        return
    if study.train.attention in ("plain", "chunked"):
        form = "cudnn" if aot.on_gpu(devices) else "splash"
        study = changed(study, "train", attention=form)
        yield Remedy("attention kernel", {"train.attention": form}, study)
    if study.train.remat == "none":
        study = changed(study, "train", remat="block")
        yield Remedy("remat policy", {"train.remat": "block"}, study)
    slices = 1 if aot.on_gpu(devices) else len({getattr(d, "slice_index", 0) for d in devices})
    if mesh_lib.fsdp(plan_parts.mesh_of(study, devices)) * slices < len(devices):
        axes = {"data": slices, "fsdp": -1, "tensor": 1}
        study = changed(study, "mesh", **axes)
        yield Remedy("fsdp axis", {f"mesh.{name}": size for name, size in axes.items()}, study)
    shards = mesh_lib.shards(plan_parts.mesh_of(study, devices))
    for parts in (2, 4, 8):
        small, left = divmod(study.train.batch_size, parts)
        if parts > study.train.micro_batches and not left and small % shards == 0:
            study = changed(study, "train", micro_batches=parts)
            yield Remedy("gradient accumulation", {"train.micro_batches": parts}, study)
    if study.train.moment_dtype == "float32":
        study = changed(study, "train", moment_dtype="bfloat16")
        yield Remedy("optimiser dtype", {"train.moment_dtype": "bfloat16"}, study)


def changed(study: Study, part: str, **keys: Any) -> Study:
    """The config with keys of a part of it changed."""
    new = dataclasses.replace(getattr(study, part), **keys)
    return dataclasses.replace(study, **{part: new})

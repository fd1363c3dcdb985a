"""Packs a finished demo into the file that the notebooks unpack.

    python colab/pack.py runs/demo

writes colab/data/demo.tar.xz: a workdir with the config, the networks, their loss curves and all
records, without pictures and captions, which the config makes again. Of a network it holds the
average over its training, which is what draws, to bfloat16's eight digits; the rest of its train
state is zeros, so nothing can be trained on from here.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from ldm_scaling.config import Train
from ldm_scaling.errors import UserError
from ldm_scaling.models import autoencoder, unet, zoo
from ldm_scaling.study.materials import LATENT_SCALE, Materials
from ldm_scaling.study.workdir import MARKER, Workdir
from ldm_scaling.tasks import autoencoder as autoencoder_task
from ldm_scaling.training.checkpoint import Checkpoints
from ldm_scaling.training.step import abstract_state

PACKED = Path(__file__).parent / "data" / "demo.tar.xz"


def rounded(leaf: jax.Array) -> jax.Array:
    """To what bfloat16 holds: half of the file's bytes are zeros then, and pack well."""
    return leaf.astype(jnp.bfloat16).astype(leaf.dtype)


def copy_network(
    init: Callable, run: Train, old: Path, new: Path, mesh: jax.sharding.Mesh,
    change: Callable[[jax.Array], jax.Array],
) -> None:
    """The last checkpoint of a run with its average changed and zeros for all else, and its curves.
    """
    with Checkpoints(old / "checkpoints", run.keep) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(init, run, mesh))
    empty = jax.tree.map(jnp.zeros_like, state)
    with Checkpoints(new / "checkpoints") as checkpoints:
        kept = empty._replace(step=state.step, ema=jax.tree.map(change, state.ema))
        checkpoints.save(run.steps, kept, {})
    shutil.copy(old / "curves.csv", new)


def copy_workdir(old: Workdir, new: Path) -> None:
    """What the notebooks need of a finished study.

    Raises:
      UserError: where a network is not trained, or there are no records.
    """
    materials = Materials(old.last_config(), old)
    study = materials.study
    materials.require_trained()
    if not list((old / "records").glob("*.json")):
        raise UserError(f"{old.path} holds no records: run  ldm-scaling study  to its end")
    _ = materials.latent_scale  # Written where it is not yet.
    for name in (MARKER, LATENT_SCALE):
        shutil.copy(old / name, new / name)
    shutil.copytree(old / "records", new / "records")
    spec = autoencoder_task.spec_of(study.autoencoder)
    # The latents' scale is that of this encoder, digit by digit.
    copy_network(
        functools.partial(autoencoder.init, spec), study.autoencoder.train,
        Path(old / "autoencoder"), new / "autoencoder", materials.mesh, lambda leaf: leaf,
    )
    for member in study.members:
        copy_network(
            functools.partial(unet.init, zoo.get(member).spec), study.train,
            Path(old.member(member)), new / "models" / member, materials.mesh, rounded,
        )


def main(workdir: str, packed: Path = PACKED) -> None:
    """Writes the archive; its bytes depend on the contents alone, not on who packs them, or when.
    """
    def plain(file: tarfile.TarInfo) -> tarfile.TarInfo:
        file.mtime = file.uid = file.gid = 0
        file.uname = file.gname = ""
        return file

    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "demo")
        new.mkdir()
        copy_workdir(Workdir(workdir), new)
        packed.parent.mkdir(exist_ok=True)
        with tarfile.open(packed, "w:xz", preset=9) as archive:
            archive.add(new, "demo", filter=plain)
    print(f"{packed}: {packed.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python colab/pack.py WORKDIR")
    try:
        main(sys.argv[1])
    except UserError as e:
        sys.exit(f"error: {e}")

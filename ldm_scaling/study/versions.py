"""Versions of the code that decides numbers: the package's, and of solvers of one's own their rows,
of which a name says nothing."""

from __future__ import annotations

from ldm_scaling import __version__, files
from ldm_scaling.config import Diffusion
from ldm_scaling.diffusion import schedule as schedule_lib
from ldm_scaling.sampling import solvers


def own_rows(diffusion: Diffusion, *tables: tuple[str, int, str]) -> list[str]:
    """Hashes of the rows of those of the tables whose solver the package did not register.

    Args:
      diffusion: the noise and what the network predicts.
      *tables: (sampler, steps, spacing); an empty spacing is the sampler's.
    Raises:
      UserError: as `solvers.make`.
    """
    return [
        files.sha256_of(solvers.make(
            sampler, schedule_lib.get(diffusion.schedule), steps, diffusion.prediction, spacing
        ).rows())
        for sampler, steps, spacing in tables if solvers.is_own(sampler)
    ]


def of(diffusion: Diffusion, *tables: tuple[str, int, str]) -> str:
    """The version of what draws with these tables, as `own_rows` has them: the package's, with
    those hashes behind it."""
    return "+".join([__version__, *own_rows(diffusion, *tables)])

"""The settings of a study: frozen dataclasses inside, an `ml_collections.ConfigDict` at the edge.

`default()` gives the locked ConfigDict that a file in `configs/` fills in, so a misspelt key fails
there; `parse` turns it into a validated `Study` once, and nothing else in the package sees a
ConfigDict. The dataclasses are the reference of every key.
"""

from ldm_scaling.config.cascade import Cascade
from ldm_scaling.config.data import OPENMOJI, SHARDS, Data, Prepare
from ldm_scaling.config.distill import Consistency, Distill, Halving
from ldm_scaling.config.dreambooth import DreamBooth
from ldm_scaling.config.early import Early
from ldm_scaling.config.edge import default, parse
from ldm_scaling.config.finetune import FineTune
from ldm_scaling.config.measuring import Sample, Sweep
from ldm_scaling.config.start import LENGTH, Start
from ldm_scaling.config.study import LEFT_OUT, Study
from ldm_scaling.config.training import AUTO, Autoencoder, Diffusion, Mesh, Train

__all__ = [
    "AUTO", "LEFT_OUT", "LENGTH", "OPENMOJI", "Autoencoder", "Cascade", "Consistency", "Data",
    "Diffusion", "Distill", "DreamBooth", "Early", "FineTune", "Halving", "Mesh", "Prepare",
    "SHARDS", "Sample", "Start", "Study", "Sweep", "Train", "default", "parse",
]

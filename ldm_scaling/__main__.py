"""`python -m ldm_scaling` is the command `ldm-scaling`."""

from ldm_scaling.cli import entry

entry()

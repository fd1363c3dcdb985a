"""The command line: `ldm-scaling COMMAND --workdir=DIR [--config=FILE[:argument] [overrides]]`."""

from ldm_scaling.cli.commands import COMMANDS
from ldm_scaling.cli.flags import FLAGS
from ldm_scaling.cli.program import entry, main
from ldm_scaling.cli.usage import usage

__all__ = ["COMMANDS", "FLAGS", "entry", "main", "usage"]

"""The command line that does a run again, from what its manifest says."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ccm.experiment.config import RunConfig, command_line


def command_of(manifest: Mapping[str, Any]) -> str:
    """Write the `ccm run` that does a run again.

    A merged run is done again in one piece: the result is the same. Where the run folder goes is left
    to the user.

    Args:
        manifest: Of a run folder.
    """
    config = replace(RunConfig.read(**manifest["asked"]), shard=None)
    return shlex.join(["ccm", "run", *command_line(config)])

"""The command that repeats a run, written from the run's manifest."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ccm.experiment.config import RunConfig, command_line


def command_of(manifest: Mapping[str, Any]) -> str:
    """Write the `ccm run` command that repeats a run.

    A merged run is repeated in one piece, with the same result. The run folder is not part of the
    command.

    Args:
        manifest: Of a run folder.
    """
    config = replace(RunConfig.read(**manifest["asked"]), shard=None)
    return shlex.join(["ccm", "run", *command_line(config)])

"""The command that repeats a run or a rehearsal, written from its manifest."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ccm.experiment.config import REHEARSED, RunConfig, command_line


def command_of(manifest: Mapping[str, Any]) -> str:
    """Write the `ccm run` or `ccm rehearse` command that made a run folder.

    A merged run is repeated without shards, with the same result. The folder to write is not part of
    the command.

    Args:
        manifest: Of the run folder.
    """
    config = replace(RunConfig.read(**manifest["asked"]), shard=None)
    rehearsal = manifest.get("rehearsal")
    if rehearsal is None:
        return shlex.join(["ccm", "run", *command_line(config)])
    words = [
        "ccm",
        "rehearse",
        *command_line(config, REHEARSED),
        "--prompts",
        str(rehearsal["prompts"]),
    ]
    if rehearsal["tokenizer"] is not None:
        words += ["--tokenizer", rehearsal["tokenizer"]]
    return shlex.join([*words, "--hooked"] if rehearsal["hooked"] else words)

"""Where the goldens of a published model were measured: `golden/provenance/<model>.json`."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ccm.experiment.files import write_json
from ccm.models.specs import ModelSpec
from reproduction import goldens


def command_line(arguments: Sequence[str]) -> str:
    """Write the pytest command without the folders of one machine.

    >>> command_line(["-m", "gpu", "--model-path", "gpt2-small=/data/gpt2", "--artifacts=/tmp/a"])
    'pytest -m gpu --model-path gpt2-small=DIR --artifacts=DIR'
    """
    words = ["pytest"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and Path(value).is_absolute():
            argument = f"{name}=DIR"
        elif Path(argument).is_absolute():
            argument = "DIR"
        words.append(argument)
    return " ".join(words)


def provenance(
    spec: ModelSpec, manifest: Mapping[str, Any], arguments: Sequence[str], day: date
) -> dict[str, Any]:
    """Collect what a golden was measured with.

    Args:
        spec: The model.
        manifest: Of its run folder.
        arguments: Of pytest.
        day: Of the measurement.
    """
    identity = manifest["identity"]
    return {
        "model": spec.name,
        "date": day.isoformat(),
        "command": command_line(arguments),
        "device": identity["device"],
        "device_name": identity["device_name"],
        "dtype": identity["dtype"],
        "protocol": identity["protocol"],
        "versions": identity["versions"],
        "weights": {
            "hub_id": spec.hub_id,
            "revision": manifest["weights"]["revision"],
            "sha256": identity["weights_sha256"],
        },
        "facts_sha256": identity["facts_sha256"],
        "prompts": manifest["prompts"],
        "prompts_sha256": manifest["prompts_sha256"],
    }


def write_provenance(
    spec: ModelSpec, manifest: Mapping[str, Any], arguments: Sequence[str], day: date
) -> Path:
    """Write it beside the goldens, over that of an earlier measurement."""
    path = goldens.GOLDEN / "provenance" / f"{spec.name}.json"
    write_json(path, provenance(spec, manifest, arguments, day))
    return path

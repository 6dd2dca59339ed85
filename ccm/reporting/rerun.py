"""The command that repeats a run, written from the run's manifest."""

import shlex
from collections.abc import Mapping
from typing import Any

from ccm.experiment.config import RunConfig
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.models.specs import MODELS

_FLAGS = {"full_texts": "--full-texts"}
_OPTIONS = {
    "controls": "--controls",
    "device": "--device",
    "seed": "--seed",
    "dtype": "--dtype",
    "protocol": "--protocol",
    "max_prompts": "--max-prompts",
    "engine": "--engine",
    "stats": "--stats",
    "bos": "--bos",
    "device_map": "--device-map",
}
_ALWAYS = ("controls", "device", "seed")  # written even where they are the defaults
# Options whose default is a field of the model's spec: option, field.
_OF_THE_MODEL = {
    "template": ("--template", "template"),
    "k": ("-k", "n_entropy_neurons"),
    "min_rho": ("--min-rho", "min_rho"),
    "null_space_dims": ("--null-space-dims", "null_space_dims"),
}


def command_of(manifest: Mapping[str, Any]) -> str:
    """Write the `ccm run` command that repeats a run.

    A merged run is repeated in one piece, with the same result. The memory budget and the run folder
    are not part of the command.

    Args:
        manifest: Of a run folder. What it does not hold is left to the defaults.
    """
    identity, asked = manifest["identity"], manifest.get("asked", {})
    defaults = RunConfig()
    model = str(identity["model"])
    words = ["ccm", "run", "--model", str(asked.get("model", model))]
    for name, folder in asked.get("model_paths", {}).items():
        words += ["--model-path", f"{name}={folder}"]
    values = list(identity["ablation_values"])
    words += ["--ablation-value", "all" if set(values) == set(ABLATION_VALUES) else ",".join(values)]
    for key, option in _OPTIONS.items():
        value = identity.get(key)
        if value is not None and (key in _ALWAYS or value != getattr(defaults, key)):
            words += [option, str(value)]
    matched = identity.get("matched_controls")
    if matched is not None and matched != identity.get("controls"):
        words += ["--matched-controls", str(matched)]  # the default: as many as controls
    words += [flag for key, flag in _FLAGS.items() if identity.get(key)]
    facts = asked.get("facts", "pararel" if identity.get("facts") == "pararel" else None)
    if facts is not None:
        words += ["--facts", str(facts)]
    neurons = identity.get("neurons")
    if neurons is not None:
        words += ["--neurons", ",".join(str(i) for i in neurons)]
    known = None if asked.get("model_paths") else MODELS.get(model)
    for key, (option, field) in _OF_THE_MODEL.items():
        value = identity.get(key)
        differs = value is not None and (known is None or value != getattr(known, field))
        if differs and not (key == "k" and neurons is not None):
            words += [option, str(value)]
    return shlex.join(words)

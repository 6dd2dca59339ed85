"""Merge the shards of a run into one run folder."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ccm.decoding.results import Work
from ccm.errors import BadInput
from ccm.experiment.batches import BatchStore
from ccm.experiment.clock import Clock
from ccm.experiment.folder import FILES, RunFolder, check_folder, read_manifest
from ccm.experiment.locking import locked, refuse_if_locked
from ccm.experiment.run import finish, read_scores
from ccm.experiment.writing import write_atomically
from ccm.method.protocol import PROTOCOLS

# Entries of the manifest that must be the same for all shards.
NOTES = (
    *("memory_budget", "facts", "prompts", "prompts_sha256", "entropy_neurons", "layers_with_rho"),
    *("nested_objects", "sets"),
)
KEPT = (*NOTES, "weights", "special_tokens", "engine", "first_prompt_tokens")


def merge_shards(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Merge the shards of a run into one run folder, bit for bit that of a run without shards.

    Args:
        folders: Folders of `ccm run --shard i/n`, all n of them, in any order.
        out: The run folder to write.

    Returns:
        The scores.

    Raises:
        BadInput: a shard is missing, given twice, unfinished or of another run; or a prompt was decoded
            by no shard or by two. Nothing is written then.
    """
    refuse_if_locked(out)
    manifests = [_manifest(folder) for folder in folders]
    _check_complete(folders, manifests)
    _check_alike(folders, manifests)
    total = int(manifests[0]["prompts"])
    stores = [BatchStore(folder) for folder in folders]
    seen = sorted(int(i) for store in stores for batch in store.read() for i in batch.prompts)
    if seen != list(range(total)):
        missing = sorted(set(range(total)) - set(seen))
        what, way = "a prompt is there twice", "Run the shard again in a new folder"
        if missing:
            what = f"prompt {missing[0]} is missing"
            way = "Run the commands of all shards again: what is there is not computed twice"
        raise BadInput(f"{len(folders)} shards: {what}. {way}.")
    check_folder(out)
    with locked(out):
        merged = RunFolder(out, {**manifests[0]["identity"], "shard": None})
        if merged.missing():
            merged.note(complete=False)
            _join(folders, manifests, stores, merged)
        finish(merged, PROTOCOLS[merged.manifest["identity"]["protocol"]], Clock(merged))
        return read_scores(merged)


def _join(
    folders: Sequence[Path],
    manifests: Sequence[dict[str, Any]],
    stores: Sequence[BatchStore],
    merged: RunFolder,
) -> None:
    """Copy the files that are the same for all shards, and gather the batches of each."""
    for name in FILES:
        write_atomically(merged.path / name, partial(shutil.copyfile, folders[0] / name))
    work, timings = Work(), dict[str, float]()
    for manifest in manifests:
        work.add(Work(**manifest["work"]))
        for stage, seconds in manifest["timings_s"].items():
            timings[stage] = round(timings.get(stage, 0.0) + seconds, 3)
    merged.note(
        **{key: manifests[0][key] for key in KEPT if key in manifests[0]},
        asked={key: value for key, value in manifests[0]["asked"].items() if key != "shard"},
        work=work,
        timings_s=timings,
        done=list(timings),
        shards=len(folders),
    )
    errors = [manifest["float32_error"] for manifest in manifests if "float32_error" in manifest]
    if errors:  # lower precisions measure none
        merged.note(float32_error=max(errors))
    store = BatchStore(merged.path)
    store.clear()  # batches of an earlier start, or of an unfinished run without shards
    for source in stores:
        for batch in source.read():
            store.write(batch)


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished shard."""
    manifest = read_manifest(folder, "Give folders of `ccm run --shard`.")
    shard = manifest["identity"].get("shard")
    if shard is None:
        raise BadInput(f"{folder}: no shard of a run. Give folders of `ccm run --shard i/n`.")
    if not manifest["complete"]:
        raise BadInput(f"{folder}: shard {shard} is not finished. Run its command again.")
    return manifest


def _check_complete(folders: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """Check that the shards are 1/n to n/n, each once."""
    first, *_ = shards = [str(m["identity"]["shard"]) for m in manifests]
    n = int(first.split("/")[1])
    wanted = [f"{i}/{n}" for i in range(1, n + 1)]
    for folder, shard in zip(folders, shards, strict=True):
        if shard not in wanted:
            raise BadInput(f"{folder}: shard {shard}, beside {first} of {folders[0]}. Give one n.")
        if shards.count(shard) > 1:
            raise BadInput(f"{folder}: shard {shard} is given twice. Give each once.")
    for shard in wanted:
        if shard not in shards:
            raise BadInput(f"shard {shard} is missing. Run it, and give its folder too.")


def _check_alike(folders: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """Refuse shards of different runs, and shards whose preparation gave different results."""
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        pairs = [(key, manifest["identity"], first["identity"]) for key in first["identity"]]
        pairs += [(key, manifest, first) for key in NOTES]
        for key, mine, its in pairs:
            if key != "shard" and mine.get(key) != its.get(key):
                raise BadInput(
                    f"{folder}: shard of another run than {folders[0]} ({key} is "
                    f"{_short(mine.get(key))}, {_short(its.get(key))} there)."
                )
        for name in FILES:
            for path in (folder / name, folders[0] / name):
                if not path.is_file():
                    raise BadInput(f"{path}: missing from the shard. Run its command again to make it.")
            if (folder / name).read_bytes() != (folders[0] / name).read_bytes():
                raise BadInput(
                    f"{folder / name}: not the same bytes as in {folders[0]}. Shards must run on "
                    "machines of one kind."
                )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

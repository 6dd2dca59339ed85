"""Download a published model into the hub's cache, or say why that is impossible."""

from ccm.errors import BadInput, NotAvailable
from ccm.models.specs import ModelSpec
from ccm.models.trial import reason_of
from ccm.models.weights import damaged, folder_of, unfinished

# No pickles, no other frameworks' weights, no code.
DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "tokenizer.model"]


def download(spec: ModelSpec) -> None:
    """Download a published model into the hub's cache, or the files that an earlier download missed.

    The hub's stored token is used. Whole files are kept, damaged ones are downloaded again.

    Raises:
        NotAvailable: no network, no access to a gated model, or files that the hub does not have.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    hub = HfApi()
    try:
        # Asked once first: the download would try for half a minute.
        hub.model_info(str(spec.hub_id), timeout=5)
        if spec.gated:
            hub.auth_check(str(spec.hub_id))
        for name in damaged(spec):
            hf_hub_download(str(spec.hub_id), name, force_download=True)
        snapshot_download(str(spec.hub_id), allow_patterns=DOWNLOADED)
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
        source: Folder or hub id that it was to be loaded from.
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

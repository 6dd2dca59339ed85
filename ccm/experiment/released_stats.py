"""The activation statistics that the paper's authors released, for runs that are to use them."""

from pathlib import Path

import numpy as np

from ccm.errors import BadInput, NotAvailable
from ccm.experiment.fact_files import DATA_VARIABLE, pararel_folder
from ccm.method.statistics import STATISTICS, ActivationStatistics, check_statistics
from ccm.models.checkpoint_folder import hash_of
from ccm.models.specs import ModelSpec

FOLDER = "activations_stats"
FILE = "neurons_{}_activations_last_layer.npy"


def read_released_statistics(spec: ModelSpec, *, finite: bool) -> ActivationStatistics:
    """Read a published model's released statistics, stored in float16 (the mode in float64).

    Args:
        spec: The model; the folder has its name.
        finite: Refuse infinite sigmas and NaN modes (defects 3 and 4), of which every model has some.

    Raises:
        NotAvailable: they are not in the data folder.
        BadInput: a file is not a vector of numbers, of another length, or not finite.
    """
    data = pararel_folder()
    folder = None if data is None else data / FOLDER / spec.name
    if folder is None or not folder.is_dir():
        where = f"{DATA_VARIABLE} is not set" if folder is None else f"no folder {folder}"
        raise NotAvailable(
            f"released activation statistics of {spec.name}: {where}. Point {DATA_VARIABLE} at the "
            f"released data with {FOLDER}/{spec.name}, or compute them with --stats own."
        )
    read = ActivationStatistics(
        **{name: _vector(folder / FILE.format(name), spec.d_mlp) for name in STATISTICS}
    )
    if not finite:
        return read
    try:
        return check_statistics(read, spec.d_mlp)
    except BadInput as error:
        raise BadInput(
            f"{folder}: {error} Only --protocol released takes them as they are; --stats own "
            "computes them."
        ) from error


def released_statistics_hash(spec: ModelSpec) -> str | None:
    """Compute the SHA-256 of a model's released statistics; None if they are not here."""
    data = pararel_folder()
    if data is None:
        return None
    return hash_of(data / FOLDER / spec.name / FILE.format(name) for name in STATISTICS)


def _vector(path: Path, d_mlp: int) -> np.ndarray:
    try:
        # allow_pickle=False: an array of objects is refused, never unpickled.
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path}: cannot be read as an array ({error}). Download it again.") from error
    if values.shape != (d_mlp,) or values.dtype.kind not in "fiu":
        raise BadInput(
            f"{path}: {values.dtype} of shape {values.shape}. Needed: a number for each of the model's "
            f"{d_mlp} last-layer neurons."
        )
    return np.asarray(values, dtype=np.float64)

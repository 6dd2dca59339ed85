"""The released activation statistics: read as they are, refused where they are not finite."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from ccm.cli.parser import main
from ccm.errors import BadInput, NotAvailable
from ccm.experiment.fact_files import DATA_VARIABLE, RELEASED
from ccm.experiment.files import read_statistics
from ccm.experiment.folder import ACTIVATION_STATS
from ccm.experiment.released_stats import FILE, FOLDER, read_released_statistics
from ccm.method.ablation import plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.statistics import STATISTICS
from ccm.models.specs import MODELS, PUBLISHED
from tests.needs import STATISTICS as STATISTICS_HERE

GPT2, ORGANISM = MODELS["gpt2-small"], MODELS["organism"]
released = STATISTICS_HERE.mark()


@released
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_released_files_are_refused_but_by_the_released_protocol(model: str) -> None:
    spec = MODELS[model]
    with pytest.raises(BadInput, match=r"not finite .* Only --protocol released takes them"):
        read_released_statistics(spec, finite=True)
    found = read_released_statistics(spec, finite=False)
    assert all(getattr(found, name).shape == (spec.d_mlp,) for name in STATISTICS)
    infinite = np.isinf(found.std[list(spec.published_neurons)])
    # Defect 3: sigma is infinite for so many of the published neurons.
    expected = {"gpt2-small": 5, "Phi-1_5": 2, "Meta-Llama-3-8B": 8, "Mistral-7B-v0.1": 12}
    assert infinite.sum() == expected.get(model, 6)


@released
def test_an_infinite_sigma_ablates_to_the_extremes_and_a_nan_mode_is_named() -> None:
    found = read_released_statistics(GPT2, finite=False)
    high = plan("entropy", GPT2.published_neurons, ABLATION_VALUES["mean_plus_sigma_ablation"], found)
    infinite = [i for i, n in enumerate(high.neurons) if np.isinf(found.std[n])]
    assert len(infinite) == 5
    assert all(high.values[i] == found.max[high.neurons[i]] for i in infinite)
    with pytest.raises(BadInput, match=r"^neuron 2378: its mode_ablation value is nan, not finite"):
        plan("entropy", GPT2.published_neurons, ABLATION_VALUES["mode_ablation"], found)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with finite statistics of the organism."""
    folder = tmp_path / "data"
    (folder / FOLDER / "organism").mkdir(parents=True)
    for file in RELEASED:
        (folder / file.name).touch()
    values = np.linspace(-1, 1, ORGANISM.d_mlp, dtype=np.float16)
    lift = {"min": -2, "max": 2}
    for name in STATISTICS:
        array = np.abs(values) if name == "std" else values + np.float16(lift.get(name, 0))
        np.save(folder / FOLDER / "organism" / FILE.format(name), array)
    monkeypatch.setenv(DATA_VARIABLE, str(folder))
    return folder / FOLDER / "organism"


def test_a_run_takes_the_released_statistics(data: Path, tmp_path: Path) -> None:
    given = ["run", "--model", "organism", "--controls", "2", "--max-prompts", "6"]
    assert main([*given, "--stats", "released", "--out", str(tmp_path / "run")]) == 0
    used, positions = read_statistics(tmp_path / "run" / ACTIVATION_STATS)
    assert positions == 0
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(used, name), np.load(data / FILE.format(name)))


def test_what_cannot_be_used_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mean = data / FILE.format("mean")
    whole = mean.read_bytes()
    mean.write_bytes(whole[:40])
    with pytest.raises(BadInput, match=r"mean_activations_last_layer.npy: cannot be read as an array"):
        read_released_statistics(ORGANISM, finite=False)
    np.save(mean, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match="cannot be read as an array"):
        read_released_statistics(ORGANISM, finite=False)
    for wrong in (np.zeros((2, 2)), np.zeros(3), np.zeros(ORGANISM.d_mlp, dtype=bool)):
        np.save(mean, wrong)
        for finite in (True, False):
            with pytest.raises(BadInput, match=r"of shape \(.*\). Needed: a number for each of .* 384"):
                read_released_statistics(ORGANISM, finite=finite)
    shutil.rmtree(data)
    with pytest.raises(NotAvailable, match=r"of organism: no folder .* them with --stats own"):
        read_released_statistics(ORGANISM, finite=False)
    monkeypatch.delenv(DATA_VARIABLE)
    with pytest.raises(NotAvailable, match=rf"of organism: {DATA_VARIABLE} is not set"):
        read_released_statistics(ORGANISM, finite=False)

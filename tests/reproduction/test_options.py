"""The pytest options, what the header says, and how a result is held against its golden."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from ccm.method.ablation_values import ABLATION_VALUES
from ccm.models.specs import CHECKPOINT, PUBLISHED
from ccm.models.weights import OTHER_DIMENSIONS_VARIABLE
from conftest import _kept_together, _options
from reproduction import goldens
from reproduction.goldens import GoldenExtension, differences, measured
from reproduction.pairs import Pair, device_of, missing, pairs
from tests.needs import FACTS, NO_GPU, STATISTICS
from tests.toys import ToyConfig, toy_folder

ROOT = Path(__file__).parents[2]
ONE_FILE = "reproduction/test_entropy_neurons.py"
no_cuda = NO_GPU.mark()


def run_pytest(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest anew; without a cache of weights or data, so that every machine says the same."""
    # Syrupy leaves the reports of a worker's run to the worker's controller.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    if cwd == ROOT:  # without what checks shapes, which takes half of the start
        arguments = ("-o", "addopts=-ra --disable-socket --allow-unix-socket", *arguments)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *arguments],
        cwd=cwd,
        env={**inherited, "HF_HUB_OFFLINE": "1", "CCM_DATA_DIR": "", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- options ------------------------------------------------------------------------------------------


@pytest.fixture
def checked(pytestconfig: pytest.Config) -> Callable[..., Any]:
    """Checks options as the start of pytest does, without starting one."""

    class Given:
        def __init__(self, **given: Any) -> None:
            self.given = given

        def getoption(self, name: str) -> Any:
            return self.given.get(name.lstrip("-").replace("-", "_"), DEFAULTS[name])

    def check(**given: Any) -> Any:
        config: Any = Given(**given)
        return _options(config)

    return check


DEFAULTS: dict[str, Any] = {
    "--models": "all",
    "--ablation-values": "all",
    "--model-path": [],
    "--device": "auto",
    "--dtype": "float32",
    "--artifacts": None,
    "--facts": None,
    "--max-prompts": None,
    "--require-gpu": False,
    "--require-weights": False,
    "--threads": 1,
    "--force-enable-socket": False,
}


def test_all_is_the_default(checked: Callable[..., Any]) -> None:
    options = checked()
    assert options.models == ("organism", "smollm2-135m", *PUBLISHED)
    assert options.ablation_values == tuple(ABLATION_VALUES)
    assert (options.artifacts, options.require_gpu, options.require_weights) == (None, False, False)
    assert (options.facts, options.max_prompts) == (None, None)
    assert (options.threads, options.network) == (1, False)


def test_as_many_threads_as_asked_for(pytestconfig: pytest.Config) -> None:
    assert torch.get_num_threads() == pytestconfig.getoption("--threads")


def test_what_is_chosen_is_kept(
    checked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(OTHER_DIMENSIONS_VARIABLE, "1")
    toy = toy_folder(ToyConfig("gpt2"))
    options = checked(
        models="gpt2-small,organism",
        ablation_values="mode_ablation,mean_ablation",
        model_path=[f"gpt2-small={toy}"],
        device="cpu",
        dtype="bfloat16",
        artifacts=str(tmp_path),
        facts=str(tmp_path),
        max_prompts=60,
        require_gpu=True,
        require_weights=True,
        threads=2,
        force_enable_socket=True,
    )
    assert options.models == ("gpt2-small", "organism")
    assert options.ablation_values == ("mode_ablation", "mean_ablation")
    assert options.model_paths == {"gpt2-small": toy}
    assert (options.device, options.dtype, options.artifacts) == ("cpu", "bfloat16", tmp_path)
    assert (options.facts, options.max_prompts) == (str(tmp_path), 60)
    assert (options.require_gpu, options.require_weights) == (True, True)
    assert (options.threads, options.network) == (2, True)
    assert checked(facts="pararel").facts == "pararel"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": "nope"}, "model 'nope': unknown"),
        ({"models": "organism,gpt3"}, "model 'gpt3': unknown"),
        ({"ablation_values": "mean"}, "ablation value 'mean': unknown"),
        ({"ablation_values": ""}, "ablation value '': unknown"),
        ({"model_path": ["gpt2-small"]}, "--model-path 'gpt2-small': not NAME=PATH"),
        ({"model_path": ["gpt2-small=/nowhere"]}, "no such folder or file '/nowhere'"),
        ({"model_path": [f"gpt2-small={ROOT}"]}, "not a checkpoint folder"),
        ({"model_path": [f"gpt2-small={CHECKPOINT}"]}, "wrong architecture for gpt2-small"),
        ({"facts": "/nowhere"}, "--facts '/nowhere': no such folder"),
        ({"max_prompts": 0}, "--max-prompts 0: out of range"),
        ({"threads": 0}, "--threads 0: out of range. Allowed: 1 and more."),
        ({"device": "gpu"}, "device 'gpu': unknown"),
        ({"dtype": "fp16"}, "dtype 'fp16': unknown"),
        pytest.param({"device": "cuda"}, "device 'cuda': 0 CUDA devices found", marks=no_cuda),
    ],
    ids=str,
)
def test_a_wrong_option_is_a_usage_error(
    given: dict[str, Any], message: str, checked: Callable[..., Any]
) -> None:
    with pytest.raises(pytest.UsageError) as caught:
        checked(**given)
    assert message in str(caught.value)


def test_a_data_folder_without_the_data_is_a_usage_error(
    checked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCM_DATA_DIR", str(tmp_path))
    with pytest.raises(pytest.UsageError, match=r"^CCM_DATA_DIR=.*: no pararel_statements.csv \(or"):
        checked()


def test_a_usage_error_ends_pytest_before_any_test() -> None:
    done = run_pytest(ONE_FILE, "--models", "organism,gpt3")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR == 4
    assert "model 'gpt3': unknown" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@no_cuda
def test_gpu_pairs_are_collected_and_skip_with_the_reason_under_a_header(tmp_path: Path) -> None:
    toy = toy_folder(ToyConfig("gpt2"))
    options = ("--dtype", "bfloat16", "--model-path", f"gpt2-small={toy}")
    caches = {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**caches, OTHER_DIMENSIONS_VARIABLE: "1"}
    done = run_pytest(ONE_FILE, "--models", ",".join(PUBLISHED), *options, **environment)
    n = len(PUBLISHED) * len(ABLATION_VALUES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"collected {n} items" in done.stdout
    assert f"{n} skipped" in done.stdout.splitlines()[-1]
    reasons = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert reasons
    assert all(": needs CUDA: none found. On a machine with a GPU: tox -e gpu" in r for r in reasons)
    for model in PUBLISHED:
        folder = toy if model == "gpt2-small" else "DIR"
        assert any(r.endswith(f"--model-path {model}={folder} --device cpu") for r in reasons), model

    header = [line for line in done.stdout.splitlines() if line.startswith("ccm: ")]
    kernels = torch.backends.cpu.get_cpu_capability()
    assert header[0] == (
        f"ccm: device auto (cpu), dtype bfloat16, seed 123, 1 threads, kernels {kernels}"
    )
    for package in ("ccm", "torch", "transformers", "transformer_lens", "numpy"):
        assert f"{package} {version(package)}" in header[1]
    assert header[2] == (
        "ccm: weights found: organism, gpt2-small; data folder: none (CCM_DATA_DIR not set)"
    )
    skipped = [line.removeprefix("ccm: skipped here: ") for line in header[3:]]
    cpu = "On this CPU, if you say so: pytest -m gpu --models MODEL --model-path MODEL="
    how = f"needs CUDA: none found. On a machine with a GPU: tox -e gpu. {cpu}"
    assert f"gpt2-small: {how}{toy} --device cpu" in skipped
    assert f"{', '.join(m for m in PUBLISHED if m != 'gpt2-small')}: {how}DIR --device cpu" in skipped
    for what in (f"what {FACTS.reason}", f"what {STATISTICS.reason}", "benchmarks: tox -e bench"):
        assert what in skipped
    assert f"what {NO_GPU.reason}" not in skipped
    assert "set CCM_DATA_DIR to the folder that holds pararel_statements.csv (or raw_" in FACTS.reason


@no_cuda
def test_a_required_gpu_that_is_not_there_is_a_failure() -> None:
    one = ("--models", "gpt2-small", "--ablation-values", "mean_ablation")
    done = run_pytest(ONE_FILE, *one, "--require-gpu")
    assert done.returncode == 1
    assert "needs CUDA: none found" in done.stdout
    assert "1 error" in done.stdout.splitlines()[-1] or "1 failed" in done.stdout.splitlines()[-1]


def test_pairs_are_the_grid_in_order(checked: Callable[..., Any]) -> None:
    options = checked(models="organism,gpt2-small", ablation_values="mean_ablation,mode_ablation")
    found = pairs(options)
    assert [p.id for p in found] == [
        f"{model}-{value}"
        for model in ("organism", "gpt2-small")
        for value in ("mean_ablation", "mode_ablation")
    ]
    assert [[m.name for m in p.marks] for p in found] == [[], [], ["gpu"], ["gpu"]]


def test_nothing_is_missing_for_the_organism(checked: Callable[..., Any]) -> None:
    pair = Pair("organism", "mean_ablation")
    options = checked(require_gpu=True, require_weights=True, device="cpu")
    assert missing(pair.model, options) is None
    assert device_of(pair, options) == "cpu"


def test_published_models_run_where_asked(checked: Callable[..., Any]) -> None:
    assert device_of(Pair("gpt2-small", "mean_ablation"), checked(device="auto")) == "auto"
    assert device_of(Pair("organism", "mean_ablation"), checked(device="auto")) == "cpu"


def test_artifacts_are_kept_and_used_again(tmp_path: Path) -> None:
    """A folder of another run there is refused, so the option is read and nothing is overwritten."""
    folder = tmp_path / "organism"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    one = ("--models", "organism", "--ablation-values", "mean_ablation")
    done = run_pytest(ONE_FILE, *one, "--artifacts", str(tmp_path))
    assert done.returncode == 1
    assert f"{folder}: not empty and holds no run" in done.stdout
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


# --- goldens ------------------------------------------------------------------------------------------

GOLDEN = {"gts": measured(2.5, 0.5), "n": 40, "set": [1, 2], "name": "organism", "none": None}


def changed(**entries: Any) -> dict[str, Any]:
    return {**GOLDEN, **entries}


@pytest.mark.parametrize(
    "found",
    [
        GOLDEN,
        changed(gts=measured(3.0, 0.5)),
        changed(gts=measured(2.0, 0.5)),
        changed(gts=measured(2.4, 99.0)),  # the golden's tolerance counts, not the result's
    ],
)
def test_inside_the_tolerance(found: dict[str, Any]) -> None:
    assert list(differences(found, GOLDEN)) == []


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (changed(gts=measured(3.01, 0.5)), ".gts=3.01, expected 2.5 +- 0.5"),
        (changed(gts=measured(1.99, 99.0)), ".gts=1.99, expected 2.5 +- 0.5"),
        (changed(gts=measured(float("nan"), 0.5)), ".gts=nan, expected 2.5 +- 0.5"),
        (changed(gts=2.5), ".gts=2.5, expected a number"),
        (changed(gts=None), ".gts=None, expected a number"),
        (changed(n=41), ".n=41, expected 40"),
        (changed(n=40.0), ".n=40.0, expected 40"),
        (changed(n=measured(40, 5)), ".n={'value': 40.0, 'tolerance': 5}, expected 40"),
        (changed(set=[1, 3]), ".set[1]=3, expected 2"),
        (changed(set=[1]), ".set=[1], expected [1, 2]"),
        (changed(set=[1, True]), ".set[1]=True, expected 2"),
        (changed(name="gpt2-small"), ".name='gpt2-small', expected 'organism'"),
        (changed(none=0), ".none=0, expected None"),
        (changed(new=1), ".new: only in the result"),
        ({k: v for k, v in GOLDEN.items() if k != "n"}, ".n: only in the golden"),
    ],
)
def test_outside_the_tolerance(found: dict[str, Any], complaint: str) -> None:
    assert list(differences(found, GOLDEN)) == [complaint]


def test_a_number_that_is_not_there_stays_so() -> None:
    assert measured(None, 0.5) is None
    assert measured(2, 1) == {"value": 2.0, "tolerance": 1}


def test_the_file_holds_every_digit() -> None:
    extension = GoldenExtension()
    text = extension.serialize({"x": measured(0.1 + 0.2, 1e-9), "name": "Łódź"})
    assert json.loads(text) == {"x": {"value": 0.1 + 0.2, "tolerance": 1e-9}, "name": "Łódź"}
    assert "Łódź" in text
    assert extension.matches(serialized_data=text, snapshot_data=text)
    assert [*extension.diff_lines(text, None)] == ["no golden: measure it with --snapshot-update"]
    with pytest.raises(ValueError, match="JSON"):
        extension.serialize({"x": float("nan")})


# A project of its own around the goldens, so that the real ones are never touched.
PROJECT = {
    "pytest.ini": "[pytest]\naddopts = -p no:cacheprovider\n",
    "conftest.py": """
        from pathlib import Path

        import pytest

        from conftest_of_ccm import *  # options, header, and the guard of the goldens
        from reproduction import goldens

        goldens.GOLDEN = Path(__file__).parent / "golden"

        @pytest.fixture
        def golden(snapshot):
            return snapshot.use_extension(goldens.GoldenExtension)
        """,
    "test_values.py": """
        import os

        from reproduction.goldens import measured

        def test_a(golden):
            assert {"x": measured(float(os.environ["A"]), 0.5)} == golden

        def test_b(golden):
            assert {"x": measured(float(os.environ["B"]), 0.5)} == golden
        """,
}


def write_project(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        lines = text.strip("\n").splitlines()
        margin = len(lines[0]) - len(lines[0].lstrip())
        (folder / name).write_text("\n".join(line[margin:] for line in lines) + "\n")


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the two tests of `PROJECT` with two values."""
    write_project(tmp_path, PROJECT)
    shutil.copy(ROOT / "conftest.py", tmp_path / "conftest_of_ccm.py")

    def run(*arguments: str, a: float = 1.0, b: float = 1.0) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return run_pytest(*arguments, cwd=tmp_path, PYTHONPATH=path, A=str(a), B=str(b))

    return run


def stored(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted((folder / "golden").rglob("*.json"))}


def test_goldens_from_birth_to_change(
    project: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    missing_ = project()
    assert missing_.returncode == 1
    assert "no golden: measure it with --snapshot-update" in missing_.stdout
    assert stored(tmp_path) == {}

    assert project("--snapshot-update").returncode == 0
    first = stored(tmp_path)
    assert [*first] == ["test_a", "test_b"]
    outside = project(a=1.6, b=0.5)
    assert outside.returncode == 1
    assert "1 failed, 1 passed" in outside.stdout, "b is inside its tolerance"
    assert "x=1.6, expected 1 +- 0.5" in outside.stdout

    assert project("--snapshot-update", a=1.4, b=1.6).returncode == 0
    second = stored(tmp_path)
    assert second["test_a"] == first["test_a"], "rewritten, though inside the tolerance"
    assert json.loads(second["test_b"])["x"]["value"] == 1.6

    # One test alone: the golden of the other one stays.
    assert project("test_values.py::test_a", "--snapshot-update", a=3.0).returncode == 0
    third = stored(tmp_path)
    assert json.loads(third["test_a"])["x"]["value"] == 3.0
    assert third["test_b"] == second["test_b"], "the golden of a test that did not run is gone"

    stale = tmp_path / "golden" / "test_values" / "test_gone.json"
    stale.write_text("{}\n")
    gone = project(a=3.0, b=1.6)
    assert gone.returncode == 1, "a stale golden is a failure"
    assert "1 snapshot unused" in gone.stdout
    assert stale.exists()


# The fixture of the real reproduction tests, on a published pair whose run is a stub.
PUBLISHED_PROJECT = {
    "pytest.ini": PROJECT["pytest.ini"],
    "conftest.py": """
        from pathlib import Path
        from types import SimpleNamespace

        import pytest

        from ccm.models.specs import MODELS
        from conftest_of_ccm import *
        from reproduction import goldens
        from reproduction.conftest import golden
        from reproduction.pairs import Pair

        goldens.GOLDEN = Path(__file__).parent / "golden"
        NAMES = "device", "dtype", "protocol", "versions", "weights_sha256", "facts_sha256"

        @pytest.fixture
        def pair():
            return Pair("gpt2-small", "mean_ablation")

        @pytest.fixture
        def run():
            identity = {**dict.fromkeys(NAMES), "device_name": "a GPU"}
            manifest = {"identity": identity, "prompts": 7, "prompts_sha256": ""}
            manifest["weights"] = {"revision": None}
            return SimpleNamespace(spec=MODELS["gpt2-small"], manifest=manifest)
        """,
    "test_values.py": """
        import os

        from reproduction.goldens import measured

        def test_a(golden):
            assert float(os.environ["B"]) == 1.0, "an invariant"
            assert {"x": measured(float(os.environ["A"]), 0.5)} == golden
        """,
}


@pytest.mark.slow
def test_goldens_of_a_published_model_from_birth_to_change(
    project: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    write_project(tmp_path, PUBLISHED_PROJECT)
    reason = "no golden: measure it with --snapshot-update on the stated device (here a GPU, float32)"
    absent = project("-rs")
    assert absent.returncode == 0
    assert reason in absent.stdout
    assert project(b=2.0).returncode == 1, "all but the golden is tested"

    rehearsed = project("-rs", "--max-prompts", "3", "--snapshot-update")
    assert "a rehearsal: --max-prompts 3; it is held to no golden" in rehearsed.stdout
    assert stored(tmp_path) == {}

    assert project("--snapshot-update", "--artifacts", str(tmp_path / "runs")).returncode == 0
    assert [*stored(tmp_path)] == ["gpt2-small", "test_a"]
    where = tmp_path / "golden" / "provenance" / "gpt2-small.json"
    written = json.loads(where.read_text())
    assert (written["device_name"], written["prompts"]) == ("a GPU", 7)
    assert written["command"].endswith(
        "pytest -p no:cacheprovider --color=no --snapshot-update --artifacts DIR"
    )

    # From now on it is held, and left alone while it holds.
    assert project(a=1.6).returncode == 1
    where.write_text("{}")
    assert project("--snapshot-update", a=1.5).returncode == 0
    assert where.read_text() == "{}", "nothing was measured anew"
    assert project("--snapshot-update", a=1.6).returncode == 0
    assert json.loads(where.read_text())["model"] == "gpt2-small"


def test_the_goldens_are_where_the_readme_says() -> None:
    assert ROOT / "golden" == goldens.GOLDEN


def test_a_worker_keeps_the_tests_of_a_model_and_of_a_file() -> None:
    models = ("gpt2-small", "Phi-1_5")
    together = {
        "reproduction/test_a.py::test_x[gpt2-small-mean_ablation]": "gpt2-small",
        "reproduction/test_b.py::test_y[gpt2-small-mode_ablation]": "gpt2-small",
        "reproduction/test_b.py::test_y[Phi-1_5-mode_ablation]": "Phi-1_5",
        "tests/test_c.py::test_z[gpt2-tied]": "tests/test_c.py",
        "tests/test_c.py::test_w": "tests/test_c.py",
    }
    assert {nodeid: _kept_together(nodeid, models) for nodeid in together} == together

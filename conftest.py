"""Options, header and fixtures for every test of the project."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from ccm.cli.faults import fault
from ccm.errors import BadInput, CcmError, allowed
from ccm.experiment.fact_files import DATA_VARIABLE, pararel_folder
from ccm.experiment.options import paths_of_models
from ccm.experiment.plan import FACTS
from ccm.method.ablation_values import ablation_values
from ccm.models.devices import device_for, dtype_for
from ccm.models.specs import MODELS, PUBLISHED, spec_for
from ccm.models.weights import check_weights, weight_files
from tests.needs import NEEDS

SEED = 123


REAL = "smollm2-135m"  # the model that anyone can get
REPRODUCED = ("organism", REAL, *PUBLISHED)  # whose results are held to goldens or to the paper


@dataclass(frozen=True)
class Options:
    """The pytest options that say what is reproduced and how."""

    models: tuple[str, ...]
    ablation_values: tuple[str, ...]
    model_paths: dict[str, Path]
    device: str
    dtype: str
    artifacts: Path | None
    facts: str | None
    max_prompts: int | None
    require_gpu: bool
    require_weights: bool
    threads: int = 1
    network: bool = False


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ccm", "what to reproduce")
    group.addoption("--models", default="all", help="models to reproduce: names with commas, or all")
    group.addoption("--ablation-values", default="all", help="names with commas, or all")
    group.addoption("--model-path", action="append", default=[], metavar="NAME=PATH")
    group.addoption("--device", default="auto", help="for published models: cuda, cuda:N, auto, cpu")
    group.addoption("--dtype", default="float32", help="float32, bfloat16, float16")
    group.addoption("--facts", default=None, help="world, pararel, or a folder; default: the model's")
    group.addoption("--max-prompts", type=int, default=None, help="probing prompts, for a rehearsal")
    group.addoption(
        "--artifacts",
        default=None,
        help="figures, tables and reports go here (default: artifacts); where it is given, run folders "
        "are kept here, too, and resumed from",
    )
    group.addoption(
        "--threads", type=int, default=1, help="of torch in tests, but for benchmarks (default: 1)"
    )
    group.addoption("--require-gpu", action="store_true", help="fail where a GPU is missing")
    group.addoption("--require-weights", action="store_true", help="fail where weights are missing")


def _options(config: pytest.Config) -> Options:
    """Check the options once, so that a wrong one is a usage error and not a hundred failures."""
    try:
        paths = paths_of_models(config.getoption("--model-path"))
        named = config.getoption("--models")
        models = REPRODUCED if named == "all" else tuple(n.strip() for n in named.split(","))
        for name in paths:
            if name not in {*MODELS, *models}:
                raise BadInput(f"--model-path {name}=...: unknown model. {allowed(MODELS)}.")
        for name in models:
            spec = spec_for(name, paths)
            if name in paths:
                check_weights(spec)
        values = ablation_values([v.strip() for v in config.getoption("--ablation-values").split(",")])
        device_for(config.getoption("--device"))
        dtype_for(config.getoption("--dtype"))
        pararel_folder()
        facts, max_prompts = config.getoption("--facts"), config.getoption("--max-prompts")
        if facts not in (None, *FACTS) and not Path(facts).is_dir():
            raise BadInput(
                f"--facts {facts!r}: no such folder. Allowed: {', '.join(FACTS)}, or a folder."
            )
        if max_prompts is not None and max_prompts < 1:
            raise BadInput(f"--max-prompts {max_prompts}: out of range. Allowed: 1 and more.")
        threads = config.getoption("--threads")
        if threads < 1:
            raise BadInput(f"--threads {threads}: out of range. Allowed: 1 and more.")
    except CcmError as error:
        raise pytest.UsageError(str(error)) from error
    except Exception as error:
        raise pytest.UsageError(fault(error, sys.argv)) from error
    artifacts = config.getoption("--artifacts")
    return Options(
        models=models,
        ablation_values=tuple(v.name for v in values),
        model_paths=paths,
        device=_device_of_worker(config.getoption("--device")),
        dtype=config.getoption("--dtype"),
        artifacts=None if artifacts is None else Path(artifacts),
        facts=facts,
        max_prompts=max_prompts,
        require_gpu=config.getoption("--require-gpu"),
        require_weights=config.getoption("--require-weights"),
        threads=threads,
        network=config.getoption("--force-enable-socket"),
    )


def _device_of_worker(device: str) -> str:
    """Give every worker of pytest-xdist a GPU of its own, where there are several."""
    worker, n = os.environ.get("PYTEST_XDIST_WORKER", ""), torch.cuda.device_count()
    if device in ("auto", "cuda") and worker.startswith("gw") and n > 1:
        return f"cuda:{int(worker[2:]) % n}"
    return device


OPTIONS = pytest.StashKey[Options]()
UNCHECKED = pytest.StashKey[bool]()  # whether no test checks shapes: JAXTYPING_DISABLE=1

NO_NETWORK = {
    "HF_HUB_OFFLINE": "1",
    # Port 9 takes whatever comes, where anything listens there at all: a connection is refused at once.
    **{f"{kind}_PROXY": "http://127.0.0.1:9" for kind in ("HTTP", "HTTPS", "ALL")},
    "NO_PROXY": "",
}


def _cut_off() -> None:
    """Keep commands that tests start off the network; in tests themselves sockets are disabled."""
    for name, value in NO_NETWORK.items():
        os.environ[name] = value
        if name.endswith("PROXY"):
            os.environ[name.lower()] = value  # which many clients read first


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--force-enable-socket"):
        _cut_off()
    config.stash[OPTIONS] = _options(config)
    config.stash[UNCHECKED] = jaxtyping.config.jaxtyping_disable
    # Toy matrices are too small to share: a second thread only waits for the first.
    torch.set_num_threads(config.stash[OPTIONS].threads)
    # syrupy would delete the goldens of every test that a narrower selection leaves out.
    if any("::" in argument for argument in config.invocation_params.args):
        config.option.no_cleanup = True
        config.option.warn_unused_snapshots = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check tensors' shapes at run time, but not in whole runs, half of whose time that takes.

    What is called there is called in tests that do check.
    """
    off = item.config.stash[UNCHECKED] or item.get_closest_marker("whole_runs") is not None
    jaxtyping.config.update("jaxtyping_disable", off)


@pytest.fixture(autouse=True)
def _threads(pytestconfig: pytest.Config) -> None:
    """Undo what a command that a test ran in this process set: results hold for a number of threads."""
    torch.set_num_threads(pytestconfig.stash[OPTIONS].threads)


NUMERIC = {"tests.tolerance", "tests.exact"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that other kernels might fail: of files with margins, and those with goldens.

    By what they import, so that no list of them can be forgotten. Tests of a model's whole run come
    first: they take the longest.
    """
    models = config.stash[OPTIONS].models
    items.sort(key=lambda item: _kept_together(item.nodeid, models) not in models)
    for item in items:
        module = getattr(item, "module", None)
        if is_numeric(module) or "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("numeric")


def is_numeric(module: object) -> bool:
    """Whether a test file holds floats to margins: it has imported what they are made with."""
    held = vars(module).values() if module is not None else ()
    made_in = {getattr(v, "__module__", None) for v in held} | {type(v).__module__ for v in held}
    return bool(made_in & NUMERIC)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under `--dist loadgroup`, keep every model on one worker, which runs it once, and so every file.

    Not by xdist_group marks: xdist 3.8 writes them into node ids, which pytest 9.2 does not let change.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    models = config.stash[OPTIONS].models

    # In the order of collection, which has whole runs first: begun last, one would keep one worker busy
    # while the others have nothing left to do.
    config.option.loadscopereorder = False

    class ByModel(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _kept_together(nodeid, models)

    return ByModel(config, log)


def _kept_together(nodeid: str, models: Sequence[str]) -> str:
    """Name of what a test shares with others: its model's run, or the fixtures of its file."""
    file = nodeid.partition("::")[0]
    return next((model for model in models if f"[{model}-" in nodeid), file)


def pytest_report_header(config: pytest.Config) -> list[str]:
    options = config.stash[OPTIONS]
    found = [name for name in MODELS if weight_files(spec_for(name, options.model_paths))]
    data = pararel_folder() or f"none ({DATA_VARIABLE} not set)"
    packages = ("ccm", "torch", "transformers", "transformer_lens", "numpy")
    return [
        f"ccm: device {options.device} ({device_for(options.device)}), dtype {options.dtype}, "
        f"seed {SEED}, {options.threads} threads, kernels {torch.backends.cpu.get_cpu_capability()}",
        f"ccm: python {platform.python_version()}, "
        + ", ".join(f"{package} {version(package)}" for package in packages),
        f"ccm: weights found: {', '.join(found) or 'none'}; data folder: {data}",
        *(f"ccm: skipped here: {line}" for line in _skipped(config, options)),
    ]


def _skipped(config: pytest.Config, options: Options) -> Iterator[str]:
    """What a session on this machine leaves out, and what would run it."""
    from reproduction.pairs import missing  # which imports from here

    alike = dict[str, list[str]]()
    for model in options.models:
        if (lacking := missing(model, options)) is not None:
            alike.setdefault(lacking[0].replace(model, "MODEL"), []).append(model)
    yield from (f"{', '.join(models)}: {reason}" for reason, models in alike.items())
    yield from (f"what {need.reason}" for need in NEEDS if not need.there())
    if not config.getoption("--benchmark-only"):
        yield "benchmarks: tox -e bench"


@pytest.fixture(scope="session")
def options(request: pytest.FixtureRequest) -> Options:
    """The checked command-line options; read-only."""
    return request.config.stash[OPTIONS]


def artifact_root(config: pytest.Config) -> Path:
    """Folder for what a session leaves behind, which is not what it resumes from unless told to.

    An earlier session's figures may be written over; its runs must not stand for this code's.
    """
    return config.stash[OPTIONS].artifacts or config.rootpath / "artifacts"


@pytest.fixture(scope="session")
def run_root(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for run folders: `--artifacts`, or one that goes away; read-only for tests."""
    return options.artifacts or tmp_path_factory.mktemp("runs")

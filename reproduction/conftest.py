"""Runs each selected model once, all its ablation values in one run folder, for all tests here."""

import json
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.experiment.files import to_json
from ccm.models.specs import PUBLISHED
from ccm.paper.comparison import Comparison, comparison_of
from ccm.paper.report import one_line, read_comparison, write
from conftest import OPTIONS, Options, artifact_root
from reproduction.artifacts import Artifacts, Left, artifacts_of, write_index
from reproduction.goldens import GoldenExtension, NotHeld
from reproduction.pairs import Pair, pairs, rehearsal
from reproduction.provenance import write_provenance
from reproduction.runs import Run, Runs

COMPARISONS = pytest.StashKey[dict[str, Comparison]]()
REPORT_FOLDER = pytest.StashKey[Path]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.stash[OPTIONS]
    if "pair" in metafunc.fixturenames:
        # A test against the print asks for `comparison`, and there is one for published models only.
        published = "comparison" in metafunc.fixturenames
        only = {} if (mark := metafunc.definition.get_closest_marker("only")) is None else mark.kwargs
        metafunc.parametrize("pair", pairs(options, published=published, **only), scope="session")


@pytest.fixture(scope="session")
def runs(options: Options, run_root: Path) -> Runs:
    """Runs a pair's model under every selected ablation value, once; read-only."""
    return Runs(options, run_root)


@pytest.fixture
def run(pair: Pair, runs: Runs) -> Run:
    """The run of the pair's model; skips, or fails where told to, when the machine cannot run it."""
    return runs(pair)


@pytest.fixture
def scores(run: Run) -> Any:
    """Scores of the pair's run; read-only."""
    return run.scores


@pytest.fixture
def comparison(pair: Pair, run: Run, run_root: Path, pytestconfig: pytest.Config) -> Comparison:
    """The pair's model held against the paper, under all ablation values; kept for the report."""
    done = pytestconfig.stash.setdefault(COMPARISONS, {})
    pytestconfig.stash[REPORT_FOLDER] = run_root
    if pair.model not in done:
        done[pair.model] = comparison_of(run.results)
    return done[pair.model]


@pytest.fixture
def golden(
    pair: Pair, run: Run, options: Options, snapshot: SnapshotAssertion, pytestconfig: pytest.Config
) -> Iterator[SnapshotAssertion | NotHeld]:
    """The golden of this test and pair; where there is none to hold, comparing with it skips."""
    own = snapshot.use_extension(GoldenExtension)
    update = own.update_snapshots or getattr(own, "update_new_snapshots_only", False)
    where = Path(GoldenExtension.get_location(test_location=own.test_location, index=0))
    reason = rehearsal(pair, options)
    if reason is not None:
        # Nor may it be written.
        yield NotHeld(f"{reason}; it is held to no golden")
    elif pair.model in PUBLISHED and not where.is_file() and not update:
        yield NotHeld(
            "no golden: measure it with --snapshot-update on the stated device "
            f"(here {run.manifest['identity']['device_name']}, {options.dtype})"
        )
    else:
        yield own
        written = any(r.created or r.updated for r in own.executions.values())
        if written and pair.model in PUBLISHED:
            today = datetime.now(timezone.utc).date()
            write_provenance(run.spec, run.manifest, pytestconfig.invocation_params.args, today)


@pytest.fixture(scope="session")
def artifacts(options: Options, pytestconfig: pytest.Config) -> Artifacts:
    """Writes a model's figures, tables and report, once; read-only."""
    return Artifacts(options, artifact_root(pytestconfig))


@pytest.fixture
def left(pair: Pair, run: Run, artifacts: Artifacts, record_property: Any) -> Left:
    """What the pair's run leaves for people: files on disk, each recorded as a property of the test."""
    found = artifacts(pair, run)
    for path in found.paths:
        record_property("artifact", str(path))
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On a worker of pytest-xdist: send what was compared to the process that reports."""
    config = session.config
    if hasattr(config, "workeroutput") and COMPARISONS in config.stash:
        compared = [to_json(c) for c in config.stash[COMPARISONS].values()]
        config.workeroutput["compared"] = [str(config.stash[REPORT_FOLDER]), *compared]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Where workers report: take what one of them compared."""
    folder, *compared = getattr(node, "workeroutput", {}).get("compared", [None])
    if folder is not None:
        stash = node.config.stash
        stash[REPORT_FOLDER] = stash[OPTIONS].artifacts or Path(folder)
        done = stash.setdefault(COMPARISONS, {})
        done |= {c.model: c for c in map(read_comparison, map(json.loads, compared))}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Write the tolerance report, say in one line per model what it says, and index all artifacts."""
    comparisons = list(config.stash.get(COMPARISONS, {}).values())
    written = list[Path]()
    if comparisons:
        terminalreporter.section("held against the paper")
        for c in comparisons:
            terminalreporter.write_line(one_line(c))
        written = list(write(comparisons, config.stash[REPORT_FOLDER]))
        for path in written:
            terminalreporter.write_line(f"report: {path}")
    found = artifacts_of(terminalreporter.stats)
    if found:
        index = write_index(found, artifact_root(config), written)
        terminalreporter.section("artifacts")
        terminalreporter.write_line(
            f"{len({p for t in found for p in t.paths})} files, listed in {index}"
        )

"""Runs each selected model once, all its ablation values in one run folder, for all tests here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from syrupy.assertion import SnapshotAssertion

from ccm.experiment import RunConfig, run
from conftest import OPTIONS, SEED, Options
from reproduction.goldens import GoldenExtension
from reproduction.pairs import Pair, device_of, missing, pairs

N_CONTROLS = 100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", pairs(metafunc.config.stash[OPTIONS]), scope="session")


@pytest.fixture(scope="session")
def scores_of(options: Options, run_root: Path) -> Callable[[Pair], dict[str, Any]]:
    """Scores of a pair's model under every selected ablation value, computed once; read-only."""
    done: dict[str, dict[str, Any]] = {}

    def scores(pair: Pair) -> dict[str, Any]:
        if pair.model not in done:
            config = RunConfig(
                model=pair.model,
                ablation_value=options.ablation_values,
                controls=N_CONTROLS,
                device=device_of(pair, options),
                dtype=options.dtype,
                seed=SEED,
                model_paths=options.model_paths,
            )
            done[pair.model] = run(config, run_root / pair.model)
        return done[pair.model]

    return scores


@pytest.fixture
def scores(pair: Pair, options: Options, scores_of: Callable[[Pair], dict[str, Any]]) -> dict[str, Any]:
    """Scores of the pair's run; skips, or fails where told to, when the machine cannot run it."""
    lacking = missing(pair, options)
    if lacking is not None:
        reason, fail = lacking
        (pytest.fail if fail else pytest.skip)(reason)
    return scores_of(pair)


@pytest.fixture
def golden(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """The golden of this test and pair."""
    return snapshot.use_extension(GoldenExtension)

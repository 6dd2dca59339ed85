"""What all benchmarks share: ratios in `extra_info`, a table of them, no names of this machine."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

from ccm.models.limits import cores

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Times say nothing in the middle of other tests."""
    if not config.getoption("--benchmark-only"):
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="a benchmark: run with tox -e bench"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Use every core: other than in the tests, matrices are large enough to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(cores())
    yield
    torch.set_num_threads(before)


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Keep what matters for reading a time, and nothing that names a machine."""
    info = output_json["machine_info"]
    kept = ("system", "machine", "python_version", "python_implementation")
    output_json["machine_info"] = {key: info[key] for key in kept if key in info}
    output_json["machine_info"]["threads"] = cores()
    output_json["commit_info"].pop("branch", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print every ratio beside that of the last saved run."""
    session = getattr(config, "_benchmarksession", None)
    found = {b.name: b.extra_info for b in getattr(session, "benchmarks", [])}
    ratios = {name: info for name, info in found.items() if "ratio" in info}
    if not ratios:
        return
    saved = sorted(Path(session.storage.path).glob("**/*.json"), key=lambda p: p.name)
    saved = [path for path in saved if path.name != getattr(session, "_saved", None)]
    last: dict[str, Any] = {}
    # The newest file may be this very run's.
    for path in saved[::-1][:2]:
        runs = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
        before = {run["name"]: run["extra_info"] for run in runs}
        if any(before.get(name, {}).get("ratio") != info["ratio"] for name, info in ratios.items()):
            last = before
            break
    write = terminalreporter.write_line
    terminalreporter.write_sep("-", "ratios, against the last saved run")
    write(f"{'benchmark':58s}{'ratio':>9s}{'last':>9s}{'target':>9s}  of")
    for name, info in ratios.items():
        was = last.get(name, {}).get("ratio")
        write(
            f"{name:58s}{info['ratio']:9.3f}{'-' if was is None else f'{was:.3f}':>9s}"
            f"{info.get('target', '-')!s:>9s}  {info['of']}"
        )


@pytest.fixture
def best_of() -> Callable[..., float]:
    """Shortest of some timed calls, seconds: what the machine can do when nothing disturbs it."""

    def best(call: Callable[[], object], rounds: int = 3) -> float:
        times = []
        for _ in range(rounds):
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        return min(times)

    return best

"""Shards of a run: decoded apart, merged bit for bit, and refused where they do not belong together."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.folder import (
    ACTIVATION_STATS,
    MANIFEST,
    MEASURES,
    PROMPTS,
    RHO_BY_LAYER,
    SCORES,
)
from ccm.experiment.merging import merge_shards
from ccm.models.specs import CHECKPOINT
from tests.made_runs import few_facts
from tests.needs import XDIST

pytestmark = pytest.mark.whole_runs

ROOT = Path(__file__).parents[2]
N = 3
# A small budget, so that there are more batches than shards.
RUN = (
    *(
        "run",
        "--model",
        "organism",
        "--controls",
        "3",
        "--ablation-value",
        "mean_ablation,mode_ablation",
    ),
    *("--max-prompts", "60", "--memory-budget", "2M"),
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_facts(tmp_path_factory.mktemp("facts"), every=10)


@pytest.fixture(scope="module")
def whole(facts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one piece; read-only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*RUN, "--facts", str(facts), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def shards(facts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run in three shards; read-only."""
    folders = [tmp_path_factory.mktemp("shards") / f"shard_{i}" for i in range(1, N + 1)]
    for i, folder in enumerate(folders, 1):
        given = [*RUN, "--facts", str(facts), "--shard", f"{i}/{N}", "--out", str(folder)]
        assert main(given) == 0
    return folders


def test_a_shard_keeps_the_budget_that_all_are_cut_by(
    facts: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*RUN, "--facts", str(facts), "--shard", f"1/{N}", "--out", str(shards[0])]
    assert main([*given, "--memory-budget", "3M"]) == 2
    assert "began with 2097152 bytes, and all shards" in capsys.readouterr().err
    assert main(given) == 0
    assert manifest(shards[0])["memory_budget"] == 2 << 20


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds times."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def check_merged(merged: Path, whole: Path) -> None:
    """Hold a merged run to the run in one piece, bit for bit."""
    assert files(merged) == files(whole)
    mine, its = manifest(merged), manifest(whole)
    for key in its:
        if key not in ("timings_s", "work"):
            assert mine[key] == its[key], key
    # Refereed prefixes and all: the same batches were decoded, each by one shard.
    assert mine["work"] == its["work"]


def test_shards_merge_to_the_run_in_one_piece(whole: Path, shards: list[Path], tmp_path: Path) -> None:
    prompts = [manifest(folder)["work"]["prompts"] for folder in shards]
    assert sum(prompts) == manifest(whole)["prompts"] == 60
    assert all(prompts), f"a shard without work: {prompts}"
    assert not any((folder / SCORES).exists() for folder in shards)
    found = merge_shards(shards[::-1], tmp_path / "run")
    assert found == json.loads((whole / SCORES).read_text(encoding="utf-8"))
    check_merged(tmp_path / "run", whole)


@pytest.mark.parametrize(("met", "kept"), [((1e-6, 3e-6, 2e-6), 3e-6), ((None, None, None), None)])
def test_the_largest_error_of_all_shards_is_kept(
    met: tuple[float | None, ...], kept: float | None, shards: list[Path], tmp_path: Path
) -> None:
    def change(held: dict[str, Any], error: float | None) -> None:
        del held["float32_error"]
        held |= {} if error is None else {"float32_error": error}

    folders = [
        edited(folder, tmp_path / f"shard_{i}", lambda held, error=error: change(held, error))
        for i, (folder, error) in enumerate(zip(shards, met, strict=True))
    ]
    merge_shards(folders, tmp_path / "run")
    assert manifest(tmp_path / "run").get("float32_error") == kept


def test_merge_on_the_command_line(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["merge", *map(str, shards), "--out", str(tmp_path / "run")]
    assert main(given) == 0
    first = capsys.readouterr().out
    assert "organism, protocol corrected, 60 probing prompts" in first
    assert main(given) == 0, "a merge that is done is read"
    assert capsys.readouterr().out == first


def test_a_shard_goes_on_where_it_stopped(shards: list[Path], facts: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(shards[0], tmp_path / "shard"))
    held = manifest(out)
    shard, *_ = sorted((out / "batches" / "ablations").iterdir())
    lost = shard.read_bytes()
    shard.unlink()
    (out / MANIFEST).write_text(json.dumps({**held, "complete": False}))
    given = [*RUN, "--facts", str(facts), "--shard", f"1/{N}", "--out", str(out)]
    assert main(given) == 0
    assert shard.read_bytes() == lost


def edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a shard with another manifest."""
    shutil.copytree(folder, out)
    held = manifest(folder)
    change(held)
    (out / MANIFEST).write_text(json.dumps(held))
    return out


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another seed": (
        lambda m: m["identity"].update(seed=7),
        r"another run than .* \(seed is 7, 123",
    ),
    "other weights": (lambda m: m["identity"].update(weights_sha256="0"), r"\(weights_sha256 is '0'"),
    "another budget": (lambda m: m.update(memory_budget=1), r"\(memory_budget is 1, 2097152 there"),
    "other prompts": (lambda m: m.update(prompts_sha256="0"), r"\(prompts_sha256 is '0'"),
    "another n": (lambda m: m["identity"].update(shard="3/4"), r"shard 3/4, beside 1/3 of"),
    "the same shard": (lambda m: m["identity"].update(shard="1/3"), r"shard 1/3 is given twice"),
    "unfinished": (lambda m: m.update(complete=False), r"shard 3/3 is not finished\. Run its command"),
    "another format": (lambda m: m.update(format=2), r"other: a run folder of format 2, and this"),
    "no format": (lambda m: m.pop("format"), r"other: a run folder of format none, and this"),
    "a whole run": (lambda m: m["identity"].update(shard=None), r"no shard of a run\. Give folders of"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_shards_of_different_runs_are_refused(case: str, shards: list[Path], tmp_path: Path) -> None:
    change, message = CHANGES[case]
    other = edited(shards[2], tmp_path / "other", change)
    with pytest.raises(BadInput, match=message):
        merge_shards([*shards[:2], other], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gaps_are_refused(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^shard 2/3 is missing\. Run it, and give its folder too\.$"):
        merge_shards([shards[0], shards[2]], tmp_path / "run")
    torn = Path(shutil.copytree(shards[1], tmp_path / "torn"))
    next((torn / "batches" / "ablations").iterdir()).unlink()
    with pytest.raises(BadInput, match=r"^3 shards: prompt \d+ is missing\. Run the commands of all"):
        merge_shards([shards[0], torn, shards[2]], tmp_path / "run")
    with pytest.raises(BadInput, match=r"nothing: no run folder \(no manifest.json\)"):
        merge_shards([*shards[:2], tmp_path / "nothing"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [PROMPTS, ACTIVATION_STATS, RHO_BY_LAYER, MEASURES])
def test_preparations_that_differ_are_refused(name: str, shards: list[Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(shards[2], tmp_path / "other"))
    content = bytearray((other / name).read_bytes())
    content[-1] ^= 1
    (other / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"{name}: not the same bytes as in .* machines of one kind\.$"):
        merge_shards([*shards[:2], other], tmp_path / "run")


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("0/3", "shard 0/3: out of range. Allowed: 1/3 to 3/3"),
        ("4/3", "shard 4/3: out of range. Allowed: 1/3 to 3/3"),
        ("1/0", "shard 1/0: out of range"),
        ("1", "--shard '1': no shard. Give I/N, like 2/8."),
        ("a/b", "--shard 'a/b': no shard"),
    ],
)
def test_shards_that_there_are_not(
    shard: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    try:
        code: Any = main(["run", "--model", "organism", "--shard", shard, "--out", str(out)])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_the_hooked_engine_has_shards_too(tmp_path: Path) -> None:
    few = ["--max-prompts", "6", "--controls", "1", "--engine", "hooked"]
    run = ["run", "--model", "organism", *few, "--facts", str(CHECKPOINT)]
    folders = [tmp_path / f"shard_{i}" for i in (1, 2)]
    for i, folder in enumerate(folders, 1):
        assert main([*run, "--shard", f"{i}/2", "--out", str(folder)]) == 0
    assert main(["merge", *map(str, folders), "--out", str(tmp_path / "merged")]) == 0
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    scores = [(tmp_path / name / SCORES).read_bytes() for name in ("merged", "whole")]
    assert scores[0] == scores[1]


WORKER = """
import os
import pytest
import torch
from ccm.cli.parser import main

@pytest.mark.parametrize("i", range(1, {n} + 1))
def test_share(i):
    out = os.path.join({out!r}, f"shard_{{i}}")
    assert main([*{run!r}, "--facts", {facts!r}, "--shard", f"{{i}}/{n}", "--out", out]) == 0
    with open(out + ".worker", "w") as stream:
        stream.write(os.environ["PYTEST_XDIST_WORKER"])
"""


def test_shards_of_real_workers_merge_to_the_run_in_one_piece(
    whole: Path, facts: Path, tmp_path: Path
) -> None:
    """Three processes at a time, as pytest-xdist starts them."""
    XDIST.check()
    source = WORKER.format(n=N, out=str(tmp_path), run=RUN, facts=str(facts))
    (tmp_path / "test_shards.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(N), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_shards.py")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    workers = {(tmp_path / f"shard_{i}.worker").read_text() for i in range(1, N + 1)}
    assert len(workers) == N, f"shards ran in {workers}"
    merge_shards([tmp_path / f"shard_{i}" for i in range(1, N + 1)], tmp_path / "run")
    check_merged(tmp_path / "run", whole)

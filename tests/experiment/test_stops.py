"""A run that is stopped at any file operation whatever goes on to the same bytes."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

import ccm.experiment.run
import ccm.reporting.report
from ccm.cli.parser import main
from ccm.decoding import batching
from ccm.decoding import shared as decoding
from ccm.errors import BadInput, CcmError
from ccm.experiment import plan
from ccm.experiment.config import RunConfig
from ccm.experiment.folder import (
    BATCHES,
    FILES,
    MANIFEST,
    PROMPT_EFFECTS,
    PROMPTS,
    SCORES,
    SET_EFFECTS,
    RunFolder,
)
from ccm.experiment.merging import merge_shards
from ccm.experiment.results import read_results
from ccm.experiment.run import run, run_shard
from ccm.reporting.report import write_report
from tests.experiment.test_merging import files, manifest
from tests.experiment.test_run import loaded
from tests.experiment.test_writing import no_file_above
from tests.made_runs import few_facts
from tests.stops import forsake, full_disk, recorded, what_lies_in

pytestmark = pytest.mark.whole_runs

VALUES = ("mode_ablation",)
# What the manifest says is done, and the files that are there then.
STAGES: dict[str, set[str]] = {
    "prompts": {PROMPTS},
    "measures": {"measures.parquet", "singular_values.parquet", "rho_by_layer.parquet"},
    "activation_stats": {"activation_stats.safetensors"},
    "scores": {
        *(SCORES, "plain.parquet", SET_EFFECTS),
        *(f"{value}/{name}" for value in VALUES for name in ("entropy.parquet", PROMPT_EFFECTS)),
    },
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_facts(tmp_path_factory.mktemp("facts"), every=24)


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Computes everything once: what is tested is what becomes of files."""
    known: dict[str, Any] = {}

    def once(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(*given: Any, **options: Any) -> Any:
            told = {k: v for k, v in options.items() if k != "memory_budget"}
            key = repr((name, [g for g in given[1:] if not callable(g)], told))
            if key not in known:
                known[key] = compute(*given, **options)
            return known[key]

        return remembered

    def parts_once(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Parts that are there already are left out, as the function itself does."""

        def remembered(*given: Any, done: Any = (), work: Any = None, **options: Any) -> Any:
            if options.get("observe") is not None:
                yield from compute(*given, **options)
                return
            # What is called depends on what is given beside it.
            told = {k: v for k, v in options.items() if not callable(v)}
            key = repr((name, [g for g in given[1:] if not callable(g)], told))
            if key not in known:
                known[key] = list(compute(*given, **options))
            for part in known[key]:
                if not set(part.prompts.tolist()) <= set(done):
                    if work is not None:
                        work.prompts += len(part.prompts)
                    yield part

        return remembered

    model = loaded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ccm.experiment.run, "load", lambda *_: model)
        make_plan = once("plan", lambda _, config: plan.make_plan(config))
        patch.setattr(ccm.experiment.run, "make_plan", partial(make_plan, None))
        patch.setattr(decoding, "decode_sets", parts_once("sets", decoding.decode_sets))
        identities: dict[str, dict[str, Any]] = {}
        patch.setattr(
            ccm.experiment.run,
            "identity",
            lambda plan_: (
                identities.get(repr(plan_.config))
                or identities.setdefault(repr(plan_.config), plan.identity(plan_))
            ),
        )
        for name in ("collect", "measure", "rho_by_layer"):
            patch.setattr(ccm.experiment.run, name, once(name, getattr(ccm.experiment.run, name)))
        patch.setattr(batching, "MAX_BATCH", 5)  # several shards at every stage
        patch.setattr(os, "fsync", lambda _: None)  # no machine crashes here
        yield


@pytest.fixture(scope="module")
def config(quick: None, facts: Path) -> RunConfig:
    return RunConfig(
        model="organism",
        facts=str(facts),
        device="cpu",
        max_prompts=12,
        controls=1,
        matched_controls=1,
        ablation_values=VALUES,
    )


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stopped; read-only."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(config, out)
    return out


def check_claims(folder: Path) -> None:
    """What the manifest says is done is there."""
    if not (folder / MANIFEST).exists():
        return
    held = manifest(folder)
    for stage in held.get("done", []):
        for name in STAGES.get(stage, ()):
            assert (folder / name).is_file(), f"{stage} is done, and {name} is not there"
    if held["complete"]:
        assert RunFolder(folder, held["identity"]).missing() == []


def check_same(folder: Path, whole: Path) -> None:
    assert files(folder) == files(whole)
    assert not (folder / BATCHES).exists()
    held, expected = manifest(folder), manifest(whole)
    assert held["complete"] is True
    for key in ("identity", "sets", "prompts_sha256", "effects", "done", "float32_error"):
        assert held.get(key) == expected.get(key), key


def stop_everywhere(
    start: Callable[[Path], object], whole: Path, tmp_path: Path, check: Callable[[Path, Path], None]
) -> list[tuple[str, str]]:
    """Do something once, and again from what lay there at each of its file operations.

    Many operations find the same there, as far as anybody reads it: those are gone on from once.
    """
    out, states = tmp_path / "run", tmp_path / "states"
    with recorded(out, states) as operations:
        start(out)
    check(out, whole)
    seen = set[frozenset[tuple[str, int]]]()
    for i, operation in enumerate(operations):
        state = states / str(i)
        found = what_lies_in(state)
        try:
            if found not in seen:
                check_claims(state)
                forsake(state)
                start(state)
                check(state, whole)
        except Exception as error:
            raise AssertionError(f"stopped at operation {i}, {operation}: {error}") from error
        seen.add(found)
    print(f"{len(operations)} operations, {len(seen)} states")
    return operations


def test_a_run_stopped_at_any_file_operation_goes_on_to_the_same_bytes(
    config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    operations = stop_everywhere(lambda out: run(config, out), whole, tmp_path, check_same)
    seen = {event for event, _ in operations}
    assert {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"} <= seen
    for stage in ("answers", "ablations"):
        begin = f"{BATCHES}/{stage}/batch"
        removed = [n for event, n in operations if event == "os.remove" and n.startswith(begin)]
        assert len(removed) >= 3, f"too few shards of {stage} for a stop between them"


# --- merging ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same run in two shards; read-only."""
    folders = [tmp_path_factory.mktemp("shards") / f"shard_{i}" for i in (1, 2)]
    for i, folder in enumerate(folders, 1):
        run_shard(replace(config, shard=(i, 2)), folder)
    return folders


def test_a_merge_stopped_at_any_file_operation_goes_on_to_the_same_bytes(
    shards: list[Path], whole: Path, tmp_path: Path
) -> None:
    def check(folder: Path, expected: Path) -> None:
        check_same(folder, expected)
        assert manifest(folder)["work"] == manifest(tmp_path / "run")["work"]
        stages = set(manifest(shards[0])["timings_s"])
        times = [[manifest(shard)["timings_s"][stage] for shard in shards] for stage in stages]
        merged = [manifest(folder)["timings_s"][stage] for stage in stages]
        assert merged == pytest.approx([sum(t) for t in times]), "times counted twice"

    operations = stop_everywhere(lambda out: merge_shards(shards, out), whole, tmp_path, check)
    assert {"os.rename", "os.remove", "os.rmdir"} <= {event for event, _ in operations}


def test_a_shard_stopped_at_its_end_goes_on_to_the_same_bytes(
    config: RunConfig, shards: list[Path], whole: Path, tmp_path: Path
) -> None:
    """Its beginning is that of a run."""
    second = replace(config, shard=(2, 2))
    out, states = tmp_path / "run", tmp_path / "states"
    with recorded(out, states) as operations:
        run_shard(second, out)
    last = max(i for i, (_, name) in enumerate(operations) if name.startswith(f"{BATCHES}/ablations"))
    found = {what_lies_in(states / str(i)): i for i in range(last - 4, len(operations))}
    assert len(found) > 5
    for i in found.values():
        state = states / str(i)
        check_claims(state)
        forsake(state)
        run_shard(second, state)
        assert files(state) == files(shards[1]), operations[i]
        assert manifest(state)["complete"] is True


def lose(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [lose, tear])
@pytest.mark.parametrize("name", ["batches/ablations/batch_*", PROMPTS, "measures.parquet"])
def test_what_a_finished_shard_lost_is_made_again_by_its_command(
    damage: Callable[[Path], None],
    name: str,
    config: RunConfig,
    shards: list[Path],
    whole: Path,
    tmp_path: Path,
) -> None:
    torn = Path(shutil.copytree(shards[1], tmp_path / "torn"))
    hurt = next(torn.glob(name))
    damage(hurt)
    with pytest.raises(BadInput) as caught:
        merge_shards([shards[0], torn], tmp_path / "merged")
    if damage is tear:
        if name.startswith(BATCHES):
            assert str(caught.value).endswith("Remove it to compute it again.")
        hurt.unlink()
    else:
        assert re.search(r"Run (its command|the commands of all shards) again", str(caught.value))
    assert not (tmp_path / "merged").exists()
    run_shard(replace(config, shard=(2, 2)), torn)
    assert files(torn) == files(shards[1])
    merge_shards([shards[0], torn], tmp_path / "merged")
    check_same(tmp_path / "merged", whole)


# --- shards that do not fit ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halfway(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped when all shards of the ablations were there; read-only."""
    folder = tmp_path_factory.mktemp("halfway")
    out, states = folder / "run", folder / "states"
    with recorded(out, states) as operations:
        run(config, out)
    at = next(i for i, (_, name) in enumerate(operations) if PROMPT_EFFECTS in name)
    forsake(states / str(at))
    return states / str(at)


def shards_of(folder: Path) -> list[Path]:
    found = sorted((folder / BATCHES / "ablations").glob("batch_*"))
    assert len(found) >= 3
    return found


def another(path: Path, to: Path) -> None:
    """A shard of another run."""
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, to, metadata={"of": "ablations 0"})


# What is done to the shards of a run that was stopped, and what the next start says.
DAMAGES: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "a prompt twice": (
        lambda found: shutil.copy(found[0], found[0].with_name("batch_999999.safetensors")),
        r"batch_999999\.safetensors: holds prompt \d+ as batch_\d+\.safetensors does\. Remove ",
    ),
    "of another run": (
        lambda found: another(found[0], found[0]),
        r"\.safetensors: no batch of this stage of this run\. Remove ",
    ),
    "without a stamp": (
        lambda found: safetensors.numpy.save_file(safetensors.numpy.load_file(found[1]), found[1]),
        r"\.safetensors: no batch of this stage of this run\. Remove ",
    ),
    "torn": (
        lambda found: found[2].write_bytes(found[2].read_bytes()[:-1]),
        r"\.safetensors: damaged \(.*\)\. Remove it to compute it again\.",
    ),
    "empty": (
        lambda found: found[0].write_bytes(b""),
        r"\.safetensors: damaged \(.*\)\. Remove it to compute it again\.",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_shards_that_do_not_fit_are_named_and_the_way_out_leads_out(
    case: str, config: RunConfig, halfway: Path, whole: Path, tmp_path: Path
) -> None:
    damage, message = DAMAGES[case]
    out = Path(shutil.copytree(halfway, tmp_path / "run"))
    damage(shards_of(out))
    for _ in range(2):
        with pytest.raises(BadInput, match=message) as caught:
            run(config, out)
    named = Path(str(caught.value).partition(": ")[0])
    told = str(caught.value).partition("Remove ")[2].partition(": ")[0]
    if told.startswith("it "):
        named.unlink()
    else:
        shutil.rmtree(told)
    run(config, out)
    check_same(out, whole)


@pytest.mark.parametrize("lost", [slice(0, 1), slice(1, None), slice(None)])
def test_shards_that_are_missing_are_decoded_again(
    lost: slice, config: RunConfig, halfway: Path, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(halfway, tmp_path / "run"))
    for path in shards_of(out)[lost]:
        path.unlink()
    run(config, out)
    check_same(out, whole)


def test_files_of_others_among_the_shards_stay_and_are_in_nobodys_way(
    config: RunConfig, halfway: Path, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(halfway, tmp_path / "run"))
    for name in ("notes.txt", ".nfs0000001", "shard_1.safetensors.bak"):
        (out / BATCHES / "ablations" / name).write_text("mine")
    run(config, out)
    left = {p.name for p in (out / BATCHES / "ablations").iterdir()}
    assert left == {"notes.txt", ".nfs0000001", "shard_1.safetensors.bak"}
    assert (out / SCORES).read_bytes() == (whole / SCORES).read_bytes()
    assert manifest(out)["complete"] is True


def test_shards_that_cannot_be_removed_stop_nothing(
    config: RunConfig, halfway: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unlink = Path(shutil.copytree(halfway, tmp_path / "run")), Path.unlink

    def refused(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("shard_"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        run(config, out)
    assert (out / SCORES).read_bytes() == (whole / SCORES).read_bytes()
    assert manifest(out)["complete"] is True


@pytest.mark.parametrize(
    "name",
    [*FILES, SCORES, "plain.parquet", "mode_ablation/control_000.parquet"],
)
def test_a_file_that_is_removed_from_a_finished_run_is_made_again(
    name: str, config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    (out / name).unlink()
    run(config, out)
    check_same(out, whole)


# --- a full disk --------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_any_new_file_stops_with_a_line_and_the_run_goes_on(
    config: RunConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(tmp_path / "run", tmp_path / "states") as operations:
        run(config, tmp_path / "run")
    # The first file of each kind: what follows is written in the same way.
    kinds: dict[str, int] = {}
    for i, (event, name) in enumerate(operations):
        if event == "open":
            kinds.setdefault(re.sub(r"[0-9]+|\.[a-z0-9_]{8}\.partial$", "", name), i)
    assert len(kinds) > 15
    for kind, at in kinds.items():
        out = tmp_path / "full" / str(at)
        with full_disk(out, at) as refused, pytest.raises(CcmError) as caught:
            run(config, out)
        message = str(caught.value)
        assert "No space left on device" in message, kind
        assert "\n" not in message
        assert refused, kind
        held = [name for name in files(out) if name.endswith(".partial") or name.startswith(".lock")]
        assert held == [], f"{kind}: left over"
        run(config, out)
        check_same(out, whole)


def test_the_command_line_says_it_in_one_line(
    facts: Path, config: RunConfig, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system itself refuses: no file may be longer than some are."""
    out = tmp_path / "run"
    given = [
        "run",
        "--model",
        "organism",
        "--facts",
        str(facts),
        "--device",
        "cpu",
        "--max-prompts",
        "12",
    ]
    given += ["--controls", "1", "--ablation-value", VALUES[0], "--out", str(out)]
    with no_file_above(3500):
        assert main(given) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.match(rf"ccm: {out}/\S+: cannot be written \(File too large\)\. Nothing half-", last)
    assert last.endswith("give the same command again: a run goes on where it stopped.")
    assert (out / MANIFEST).is_file()
    assert main(given) == 0
    check_same(out, whole)


# --- what is made of a run ----------------------------------------------------------------------------


def test_a_report_stopped_at_any_file_operation_leaves_whole_files(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ccm.reporting.report.figures_of_run
    monkeypatch.setattr(ccm.reporting.report, "figures_of_run", lambda run: list(few(run))[:1])
    monkeypatch.setattr(ccm.reporting.report, "figures_across", lambda _: [])
    out, states = Path(shutil.copytree(whole, tmp_path / "run")), tmp_path / "states"

    def report(folder: Path) -> None:
        write_report([read_results(folder)], folder)

    with recorded(out, states) as operations:
        report(out)
    made = files(out)
    assert {"report.html", "report.md"} <= made.keys()
    for i, operation in enumerate(operations):
        for name, content in files(states / str(i)).items():
            if not name.endswith(".partial") and not name.startswith(".lock"):
                assert content == made[name], f"half of {name} at {operation}"
    for i in (0, len(operations) // 2):
        forsake(states / str(i))
        report(states / str(i))
        assert files(states / str(i)) == made

"""A run leaves a whole folder: the same bytes after any interruption, the same with both engines."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

import ccm.experiment.run
from ccm.cli.parser import main
from ccm.decoding import shared
from ccm.decoding.activations import float16_sigma
from ccm.decoding.engine import Asked, Engine
from ccm.experiment.config import RunConfig
from ccm.experiment.files import read_statistics
from ccm.experiment.folder import (
    ACTIVATION_STATS,
    BATCHES,
    MANIFEST,
    MEASURES,
    PROMPT_EFFECTS,
    PROMPTS,
    RHO_BY_LAYER,
    SCORE_TABLE,
    SCORES,
    SET_EFFECTS,
    SINGULAR_VALUES,
    RunFolder,
)
from ccm.experiment.plan import make_plan
from ccm.experiment.run import statistics_step
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import matched_controls
from ccm.method.sources import SOURCES
from ccm.method.statistics import STATISTICS
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, MAX_NEW_TOKENS, MODELS, ModelSpec
from ccm.models.weights import file_hashes
from tests.tolerance import ENTROPY, LOG_PROBABILITY

pytestmark = pytest.mark.whole_runs

N_PROMPTS, N_CONTROLS, N_MATCHED = 24, 3, 2
VALUES = ("mean_ablation", "mean_plus_sigma_ablation")
CONTROLS = tuple(f"control_{i:03d}" for i in range(N_CONTROLS))
MATCHED = tuple(f"matched_{i:03d}" for i in range(N_MATCHED))
SETS = ("entropy", *CONTROLS, *MATCHED)
FILTERS = ("after_subject_object_filter", "after_example_filter", "after_relation_group_filter")
ENGINES = ("shared", "hooked")
each_engine = pytest.mark.parametrize("engine", ENGINES)

Run = Callable[..., Path]


def command(out: Path, *more: str, values: str = ",".join(VALUES)) -> list[str]:
    """A small run of the organism; a small budget, so that it decodes in several shards."""
    small = ["--max-prompts", str(N_PROMPTS), "--controls", str(N_CONTROLS), "--memory-budget", "2M"]
    small += ["--matched-controls", str(N_MATCHED)]
    fixed = ["--model", "organism", "--facts", few_facts(), "--device", "cpu", "--seed", "123"]
    return ["run", *fixed, *small, "--ablation-value", values, "--out", str(out), *more]


@functools.cache
def few_facts() -> str:
    """A folder with every fourth of the organism's facts."""
    folder = Path(tempfile.mkdtemp(prefix="ccm-facts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    facts = pd.read_csv(CHECKPOINT / "facts.csv", dtype=str, keep_default_na=False)
    facts.iloc[::4].to_csv(folder / "facts.csv", index=False)
    shutil.copy(CHECKPOINT / "relations.csv", folder)
    return str(folder)


@functools.cache
def loaded() -> LoadedModel:
    """The organism, loaded once; read-only."""
    return load(MODELS["organism"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the organism once for all runs of this file that do not load anything else."""

    def cached(spec: ModelSpec, device: Any, dtype: str, bos: Any) -> LoadedModel:
        own = (spec, dtype, bos) == (MODELS["organism"], "float32", "own")
        return loaded() if own else load(spec, device, dtype, bos)

    monkeypatch.setattr(ccm.experiment.run, "load", cached)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs that nothing interrupted, each computed once; read-only."""

    @functools.cache
    def run(*more: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert main(command(folder, *more)) == 0
        return folder

    return run


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SCORES).read_text(encoding="utf-8"))


def cell(folder: Path, name: str, value: str = VALUES[0]) -> pd.DataFrame:
    return pd.read_parquet(folder / (f"{value}/{name}.parquet" if name != "plain" else "plain.parquet"))


@pytest.mark.usefixtures("quick")
def test_facts_are_run_once_and_prompts_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for activation statistics, whose activations fit in memory, and once for all cells."""
    seen = list[str]()
    run, read_last = Engine.run, shared.read_last_positions

    def counted(self: Engine, asked: Asked, *more: Any) -> Any:
        seen.extend(map(str, asked.prompts))
        return run(self, asked, *more)

    def exact(model: LoadedModel, prompts: Sequence[Any], *more: Any, **options: Any) -> Any:
        near.extend(map(str, prompts))
        return read_last(model, prompts, *more, **options)

    near = list[str]()
    monkeypatch.setattr(Engine, "run", counted)
    monkeypatch.setattr(shared, "read_last_positions", exact)
    out = tmp_path / "run"
    assert main([*command(out), "--memory-budget", "200M"]) == 0
    times = Counter(seen)
    n_facts = manifest(out)["facts"]["facts"]
    assert Counter(times.values()) == {1: n_facts, 2: N_PROMPTS}, "a fact or a prompt was run again"
    assert len(near) < n_facts / 10, "of candidates that nearly tie, in float64"
    assert manifest(out)["work"]["prompts"] == N_PROMPTS


# --- what a run leaves behind -------------------------------------------------------------------------


@each_engine
def test_a_run_leaves_the_whole_folder_and_nothing_else(whole: Run, engine: str) -> None:
    cells = {f"{value}/{name}.parquet" for value in VALUES for name in SETS}
    cells |= {f"{value}/{PROMPT_EFFECTS}" for value in VALUES}
    fixed = {MANIFEST, PROMPTS, MEASURES, SINGULAR_VALUES, ACTIVATION_STATS, SCORES, "plain.parquet"}
    fixed |= {RHO_BY_LAYER, SET_EFFECTS, SCORE_TABLE}
    assert names(whole("--engine", engine)) == fixed | cells


def test_the_manifest_says_what_was_run(whole: Run) -> None:
    folder = whole("--engine", "shared")
    held, identity = manifest(folder), manifest(folder)["identity"]
    assert held["complete"] is True
    expected = {
        "model": "organism",
        **file_hashes(MODELS["organism"]),
        "bos": "own",
        "protocol": "corrected",
        "seed": 123,
        "device": "cpu",
        "dtype": "float32",
        "ablation_values": list(VALUES),
        "controls": N_CONTROLS,
        "matched_controls": N_MATCHED,
        "engine": "shared",
    }
    assert {key: identity[key] for key in expected} == expected
    assert {"python", "ccm", "torch", "transformers", "transformer_lens"} <= identity["versions"].keys()
    assert held["prompts"] == N_PROMPTS == len(pd.read_parquet(folder / PROMPTS))
    first = pd.read_parquet(folder / PROMPTS)["knowledge_probing_prompt"][0]
    assert held["first_prompt_tokens"] == loaded().encode(first)
    assert len(held["prompts_sha256"]) == 64
    stages = ["load", "measures", "prompts", "activation_stats", "ablations", "scores"]
    assert [*held["timings_s"]] == stages
    assert all(seconds >= 0 for seconds in held["timings_s"].values())
    left = [held["facts"][step] for step in ("facts", *FILTERS)]
    assert left == sorted(left, reverse=True)
    relations = pd.read_csv(Path(str(MODELS["organism"].folder)) / "relations.csv")
    groups = dict(zip(relations["relation"], relations["relation_group_id"], strict=True))
    assert held["facts"]["relation_groups"] == groups


def test_another_prompt_has_another_hash(whole: Run, quick: None, tmp_path: Path) -> None:
    assert main([*command(tmp_path / "run"), "--max-prompts", "25", "--controls", "0"]) == 0
    hashes = {manifest(f)["prompts_sha256"] for f in (tmp_path / "run", whole("--engine", "shared"))}
    assert len(hashes) == 2


def test_measures_and_statistics_are_per_neuron(whole: Run) -> None:
    folder, d_mlp = whole("--engine", "shared"), MODELS["organism"].d_mlp
    measures = pd.read_parquet(folder / MEASURES)
    assert measures["neuron_idx"].tolist() == list(range(d_mlp))
    assert {"logitvar", "norm", "rho"} <= {*measures.columns}
    chosen = measures.loc[measures["entropy_neuron"], "neuron_idx"]
    assert set(chosen) == set(manifest(folder)["entropy_neurons"])
    tensors = safetensors.numpy.load_file(folder / ACTIVATION_STATS)
    assert all(tensors[name].shape == (d_mlp,) for name in STATISTICS)
    assert all(np.isfinite(tensors[name]).all() for name in STATISTICS)
    # Every prompt position, and every generated token but the last, which is never fed back.
    texts = pd.read_parquet(folder / PROMPTS)["knowledge_probing_prompt"]
    said = cell(folder, "plain")["tokens"].str.len()
    positions = sum(len(loaded().encode(text)) for text in texts)
    assert tensors["n_positions"].tolist() == [positions + said.clip(upper=MAX_NEW_TOKENS - 1).sum()]


@each_engine
def test_a_cell_holds_a_row_per_prompt(whole: Run, engine: str) -> None:
    folder = whole("--engine", engine)
    for value in VALUES:
        for name in ("plain", *SETS):
            table = cell(folder, name, value)
            assert len(table) == N_PROMPTS
            assert set(table["source"]) <= set(SOURCES)
            assert (table["entropy"] >= 0).all()
            assert (table[[f"log_prob_{s.lower()}" for s in SOURCES]] <= 0).all(axis=None)


def ratios(value: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every ratio in a scores file, with its place."""
    if isinstance(value, dict) and "percent" in value:
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from ratios(inner, f"{where}.{key}")


def test_every_ratio_has_count_denominator_and_interval(whole: Run) -> None:
    found = dict(ratios(scores(whole("--engine", "shared"))))
    per_value = 3 * 3 + 3 + 1  # TS, CR, GTS
    assert len(found) == 1 + 3 + len(VALUES) * per_value  # recall and sources before
    for where, ratio in found.items():
        assert ratio.keys() == {"count", "total", "percent", "low", "high"}, where
        assert 0 <= ratio["count"] <= ratio["total"], where
        if ratio["total"]:
            assert ratio["percent"] == pytest.approx(100 * ratio["count"] / ratio["total"]), where
            assert 0 <= ratio["low"] <= ratio["percent"] <= ratio["high"] <= 100, where
        else:
            assert (ratio["percent"], ratio["low"], ratio["high"]) == (None, None, None), where


def test_scores_say_what_the_cells_say(whole: Run) -> None:
    folder = whole("--engine", "shared")
    plain, result = cell(folder, "plain"), scores(folder)
    for value in VALUES:
        own = cell(folder, "entropy", value)
        counts = pd.crosstab(plain["source"], own["source"])
        counts = counts.reindex(index=SOURCES, columns=SOURCES, fill_value=0)
        found = result["ablations"][value]["entropy"]
        assert found["transition_counts"] == {k: counts.loc[k].to_dict() for k in SOURCES}
        changed = int((plain["source"] != own["source"]).sum())
        assert (found["gts"]["count"], found["gts"]["total"]) == (changed, N_PROMPTS)
        assert 0 <= found["q_value"] <= 100
        fall = (plain["entropy"] - own["entropy"])[(plain["source"] == "ND") & (own["source"] == "ND")]
        assert found["entropy_difference"]["ND"]["ND"] == pytest.approx(fall.mean(), abs=1e-12)
        controls = result["ablations"][value]["controls"]
        assert [c["name"] for c in controls["sets"]] == [*CONTROLS]
        assert [c["neurons"] for c in controls["sets"]] == [
            manifest(folder)["sets"][s] for s in CONTROLS
        ]


def test_all_means_the_five_values(quick: None, tmp_path: Path) -> None:
    few = ["--max-prompts", "4", "--controls", "1"]
    assert main([*command(tmp_path / "run", values="all"), *few]) == 0
    assert [*scores(tmp_path / "run")["ablations"]] == [*ABLATION_VALUES]
    folders = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert folders == {*ABLATION_VALUES}


def test_a_run_without_controls_has_no_null_distribution(quick: None, tmp_path: Path) -> None:
    assert main([*command(tmp_path / "run"), "--max-prompts", "4", "--controls", "0"]) == 0
    for result in scores(tmp_path / "run")["ablations"].values():
        assert (result["entropy"]["q_value"], result["controls"]["n"]) == (None, 0)


def test_fixed_neurons_are_the_entropy_set(quick: None, tmp_path: Path) -> None:
    assert main([*command(tmp_path / "run"), "--max-prompts", "4", "--neurons", "7,3, 11"]) == 0
    held = manifest(tmp_path / "run")
    assert held["entropy_neurons"] == held["sets"]["entropy"] == [7, 3, 11]
    assert all(len(neurons) == 3 for neurons in held["sets"].values())


# --- engines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_both_engines_say_the_same(whole: Run, full: bool) -> None:
    more = ["--full-texts"] if full else []
    shared, hooked = whole("--engine", "shared", *more), whole("--engine", "hooked")
    for name in (PROMPTS, MEASURES):
        pd.testing.assert_frame_equal(pd.read_parquet(shared / name), pd.read_parquet(hooked / name))
    for value in VALUES:
        for name in ("plain", *SETS):
            a, b = cell(shared, name, value), cell(hooked, name, value)
            where = f"{value}/{name}"
            assert a["source"].tolist() == b["source"].tolist(), where
            ENTROPY.assert_close(a["entropy"].to_numpy(), b["entropy"].to_numpy(), what=where)
            for source in SOURCES:
                column = f"log_prob_{source.lower()}"
                LOG_PROBABILITY.assert_close(a[column].to_numpy(), b[column].to_numpy(), what=where)
            if full or name in ("plain", "entropy"):
                assert a["text"].tolist() == b["text"].tolist(), where
            pairs = list(zip(a["tokens"], b["tokens"], strict=True))
            assert all(list(s) == list(h[: len(s)]) for s, h in pairs), f"{where}: no prefix"
        counts = [
            scores(run)["ablations"][value]["entropy"]["transition_counts"] for run in (shared, hooked)
        ]
        assert counts[0] == counts[1]


# --- beyond the paper (Method 13) ---------------------------------------------------------------------


@each_engine
def test_total_effects_are_the_entropies_of_the_cells(whole: Run, engine: str) -> None:
    folder = whole("--engine", engine)
    plain, means = cell(folder, "plain"), pd.read_parquet(folder / SET_EFFECTS)
    assert list(zip(means["ablation_value"], means["set"], strict=True)) == [
        (value, name) for value in VALUES for name in SETS
    ]
    assert (means["prompts"] == N_PROMPTS).all()
    means = means.set_index(["ablation_value", "set"])
    for value in VALUES:
        effects = pd.read_parquet(folder / value / PROMPT_EFFECTS)
        own = cell(folder, "entropy", value)
        for column, stored in (("entropy_plain", plain), ("entropy_total", own)):
            ENTROPY.assert_close(effects[column].to_numpy(), stored["entropy"].to_numpy(), what=value)
        for name in SETS:
            change = (plain["entropy"] - cell(folder, name, value)["entropy"]).mean()
            assert means.loc[(value, name), "total"] == pytest.approx(change, abs=1e-5), name
        for effect in ("total", "direct", "norm_only"):
            change = (effects["entropy_plain"] - effects[f"entropy_{effect}"]).mean()
            assert means.loc[(value, "entropy"), effect] == pytest.approx(change, abs=1e-12), effect


def test_rho_by_layer_ends_with_the_measures(whole: Run) -> None:
    folder = whole("--engine", "shared")
    table, spec = pd.read_parquet(folder / RHO_BY_LAYER), MODELS["organism"]
    assert len(table) == spec.n_layers * spec.d_mlp
    assert manifest(folder)["layers_with_rho"] == list(range(spec.n_layers))
    last = table[table["layer"] == spec.n_layers - 1].reset_index(drop=True)
    measures = pd.read_parquet(folder / MEASURES)
    pd.testing.assert_frame_equal(last[["neuron_idx", "rho"]], measures[["neuron_idx", "rho"]])


def test_matched_controls_are_scored_like_controls(whole: Run) -> None:
    folder = whole("--engine", "shared")
    sets, measures = manifest(folder)["sets"], pd.read_parquet(folder / MEASURES)
    sigma = safetensors.numpy.load_file(folder / ACTIVATION_STATS)["std"]
    drawn = matched_controls(N_MATCHED, measures["norm"].to_numpy(), sigma, sets["entropy"], 123)
    assert [tuple(sets[name]) for name in MATCHED] == drawn
    for value in VALUES:
        found = scores(folder)["ablations"][value]
        matched, controls = found["matched_controls"], found["controls"]
        assert [*matched] == ["q_value", "permutation_p", *controls]
        assert [s["name"] for s in matched["sets"]] == list(MATCHED)
        assert [s["name"] for s in controls["sets"]] == list(CONTROLS)
        own = found["entropy"]["gts"]["count"]
        plain = cell(folder, "plain", value)["source"]
        changed = [(cell(folder, n, value)["source"] != plain).sum() for n in MATCHED]
        at_least = sum(c >= own for c in changed)
        assert matched["permutation_p"] == (1 + at_least) / (1 + N_MATCHED)
        more = sum(c > own for c in changed)
        rank = 50 * (more + at_least + (at_least > more)) / N_MATCHED  # of the invariant share
        assert matched["q_value"] == pytest.approx(100 - rank)


def test_controls_do_not_depend_on_matched_ones(whole: Run, quick: None, tmp_path: Path) -> None:
    assert main([*command(tmp_path / "run"), "--matched-controls", "0"]) == 0
    for value, alone in scores(tmp_path / "run")["ablations"].items():
        both = scores(whole("--engine", "shared"))["ablations"][value]
        assert [*alone] == ["entropy", "controls"]
        assert both["controls"]["sets"] == alone["controls"]["sets"]
        assert both["entropy"]["transition_counts"] == alone["entropy"]["transition_counts"]
        assert both["controls"]["gts"] == alone["controls"]["gts"]


def test_as_many_matched_controls_as_controls_by_default(quick: None, tmp_path: Path) -> None:
    given = command(tmp_path / "run", values=VALUES[0])
    at = given.index("--matched-controls")
    assert main(given[:at] + given[at + 2 :]) == 0
    assert manifest(tmp_path / "run")["identity"]["matched_controls"] == N_CONTROLS


@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_controls_of_both_kinds_end_with_their_answer(
    full: bool, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoded: dict[str, bool] = {}
    whole_decode = ccm.experiment.run.decode_stored

    def spied(engine: Any, model: Any, tokens: Any, ablations: Any = (), **options: Any) -> Any:
        if "full" in options:
            names = ["plain", *(a.name for a in ablations)]
            decoded.update(zip(names, options["full"], strict=True))
        return whole_decode(engine, model, tokens, ablations, **options)

    monkeypatch.setattr(ccm.experiment.run, "decode_stored", spied)
    more = ["--full-texts"] if full else []
    assert main([*command(tmp_path / "run", values=VALUES[0]), "--max-prompts", "4", *more]) == 0
    assert decoded == {name: full or name in ("plain", "entropy") for name in ("plain", *SETS)}


# --- interruptions ------------------------------------------------------------------------------------

# Which file of which name pattern is about to be written when the run is interrupted.
LAST = [("plain.parquet", 1), ("entropy.parquet", 2), ("matched_001.parquet", 1), (SCORES, 1)]
BEYOND = [(PROMPT_EFFECTS, 2), (SET_EFFECTS, 1)]
POINTS = {
    "shared": [
        (MANIFEST, 1),
        (PROMPTS, 1),
        (RHO_BY_LAYER, 1),
        (MEASURES, 1),
        (ACTIVATION_STATS, 1),
        ("batch_*", 3),
        *BEYOND,
        *LAST,
    ],
    "hooked": [("plain.parquet", 1), ("control_002.parquet", 2)],
}
INTERRUPTS = [
    pytest.param(engine, *point, id="-".join(map(str, (engine, *point))))
    for engine, points in POINTS.items()
    for point in points
]


def times(folder: Path) -> dict[str, int]:
    """When each finished file was written; the manifest is, at every step."""
    return {n: (folder / n).stat().st_mtime_ns for n in names(folder) if n != MANIFEST}


def check_finished(folder: Path, expected: Path, before: dict[str, int]) -> None:
    """The same bytes as a run that was not interrupted, without computing anything twice."""
    assert (folder / SCORES).read_bytes() == (expected / SCORES).read_bytes()
    assert names(folder) == names(expected), "files were left over"
    assert not (folder / BATCHES).exists()
    after = times(folder)
    kept = {name: when for name, when in before.items() if name in after}
    assert {name: after[name] for name in kept} == kept, "a finished file was written again"
    assert manifest(folder)["complete"] is True
    assert manifest(folder)["sets"] == manifest(expected)["sets"]


@pytest.mark.parametrize(("engine", "pattern", "number"), INTERRUPTS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    engine: str,
    pattern: str,
    number: int,
    whole: Run,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    expected, out = whole("--engine", engine), tmp_path / "run"
    replace, seen = os.replace, 0

    def interrupted(source: str, target: Path) -> None:
        nonlocal seen
        seen += target.match(pattern)
        if seen == number:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert main(command(out, "--engine", engine)) == 130
    message = f"ccm: interrupted; the same command with --out {out} goes on from here."
    assert message in capsys.readouterr().err.splitlines()
    assert not (out / SCORES).exists()
    before = times(out) if out.exists() else {}
    assert main(command(out, "--engine", engine)) == 0
    check_finished(out, expected, before)


def test_a_run_interrupted_at_every_step_gets_there(
    whole: Run, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each start writes two files more than the last one, the manifest aside, and is interrupted."""
    out, replace, starts = tmp_path / "run", os.replace, 0

    def two_files(source: str, target: Path) -> None:
        nonlocal left
        left -= target.name != MANIFEST and not target.name.startswith(".")  # the lock's, a trial's
        if left < 0:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", two_files)
    left = 2
    while main(command(out)) == 130:
        left, starts = 2, starts + 1
        assert starts < 100, "no progress"
    expected = whole("--engine", "shared")
    assert starts > len(names(expected)) // 2, "interrupted less often than files were written"
    check_finished(out, expected, {})


def test_a_run_that_lost_its_scores_knows_what_it_met(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command(out)) == 0
    before = manifest(out)
    (out / SCORES).unlink()
    assert main(command(out)) == 0
    assert manifest(out)["float32_error"] == before["float32_error"] > 0


KILLER = """
import os, signal, sys
from pathlib import Path
from ccm.cli.parser import main

replace, left = os.replace, int(sys.argv[2])

def killed(source, target):
    global left
    left -= Path(target).match(sys.argv[1])
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killed
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("engine", "pattern", "number"),
    [("shared", "batch_*", 3), ("hooked", "control_*", 3)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    engine: str, pattern: str, number: int, whole: Run, quick: None, tmp_path: Path
) -> None:
    expected, out = whole("--engine", engine), tmp_path / "run"
    arguments = command(out, "--engine", engine)
    # One thread here as there: sums in another order differ in their last bits.
    done = subprocess.run(
        [sys.executable, "-c", KILLER, pattern, str(number), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    left = names(out)
    assert any(name.endswith(".partial") for name in left), "nothing was being written"
    assert sum(Path(n).match(pattern) and not n.endswith(".partial") for n in left) == number - 1
    before = {name: when for name, when in times(out).items() if not name.endswith(".partial")}
    assert main(arguments) == 0
    check_finished(out, expected, before)


def test_a_folder_killed_at_its_first_file_is_still_a_new_one(
    whole: Run, quick: None, tmp_path: Path
) -> None:
    (tmp_path / ".manifest.json.abc123.partial").write_text("{")
    assert main(command(tmp_path)) == 0
    check_finished(tmp_path, whole("--engine", "shared"), {})


def test_a_finished_run_is_read_and_not_run(
    whole: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole("--engine", "shared")

    def never(*_: Any) -> None:
        raise AssertionError("loaded a model for scores that are there")

    monkeypatch.setattr(ccm.experiment.run, "load", never)
    before = {name: (folder / name).stat().st_mtime_ns for name in names(folder)}
    capsys.readouterr()
    assert main([*command(folder), "--engine", "shared"]) == 0
    assert {name: (folder / name).stat().st_mtime_ns for name in names(folder)} == before
    assert f"{N_PROMPTS} probing prompts" in capsys.readouterr().out


def test_a_resumed_run_may_take_another_memory_budget(
    whole: Run, quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No result depends on it, but for the last bits of floats."""
    out, replace = tmp_path / "run", os.replace

    def interrupted(source: str, target: Path) -> None:
        if target.match("batch_*") and len([*target.parent.glob("batch_*")]) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        assert main(command(out)) == 130
    assert len([*(out / BATCHES / "answers").iterdir()]) == 2
    assert main([*command(out), "--memory-budget", "1G"]) == 0
    assert manifest(out)["memory_budget"] == 1 << 30, "what was too much must not stay"
    expected = whole("--engine", "shared")
    assert names(out) == names(expected)
    cells = [path for path in out.rglob("*.parquet") if "source" in pd.read_parquet(path)]
    assert len(cells) == 1 + len(VALUES) * (1 + N_CONTROLS + N_MATCHED)
    for path in cells:
        mine, its = (pd.read_parquet(root / path.relative_to(out)) for root in (out, expected))
        for column in ("text", "source", "tokens"):
            assert mine[column].map(str).tolist() == its[column].map(str).tolist(), path
        ENTROPY.assert_close(mine["entropy"].to_numpy(), its["entropy"].to_numpy(), what=str(path))


# --- protocols ----------------------------------------------------------------------------------------


def test_released_controls_are_drawn_from_all_neurons(whole: Run) -> None:
    corrected, released = whole("--engine", "shared"), whole("--protocol", "released")
    entropy = manifest(corrected)["entropy_neurons"]
    assert entropy == manifest(released)["entropy_neurons"]
    d_mlp, k = MODELS["organism"].d_mlp, len(entropy)
    pools = {corrected: np.setdiff1d(np.arange(d_mlp), entropy), released: np.arange(d_mlp)}
    for folder, pool in pools.items():
        random = np.random.RandomState(123)
        for name in CONTROLS:
            drawn = random.choice(pool, size=k, replace=False).tolist()
            assert manifest(folder)["sets"][name] == drawn, f"{name} of {folder}"
    with_overlap = whole("--protocol", "released", "--controls", "60")
    assert any(
        set(n) & set(entropy) for s, n in manifest(with_overlap)["sets"].items() if s != "entropy"
    )


def test_released_objects_are_in_lower_case(whole: Run) -> None:
    corrected, released = whole("--engine", "shared"), whole("--protocol", "released")
    names_ = ["counter_knowledge_object", "parametric_knowledge_object"]
    ours, theirs = (pd.read_parquet(f / PROMPTS)[names_] for f in (corrected, released))
    assert not ours.equals(theirs)
    assert ours.apply(lambda column: column.str.lower()).equals(theirs)


def test_released_nd_ratio_is_the_pk_ratio(whole: Run) -> None:
    corrected, released = whole("--engine", "shared"), whole("--protocol", "released")
    for value in VALUES:
        theirs = scores(released)["ablations"][value]["entropy"]["conversion_ratios"]
        assert theirs["ND"] == theirs["PK"]
    ours = scores(corrected)["ablations"].values()
    assert any(
        s["entropy"]["conversion_ratios"]["ND"] != s["entropy"]["conversion_ratios"]["PK"] for s in ours
    )


def test_released_sigma_is_summed_in_float16(whole: Run) -> None:
    folder = whole("--engine", "shared")
    stored, positions = read_statistics(folder / ACTIVATION_STATS)
    there = RunFolder(folder, manifest(folder)["identity"])
    read = {}
    for protocol in ("corrected", "released"):
        plan = make_plan(RunConfig(protocol=protocol, controls=N_CONTROLS))
        read[protocol] = statistics_step(there, plan, loaded(), [])
    expected = float16_sigma(stored, positions)
    for name in STATISTICS:
        np.testing.assert_array_equal(getattr(read["corrected"], name), getattr(stored, name))
        np.testing.assert_array_equal(getattr(read["released"], name), getattr(expected, name))
    assert not np.array_equal(read["corrected"].std, read["released"].std)


def test_statistics_of_the_text_alone_leave_out_bos(whole: Run) -> None:
    every, text = whole(), whole("--stats-positions", "text")
    (held, n), (without, m) = (read_statistics(folder / ACTIVATION_STATS) for folder in (every, text))
    assert n - m == N_PROMPTS
    assert not np.array_equal(held.mean, without.mean)
    assert (held.min <= without.min + 1e-5).all(), "a minimum that all positions do not have"
    assert manifest(text)["identity"]["stats_positions"] == "text"
    assert manifest(every)["identity"]["stats_positions"] == "all"

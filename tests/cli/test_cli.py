"""Every command does what its help says, and says so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy

from ccm.cli.commands import read_neurons
from ccm.cli.console import summary
from ccm.cli.outputs import new_file
from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.config import RunConfig
from ccm.experiment.options import paths_of_models
from ccm.method.scores import ratio
from ccm.method.statistics import STATISTICS
from ccm.models.specs import CHECKPOINT, MODELS, PUBLISHED
from ccm.reporting.text import proportion
from tests.tolerance import ENTROPY, LOG_PROBABILITY
from tests.toys import ToyConfig, toy_folder

COMMANDS = (
    *("run", "models", "tokens", "prompts", "measure", "ablate", "rehearse"),
    *("figures", "report", "compare", "sweep"),
)
N_PROMPTS = 24
SETS = ("entropy", "control_000", "control_001", "matched_000")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the organism; read-only."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    small = [
        "--max-prompts",
        str(N_PROMPTS),
        "--controls",
        "2",
        "--full-texts",
        "--matched-controls",
        "1",
    ]
    assert main(["run", "--model", "organism", *small, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def inputs(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `ccm ablate` needs, exported from the run; read-only."""
    folder = tmp_path_factory.mktemp("inputs")
    pd.read_parquet(run / "prompts.parquet").to_csv(folder / "prompts.csv", index=False)
    tensors = safetensors.numpy.load_file(run / "activation_stats.safetensors")
    np.savez(folder / "stats.npz", **{name: tensors[name] for name in STATISTICS})
    sets = json.loads((run / "manifest.json").read_text())["sets"]
    (folder / "sets.json").write_text(json.dumps(sets))
    return {path.stem: path for path in folder.iterdir()}


# --- help and exit codes ------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    overview, own = capsys.readouterr().out.split("usage: ")[1:]
    assert re.search(rf"^ +{command} +\w", overview, re.MULTILINE), "not in the overview"
    assert own.startswith(f"ccm {command} ")
    options = set(re.findall(r"(?<![\w-])--[a-z-]+", own)) - {"--help"}
    undocumented = [o for o in options if not re.search(rf"^  (-\w )?.*{o}\b.*$", own, re.MULTILINE)]
    assert undocumented == []


def test_python_m_ccm_is_the_same_command(tmp_path: Path) -> None:
    """Also in a fresh process: exit code 2, one line on stderr, nothing on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "ccm", "run", "--model", "organism", "--ablation-value", "mean"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("ccm: ablation value 'mean': unknown.")
    assert [*tmp_path.iterdir()] == []


def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path: Path) -> None:
    """An import of seconds must not stand before a message about a typing error."""
    code = (
        "import sys; from ccm.cli.parser import main\n"
        "for arguments in (\n"
        "    ['run', '--model', 'organism', '--ablation-value', 'mean'],\n"
        "    ['run', '--model', 'organism', '--neurons', '1,x'],\n"
        "    ['measure', '--model', 'organism', '--out', '.'],\n"
        "    ['models', '--model-path', 'x'],\n"
        "): assert main(arguments) == 2 and 'torch' not in sys.modules, arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 4


# --- run ----------------------------------------------------------------------------------------------


def test_run_prints_a_summary_and_shows_progress_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    few = ["--max-prompts", "5", "--controls", "1"]
    assert main(["run", "--model", "organism", *few, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "organism, protocol corrected, 5 probing prompts"
    assert lines[-1] == f"run folder: {out}"
    assert any(line.startswith("mean_ablation ") for line in lines)
    assert "5/5" in printed.err
    assert "prompt" in printed.err
    assert "5/5 [" not in printed.out


def test_a_run_without_a_folder_makes_one_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--max-prompts", "3", "--controls", "0", "--ablation-value", "all"]
    assert main(["run", "--model", "organism", *few]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"organism-all_ablation_values-\d{8}-\d{6}", folder.name)
    printed = capsys.readouterr()
    assert f"ccm: writing to runs/{folder.name}" in printed.err
    assert f"run folder: runs/{folder.name}" in printed.out


def test_no_folder_is_announced_for_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--model", "organism", "--template", "none"]) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("ccm: template 'none': unknown.")
    assert [*tmp_path.iterdir()] == []


def test_values_are_separated_by_commas_and_blanks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--max-prompts", "3", "--controls", "0", "--out", str(tmp_path / "run")]
    values = "mode_ablation, mean_ablation,mode_ablation"
    assert main(["run", "--model", "organism", *few, "--ablation-value", values]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [*scores["ablations"]] == ["mode_ablation", "mean_ablation"]


@pytest.mark.parametrize(
    ("text", "size"), [("1M", 1 << 20), ("1.5G", 3 << 29), ("2T", 2 << 40), ("1048576", 1 << 20)]
)
def test_sizes(text: str, size: int) -> None:
    assert RunConfig.read(memory_budget=text).memory_budget == size


def test_a_full_disk_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "scores.json")

    monkeypatch.setattr(os, "replace", full)
    assert main(["measure", "--model", "organism", "--out", str(tmp_path / "m.csv")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"ccm: --out {tmp_path / 'm.csv'}: cannot write to {tmp_path} (No space left"
    )
    assert said.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("out", [True, False])
def test_only_a_run_says_that_it_goes_on(
    out: bool,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ccm.models.load.load", interrupt)
    monkeypatch.setattr("ccm.experiment.run.load", interrupt)
    given = ["--out", "mine"] if out else []
    assert main(["run", "--model", "organism", *given]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    (folder,) = [p.parent for p in tmp_path.rglob("manifest.json")]
    goes_on = f"the same command with --out {folder.relative_to(tmp_path)} goes on from here."
    assert last == f"ccm: interrupted; {goes_on}"
    assert main(["measure", "--model", "organism"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ccm: interrupted; no result."


# --- models -------------------------------------------------------------------------------------------


def test_models_says_what_is_here_where_and_how_big(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("ccm.cli.console.weight_files", without_cache)
    toy = toy_folder(ToyConfig("gpt2"))
    assert main(["models", "--model-path", f"mine={toy}", "--model-path", f"gpt2-small={toy}"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "weights", "size", "where"]
    rows = {line.split()[0]: line for line in lines}
    assert [*rows] == [*MODELS, "mine"]
    size = sum(f.stat().st_size for f in CHECKPOINT.glob("*.safetensors")) / 1e6
    assert re.search(rf"found +{size:.1f} MB +{CHECKPOINT}$", rows["organism"])
    assert re.search(rf"found .* MB +{toy}$", rows["mine"])
    assert re.search(rf"unusable .* MB +{toy}: wrong architecture for gpt2-small", rows["gpt2-small"])
    for name in set(PUBLISHED) - {"gpt2-small"}:
        assert re.search(rf"missing +- +hub: {MODELS[name].hub_id}( \(gated.*)?$", rows[name])
    assert rows["Meta-Llama-3-8B"].endswith("(gated: needs access and HF_TOKEN)")


def without_cache(spec: object) -> list[Path]:
    folder = getattr(spec, "folder", None)
    return [] if folder is None else sorted(Path(folder).glob("*.safetensors"))


# --- prompts and measure ------------------------------------------------------------------------------


def test_prompts_writes_the_prompts_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "prompts.csv"
    assert main(["prompts", "--model", "organism", "--out", str(out)]) == 0
    table = pd.read_csv(out, dtype=str, keep_default_na=False)
    counts = dict(
        re.fullmatch(r"(.+?) +(\d+)", line).groups() for line in capsys.readouterr().out.splitlines()
    )
    assert int(counts["probing prompts"]) == len(table) > 1000
    assert table["knowledge_probing_prompt"].is_unique
    row = table.iloc[0]
    assert row["knowledge_probing_prompt"] == (
        f"{row['statement_query']} {row['counter_knowledge_object']}. {row['statement_query']}"
    )
    assert row["counter_knowledge_object"] != row["parametric_knowledge_object"]


def test_measure_prints_and_writes_the_entropy_neurons(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measures.csv"
    assert main(["measure", "--model", "organism", "--out", str(out)]) == 0
    table, of_run = pd.read_csv(out), pd.read_parquet(run / "measures.parquet")
    pd.testing.assert_frame_equal(table, of_run, rtol=1e-12)
    printed = capsys.readouterr().out.splitlines()
    chosen = [int(line.split()[0]) for line in printed[4:]]
    assert chosen == json.loads((run / "manifest.json").read_text())["entropy_neurons"]
    assert printed[3].split() == ["neuron_idx", "logitvar", "norm", "rho"]
    assert main(["measure", "--model", "organism", "-k", "2", "--min-rho", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4 + 2


def test_measure_needs_no_facts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_facts() -> None:
        raise AssertionError("facts are not needed for weights")

    monkeypatch.setattr("ccm.experiment.plan.load_pararel", no_facts)
    toy = toy_folder(ToyConfig("llama"))
    assert main(["measure", "--model", str(toy)]) == 0
    assert f"{toy.name}: 48 last-layer neurons" in capsys.readouterr().out


# --- ablate -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["shared", "hooked"])
@pytest.mark.parametrize("protocol", ["corrected", "released"])
def test_ablate_repeats_a_run_from_its_exports(
    engine: str,
    protocol: str,
    run: Path,
    inputs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results.json"
    from_elsewhere = ["--prompts", str(inputs["prompts"]), "--stats", str(inputs["stats"])]
    how = ["--engine", engine, "--protocol", protocol, "--sets", str(inputs["sets"])]
    assert main(["ablate", "--model", "organism", *from_elsewhere, *how, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{N_PROMPTS} prompts, {len(SETS)} sets: {out}\n"
    found = json.loads(out.read_text())
    head = {"model": "organism", "ablation_value": "mean_ablation", "protocol": protocol}
    assert {key: found[key] for key in head} == head
    assert (
        found["first_prompt_tokens"]
        == (json.loads((run / "manifest.json").read_text())["first_prompt_tokens"])
    )
    assert [*found["results"]] == ["plain", *SETS]
    sets = json.loads(inputs["sets"].read_text())
    for name, result in found["results"].items():
        folder = run if name == "plain" else run / "mean_ablation"
        cell = pd.read_parquet(folder / f"{name}.parquet")
        assert result["neurons"] == sets.get(name, [])
        assert result["output_texts"] == cell["text"].tolist(), name
        assert result["knowledge_sources"] == cell["source"].tolist(), name
        ENTROPY.assert_close(result["entropies"], cell["entropy"].to_numpy(), what=name)
        if protocol == "corrected":
            for source in ("ck", "nd", "pk"):
                expected = cell[f"log_prob_{source}"].to_numpy()
                LOG_PROBABILITY.assert_close(result[f"{source}_log_prob"], expected, what=name)


def test_ablate_one_set_by_its_numbers(inputs: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    (tmp_path / "sets.json").write_text("[[3, 1, 2]]")
    common = ["--model", "organism", "--prompts", str(inputs["prompts"])]
    common += ["--stats", str(inputs["stats"]), "--ablation-value", "mode_ablation"]
    assert main(["ablate", *common, "--neurons", "3,1,2", "--out", str(first)]) == 0
    sets = ["--sets", str(tmp_path / "sets.json"), "--memory-budget", "1M"]
    assert main(["ablate", *common, *sets, "--out", str(second)]) == 0
    a, b = (json.loads(path.read_text())["results"] for path in (first, second))
    assert a["set_000"]["neurons"] == [3, 1, 2]
    assert a["set_000"]["output_texts"] == b["set_000"]["output_texts"]
    ENTROPY.assert_close(a["set_000"]["entropies"], b["set_000"]["entropies"])
    assert a["set_000"]["entropies"] != a["plain"]["entropies"], "nothing was ablated"


# --- parsing and printing -----------------------------------------------------------------------------


def test_model_paths(tmp_path: Path) -> None:
    assert paths_of_models([f"a={tmp_path}", f"b={tmp_path}"]) == {"a": tmp_path, "b": tmp_path}
    (tmp_path / "x=y").mkdir()
    assert paths_of_models([f"a={tmp_path}/x=y"]) == {"a": tmp_path / "x=y"}
    for wrong in ("a", "=a", "a=", ""):
        with pytest.raises(BadInput, match=f"^--model-path '{wrong}': not NAME=PATH"):
            paths_of_models([wrong])


def test_neuron_numbers() -> None:
    assert read_neurons("3,1, 2") == (3, 1, 2)
    assert read_neurons("-1") == (-1,)  # a number, if out of range: `check_neurons` says so
    for wrong, part in {"1,,2": "", "1;2": "1;2", "1.0": "1.0", "1_0": "1_0"}.items():
        with pytest.raises(BadInput) as caught:
            read_neurons(wrong)
        assert str(caught.value) == f"--neurons {wrong!r}: {part!r} is not a neuron number. Give 1,2,3."


def test_a_new_file_is_new_and_can_be_written(tmp_path: Path) -> None:
    assert new_file(tmp_path / "new") == tmp_path / "new"
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(BadInput, match="exists already"):
        new_file(tmp_path)
    with pytest.raises(BadInput, match=r"no folder .*none\. Make it first"):
        new_file(tmp_path / "none" / "new")


def test_a_share_tells_count_denominator_and_interval() -> None:
    assert proportion(vars(ratio(37, 300))) == "12.3 % (37/300; 8.8-16.6)"
    assert proportion(vars(ratio(0, 0))) == "- (0/0)"


def test_the_summary_says_what_the_scores_say(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    text = summary(scores)
    own = scores["ablations"]["mean_ablation"]["entropy"]
    for printed in (
        proportion(own["gts"]),
        proportion(own["conversion_ratios"]["CK"]),
        f"{own['q_value']:.1f}",
    ):
        assert printed in text
    for source in ("CK", "ND", "PK"):
        assert f"{source} {proportion(scores['sources'][source])}" in text
    matched = scores["ablations"]["mean_ablation"].pop("matched_controls")
    below = text.split("against matched controls")[1]
    assert f"{matched['gts']['mean']:.2f} % ({matched['gts']['high']:.2f} %)" in below
    assert f"{matched['q_value']:.1f}   {matched['permutation_p']:.4f}" in below
    assert "matched" not in summary(scores)


@pytest.mark.parametrize("command", ["run", "prompts", "ablate", "measure"])
def test_only_commands_that_follow_a_protocol_offer_one(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("--protocol" in capsys.readouterr().out) == (command != "measure")

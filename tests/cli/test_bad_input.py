"""Whatever is typed wrongly: exit code 2, one line that names the value and the way out, no file."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.ablate_io import read_prompts
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.statistics import STATISTICS
from ccm.models.specs import CHECKPOINT, MODELS
from tests.needs import NO_GPU, PROC

D_MLP = MODELS["organism"].d_mlp
PROMPT = "Dane Githand was born in Sirwick. Dane Githand was born in"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@dataclass(frozen=True)
class Refused:
    """Runs a command that must be refused and gives its one line."""

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> str:
        before = contents(self.folder)
        self.capsys.readouterr()
        try:
            code: Any = main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse's own way
            code = stop.code
        printed = self.capsys.readouterr()
        assert (code, printed.out) == (2, ""), printed
        (line,) = printed.err.splitlines()
        assert line.startswith("ccm: ")
        assert len(line) < 1000, "nobody reads that far"
        assert contents(self.folder) == before, "something was written"
        return line.removeprefix("ccm: ")


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CCM_DATA_DIR", raising=False)
    return Refused(tmp_path, capsys)


# --- names and numbers --------------------------------------------------------------------------------

MODEL_NAMES, VALUE_NAMES = ", ".join(MODELS), ", ".join(ABLATION_VALUES)

OPTIONS: dict[str, tuple[str, ...]] = {
    # what is typed after `ccm run --model organism --out new`: what the line must hold, in order
    "--ablation-value mean": ("ablation value 'mean': unknown", VALUE_NAMES, "all"),
    "--ablation-value mean_ablation,": ("ablation value '': unknown", VALUE_NAMES),
    "--ablation-value ,": ("ablation value '': unknown",),
    "--ablation-value ALL": ("'ALL': unknown",),
    "--ablation-value all,nope": ("'all,nope'", "Drop one"),
    "--ablation-value nan": ("'nan': unknown",),
    "--protocol best": ("protocol 'best': unknown", "corrected, released"),
    "--engine fast": ("engine 'fast': unknown", "shared, hooked"),
    "--device gpu": ("device 'gpu': unknown", "auto, cpu, cuda, cuda:N"),
    "--device mps": ("device 'mps': not supported", "auto, cpu, cuda, cuda:N"),
    "--device cuda:x": ("device 'cuda:x': unknown",),
    "--dtype fp16": ("dtype 'fp16': unknown", "float32, bfloat16, float16"),
    "--template short": ("template 'short': unknown", "bare, instruction, own, llama2"),
    "-k 0": ("k 0: out of range", "1 and more", "-k"),
    "-k -1": ("k -1: out of range", "1 and more"),
    f"-k {D_MLP + 1}": (f"k={D_MLP + 1}", f"1 to {D_MLP}"),
    "-k six": ("-k 'six'", "Give one, like 100"),
    "-k 1.5": ("-k", "'1.5'"),
    "-k 2 --neurons 1,2": ("-k 2", "--neurons", "Drop one"),
    "--controls -1": ("controls -1: out of range", "0 and more"),
    "--controls 10000000000000000000": ("controls: out of range", "Lower --controls"),
    f"-k {D_MLP - 3} --controls 2": ("2 controls", "0 to 0", "of 3 neurons"),
    f"-k {D_MLP} --controls 1 --protocol released": ("1 controls", "0 to 0"),
    "--controls many": ("--controls", "'many'"),
    "--matched-controls -1": ("matched controls -1: out of range", "0 and more"),
    f"-k {D_MLP - 3} --controls 0 --matched-controls 2": (
        "2 matched controls",
        "0 to 0",
        "of 3 neurons",
    ),
    "--matched-controls few": ("--matched-controls", "'few'"),
    "--seed -1": ("seed -1: out of range", "0 to 4294967295"),
    "--seed 4294967296": ("seed 4294967296: out of range",),
    "--seed 1.0": ("--seed", "'1.0'"),
    "--max-prompts 0": ("max prompts 0: out of range", "1 and more"),
    "--null-space-dims 0": ("null space dims 0: out of range", "1 and more"),
    "--null-space-dims 97": ("null-space dimensions 97", "1 to 96"),
    "--min-rho high": ("--min-rho", "'high'"),
    "--neurons 1,2,x": ("--neurons '1,2,x': 'x' is not a neuron number", "Give 1,2,3"),
    "--neurons ,": ("--neurons ','", "Give 1,2,3"),
    "--neurons 1,": ("--neurons '1,'", "Give 1,2,3"),
    "--neurons 1_0": ("'1_0' is not a neuron number",),
    "--neurons nan": ("'nan' is not a neuron number",),
    f"--neurons {'9' * 300}": ("is not a neuron number",),
    f"--neurons 1,{D_MLP}": (f"neuron {D_MLP} is out of range", f"0 to {D_MLP - 1}"),
    "--neurons -1": ("neuron -1 is out of range",),
    "--neurons 5,5": ("neuron 5 is repeated",),
    "--neurons published": ("none are published for organism", "Give 1,2,3"),
    "--memory-budget abc": ("--memory-budget", "'abc'", "500M or 8G"),
    "--memory-budget -1": ("'-1'", "1M or more"),
    "--memory-budget 0": ("'0'", "1M or more"),
    "--memory-budget 1K": ("'1K'", "1M or more"),
    "--memory-budget inf": ("'inf'", "1M or more"),
    "--memory-budget nan": ("'nan'", "1M or more"),
    "--memory-budget 8GB": ("'8GB'", "500M or 8G"),
    "--model-path organism": ("--model-path 'organism': not NAME=PATH",),
    "--model-path organism=": ("--model-path 'organism=': not NAME=PATH",),
    "--model-path organism=nowhere": ("no such folder or file 'nowhere'",),
    "--model-path organism=.": (".: not a checkpoint folder", "config.json"),
    "--model-path gpt2-smal=.": ("gpt2-smal", "gpt2-small"),
    "--facts nowhere": ("facts 'nowhere': no such folder", "pararel, world, or a folder"),
    "--facts .": ("facts.csv: no such file", "statement_subject"),
    "--frobnicate 1": ("--frobnicate", "--help"),
}


@pytest.mark.parametrize("typed", OPTIONS, ids=lambda typed: typed[:60])
def test_options_of_a_run(typed: str, refused: Refused) -> None:
    line = refused("run", "--model", "organism", "--out", "new", *typed.split())
    for part in OPTIONS[typed]:
        assert part in line, line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "--model"),
        ([], "COMMAND"),
        (["train"], "'train' (choose from 'run', 'sweep', "),
        (["run", "--model"], "--model: expected one argument"),
        (
            ["run", "--model", "nope"],
            f"model 'nope': unknown, and no such folder or file. Allowed: {MODEL_NAMES}, the path of",
        ),
        (["run", "--model", "gpt2"], "gpt2-small"),
        (["run", "--model", ""], "--model: empty"),
        (["run", "--model", "organism", "--out", ""], "--out: empty"),
        (["run", "--model", "organism", "--out="], "--out: empty"),
        (["run", "--model", "organism", "--template", ""], "--template: empty"),
        (["run", "--model", "organism", "--facts", ""], "--facts: empty"),
        (["measure", "--model", "nope"], "model 'nope': unknown"),
        (["measure", "--model", "organism", "-k", "0"], "k 0: out of range"),
        (["measure", "--model", "organism", "--out", "no/m.csv"], "no folder no. Make it first"),
        (["measure", "--model", "organism", "--out", "."], "--out .: exists already"),
        (["prompts", "--model", "organism", "--out", "."], "--out .: exists already"),
        (["prompts", "--model", "organism"], "--out"),
        (["fetch"], "MODEL"),
        (["fetch", "nope"], "model 'nope': unknown"),
        (["fetch", "organism", "--revision", "v2"], "--revision v2: organism is not on the hub"),
        (["fetch", "gpt2-small", "--model-path", "gpt=."], "no model of that name is run"),
        (["models", "--model-path", "x"], "not NAME=PATH"),
        (["models", "--model-path", "mine=."], "not a checkpoint folder"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_other_commands(arguments: list[str], expected: str, refused: Refused) -> None:
    assert expected in refused(*arguments)


def test_no_neuron_reaches_the_threshold(refused: Refused) -> None:
    line = refused("measure", "--model", "organism", "--min-rho", "1")
    assert "only 0 of 384 reach rho >= 1.0. Lower --min-rho or -k." in line


@pytest.mark.parametrize("rho", ["1.1", "nan", "-0.1"])
def test_a_threshold_out_of_range_is_refused_before_the_run_folder_is_made(
    rho: str, refused: Refused
) -> None:
    few = ["--max-prompts", "2", "--controls", "0", "--out", "new"]
    assert "0 to 1" in refused("run", "--model", "organism", *few, f"--min-rho={rho}")


@NO_GPU.mark()
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_where_there_is_none(device: str, refused: Refused) -> None:
    line = refused("run", "--model", "organism", "--device", device, "--out", "new")
    assert line.startswith(f"device {device!r}: 0 CUDA devices found. Use --device cpu")


# --- models -------------------------------------------------------------------------------------------


def checkpoint(folder: Path, **files: bytes | str | None) -> Path:
    """A copy of the organism's folder with some files replaced or, where None, removed."""
    shutil.copytree(CHECKPOINT, folder)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


CHECKPOINTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no config": (
        {"config__json": None},
        ("no config.json", "fetch the config.json that belongs"),
    ),
    "pickled": (
        {"model__safetensors": None, "pytorch_model__bin": pickle.dumps({})},
        ("no *.safetensors weights", "Pickled weights are never loaded", "safe_serialization=True"),
    ),
    "config is no JSON": ({"config__json": "{"}, ("config.json: not JSON",)),
    "config is Latin-1": ({"config__json": b'"\xe9"'}, ("config.json: not JSON",)),
    "config is a list": ({"config__json": "[]"}, ("config.json: not JSON (a list, not",)),
    "config is null": ({"config__json": "null"}, ("config.json: not JSON (a NoneType",)),
    "relations without facts": ({"facts__csv": None}, ("facts.csv: no such file",)),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_folder_that_is_no_checkpoint(case: str, refused: Refused, tmp_path: Path) -> None:
    files, expected = CHECKPOINTS[case]
    folder = checkpoint(tmp_path / "model", **files)
    given: list[list[object]] = [["--model", folder]]
    if not case.startswith("config is"):  # what a named model's config says is known
        given.append(["--model", "organism", "--model-path", f"organism={folder}"])
    for model in given:
        line = refused("run", *model, "--out", "new")
        assert str(folder) in line
        for part in expected:
            assert part in line, line


def test_weights_that_are_cut_off(refused: Refused, tmp_path: Path) -> None:
    whole = (CHECKPOINT / "model.safetensors").read_bytes()
    folder = checkpoint(tmp_path / "model", model__safetensors=whole[: len(whole) // 2])
    assert "cut off or damaged" in refused("measure", "--model", folder)


def test_an_unknown_kind_of_model_does_not_list_two_hundred_others(
    refused: Refused, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "model", config__json='{"model_type": "perceptron"}')
    assert "model_type 'perceptron'" in refused("measure", "--model", folder)


def test_neurons_published_for_another_model_are_not_taken(refused: Refused) -> None:
    line = refused("run", "--model", "gpt2-small", "--neurons", "3072", "--facts", CHECKPOINT)
    assert "neuron 3072 is out of range. Allowed: 0 to 3071" in line


# --- facts --------------------------------------------------------------------------------------------

FACTS = (CHECKPOINT / "facts.csv").read_bytes()
RELATIONS = (CHECKPOINT / "relations.csv").read_bytes()
HEADER, FIRST = FACTS.splitlines()[:2]
ROWS = FACTS.count(b"\n")

Change = Callable[[bytes], bytes]
FACT_FILES: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "missing column": (
        "facts",
        lambda b: b.replace(b"rel_lemma", b"lemma", 1),
        ("missing column 'rel_lemma'", "Needed: statement_subject"),
    ),
    "semicolons": ("facts", lambda b: b.replace(b",", b";"), ("missing column 'statement_subject'",)),
    "empty cell": (
        "facts",
        lambda b: b.replace(FIRST, b"," + FIRST.split(b",", 1)[1]),
        ("empty cell in column 'statement_subject', row 2", "Fill it"),
    ),
    "blank cell": (
        "facts",
        lambda b: b.replace(FIRST, b"  ," + FIRST.split(b",", 1)[1]),
        ("empty cell in column 'statement_subject', row 2",),
    ),
    "duplicate": (
        "facts",
        lambda b: b + FIRST + b"\n",
        (f"row {ROWS + 1} is a duplicate", "Remove one"),
    ),
    "Latin-1": ("facts", lambda b: b + "é".encode("latin-1"), ("not UTF-8", "Save the file as UTF-8")),
    "no rows": ("facts", lambda b: HEADER + b"\n", ("no rows",)),
    "empty file": ("facts", lambda b: b"", ("cannot be read as a table",)),
    "open quote": ("facts", lambda b: b + b'"open,a,b,c\n', ("cannot be read as a table",)),
    "long row": ("facts", lambda b: b + FIRST + b",1,2,3\n", ("cannot be read as a table",)),
    "short row": ("facts", lambda b: b + b"Nobody\n", ("empty cell",)),
    "missing relations column": (
        "relations",
        lambda b: b.replace(b"relation_group_id", b"group", 1),
        ("relations.csv: missing column 'relation_group_id'",),
    ),
    "relation twice": (
        "relations",
        lambda b: b + b.splitlines()[1] + b"\n",
        ("relations.csv: row", "is a duplicate"),
    ),
    "unknown relation": (
        "relations",
        lambda b: b.replace(b"born-in,", b"born_in,", 1),
        ("relation 'born-in'", "not in the relations table"),
    ),
}


@pytest.mark.parametrize("case", FACT_FILES)
def test_facts_that_cannot_be_used(case: str, refused: Refused, tmp_path: Path) -> None:
    which, change, expected = FACT_FILES[case]
    files = {"facts": FACTS, "relations": RELATIONS}
    files[which] = change(files[which])
    for name, content in files.items():
        (tmp_path / f"{name}.csv").write_bytes(content)
    for command in (["run", "--out", "new"], ["prompts", "--out", "new.csv"]):
        line = refused(*command, "--model", "organism", "--facts", tmp_path)
        for part in expected:
            assert part in line, line


def test_a_fact_longer_than_the_context(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "relations.csv").write_bytes(RELATIONS)
    long = FIRST.replace(FIRST.split(b",")[0], b"many " * 400)
    (tmp_path / "facts.csv").write_bytes(FACTS.replace(FIRST, long))
    line = refused("prompts", "--model", "organism", "--facts", tmp_path, "--out", "new.csv")
    assert "tokens ('many many " in line
    assert "too long. Allowed: 1 to 119, the context of organism (128) less its answer." in line


# --- ccm ablate ---------------------------------------------------------------------------------------


def statistics(**changed: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: np.linspace(0.0, 1.0, D_MLP) for name in STATISTICS}
    arrays |= changed
    return {name: values for name, values in arrays.items() if values is not None}


@pytest.fixture
def ablate(refused: Refused, tmp_path: Path) -> Callable[..., str]:
    """Refuses `ccm ablate` with good inputs but for what is given."""
    row = {"counter_knowledge_object": "Sirwick", "parametric_knowledge_object": "Lerholm"}
    pd.DataFrame([{"knowledge_probing_prompt": PROMPT, **row}]).to_csv("prompts.csv", index=False)
    np.savez("stats.npz", **statistics())

    def call(**given: object) -> str:
        options = {
            "model": "organism",
            "prompts": "prompts.csv",
            "stats": "stats.npz",
            "out": "new.json",
        }
        options |= {} if "sets" in given else {"neurons": "1,2,3"}
        options |= {name: str(value) for name, value in given.items()}
        return refused(
            "ablate", *(p for n, v in options.items() for p in (f"--{n.replace('_', '-')}", v))
        )

    return call


def test_the_good_input_is_good(ablate: Callable[..., str]) -> None:
    """Otherwise the refusals below would prove nothing."""
    inputs = ["--prompts", "prompts.csv", "--stats", "stats.npz", "--neurons", "1,2,3"]
    assert main(["ablate", "--model", "organism", *inputs, "--out", "new.json"]) == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"ablation_value": "mean"}, "ablation value 'mean': unknown"),
        ({"ablation_value": "all"}, "one is needed"),
        ({"ablation_value": "mean_ablation,mode_ablation"}, "unknown"),
        ({"protocol": "x"}, "protocol 'x': unknown"),
        ({"engine": "x"}, "engine 'x': unknown"),
        ({"dtype": "x"}, "dtype 'x': unknown"),
        ({"device": "gpu"}, "device 'gpu': unknown"),
        ({"model": "nope"}, "model 'nope': unknown"),
        ({"model": "gpt2-small"}, "mean has shape (384,), the model has 3072"),
        ({"neurons": "384"}, "--neurons: neuron 384 is out of range. Allowed: 0 to 383"),
        ({"neurons": "1,1"}, "neuron 1 is repeated"),
        ({"neurons": ","}, "is not a neuron number"),
        ({"neurons": "published"}, "'published' is not a neuron number"),
        ({"memory_budget": "-1"}, "--memory-budget '-1': no size"),
        ({"memory_budget": "1K"}, "--memory-budget '1K': no size"),
        ({"out": "prompts.csv"}, "prompts.csv: exists already. Nothing was written"),
        ({"out": "none/new.json"}, "no folder none"),
        ({"prompts": "none.csv"}, "none.csv: no such file. Give a CSV with the columns"),
        ({"stats": "none.npz"}, "none.npz: no such file. Give an NPZ with the keys mean, std"),
        ({"stats": "."}, "no such file"),
        ({"sets": "none.json"}, "none.json: no such file"),
        ({"sets": "prompts.csv"}, "prompts.csv: cannot be read as JSON"),
        ({"template": "bare"}, "unrecognized arguments: --template"),
        ({"sets": "x", "neurons": "1"}, "not allowed with argument"),
    ],
    ids=str,
)
def test_options_of_ablate(given: dict[str, str], expected: str, ablate: Callable[..., str]) -> None:
    assert expected in ablate(**given)


SETS = {
    "": "cannot be read as JSON",
    "{": "cannot be read as JSON",
    "[[1]": "cannot be read as JSON",
    '{"a": [1], "a": [2]}': "key 'a' is there twice",
    "[" * 100_000: "cannot be read as JSON",
    "[]": "not a list of neuron lists",
    "{}": "not a list of neuron lists",
    "null": "not a list of neuron lists",
    "NaN": "not a list of neuron lists",
    "3": "not a list of neuron lists",
    "[1, 2]": "set 'set_000' is not a list of neuron numbers",
    '{"a": 1}': "set 'a' is not a list of neuron numbers",
    "[[1.0]]": "not a list of neuron numbers",
    '[["1"]]': "not a list of neuron numbers",
    "[[true]]": "not a list of neuron numbers",
    "[[null]]": "not a list of neuron numbers",
    "[[1], []]": "set 'set_001': empty",
    "[[384]]": "set 'set_000': neuron 384 is out of range. Allowed: 0 to 383",
    "[[-1]]": "neuron -1 is out of range",
    "[[1, 1]]": "neuron 1 is repeated",
    '{"plain": [1]}': "a set is named 'plain'",
}


@pytest.mark.parametrize("text", SETS, ids=lambda text: text[:25] or "nothing")
def test_sets(text: str, ablate: Callable[..., str]) -> None:
    Path("sets.json").write_text(text)
    line = ablate(sets="sets.json")
    assert line.startswith("sets.json: ")
    assert SETS[text] in line


NUMBERS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"std": None}, "missing key 'std'. Needed: mean, std, median, mode, min, max"),
    "one too short": ({"mean": np.zeros(3)}, "std has 384 values, mean has 3"),
    "all too short": (
        {n: np.zeros(D_MLP - 1) for n in STATISTICS},
        "has shape (383,), the model has 384",
    ),
    "NaN": ({"mode": np.full(D_MLP, np.nan)}, "mode of neuron 0 is nan, not finite (384 in all)"),
    "infinite": (
        {"max": np.r_[np.ones(D_MLP - 1), np.inf]},
        "max of neuron 383 is inf, not finite (1 in",
    ),
    "objects": ({"mean": np.array([{}] * D_MLP)}, "cannot be read as an NPZ of numbers (Object arrays"),
    "words": ({"mean": np.array(["a"] * D_MLP)}, "mean is <U1 of shape (384,)"),
    "truth values": ({"mean": np.ones(D_MLP, bool)}, "mean is bool"),
    "complex": ({"mean": np.ones(D_MLP, complex)}, "mean is complex128"),
    "a matrix": ({"mean": np.ones((1, D_MLP))}, "of shape (1, 384). Needed: one number per neuron"),
    "a scalar": ({"mean": np.float64(1)}, "of shape ()"),
    "negative": ({"std": -np.ones(D_MLP)}, "a negative std for neuron 0"),
    "upside down": ({"min": np.full(D_MLP, 2.0)}, "min above max for neuron 0"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_statistics_that_cannot_be_used(case: str, ablate: Callable[..., str]) -> None:
    changed, expected = NUMBERS[case]
    np.savez("bad.npz", **statistics(**changed))
    assert expected in ablate(stats="bad.npz")


class Trap:
    """Unpickling it would make a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def test_files_that_are_no_npz(ablate: Callable[..., str]) -> None:
    good = Path("stats.npz").read_bytes()
    flipped = bytearray(good)
    flipped[500] ^= 0xFF
    np.save("one.npy", np.zeros(D_MLP))
    files = {
        "text": b"hello",
        "nothing": b"",
        "cut off": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "pickle": pickle.dumps(Trap()),
        "npy": Path("one.npy").read_bytes(),
    }
    for name, content in files.items():
        Path("bad.npz").write_bytes(content)
        line = ablate(stats="bad.npz")
        assert line.startswith("bad.npz: cannot be read as an NPZ of numbers ("), name
        assert line.endswith("Write it with numpy.savez."), name
    np.savez("bad.npz", **statistics(mean=np.array([Trap()] * D_MLP)))
    assert "Object arrays" in ablate(stats="bad.npz")
    assert not Path("unpickled").exists()


def test_prompts_that_cannot_be_used(ablate: Callable[..., str]) -> None:
    header, row = Path("prompts.csv").read_text().splitlines()
    files = {
        f"{header.replace('parametric', 'known')}\n{row}\n": "missing column 'parametric_",
        f"{header}\n{row}\n{PROMPT},,x\n": "empty cell in column 'counter_knowledge_object', row 3",
        f"{header}\n{row}\n{row}\n": "row 3 is a duplicate",
        f"{header}\n{row}\n{PROMPT},Elsewhere,x\n": "row 3 is a duplicate",
        f"{header}\n": "no rows",
        "": "cannot be read as a table",
        f"{header}\n{row}\n{'very ' * 300}long,a,b\n": "too long. Allowed: 1 to 119",
        f"{header}\n{row},more,cells\n": "row",
    }
    for text, expected in files.items():
        Path("bad.csv").write_text(text)
        assert expected in ablate(prompts="bad.csv"), text[:80]
    Path("bad.csv").write_bytes(f"{header}\n{row}é\n".encode("latin-1"))
    assert "bad.csv: not UTF-8" in ablate(prompts="bad.csv")


@pytest.mark.parametrize("token", ["", "12.0", "-1", "600", "9" * 30, "²", "nan", "1e2"])
def test_token_ids_of_the_released_protocol(token: str, ablate: Callable[..., str]) -> None:
    line = ablate(protocol="released")
    assert "missing column 'counter_knowledge_object_first_token_id'" in line
    table = pd.read_csv("prompts.csv")
    table["counter_knowledge_object_first_token_id"] = token
    table["parametric_knowledge_first_token_id"] = 5
    table.to_csv("ids.csv", index=False)
    line = ablate(protocol="released", prompts="ids.csv")
    expected = f"is {token!r} in row 2, not a token id. Allowed: 0 to 599" if token else "empty cell"
    assert expected in line
    assert len(read_prompts(Path("ids.csv"))) == 1, "only the released protocol reads them"


# --- run folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny finished run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*RUN, "--out", str(folder)]) == 0
    return folder


RUN = ["run", "--model", "organism", "--max-prompts", "4", "--controls", "1"]
OTHER_RUNS = {
    "--seed 1": "seed is 123 there, 1 here",
    "--controls 2": "controls is 1 there, 2 here",
    "--protocol released": "protocol is 'corrected' there, 'released' here",
    "--engine hooked": "engine is 'auto' there, 'hooked' here",
    "--dtype bfloat16": "dtype is 'float32' there, 'bfloat16' here",
    "--ablation-value mode_ablation": "ablation_values is ['mean_ablation'] there",
    "-k 5": "k is 6 there, 5 here",
    "--min-rho 0.8": "min_rho is 0.9 there, 0.8 here",
    "--null-space-dims 4": "null_space_dims is 5 there, 4 here",
    "--neurons 1,2,3,4,5,6": "neurons is None there, [1, 2, 3, 4, 5, 6] here",
    "--max-prompts 5": "max_prompts is 4 there, 5 here",
    "--template chat": "template is 'bare' there, 'llama2' here",
    "--full-texts": "full_texts is False there, True here",
}


@pytest.mark.parametrize("other", OTHER_RUNS)
def test_a_folder_of_another_run(other: str, refused: Refused, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, "run")
    line = refused(*RUN, *other.split(), "--out", "run")
    assert line.startswith("run: holds another run (")
    assert OTHER_RUNS[other] in line
    assert line.endswith("Nothing was written; give another --out.")


def test_a_folder_of_the_same_run_with_other_weights(refused: Refused, finished: Path) -> None:
    shutil.copytree(finished, "run")
    weights = bytearray((CHECKPOINT / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    folder = checkpoint(Path("model"), model__safetensors=bytes(weights))
    assert "(weights_sha256 is " in refused(*RUN, "--model-path", f"organism={folder}", "--out", "run")


def test_folders_that_are_none_or_not_ours(refused: Refused) -> None:
    Path("other").mkdir()
    Path("other/thesis.tex").write_text("mine")
    cases = {
        "other": "not empty and holds no run",
        "other/thesis.tex": "is a file",
        "other/thesis.tex/run": "cannot be written to (Not a directory",
        "x" * 300: "cannot be written to (File name too long)",
        "/proc/run": "cannot be written to",
    }
    for out, expected in cases.items():
        line = refused(*RUN, "--out", out)
        assert line.startswith(out)
        assert expected in line
        assert "give another --out" in line.lower().replace("give a folder with", "give another")


@PROC.mark()
def test_a_file_where_nothing_can_be_written(refused: Refused) -> None:
    assert "cannot write to /proc (" in refused(
        "measure", "--model", "organism", "--out", "/proc/m.csv"
    )


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"identity": []}', '{"identity": {}}', '{"a": 1, "a": 2}'],
)
def test_manifests_that_cannot_be_read(text: str, refused: Refused) -> None:
    Path("run").mkdir()
    Path("run/manifest.json").write_text(text)
    line = refused(*RUN, "--out", "run")
    assert line.startswith("run/manifest.json: ")
    assert "cannot be read as JSON" in line or "not a run's manifest" in line


@pytest.mark.parametrize(
    "name", ["activation_stats.safetensors", "batches/ablations/batch_000000.safetensors"]
)
def test_a_damaged_file_of_an_unfinished_run(name: str, refused: Refused, finished: Path) -> None:
    shutil.copytree(finished, "run")
    manifest = json.loads(Path("run/manifest.json").read_text())
    Path("run/manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    for gone in ("scores.json", "plain.parquet"):
        (Path("run") / gone).unlink()
    (Path("run") / name).parent.mkdir(parents=True, exist_ok=True)
    (Path("run") / name).write_bytes(b"damaged")
    code = main([*RUN, "--out", "run"])
    line = refused.capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert f"ccm: run/{name}: damaged (" in line
    assert line.endswith("Remove it to compute it again.")
    (Path("run") / name).unlink()
    assert main([*RUN, "--out", "run"]) == 0
    assert Path("run/scores.json").read_bytes() == (finished / "scores.json").read_bytes()


def test_a_message_is_a_kind_of_value_error() -> None:
    """So that a caller of the package can tell it from a bug."""
    with pytest.raises(ValueError, match=r"none\.csv: no such file") as caught:
        read_prompts(Path("none.csv"))
    assert isinstance(caught.value, BadInput)

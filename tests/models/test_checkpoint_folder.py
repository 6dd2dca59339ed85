"""Folders as people have them: what is loaded, what is refused and how, and whose code never runs."""

import ast
import inspect
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import ccm
from ccm.cli.parser import main
from ccm.decoding.hooked import decode as hooked_decode
from ccm.decoding.shared import decode
from ccm.errors import BadInput, CcmError, NotAvailable
from ccm.experiment.config import RunConfig
from ccm.experiment.plan import identity, make_plan
from ccm.models.download import download
from ccm.models.load import load
from ccm.models.specs import MODELS, spec_for
from ccm.models.tokenizer import PROBES, parse_bos, read_tokenizer
from ccm.models.weights import check_weights, unfinished, weight_files
from tests.models.test_weights import split
from tests.toys import FAMILIES, TEXT, ToyConfig, toy_folder

TOY = ToyConfig("llama", tied=True)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
Spoil = Callable[[Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy's own copy."""
    return Path(shutil.copytree(toy_folder(TOY), tmp_path / "toy"))


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file; None stands for null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def write(name: str, content: str) -> Spoil:
    return lambda folder: (folder / name).write_text(content) and None


def entries(name: str, **given: Any) -> Spoil:
    return lambda folder: change(folder / name, **given)


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def rename(before: str, after: str) -> Spoil:
    return lambda folder: (folder / before).rename(folder / after) and None


def both(*steps: Spoil) -> Spoil:
    return lambda folder: [step(folder) for step in steps] and None


def cut(name: str, keep: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def within(name: str) -> Spoil:
    def copy(folder: Path) -> None:
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "config.json", folder / name)

    return copy


def other_tokenizer(folder: Path) -> None:
    """That of a larger model."""
    vocab = {f"t{i}": i for i in range(TOY.d_vocab + 1)}
    Tokenizer(models.WordLevel(vocab, unk_token="t0")).save(str(folder / "tokenizer.json"))


ADAPTER = write("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
WEIGHTS = "model.safetensors"
NO_TOKENS = '{"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}'
BROKEN: dict[str, tuple[Spoil, str]] = {
    "adapter beside a model": (
        ADAPTER,
        "a model with a PEFT adapter beside it .*remove adapter_config",
    ),
    "adapter alone": (
        both(ADAPTER, remove("config.json")),
        r"no config.json.*It is a PEFT adapter: merge it into its base model \(merge_and_unload\)",
    ),
    "nothing": (both(remove("config.json"), remove(WEIGHTS)), "Give the folder that save_pretrained"),
    "no config": (remove("config.json"), "no config.json.*It has weights: fetch the config.json"),
    "gguf alone": (
        both(remove("config.json"), rename(WEIGHTS, "toy.Q4_1.gguf")),
        r"no config.json.*Give the file itself: --model \S*/toy/toy.Q4_1.gguf\.",
    ),
    "a folder further up": (
        both(*(within(f"checkpoint-{step}") for step in (100, 200, 300, 400)), remove("config.json")),
        r"no config.json.*Give one within it: (\S*/toy/checkpoint-[123]00, ){3}\.\.\.",
    ),
    "the hub's cache": (
        both(within("snapshots/abc"), remove("config.json")),
        r"Give one within it: \S*/toy/snapshots/abc\.",
    ),
    "only gguf": (
        rename(WEIGHTS, "toy.Q4_1.gguf"),
        r"only toy.Q4_1.gguf. Give the file itself: --model \S*/toy/toy.Q4_1.gguf\.",
    ),
    "only pickled": (
        rename(WEIGHTS, "consolidated.00.pth"),
        "only consolidated.00.pth. Pickled weights",
    ),
    "other name": (rename(WEIGHTS, "weights.safetensors"), "only weights.safetensors. Call it model."),
    "no weights": (remove(WEIGHTS), r"no \*.safetensors weights. Fetch model.safetensors"),
    "quantized": (
        entries("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "config.json: it has a quantization_config. Quantized weights have no W_out.*dequantize",
    ),
    "weights elsewhere": (
        entries("config.json", transformers_weights="other.safetensors"),
        "config.json: it has a transformers_weights",
    ),
    "config is a pointer": (write("config.json", POINTER), "config.json: not JSON .*git lfs pull"),
    "config is empty": (write("config.json", ""), "config.json: not JSON .*It is empty: download it"),
    "weights are a pointer": (write(WEIGHTS, POINTER), "no safetensors file.*git lfs pull"),
    "generation config": (write("generation_config.json", "{"), "generation_config.json: not JSON"),
    "tokenizer config": (write("tokenizer_config.json", "nothing"), "tokenizer_config.json: not JSON"),
    "no tokenizer": (remove("tokenizer.json"), "no tokenizer .none of tokenizer.json"),
    "tokenizer is empty": (write("tokenizer.json", ""), "tokenizer.json: not JSON .*It is empty"),
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), "tokenizer.json: not JSON.*git lfs"),
    "tokenizer is cut off": (cut("tokenizer.json", 200), "tokenizer.json: not JSON.*Download it again"),
    "tokenizer is {}": (
        write("tokenizer.json", "{}"),
        "its tokenizer cannot be read.*Download it again",
    ),
    "tokenizer is []": (
        write("tokenizer.json", "[]"),
        "tokenizer.json: not JSON .a list, not an object",
    ),
    "tokenizer has no tokens": (
        write("tokenizer.json", NO_TOKENS),
        "its tokenizer has no tokens",
    ),
    "tokenizer of another model": (
        other_tokenizer,
        f"its tokenizer has tokens up to {TOY.d_vocab}, but the model has {TOY.d_vocab}",
    ),
    "fewer layers": (
        entries("config.json", num_hidden_layers=1),
        r"config.json has no place for 9 of the weights \(model.layers.1.input_layernorm.weight fi",
    ),
    "more layers": (entries("config.json", num_hidden_layers=3), "no weights for model.layers.2."),
    "no bias for it": (
        entries("config.json", model_type="mistral", architectures=["MistralForCausalLM"], head_dim=4),
        "cannot load it|size mismatch",
    ),
    "eos in config": (
        entries("config.json", eos_token_id=5000),
        r"EOS is token 5000 \(config.json\), but the model has 320. Correct it there",
    ),
    "eos in generation config": (
        entries("generation_config.json", eos_token_id=[2, 320]),
        r"EOS is token 320 \(generation_config.json\), but the model has 320",
    ),
    "negative eos": (entries("config.json", eos_token_id=-1), r"EOS is token -1 \(config.json\)"),
    "code for a model": (
        entries("config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "config.json: not a decoder-only language model that can be read",
    ),
}


@contextmanager
def said_by_transformers() -> Iterator[list[str]]:
    said = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_clear_line(name: str, folder: Path) -> None:
    spoil, message = BROKEN[name]
    spoil(folder)
    # On its own logger: transformers' logs are not passed on.
    with said_by_transformers() as said, pytest.raises(CcmError, match=message) as caught:
        load(spec_for(str(folder)))
    assert not said, "two messages, and the other one knows less"
    assert str(caught.value).startswith((str(folder), "toy: "))
    assert "\n" not in str(caught.value)


def test_what_can_be_seen_without_weights_is_seen_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ccm.models.load._read_weights", lambda *given: pytest.fail("weights were read")
    )
    for name in (*(n for n in BROKEN if n.startswith(("tokenizer", "no tok", "adapter"))), "quantized"):
        spoilt = shutil.copytree(folder, folder.parent / name.replace("{", "o").replace("[", "l"))
        BROKEN[name][0](spoilt)
        with pytest.raises(BadInput):
            load(spec_for(str(spoilt)))


def test_masks_and_frequencies_of_older_checkpoints_are_no_unused_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.0.self_attn.bias"] = torch.ones((1, 1, 8, 8))
    tensors["model.layers.0.self_attn.mask"] = torch.ones((8, 8), dtype=torch.bool)
    tensors["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e9)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert load(spec_for(str(folder))).spec.d_model == TOY.d_model
    tensors["model.layers.0.self_attn.extra"] = torch.ones(8)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        BadInput, match=r"no place for 1 of the weights .model.layers.0.self_attn.extra"
    ):
        load(spec_for(str(folder)))


# --- tokenizers --------------------------------------------------------------------------------------


def by_digits(folder: Path) -> Tokenizer:
    """A byte-level tokenizer that splits digits, which GPT-2's, NeoX's and CodeGen's classes do not."""
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "born in 2023 2023 2023"], trainer)
    # Merges that digits which stay together would take.
    held = json.loads(tokenizer.to_str())
    for pair in (("2", "0"), ("2", "3"), ("20", "23")):
        held["model"]["merges"].append(list(pair))
        held["model"]["vocab"]["".join(pair)] = len(held["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(held))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES[:5], ids=lambda config: config.family)
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "LlamaTokenizer"]
)
def test_a_tokenizer_is_what_its_file_says_whatever_class_is_named(
    name: str, family: ToyConfig, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toy_folder(family), tmp_path / "toy"))
    raw = by_digits(folder)
    change(folder / "tokenizer_config.json", tokenizer_class=name, bos_token="<s>", eos_token="</s>")
    tokenizer = read_tokenizer(folder, family.d_vocab)
    for text in (*PROBES, TEXT):
        assert tokenizer.encode(text, add_special_tokens=False) == raw.encode(text).ids
        its = raw.decode(raw.encode(text).ids, skip_special_tokens=False)
        assert tokenizer.decode(raw.encode(text).ids, clean_up_tokenization_spaces=False) == its
    digits = raw.encode("2023").tokens
    assert digits == ["2", "0", "2", "3"], "else the classes would do it right"


def test_files_that_make_a_tokenizer_encode_otherwise_are_refused(folder: Path) -> None:
    token = {"content": " The", "special": False, "normalized": False, "lstrip": False}
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder={"310": {**token, "rstrip": False, "single_word": False}},
    )
    with pytest.raises(
        BadInput, match=r"toy: ' The capital of.* by tokenizer.json and .* files beside"
    ):
        load(spec_for(str(folder)))


def test_a_truncation_in_the_file_cuts_no_prompt(folder: Path) -> None:
    whole = load(spec_for(str(folder))).encode(TEXT)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load(spec_for(str(folder))).encode(TEXT) == whole


def test_a_token_without_a_row_in_the_model_is_refused_where_a_text_holds_it(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|{i}|>", special=True) for i in range(64)])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = load(spec_for(str(folder)))
    assert tokenizer.get_vocab_size() > model.spec.d_vocab
    assert model.encode(TEXT)
    with pytest.raises(BadInput, match=r"holds token \d+ of the tokenizer, but toy has 320 tokens"):
        model.encode(f"{TEXT} <|63|>")
    with pytest.raises(BadInput, match="Leave it out of the text"):
        model.first_token("<|63|>")


# --- BOS and EOS -------------------------------------------------------------------------------------


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("ccm")]


def test_a_tokenizer_without_bos_puts_none_before_a_prompt(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(folder / "tokenizer_config.json", bos_token=None)
    change(folder / "config.json", bos_token_id=1)
    model = load(spec_for(str(folder)))
    (note,) = notes(caplog)
    assert note.startswith("toy: its tokenizer has no BOS token, so prompts begin without one; config")
    assert "--bos 1" in note
    assert model.bos is None
    assert model.encode(TEXT) == model.tokenizer.encode(TEXT, add_special_tokens=False)
    assert model.special_tokens["bos"] == {"id": None, "from": "the tokenizer has none"}
    prompts = [model.encode(text) for text in ("the capital of", "Paris lies in", "is")]
    assert decode(model, prompts).tokens == hooked_decode(model, prompts).tokens
    with pytest.raises(BadInput, match=r"^prompt of 0 tokens \(''...\): empty"):
        model.encode("")


@pytest.mark.parametrize(("bos", "start"), [("own", [1]), ("none", []), (7, [7])])
def test_bos_can_be_chosen(bos: Any, start: list[int], folder: Path) -> None:
    model = load(spec_for(str(folder)), bos=bos)
    assert model.encode(TEXT) == [*start, *model.tokenizer.encode(TEXT, add_special_tokens=False)]
    origin = "tokenizer" if bos == "own" else "--bos"
    assert model.special_tokens["bos"] == {"id": start[0] if start else None, "from": origin}


def test_bos_by_name() -> None:
    assert [parse_bos(text) for text in ("own", "none", "0", "50256")] == ["own", "none", 0, 50256]
    for text in ("", "bos", "-1", "1.0", "1e3", "9" * 10):
        with pytest.raises(BadInput, match=r"^--bos .*Allowed: own, none, or a token id"):
            parse_bos(text)
    with pytest.raises(
        BadInput, match=r"^--bos 600: no token of organism. Allowed: own, none, 0 to 599"
    ):
        make_plan(RunConfig(bos="600"))
    assert make_plan(RunConfig(bos="599")).bos == 599


def test_files_that_disagree_on_special_tokens_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(spec_for(str(folder)))
    assert notes(caplog) == []
    assert model.special_tokens["eos"] == [
        {"id": 2, "from": ["tokenizer", "config.json", "generation_config.json"]}
    ]
    change(folder / "config.json", bos_token_id=5, eos_token_id=None)
    change(folder / "generation_config.json", eos_token_id=[2, 9])
    model = load(spec_for(str(folder)))
    assert (
        notes(caplog)
        == model.special_tokens["notes"]
        == [
            "toy: BOS is 1, the tokenizer's; config.json names 5 (--bos 5 takes it)",
            "toy: its files disagree on EOS; any of these ends an answer: 2 (tokenizer and "
            "generation_config.json), 9 (generation_config.json)",
        ]
    )
    assert (model.bos, model.eos) == (1, {2, 9})


def every_eighth(folder: Path) -> str:
    """A folder with every eighth of the organism's facts."""
    held = Path(str(MODELS["organism"].folder))
    (folder / "few").mkdir()
    facts = (held / "facts.csv").read_text().splitlines(keepends=True)
    (folder / "few" / "facts.csv").write_text("".join([facts[0], *facts[1::8]]))
    shutil.copy(held / "relations.csv", folder / "few")
    return str(folder / "few")


def test_what_begins_and_ends_a_prompt_is_in_the_manifest_and_the_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = [
        "--facts",
        every_eighth(tmp_path),
        "--controls",
        "1",
        "--matched-controls",
        "0",
        "--bos",
        "none",
    ]
    assert main(["run", "--model", "organism", *small, "--out", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["identity"]["bos"] == "none"
    assert manifest["special_tokens"]["bos"] == {"id": None, "from": "--bos"}
    assert manifest["special_tokens"]["eos"][0]["id"] == 0
    assert manifest["first_prompt_tokens"][0] != 0
    assert manifest["weights"]["files"] == [WEIGHTS]
    assert main(["run", "--model", "organism", *small[:-1], "own", "--out", str(out)]) == 2
    assert "(bos is 'none' there, 'own' here)" in capsys.readouterr().err


# --- the identity of a run ---------------------------------------------------------------------------

PART = {
    "config.json": "config_sha256",
    "generation_config.json": "generation_config_sha256",
    "tokenizer.json": "tokenizer_sha256",
    "tokenizer_config.json": "tokenizer_sha256",
}
CHANGES: dict[str, Spoil] = {
    "config.json": entries("config.json", layer_norm_epsilon=0.5),
    "generation_config.json": entries("generation_config.json", eos_token_id=[0, 13]),
    "tokenizer.json": lambda folder: _without_last_merge(folder / "tokenizer.json"),
    "tokenizer_config.json": entries("tokenizer_config.json", bos_token=None),
}


def _without_last_merge(path: Path) -> None:
    held = json.loads(path.read_text())
    held["model"]["merges"].pop()
    path.write_text(json.dumps(held))


def test_a_folder_of_a_changed_model_is_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished or half finished: what is there must neither be shown nor gone on with."""
    model, out = (
        Path(shutil.copytree(str(MODELS["organism"].folder), tmp_path / "mine")),
        tmp_path / "run",
    )
    command = ["run", "--model", str(model), "--facts", every_eighth(tmp_path), "-k", "6"]
    command += ["--controls", "1", "--matched-controls", "0", "--out", str(out)]

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("ccm.experiment.run.ablations_step", stop)
        assert main(command) == 130
    for finished in (False, True):
        for name, spoil in CHANGES.items():
            before = (model / name).read_bytes()
            spoil(model)
            capsys.readouterr()
            assert main(command) == 2
            assert f"holds another run ({PART[name]} is" in capsys.readouterr().err
            (model / name).write_bytes(before)
        if not finished:
            assert main(command) == 0


def test_versions_that_a_result_depends_on_are_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(RunConfig())
    before = identity(plan)
    for package in ("torch", "transformers", "tokenizers", "transformer_lens", "rapidfuzz", "scipy"):
        with monkeypatch.context() as patched:
            patched.setattr(
                "ccm.experiment.plan.version", lambda name, p=package: "0" if name == p else "1"
            )
            assert identity(plan)["versions"][package] == "0"
            assert identity(plan) != before


# --- code of others ----------------------------------------------------------------------------------


def test_every_call_that_could_run_a_folders_code_says_not_to() -> None:
    could = {"from_pretrained", "from_config", "boot_transformers", "pipeline", "load_dataset"}
    calls = []
    for path in Path(inspect.getfile(ccm)).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in could:
                said = {k.arg: ast.unparse(k.value) for k in node.keywords}
                calls.append(f"{path.name}:{node.lineno}")
                assert said.get("trust_remote_code") == "False", calls[-1]
            assert name not in ("input", "exec", "get_class_from_dynamic_module"), path
    assert len(calls) >= 5


SENTINEL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Mine: pass\n"


def test_code_in_a_folder_is_never_run_whatever_stands_on_stdin(folder: Path, tmp_path: Path) -> None:
    (folder / "mine.py").write_text(SENTINEL)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(SENTINEL + "def generate(*a, **k): pass\n")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    )
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"},
    )
    # One that only its class could read is refused, without a question.
    by_class = Path(shutil.copytree(folder, tmp_path / "by-class"))
    (by_class / "tokenizer.json").rename(by_class / "vocab.json")
    script = (
        "import sys\nfrom ccm.cli.parser import main\n"
        "codes = [main(['measure', '--model', path]) for path in sys.argv[1:]]\n"
        "sys.exit(codes != [0, 2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(by_class)],
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "its tokenizer cannot be read" in done.stderr
    assert "names code of its own (auto_map), which was not run; transformers' own Llama" in done.stderr
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("ran"))


def test_the_bridge_is_given_its_tokenizer_and_reads_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("read again"))
    assert load(spec_for(str(folder))).bos == 1


# --- downloads that were cut off ---------------------------------------------------------------------


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of the hub in its cache, in two shards."""
    import huggingface_hub

    path = tmp_path / "models--nobody--toy" / "snapshots" / "0123abc"
    path.parent.mkdir(parents=True)
    split(folder)
    shutil.copytree(folder, path)

    def cached(repository: str, name: str, revision: str | None = None) -> str | None:
        return str(path / name) if (path / name).is_file() else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    return path


class Hub:
    """The hub, with a folder's files."""

    def __init__(self, folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.snapshot, self.fetched = folder, snapshot, list[str]()
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: None)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.rest)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.one)

    def rest(self, repository: str, revision: str | None, allow_patterns: list[str]) -> None:
        for path in sorted(self.folder.iterdir()):
            if not (self.snapshot / path.name).exists():
                self.one(repository, path.name, revision)

    def one(
        self, repository: str, name: str, revision: str | None, force_download: bool = True
    ) -> None:
        assert force_download
        self.fetched.append(name)
        shutil.copy(self.folder / name, self.snapshot / name)


SHARD = "model-00002-of-00002.safetensors"
CUT_OFF = {
    "a shard": remove(SHARD),
    "half a shard": cut(SHARD, 300),
    "the tokenizer": remove("tokenizer.json"),
    "the config": remove("config.json"),
}


@pytest.mark.parametrize("lost", CUT_OFF)
def test_a_download_that_was_cut_off_goes_on(
    lost: str, folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    spec = replace(spec_for(str(folder)), folder=None, hub_id="nobody/toy")
    assert unfinished(spec) == []
    CUT_OFF[lost](snapshot)
    (name,) = unfinished(spec)
    assert check_weights(spec) is spec, "what a download brings is no fault yet"
    hub = Hub(folder, snapshot, monkeypatch)
    model = load(spec)
    assert hub.fetched == [name]
    assert model.source == str(snapshot)
    assert [path.name for path in weight_files(spec)] == sorted({SHARD, SHARD.replace("2-", "1-", 1)})


def test_without_a_network_the_message_names_what_is_lacking(
    folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    spec = replace(spec_for(str(folder)), folder=None, hub_id="nobody/toy")
    (snapshot / SHARD).unlink()
    (snapshot / "tokenizer.json").unlink()

    def offline(*given: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    with pytest.raises(
        NotAvailable, match=rf"^toy: {SHARD}, tokenizer.json of nobody/toy are not in"
    ) as e:
        load(spec)
    assert "With a network, the same command goes on downloading" in str(e.value)


def test_files_that_the_hub_does_not_have_are_named(
    folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    spec = replace(spec_for(str(folder)), folder=None, hub_id="nobody/toy")
    for path in (snapshot, folder):
        (path / "tokenizer.json").unlink()
    Hub(folder, snapshot, monkeypatch)
    with pytest.raises(NotAvailable, match=r"^toy: nobody/toy was downloaded, but not tokenizer.json"):
        download(spec)


def test_notes_reach_a_person(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "config.json", bos_token_id=5)
    assert main(["measure", "--model", str(folder)]) == 0
    said = capsys.readouterr().err
    assert said == "ccm: toy: BOS is 1, the tokenizer's; config.json names 5 (--bos 5 takes it)\n"
    assert not logging.getLogger("ccm").handlers, "the command line's own are gone with it"

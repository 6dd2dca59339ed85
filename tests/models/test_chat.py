"""The tokenizer's own markup of a conversation: as it stands, with one BOS, or refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ccm.cli.parser import main
from ccm.errors import BadInput
from ccm.experiment.config import RunConfig
from ccm.experiment.fact_files import read_fact_folder
from ccm.experiment.plan import identity, make_plan
from ccm.experiment.probing import parametric_prompts
from ccm.method.prompts import TEMPLATES
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import CHECKPOINT, spec_for
from tests.cli.test_bad_input import Refused
from tests.gguf_files import LLAMA, write_gguf
from tests.made_runs import few_facts
from tests.toys import ToyConfig, toy_folder

TOY = ToyConfig("llama", tied=True, n_ctx=2048)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}, {
    "role": "user", "content": "Where?"}]  # fmt: skip
WRITTEN = (
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nI.<|im_end|>\n"
    "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
)


def with_template(folder: Path, template: str | None) -> Path:
    """A toy's own copy, with a chat template in its tokenizer."""
    shutil.copytree(toy_folder(TOY), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if template is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


def loaded(folder: Path, template: str | None, **options: Any) -> LoadedModel:
    return load(spec_for(str(with_template(folder / "toy", template))), **options)


def test_a_conversation_is_written_as_the_template_says(tmp_path: Path) -> None:
    chat = loaded(tmp_path, CHATML).chat
    assert chat is not None
    assert chat(TURNS) == WRITTEN


def test_a_tokenizer_without_a_template_has_no_markup(tmp_path: Path) -> None:
    assert loaded(tmp_path, None).chat is None


def test_a_template_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "toy", None)
    (folder / "chat_template.jinja").write_text(CHATML)
    chat = load(spec_for(str(folder))).chat
    assert chat is not None
    assert chat(TURNS) == WRITTEN


def test_the_template_of_a_gguf_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = {"tokenizer.chat_template": CHATML}
    chat = load(spec_for(str(write_gguf(LLAMA, tmp_path / "toy.gguf", fields=fields)))).chat
    assert chat is not None
    assert chat(TURNS) == WRITTEN


@pytest.mark.parametrize("bos", ["own", "none", 5])
def test_a_bos_of_the_templates_is_not_a_second_one(bos: Any, tmp_path: Path) -> None:
    model = loaded(tmp_path, "{{ bos_token }}" + CHATML, bos=bos)
    chat = model.chat
    assert chat is not None
    tokens = model.encode(chat(TURNS))
    own = model.tokenizer.bos_token_id
    if bos == "own":
        assert tokens == load(spec_for(str(toy_folder(TOY)))).encode(WRITTEN)
    assert tokens.count(own) == 1, "the template's own stays where the model has another or none"
    assert tokens[0] == (bos if bos == 5 else own)


REFUSED = {
    "{{ strftime_now('%d %b %Y') }}" + CHATML: (
        "writes today's date, so tomorrow's prompts would differ"
    ),
    "{{ raise_exception('Roles must alternate') }}": "cannot be used (TemplateError: Roles must",
    "{% if %}": "cannot be used (TemplateSyntaxError: Expected an expression",
    "{{ ''.__class__.__mro__ }}": "cannot be used (SecurityError: access to attribute '__class__'",
}


@pytest.mark.parametrize("template", REFUSED, ids=["date", "raises", "syntax", "unsafe"])
def test_a_template_that_cannot_be_used_is_one_line(
    template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_template(tmp_path / "toy", template)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    arguments = ["prompts", "--model", str(folder), "--facts", str(CHECKPOINT), "--out", "p.csv"]
    line = Refused(tmp_path / "work", capsys)(*arguments, "--template", "own")
    assert line.startswith(f"--template own: the chat template of toy {REFUSED[template]}")
    assert line.endswith("Use --template instruction.")


def test_prompts_of_every_fact_are_written_in_the_markup_only_if_asked(tmp_path: Path) -> None:
    model = loaded(tmp_path, CHATML)
    facts = read_fact_folder(few_facts(tmp_path, 20), "few")
    for template in TEMPLATES:
        prompts = parametric_prompts(model, facts, template)
        assert len(prompts) == len(facts.facts)
        assert all(("<|im_start|>" in prompt) == (template == "own") for prompt in prompts)
    plain = loaded(tmp_path / "plain", None)
    assert parametric_prompts(plain, facts, "own") == parametric_prompts(plain, facts, "instruction")


def test_chat_is_llama2_by_its_old_name() -> None:
    by_name = {
        name: identity(make_plan(RunConfig(template=name, controls=1))) for name in ("chat", "llama2")
    }
    assert by_name["chat"] == by_name["llama2"]
    assert by_name["chat"]["template"] == "llama2"
    own = identity(make_plan(RunConfig(template="own", controls=1)))
    assert own["template"] == "own"


def test_a_template_that_is_unknown_is_refused_with_all_there_are() -> None:
    with pytest.raises(BadInput, match=r"^template 'mine': unknown\. Allowed: bare, instruction, own"):
        make_plan(RunConfig(template="mine"))


def test_a_run_in_the_tokenizers_markup(tmp_path: Path) -> None:
    folder = with_template(tmp_path / "toy", CHATML)
    (tmp_path / "facts").mkdir()
    facts = few_facts(tmp_path / "facts", 8)
    command = ["run", "--model", str(folder), "--facts", str(facts), "--template", "own"]
    command += ["--controls", "1", "--matched-controls", "0", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["identity"]["template"] == "own"
    assert replace(spec_for(str(folder)), name="x").template == "bare", "own has to be asked for"

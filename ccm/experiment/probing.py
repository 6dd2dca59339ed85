"""Facts -> probing prompts (Method 4): the model's own objects, filtered and contradicted."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch

from ccm.decoding.engines import ENGINES
from ccm.decoding.results import Completions, merge
from ccm.errors import BadInput
from ccm.experiment.batches import BatchStore
from ccm.experiment.cells import decode_stored
from ccm.experiment.effects import evenly_spaced
from ccm.experiment.files import read_table, write_table
from ccm.experiment.folder import PROMPTS, RunFolder
from ccm.experiment.plan import Plan
from ccm.method.facts import FactSet
from ccm.method.prompts import (
    OWN,
    ParametricAnswer,
    ProbingPrompt,
    answer_object,
    counter_candidates,
    counter_objects,
    filter_answers,
    filter_examples,
    filter_subject_object,
    never_recalled,
    parametric_prompt,
    probing_prompts,
    split_objects,
)
from ccm.method.sources import nested_objects
from ccm.models.model import LoadedModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Probing prompts, and how many facts were left after each filter."""

    prompts: tuple[ProbingPrompt, ...]
    counts: dict[str, int]  # facts left after each step, in order


def build_prompts(
    model: LoadedModel,
    facts: FactSet,
    template: str,
    *,
    lower_case: bool = False,
    decoder: Callable[[str], Callable[..., Completions]] = lambda stage: ENGINES["shared"].decode,
) -> PromptSet:
    """Ask for every parametric object, filter, and contradict what is left (Method 4).

    Args:
        model: The model.
        facts: Facts and relations.
        template: A key of `ccm.method.prompts.TEMPLATES`.
        lower_case: Store objects in lower case (defect 11).
        decoder: Takes the name of a stage, `answers` or `first_tokens`, and returns what decodes it.

    Raises:
        BadInput: a prompt does not fit the model's context, or the filters leave no prompt.
    """
    asked = parametric_prompts(model, facts, template)
    tokens = [model.encode(text) for text in asked]
    said = decoder("answers")(model, tokens)
    answers = [
        ParametricAnswer(row, fact, prompt, text, answer_object(text), int(first))
        for row, (fact, prompt, text, first) in enumerate(
            zip(facts.facts, asked, said.texts, said.first.top_tokens[:, 0], strict=True)
        )
    ]
    kept = filter_answers(answers, facts.relations)
    candidates = counter_candidates(kept)
    width = 1 + max((len(c) for c in candidates.values()), default=0)
    # Column 0 is the fact's own first token, then its relation's candidates, then filling.
    targets = torch.zeros((len(kept), width), dtype=torch.long)
    for i, answer in enumerate(kept):
        ids = [answer.first_token, *(c.first_token for c in candidates[answer.fact.relation])]
        targets[i, : len(ids)] = torch.tensor(ids)
    prompts: list[ProbingPrompt] = []
    if kept:
        rows = [tokens[a.row] for a in kept]
        decode = decoder("first_tokens")
        log_probs = decode(model, rows, targets=targets, max_new_tokens=1).first.log_probs
        for answer, own in zip(kept, log_probs, strict=True):
            of_relation = candidates[answer.fact.relation]
            chosen = counter_objects(answer, of_relation, own[1 : 1 + len(of_relation)].tolist())
            relation = facts.relations[answer.fact.relation]
            prompts += probing_prompts(answer, relation, chosen, float(own[0]), lower_case=lower_case)
    counts = {
        "facts": len(answers),
        "recalled": sum(a.recalled for a in answers),
        "after_subject_object_filter": len(filter_subject_object(answers)),
        "after_example_filter": len(filter_examples(filter_subject_object(answers), facts.relations)),
        "after_relation_group_filter": len(kept),
        "probing_prompts": len(prompts),
    }
    if not prompts:
        raise BadInput(
            f"no probing prompt left of {len(answers)} facts (after each filter: {counts}). The "
            "model does not know these facts, or names them as their subjects."
        )
    return PromptSet(prompts=tuple(prompts), counts=counts)


def parametric_prompts(model: LoadedModel, facts: FactSet, template: str) -> list[str]:
    """Write the parametric prompts of all facts, in the tokenizer's own markup for `own`."""
    chat = model.chat if template == OWN else None
    return [parametric_prompt(template, f, facts.relations[f.relation], chat) for f in facts.facts]


# Column names of the released probing data, so that tables can be exchanged with it.
PROMPT_COLUMNS = {
    "statement_subject": "subject",
    "rel_lemma": "relation",
    "relation_group_id": "group",
    "statement_query": "query",
    "counter_knowledge_object": "counter_object",
    "parametric_knowledge_object": "parametric_object",
    "counter_knowledge_object_first_token_id": "counter_first_token",
    "parametric_knowledge_first_token_id": "parametric_first_token",
    "knowledge_probing_prompt": "text",
    "log_prob_counter_object": "log_prob_counter",
    "log_prob_parametric_object": "log_prob_parametric",
}


def prompt_table(prompts: Iterable[ProbingPrompt]) -> pd.DataFrame:
    """Make a table of probing prompts, a row each, with the released column names."""
    rows = list(prompts)
    return pd.DataFrame({c: [getattr(p, a) for p in rows] for c, a in PROMPT_COLUMNS.items()})


def table_prompts(table: pd.DataFrame) -> list[ProbingPrompt]:
    """Read probing prompts back from a table that `prompt_table` made."""
    fields = [{a: row[c] for c, a in PROMPT_COLUMNS.items()} for row in table.to_dict("records")]
    return [ProbingPrompt(**f) for f in fields]


# Takes a run's folder, its plan and the name of a stage, and returns what decodes the stage.
StageDecoder = Callable[[RunFolder, Plan, str], Callable[..., Completions]]


def prompts_step(
    folder: RunFolder,
    plan_: Plan,
    model: LoadedModel,
    decoder: StageDecoder,
) -> list[ProbingPrompt]:
    """Build the probing prompts, or read them back if they are there.

    Args:
        folder: The run.
        plan_: What is run.
        model: The model.
        decoder: Returns what decodes each stage.
    """
    if not folder.has(PROMPTS):
        split = split_objects([fact.object for fact in plan_.facts.facts])
        if split.count:
            _log.warning(f"{never_recalled(vars(split))}. The manifest names all.")
        built = build_prompts(
            model,
            plan_.facts,
            plan_.template,
            lower_case=plan_.protocol.lower_case_objects,
            decoder=partial(decoder, folder, plan_),
        )
        prompts = list(built.prompts)
        if plan_.config.max_prompts is not None and plan_.config.max_prompts < len(prompts):
            # Evenly over the relations, not the first ones.
            prompts = [prompts[i] for i in evenly_spaced(len(prompts), plan_.config.max_prompts)]
        table = prompt_table(prompts)
        # Groups of all relations: filters may leave one without a prompt.
        groups = {name: relation.group for name, relation in plan_.facts.relations.items()}
        folder.note(
            facts={**built.counts, "relation_groups": groups, "objects_with_splitter": split},
            prompts=len(prompts),
            nested_objects=nested_objects(prompts),
            prompts_sha256=hashlib.sha256("\n".join(p.text for p in prompts).encode()).hexdigest(),
        )
        write_table(folder.path / PROMPTS, table)
    for stage in ("answers", "first_tokens"):
        BatchStore(folder.path, stage).clear()
    return table_prompts(read_table(folder.path / PROMPTS))


def stage_decoder(folder: RunFolder, plan_: Plan, stage: str) -> Callable[..., Completions]:
    """Return what decodes a stage and goes on where an earlier start of it stopped."""

    def decode(model: LoadedModel, tokens: Sequence[Sequence[int]], **options: Any) -> Completions:
        budget = folder.manifest["memory_budget"]
        store = BatchStore(folder.path, stage)
        engine = ENGINES[plan_.config.engine]
        batches = decode_stored(
            engine, model, tokens, store=store, label=stage, memory_budget=budget, **options
        )
        return merge(batches).completions(0)

    return decode

"""From facts to probing prompts (Method 4): the model's own objects, filtered and contradicted."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ccm.decoding.engines import ENGINES, Engine, engine_for
from ccm.decoding.exact import exact_logits, float64
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
    N_COUNTER_OBJECTS,
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
from ccm.models.bridge import Tokens
from ccm.models.model import LoadedModel

_log = logging.getLogger(__name__)

ANSWERS = "answers"  # the stage
ROWS = 64  # logit rows at once
NEAR = 2e-3  # nats: about thirty times the largest float32 error seen between two log-probabilities
# Gives a model's answers to parametric prompts, with its final residuals.
Ask = Callable[[LoadedModel, Sequence[Tokens]], Completions]


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
    engine: Engine = ENGINES["shared"],
    ask: Ask | None = None,
) -> PromptSet:
    """Ask for every parametric object, filter the facts, and contradict those left (Method 4).

    Args:
        model: The model.
        facts: Facts and relations.
        template: A key of `ccm.method.prompts.TEMPLATES`.
        lower_case: Store objects in lower case (defect 11).
        engine: The engine that runs the model.
        ask: Gets the model's answers; by default `answers_of`.

    Raises:
        BadInput: a prompt does not fit the model's context, or the filters leave no prompt.
    """
    asked = parametric_prompts(model, facts, template)
    tokens = [model.encode(text) for text in asked]
    said = answers_of(engine, model, tokens) if ask is None else ask(model, tokens)
    answers = [
        ParametricAnswer(row, fact, prompt, text, answer_object(text), int(first))
        for row, (fact, prompt, text, first) in enumerate(
            zip(facts.facts, asked, said.texts, said.first.top_tokens[:, 0], strict=True)
        )
    ]
    kept = filter_answers(answers, facts.relations)
    candidates = counter_candidates(kept)
    # Of each fact, its own first token and those of its relation's candidates.
    asked_for = [
        [answer.first_token, *(c.first_token for c in candidates[answer.fact.relation])]
        for answer in kept
    ]
    rows = [answer.row for answer in kept]
    log_probs = first_log_probs(
        engine, model, [tokens[row] for row in rows], said.first.residual[rows], asked_for
    )
    prompts: list[ProbingPrompt] = []
    for answer, (own, *of_candidates) in zip(kept, log_probs, strict=True):
        chosen = counter_objects(answer, candidates[answer.fact.relation], of_candidates)
        relation = facts.relations[answer.fact.relation]
        prompts += probing_prompts(answer, relation, chosen, own, lower_case=lower_case)
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


# --- what the model says -----------------------------------------------------------------------------


def answers_of(
    engine: Engine,
    model: LoadedModel,
    tokens: Sequence[Tokens],
    *,
    store: BatchStore | None = None,
    memory_budget: int | None = None,
) -> Completions:
    """Decode the model's answers, each until it ends, and keep final residuals.

    Args:
        engine: The engine.
        model: The model.
        tokens: Parametric prompts.
        store: Where finished batches are kept; None keeps none.
        memory_budget: Bytes that a batch may use.
    """
    batches = decode_stored(
        engine,
        model,
        tokens,
        store=store,
        label="answers",
        full=[False],
        keep_residual=True,
        memory_budget=memory_budget,
    )
    return merge(batches).completions(0)


@torch.inference_mode()
def first_log_probs(
    engine: Engine,
    model: LoadedModel,
    tokens: Sequence[Tokens],
    residuals: Float[np.ndarray, "prompt d_model"],
    asked_for: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Compute log-probabilities of first tokens from final residuals, nats.

    The least likely tokens choose the counter-objects, so their order must be that of exact arithmetic:
    where they nearly tie, the prompt is run again in float64 (`ccm.decoding.exact`).

    Args:
        engine: The engine that runs the model.
        model: The model.
        tokens: Prompts.
        residuals: Their final residuals, float32.
        asked_for: The tokens of each prompt.
    """
    found = list[list[float]]()
    for start in range(0, len(tokens), ROWS):
        x = torch.from_numpy(residuals[start : start + ROWS]).to(model.device)
        found += _gather(model.logits(x), asked_for[start : start + ROWS])
    if model.dtype == torch.float32:
        near = [i for i, (ids, row) in enumerate(zip(asked_for, found, strict=True)) if _near(ids, row)]

        def read(indices: list[int], x: Tensor, a: Tensor) -> None:
            exact = _gather(exact_logits(model, x), [asked_for[near[i]] for i in indices])
            for i, row in zip(indices, exact, strict=True):
                found[near[i]] = row

        if near:
            with float64():
                for _ in engine.read_last_positions(model, [tokens[i] for i in near], read):
                    pass
    return found


def _gather(logits: Tensor, asked_for: Sequence[Sequence[int]]) -> list[list[float]]:
    rows = logits.double().log_softmax(-1)
    # Rounded, so that differences of float64's own rounding are ties.
    return [
        row[list(ids)].cpu().numpy().round(9).tolist() for row, ids in zip(rows, asked_for, strict=True)
    ]


def _near(ids: Sequence[int], log_probs: Sequence[float]) -> bool:
    """Return whether float32 may have got the order of the least likely candidates wrong."""
    of_token = dict(zip(ids[1:], log_probs[1:], strict=True))
    # The fact's own object may be among them, but is not a candidate.
    lowest = np.sort([*of_token.values()])[: N_COUNTER_OBJECTS + 2]
    return bool((np.diff(lowest) <= NEAR).any())


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


# Takes a run's folder and its plan, and returns the run's `Ask`.
AskOf = Callable[[RunFolder, Plan], Ask]


def prompts_step(
    folder: RunFolder, plan_: Plan, model: LoadedModel, ask_of: AskOf
) -> list[ProbingPrompt]:
    """Build the probing prompts, or read them back if they are there.

    Args:
        folder: The run.
        plan_: What is run.
        model: The model.
        ask_of: Returns what gets the model's answers.
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
            engine=engine_for(plan_.config.engine, model),
            ask=ask_of(folder, plan_),
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
    BatchStore(folder.path, ANSWERS).clear()
    return table_prompts(read_table(folder.path / PROMPTS))


def ask_and_store(folder: RunFolder, plan_: Plan) -> Ask:
    """Return an `Ask` that keeps finished batches and resumes where an earlier start stopped."""
    store, budget = BatchStore(folder.path, ANSWERS), folder.manifest["memory_budget"]

    def ask(model: LoadedModel, tokens: Sequence[Tokens]) -> Completions:
        engine = engine_for(plan_.config.engine, model)
        return answers_of(engine, model, tokens, store=store, memory_budget=budget)

    return ask

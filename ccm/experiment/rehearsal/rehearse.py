"""The dress rehearsal: an ordinary run of a published architecture, with random weights.

Time and memory follow from shapes, so they can be measured before a checkpoint of many gigabytes is
downloaded. The steps are those of `ccm.experiment.run`, timed one by one. A random model knows no
object, so its answers are replaced: it is asked as any model is, and the true objects then stand for
what it said. The run is made at two sizes, to tell what grows with the prompts from what does not.
"""

import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from math import ceil
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccm.decoding.certificate import build_screen, read_nodes
from ccm.decoding.engines import ENGINES, engine_for, name_of
from ccm.decoding.next_token import at_once
from ccm.decoding.results import Completions, Work, merge
from ccm.decoding.shared import decode
from ccm.errors import BadInput
from ccm.experiment.config import RunConfig
from ccm.experiment.effects import SAMPLED, EffectsReader, evenly_spaced
from ccm.experiment.fact_files import load_pararel, pararel_folder, read_fact_folder
from ccm.experiment.files import read_statistics
from ccm.experiment.folder import ACTIVATION_STATS, RunFolder
from ccm.experiment.plan import Plan, identity, make_plan
from ccm.experiment.probing import Ask, ask_and_store, parametric_prompts
from ccm.experiment.rehearsal.profiler import Profiler, Say
from ccm.experiment.rehearsal.projection import PUBLISHED_FACTS, Rehearsal, Stage, project
from ccm.experiment.run import decode_with, finish, hold_folder
from ccm.method.ablation import PLAIN, Ablation, plan_sets
from ccm.method.facts import FactSet
from ccm.method.prompts import (
    N_COUNTER_OBJECTS,
    ParametricAnswer,
    answer_object,
    filter_answers,
    same_name,
)
from ccm.models.bridge import Tokens
from ccm.models.devices import dtype_for
from ccm.models.memory import check_memory, needed_bytes
from ccm.models.model import LoadedModel
from ccm.models.random import LETTERS, Architecture, architecture_of, build, n_parameters
from ccm.models.specs import CHECKPOINT, MODELS, dimensions
from ccm.models.tokenizer import read_tokenizer

TOGETHER = 1 + N_COUNTER_OBJECTS  # facts of a relation whose distinct objects contradict each other
ABLATIONS, REST = "ablations", "effects, all other sets"  # two parts of one stage of a run


@dataclass(frozen=True)
class RehearsalConfig:
    """What to rehearse: a run, and how much of it."""

    run: RunConfig
    prompts: int = 256  # of the larger of the two runs
    tokenizer: Path | None = None  # a folder; None: the stand-in
    hooked: bool = False  # a plain pass through TransformerLens hooks too, for comparison
    keep: Path | None = None  # folder for the larger run; None: it is removed


# --- facts that a model is taken to know ------------------------------------------------------------


def rehearsal_facts() -> FactSet:
    """Return the ParaRel facts if `CCM_DATA_DIR` has them, else the organism's; no download."""
    if pararel_folder() is not None:
        return load_pararel()
    return read_fact_folder(CHECKPOINT, "the organism's")


def choose_facts(facts: FactSet, n_prompts: int) -> FactSet:
    """Choose facts that give `n_prompts` prompts, or a few more, to a model that knows all of them.

    Every fact is contradicted by three others of its relation, so facts are taken four at a time,
    evenly over the relations; one by one only when every relation has its four.

    Args:
        facts: To choose from.
        n_prompts: How many probing prompts they should give.

    Raises:
        BadInput: fewer than 3 prompts, or more than the facts give.
    """
    answers = [
        ParametricAnswer(row, f, "", "", answer_object(f.object), 0)
        for row, f in enumerate(facts.facts)
    ]
    together, more = list[list[int]](), list[int]()
    of_relation: dict[str, dict[str, list[int]]] = {name: {} for name in facts.relations}
    for a in filter_answers(answers, facts.relations):
        of_relation[a.fact.relation].setdefault(same_name(a.object), []).append(a.row)
    for rows in of_relation.values():
        if len(rows) >= TOGETHER:
            first = [of_object[0] for of_object in rows.values()][:TOGETHER]
            together.append(first)
            more += [row for of_object in rows.values() for row in of_object if row not in first]
    most = N_COUNTER_OBJECTS * (TOGETHER * len(together) + len(more))
    if not N_COUNTER_OBJECTS <= n_prompts <= most:
        raise BadInput(
            f"--prompts {n_prompts}: out of range. Allowed: {N_COUNTER_OBJECTS} (those of one fact) to "
            f"{most}, of {facts.name} facts."
        )
    n = ceil(n_prompts / N_COUNTER_OBJECTS)
    groups = _evenly(together, ceil(n / TOGETHER))
    chosen = [row for group in groups for row in group]
    chosen += _evenly(sorted(more), n - len(chosen))
    return replace(facts, facts=tuple(facts.facts[row] for row in sorted(chosen)))


def _evenly(things: Sequence[Any], n: int) -> list[Any]:
    """Choose n evenly spaced things, or all if there are fewer."""
    at = np.linspace(0, len(things) - 1, max(0, min(n, len(things)))).round().astype(int)
    return [things[i] for i in at]


def ask_one_who_knows(folder: RunFolder, plan_: Plan) -> Ask:
    """Ask as `ask_and_store` does, but answer every question for a fact with its true object."""
    ask = ask_and_store(folder, plan_)

    def answer(model: LoadedModel, tokens: Sequence[Tokens]) -> Completions:
        said, objects = ask(model, tokens), [fact.object for fact in plan_.facts.facts]
        top = said.first.top_tokens.copy()
        top[:, 0] = [model.first_token(name) for name in objects]
        texts = tuple(f" {name}." for name in objects)
        return replace(said, texts=texts, first=replace(said.first, top_tokens=top))

    return answer


# --- the rehearsal ------------------------------------------------------------------------------------


def _to_stderr(text: str) -> None:
    print(f"rehearsal: {text}", file=sys.stderr)


def rehearse(
    config: RehearsalConfig,
    *,
    architecture: Architecture | None = None,
    facts: FactSet | None = None,
    say: Say = _to_stderr,
) -> Rehearsal:
    """Build a published architecture with random weights and run on it, at two sizes.

    Args:
        config: What to rehearse.
        architecture: A smaller model of the family instead of the real one: a rehearsal in seconds,
            whose projection says nothing about the real one.
        facts: Facts to build prompts from; by default those of `rehearsal_facts`.
        say: Called with a line of text when a stage begins.

    Returns:
        What was measured, and the projection to the published numbers of facts and prompts.

    Raises:
        BadInput, NotAvailable: before anything is built.
    """
    run, facts = config.run, facts or rehearsal_facts()
    hf_config = (architecture or architecture_of(run.model)).config()
    few_prompts = max(N_COUNTER_OBJECTS, config.prompts // 4)
    plan_, few_plan = (_plan(run, hf_config, facts, n) for n in (config.prompts, few_prompts))
    _check(config, hf_config)
    dtype, parameters = dtype_for(run.dtype), n_parameters(hf_config)
    check_memory(run.model, needed_bytes(plan_.spec, parameters, dtype), plan_.device, dtype)
    with tempfile.TemporaryDirectory() as scratch:
        out = config.keep or Path(scratch) / "run"
        with _held(plan_, out) as folder:
            # The report of a run that is kept says how to repeat the rehearsal.
            tokenizer = None if config.tokenizer is None else str(config.tokenizer)
            own = {"prompts": config.prompts, "tokenizer": tokenizer, "hooked": config.hooked}
            folder.note(rehearsal=own)
            profiler = Profiler(plan_.device, folder, say)
            with profiler("load"):
                model = build(
                    run.model, hf_config, plan_.device, dtype, tokenizer=config.tokenizer, seed=run.seed
                )
                # One answer first, so that what is set up on first use is not counted per prompt.
                decode(model, [[model.bos or 0]])
            before = dict[str, Stage]()
            # Twice, and the shorter times count: what only a first run pays for would hide growth.
            for i in range(2):
                with _held(few_plan, Path(scratch) / f"few_{i}") as small:
                    _, few = _run(small, few_plan, model, Profiler(plan_.device, small, say))
                before = {
                    name: min(stage, before.get(name, stage), key=attrgetter("seconds"))
                    for name, stage in few.items()
                }
            tokens, after = _run(folder, plan_, model, profiler)
            passes = Profiler(plan_.device, say=say)
            work = _plain_passes(folder, model, tokens, passes, hooked=config.hooked)
            noted = folder.manifest
    stages = tuple(
        stage.beside(before[name]) if name in before else stage for name, stage in after.items()
    )
    asked = [model.encode(text) for text in parametric_prompts(model, plan_.facts, plan_.template)]
    return Rehearsal(
        model=run.model,
        parameters=parameters,
        weight_bytes=parameters * dtype.itemsize,
        device=plan_.device.type,
        device_name=noted["identity"]["device_name"],
        threads=torch.get_num_threads(),
        dtype=run.dtype,
        seed=run.seed,
        memory=profiler.memory,
        tokenizer=_tokenizer_name(config),
        facts_name=facts.name,
        facts=len(asked),
        prompts=len(tokens),
        few_prompts=few_prompts,
        mean_prompt_tokens=_mean_length(tokens),
        mean_fact_prompt_tokens=_mean_length(asked),
        first_prompt_tokens=noted["first_prompt_tokens"],
        ablation_values=[v.name for v in plan_.values],
        controls=run.controls,
        matched_controls=plan_.matched_controls,
        entropy_neurons=noted["entropy_neurons"],
        stages=(*stages, *(replace(stage, in_run=False) for stage in passes.stages.values())),
        work={"ablations": noted["work"], **work},
        published=project(stages, PUBLISHED_FACTS, MODELS[run.model].published_prompts),
        versions=noted["identity"]["versions"],
    )


def _plan(run: RunConfig, hf_config: Any, facts: FactSet, n_prompts: int) -> Plan:
    """Plan a run of `n_prompts` prompts on an architecture."""
    sizes = dimensions(hf_config)
    spec = MODELS[run.model]
    # Fewer than published only where the model is smaller than published.
    dims = min(spec.null_space_dims, sizes["d_model"] // 16)
    spec = replace(spec, **sizes, null_space_dims=dims, folder=None)
    # Random neurons reach no published rho, so any may be chosen.
    run = replace(run, max_prompts=n_prompts, min_rho=0.0)
    return make_plan(run, spec, choose_facts(facts, n_prompts))


def _held(plan_: Plan, out: Path) -> AbstractContextManager[RunFolder]:
    """Lock the folder of a run on random weights."""
    weights = {"weights_sha256": f"random weights, seed {plan_.config.seed}"}
    return hold_folder(plan_, identity(plan_, weights), out)


def _run(
    folder: RunFolder, plan_: Plan, model: LoadedModel, clock: Profiler
) -> tuple[list[Tokens], dict[str, Stage]]:
    """Run every step after loading, as `ccm.experiment.run` does.

    Returns:
        The prompts' tokens, and the stages by name. While a run decodes, it splits effects: of the
        entropy sets at every prompt, of all other sets at `SAMPLED` prompts at most. The latter are
        split once more, alone, and their time is subtracted: the rest grows with the prompts.
    """
    weights: dict[str, Any] = {"source": model.source, "revision": None, "files": [], "converted": None}
    engine = name_of(engine_for(plan_.config.engine, model))
    folder.note(weights=weights, special_tokens=model.special_tokens, engine=engine)
    prompts = decode_with(folder, plan_, model, ask_one_who_knows, clock)
    finish(folder, plan_.protocol, clock)
    tokens: list[Tokens] = [model.encode(prompt.text) for prompt in prompts]
    statistics, _ = read_statistics(folder.path / ACTIVATION_STATS)
    planned = plan_sets(plan_.values, folder.manifest["sets"], statistics, plan_.protocol)
    others = [ablation for sets in planned.values() for ablation in sets[1:]]
    few = [tokens[i] for i in evenly_spaced(len(tokens), SAMPLED)]
    alone = Profiler(plan_.device, say=clock.say)
    with alone(REST, "prompt", len(few)):
        _split_alone(model, few, others, folder.manifest["memory_budget"])
    stages = dict(clock.stages)
    rest, both = replace(alone.stages[REST], most=SAMPLED), stages[ABLATIONS]
    stages[ABLATIONS] = replace(both, seconds=max(0.0, both.seconds - rest.seconds))
    scores = stages.pop("scores")
    return tokens, {**stages, REST: rest, "scores": scores}


def _split_alone(
    model: LoadedModel, prompts: Sequence[Tokens], sets: Sequence[Ablation], memory_budget: int
) -> None:
    """Split the effects of some sets at all prompts, as a run does while it decodes."""
    screen = build_screen(model.last_layer, [PLAIN, *sets], u=0.0)
    reader = EffectsReader(at_once(model), len(prompts), [], 1 + len(sets))

    def read(indices: list[int], x: Tensor, a: Tensor) -> None:
        reader(indices, screen, read_nodes(screen, x, a))

    for _ in ENGINES["shared"].read_last_positions(model, prompts, read, memory_budget=memory_budget):
        pass


def _plain_passes(
    folder: RunFolder, model: LoadedModel, tokens: Sequence[Tokens], clock: Profiler, *, hooked: bool
) -> dict[str, dict[str, int]]:
    """Decode without any ablation, for comparison; return the work of each engine."""
    works, budget = dict[str, dict[str, int]](), folder.manifest["memory_budget"]
    for name in ("shared", "hooked") if hooked else ("shared",):
        stage, work = f"plain pass, {name} engine", Work()
        with clock(stage, "prompt", len(tokens)):
            merge(list(ENGINES[name].decode_sets(model, tokens, memory_budget=budget, work=work)))
        works[stage] = work.as_dict()
    return works


def _check(config: RehearsalConfig, hf_config: Any) -> None:
    """Refuse a tokenizer and a folder that cannot be used."""
    if config.tokenizer is not None:
        read_tokenizer(config.tokenizer, int(hf_config.vocab_size), "--tokenizer")
    keep = config.keep
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise BadInput(f"--keep {keep}: not an empty folder. Nothing was written; give another one.")


def _tokenizer_name(config: RehearsalConfig) -> str:
    if config.tokenizer is None:
        return f"a stand-in that cuts words into pieces of {LETTERS} letters"
    return config.tokenizer.resolve().name


def _mean_length(rows: Sequence[Tokens]) -> float:
    return float(np.mean([len(row) for row in rows]))

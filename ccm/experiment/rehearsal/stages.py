"""The stages of a run on a model that knows nothing, each measured (see `rehearse`)."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, inf
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from ccm.decoding import hooked
from ccm.decoding.activations import collect
from ccm.decoding.answer_tokens import object_tokens
from ccm.decoding.certificate import build_screen
from ccm.decoding.engines import ENGINES
from ccm.decoding.results import Completions, Work, merge
from ccm.decoding.shared import decode, decode_sets
from ccm.experiment.cells import CellReader, decode_stored
from ccm.experiment.comparisons import rho_by_layer
from ccm.experiment.effects import SAMPLED, evenly_spaced, measure_effects
from ccm.experiment.folder import PROMPTS, RunFolder, ShardStore, write_table
from ccm.experiment.probing import prompt_table
from ccm.experiment.rehearsal.profiler import Meter
from ccm.experiment.rehearsal.projection import PUBLISHED_PROMPTS
from ccm.experiment.scoring import write_scores as score
from ccm.method.ablation import CONTROL, PLAIN, Ablation, ActivationStatistics, kind_of, numbered, plan
from ccm.method.ablation_values import AblationValue
from ccm.method.facts import Fact, FactSet
from ccm.method.neurons import controls, measure, select
from ccm.method.prompts import (
    N_COUNTER_OBJECTS,
    Candidate,
    ParametricAnswer,
    ProbingPrompt,
    answer_object,
    parametric_prompt,
    probing_prompts,
    same_name,
)
from ccm.models.model import LoadedModel
from ccm.models.specs import MODELS


@dataclass(frozen=True)
class RehearsalConfig:
    """What to rehearse, and on what."""

    model: str
    prompts: int = 256
    controls: int = 100
    ablation_value: tuple[str, ...] = ("all",)
    device: str = "auto"
    dtype: str = "float32"
    tokenizer: Path | None = None  # a folder; None: the stand-in
    seed: int = 123  # of weights, counter-objects and controls
    hooked: bool = False  # a plain pass through TransformerLens hooks too, for comparison
    memory_budget: int | None = None  # bytes; as in a run


def build_prompts(
    answers: Sequence[ParametricAnswer],
    candidates: Mapping[str, list[Candidate]],
    facts: FactSet,
    n_prompts: int,
    seed: int,
) -> list[ProbingPrompt]:
    """Contradict every fact with three other objects of its relation, drawn at random."""
    draw = random.Random(seed)
    prompts: list[ProbingPrompt] = []
    for answer in answers:
        own, relation = same_name(answer.object), facts.relations[answer.fact.relation]
        others = [c for c in candidates[relation.name] if same_name(c.object) != own]
        chosen = [(c, -inf) for c in draw.sample(others, N_COUNTER_OBJECTS)]
        prompts += probing_prompts(answer, relation, chosen, -inf)
    return prompts[:n_prompts]


class Stages:
    """The stages after the model is there, in the order of a run; each is one method."""

    def __init__(
        self,
        config: RehearsalConfig,
        model: LoadedModel,
        facts: FactSet,
        values: Sequence[AblationValue],
        meter: Meter,
        folder: RunFolder,
        scratch: Path,
    ) -> None:
        """Fix what all stages need; `scratch` is a folder for what is only timed."""
        self.config, self.model, self.facts, self.values = config, model, facts, values
        self.meter, self.folder, self.scratch = meter, folder, scratch
        self.work: dict[str, Work] = {}
        self.first_token = cache(model.first_token)

    def run(
        self, answers: Sequence[ParametricAnswer], candidates: Mapping[str, list[Candidate]]
    ) -> None:
        """Run them all."""
        self.entropy = self.measures()
        # Every decode plans its screening once, however many prompts follow.
        last = self.model.last_layer
        self.plan_seconds = self.meter.seconds(lambda: build_screen(last, [PLAIN], 0.0))
        self.asked, recalled = self.parametric([a.fact for a in answers], candidates)
        self.folder.note(facts={"facts": len(answers), "recalled": recalled})
        prompts = build_prompts(
            [replace(a, first_token=self.first_token(a.object)) for a in answers],
            {
                r: [replace(c, first_token=self.first_token(c.object)) for c in of_relation]
                for r, of_relation in candidates.items()
            },
            self.facts,
            self.config.prompts,
            self.config.seed,
        )
        self.tokens = [self.model.encode(p.text) for p in prompts]
        statistics = self.statistics()
        self.plain_passes()
        d_mlp = self.model.spec.d_mlp
        drawn = controls(self.config.controls, d_mlp, self.entropy, self.config.seed)
        sets = {"entropy": self.entropy, **numbered(CONTROL, drawn)}
        ablations = [plan(n, s, v, statistics) for v in self.values for n, s in sets.items()]
        objects = object_tokens(self.model, prompts)
        runs = self.grid(ablations, objects)
        self.effects(ablations)
        self.scores(prompts, objects, runs, sets)

    def measures(self) -> tuple[int, ...]:
        """LogitVar, norm and rho; random neurons reach no published rho, so any may be chosen."""
        model = self.model
        with self.meter.stage("measures"):
            # Fewer than published only where the model is smaller than published.
            dims = min(MODELS[model.spec.name].null_space_dims, model.spec.d_model // 16)
            found = measure(model.W_U, model.W_out, model.final_norm, dims)
            rho_by_layer(model, found)
            return select(found, model.spec.n_entropy_neurons, min_rho=0.0)

    def parametric(
        self, facts: Sequence[Fact], candidates: Mapping[str, list[Candidate]]
    ) -> tuple[list[list[int]], int]:
        """Ask for every fact's object, then how likely each object of its relation was (Method 4)."""
        model, template = self.model, self.model.spec.template
        width = max(len(candidates[f.relation]) for f in facts)
        with self.meter.stage("parametric answers", "fact", len(facts)):
            relations = self.facts.relations
            asked = [model.encode(parametric_prompt(template, f, relations[f.relation])) for f in facts]
            said = decode(model, asked)
            targets = torch.zeros((len(facts), width), dtype=torch.long)
            for i, fact in enumerate(facts):
                ids = [self.first_token(c.object) for c in candidates[fact.relation]]
                targets[i, : len(ids)] = torch.tensor(ids)
            decode(model, asked, targets=targets, max_new_tokens=1)
        self.meter.fix(2 * self.plan_seconds)
        answers = [same_name(answer_object(text)) for text in said.texts]
        return asked, sum(a == same_name(f.object) for a, f in zip(answers, facts, strict=True))

    def statistics(self) -> ActivationStatistics:
        """Two plain passes that watch the last layer (Method 6)."""
        with self.meter.stage("activation statistics", "prompt", len(self.tokens)):
            statistics, _ = collect(self.model, self.tokens, decode)
        self.meter.fix(2 * self.plan_seconds)
        return statistics

    def plain_passes(self) -> None:
        """One pass without ablation, through the shared engine and, if wanted, through hooks."""
        work = self.work["plain pass"] = Work()
        n, budget = len(self.tokens), self.config.memory_budget
        with self.meter.stage("plain pass, shared engine", "prompt", n, in_run=False):
            shards = decode_sets(self.model, self.tokens, memory_budget=budget, work=work)
            merge(list(shards))
        self.meter.fix(self.plan_seconds)
        if self.config.hooked:
            with self.meter.stage("plain pass, hooks", "prompt", n, in_run=False):
                hooked.decode(self.model, self.tokens)

    def grid(
        self, ablations: Sequence[Ablation], objects: Int[np.ndarray, "prompt 2"]
    ) -> list[Completions]:
        """One shared decode of the plain run and of every set under every ablation value."""
        model = self.model
        seconds = self.meter.seconds(lambda: build_screen(model.last_layer, [PLAIN, *ablations], 0.0))
        work = self.work["ablation grid"] = Work()
        store = ShardStore(self.folder.path)
        with self.meter.stage("ablation grid", "prompt", len(self.tokens)):
            shards = decode_stored(
                ENGINES["shared"],
                model,
                self.tokens,
                ablations,
                targets=torch.from_numpy(objects),
                full=[kind_of(a.name) is None for a in (PLAIN, *ablations)],
                memory_budget=self.config.memory_budget,
                store=store,
                work=work,
            )
            decoded = merge(shards)
            runs = [decoded.completions(i) for i in range(1 + len(ablations))]
        store.clear()
        self.meter.fix(seconds)
        return runs

    def effects(self, ablations: Sequence[Ablation]) -> None:
        """Split effects on entropy: of entropy sets at every prompt, of all others at some."""
        own = [a for a in ablations if kind_of(a.name) is None]
        others = [a for a in ablations if kind_of(a.name) is not None]
        budget = self.config.memory_budget
        with self.meter.stage("effects, entropy set", "prompt", len(self.tokens)):
            measure_effects(self.model, self.tokens, own, [], memory_budget=budget)
        self.meter.fix(2 * self.plan_seconds)
        seconds = 0.0
        if others:
            last = self.model.last_layer
            seconds = self.meter.seconds(lambda: build_screen(last, others, 0.0))
        few = [self.tokens[i] for i in evenly_spaced(len(self.tokens), SAMPLED)]
        with self.meter.stage("effects, controls", "prompt", len(few), most=SAMPLED):
            measure_effects(self.model, few, [], others, memory_budget=budget)
        self.meter.fix(seconds + self.plan_seconds)

    def scores(
        self,
        prompts: Sequence[ProbingPrompt],
        objects: Int[np.ndarray, "prompt 2"],
        runs: Sequence[Completions],
        sets: Mapping[str, Sequence[int]],
    ) -> None:
        """Write every cell and score them.

        A short cell's file costs more than its rows, so how time grows is measured apart: on two cells,
        once as they are and once with their rows repeated up to the published number.
        """
        n = len(prompts)
        with self.meter.stage("tables and scores", "prompt", n):
            write_scores(self.folder, prompts, objects, runs, self.values, sets)
        times = ceil(PUBLISHED_PROMPTS[self.model.spec.name] / n) + 1
        identity = {**self.folder.manifest["identity"], "ablation_values": [self.values[0].name]}

        def two_cells(repeats: int, name: str) -> float:
            few = RunFolder(self.scratch / name, identity)
            few.note(facts=self.folder.manifest["facts"])
            rows = [repeat(done, repeats) for done in runs[:2]]
            asked, at = [*prompts] * repeats, np.tile(objects, (repeats, 1))
            own = {"entropy": sets["entropy"]}
            return self.meter.seconds(lambda: write_scores(few, asked, at, rows, self.values[:1], own))

        two_cells(1, "warm")
        more = two_cells(times, "long") - two_cells(1, "short")
        # Seconds that one more prompt takes in all cells; below zero there is only noise.
        slope = max(0.0, more) / (n * (times - 1)) * len(runs) / 2
        self.meter.fix(max(0.0, self.meter.stages[-1].seconds - slope * n))
        self.folder.note(complete=True)


def write_scores(
    folder: RunFolder,
    prompts: Sequence[ProbingPrompt],
    objects: Int[np.ndarray, "prompt 2"],
    runs: Sequence[Completions],
    values: Sequence[AblationValue],
    sets: Mapping[str, Sequence[int]],
) -> None:
    """Write prompts, every cell and `scores.json`, as a run does.

    Args:
        folder: Where to.
        prompts: The probing prompts.
        objects: First tokens of their counter- and parametric objects.
        runs: The plain run, then every set under the first ablation value, the second, ...
        values: The ablation values.
        sets: The neuron sets by name.
    """
    folder.note(sets=sets)
    write_table(folder.path / PROMPTS, prompt_table(prompts))
    reader = CellReader(prompts, objects, runs[0])
    cells = [folder.cell("", "plain"), *(folder.cell(v.name, name) for v in values for name in sets)]
    for path, done in zip(cells, runs, strict=True):
        write_table(path, reader.table(done))
    score(folder, released=False)


def repeat(done: Completions, times: int) -> Completions:
    """Return completions of the same prompts several times over."""
    first = {name: np.concatenate([rows] * times) for name, rows in vars(done.first).items()}
    return Completions(done.tokens * times, done.texts * times, replace(done.first, **first))

"""The whole experiment, read top to bottom: facts -> prompts -> neurons -> ablations -> scores.

Every step reads its input from the run folder and writes its output there, so that a run that was
killed goes on where it stopped and ends with the same bytes.
"""

import hashlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int

from ccm.ablation import (
    PLAIN,
    AblationValue,
    ActivationStatistics,
    ablation_values,
    check_neurons,
    plan,
)
from ccm.activations import collect, float16_sigma
from ccm.cells import ENGINES, CellReader, check_engine, decode_hooked, decode_stored
from ccm.checkpoint import LoadedModel, download, load
from ccm.completions import Completions, Work, merge
from ccm.decoding import default_budget
from ccm.errors import BadInput, allowed
from ccm.facts import FactSet, load_pararel, read_fact_folder
from ccm.knowledge import (
    object_tokens,
)
from ccm.models import ModelSpec, device_for, dtype_for, spec_for
from ccm.neurons import controls, measure, select
from ccm.prompts import (
    TEMPLATES,
    ParametricAnswer,
    ProbingPrompt,
    answer_object,
    counter_candidates,
    counter_objects,
    filter_answers,
    filter_examples,
    filter_subject_object,
    parametric_prompt,
    probing_prompts,
)
from ccm.released_stats import read_released_statistics
from ccm.run_folder import (
    ACTIVATION_STATS,
    MEASURES,
    PROMPTS,
    SCORES,
    SINGULAR_VALUES,
    RunFolder,
    ShardStore,
    read_json,
    read_statistics,
    read_table,
    to_json,
    write_json,
    write_statistics,
    write_table,
)
from ccm.summary import scores_of_run
from ccm.weights import check_weights, revision, weight_files, weight_hash


@dataclass(frozen=True)
class Protocol:
    """Which of the released code's behaviours a run follows; the defaults are right."""

    name: str
    lower_case_objects: bool = False  # defect 11
    controls_overlap: bool = False  # defect 6
    float16_sigma: bool = False  # defect 3
    released_tokens: bool = False  # defect 7
    nd_ratio_of_pk: bool = False  # defect 1


PROTOCOLS = {
    "corrected": Protocol("corrected"),
    "released": Protocol("released", True, True, True, True, True),
}


STATISTICS_FROM = ("own", "released")


def check_protocol(name: str) -> str:
    """Check a protocol name.

    Raises:
        BadInput: not one of `PROTOCOLS`.
    """
    if name not in PROTOCOLS:
        raise BadInput(f"protocol {name!r}: unknown. {allowed(PROTOCOLS)}.")
    return name


@dataclass(frozen=True)
class RunConfig:
    """Everything a run's results depend on, apart from the weights and facts themselves."""

    model: str = "organism"
    ablation_value: tuple[str, ...] = ("mean_ablation",)
    controls: int = 100
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 123
    protocol: str = "corrected"
    facts: str | None = None  # None: the model's own
    template: str | None = None
    k: int | None = None
    min_rho: float | None = None
    null_space_dims: int | None = None
    neurons: tuple[int, ...] | None = None  # a fixed entropy set instead of the selection rule
    max_prompts: int | None = None
    engine: str = "shared"
    full_texts: bool = False  # decode controls to the end too, not only their answers
    memory_budget: int | None = None  # bytes; None: from what is free. Changes no text or source
    stats: str = "own"  # activation statistics: own, or released by the paper's authors
    share: tuple[int, int] | None = None  # (i, n): decode the i-th of n shares, for `ccm merge`
    model_paths: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A `RunConfig` after every name in it was looked up and every number checked."""

    config: RunConfig
    spec: ModelSpec
    facts: FactSet
    template: str
    protocol: Protocol
    values: tuple[AblationValue, ...]
    k: int
    min_rho: float
    null_space_dims: int
    device: torch.device


def make_plan(config: RunConfig) -> Plan:
    """Check a configuration without loading any weights.

    Raises:
        BadInput: any name, number or file that cannot be used.
        NotAvailable: a device or data that are not here.
    """
    protocol = PROTOCOLS[check_protocol(config.protocol)]
    values = tuple(ablation_values(config.ablation_value))
    spec = check_weights(spec_for(config.model, config.model_paths))
    check_engine(config.engine)
    if config.memory_budget is not None and config.memory_budget < 1 << 20:
        raise BadInput(
            f"memory budget {config.memory_budget} bytes: too small. Allowed: 1 MiB and more."
        )
    check_share(config)
    if config.stats not in STATISTICS_FROM:
        raise BadInput(f"stats {config.stats!r}: unknown. {allowed(STATISTICS_FROM)}.")
    if config.stats == "released":
        read_released_statistics(spec, finite=protocol.name != "released")
    device = device_for(config.device)
    dtype_for(config.dtype)
    template = config.template or spec.template
    if template not in TEMPLATES:
        raise BadInput(f"template {template!r}: unknown. {allowed(TEMPLATES)}.")
    if config.neurons is not None:
        check_neurons(config.neurons, spec.d_mlp)
    k = len(config.neurons) if config.neurons is not None else config.k or spec.n_entropy_neurons
    if not 1 <= k <= spec.d_mlp or config.k == 0:
        raise BadInput(
            f"k={config.k if config.k is not None else k} entropy neurons: out of range. Allowed: 1 "
            f"to {spec.d_mlp} (d_mlp of {spec.name})."
        )
    pool = spec.d_mlp if protocol.controls_overlap else spec.d_mlp - k
    exist = comb(pool, k) - int(protocol.controls_overlap)
    if not 0 <= config.controls <= exist:
        raise BadInput(
            f"{config.controls} controls: out of range. Allowed: 0 to {exist}, the distinct sets of "
            f"{k} of {pool} neurons. Lower --controls."
        )
    if not 0 <= config.seed < 2**32:
        raise BadInput(f"seed {config.seed}: out of range. Allowed: 0 to {2**32 - 1}.")
    if config.max_prompts is not None and config.max_prompts < 1:
        raise BadInput(f"max prompts {config.max_prompts}: out of range. Allowed: 1 and more.")
    dims = spec.null_space_dims if config.null_space_dims is None else config.null_space_dims
    if not 1 <= dims <= spec.d_model:
        raise BadInput(
            f"null-space dimensions {dims}: out of range. Allowed: 1 to {spec.d_model} (d_model)."
        )
    min_rho = spec.min_rho if config.min_rho is None else config.min_rho
    if not 0 <= min_rho <= 1:
        raise BadInput(f"least rho {min_rho}: out of range. Allowed: 0 to 1, for --min-rho.")
    return Plan(
        config=config,
        spec=spec,
        facts=find_facts(config.facts, spec),
        template=template,
        protocol=protocol,
        values=values,
        k=k,
        min_rho=min_rho,
        null_space_dims=dims,
        device=device,
    )


def check_share(config: RunConfig) -> None:
    """Check which share of a run is asked for."""
    if config.share is None:
        return
    i, n = config.share
    if not 1 <= i <= n:
        raise BadInput(f"shard {i}/{n}: out of range. Allowed: 1/{n} to {n}/{n}, n at least 1.")
    if config.engine != "shared":
        raise BadInput(f"shard {i}/{n}: the {config.engine} engine has none. Use --engine shared.")


def find_facts(name: str | None, spec: ModelSpec) -> FactSet:
    """Find the facts: `pararel`, a folder with facts.csv and relations.csv, or the model's own."""
    if name == "pararel":
        return load_pararel()
    if name is not None:
        folder = Path(name)
        if not folder.is_dir():
            raise BadInput(
                f"facts {name!r}: no such folder. Allowed: pararel, or a folder with facts.csv and "
                "relations.csv."
            )
        return read_fact_folder(folder, name=folder.resolve().name)
    if spec.folder is not None and (spec.folder / "relations.csv").is_file():
        return read_fact_folder(spec.folder, name=spec.name)
    return load_pararel()


# --- the story ------------------------------------------------------------------------------------


def run(config: RunConfig, out: Path) -> dict[str, Any]:
    """Run the experiment into a folder, or finish one that was interrupted there.

    Args:
        config: What to run.
        out: The run folder.

    Returns:
        The scores, as written to `scores.json`.

    Raises:
        CcmError: before any long work starts; nothing is overwritten.
    """
    if config.share is not None:
        raise ValueError("a share of a run has no scores of its own: run_share, then merge_shares")
    folder, plan_ = open_folder(config, out)
    if not folder.has(SCORES):
        clock = Clock(folder)
        prompts = decode_everything(folder, plan_, clock)
        finish(folder, plan_.protocol, prompts)
        clock("scores")
        folder.note(complete=True)
    return read_scores(folder)


def run_share(config: RunConfig, out: Path) -> RunFolder:
    """Decode the share of a run that `config.share` names; `ccm.merging` puts all shares together.

    Every share prepares prompts, measures and statistics for itself, and to the same bytes.
    """
    folder, plan_ = open_folder(config, out)
    if not folder.manifest["complete"]:
        decode_everything(folder, plan_, Clock(folder))
        folder.note(complete=True)
    return folder


def open_folder(config: RunConfig, out: Path) -> tuple[RunFolder, Plan]:
    """Check what is asked for, see that its weights are here, and open the run folder."""
    plan_ = make_plan(config)
    if not weight_files(plan_.spec):
        # Before the folder is made: what cannot be had must leave no trace of a run.
        download(plan_.spec)
        plan_ = make_plan(config)
    folder = RunFolder(out, identity(plan_, weight_files(plan_.spec)))
    if "memory_budget" not in folder.manifest:
        # Kept, because parts cut otherwise would round otherwise when the run is resumed.
        budget = config.memory_budget or default_budget(plan_.device)
        folder.note(memory_budget=budget, work=Work())
    return folder, plan_


def decode_everything(folder: RunFolder, plan_: Plan, clock: "Clock") -> list[ProbingPrompt]:
    """Every step that needs the model, in order."""
    config = plan_.config
    model = load(plan_.spec, plan_.device, config.dtype)
    folder.note(weights={"source": model.source, "revision": revision(plan_.spec)})
    clock("load")
    prompts = prompts_step(folder, plan_, model)
    clock("prompts")
    entropy_neurons = neurons_step(folder, plan_, model)
    clock("measures")
    tokens = [model.encode(prompt.text) for prompt in prompts]
    folder.note(first_prompt_tokens=tokens[0])
    statistics = statistics_step(folder, plan_, model, tokens)
    clock("activation_stats")
    control_sets = controls(
        config.controls,
        model.spec.d_mlp,
        entropy_neurons,
        config.seed,
        overlap=plan_.protocol.controls_overlap,
    )
    ablations_step(folder, plan_, model, prompts, tokens, statistics, entropy_neurons, control_sets)
    clock("ablations")
    return prompts


def finish(folder: RunFolder, protocol: Protocol, prompts: Sequence[ProbingPrompt]) -> None:
    """Turn what was decoded into cells, and cells into scores."""
    cells_step(folder, protocol, prompts)
    write_json(folder.path / SCORES, scores_of_run(folder, protocol.nd_ratio_of_pk))


def read_scores(folder: RunFolder) -> dict[str, Any]:
    """Read the scores back, so that a caller sees what the file says and nothing else."""
    scores: dict[str, Any] = read_json(folder.path / SCORES)
    return scores


class Clock:
    """Writes the time since its last call to the manifest, stage by stage."""

    def __init__(self, folder: RunFolder) -> None:
        """Start the clock."""
        self.folder, self.last = folder, time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Write down a stage that is done."""
        now = time.perf_counter()
        self.folder.time(stage, now - self.last)
        self.last = now


def identity(plan_: Plan, files: Sequence[Path]) -> dict[str, Any]:
    """Everything a result depends on: two starts with the same identity give the same bytes."""
    config = plan_.config
    facts = [asdict(f) for f in plan_.facts.facts] + [asdict(r) for r in plan_.facts.relations.values()]
    return {
        "model": plan_.spec.name,
        "weights_sha256": weight_hash(files) if files else None,
        "facts": plan_.facts.name,
        "facts_sha256": hashlib.sha256(to_json(facts).encode()).hexdigest(),
        "ablation_values": [v.name for v in plan_.values],
        "controls": config.controls,
        "seed": config.seed,
        "protocol": plan_.protocol.name,
        "device": plan_.device.type,
        "device_name": (
            torch.cuda.get_device_name(plan_.device)
            if plan_.device.type == "cuda"
            else platform.machine()
        ),
        "dtype": config.dtype,
        "template": plan_.template,
        "k": plan_.k,
        "min_rho": plan_.min_rho,
        "null_space_dims": plan_.null_space_dims,
        "neurons": config.neurons,
        "max_prompts": config.max_prompts,
        "engine": config.engine,
        "full_texts": config.full_texts,
        "stats": config.stats,
        "shard": None if config.share is None else "{}/{}".format(*config.share),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("ccm", "torch", "transformers", "transformer_lens", "numpy")},
        },
    }


# --- facts -> probing prompts (Method 4) -----------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """Probing prompts with what the filters left of the facts."""

    prompts: tuple[ProbingPrompt, ...]
    counts: dict[str, int]  # facts left after each step, in order


def build_prompts(
    model: LoadedModel,
    facts: FactSet,
    template: str,
    *,
    lower_case: bool = False,
    decoder: Callable[[str], Callable[..., Completions]] = lambda stage: ENGINES["shared"],
) -> PromptSet:
    """Ask for every parametric object, filter, and contradict what is left (Method 4).

    Args:
        model: The model.
        facts: Facts and relations.
        template: A key of `ccm.prompts.TEMPLATES`.
        lower_case: Store objects in lower case (defect 11).
        decoder: Gives an engine for each of two stages, `answers` and `first_tokens`.

    Raises:
        BadInput: a prompt that does not fit the model's context, or no prompt left by the filters.
    """
    asked = [parametric_prompt(template, f, facts.relations[f.relation]) for f in facts.facts]
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
    """Probing prompts as a table with the released column names."""
    rows = list(prompts)
    return pd.DataFrame({c: [getattr(p, a) for p in rows] for c, a in PROMPT_COLUMNS.items()})


def table_prompts(table: pd.DataFrame) -> list[ProbingPrompt]:
    """Read probing prompts back from a table that `prompt_table` made."""
    fields = [{a: row[c] for c, a in PROMPT_COLUMNS.items()} for row in table.to_dict("records")]
    return [ProbingPrompt(**f) for f in fields]


def prompts_step(folder: RunFolder, plan_: Plan, model: LoadedModel) -> list[ProbingPrompt]:
    """Build the probing prompts, or read them back."""
    if not folder.has(PROMPTS):
        built = build_prompts(
            model,
            plan_.facts,
            plan_.template,
            lower_case=plan_.protocol.lower_case_objects,
            decoder=partial(_decoder, folder, plan_),
        )
        prompts = list(built.prompts)
        if plan_.config.max_prompts is not None and plan_.config.max_prompts < len(prompts):
            # Evenly over the relations, not the first ones.
            chosen = np.linspace(0, len(prompts) - 1, plan_.config.max_prompts).round().astype(int)
            prompts = [prompts[i] for i in chosen]
        table = prompt_table(prompts)
        folder.note(
            facts=built.counts,
            prompts=len(prompts),
            prompts_sha256=hashlib.sha256("\n".join(p.text for p in prompts).encode()).hexdigest(),
        )
        write_table(folder.path / PROMPTS, table)
        for stage in ("answers", "first_tokens"):
            ShardStore(folder.path, stage).clear()
    return table_prompts(read_table(folder.path / PROMPTS))


def _decoder(folder: RunFolder, plan_: Plan, stage: str) -> Callable[..., Completions]:
    """An engine that goes on where an earlier start of this stage stopped."""
    if plan_.config.engine != "shared":
        return ENGINES[plan_.config.engine]

    def decode(model: LoadedModel, tokens: Sequence[Sequence[int]], **options: Any) -> Completions:
        budget = folder.manifest["memory_budget"]
        store = ShardStore(folder.path, stage)
        shards = decode_stored(model, tokens, store=store, label=stage, memory_budget=budget, **options)
        return merge(shards).completions(0)

    return decode


# --- neurons and activation statistics (Method 5, 6) -------------------------------------------------


def neurons_step(folder: RunFolder, plan_: Plan, model: LoadedModel) -> tuple[int, ...]:
    """Measure the last layer's neurons and choose the entropy set."""
    if "entropy_neurons" not in folder.manifest or not folder.has(MEASURES):
        measures = measure(model.W_U, model.W_out, model.final_norm, plan_.null_space_dims)
        chosen = plan_.config.neurons or select(measures, plan_.k, plan_.min_rho)
        table = measures.table()
        table["entropy_neuron"] = table["neuron_idx"].isin(chosen)
        spectrum = pd.DataFrame({"singular_value": measures.singular_values})
        write_table(folder.path / SINGULAR_VALUES, spectrum)
        write_table(folder.path / MEASURES, table)
        folder.note(entropy_neurons=chosen)
    return tuple(folder.manifest["entropy_neurons"])


def statistics_step(
    folder: RunFolder, plan_: Plan, model: LoadedModel, tokens: Sequence[Sequence[int]]
) -> ActivationStatistics:
    """Collect activation statistics over the probing prompts, or read them back."""
    if plan_.config.stats == "released":
        released = read_released_statistics(plan_.spec, finite=plan_.protocol.name != "released")
        write_statistics(folder.path / ACTIVATION_STATS, released, positions=0)
        return released  # sigma as it was summed in float16
    if not folder.has(ACTIVATION_STATS):
        decode = ENGINES[plan_.config.engine]
        if plan_.config.engine == "shared":
            decode = partial(decode, memory_budget=folder.manifest["memory_budget"])
        statistics, positions = collect(model, tokens, decode)
        write_statistics(folder.path / ACTIVATION_STATS, statistics, positions)
    statistics, positions = read_statistics(folder.path / ACTIVATION_STATS)
    return float16_sigma(statistics, positions) if plan_.protocol.float16_sigma else statistics


# --- ablations (Method 7, 9) ----------------------------------------------------------------------


def ablations_step(
    folder: RunFolder,
    plan_: Plan,
    model: LoadedModel,
    prompts: Sequence[ProbingPrompt],
    tokens: Sequence[Sequence[int]],
    statistics: ActivationStatistics,
    entropy_neurons: Sequence[int],
    control_sets: Sequence[Sequence[int]],
) -> None:
    """Decode the plain run and every cell (ablation value x set) that is not there yet."""
    sets = {"entropy": tuple(entropy_neurons)}
    sets |= {f"control_{i:03d}": tuple(neurons) for i, neurons in enumerate(control_sets)}
    folder.note(sets=sets)
    # All cells are planned first, so that a value that is not finite is found before any decoding.
    cells = [(PLAIN, folder.cell("", "plain"))]
    for value in plan_.values:
        for name, neurons in sets.items():
            cells.append((plan(name, neurons, value, statistics), folder.cell(value.name, name)))
    missing = {path for _, path in cells if not path.is_file()}
    if not missing:
        return
    objects = object_tokens(model, prompts, released=plan_.protocol.released_tokens)
    if plan_.config.engine == "hooked":
        # One pass a set: only the missing ones, after the plain run that all are read against.
        cells = [c for c in cells if c[0] is PLAIN or c[1] in missing]
        runs = decode_hooked(model, tokens, [a for a, _ in cells[1:]], objects)
        write_cells(runs, [path for _, path in cells], prompts, objects, plan_.protocol)
        return
    work = Work(**folder.manifest["work"])
    decode_stored(
        model,
        tokens,
        [a for a, _ in cells[1:]],
        targets=torch.from_numpy(objects),
        # A control's source needs its answer, not what comes after (Method 8).
        full=[plan_.config.full_texts or not a.name.startswith("control") for a, _ in cells],
        own_top=plan_.protocol.released_tokens,
        memory_budget=folder.manifest["memory_budget"],
        store=ShardStore(folder.path),
        share=plan_.config.share or (1, 1),
        work=work,
        on_shard=lambda: folder.note(work=work),
    )


def cells_step(folder: RunFolder, protocol: Protocol, prompts: Sequence[ProbingPrompt]) -> None:
    """Make the cells of a shared decode from its shards."""
    store = ShardStore(folder.path)
    shards = store.read()
    if shards:
        decoded = merge(shards)
        paths = [folder.cell("", "plain")]
        for value in folder.manifest["identity"]["ablation_values"]:
            paths += [folder.cell(value, name) for name in folder.manifest["sets"]]
        runs = (decoded.completions(i) for i in range(len(paths)))
        # What was asked for begins with the first tokens of both objects.
        write_cells(runs, paths, prompts, decoded.asked[:, :2], protocol)
    store.clear()


def write_cells(
    runs: Iterable[Completions],
    paths: Sequence[Path],
    prompts: Sequence[ProbingPrompt],
    objects: Int[np.ndarray, "prompt 2"],
    protocol: Protocol,
) -> None:
    """Write a table for every run that has none yet; the plain run comes first."""
    reader: CellReader | None = None
    for path, done in zip(paths, runs, strict=True):
        if reader is None:
            reader = CellReader(prompts, objects, done, released=protocol.released_tokens)
        if not path.is_file():
            write_table(path, reader.table(done))

"""The whole experiment, read top to bottom: facts -> prompts -> neurons -> ablations -> scores.

Every step writes its output to the run folder, or reads it back if it is there already, so that a run
that was killed goes on where it stopped and ends with the same bytes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from ccm.decoding.activations import collect, float16_sigma
from ccm.decoding.answer_tokens import object_tokens
from ccm.decoding.engines import engine_for, name_of
from ccm.decoding.results import Work
from ccm.errors import BadInput
from ccm.experiment.batches import BatchStore
from ccm.experiment.beyond_paper import draw_matched, effect_tables, effects_reader, rho_by_layer
from ccm.experiment.cells import cells_step, decided_sources, decode_stored
from ccm.experiment.clock import Clock
from ccm.experiment.config import RunConfig, given
from ccm.experiment.files import read_json, read_statistics, read_table, write_statistics, write_table
from ccm.experiment.folder import (
    ACTIVATION_STATS,
    MANIFEST,
    MEASURES,
    PROMPTS,
    RHO_BY_LAYER,
    SCORES,
    SINGULAR_VALUES,
    RunFolder,
    check_folder,
)
from ccm.experiment.locking import locked, refuse_if_locked
from ccm.experiment.plan import Plan, identity, make_plan
from ccm.experiment.probing import AskOf, ask_and_store, prompts_step, table_prompts
from ccm.experiment.released_stats import read_released_statistics
from ccm.experiment.scoring import write_scores
from ccm.method.ablation import CONTROL, PLAIN, Ablation, kind_of, numbered, plan_sets
from ccm.method.neurons import controls, measure, select
from ccm.method.prompts import ProbingPrompt
from ccm.method.protocol import Protocol
from ccm.method.statistics import ActivationStatistics
from ccm.models.assumptions import check_assumptions
from ccm.models.device_map import spread_over_devices
from ccm.models.devices import dtype_for
from ccm.models.download import download
from ccm.models.gguf import conversion
from ccm.models.load import load
from ccm.models.memory import check_memory, default_budget, needed_bytes
from ccm.models.model import LoadedModel
from ccm.models.weights import n_parameters, revision, unfinished, weight_files

# --- the run --------------------------------------------------------------------------------------


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
    if config.shard is not None:
        raise BadInput(
            "a shard of a run has no scores of its own. Use `ccm run --shard`, then `ccm merge`."
        )
    with open_folder(config, out) as (folder, plan_):
        clock = Clock(folder)
        if folder.missing():  # a file that was removed from a finished run is made again
            folder.note(complete=False)
            decode_everything(folder, plan_, clock)
        finish(folder, plan_.protocol, clock)
        return read_scores(folder)


def run_shard(config: RunConfig, out: Path) -> RunFolder:
    """Decode the shard of a run that `config.shard` names; `merge_shards` joins all shards.

    Every shard makes prompts, measures and statistics for itself, with the same bytes.
    """
    with open_folder(config, out) as (folder, plan_):
        mine = folder.manifest.get("shard_prompts")
        if not folder.manifest["complete"] or folder.missing() or mine != _n_decoded(folder):
            folder.note(complete=False)
            decode_everything(folder, plan_, Clock(folder))
            folder.note(complete=True, shard_prompts=_n_decoded(folder))
        return folder


def _n_decoded(folder: RunFolder) -> int:
    """Count the prompts in the batches of a shard, which are its results."""
    return sum(len(batch.prompts) for batch in BatchStore(folder.path).read())


@contextmanager
def open_folder(config: RunConfig, out: Path) -> Iterator[tuple[RunFolder, Plan]]:
    """Check the configuration, the weights and the memory, and lock the run folder.

    Raises:
        CcmError: before any long work; `InUse` if another process is at work in the folder.
    """
    refuse_if_locked(out)
    plan_ = make_plan(config)
    # Before the folder is made: a download that fails must leave no trace of a run.
    if unfinished(plan_.spec):
        download(plan_.spec)
        plan_ = make_plan(config)
    if not os.path.exists(out / MANIFEST) and config.device_map is None:
        dtype, parameters = dtype_for(config.dtype), n_parameters(weight_files(plan_.spec))
        needed = needed_bytes(plan_.spec, parameters, dtype)
        check_memory(plan_.spec.name, needed, plan_.device, dtype)
    with hold_folder(plan_, identity(plan_), out) as folder:
        yield folder, plan_


@contextmanager
def hold_folder(plan_: Plan, known: dict[str, Any], out: Path) -> Iterator[RunFolder]:
    """Lock a run's folder, which is made if it is missing.

    Args:
        plan_: What is run there.
        known: The run's identity.
        out: The folder.

    Raises:
        BadInput: the folder holds another run or other files.
        InUse: another process is at work there.
    """
    check_folder(out)
    with locked(out):
        folder = RunFolder(out, known)
        budget = plan_.config.memory_budget
        if "memory_budget" not in folder.manifest:
            budget = budget or default_budget(plan_.device)
            folder.note(memory_budget=budget, work=Work(), asked=given(plan_.config))
        elif budget not in (None, folder.manifest["memory_budget"]):
            if plan_.config.shard is not None:
                began = folder.manifest["memory_budget"]
                raise BadInput(
                    f"--memory-budget: {out} began with {began} bytes, and all shards of a run are cut "
                    "by one budget. Leave it out, or begin all shards anew."
                )
            folder.note(memory_budget=budget)  # one that was too large must not stay
        yield folder


def decode_everything(folder: RunFolder, plan_: Plan, clock: Clock) -> None:
    """Do every step that needs the model, in order."""
    with clock("load"):
        model = load_step(folder, plan_)
    decode_with(folder, plan_, model, ask_and_store, clock)


def decode_with(
    folder: RunFolder, plan_: Plan, model: LoadedModel, ask_of: AskOf, clock: Clock
) -> list[ProbingPrompt]:
    """Do every step that needs the loaded model, in order.

    Args:
        folder: The run.
        plan_: What is run.
        model: The model.
        ask_of: Returns what gets the model's answers; a rehearsal has its own.
        clock: Times every stage.

    Returns:
        The probing prompts.
    """
    with clock("measures"):  # first, because too high a --min-rho is found here
        entropy_neurons = neurons_step(folder, plan_, model)
    with clock("prompts", "fact", len(plan_.facts.facts)):
        prompts = prompts_step(folder, plan_, model, ask_of)
    with clock("activation_stats", "prompt", len(prompts)):
        tokens = [model.encode(prompt.text) for prompt in prompts]
        folder.note(first_prompt_tokens=tokens[0])
        statistics = statistics_step(folder, plan_, model, tokens)
    with clock("ablations", "prompt", len(prompts)):
        sets = sets_step(folder, plan_, entropy_neurons)
        # All are planned first: a value that is not finite is found before any ablation is decoded.
        planned = plan_sets(plan_.values, sets, statistics, plan_.protocol)
        ablations_step(folder, plan_, model, prompts, tokens, planned)
        error = model.float32_error
        if error is not None:  # lower precisions measure none, nor does a run that only reads back
            folder.note(float32_error=error.largest)
    return prompts


def finish(folder: RunFolder, protocol: Protocol, clock: Clock) -> None:
    """Turn batches into cells and cells into scores, unless the run is complete."""
    if folder.manifest["complete"]:
        return
    prompts = table_prompts(read_table(folder.path / PROMPTS))
    with clock("scores", "prompt", len(prompts)):
        cells_step(folder, protocol, prompts)
        write_scores(folder, protocol.nd_ratio_of_pk)
    folder.note(complete=True)


def read_scores(folder: RunFolder) -> dict[str, Any]:
    """Read `scores.json` back: a caller gets exactly what the file says."""
    scores: dict[str, Any] = read_json(folder.path / SCORES)
    return scores


# --- the model ------------------------------------------------------------------------------------


def load_step(folder: RunFolder, plan_: Plan) -> LoadedModel:
    """Load the model onto one device or over all, and check that the engine computes it."""
    config = plan_.config
    # Weights take seconds, or minutes.
    with tqdm(total=1, desc="load", unit="model") as bar:
        if config.device_map is None:
            model = load(plan_.spec, plan_.device, config.dtype, plan_.bos)
        else:
            model = spread_over_devices(load(plan_.spec, "cpu", config.dtype, plan_.bos))
        bar.update()
    check_assumptions(model)
    # Nothing else can run a model that is spread over devices.
    engine = engine_for(config.engine if config.device_map is None else "shared", model)
    weights = {
        "source": model.source,
        "revision": revision(plan_.spec),
        "files": [path.name for path in weight_files(plan_.spec)],
        "converted": conversion(Path(model.source)),
    }
    folder.note(weights=weights, special_tokens=model.special_tokens, engine=name_of(engine))
    return model


# --- neurons and activation statistics (Method 5, 6) -------------------------------------------------


def neurons_step(folder: RunFolder, plan_: Plan, model: LoadedModel) -> tuple[int, ...]:
    """Measure the last layer's neurons and choose the entropy set."""
    tables = (SINGULAR_VALUES, RHO_BY_LAYER, MEASURES)
    if "entropy_neurons" not in folder.manifest or not all(folder.has(name) for name in tables):
        measures = measure(model.W_U, model.W_out, model.final_norm, plan_.null_space_dims)
        chosen = plan_.neurons or select(measures, plan_.k, plan_.min_rho)
        table = measures.table()
        table["entropy_neuron"] = table["neuron_idx"].isin(chosen)
        spectrum = pd.DataFrame({"singular_value": measures.singular_values})
        by_layer = rho_by_layer(model, measures)
        found = {SINGULAR_VALUES: spectrum, RHO_BY_LAYER: by_layer, MEASURES: table}
        for name, rows in found.items():
            if not folder.has(name):
                write_table(folder.path / name, rows)
        folder.note(entropy_neurons=chosen, layers_with_rho=by_layer["layer"].unique())
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
        decode = engine_for(plan_.config.engine, model).decode
        budget = folder.manifest["memory_budget"]
        # The rest of the budget is for batches.
        keep = budget // 4
        decode_ = partial(decode, memory_budget=budget - keep)
        text_only = plan_.config.stats_positions == "text"
        statistics, positions = collect(model, tokens, decode_, keep, text_only=text_only)
        write_statistics(folder.path / ACTIVATION_STATS, statistics, positions)
    statistics, positions = read_statistics(folder.path / ACTIVATION_STATS)
    return float16_sigma(statistics, positions) if plan_.protocol.float16_sigma else statistics


# --- ablations (Method 7, 9, 13) ------------------------------------------------------------------


def sets_step(
    folder: RunFolder, plan_: Plan, entropy_neurons: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Draw the controls of both kinds and note every set by its name, the entropy set first."""
    config = plan_.config
    drawn = controls(
        config.controls,
        plan_.spec.d_mlp,
        entropy_neurons,
        config.seed,
        overlap=plan_.protocol.controls_overlap,
    )
    sets = {"entropy": tuple(entropy_neurons), **numbered(CONTROL, drawn)}
    sets |= draw_matched(folder, plan_.matched_controls, entropy_neurons, config.seed)
    folder.note(sets=sets)
    return sets


def ablations_step(
    folder: RunFolder,
    plan_: Plan,
    model: LoadedModel,
    prompts: Sequence[ProbingPrompt],
    tokens: Sequence[Sequence[int]],
    planned: Mapping[str, Sequence[Ablation]],
) -> None:
    """Decode the plain run and every cell (ablation value x set), unless all are there."""
    cells = [(PLAIN, folder.cell("", "plain"))]
    cells += [(a, folder.cell(value, a.name)) for value, sets in planned.items() for a in sets]
    if all(path.is_file() for path in [*(path for _, path in cells), *effect_tables(folder)]):
        return
    objects = object_tokens(model, prompts, released=plan_.protocol.released_tokens)
    work = Work(**folder.manifest["work"])
    decode_stored(
        engine_for(plan_.config.engine, model),
        model,
        tokens,
        [a for a, _ in cells[1:]],
        targets=torch.from_numpy(objects),
        # Only a control's source is needed, which is known before its text ends.
        full=[plan_.config.full_texts or kind_of(a.name) is None for a, _ in cells],
        decided=decided_sources(prompts, plan_.protocol),
        own_top=plan_.protocol.released_tokens,
        at_last=effects_reader(model, len(tokens), planned),
        memory_budget=folder.manifest["memory_budget"],
        store=BatchStore(folder.path),
        shard=plan_.config.shard or (1, 1),
        work=work,
        on_batch=lambda: folder.note(work=work),
    )

"""What each subcommand does: a few calls into the package, whose imports wait until they are needed."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ccm.cli.options import PROGRAM, parse_model_paths
from ccm.errors import BadInput, CannotWrite, allowed, one_of
from ccm.experiment.locking import refuse_if_locked
from ccm.experiment.writing import try_writing
from ccm.models.limits import cores

THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many
_log = logging.getLogger(__name__)


def _config(options: argparse.Namespace, **more: Any) -> Any:
    from ccm.experiment.config import RunConfig

    _limit_threads()
    given = {
        name: getattr(options, name)
        for name in ("model", "device", "dtype", "protocol", "facts", "template", "bos")
        if hasattr(options, name)
    }
    measures = {
        name: getattr(options, name)
        for name in ("k", "min_rho", "null_space_dims")
        if hasattr(options, name)
    }
    return RunConfig(**given, **measures, model_paths=_model_paths(options), **more)


def _limit_threads() -> None:
    """Set torch's threads down to the CPUs that this process may use: it counts the machine's.

    More threads than a container's quota only wait for each other.
    """
    import torch

    if not any(os.environ.get(name) for name in THREADS_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def _model_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Parse `--model-path` and refuse a name that nothing would ever look up."""
    from ccm.models.specs import MODELS

    paths = parse_model_paths(options.model_path)
    for name in paths:
        if name not in (*MODELS, options.model):
            raise BadInput(
                f"--model-path {name}=...: no model of that name is run. {allowed(MODELS)}, or the "
                "name that --model gives."
            )
    return paths


def new_file(path: Path) -> Path:
    """Check that an output file can be written and would overwrite nothing.

    Raises:
        BadInput: it exists, or its folder does not or cannot be written to.
    """
    try:
        there = path.exists()
    except OSError as error:  # a name that the file system does not take
        raise BadInput(f"--out {path}: {error.strerror}. Give another file.") from error
    if there:
        raise BadInput(f"--out {path}: exists already. Nothing was written; give another file.")
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: no folder {path.parent}. Make it first.")
    _try_writing(path.parent, f"--out {path}: cannot write to {path.parent}", "file")
    return path


def _try_writing(folder: Path, trouble: str, other: str) -> None:
    """See now whether a folder, made where missing, can be written to: results come minutes later.

    Raises:
        BadInput: with `trouble` and what else to give.
    """
    try:
        try_writing(folder)
    except CannotWrite as error:
        raise BadInput(f"{trouble} ({error.reason}). Give another {other}.") from error


def run(options: argparse.Namespace) -> None:
    """Run the experiment, or the share of one that was asked for."""
    from ccm.experiment.ablate_io import parse_neurons
    from ccm.method.ablation import ablation_values

    values = [value.strip() for value in options.ablation_value.split(",")]
    if len(values) > 1 and "all" in values:
        raise BadInput(
            f"--ablation-value {options.ablation_value!r}: all are more than these. Drop one."
        )
    ablation_values(values)
    if options.out is not None:
        refuse_if_locked(options.out)
    if options.report and options.shard is not None:
        raise BadInput("--report: a share of a run has no scores. Merge all shares, then `ccm report`.")
    neurons = None
    if options.neurons is not None:
        if options.k is not None:
            raise BadInput(f"-k {options.k}: --neurons says how many there are. Drop one of the two.")
        if options.neurons != "published":
            neurons = parse_neurons(options.neurons)
    # Only now, because they take seconds.
    from ccm.cli.console import summary
    from ccm.experiment.config import make_plan
    from ccm.experiment.run import run, run_share
    from ccm.models.specs import spec_for

    if options.neurons == "published":
        spec = spec_for(options.model, _model_paths(options))
        neurons = spec.published_neurons
        if not neurons:
            raise BadInput(f"--neurons published: none are published for {spec.name}. Give 1,2,3.")
    config = _config(
        options,
        ablation_value=tuple(values),
        controls=options.controls,
        matched_controls=(
            options.controls if options.matched_controls is None else options.matched_controls
        ),
        seed=options.seed,
        neurons=neurons,
        max_prompts=options.max_prompts,
        engine=options.engine,
        full_texts=options.full_texts,
        memory_budget=options.memory_budget,
        stats=options.stats,
        device_map=options.device_map,
        share=options.shard,
    )
    if options.out is None:
        make_plan(config)  # bad input is refused before a folder is announced
        value = "all_ablation_values" if values == ["all"] else ",".join(values)
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        shard = "" if options.shard is None else "-shard-{}-of-{}".format(*options.shard)
        options.out = Path("runs") / f"{Path(options.model).name}-{value}-{stamp}{shard}"
        print(f"{PROGRAM}: writing to {options.out}", file=sys.stderr)
    if options.shard is not None:
        folder = run_share(config, options.out)
        work, total = folder.manifest["work"], folder.manifest["prompts"]
        print(f"shard {'{}/{}'.format(*options.shard)}: {work['prompts']} of {total} prompts decoded.")
        print(f"Join all shards with: ccm merge FOLDER ... --out RUN\n\nshard folder: {options.out}")
        return
    print(summary(run(config, options.out)))
    print(f"\nrun folder: {options.out}")
    if options.report:
        from ccm.experiment.results import read_results
        from ccm.reporting.report import write_report

        html, *_ = write_report([read_results(options.out)], options.out, processes=cores())
        print(f"report: {html}")


def merge(options: argparse.Namespace) -> None:
    """Put the shares of a run together."""
    refuse_if_locked(options.out)

    from ccm.cli.console import summary
    from ccm.experiment.merging import merge_shares

    print(summary(merge_shares(options.shares, options.out)))
    print(f"\nrun folder: {options.out}")


def figures(options: argparse.Namespace) -> None:
    """Draw the figures and write the tables of finished runs."""
    out = _folder_of(options, "figures")

    from ccm.experiment.folder import locked_for
    from ccm.reporting.figures.gallery import write_figures
    from ccm.reporting.tables import write_tables

    runs = _finished(options.runs, out)
    with locked_for(out):
        tables = write_tables(runs, out)
        figures = write_figures(runs, out, cores())
    print(f"{len(figures) // 3} figures (PDF, PNG, data), {len(tables) // 3} tables: {out}")


def report(options: argparse.Namespace) -> None:
    """Write the report of finished runs."""
    out = _folder_of(options, "")

    from ccm.paper.held import held_of
    from ccm.reporting.report import write_report

    runs = _finished(options.runs, out)
    if options.tolerance is not None:
        held_of(options.tolerance, [run.model for run in runs])
    html, markdown, *_ = write_report(runs, out, options.tolerance, cores())
    print(f"report: {html}\nreport: {markdown}\nfigures and tables: {out / 'figures'}")


def _folder_of(options: argparse.Namespace, below: str) -> Path:
    """The folder to write what is made of finished runs; of one run, by default, below its own."""
    if options.out is None and len(options.runs) > 1:
        raise BadInput(f"{len(options.runs)} runs: no folder is theirs alone. Give one with --out.")
    return Path(options.runs[0] / below if options.out is None else options.out)


def _finished(paths: Sequence[Path], out: Path) -> Any:
    """Read finished runs, and see that what is made of them can be written.

    Raises:
        BadInput: a folder that is no finished run, the same run twice, or `out` cannot be written.
        InUse: another process is writing there.
    """
    from ccm.experiment.folder import folder_to_lock
    from ccm.experiment.results import read_results
    from ccm.reporting.distinct_names import distinct_names

    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file. Give a folder with --out.")
    refuse_if_locked(folder_to_lock(out))
    runs = distinct_names([read_results(path) for path in paths])
    _try_writing(out, f"{out}: cannot be written to", "folder with --out")
    return runs


def models(options: argparse.Namespace) -> None:
    """List the models."""
    paths = parse_model_paths(options.model_path)

    from ccm.cli.console import models_table

    print(models_table(paths))


def prompts(options: argparse.Namespace) -> None:
    """Build probing prompts and write them as CSV."""
    out = new_file(options.out)

    from ccm.decoding.trial import check_engine
    from ccm.experiment.cells import ENGINES
    from ccm.experiment.config import make_plan
    from ccm.experiment.folder import write_atomically
    from ccm.experiment.probing import build_prompts, prompt_table
    from ccm.method.prompts import never_recalled, split_objects
    from ccm.models.load import load

    plan = make_plan(_config(options, controls=0, engine=options.engine))
    split = split_objects([fact.object for fact in plan.facts.facts])
    if split.count:
        _log.warning(f"{never_recalled(vars(split))}.")
    model = load(plan.spec, plan.device, options.dtype, plan.bos)
    check_engine(model, options.engine)
    built = build_prompts(
        model,
        plan.facts,
        plan.template,
        lower_case=plan.protocol.lower_case_objects,
        decoder=lambda stage: ENGINES[options.engine],
    )
    write_atomically(out, lambda p: prompt_table(built.prompts).to_csv(p, index=False))
    for name, count in built.counts.items():
        print(f"{name.replace('_', ' '):32s}{count:8d}")


def measure(options: argparse.Namespace) -> None:
    """Measure the last layer's neurons."""
    out = None if options.out is None else new_file(options.out)

    from ccm.experiment.config import make_plan
    from ccm.experiment.folder import write_atomically
    from ccm.method.neurons import measure, select
    from ccm.models.load import load
    from ccm.models.specs import CHECKPOINT

    # No fact is used; the organism's are here without a download.
    plan = make_plan(_config(options, facts=str(CHECKPOINT), controls=0))
    model = load(plan.spec, plan.device, options.dtype)
    measures = measure(model.W_U, model.W_out, model.final_norm, plan.null_space_dims)
    table = measures.table()
    chosen = select(measures, plan.k, plan.min_rho)
    table["entropy_neuron"] = table["neuron_idx"].isin(chosen)
    if out is not None:
        write_atomically(out, lambda p: table.to_csv(p, index=False))
    print(f"{plan.spec.name}: {len(table)} last-layer neurons, {plan.null_space_dims} null-space")
    print(f"directions; rho >= {plan.min_rho} and the {plan.k} lowest LogitVar select:\n")
    print(table.loc[list(chosen), ["neuron_idx", "logitvar", "norm", "rho"]].to_string(index=False))


def ablate(options: argparse.Namespace) -> None:
    """Ablate neurons for prompts of the user's own."""
    out = new_file(options.out)

    from ccm.decoding.answer_tokens import object_tokens
    from ccm.decoding.results import Work
    from ccm.decoding.trial import check_engine
    from ccm.experiment.ablate_io import (
        parse_neurons,
        read_prompts,
        read_sets,
        read_statistics_npz,
        sets_json,
        split_columns,
    )
    from ccm.experiment.cells import ENGINES, CellReader, decode_hooked, decode_shared
    from ccm.experiment.config import PROTOCOLS
    from ccm.experiment.folder import write_json
    from ccm.method.ablation import ablation_values, check_neurons, check_statistics, plan
    from ccm.method.prompts import never_matched
    from ccm.method.sources import nested_objects
    from ccm.models.load import load
    from ccm.models.specs import device_for, dtype_for, spec_for
    from ccm.models.tokenizer import parse_bos
    from ccm.models.weights import check_weights

    bos = parse_bos(options.bos)
    _limit_threads()
    protocol = PROTOCOLS[one_of("protocol", options.protocol, PROTOCOLS)]
    engine = one_of("engine", options.engine, ENGINES)
    value = ablation_values(options.ablation_value)
    if len(value) != 1:
        raise BadInput("--ablation-value all: `ccm ablate` takes one value. Name it.")
    device, _ = device_for(options.device), dtype_for(options.dtype)
    spec = check_weights(spec_for(options.model, _model_paths(options)))
    d_vocab = spec.d_vocab if protocol.released_tokens else None
    prompts = read_prompts(options.prompts, d_vocab=d_vocab)
    split = split_columns(prompts)
    if any(found.count for found in split.values()):
        columns = {name: vars(found) for name, found in split.items()}
        found = never_matched(columns)
        _log.warning(f"{options.prompts}: {found}. Give what comes before it to match that.")
    statistics = check_statistics(read_statistics_npz(options.stats), spec.d_mlp)
    if options.sets is not None:
        sets = read_sets(options.sets, spec.d_mlp)
    else:
        sets = {"set_000": check_neurons(parse_neurons(options.neurons), spec.d_mlp, "--neurons")}
    ablations = [plan(name, neurons, value[0], statistics) for name, neurons in sets.items()]
    model = load(spec, device, options.dtype, bos)
    check_engine(model, engine)
    tokens = [model.encode(prompt.text) for prompt in prompts]
    released = protocol.released_tokens
    objects = object_tokens(model, prompts, released=released)
    work = Work()
    if engine == "hooked":
        runs = list(decode_hooked(model, tokens, ablations, objects))
    else:
        budget = options.memory_budget
        runs = list(
            decode_shared(
                model, tokens, ablations, objects, own_top=released, memory_budget=budget, work=work
            )
        )
    reader = CellReader(
        prompts, objects, runs[0], released=released, counter_first=protocol.counter_first
    )
    names = ["plain", *(a.name for a in ablations)]
    tables = {name: reader.table(run) for name, run in zip(names, runs, strict=True)}
    write_json(
        out,
        {
            "model": spec.name,
            "ablation_value": value[0].name,
            "protocol": protocol.name,
            "engine": engine,
            "work": work.as_dict(),
            "dtype": options.dtype,
            "device": device.type,
            "special_tokens": model.special_tokens,
            "first_prompt_tokens": tokens[0],
            "objects_with_splitter": split,
            "nested_objects": nested_objects(prompts),
            "results": sets_json(tables, sets),
        },
    )
    print(f"{len(prompts)} prompts, {len(sets)} sets: {out}")


def rehearse(options: argparse.Namespace) -> None:
    """Rehearse a published model's run with random weights."""
    from ccm.method.ablation import ablation_values

    out = None if options.out is None else new_file(options.out)
    values = tuple(value.strip() for value in options.ablation_value.split(","))
    ablation_values(values)

    from ccm.experiment.folder import write_json
    from ccm.experiment.rehearsal.projection import rehearsal_table
    from ccm.experiment.rehearsal.rehearse import rehearse
    from ccm.experiment.rehearsal.stages import RehearsalConfig

    _limit_threads()
    config = RehearsalConfig(
        model=options.model,
        prompts=options.prompts,
        controls=options.controls,
        ablation_value=values,
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        seed=options.seed,
        hooked=options.hooked,
    )
    found = rehearse(config, keep=options.keep)
    if out is not None:
        write_json(out, found)
    print(rehearsal_table(found))

"""The command line: thin, every subcommand a few calls into the package.

Exit codes: 0 done, 2 input that cannot be used (one line on stderr, no traceback), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

from ccm.arguments import (
    engine_options,
    facts_options,
    measure_options,
    model_options,
    parse_model_paths,
    path_option,
    rehearse_options,
    share,
)
from ccm.errors import BadInput, CcmError, allowed, one_of

PROGRAM = "ccm"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    try:
        _check_not_empty(given)
        options.run(options)
    except CcmError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that went away
        print(f"{PROGRAM}: {error}. Nothing half-written is left.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumes = options.run is _run and options.out is not None
        next_step = (
            f"the same command with --out {options.out} goes on from here" if resumes else "no result"
        )
        print(f"\n{PROGRAM}: interrupted; {next_step}.", file=sys.stderr)  # below a progress bar
        return 130
    return 0


def _check_not_empty(arguments: Sequence[str]) -> None:
    """Refuse `--out ""`, most often a shell variable that is not set: no option means that."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "" or (argument.startswith("--") and argument.endswith("=")):
            name = argument.rstrip("=") or before
            raise BadInput(f"{name}: empty. Give a value, or leave the option out.")


def parser() -> argparse.ArgumentParser:
    """Build the argument parser."""
    top = _Parser(
        prog=PROGRAM, description="Entropy neurons and context copying, from facts to scores."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="the whole experiment, into a run folder")
    model_options(run)
    facts_options(run)
    run.add_argument(
        "--ablation-value",
        default="mean_ablation",
        help="mean_ablation, median_ablation, mode_ablation, mean_minus_sigma_ablation, "
        "mean_plus_sigma_ablation, several with commas, or all (default: %(default)s)",
    )
    run.add_argument("--controls", type=int, default=100, help="random sets (default: 100)")
    run.add_argument(
        "--matched-controls",
        type=int,
        metavar="N",
        help="sets of neurons near the entropy neurons in weight norm and spread (default: as many as "
        "--controls)",
    )
    run.add_argument("--seed", type=int, default=123, help="of the controls (default: 123)")
    measure_options(run)
    run.add_argument("--neurons", help="fix the entropy set: 1,2,3, or published")
    engine_options(run)
    run.add_argument(
        "--device-map", help="auto: lay the layers over all GPUs, for a model that fits no single one"
    )
    run.add_argument(
        "--full-texts", action="store_true", help="decode controls to 10 tokens, not to their answer"
    )
    run.add_argument(
        "--stats",
        default="own",
        help="activation statistics: own (default), or released, those of the paper's authors",
    )
    run.add_argument("--max-prompts", type=int, help="use only so many, evenly chosen")
    run.add_argument(
        "--shard",
        type=share,
        metavar="I/N",
        help="decode only the I-th of N shares of the prompts; `ccm merge` joins them",
    )
    run.add_argument("--out", type=Path, help="run folder (default: runs/MODEL-VALUE-TIME)")
    run.add_argument(
        "--report", action="store_true", help="at the end, draw everything and write the report"
    )
    run.set_defaults(run=_run)

    merge = commands.add_parser("merge", help="join the shares of a run into one run folder")
    merge.add_argument("shares", type=Path, nargs="+", metavar="FOLDER", help="of run --shard I/N")
    merge.add_argument("--out", type=Path, required=True, help="run folder to write")
    merge.set_defaults(run=_merge)

    figures = commands.add_parser("figures", help="figures and tables of finished runs")
    figures.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, one a model")
    figures.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN/figures)")
    figures.set_defaults(run=_figures)

    report = commands.add_parser("report", help="one page of finished runs: figures, tables, numbers")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, one a model")
    report.add_argument("--out", type=Path, help="folder to write (default, of one run: RUN)")
    report.add_argument(
        "--tolerance",
        type=Path,
        metavar="FILE",
        help="tolerance_report.json of a reproduction (default: the run's own beside its folder)",
    )
    report.set_defaults(run=_report)

    models = commands.add_parser("models", help="known models, and whether their weights are here")
    path_option(models)
    models.set_defaults(run=_models)

    prompts = commands.add_parser("prompts", help="probing prompts of a model, as CSV")
    model_options(prompts)
    facts_options(prompts)
    prompts.add_argument("--out", type=Path, required=True, help="CSV file to write")
    prompts.set_defaults(run=_prompts)

    measure = commands.add_parser("measure", help="LogitVar, norm and rho of last-layer neurons")
    model_options(measure)
    measure_options(measure)
    measure.add_argument("--out", type=Path, help="CSV file to write")
    measure.set_defaults(run=_measure)

    ablate = commands.add_parser("ablate", help="ablate neuron sets on prompts from elsewhere")
    model_options(ablate)
    ablate.add_argument("--prompts", type=Path, required=True, help="CSV of probing prompts")
    ablate.add_argument("--stats", type=Path, required=True, help="NPZ of activation statistics")
    sets = ablate.add_mutually_exclusive_group(required=True)
    sets.add_argument("--neurons", help="one set: 1,2,3")
    sets.add_argument("--sets", type=Path, help="JSON: a list of sets, or an object of named ones")
    ablate.add_argument("--ablation-value", default="mean_ablation", help="one of the five")
    engine_options(ablate)
    ablate.add_argument("--out", type=Path, required=True, help="JSON file to write")
    ablate.set_defaults(run=_ablate)

    rehearse = commands.add_parser(
        "rehearse", help="time and memory of a published model's run, on random weights"
    )
    rehearse_options(rehearse)
    rehearse.set_defaults(run=_rehearse)
    return top


def _config(options: argparse.Namespace, **more: Any) -> Any:
    from ccm.plan import RunConfig

    given = {
        name: getattr(options, name)
        for name in ("model", "device", "dtype", "protocol", "facts", "template")
        if hasattr(options, name)
    }
    measures = {
        name: getattr(options, name)
        for name in ("k", "min_rho", "null_space_dims")
        if hasattr(options, name)
    }
    return RunConfig(**given, **measures, model_paths=_model_paths(options), **more)


def _model_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Parse `--model-path` and refuse a name that nothing would ever look up."""
    from ccm.models import MODELS

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
    if path.exists():
        raise BadInput(f"--out {path}: exists already. Nothing was written; give another file.")
    if not path.parent.is_dir():
        raise BadInput(f"--out {path}: no folder {path.parent}. Make it first.")
    try:
        # Tried out now, because the results would come minutes later.
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise BadInput(
            f"--out {path}: cannot write to {path.parent} ({error.strerror}). Give another file."
        ) from error
    return path


def _run(options: argparse.Namespace) -> None:
    from ccm.ablation import ablation_values
    from ccm.external import parse_neurons

    values = [value.strip() for value in options.ablation_value.split(",")]
    if len(values) > 1 and "all" in values:
        raise BadInput(
            f"--ablation-value {options.ablation_value!r}: all are more than these. Drop one."
        )
    ablation_values(values)
    if options.report and options.shard is not None:
        raise BadInput("--report: a share of a run has no scores. Merge all shares, then `ccm report`.")
    neurons = None
    if options.neurons is not None:
        if options.k is not None:
            raise BadInput(f"-k {options.k}: --neurons says how many there are. Drop one of the two.")
        if options.neurons != "published":
            neurons = parse_neurons(options.neurons)
    # Only now, because they take seconds.
    from ccm.experiment import run, run_share
    from ccm.models import spec_for
    from ccm.plan import make_plan
    from ccm.terminal import summary

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
        from ccm.report import write_report
        from ccm.results import read_results

        html, *_ = write_report([read_results(options.out)], options.out, processes=_cores())
        print(f"report: {html}")


def _merge(options: argparse.Namespace) -> None:
    from ccm.merging import merge_shares
    from ccm.terminal import summary

    print(summary(merge_shares(options.shares, options.out)))
    print(f"\nrun folder: {options.out}")


def _figures(options: argparse.Namespace) -> None:
    out = _folder_of(options, "figures")

    from ccm.figures.gallery import write_figures
    from ccm.tables import write_tables

    runs = _finished(options.runs, out)
    tables = write_tables(runs, out)
    figures = write_figures(runs, out, _cores())
    print(f"{len(figures) // 3} figures (PDF, PNG, data), {len(tables) // 3} tables: {out}")


def _report(options: argparse.Namespace) -> None:
    out = _folder_of(options, "")

    from ccm.held import held_of
    from ccm.report import write_report

    runs = _finished(options.runs, out)
    if options.tolerance is not None:
        held_of(options.tolerance, [run.model for run in runs])
    html, markdown, *_ = write_report(runs, out, options.tolerance, _cores())
    print(f"report: {html}\nreport: {markdown}\nfigures and tables: {out / 'figures'}")


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder_of(options: argparse.Namespace, below: str) -> Path:
    """The folder to write what is made of finished runs; of one run, by default, below its own."""
    if options.out is None and len(options.runs) > 1:
        raise BadInput(f"{len(options.runs)} runs: no folder is theirs alone. Give one with --out.")
    return Path(options.runs[0] / below if options.out is None else options.out)


def _finished(paths: Sequence[Path], out: Path) -> Any:
    """Read finished runs, and see that what is made of them can be written.

    Raises:
        BadInput: a folder that is no finished run, two runs of one model, or `out` cannot be written.
    """
    from ccm.figures.gallery import check_distinct
    from ccm.results import read_results

    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file. Give a folder with --out.")
    runs = [read_results(path) for path in paths]
    check_distinct(runs)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Tried out now, because drawing takes a while.
        TemporaryFile(dir=out).close()
    except OSError as error:
        raise BadInput(
            f"{out}: cannot be written to ({error.strerror}). Give another folder with --out."
        ) from error
    return runs


def _models(options: argparse.Namespace) -> None:
    paths = parse_model_paths(options.model_path)

    from ccm.terminal import models_table

    print(models_table(paths))


def _prompts(options: argparse.Namespace) -> None:
    out = new_file(options.out)

    from ccm.checkpoint import load
    from ccm.plan import make_plan
    from ccm.probing import build_prompts, prompt_table
    from ccm.run_folder import write_atomically

    plan = make_plan(_config(options, controls=0))
    model = load(plan.spec, plan.device, options.dtype)
    built = build_prompts(model, plan.facts, plan.template, lower_case=plan.protocol.lower_case_objects)
    write_atomically(out, lambda p: prompt_table(built.prompts).to_csv(p, index=False))
    for name, count in built.counts.items():
        print(f"{name.replace('_', ' '):32s}{count:8d}")


def _measure(options: argparse.Namespace) -> None:
    out = None if options.out is None else new_file(options.out)

    from ccm.checkpoint import load
    from ccm.neurons import measure, select
    from ccm.organism import CHECKPOINT
    from ccm.plan import make_plan
    from ccm.run_folder import write_atomically

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


def _ablate(options: argparse.Namespace) -> None:
    out = new_file(options.out)

    from ccm.ablation import ablation_values, check_neurons, check_statistics, plan
    from ccm.cells import ENGINES, CellReader, decode_hooked, decode_shared
    from ccm.checkpoint import load
    from ccm.completions import Work
    from ccm.external import (
        parse_neurons,
        read_prompts,
        read_sets,
        read_statistics_npz,
        sets_json,
    )
    from ccm.knowledge import object_tokens
    from ccm.models import device_for, dtype_for, spec_for
    from ccm.plan import PROTOCOLS
    from ccm.run_folder import write_json
    from ccm.weights import check_weights

    protocol = PROTOCOLS[one_of("protocol", options.protocol, PROTOCOLS)]
    engine = one_of("engine", options.engine, ENGINES)
    value = ablation_values(options.ablation_value)
    if len(value) != 1:
        raise BadInput("--ablation-value all: `ccm ablate` takes one value. Name it.")
    device, _ = device_for(options.device), dtype_for(options.dtype)
    spec = check_weights(spec_for(options.model, _model_paths(options)))
    d_vocab = spec.d_vocab if protocol.released_tokens else None
    prompts = read_prompts(options.prompts, d_vocab=d_vocab)
    statistics = check_statistics(read_statistics_npz(options.stats), spec.d_mlp)
    if options.sets is not None:
        sets = read_sets(options.sets, spec.d_mlp)
    else:
        sets = {"set_000": check_neurons(parse_neurons(options.neurons), spec.d_mlp, "--neurons")}
    ablations = [plan(name, neurons, value[0], statistics) for name, neurons in sets.items()]
    model = load(spec, device, options.dtype)
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
    reader = CellReader(prompts, objects, runs[0], released=released)
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
            "first_prompt_tokens": tokens[0],
            "results": sets_json(tables, sets),
        },
    )
    print(f"{len(prompts)} prompts, {len(sets)} sets: {out}")


def _rehearse(options: argparse.Namespace) -> None:
    from ccm.ablation import ablation_values

    out = None if options.out is None else new_file(options.out)
    values = tuple(value.strip() for value in options.ablation_value.split(","))
    ablation_values(values)

    from ccm.projection import rehearsal_table
    from ccm.rehearsal import rehearse
    from ccm.run_folder import write_json
    from ccm.stages import RehearsalConfig

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

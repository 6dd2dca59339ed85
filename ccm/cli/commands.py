"""What each subcommand does: a few calls into the package, imported only when it is needed."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ccm
from ccm.cli.options import PROGRAM, given_options
from ccm.errors import BadInput, CannotWrite
from ccm.experiment.config import RunConfig
from ccm.experiment.locking import refuse_if_locked
from ccm.experiment.options import neuron_numbers
from ccm.experiment.writing import try_writing
from ccm.method.ablation_values import one_ablation_value
from ccm.method.protocol import PROTOCOLS
from ccm.models.limits import cores

if TYPE_CHECKING:
    from ccm.models.specs import ModelSpec

THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user says how many
_log = logging.getLogger(__name__)


def read_neurons(text: str) -> tuple[int, ...]:
    """Read `--neurons 1,2,3` of a command that does not take `published`.

    Raises:
        BadInput: something between the commas is no neuron number.
    """
    try:
        return neuron_numbers(text)
    except ValueError as error:
        raise BadInput(f"--neurons {text!r}: {error}.") from error


def _limit_threads() -> None:
    """Lower torch's number of threads to the CPUs that this process may use.

    torch counts the machine's CPUs, and more threads than a container's quota only wait for each
    other. Done here and not in the Python API: the number belongs to the whole process, and there
    the process is the caller's.
    """
    import torch

    if not any(os.environ.get(name) for name in THREADS_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def new_file(path: Path) -> Path:
    """Check that an output file can be written and would overwrite nothing.

    Raises:
        BadInput: it exists already, or its folder is missing or cannot be written to.
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
    """Check that a folder, made if it is missing, can be written to: results come minutes later.

    Args:
        folder: The folder.
        trouble: The start of the message.
        other: What to give instead: "file" or "folder".

    Raises:
        BadInput: it cannot be written to.
    """
    try:
        try_writing(folder)
    except CannotWrite as error:
        raise BadInput(f"{trouble} ({error.reason}). Give another {other}.") from error


def run(options: argparse.Namespace) -> None:
    """Run the experiment, or one shard of it."""
    config = RunConfig.read(**given_options(options))
    if options.out is not None:
        refuse_if_locked(options.out)
    if options.report and config.shard is not None:
        raise BadInput("--report: a shard of a run has no scores. Merge all, then `ccm report`.")
    # Only now, because they take seconds.
    from ccm.cli.console import summary
    from ccm.experiment.run import new_folder, run_shard

    _limit_threads()
    if options.out is None:
        options.out = new_folder(config)
        print(f"{PROGRAM}: writing to {options.out}", file=sys.stderr)
    if config.shard is not None:
        folder = run_shard(config, options.out)
        work, total = folder.manifest["work"], folder.manifest["prompts"]
        shard = folder.manifest["identity"]["shard"]
        print(f"shard {shard}: {work['prompts']} of {total} prompts decoded.")
        print(f"Join all shards with: ccm merge FOLDER ... --out RUN\n\nshard folder: {options.out}")
        return
    done = ccm.run(config, out=options.out)
    print(summary(done.results.scores))
    print(f"\nrun folder: {options.out}")
    if options.report:
        print(f"report: {done.report(processes=cores())}")


def sweep(options: argparse.Namespace) -> None:
    """Run the experiment with other choices, one at a time."""
    config = RunConfig.read(**given_options(options))
    if config.shard is not None:
        raise BadInput("--shard: not for a sweep. Leave it out.")

    from ccm.experiment.results import read_results
    from ccm.experiment.sweep import read_varied, sweep
    from ccm.reporting.sweep_table import sweep_table, write_sweep
    from ccm.reporting.table_formats import markdown

    _limit_threads()
    found, failed = [], []
    for choice, folder in sweep(config, read_varied(options.vary), options.out):
        ended = "done" if isinstance(folder, Path) else str(folder)
        print(f"{PROGRAM}: {choice.name}: {ended}", file=sys.stderr)
        if isinstance(folder, Path):
            name = f"{choice.option} {choice.value}".strip() or choice.name
            found.append((name, read_results(folder)))
        else:
            failed.append(choice.name)
    if found:
        table = sweep_table(found)
        paths = write_sweep(table, options.out)
        print(markdown(table), *(f"table: {path}" for path in paths), sep="\n")
    if failed:
        raise BadInput(f"{', '.join(failed)}: could not be run, as was said. The others were.")


def merge(options: argparse.Namespace) -> None:
    """Merge the shards of a run."""
    refuse_if_locked(options.out)

    from ccm.cli.console import summary
    from ccm.experiment.merging import merge_shards

    print(summary(merge_shards(options.shards, options.out)))
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

    from ccm.paper.report import read_report
    from ccm.reporting.report import write_report

    runs = _finished(options.runs, out)
    if options.tolerance is not None:
        read_report(options.tolerance, [run.model for run in runs])
    html, markdown, *_ = write_report(runs, out, options.tolerance, cores())
    print(f"report: {html}\nreport: {markdown}\nfigures and tables: {out / 'figures'}")


def compare(options: argparse.Namespace) -> None:
    """Compare finished runs of published models with the paper, or two runs with each other."""
    out = _folder_of(options, "")

    from ccm.paper.report import check_comparable, compare_with_paper, is_printed, one_line
    from ccm.reporting.two_runs import check_two, compare_runs, sentences, write_comparison

    def held_to(runs: Any) -> str:
        paper = len(runs) != 2 or is_printed(runs)
        return options.to or ("paper" if paper else "run")

    checks = {"paper": check_comparable, "run": check_two}
    runs = _finished(options.runs, out, lambda runs: checks[held_to(runs)](runs))
    if held_to(runs) == "paper":
        comparisons, paths = compare_with_paper(runs, out)
        lines = [one_line(comparison) for comparison in comparisons]
    else:
        found = compare_runs(*runs)
        lines, paths = sentences(found), write_comparison(found, out)
    print(*lines, *(f"report: {path}" for path in paths), sep="\n")


def _folder_of(options: argparse.Namespace, below: str) -> Path:
    """Return the output folder for finished runs; of one run, by default, in its own folder."""
    if options.out is None and len(options.runs) > 1:
        raise BadInput(f"{len(options.runs)} runs: no folder is theirs alone. Give one with --out.")
    return Path(options.runs[0] / below if options.out is None else options.out)


def _finished(paths: Sequence[Path], out: Path, check: Callable[[Any], None] | None = None) -> Any:
    """Read finished runs, and check that the output folder can be written to.

    Args:
        paths: Run folders.
        out: The output folder, which is made.
        check: Refuses runs that the command cannot use, before the folder is made.

    Raises:
        BadInput: a folder is no finished run, a run is given twice, or `out` cannot be written to.
        InUse: another process is writing there.
    """
    from ccm.experiment.folder import folder_to_lock
    from ccm.experiment.results import read_results
    from ccm.reporting.distinct_names import distinct_names

    if out.exists() and not out.is_dir():
        raise BadInput(f"{out}: is a file. Give a folder with --out.")
    refuse_if_locked(folder_to_lock(out))
    runs = distinct_names([read_results(path) for path in paths])
    if check is not None:
        check(runs)
    _try_writing(out, f"{out}: cannot be written to", "folder with --out")
    return runs


def models(options: argparse.Namespace) -> None:
    """List the models."""
    paths = RunConfig.read(**given_options(options)).model_paths

    from ccm.cli.console import models_table

    print(models_table(paths))


def fetch(options: argparse.Namespace) -> None:
    """Bring a model's weights here, so that nothing has to be downloaded later."""
    spec, folder = _fetched(RunConfig.read(model=options.model, **given_options(options)))
    print(f"{spec.name}: {folder}")


def _fetched(config: RunConfig) -> "tuple[ModelSpec, Path]":
    """Return a model whose files are here, and their folder; what is missing is downloaded."""
    from ccm.experiment.plan import find_model
    from ccm.models.download import download
    from ccm.models.weights import folder_of, unfinished

    spec = find_model(config)
    if unfinished(spec):
        download(spec)
        spec = find_model(config)
    folder = folder_of(spec)
    assert folder is not None, "what is not here was downloaded"
    return spec, folder


def tokens(options: argparse.Namespace) -> None:
    """Show what a text becomes before it is run."""
    config = RunConfig.read(**given_options(options))

    from ccm.cli.console import tokens_table
    from ccm.models.encoded_text import encode_text
    from ccm.models.tokenizer import parse_bos

    bos = parse_bos(config.bos)
    spec, folder = _fetched(config)
    encoded = encode_text(spec, folder, options.text, options.answer, bos)
    for note in encoded.special.notes:
        _log.warning(note)
    print(tokens_table(spec.name, encoded))


def prompts(options: argparse.Namespace) -> None:
    """Build probing prompts and write them as CSV."""
    out = new_file(options.out)
    config = RunConfig.read(**given_options(options), controls=0)

    from ccm.decoding.engines import engine_for
    from ccm.experiment.plan import make_plan
    from ccm.experiment.probing import build_prompts, prompt_table
    from ccm.experiment.writing import write_atomically
    from ccm.method.prompts import never_recalled, split_objects
    from ccm.models.assumptions import check_assumptions
    from ccm.models.load import load

    _limit_threads()
    plan = make_plan(config)
    split = split_objects([fact.object for fact in plan.facts.facts])
    if split.count:
        _log.warning(f"{never_recalled(vars(split))}.")
    model = load(plan.spec, plan.device, config.dtype, plan.bos)
    check_assumptions(model)  # which reading log-probabilities off final residuals rests on
    engine = engine_for(config.engine, model)
    built = build_prompts(
        model,
        plan.facts,
        plan.template,
        lower_case=plan.protocol.lower_case_objects,
        engine=engine,
    )
    write_atomically(out, lambda p: prompt_table(built.prompts).to_csv(p, index=False))
    for name, count in built.counts.items():
        print(f"{name.replace('_', ' '):32s}{count:8d}")


def measure(options: argparse.Namespace) -> None:
    """Measure the last layer's neurons."""
    out = None if options.out is None else new_file(options.out)
    config = RunConfig.read(**given_options(options), controls=0)

    from ccm.experiment.plan import check_measures, find_model
    from ccm.experiment.writing import write_atomically
    from ccm.models.devices import device_for
    from ccm.models.load import load

    _limit_threads()
    spec = find_model(config)
    rule = check_measures(config, spec)
    table = ccm.measure(load(spec, device_for(config.device), config.dtype), **rule)
    if out is not None:
        write_atomically(out, lambda p: table.to_csv(p, index=False))
    print(f"{spec.name}: {len(table)} last-layer neurons, {rule['null_space_dims']} null-space")
    print(f"directions; rho >= {rule['min_rho']} and the {rule['k']} lowest LogitVar select:\n")
    columns = ["neuron_idx", "logitvar", "norm", "rho"]
    chosen = table.loc[table["entropy_neuron"], columns].sort_values("logitvar", kind="stable")
    print(chosen.to_string(index=False))


def ablate(options: argparse.Namespace) -> None:
    """Ablate neurons on prompts of the user's own."""
    out = new_file(options.out)
    config = RunConfig.read(**given_options(options))
    value = one_ablation_value(options.ablation_value)
    neurons = () if options.neurons is None else read_neurons(options.neurons)

    from ccm.experiment import ablate_io
    from ccm.experiment.ablate import ablate
    from ccm.experiment.files import write_json
    from ccm.experiment.plan import find_model
    from ccm.method.ablation import check_neurons
    from ccm.method.prompts import never_matched
    from ccm.method.statistics import check_statistics
    from ccm.models.devices import device_for
    from ccm.models.load import load
    from ccm.models.tokenizer import parse_bos

    bos, protocol = parse_bos(config.bos), PROTOCOLS[config.protocol]
    _limit_threads()
    device = device_for(config.device)
    spec = find_model(config)
    d_vocab = spec.d_vocab if protocol.released_tokens else None
    prompts = ablate_io.read_prompts(options.prompts, d_vocab=d_vocab)
    split = ablate_io.split_columns(prompts)
    if any(found.count for found in split.values()):
        found = never_matched({name: vars(found) for name, found in split.items()})
        _log.warning(f"{options.prompts}: {found}. Give what comes before it to match that.")
    statistics = check_statistics(ablate_io.read_statistics_npz(options.stats), spec.d_mlp)
    if options.sets is not None:
        sets = ablate_io.read_sets(options.sets, spec.d_mlp)
    else:
        sets = {"set_000": check_neurons(neurons, spec.d_mlp, "--neurons")}
    model = load(spec, device, config.dtype, bos)
    done = ablate(
        model,
        prompts,
        sets,
        value,
        statistics=statistics,
        protocol=protocol,
        engine=config.engine,
        memory_budget=config.memory_budget,
    )
    write_json(out, ablate_io.ablated_json(done, model, prompts, value, config))
    print(f"{len(prompts)} prompts, {len(sets)} sets: {out}")


def rehearse(options: argparse.Namespace) -> None:
    """Rehearse a published model's run with random weights."""
    out = None if options.out is None else new_file(options.out)
    run = RunConfig.read(**given_options(options))

    from ccm.experiment.files import write_json
    from ccm.experiment.rehearsal.projection import rehearsal_table
    from ccm.experiment.rehearsal.rehearse import RehearsalConfig, rehearse

    _limit_threads()
    own = {name: getattr(options, name) for name in ("prompts", "tokenizer", "hooked", "keep")}
    found = rehearse(RehearsalConfig(run, **own))
    if out is not None:
        write_json(out, found)
    print(rehearsal_table(found))

"""The subcommands: each is a few calls into the package, imported only when needed."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import ccm
from ccm.cli.options import PROGRAM, given_options
from ccm.cli.outputs import new_file
from ccm.errors import BadInput
from ccm.experiment.config import RunConfig
from ccm.experiment.locking import refuse_if_locked
from ccm.experiment.options import neuron_numbers
from ccm.method.ablation_values import one_ablation_value
from ccm.method.protocol import PROTOCOLS
from ccm.models.limits import cores

if TYPE_CHECKING:
    from ccm.models.specs import ModelSpec

THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # by which a user sets their number
_log = logging.getLogger(__name__)


def read_neurons(text: str) -> tuple[int, ...]:
    """Read `--neurons 1,2,3` of a command that does not take `published`.

    Raises:
        BadInput: something between the commas is not a neuron number.
    """
    try:
        return neuron_numbers(text)
    except ValueError as error:
        raise BadInput(f"--neurons {text!r}: {error}.") from error


def _limit_threads() -> None:
    """Lower torch's number of threads to the CPUs that this process may use.

    torch counts the machine's CPUs, and more threads than a container's quota only wait for each
    other. The Python API does not do this: the number holds for the whole process, which is the
    caller's there.
    """
    import torch

    if not any(os.environ.get(name) for name in THREADS_VARIABLES):
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def run(options: argparse.Namespace) -> None:
    """Run the experiment, or one shard of it."""
    config = RunConfig.read(**given_options(options))
    if options.out is not None:
        refuse_if_locked(options.out)
    if options.report and config.shard is not None:
        raise BadInput("--report: a shard of a run has no scores. Merge all, then `ccm report`.")
    # Imported only now, because that takes seconds. The bar is for a terminal, and leaves it before an
    # error can be printed there.
    from tqdm import tqdm

    with tqdm(total=1, desc="libraries", unit="import", leave=False, disable=None) as bar:
        from ccm.cli.console import summary
        from ccm.experiment.plan import new_folder
        from ccm.experiment.run import run_shard

        bar.update()

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
        raise BadInput(f"{', '.join(failed)}: could not be run (see above). The others were.")


def merge(options: argparse.Namespace) -> None:
    """Merge the shards of a run."""
    refuse_if_locked(options.out)

    from ccm.cli.console import summary
    from ccm.experiment.merging import merge_shards

    print(summary(merge_shards(options.shards, options.out)))
    print(f"\nrun folder: {options.out}")


def models(options: argparse.Namespace) -> None:
    """List the models."""
    paths = RunConfig.read(**given_options(options)).model_paths

    from ccm.cli.console import models_table

    print(models_table(paths))


def fetch(options: argparse.Namespace) -> None:
    """Download a model's weights, so that nothing has to be downloaded later."""
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
    """Show the tokens of a text, as a run encodes it."""
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
    check_assumptions(model)  # because log-probabilities are computed from final residuals
    engine, lower_case = engine_for(config.engine, model), plan.protocol.lower_case_objects
    built = build_prompts(model, plan.facts, plan.template, lower_case=lower_case, engine=engine)
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
        _log.warning(f"{options.prompts}: {found}. Give only what comes before it as the object.")
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

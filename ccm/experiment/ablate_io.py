"""Files of `ccm ablate`: prompts, statistics and neuron sets of the user, and the results."""

import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ccm.errors import BadInput
from ccm.experiment.ablate import Ablated
from ccm.experiment.config import RunConfig
from ccm.experiment.fact_files import check_distinct, read_text_table
from ccm.experiment.files import read_json
from ccm.experiment.probing import table_prompts
from ccm.method.ablation import PLAIN, check_neurons
from ccm.method.ablation_values import AblationValue
from ccm.method.prompts import ProbingPrompt, SplitObjects, split_objects
from ccm.method.sources import nested_objects
from ccm.method.statistics import STATISTICS, ActivationStatistics
from ccm.models.model import LoadedModel

PROMPT_COLUMNS = ("knowledge_probing_prompt", "counter_knowledge_object", "parametric_knowledge_object")
TOKEN_COLUMNS = ("counter_knowledge_object_first_token_id", "parametric_knowledge_first_token_id")
OTHER_COLUMNS = ("statement_subject", "rel_lemma", "relation_group_id", "statement_query")


def read_prompts(path: Path, *, d_vocab: int | None = None) -> list[ProbingPrompt]:
    """Read probing prompts from a CSV with the released column names.

    Args:
        path: CSV, UTF-8, with `PROMPT_COLUMNS`; `OTHER_COLUMNS` are optional.
        d_vocab: Number of tokens of the model, if `TOKEN_COLUMNS` are to be read and checked: only the
            released token rule needs them (defect 7).

    Raises:
        BadInput: a missing column, an empty cell, a duplicate prompt, or a token id out of range.
    """
    token_ids = d_vocab is not None
    needed = PROMPT_COLUMNS + (TOKEN_COLUMNS if token_ids else ())
    table = read_text_table(path, needed, OTHER_COLUMNS + (() if token_ids else TOKEN_COLUMNS))
    check_distinct(path, table, ("knowledge_probing_prompt",))
    if d_vocab is not None:
        for column in TOKEN_COLUMNS:
            for row, text in enumerate(table[column], start=2):
                # Nine digits at most, so that no number is too long to be read.
                if not (re.fullmatch("[0-9]{1,9}", text) and int(text) < d_vocab):
                    raise BadInput(
                        f"{path}: {column} is {text!r} in row {row}, not a token id. Allowed: 0 to "
                        f"{d_vocab - 1}."
                    )
    ids = {column: table[column].astype(int) if token_ids else -1 for column in TOKEN_COLUMNS}
    unknown = {"log_prob_counter_object": -inf, "log_prob_parametric_object": -inf}
    return table_prompts(table.assign(**ids, **unknown))


def split_columns(prompts: Sequence[ProbingPrompt]) -> dict[str, SplitObjects]:
    """Find the objects that no answer can name, by their column in the CSV of prompts."""
    _, counter, parametric = PROMPT_COLUMNS
    return {
        counter: split_objects([prompt.counter_object for prompt in prompts]),
        parametric: split_objects([prompt.parametric_object for prompt in prompts]),
    }


def read_statistics_npz(path: Path) -> ActivationStatistics:
    """Read activation statistics from an NPZ with the keys mean, std, median, mode, min and max.

    Raises:
        BadInput: not an NPZ, a key that is missing or not a vector of numbers, or vectors that do not
            belong together: different lengths, min above max, a negative std.
    """
    if not path.is_file():
        raise BadInput(f"{path}: no such file. Give an NPZ with the keys {', '.join(STATISTICS)}.")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not a zip file")
        # allow_pickle=False: an array of objects is refused, never unpickled.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in STATISTICS if name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(
            f"{path}: cannot be read as an NPZ of numbers ({error}). Write it with numpy.savez."
        ) from error
    missing = [name for name in STATISTICS if name not in arrays]
    if missing:
        raise BadInput(f"{path}: missing key {missing[0]!r}. Needed: {', '.join(STATISTICS)}.")
    for name, values in arrays.items():
        if values.ndim != 1 or values.dtype.kind not in "fiu":
            raise BadInput(
                f"{path}: {name} is {values.dtype} of shape {values.shape}. Needed: one number per "
                "neuron."
            )
        if len(values) != len(arrays["mean"]):
            raise BadInput(
                f"{path}: {name} has {len(values)} values, mean has {len(arrays['mean'])}. Needed: one "
                "number per neuron."
            )
    statistics = ActivationStatistics(**{n: v.astype(np.float64) for n, v in arrays.items()})
    wrong = {"a negative std": statistics.std < 0, "min above max": statistics.min > statistics.max}
    for what, where in wrong.items():
        if where.any():
            raise BadInput(
                f"{path}: {what} for neuron {int(where.argmax())}. Recompute the statistics."
            )
    return statistics


def read_sets(path: Path, d_mlp: int) -> dict[str, tuple[int, ...]]:
    """Read neuron sets from JSON: a list of lists, or an object of named lists.

    Raises:
        BadInput: another structure, the name of the plain run, or neurons that are out of range or
            repeated.
    """
    if not path.is_file():
        raise BadInput(f"--sets {path}: no such file. Give a JSON file with lists of neurons.")
    data: Any = read_json(path)
    if isinstance(data, list):
        data = {f"set_{i:03d}": neurons for i, neurons in enumerate(data)}
    if not isinstance(data, dict) or not data:
        raise BadInput(f"{path}: not a list of neuron lists, nor an object of named ones.")
    if PLAIN.name in data:
        raise BadInput(f"{path}: a set is named {PLAIN.name!r}, as the plain run is. Rename it.")
    for name, neurons in data.items():
        if not isinstance(neurons, list) or not all(type(i) is int for i in neurons):
            raise BadInput(f"{path}: set {name!r} is not a list of neuron numbers.")
    return {str(n): check_neurons(s, d_mlp, f"{path}: set {n!r}") for n, s in data.items()}


def ablated_json(
    done: Ablated,
    model: LoadedModel,
    prompts: Sequence[ProbingPrompt],
    value: AblationValue,
    config: RunConfig,
) -> dict[str, Any]:
    """Arrange the output of `ccm ablate`: what was run, and the results of every set."""
    return {
        "model": model.spec.name,
        "ablation_value": value.name,
        "protocol": config.protocol,
        "engine": done.engine,
        "work": done.work.as_dict(),
        "dtype": config.dtype,
        "device": model.device.type,
        "special_tokens": model.special_tokens,
        "first_prompt_tokens": done.tokens[0],
        "objects_with_splitter": split_columns(prompts),
        "nested_objects": nested_objects(prompts),
        "results": sets_json(done.tables, done.sets),
    }


def sets_json(
    tables: Mapping[str, pd.DataFrame], neurons: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, Any]]:
    """Arrange tables as the released outputs are: by set, a list per quantity."""
    return {
        name: {
            "neurons": list(neurons.get(name, ())),
            "output_texts": table["text"].tolist(),
            "knowledge_sources": table["source"].tolist(),
            "entropies": table["entropy"].tolist(),
            "ck_log_prob": table["log_prob_ck"].tolist(),
            "nd_log_prob": table["log_prob_nd"].tolist(),
            "pk_log_prob": table["log_prob_pk"].tolist(),
        }
        for name, table in tables.items()
    }

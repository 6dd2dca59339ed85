"""Tables of finished runs (Method 10)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd

from ccm.experiment.results import RunResults
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.differences import clusters, interval
from ccm.method.scores import ratio
from ccm.method.sources import SOURCES
from ccm.models.specs import MODELS
from ccm.reporting.breakdowns import entropy_changes, facts_of, relation_effects
from ccm.reporting.distinct_names import distinct_names
from ccm.reporting.table_formats import (
    DASH,
    Table,
    between,
    mean_of,
    nats,
    percent_of,
    save_table,
    with_count,
)

FOLDER = "latex_tables"
EXAMPLES = 2  # prompts per transition


def write_tables(runs: Sequence[RunResults], out: Path) -> list[Path]:
    """Write every table as .tex, .csv and .md.

    Args:
        runs: Finished runs; those of one model get names of their own.
        out: The folder; `latex_tables/` is made in it.

    Returns:
        Every path written.

    Raises:
        BadInput: two of them are the same run.
    """
    tables = tables_of(distinct_names(runs))
    return [path for table in tables for path in save_table(table, out / FOLDER / table.stem)]


def tables_of(runs: Sequence[RunResults]) -> list[Table]:
    """Make every table of some runs, in the order of the report."""
    return [
        transition_proportions(runs),
        transition_numbers(runs),
        gts_by_value(runs),
        intervals_over_facts(runs),
        entropy_by_transition(runs),
        relation_proportions(runs),
        model_dimensions(runs),
        changed_prompts(runs),
    ]


def _each_value(
    runs: Sequence[RunResults],
) -> Iterator[tuple[RunResults, str, dict[str, object], dict[str, object]]]:
    """Yield every run with each of its ablation values, and how its rows begin, as text and as data."""
    for run in runs:
        for value in run.values:
            told = {"model": run.display_name, "ablation": ABLATION_VALUES[value].symbol}
            yield run, value, {**told}, {"model": run.name, "ablation_value": value}


def transition_proportions(runs: Sequence[RunResults]) -> Table:
    """Transition scores in percent, entropy set and controls (the paper's Table 5)."""
    texts, data = [], []
    for run, value, told, known in _each_value(runs):
        scores = run.scores["ablations"][value]
        for source in SOURCES:
            own = scores["entropy"]["transition_scores"][source]
            controls = scores["controls"]["transition_scores"][source]
            texts.append(
                {**told, "from": source}
                | {f"entropy to {k}": percent_of(own[k]) for k in SOURCES}
                | {f"controls to {k}": mean_of(controls[k]) for k in SOURCES}
            )
            for k in SOURCES:
                data.append(
                    {**known, "from": source, "to": k}
                    | {name: own[k][name] for name in ("count", "total", "percent", "low", "high")}
                    | {f"controls_{name}": v for name, v in controls[k].items()}
                )
    return Table(
        "transition_scores_proportions",
        "Transition scores, percent of the prompts of a class before ablation. Entropy set: proportion "
        "with exact 95 % interval; controls: mean ± 3 standard errors. A dash: no prompt of the class.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def transition_numbers(runs: Sequence[RunResults]) -> Table:
    """Transition counts, entropy set and the controls' mean and range (the paper's Table 5)."""
    texts, data = [], []
    for run, value, told, known in _each_value(runs):
        scores = run.scores["ablations"][value]
        own, sets = scores["entropy"]["transition_counts"], scores["controls"]["sets"]
        for source in SOURCES:
            row = {**told, "from": source, "prompts": sum(own[source].values())}
            row |= {f"entropy to {k}": own[source][k] for k in SOURCES}
            for k in SOURCES:
                counts = [entry["transition_counts"][source][k] for entry in sets]
                mean, least, most = None, None, None
                if counts:
                    mean, least, most = float(np.mean(counts)), min(counts), max(counts)
                row[f"controls to {k}"] = DASH if mean is None else f"{mean:.1f} ({least} to {most})"
                data.append(
                    {**known, "from": source, "to": k, "count": own[source][k]}
                    | {"controls_mean": mean, "controls_least": least, "controls_most": most}
                )
            texts.append(row)
    return Table(
        "transition_scores_counts",
        "Transition counts, prompts. Controls: mean (least to most) over the control sets.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def gts_by_value(runs: Sequence[RunResults]) -> Table:
    """Global transition scores by ablation value with their Q-values (the paper's Table 6)."""
    texts, data = [], []
    for run, value, told, known in _each_value(runs):
        scores = run.scores["ablations"][value]
        own, controls = scores["entropy"], scores["controls"]["gts"]
        q, p, most = own["q_value"], own["permutation_p"], controls["high"]
        texts.append(
            {
                **told,
                "GTS": percent_of(own["gts"]),
                "changed": f"{own['gts']['count']}/{own['gts']['total']}",
                "controls": mean_of(controls),
                "largest control": DASH if most is None else f"{most:.1f}",
                "Q": DASH if q is None else f"{q:.1f}",
                "p": DASH if p is None else f"{p:.4f}",
            }
        )
        data.append(
            {**known, **own["gts"]}
            | {f"controls_{name}": v for name, v in controls.items()}
            | {"q_value": q, "permutation_p": p, "n_controls": scores["controls"]["n"]}
        )
    return Table(
        "ablation_value_wise_gts",
        "Global transition score (GTS), percent of prompts whose source changed, with its exact 95 % "
        "interval; controls: mean ± 3 standard errors; Q: quantile of the entropy set among the "
        "controls, 0 to 100; p: one-sided permutation test.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def intervals_over_facts(runs: Sequence[RunResults]) -> Table:
    """Exact intervals, which take prompts as independent, beside intervals over facts."""
    texts, data = [], []
    for run in runs:
        facts, before = facts_of(run.prompts), run.plain["source"].to_numpy(object)
        proportions = [("none", "", f"answers: {s}", before == s, before == before) for s in SOURCES]
        for value in run.values:
            after, symbol = run.ablated[value]["source"].to_numpy(object), ABLATION_VALUES[value].symbol
            proportions.append((symbol, value, "GTS", after != before, before == before))
            proportions.append((symbol, value, "CR(CK)", after == "CK", before != "CK"))
        for symbol, value, name, has, among in proportions:
            found = ratio(int((has & among).sum()), int(among.sum()))
            low, high, n = None, None, len(set(facts[among]))
            if found.total:
                drawn = clusters(facts[among].tolist()).means(has[among, None].astype(float))
                low, high = (100 * float(end[0]) for end in interval(drawn))
            row = {"model": run.display_name, "ablation": symbol, "quantity": name}
            over = DASH if low is None else f"[{low:.1f}, {high:.1f}]"
            texts.append({**row, "proportion": with_count(found), "over facts": over, "facts": n})
            data.append(
                {"model": run.name, "ablation_value": value, "quantity": name, **asdict(found)}
                | {"low_over_facts": low, "high_over_facts": high, "facts": n}
            )
    return Table(
        "intervals_over_facts",
        "How certain a proportion is. Its exact 95 % interval takes every prompt as an independent "
        "observation, but the prompts of one fact share the model's answer. Over facts: percentiles of "
        "a bootstrap that draws facts, with all their prompts. GTS and CR(CK): of the entropy set.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def entropy_by_transition(runs: Sequence[RunResults]) -> Table:
    """Change of entropy for each transition, entropy set and controls (Method 8)."""
    texts, data = [], []
    for run, value, told, known in _each_value(runs):
        for change in entropy_changes(run, value):
            controls = change.controls
            quartiles = (
                np.quantile(change.values, (0.25, 0.5, 0.75)).tolist()
                if len(change.values)
                else [None] * 3
            )
            texts.append(
                {
                    **told,
                    "transition": f"{change.before} → {change.after}",
                    "prompts": len(change.values),
                    "mean change": nats(change.mean),
                    "quartiles": between(nats(quartiles[0]), nats(quartiles[2])),
                    "controls": nats(controls.mean),
                    "controls' range": between(nats(controls.low), nats(controls.high)),
                    "control sets": change.control_sets,
                }
            )
            data.append(
                {**known, "from": change.before, "to": change.after}
                | {"prompts": len(change.values), "mean": change.mean}
                | dict(zip(("quartile_1", "median", "quartile_3"), quartiles, strict=True))
                | {f"controls_{name}": v for name, v in asdict(controls).items()}
                | {"control_sets": change.control_sets}
            )
    return Table(
        "entropy_by_transition",
        "Change of the next token's entropy at the last position of the prompt, before − after, nats; "
        "above 0: lower after ablation. Controls: mean and range of the control sets' means, over the "
        "control sets of which some prompt makes the transition. A dash: no prompt makes it.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def relation_proportions(runs: Sequence[RunResults]) -> Table:
    """GTS and CR(CK) relation by relation, entropy set and controls (Method 3, 8)."""
    texts, data = [], []
    for run, value, told, known in _each_value(runs):
        for effect in relation_effects(run, value):
            of = {"group": effect.group, "relation": effect.name, "prompts": effect.prompts}
            texts.append(
                {
                    **told,
                    **of,
                    "GTS": with_count(effect.gts),
                    "GTS, controls": mean_of(asdict(effect.gts_controls)),
                    "CR(CK)": with_count(effect.cr_ck),
                    "CR(CK), controls": mean_of(asdict(effect.cr_ck_controls)),
                }
            )
            row = known | of
            for name, own, controls in (
                ("gts", effect.gts, effect.gts_controls),
                ("cr_ck", effect.cr_ck, effect.cr_ck_controls),
            ):
                row |= {f"{name}_{key}": v for key, v in asdict(own).items()}
                row |= {f"{name}_controls_{key}": v for key, v in asdict(controls).items()}
            data.append(row)
    return Table(
        "relation_effects",
        "Effects relation by relation, percent: GTS of the prompts, CR(CK) of those that were not CK. "
        "Entropy set: proportion, count, exact 95 % interval; controls: mean ± 3 standard errors. A "
        "dash: no such prompt.",
        pd.DataFrame(texts),
        pd.DataFrame(data),
    )


def model_dimensions(runs: Sequence[RunResults]) -> Table:
    """Dimensions of the models (the paper's Table 4)."""
    rows: list[dict[str, object]] = []
    for run in runs:
        spec, d_model, d_mlp = MODELS.get(run.model), len(run.singular_values), len(run.measures)
        if spec is not None and (spec.d_model, spec.d_mlp) != (d_model, d_mlp):
            spec = None  # another model of other dimensions, under the name of a known one
        rows.append(
            {
                "model": run.display_name,
                "d_model": d_model,
                "d_mlp": d_mlp,
                "d_vocab": DASH if spec is None else spec.d_vocab,  # a run does not store these two
                "layers": DASH if spec is None else spec.n_layers,
                "null-space dimensions": int(run.identity["null_space_dims"]),
                "entropy neurons": len(run.entropy_neurons),
            }
        )
    table = pd.DataFrame(rows)
    caption = "Model dimensions. A dash: not stored by a run, and the model is not one that ccm names."
    return Table("model_dimensions", caption, table, table)


def changed_prompts(runs: Sequence[RunResults]) -> Table:
    """Examples of prompts whose source changed: the first of every transition, and how many did."""
    rows: list[tuple[object, ...]] = []
    columns = ["model", "ablation", "transition", "prompts", "prompt", "answer before", "answer after"]
    for run, value, told, _ in _each_value(runs):
        plain, ablated = run.plain, run.ablated[value]
        before, after = (cell["source"].to_numpy(object) for cell in (plain, ablated))
        for k, k2 in permutations(SOURCES, 2):
            moved = np.flatnonzero((before == k) & (after == k2))
            for i in moved[:EXAMPLES]:
                prompt = run.prompts["knowledge_probing_prompt"].iloc[i]
                answers = (cell["text"].iloc[i].strip() for cell in (plain, ablated))
                rows.append((*told.values(), f"{k} → {k2}", len(moved), prompt, *answers))
    caption = f"Prompts whose knowledge source changed, up to {EXAMPLES} per transition."
    if not rows:
        caption += " Here none changed."
    table = pd.DataFrame(rows, columns=columns)
    return Table("changed_prompts", caption, table, table, wide=tuple(columns[-3:]))

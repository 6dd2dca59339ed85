"""Tables of finished runs (Method 10)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ccm.experiment.results import RunResults
from ccm.experiment.writing import write_formats
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
    latex,
    markdown,
    mean_of,
    nats,
    percent_of,
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
    written = []
    for table in tables_of(distinct_names(runs)):
        texts = {
            "tex": latex(table),
            "csv": table.data.to_csv(index=False, lineterminator="\n"),
            "md": markdown(table),
        }
        # As bytes, so that no system translates the line ends.
        writers = {kind: partial(Path.write_bytes, data=text.encode()) for kind, text in texts.items()}
        written += write_formats(out / FOLDER / table.stem, writers)
    return written


def tables_of(runs: Sequence[RunResults]) -> list[Table]:
    """Make every table of some runs, in the order of the report."""
    return [
        transition_proportions(runs),
        transition_numbers(runs),
        gts_by_value(runs),
        intervals_over_facts(runs),
        entropy_by_transition(runs),
        relation_shares(runs),
        model_dimensions(runs),
        changed_prompts(runs),
    ]


def _each_value(runs: Sequence[RunResults]) -> list[tuple[RunResults, str, Mapping[str, Any]]]:
    return [(run, value, run.scores["ablations"][value]) for run in runs for value in run.values]


def transition_proportions(runs: Sequence[RunResults]) -> Table:
    """Transition scores in percent, entropy set and controls (the paper's Table 5)."""
    texts, data = [], []
    for run, value, scores in _each_value(runs):
        for source in SOURCES:
            own = scores["entropy"]["transition_scores"][source]
            controls = scores["controls"]["transition_scores"][source]
            row = {"model": run.display_name, "ablation": ABLATION_VALUES[value].symbol, "from": source}
            row |= {f"entropy to {k}": percent_of(own[k]) for k in SOURCES}
            row |= {f"controls to {k}": mean_of(controls[k]) for k in SOURCES}
            texts.append(row)
            for k in SOURCES:
                data.append(
                    {"model": run.name, "ablation_value": value, "from": source, "to": k}
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
    for run, value, scores in _each_value(runs):
        own = scores["entropy"]["transition_counts"]
        sets = scores["controls"]["sets"]
        for source in SOURCES:
            row: dict[str, object] = {
                "model": run.display_name,
                "ablation": ABLATION_VALUES[value].symbol,
                "from": source,
                "prompts": sum(own[source].values()),
            }
            row |= {f"entropy to {k}": own[source][k] for k in SOURCES}
            for k in SOURCES:
                counts = np.asarray([entry["transition_counts"][source][k] for entry in sets])
                few = {"mean": None, "least": None, "most": None}
                found = (
                    {
                        "mean": float(counts.mean()),
                        "least": int(counts.min()),
                        "most": int(counts.max()),
                    }
                    if len(counts)
                    else few
                )
                row[f"controls to {k}"] = (
                    f"{found['mean']:.1f} ({found['least']} to {found['most']})" if len(counts) else "–"
                )
                data.append(
                    {"model": run.name, "ablation_value": value, "from": source, "to": k}
                    | {"count": own[source][k]}
                    | {f"controls_{name}": v for name, v in found.items()}
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
    for run, value, scores in _each_value(runs):
        own, controls = scores["entropy"], scores["controls"]["gts"]
        q, p, most = own["q_value"], own["permutation_p"], controls["high"]
        texts.append(
            {
                "model": run.display_name,
                "ablation": ABLATION_VALUES[value].symbol,
                "GTS": percent_of(own["gts"]),
                "changed": f"{own['gts']['count']}/{own['gts']['total']}",
                "controls": mean_of(controls),
                "largest control": "–" if most is None else f"{most:.1f}",
                "Q": "–" if q is None else f"{q:.1f}",
                "p": "–" if p is None else f"{p:.4f}",
            }
        )
        data.append(
            {"model": run.name, "ablation_value": value}
            | dict(own["gts"])
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
        shares = [("none", "", f"answers: {s}", before == s, before == before) for s in SOURCES]
        for value in run.values:
            after, symbol = run.ablated[value]["source"].to_numpy(object), ABLATION_VALUES[value].symbol
            shares.append((symbol, value, "GTS", after != before, before == before))
            shares.append((symbol, value, "CR(CK)", after == "CK", before != "CK"))
        for symbol, value, name, has, among in shares:
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
    for run, value, _ in _each_value(runs):
        for change in entropy_changes(run, value):
            controls = change.controls
            quartiles = (
                np.quantile(change.values, (0.25, 0.5, 0.75)).tolist()
                if len(change.values)
                else [None] * 3
            )
            texts.append(
                {
                    "model": run.display_name,
                    "ablation": ABLATION_VALUES[value].symbol,
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
                {"model": run.name, "ablation_value": value, "from": change.before, "to": change.after}
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


def relation_shares(runs: Sequence[RunResults]) -> Table:
    """GTS and CR(CK) relation by relation, entropy set and controls (Method 3, 8)."""
    texts, data = [], []
    for run, value, _ in _each_value(runs):
        for effect in relation_effects(run, value):
            texts.append(
                {
                    "model": run.display_name,
                    "ablation": ABLATION_VALUES[value].symbol,
                    "group": effect.group,
                    "relation": effect.name,
                    "prompts": effect.prompts,
                    "GTS": with_count(effect.gts),
                    "GTS, controls": mean_of(asdict(effect.gts_controls)),
                    "CR(CK)": with_count(effect.cr_ck),
                    "CR(CK), controls": mean_of(asdict(effect.cr_ck_controls)),
                }
            )
            row: dict[str, object] = {"model": run.name, "ablation_value": value}
            row |= {"group": effect.group, "relation": effect.name, "prompts": effect.prompts}
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
                "d_vocab": "–" if spec is None else spec.d_vocab,  # a run does not store these two
                "layers": "–" if spec is None else spec.n_layers,
                "null-space dimensions": int(run.identity["null_space_dims"]),
                "entropy neurons": len(run.entropy_neurons),
            }
        )
    table = pd.DataFrame(rows)
    caption = "Model dimensions. A dash: not stored by a run, and the model is not one that ccm names."
    return Table("model_dimensions", caption, table, table)


def changed_prompts(runs: Sequence[RunResults]) -> Table:
    """Examples of prompts whose source changed: the first of every transition, and how many did."""
    rows: list[dict[str, object]] = []
    columns = ["model", "ablation", "transition", "prompts", "prompt", "answer before", "answer after"]
    for run, value, _ in _each_value(runs):
        before = run.plain["source"].to_numpy(object)
        after = run.ablated[value]["source"].to_numpy(object)
        for k in SOURCES:
            for k2 in SOURCES:
                moved = np.flatnonzero((before == k) & (after == k2)) if k != k2 else np.zeros(0, int)
                for i in moved[:EXAMPLES]:
                    cells = (
                        run.display_name,
                        ABLATION_VALUES[value].symbol,
                        f"{k} → {k2}",
                        len(moved),
                        run.prompts["knowledge_probing_prompt"].iloc[i],
                        run.plain["text"].iloc[i].strip(),
                        run.ablated[value]["text"].iloc[i].strip(),
                    )
                    rows.append(dict(zip(columns, cells, strict=True)))
    caption = f"Prompts whose knowledge source changed, up to {EXAMPLES} per transition."
    if not rows:
        caption += " Here none changed."
    table = pd.DataFrame(rows, columns=columns)
    return Table("changed_prompts", caption, table, table, wide=tuple(columns[-3:]))

"""Every cell that a table shows, in LaTeX, Markdown, HTML and CSV, is what the run's cells hold."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ccm.experiment.results import RunResults, read_results
from ccm.models.specs import MODELS
from ccm.reporting import report
from ccm.reporting.report import write_report
from ccm.reporting.tables import FOLDER, model_dimensions, tables_of, write_tables
from tests.counted import SOURCES, Counted, Others, Part, others, part
from tests.distinct_run import distinct_runs
from tests.made_runs import make_run
from tests.shown import Rows, from_html, from_latex, from_markdown, in_words, mean_and_highest

SYMBOLS = {
    "mean_ablation": "μ",
    "median_ablation": "median",
    "mode_ablation": "mode",
    "mean_minus_sigma_ablation": "μ − 3 σ",
    "mean_plus_sigma_ablation": "μ + 3 σ",
}
WORDS = {value: symbol.replace("3 ", "3") for value, symbol in SYMBOLS.items()}
WORDS["mean_ablation"] = "mean (μ)"
STEMS = (
    "transition_scores_proportions",
    "transition_scores_counts",
    "ablation_value_wise_gts",
    "intervals_over_facts",
    "entropy_by_transition",
    "relation_effects",
    "model_dimensions",
    "changed_prompts",
)
# Runs in which something is missing: the same cells, some of them dashes.
EDGES: dict[str, dict[str, object]] = {
    "no ND and no controls": {"before": ("CK", "PK"), "controls": 0},
    "all CK": {"before": ("CK",)},
    "one control": {"controls": 1},
    "nothing moves": {"moved": 0.0},
}


# --- how numbers are written ------------------------------------------------------------------------


def one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def interval(r: Part) -> str:
    return "–" if r.percent is None else f"{r.percent:.1f} [{r.low:.1f}, {r.high:.1f}]"


def interval_and_count(r: Part) -> str:
    words = interval(r)
    return words if r.percent is None else words.replace(" [", f" ({r.count}/{r.total}) [")


def mean_and_error(c: Others) -> str:
    return one(c.mean) + ("" if c.error is None else f" ± {c.error:.1f}")


def nats(value: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


# --- what each table should show --------------------------------------------------------------------


def proportions(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for k in SOURCES:
        pairs = {j: run.ts(value, k, j) for j in SOURCES}
        yield {
            "from": k,
            **{f"entropy to {j}": interval(own) for j, (own, _) in pairs.items()},
            **{f"controls to {j}": mean_and_error(rest) for j, (_, rest) in pairs.items()},
        }


def numbers(run: Counted, value: str) -> Iterator[dict[str, object]]:
    own, sets = run.counts(value), run.of_sets(value, "control")
    for k in SOURCES:
        found = {j: [c[k, j] for c in sets] for j in SOURCES}
        yield {
            "from": k,
            "prompts": (run.plain["source"] == k).sum(),
            **{f"entropy to {j}": own[k, j] for j in SOURCES},
            **{
                f"controls to {j}": f"{sum(n) / len(n):.1f} ({min(n)} to {max(n)})" if n else "–"
                for j, n in found.items()
            },
        }


def gts(run: Counted, value: str) -> Iterator[dict[str, object]]:
    own, controls = run.gts(value)
    p = run.p(value)
    yield {
        "GTS": interval(own),
        "changed": f"{own.count}/{own.total}",
        "controls": mean_and_error(controls),
        "largest control": one(controls.high),
        "Q": one(run.q(value)),
        "p": "–" if p is None else f"{p:.4f}",
    }


def entropies(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for k in SOURCES:
        for j in SOURCES:
            change = run.entropy_change(value, k, j)
            own, means = run.entropy_means(value, k, j)
            ends = (25, 75) if len(change) else ()
            yield {
                "transition": f"{k} → {j}",
                "prompts": len(change),
                "mean change": nats(own),
                "quartiles": " to ".join(nats(float(np.percentile(change, q))) for q in ends) or "–",
                "controls": nats(sum(means) / len(means) if means else None),
                "controls' range": f"{nats(min(means))} to {nats(max(means))}" if means else "–",
                "control sets": len(means),
            }


def relations(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for name, group, of in run.parts("rel_lemma"):
        (own_gts, all_gts), (own_cr, all_cr) = run.gts(value, of=of), run.cr(value, "CK", of=of)
        yield {
            "group": group,
            "relation": name,
            "prompts": of.sum(),
            "GTS": interval_and_count(own_gts),
            "GTS, controls": mean_and_error(all_gts),
            "CR(CK)": interval_and_count(own_cr),
            "CR(CK), controls": mean_and_error(all_cr),
        }


def changes(run: Counted, value: str) -> Iterator[dict[str, object]]:
    before, after = run.plain, run.cells[value]["entropy"]
    for k in SOURCES:
        for j in SOURCES:
            made = [i for i in range(run.n) if (before["source"][i], after["source"][i]) == (k, j)]
            for i in made[:2] if k != j else []:
                yield {
                    "transition": f"{k} → {j}",
                    "prompts": len(made),
                    "prompt": run.prompts["knowledge_probing_prompt"][i],
                    "answer before": before["text"][i],
                    "answer after": after["text"][i],
                }


def over_facts(run: Counted) -> Iterator[dict[str, object]]:
    """Of the whole run, and of every ablation value."""
    fact = run.prompts["statement_subject"] + " / " + run.prompts["rel_lemma"]
    before = run.plain["source"]
    every = before != ""
    shares = [("none", f"answers: {k}", before == k, every) for k in SOURCES]
    for value in run.values:
        after = run.cells[value]["entropy"]["source"]
        shares.append((SYMBOLS[value], "GTS", after != before, every))
        shares.append((SYMBOLS[value], "CR(CK)", after == "CK", before != "CK"))
    for symbol, quantity, has, among in shares:
        of_fact = pd.DataFrame({"fact": fact[among], "has": has[among]}).groupby("fact", sort=False)
        counts, sizes = of_fact["has"].sum().to_numpy(), of_fact.size().to_numpy()
        over = "–"
        if len(sizes):
            even = np.full(len(sizes), 1 / len(sizes))
            drawn = np.random.default_rng(0).multinomial(len(sizes), even, 2000)
            low, high = np.percentile(100 * (drawn @ counts) / (drawn @ sizes), [2.5, 97.5])
            over = f"[{low:.1f}, {high:.1f}]"
        yield {
            "ablation": symbol,
            "quantity": quantity,
            "proportion": interval_and_count(part(int((has & among).sum()), int(among.sum()))),
            "over facts": over,
            "facts": len(sizes),
        }


OF_RUN = (*(proportions, numbers, gts, over_facts, entropies, relations, None, changes),)
OF_VALUES = dict(zip(STEMS, OF_RUN, strict=True))


def expected(runs: list[Counted]) -> dict[str, Rows]:
    """What every table shows, by its stem."""
    found: dict[str, Rows] = {}
    for stem, rows_of in OF_VALUES.items():
        rows: list[dict[str, object]] = []
        for run in runs:
            if rows_of is None:
                spectrum = pd.read_parquet(run.path / "singular_values.parquet")
                row = {
                    "model": run.name,
                    "d_model": len(spectrum),
                    "d_mlp": len(run.measures),
                    "d_vocab": "–",
                    "layers": "–",
                    "null-space dimensions": run.identity["null_space_dims"],
                    "entropy neurons": len(run.manifest["sets"]["entropy"]),
                }
                rows.append(row)
                continue
            if rows_of is over_facts:
                rows += [{"model": run.name} | row for row in over_facts(run)]
                continue
            for value in run.values:
                head = {"model": run.name, "ablation": SYMBOLS[value]}
                rows += [head | row for row in rows_of(run, value)]
        found[stem] = as_text(rows)
    return found


def key_numbers(runs: list[Counted]) -> Rows:
    rows = []
    for run in runs:
        for value in run.values:
            (own_gts, all_gts), (own_cr, all_cr) = run.gts(value), run.cr(value, "CK")
            q, p = run.q(value), run.p(value)
            rows.append(
                {
                    "model": run.name,
                    "ablation value": WORDS[value],
                    "GTS": in_words(own_gts),
                    "GTS of controls": mean_and_highest(all_gts),
                    "Q": "-" if q is None else f"{q:.1f}",
                    "p": "-" if p is None else f"{p:.4f}",
                    "CR(CK)": in_words(own_cr),
                    "CR(CK) of controls": mean_and_highest(all_cr),
                }
            )
    return as_text(rows)


def as_text(rows: list[dict[str, object]]) -> Rows:
    """White space is no matter of LaTeX, nor of Markdown or HTML."""
    return [{column: " ".join(str(cell).split()) for column, cell in row.items()} for row in rows]


# --- the runs, and that no two of their numbers are alike --------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Counted]:
    return [Counted(path) for path in distinct_runs(tmp_path_factory)]


@pytest.fixture(scope="module")
def results(runs: list[Counted]) -> list[RunResults]:
    return [read_results(run.path) for run in runs]


@pytest.fixture(scope="module")
def wanted(runs: list[Counted]) -> dict[str, Rows]:
    return expected(runs)


@pytest.fixture(scope="module")
def written(results: list[RunResults], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of both without its figures, and its tables; read-only."""
    out = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda entries, out, processes: iter(()))
        write_report(results, out)
    return out


NAMES = {"model", "ablation", "ablation value", "group", "relation", "from", "transition"}
NAMES |= {"quantity", "prompt", "answer before", "answer after"}
# Columns that a run's ablation values have in common, or whose numbers are small.
ALIKE = {"prompts", "control sets", "null-space dimensions", "facts"}


def test_no_two_numbers_are_alike(wanted: dict[str, Rows], runs: list[Counted]) -> None:
    """Or a table that shows the wrong one would pass."""
    for stem, rows in {**wanted, "key numbers": key_numbers(runs)}.items():
        for row in rows:
            shown = {name: cell for name, cell in row.items() if name not in {*NAMES, "control sets"}}
            cells = [cell for cell in shown.values() if cell not in ("–", "-", "- (0/0)")]
            assert len(cells) == len(set(cells)), f"{stem}: {row}"
        for name in set(rows[0]) - NAMES - ALIKE - {"Q", "p"}:
            cells = [row[name] for row in rows if len(row[name]) > 4]
            assert len(set(cells)) >= 0.8 * len(cells), f"{stem}, {name}: {sorted(cells)}"
    (q,), (p,) = ([[row[name] for row in wanted["ablation_value_wise_gts"]]] for name in ("Q", "p"))
    assert min(len(set(q)), len(set(p))) >= 3
    for a, b in combinations(runs, 2):
        assert a.n != b.n
    for run in runs:
        sizes = run.plain["source"].value_counts()
        assert sizes.is_unique
        assert len({of.sum() for _, _, of in run.parts("rel_lemma")}) == 6


# --- each form ----------------------------------------------------------------------------------------


def test_every_table_is_there(written: Path) -> None:
    folder = written / "figures" / FOLDER
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{stem}.{suffix}" for stem in STEMS for suffix in ("tex", "csv", "md")
    )


@pytest.mark.parametrize("stem", STEMS)
def test_latex_and_markdown_show_the_cells(stem: str, written: Path, wanted: dict[str, Rows]) -> None:
    folder = written / "figures" / FOLDER
    assert from_latex((folder / f"{stem}.tex").read_text(encoding="utf-8")) == wanted[stem]
    (found,) = from_markdown((folder / f"{stem}.md").read_text(encoding="utf-8"))
    assert found == wanted[stem]


def test_the_report_shows_the_same_tables_and_the_key_numbers(
    written: Path, wanted: dict[str, Rows], runs: list[Counted]
) -> None:
    tables = from_html((written / report.HTML).read_text(encoding="utf-8"))
    html = [as_text(list(table.rows)) for table in tables]  # type: ignore[arg-type]
    markdown = from_markdown((written / report.MARKDOWN).read_text(encoding="utf-8"))
    for found in (html, markdown):
        assert found[0] == key_numbers(runs)
        assert dict(zip(STEMS, found[-len(STEMS) :], strict=True)) == wanted
    captions = dict(zip(STEMS, (table.caption for table in tables[-len(STEMS) :]), strict=True))
    assert [*captions.values()] == [as_text([{"": t.caption}])[0][""] for t in tables_of_(runs)]
    assert "up to 2 per transition" in captions["changed_prompts"]


def tables_of_(runs: list[Counted]) -> list[object]:
    return tables_of([read_results(run.path) for run in runs])  # type: ignore[return-value]


@pytest.mark.parametrize("edge", EDGES)
def test_a_dash_stands_where_there_is_no_number(edge: str, tmp_path: Path) -> None:
    make_run(tmp_path / "run", **EDGES[edge])  # type: ignore[arg-type]
    wanted = expected([Counted(tmp_path / "run")])
    write_tables([read_results(tmp_path / "run")], tmp_path)
    for stem, rows in wanted.items():
        for suffix, read in (("tex", from_latex), ("md", lambda text: from_markdown(text)[0])):
            text = (tmp_path / FOLDER / f"{stem}.{suffix}").read_text(encoding="utf-8")
            assert read(text) == rows, f"{stem}.{suffix}"
    dashes = sum(cell == "–" for rows in wanted.values() for row in rows for cell in row.values())
    assert dashes > 3


def test_dimensions_of_a_published_model_are_the_papers(results: list[RunResults]) -> None:
    run, spec = results[0], MODELS["gpt2-small"]
    whole = dataclasses.replace(
        run,
        singular_values=np.ones(768),
        measures=pd.concat([run.measures] * 80, ignore_index=True).iloc[:3072],
    )
    (row,) = model_dimensions([whole]).texts.to_dict("records")
    assert (row["d_vocab"], row["layers"]) == (50257, 12) == (spec.d_vocab, spec.n_layers)
    assert (row["d_model"], row["d_mlp"]) == (768, 3072)


def test_a_stand_in_under_a_published_name_has_not_the_papers_dimensions(
    results: list[RunResults],
) -> None:
    (row,) = model_dimensions([results[0]]).texts.to_dict("records")
    assert (row["d_model"], row["d_mlp"]) == (12, 40)
    assert (row["d_vocab"], row["layers"]) == ("–", "–"), "those of a model with other weights"


# --- the numbers in full, for CSV ---------------------------------------------------------------------


def in_full(prefix: str, r: Part) -> dict[str, object]:
    return {f"{prefix}{name}": value for name, value in vars(r).items()}


def controls_in_full(c: Others, prefix: str = "controls_") -> dict[str, object]:
    return {
        f"{prefix}mean": c.mean,
        f"{prefix}three_standard_errors": c.error,
        f"{prefix}low": c.low,
        f"{prefix}high": c.high,
        f"{prefix}entropy_quantile": c.rank,
    }


def data_of_proportions(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for k in SOURCES:
        for j in SOURCES:
            own, controls = run.ts(value, k, j)
            yield {"from": k, "to": j} | in_full("", own) | controls_in_full(controls)


def data_of_numbers(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for k in SOURCES:
        for j in SOURCES:
            n = [c[k, j] for c in run.of_sets(value, "control")]
            yield {
                "from": k,
                "to": j,
                "count": run.counts(value)[k, j],
                "controls_mean": sum(n) / len(n),
                "controls_least": min(n),
                "controls_most": max(n),
            }


def data_of_gts(run: Counted, value: str) -> Iterator[dict[str, object]]:
    own, controls = run.gts(value)
    ranks = {"q_value": run.q(value), "permutation_p": run.p(value)}
    yield in_full("", own) | controls_in_full(controls) | ranks | {"n_controls": 9}


def data_of_entropies(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for k in SOURCES:
        for j in SOURCES:
            change, (own, means) = run.entropy_change(value, k, j), run.entropy_means(value, k, j)
            yield {
                "from": k,
                "to": j,
                "prompts": len(change),
                "mean": own,
                "quartile_1": np.percentile(change, 25),
                "median": np.percentile(change, 50),
                "quartile_3": np.percentile(change, 75),
                **controls_in_full(others(own, [*means])),
                "control_sets": len(means),
            }


def data_of_relations(run: Counted, value: str) -> Iterator[dict[str, object]]:
    for name, group, of in run.parts("rel_lemma"):
        found = {"group": group, "relation": name, "prompts": of.sum()}
        for word, (own, rest) in (
            ("gts", run.gts(value, of=of)),
            ("cr_ck", run.cr(value, "CK", of=of)),
        ):
            found |= in_full(f"{word}_", own) | controls_in_full(rest, f"{word}_controls_")
        yield found


DATA: dict[str, Callable[[Counted, str], Iterator[dict[str, object]]]] = {
    "transition_scores_proportions": data_of_proportions,
    "transition_scores_counts": data_of_numbers,
    "ablation_value_wise_gts": data_of_gts,
    "entropy_by_transition": data_of_entropies,
    "relation_effects": data_of_relations,
}


@pytest.mark.parametrize("stem", DATA)
def test_csv_holds_the_numbers_in_full(stem: str, written: Path, runs: list[Counted]) -> None:
    rows = [
        {"model": run.model, "ablation_value": value, **row}
        for run in runs
        for value in run.values
        for row in DATA[stem](run, value)
    ]
    found = pd.read_csv(written / "figures" / FOLDER / f"{stem}.csv")
    assert [*found.columns] == [*rows[0]]
    for got, want in zip(found.to_dict("records"), rows, strict=True):
        numbers = {c for c, v in want.items() if not isinstance(v, str)}
        assert {c: got[c] for c in want if c not in numbers} == {
            c: v for c, v in want.items() if c not in numbers
        }
        assert {c: got[c] for c in numbers} == pytest.approx(
            {c: np.nan if want[c] is None else float(want[c]) for c in numbers},  # type: ignore[arg-type]
            rel=1e-9,
            abs=1e-12,
            nan_ok=True,
        )


def test_what_is_read_back_is_what_is_written() -> None:
    """The readers of this file, on tables written by hand."""
    tex = r"""\toprule a\_b & c \\ \midrule
1 {[}2, 3{]} & x \& $-$4 \\
5 $\pm$ 6 & -- \\
\bottomrule \newpage \toprule a\_b & c \\ \midrule
7 & 8 \\
\bottomrule"""
    rows = [{"a_b": "1 [2, 3]", "c": "x & −4"}, {"a_b": "5 ± 6", "c": "–"}, {"a_b": "7", "c": "8"}]
    assert from_latex(tex) == rows
    md = "x\n\n| a\\_b | c |\n| --- | --- |\n| 1 \\[2\\] | x \\| y |\n\nz\n| d |\n| --- |\n| e |\n"
    assert from_markdown(md) == [[{"a_b": "1 [2]", "c": "x | y"}], [{"d": "e"}]]
    (table,) = from_html(
        "<p>1</p><table><caption><span>s &amp;</span> t</caption><tr><th>a</th><th>b</th></tr>"
        "<tr><th>&lt;1</th><td>2</td></tr></table>"
    )
    assert (table.caption, table.rows) == ("s & t", [{"a": "<1", "b": "2"}])
    assert not re.search("nan", md)

"""Tables: the scores' numbers, in LaTeX that compiles, CSV and Markdown."""

import io
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from ccm.experiment.results import RunResults, read_results
from ccm.method.differences import clusters, interval
from ccm.method.sources import SOURCES
from ccm.reporting.breakdowns import relation_effects
from ccm.reporting.markup import escape_latex
from ccm.reporting.table_formats import Table, latex, markdown
from ccm.reporting.tables import (
    changed_prompts,
    entropy_by_transition,
    gts_by_value,
    intervals_over_facts,
    model_dimensions,
    relation_proportions,
    tables_of,
    transition_numbers,
    transition_proportions,
    write_tables,
)
from tests.made_runs import make_run
from tests.needs import PDFLATEX

HARD = ' 50 % of $x_1 & {y} #3 ~^ \\end{tabular} | <b> "é" Ωμ 中 Łódź [--] `q\\n--'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResults:
    """A run whose answers hold everything LaTeX and Markdown trip over; read-only."""
    path = tmp_path_factory.mktemp("tables") / "run"
    make_run(path, values=("mean_ablation", "mean_minus_sigma_ablation"), text=HARD)
    return read_results(path)


def test_proportions_are_the_scores(run: RunResults) -> None:
    table = transition_proportions([run])
    assert len(table.texts) == 2 * 3
    assert len(table.data) == 2 * 9
    for row in table.data.to_dict("records"):
        scores = run.scores["ablations"][row["ablation_value"]]
        own = scores["entropy"]["transition_scores"][row["from"]][row["to"]]
        assert {name: row[name] for name in own} == own
        assert (
            row["controls_mean"]
            == scores["controls"]["transition_scores"][row["from"]][row["to"]]["mean"]
        )
    own = run.scores["ablations"]["mean_ablation"]["entropy"]["transition_scores"]["CK"]["ND"]
    text = f"{own['percent']:.1f} [{own['low']:.1f}, {own['high']:.1f}]"
    assert table.texts["entropy to ND"].iloc[0] == text


def test_counts_are_the_scores(run: RunResults) -> None:
    table = transition_numbers([run])
    for row in table.data.to_dict("records"):
        scores = run.scores["ablations"][row["ablation_value"]]
        assert row["count"] == scores["entropy"]["transition_counts"][row["from"]][row["to"]]
        controls = [s["transition_counts"][row["from"]][row["to"]] for s in scores["controls"]["sets"]]
        assert row["controls_mean"] == pytest.approx(sum(controls) / len(controls))
        assert (row["controls_least"], row["controls_most"]) == (min(controls), max(controls))
    assert table.texts["prompts"].sum() == 2 * len(run.prompts)


def test_gts_and_q_are_the_scores(run: RunResults) -> None:
    for row in gts_by_value([run]).data.to_dict("records"):
        own = run.scores["ablations"][row["ablation_value"]]["entropy"]
        assert row["percent"] == own["gts"]["percent"]
        assert (row["q_value"], row["permutation_p"]) == (own["q_value"], own["permutation_p"])


def test_intervals_over_facts_are_those_of_the_facts_that_were_drawn(run: RunResults) -> None:
    table = intervals_over_facts([run])
    scores, before = run.scores, run.plain["source"].to_numpy()
    subjects = run.prompts[["statement_subject", "rel_lemma"]].apply(tuple, axis=1).to_numpy()
    assert len(table.data) == len(table.texts) == 3 + 2 * 2
    for row, shown in zip(table.data.to_dict("records"), table.texts.to_dict("records"), strict=True):
        if row["quantity"].startswith("answers"):
            source = row["quantity"].removeprefix("answers: ")
            own, has, among = scores["sources"][source], before == source, before != ""
        else:
            entropy = scores["ablations"][row["ablation_value"]]["entropy"]
            after = run.ablated[row["ablation_value"]]["source"].to_numpy()
            if row["quantity"] == "GTS":
                own, has, among = entropy["gts"], after != before, before != ""
            else:
                own, has, among = entropy["conversion_ratios"]["CK"], after == "CK", before != "CK"
        assert {name: row[name] for name in own} == own
        assert row["facts"] == shown["facts"] == len(set(subjects[among]))
        ends = interval(clusters(subjects[among].tolist()).means(has[among, None].astype(float)))
        low, high = (100 * float(end[0]) for end in ends)
        assert (row["low_over_facts"], row["high_over_facts"]) == pytest.approx((low, high))
        assert shown["over facts"] == f"[{low:.1f}, {high:.1f}]"
        assert low - 1e-9 <= row["percent"] <= high + 1e-9


def test_relations_are_those_of_the_figures(run: RunResults) -> None:
    table = relation_proportions([run])
    effects = [(v, e) for v in run.values for e in relation_effects(run, v)]
    for row, shown, (value, effect) in zip(
        table.data.to_dict("records"), table.texts.to_dict("records"), effects, strict=True
    ):
        assert (row["ablation_value"], row["relation"], row["group"]) == (
            value,
            effect.name,
            effect.group,
        )
        if effect.prompts:
            assert row["gts_percent"] == effect.gts.percent
            assert row["cr_ck_controls_mean"] == effect.cr_ck_controls.mean
            assert f"({effect.cr_ck.count}/{effect.cr_ck.total})" in shown["CR(CK)"]
        else:
            assert (shown["prompts"], shown["GTS"], shown["CR(CK), controls"]) == (0, "–", "–")
    assert sum(effect.prompts == 0 for _, effect in effects) == 2


def test_entropy_changes_are_the_scores(run: RunResults) -> None:
    table = entropy_by_transition([run])
    assert len(table.texts) == 2 * 9
    for row, shown in zip(table.data.to_dict("records"), table.texts.to_dict("records"), strict=True):
        scores = run.scores["ablations"][row["ablation_value"]]
        mean = scores["entropy"]["entropy_difference"][row["from"]][row["to"]]
        controls = scores["controls"]["entropy_difference"][row["from"]][row["to"]]
        assert row["prompts"] == scores["entropy"]["transition_counts"][row["from"]][row["to"]]
        if mean is None:
            assert shown["mean change"] == shown["quartiles"] == "–"
        else:
            assert row["mean"] == pytest.approx(mean)
            assert float(shown["mean change"].replace("−", "-")) == round(mean, 3)
            assert row["quartile_1"] <= row["median"] <= row["quartile_3"]
        if controls["mean"] is not None:
            assert row["controls_mean"] == controls["mean"]
            assert row["controls_low"] <= controls["mean"] <= row["controls_high"]


def test_a_table_too_long_for_a_page_has_several() -> None:
    rows = pd.DataFrame({"model": ["m"] * 1000, "n": range(1000)})
    text = latex(Table("t", "long", rows, rows))
    pages = text.split("\\newpage")
    assert len(pages) == 3
    for page in pages:
        assert page.count("\\begin{tabular}") == page.count("\\toprule") == 1
    assert [n for n in range(1000) if text.count(f"m & {n} ") != 1] == [], "not there, or twice"
    (height,) = re.findall(r"paperheight=([0-9.]+)cm", text)
    assert 1000 / 3 * 0.35 < float(height) < 575, "TeX knows no length above 575 cm"
    few = rows.iloc[:400]
    assert "newpage" not in latex(Table("t", "fits", few, few))


def test_a_page_has_room_for_texts_that_wrap() -> None:
    def height(text: str) -> float:
        rows = pd.DataFrame({"model": ["m"], "n": [1], "text": [text]})
        (found,) = re.findall(r"paperheight=([0-9.]+)cm", latex(Table("t", "c", rows, rows, ("text",))))
        return float(found)

    # Thirty letters fill a line of 6 cm, and a line is 0.41 cm high.
    assert height("a" * 300) == pytest.approx(height("a") + 10 * 0.41, abs=0.11)


def test_dimensions_are_the_runs(run: RunResults) -> None:
    (row,) = model_dimensions([run]).texts.to_dict("records")
    assert row["d_model"] == len(run.singular_values)
    assert row["d_mlp"] == len(run.measures)
    assert row["entropy neurons"] == 3
    assert row["layers"] == "–", "a folder's layers are not stored"


def test_examples_did_change(run: RunResults) -> None:
    table = changed_prompts([run]).texts
    assert len(table) > 0
    for row in table.to_dict("records"):
        before, after = row["transition"].split(" → ")
        assert before != after
        value = "mean_ablation" if row["ablation"] == "μ" else "mean_minus_sigma_ablation"
        prompts = run.prompts["knowledge_probing_prompt"]
        (i,) = prompts.index[prompts == row["prompt"]]
        assert run.plain["source"].iloc[i] == before
        assert run.ablated[value]["source"].iloc[i] == after
        counts = run.scores["ablations"][value]["entropy"]["transition_counts"]
        assert row["prompts"] == counts[before][after]


@pytest.mark.parametrize(
    "options", [{"moved": 0.0}, {"before": ("CK",)}, {"controls": 0}, {"controls": 1}, {"k": 1}]
)
def test_edge_cases_have_tables(tmp_path: Path, options: dict[str, object]) -> None:
    make_run(tmp_path, **options)  # type: ignore[arg-type]
    tables = tables_of([read_results(tmp_path)])
    for table in tables:
        for text in (latex(table), markdown(table)):
            assert "nan" not in text.lower().split()
            assert "None" not in text
    assert ("Here none changed" in tables[-1].caption) == (options.get("moved") == 0.0)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("50 % & $x_1", r"50 \% \& \char36{}x\_1"),
        ("\\{}#", r"\textbackslash{}\{\}\#"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("é", r"\'{e}"),
        ("e\u0301", r"\'{e}"),
        ("Šø", r"\v{S}\o{}"),
        ("中", "{[}U+4E2D{]}"),
        ("\u200b\n\x07", "{[}U+200B{]}  "),
        ("--", "{-}{-}"),
        ("ế", "{[}U+1EBF{]}"),
        ("[1]*", "{[}1{]}{*}"),
        ('"`', "''{`}"),
    ],
)
def test_latex_is_escaped(text: str, escaped: str) -> None:
    assert escape_latex(text) == escaped


def test_a_table_in_latex_has_as_many_cells_as_columns(run: RunResults) -> None:
    for table in tables_of([run]):
        text = latex(table)
        assert text.isascii()
        assert text.count("{") == text.count("}"), table.stem
        body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
        assert len(body) == len(table.texts)
        for line in body:
            cells = line.removesuffix(r" \\").replace(r"\&", "").split(" & ")
            assert len(cells) == len(table.texts.columns), line


@PDFLATEX.mark()
def test_latex_compiles(run: RunResults, tmp_path: Path) -> None:
    for path in write_tables([run], tmp_path):
        if path.suffix == ".tex":
            command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", path.name]
            done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-2000:]
            assert "Overfull" not in done.stdout, f"{path.name}: wider than its page"


def test_a_line_of_markdown_is_a_row(run: RunResults) -> None:
    for table in tables_of([run]):
        lines = markdown(table).splitlines()[2:]
        assert len(lines) == len(table.texts) + 2
        for line in lines:
            assert line.replace("\\|", "").count("|") == len(table.texts.columns) + 1


def test_csv_reads_back_in_full(run: RunResults, tmp_path: Path) -> None:
    paths = write_tables([run], tmp_path)
    assert [p.name for p in paths[:3]] == [
        f"transition_scores_proportions.{suffix}" for suffix in ("tex", "csv", "md")
    ]
    read = pd.read_csv(paths[1])
    pd.testing.assert_frame_equal(read, transition_proportions([run]).data, check_dtype=False)
    again = {p: p.read_bytes() for p in paths}
    write_tables([run], tmp_path)
    assert {p: p.read_bytes() for p in paths} == again


def test_a_model_name_is_escaped() -> None:
    data = pd.DataFrame({"model": ["a_b"], "n": [1]})
    table = Table("t", "100 %", data, data)
    assert r"a\_b" in latex(table)
    assert r"100 \%" in latex(table)
    assert "a\\_b" in markdown(table)
    assert pd.read_csv(io.StringIO(table.data.to_csv(index=False)))["model"][0] == "a_b"
    assert SOURCES == ("CK", "ND", "PK"), "the order of the tables' columns"

"""The printed numbers hold together, except where the list of defects says they do not."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import ccm
from ccm.errors import BadInput
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.sources import SOURCES
from ccm.models.specs import MODELS, PUBLISHED
from ccm.paper.values import (
    FOLDER,
    NEURON_MEASURES,
    SETS,
    CountRange,
    Printed,
    folder_of_values,
    printed,
    printed_models,
    printed_proportion,
)

# Of the published neurons, how many have an infinite released sigma (defect 3).
INFINITE_SIGMAS = {
    "gpt2-small": 5,
    "EleutherAI_pythia-1.4b": 6,
    "Phi-1_5": 2,
    "Mistral-7B-v0.1": 12,
    "Meta-Llama-3-8B": 8,
}


def leaves(model: str) -> Iterator[Printed]:
    """Every printed number of a model."""
    paper = printed(model)
    yield from [*paper.sizes.values(), *paper.sources.values()]
    yield from [*paper.gts.values(), *paper.q_values.values()]
    for neuron in paper.neurons:
        yield from (getattr(neuron, m) for m in NEURON_MEASURES)
    for table in paper.transition_scores.values():
        yield from (value for row in table.values() for value in row.values())
    for ratios in paper.conversion_ratios.values():
        yield from ratios.values()


def test_one_file_per_published_model() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{model}.json" for model in PUBLISHED}
    assert set(printed_models()) == set(PUBLISHED)
    with pytest.raises(BadInput, match=r"^organism: the paper printed no number of it\. Allowed: Ele"):
        printed("organism")


def test_the_numbers_are_kept_once_and_found_in_a_checkout_and_installed(tmp_path: Path) -> None:
    """No other copy of a number that was typed in: neither beside the code nor below it."""
    root = Path(ccm.__file__).parents[1]
    assert root / "golden" / "paper" == FOLDER
    assert not list((root / "ccm" / "paper").rglob("*.json"))
    module = tmp_path / "ccm" / "paper" / "values.py"
    (module.parent / "printed").mkdir(parents=True)
    assert folder_of_values(module) == module.parent / "printed"
    (module.parent / "printed").rmdir()
    assert folder_of_values(module) == tmp_path / "golden" / "paper"


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_number_has_a_source_and_every_artefact_a_reason(model: str) -> None:
    paper = printed(model)
    for leaf in leaves(model):
        assert leaf.source.startswith(("Table ", "Figure", "released list")), leaf
        assert leaf.resolution >= 0
        assert leaf.low <= leaf.value <= leaf.high
        assert (leaf.defect is None) == (leaf.reason is None), leaf
    assert [*paper.transition_scores] == [*SETS]
    assert set(paper.gts) == set(paper.q_values) == set(ABLATION_VALUES)


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_number_of_the_file_is_read(model: str) -> None:
    text = (FOLDER / f"{model}.json").read_text(encoding="utf-8")
    assert text.count('"value"') == len([*leaves(model)])
    assert text.count('"low"') == 6
    assert json.loads(text)["model"] == model


def test_what_a_printed_digit_leaves_open() -> None:
    assert (Printed(0.3, "Table 6", 0.1).low, Printed(0.3, "Table 6", 0.1).high) == (0.25, 0.35)
    exact = Printed(768, "Table 4", 0)
    assert exact.low == exact.high == 768
    assert CountRange(1, 4, "a") + CountRange(2, 2, "b") == CountRange(3, 6, "a")


@pytest.mark.parametrize("model", PUBLISHED)
def test_table_4_is_the_model_table(model: str) -> None:
    spec, paper = MODELS[model], printed(model)
    for name, size in paper.sizes.items():
        assert getattr(spec, name) == size.value, f"{name} [{model}]"
    assert tuple(n.neuron for n in paper.neurons) == spec.published_neurons
    assert len(spec.published_neurons) == spec.n_entropy_neurons


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_released_neurons_pass_the_selection_threshold(model: str) -> None:
    lowest = min(n.rho.value for n in printed(model).neurons)
    least = MODELS[model].min_rho
    assert least <= lowest < least + 0.01, f"threshold {least}, lowest rho {lowest} [{model}]"


@pytest.mark.parametrize("model", PUBLISHED)
def test_transition_counts_give_the_printed_scores(model: str) -> None:
    paper = printed(model)
    for k, row in paper.transition_counts.items():
        for j, count in row.items():
            size, score = paper.sources[k], paper.transition_scores["entropy"][k][j]
            least, most = 100 * count.low / size.high, 100 * count.high / size.low
            assert least - 1e-9 <= score.high, f"TS({k}, {j})={score.value}, counts {count} [{model}]"
            assert score.low - 1e-9 <= most, f"TS({k}, {j})={score.value}, counts {count} [{model}]"


@pytest.mark.parametrize("model", PUBLISHED)
def test_transition_counts_give_the_printed_gts(model: str) -> None:
    paper = printed(model)
    counts = [c for row in paper.transition_counts.values() for c in row.values()]
    least, most = (
        100 * sum(getattr(c, end) for c in counts) / paper.n_prompts for end in ("low", "high")
    )
    gts = paper.gts["mean_ablation"]
    assert least <= gts.high, f"GTS {gts.value} %, counts give {least:.3f} at least [{model}]"
    assert gts.low <= most, f"GTS {gts.value} %, counts give {most:.3f} at most [{model}]"


@pytest.mark.parametrize("model", PUBLISHED)
def test_conversion_ratios_to_ck_and_pk_are_whole_counts(model: str) -> None:
    paper = printed(model)
    for k in ("CK", "PK"):
        count = paper.converted(k)
        ratio = paper.conversion_ratios["entropy"][k].value / 100 * paper.others(k)
        assert count.low - 0.1 <= ratio <= count.high + 0.1, f"CR({k}) is {ratio:.2f} prompts [{model}]"


@pytest.mark.parametrize("model", PUBLISHED)
def test_defect_1_the_nd_bar_repeats_the_pk_bar(model: str) -> None:
    paper = printed(model)
    ratios, count = paper.conversion_ratios["entropy"], paper.converted("ND")
    assert ratios["ND"].value == ratios["PK"].value
    assert ratios["ND"].defect == 1
    least, most = (100 * n / paper.others("ND") for n in (count.low, count.high))
    assert not least <= ratios["ND"].value <= most, (
        f"true ND ratio {least:.3f} to {most:.3f} %, printed {ratios['ND'].value} % [{model}]"
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_which_numbers_are_marked_as_artefacts(model: str) -> None:
    paper = printed(model)
    marked = {v: gts.defect for v, gts in paper.gts.items() if gts.defect is not None}
    expected = {"mean_minus_sigma_ablation": 3, "mean_plus_sigma_ablation": 3}
    expected |= {"mode_ablation": 4} if model == "gpt2-small" else {}
    assert marked == expected
    assert {v: q.defect for v, q in paper.q_values.items() if q.defect is not None} == expected
    assert len([leaf for leaf in leaves(model) if leaf.defect]) == 2 * len(expected) + 1
    how_many = f"for {INFINITE_SIGMAS[model]} of the {len(paper.neurons)} entropy neurons"
    assert how_many in (paper.gts["mean_plus_sigma_ablation"].reason or "")


def test_defect_4_the_mode_gts_of_gpt2_is_the_proportion_that_was_not_nd() -> None:
    paper = printed("gpt2-small")
    proportion = 100 * sum(paper.sources[s].value for s in SOURCES if s != "ND") / paper.n_prompts
    assert round(proportion, 1) == paper.gts["mode_ablation"].value == 93.8


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_printed_proportion_is_found_by_model_value_and_quantity(model: str) -> None:
    paper = printed(model)
    for value in ABLATION_VALUES:
        assert printed_proportion(model, value, "GTS") == paper.gts[value]
        for source in SOURCES:
            found = printed_proportion(model, value, f"CR({source})")
            of_mean = value == "mean_ablation"
            assert found == (paper.conversion_ratios["entropy"][source] if of_mean else None)
    assert printed_proportion("organism", "mean_ablation", "GTS") is None

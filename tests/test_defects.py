"""The defects of the released code (docs/defects.md): each one shown, and ours without it."""

import ast
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import ccm
from ccm.decoding import hooked
from ccm.decoding import shared as decoding
from ccm.decoding.activations import float16_sigma
from ccm.decoding.answer_tokens import answer_tokens, object_tokens
from ccm.decoding.results import Completions, read_first_token
from ccm.errors import BadInput
from ccm.experiment.ablate_io import read_statistics_npz
from ccm.experiment.probing import PromptSet, build_prompts
from ccm.method.ablation import PLAIN, Ablation, plan
from ccm.method.ablation_values import ABLATION_VALUES
from ccm.method.neurons import controls
from ccm.method.prompts import ProbingPrompt
from ccm.method.protocol import PROTOCOLS
from ccm.method.scores import Ratio, conversion_ratio, global_transition_score, ratio, transition_counts
from ccm.method.sources import SOURCES, knowledge_sources
from ccm.method.statistics import ActivationStatistics, check_statistics
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.released import NAMES, Released, released
from tests.tolerance import ENTROPY, PERCENT
from tests.toys import GROUPED, ToyConfig, toy_folder

pytestmark = pytest.mark.whole_runs

MINUS, PLUS = ABLATION_VALUES["mean_minus_sigma_ablation"], ABLATION_VALUES["mean_plus_sigma_ablation"]
MODE = ABLATION_VALUES["mode_ablation"]


@pytest.fixture(scope="module", params=NAMES)
def data(request: pytest.FixtureRequest) -> Released:
    """One folder of released numbers; read-only."""
    return released(request.param)


@pytest.fixture(scope="module")
def planted() -> Released:
    """The model whose ablation changes answers; read-only."""
    return released("planted-style")


@pytest.fixture(scope="module")
def plain(data: Released) -> Completions:
    """The run without ablation; read-only."""
    return hooked.decode(data.model, data.tokens)


def counts_of(table: dict[str, dict[str, int]]) -> np.ndarray:
    return np.array([[table[k][k2] for k2 in SOURCES] for k in SOURCES])


# --- 1: CR(ND) --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ABLATION_VALUES)
def test_nd_conversion_ratio_is_not_the_pk_one(planted: Released, value: str) -> None:
    """Defect 1: the released scoring computes CR(ND) with the PK function."""
    scores = planted.outputs["scores"][value]
    counts = counts_of(scores["counts"])
    wrong, right = conversion_ratio(counts, "ND", released=True), conversion_ratio(counts, "ND")
    assert wrong == conversion_ratio(counts, "PK")
    assert wrong != right
    PERCENT.of("CR(ND)").assert_close(right.percent, scores["ndcr"], what=value)
    for source in ("CK", "PK"):
        assert conversion_ratio(counts, source, released=True) == conversion_ratio(counts, source)


@pytest.mark.parametrize(("nd_to_pk", "true_nd"), [(1, 0.130), (2, 0.149)])
def test_printed_nd_conversion_ratio_of_phi(nd_to_pk: int, true_nd: float) -> None:
    """Defect 1: Figure 8 prints 0.527 % for Phi-1.5, where the counts give 0.13 to 0.15 %."""
    counts = np.array([[3782, 6, 13], [28, 1090, 13], [6, nd_to_pk, 1572 - nd_to_pk]])
    assert counts.sum(1).tolist() == [3801, 1131, 1578]  # Figure 5
    assert round(conversion_ratio(counts, "CK").percent, 4) == 1.2551
    assert round(conversion_ratio(counts, "PK").percent, 4) == 0.5272
    assert round(conversion_ratio(counts, "ND", released=True).percent, 4) == 0.5272  # as printed
    assert round(conversion_ratio(counts, "ND").percent, 3) == true_nd
    assert PROTOCOLS["released"].nd_ratio_of_pk
    assert not PROTOCOLS["corrected"].nd_ratio_of_pk


# --- 2: padded batches without a mask ---------------------------------------------------------------


def padded_entropies(data: Released, padding: int) -> np.ndarray:
    """Entropies of one left-padded batch that is run as if the pads were text."""
    longest = max(map(len, data.tokens))
    rows = [[padding] * (longest - len(tokens)) + list(tokens) for tokens in data.tokens]
    ids = torch.tensor(rows)
    with torch.inference_mode():
        # All ones is what the released forward amounts to: it derives no mask at all.
        logits = data.model.bridge.original_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    none = torch.zeros((len(rows), 0), dtype=torch.long)
    return np.asarray(read_first_token(logits.logits[:, -1], none).entropy)


def test_released_entropies_depend_on_the_batch(data: Released, plain: Completions) -> None:
    """Defect 2: in one padded batch entropies move by up to 1.95 and 1.14 nats on these models."""
    expected = data.run("pre")
    spoilt = np.asarray(expected["entropies_padded_batch"])
    error = np.abs(spoilt - plain.first.entropy)
    longest = np.array([len(t) == max(map(len, data.tokens)) for t in data.tokens])
    assert longest.any()
    ENTROPY.assert_close(spoilt[longest], plain.first.entropy[longest])  # these have no pads
    largest = {"gpt2-style": 1.952, "planted-style": 1.142}[data.name]
    assert error.max() == pytest.approx(largest, abs=1e-3)
    assert (error > 0.1).mean() > 0.5
    assert expected["texts_equal_in_padded_batch"] == len(data.tokens)  # generation does mask

    # The same defect in our hands: the pads are the EOS token, on the left, and attended to.
    ENTROPY.of("padded entropy").assert_close(padded_entropies(data, data.model.bos), spoilt)
    other = padded_entropies(data, data.model.bos + 1)
    assert np.abs(other - spoilt)[~longest].max() > 0.1  # so the numbers are about the pads


BATCHINGS: dict[str, Callable[..., Completions]] = {
    "hooked-alone": partial(hooked.decode, batch_size=1),
    "hooked-by-seven": partial(hooked.decode, batch_size=7),
    "shared": decoding.decode,
    "shared-alone": partial(decoding.decode, memory_budget=1),
}


@pytest.mark.parametrize("how", BATCHINGS)
def test_no_number_of_ours_depends_on_the_batch(data: Released, plain: Completions, how: str) -> None:
    """Defect 2: every number is the same alone, in a batch of another size, and in another order."""
    order = np.random.RandomState(0).permutation(len(data.tokens))[:40]
    some = [data.tokens[i] for i in order]
    ablation = plan("entropy", data.entropy_neurons, MINUS, data.statistics)
    ablated = hooked.decode(data.model, data.tokens, ablation)
    for whole, neurons in ((plain, PLAIN), (ablated, ablation)):
        part = BATCHINGS[how](data.model, some, neurons)
        assert part.texts == tuple(whole.texts[i] for i in order)
        assert part.tokens == tuple(whole.tokens[i] for i in order)
        ENTROPY.assert_close(part.first.entropy, whole.first.entropy[order])


# --- 3: sigma in float16 ----------------------------------------------------------------------------

# GPT-2's six entropy neurons as published (float16), neurons 584, 1611, 2123, 2378, 2870, 2910.
GPT2_NEURONS = (584, 1611, 2123, 2378, 2870, 2910)
GPT2_MODE = [-0.0009861, 0.05447388, -0.05432129, np.nan, -0.15930176, 0.08544922]
GPT2_STATISTICS = ActivationStatistics(
    mean=np.array([0.9204, 1.501, 0.3245, 1.696, 0.169, 2.924]),
    std=np.array([np.inf, np.inf, np.inf, np.inf, 0.4954, np.inf]),
    median=np.array([0.0, 1.238, -0.05432, 0.0, -0.1434, 3.207]),
    mode=np.array(GPT2_MODE),
    min=np.array([-0.17, -0.17, -0.17, -0.17, -0.17, -0.1605]),
    max=np.array([13.234, 7.16, 6.926, 43.16, 5.73, 11.62]),
)


def test_published_three_sigma_is_the_range() -> None:
    """Defect 3: of GPT-2's six sigmas five are inf, so 3 sigma from the mean is the range's end."""
    low, high = MINUS.of(GPT2_STATISTICS), PLUS.of(GPT2_STATISTICS)
    infinite = np.isinf(GPT2_STATISTICS.std)
    assert infinite.sum() == 5
    assert np.array_equal(low[infinite], GPT2_STATISTICS.min[infinite])
    assert np.array_equal(high[infinite], GPT2_STATISTICS.max[infinite])
    assert high[4] == pytest.approx(0.169 + 3 * 0.4954)  # the one that is what it says
    assert high[4] < GPT2_STATISTICS.max[4]
    with pytest.raises(BadInput, match=r"activation statistics: std of neuron 0 is inf, not finite"):
        check_statistics(GPT2_STATISTICS, 6)


def test_float16_sigma_overflows_as_numpy_does(planted: Released) -> None:
    """Defect 3: float16 sums overflow with as many positions as the paper has; float64 never does."""
    rows: list[torch.Tensor] = []
    chosen = list(planted.entropy_neurons)
    hooked.decode(planted.model, planted.tokens, observe=lambda a: rows.append(a[:, chosen].clone()))
    values = torch.cat(rows).T.double().numpy()  # (neuron, position)
    values = np.tile(values, 60)  # 300,000 positions: GPT-2's probing data has about as many
    count = values.shape[1]
    exact = ActivationStatistics(
        mean=values.mean(1),
        std=values.std(1),
        median=np.median(values, 1),
        mode=values.mean(1),
        min=values.min(1),
        max=values.max(1),
    )
    assert np.isfinite(exact.std).all()
    with np.errstate(over="ignore"):
        truly = values.astype(np.float16).std(1)  # what the released code computes
    ours = float16_sigma(exact, count)
    infinite = np.isinf(ours.std)
    assert 0 < infinite.sum() < len(chosen)
    assert np.array_equal(infinite, np.isinf(truly))
    assert ours.std[~infinite] == pytest.approx(exact.std[~infinite], rel=1e-3)
    assert ours.std[~infinite] == pytest.approx(truly[~infinite].astype(np.float64), rel=0.05)

    low, high = MINUS.of(ours), PLUS.of(ours)
    assert np.array_equal(low[infinite], exact.min[infinite])
    assert np.array_equal(high[infinite], exact.max[infinite])
    assert (PLUS.of(exact)[infinite] < exact.max[infinite]).all()  # the true one lies within
    assert high[~infinite] == pytest.approx(PLUS.of(exact)[~infinite], rel=2e-3)
    for name in ("mean", "median", "mode", "min", "max"):
        assert getattr(ours, name) is getattr(exact, name)


# --- 4: a mode that is NaN --------------------------------------------------------------------------


def test_nan_mode_is_refused_by_name() -> None:
    """Defect 4: the published mode of GPT-2's neuron 2378 is NaN; here an error names it."""
    filled = {name: np.zeros(3072) for name in ("mean", "std", "median", "mode", "min", "max")}
    filled["mode"][list(GPT2_NEURONS)] = GPT2_MODE
    statistics = ActivationStatistics(**filled)
    with pytest.raises(BadInput, match=r"neuron 2378: its mode_ablation value is nan, not finite"):
        plan("entropy", GPT2_NEURONS, MODE, statistics)
    with pytest.raises(BadInput, match=r"activation statistics: mode of neuron 2378 is nan"):
        check_statistics(statistics, 3072)
    others = [i for i in GPT2_NEURONS if i != 2378]
    assert plan("entropy", others, MODE, statistics).neurons == tuple(others)


def test_what_a_nan_does_to_a_run(data: Released, plain: Completions) -> None:
    """Defect 4: one NaN makes every logit NaN and every answer ND, and the printed GTS 93.8 %."""
    spoilt = hooked.decode(
        data.model, data.tokens, Ablation("nan", (data.entropy_neurons[0],), (float("nan"),))
    )
    assert np.isnan(spoilt.first.entropy).all()
    before = knowledge_sources(plain.texts, data.prompts)
    after = knowledge_sources(spoilt.texts, data.prompts)
    assert set(after) == {"ND"}
    changed = global_transition_score(transition_counts(before, after))
    assert changed.count == len(before) - before.count("ND")  # it says nothing about the neurons
    # GPT-2: 9986 CK, 666 ND, 32 PK before (Figure 5); Table 6 prints 93.8.
    assert round(ratio(9986 + 32, 9986 + 666 + 32).percent, 1) == 93.8


# --- 5: error bars ----------------------------------------------------------------------------------


def released_error_bar(percent: np.ndarray, n: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(3 * np.sqrt(percent * (1 - percent) / n))


def test_error_bars_are_intervals(planted: Released) -> None:
    """Defect 5: with p in percent the bar is NaN above 1 %, and below it far too small or wrong."""
    counts = counts_of(planted.outputs["scores"]["mean_ablation"]["counts"])
    ratios = [conversion_ratio(counts, source) for source in SOURCES]
    shares = np.array([r.percent for r in ratios])
    assert np.isnan(released_error_bar(shares[shares > 1], 200)).all()
    assert (shares > 1).sum() == 2
    for r in ratios:
        assert r.low is not None
        assert r.high is not None
        assert 0 <= r.low <= r.percent <= r.high <= 100
        assert r.low < r.high
    # Below 1 % it is a number, and for 1 of 243 twenty times too small.
    one = ratio(1, 243)
    bar = float(released_error_bar(np.array([one.percent]), 243)[0])
    assert 0 < bar < 0.1 * (one.high - one.percent)


# --- 6: controls ------------------------------------------------------------------------------------


def test_released_controls_hold_entropy_neurons(planted: Released) -> None:
    """Defect 6: two of the 20 released sets hold an entropy neuron; none of ours ever does."""
    entropy = set(planted.entropy_neurons)
    shared = [set(neurons) & entropy for neurons in planted.random_sets]
    assert {i: s for i, s in enumerate(shared) if s} == {7: {325}, 16: {245}}
    d_mlp = planted.model.spec.d_mlp
    for seed in range(20):
        sets = controls(100, d_mlp, planted.entropy_neurons, seed)
        assert not entropy & {i for neurons in sets for i in neurons}
        assert len({frozenset(neurons) for neurons in sets}) == 100
        assert {len(set(neurons)) for neurons in sets} == {len(entropy)}


def test_controls_come_from_the_complement_alone() -> None:
    """Defect 6: with 3 of 8 neurons taken, 10 sets of three are left, and the 11th is refused."""
    sets = controls(10, 8, (1, 4, 6), seed=0)
    assert {i for neurons in sets for i in neurons} == {0, 2, 3, 5, 7}
    with pytest.raises(BadInput, match="11 controls: only 10 distinct sets of 3 of 5 neurons exist"):
        controls(11, 8, (1, 4, 6), seed=0)
    released_pool = controls(55, 8, (1, 4, 6), seed=0, overlap=True)  # all but the set itself
    assert frozenset((1, 4, 6)) not in map(frozenset, released_pool)


# --- 7: the token of an object ----------------------------------------------------------------------


def probing(counter: str, counter_token: int, parametric: str, parametric_token: int) -> ProbingPrompt:
    return ProbingPrompt("s", "r", "g", "q", counter, parametric, counter_token, parametric_token, "t")


@pytest.mark.parametrize("family", GROUPED)
def test_released_rule_names_bos(family: Any) -> None:
    """Defect 7: a tokenizer that adds BOS makes every answer token the BOS; ours are the objects'."""
    model = load(spec_for(str(toy_folder(ToyConfig(family)))))
    paris, capital = map(model.tokenizer.convert_tokens_to_ids, ("▁Paris", "▁capital"))
    assert model.tokenizer.unk_token_id not in (paris, capital)
    prompts = [probing("Paris", paris, "capital", capital)]
    assert object_tokens(model, prompts, released=True).tolist() == [[model.bos, model.bos]]
    assert object_tokens(model, prompts).tolist() == [[paris, capital]]
    assert (model.first_token("Paris"), model.first_token(" capital ")) == (paris, capital)


def test_released_rule_names_the_bare_space(planted_prompts: dict[bool, PromptSet]) -> None:
    """Defect 7: byte-level BPE, whose tokens hold their space, gives a bare space for every object."""
    model = released("planted-style").model
    prompts = planted_prompts[False].prompts
    (space,) = model.tokenizer.encode(" ")
    assert set(object_tokens(model, prompts, released=True).ravel().tolist()) == {space}
    # Ours are the tokens that the model itself began each object with.
    generated = [[p.counter_first_token, p.parametric_first_token] for p in prompts]
    ours = object_tokens(model, prompts)
    assert ours.tolist() == generated
    assert len(np.unique(ours)) > 50
    for prompt, (token, _) in zip(prompts, ours.tolist(), strict=True):
        start = model.tokenizer.decode([token])
        assert f" {prompt.counter_object}".startswith(start)
        assert start.strip()


# --- 8: one ND token for all ------------------------------------------------------------------------


def test_every_prompt_has_its_own_nd_token(data: Released, plain: Completions) -> None:
    """Defect 8: the ND tokens of these prompts are 35 and 48 different ones, not a single one."""
    sources = knowledge_sources(plain.texts, data.prompts)
    tokens = answer_tokens(sources, object_tokens(data.model, data.prompts), plain.first)
    assert tokens["ND"].shape == (len(data.prompts),)
    ids, times = np.unique(tokens["ND"], return_counts=True)
    assert len(ids) == {"gpt2-style": 35, "planted-style": 48}[data.name]
    assert times.max() < 0.3 * len(data.prompts)  # so one id for all is wrong for most
    defined = np.array(sources) != "ND"
    assert (tokens["ND"][defined] != tokens["CK"][defined]).all()
    assert (tokens["ND"][defined] != tokens["PK"][defined]).all()
    assert (tokens["ND"][~defined] == plain.first.top_tokens[~defined, 0]).all()


# --- 9: code execution from files -------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {"read_pickle", "to_pickle", "torch.load", "torch.save", "hub.load"}
UNSAFE_SWITCHES = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}


def unsafe(source: str) -> list[str]:
    """What in a module's source could run code that came with a file, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: Sequence[str] = ()
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            whole = [f"{module}.{a.name}" for a in node.names]
            names = [n for n in whole if n.split(".")[0] in UNSAFE_MODULES or _ends_unsafe(n)]
        elif isinstance(node, ast.Name):
            names = [node.id] if node.id in UNSAFE_NAMES else []
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)] if _ends_unsafe(ast.unparse(node)) else []
        elif isinstance(node, ast.keyword) and node.arg in UNSAFE_SWITCHES:
            safe = (
                isinstance(node.value, ast.Constant) and node.value.value is UNSAFE_SWITCHES[node.arg]
            )
            names = [] if safe else [ast.unparse(node)]
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def _ends_unsafe(name: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in UNSAFE_ATTRIBUTES)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import dill as d",
        "from pickle import loads",
        "from torch import load",
        "x = torch.load(p)",
        "torch.hub.load(a, b)",
        "pd.read_pickle(p)",
        "eval(text)",
        "exec(text)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert unsafe(line)


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "f(trust_remote_code=False)", "np.load(p, allow_pickle=False)", "load(spec)"],
)
def test_the_scan_passes(line: str) -> None:
    assert not unsafe(line)


def test_nothing_runs_code_from_files() -> None:
    """Defect 9: no pickle, no remote code, no eval in the package; JSON, Parquet, safetensors."""
    root = Path(ccm.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert root / "models" / "load.py" in files
    found = {str(path.relative_to(root)): unsafe(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}


def test_pickled_files_are_refused(planted: Released, tmp_path: Path) -> None:
    """Defect 9: neither an array of objects nor pickled weights are ever unpickled."""
    path = tmp_path / "stats.npz"
    np.savez(path, mean=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="cannot be read as an NPZ of numbers"):
        read_statistics_npz(path)
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(planted.folder / "model" / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")  # a pickle, of None
    with pytest.raises(BadInput, match=r"no \*\.safetensors weights"):
        spec_for(str(folder))


# --- 10: counts and intervals -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total"), [(2, 32), (3, 243), (0, 32), (32, 32), (1, 1), (17, 9586), (5000, 10684)]
)
def test_intervals_are_clopper_pearson(count: int, total: int) -> None:
    """Defect 10: a ratio carries its counts and the exact 95 % interval, from the beta quantiles."""
    r = ratio(count, total)
    assert (r.count, r.total) == (count, total)
    low = stats.beta.ppf(0.025, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    PERCENT.of("percent").assert_close(r.percent, 100.0 * count / total)
    # The quantiles come from a root search with a tolerance of its own.
    assert r.low == pytest.approx(100 * low, abs=1e-6)
    assert r.high == pytest.approx(100 * high, abs=1e-6)


def test_printed_ratios_rest_on_few_prompts() -> None:
    """Defect 10: Llama-3's 6.2 % ND to CK is 2 of 32 prompts, its CR(CK) of 1.23 % 3 of 243."""
    counts = np.array([[9301, 7, 35], [2, 29, 1], [1, 1, 209]])
    assert counts.sum(1).tolist() == [9343, 32, 211]  # Figure 5
    nd_to_ck = ratio(int(counts[1, 0]), int(counts[1].sum()))
    assert round(nd_to_ck.percent, 1) == 6.2
    assert (round(nd_to_ck.low, 2), round(nd_to_ck.high, 2)) == (0.77, 20.81)
    to_ck = conversion_ratio(counts, "CK")
    assert (to_ck.count, to_ck.total) == (3, 243)
    assert round(to_ck.percent, 4) == 1.2346
    assert (round(to_ck.low, 2), round(to_ck.high, 2)) == (0.26, 3.57)


def test_every_score_is_such_a_ratio(planted: Released) -> None:
    """Defect 10: conversion ratios and GTS carry counts that add up; an empty row has no percent."""
    counts = counts_of(planted.outputs["scores"]["mean_ablation"]["counts"])
    found = {source: conversion_ratio(counts, source) for source in SOURCES}
    for source, r in found.items():
        k = SOURCES.index(source)
        assert isinstance(r, Ratio)
        assert r.total == counts.sum() - counts[k].sum()
        assert r.count == counts[:, k].sum() - counts[k, k]
    gts = global_transition_score(counts)
    assert isinstance(gts, Ratio)
    assert gts.total == len(planted.prompts)
    assert gts.count == sum(r.count for r in found.values())  # whoever leaves arrives somewhere
    assert ratio(0, 0) == Ratio(0, 0, None, None, None)


# --- 11: objects in lower case ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted_prompts(planted: Released) -> dict[bool, PromptSet]:
    """Probing prompts of the planted model, by whether objects are lower-cased; read-only."""
    return {
        lower: build_prompts(planted.model, planted.facts, "bare", lower_case=lower)
        for lower in (True, False)
    }


def test_lower_case_stops_copying(planted: Released, planted_prompts: dict[bool, PromptSet]) -> None:
    """Defect 11: of 840 prompts 342 copy with the case kept, and 11 with objects in lower case."""
    lower, cased = planted_prompts[True].prompts, planted_prompts[False].prompts
    assert [p.counter_object for p in lower] == [p.counter_object.lower() for p in cased]
    assert [p.text.lower() for p in lower] == [p.text.lower() for p in cased]
    assert sum(a.text != b.text for a, b in zip(lower, cased, strict=True)) == len(cased)
    shares = {}
    for name, prompts in (("lower", lower), ("cased", cased)):
        done = hooked.decode(planted.model, [planted.model.encode(p.text) for p in prompts])
        sources = knowledge_sources(done.texts, prompts)
        shares[name] = sources.count("CK") / len(sources)
    assert shares["cased"] == pytest.approx(342 / 840, abs=0.005)
    assert shares["lower"] == pytest.approx(11 / 840, abs=0.005)
    assert PROTOCOLS["released"].lower_case_objects
    assert not PROTOCOLS["corrected"].lower_case_objects

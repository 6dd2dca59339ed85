"""What runs on a GPU, run on a pretended one: no mixing of devices, few waits, the CPU's results."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ccm.cli.parser import main
from ccm.decoding import hooked
from ccm.decoding import shared as decoding
from ccm.decoding.bounded import BoundedLists
from ccm.experiment import run as experiment
from ccm.method.ablation import PLAIN
from ccm.models.device_map import spread_over_devices
from ccm.models.load import load
from ccm.models.model import LoadedModel
from ccm.models.specs import spec_for
from tests.decoding.test_shared import Run, random_sets, run, some_targets
from tests.exact import clear, margins_of
from tests.experiment.test_run import command
from tests.pretended_gpu import OnGpu, Waits, pretended_gpus
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

pytestmark = pytest.mark.whole_runs

each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)
N_PROMPTS = 9
SETS = (5, 0, 12, 5)

# --- the pretence -----------------------------------------------------------------------------------


def test_tensors_are_where_they_say_they_are() -> None:
    with pretended_gpus(2):
        first, second = torch.arange(3, device="cuda"), torch.ones(3, device="cuda:1")
        assert str((first + 1).device) == str(first[1:].sum().device) == "cuda:0"
        assert str(second.double().device) == str(torch.zeros_like(second).device) == "cuda:1"
        assert str(second.to(first.device).device) == "cuda:0"
        assert str(second.cpu().device) == str(torch.ones(3).device) == "cpu"
        assert first.to("cuda") is first, "it is there"
        assert not isinstance(first.to("cpu"), OnGpu)
        copied = second.to("cuda:0")
        copied += 1
        assert second.tolist() == [1, 1, 1], "the copy is the same memory"


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": lambda on, off: on + off,
    "cat": lambda on, off: torch.cat([on, off]),
    "stack": lambda on, off: torch.stack([on[0], off[0]]),
    "matmul": lambda on, off: on @ off,
    "write": lambda on, off: off.add_(on),
    "write at places": lambda on, off: on.__setitem__(on.long(), off),
    "gather": lambda on, off: on.gather(0, off.long()),
    "of the CPU's": lambda on, off: off[on.long()],
    "numpy": lambda on, off: on.numpy(),
    "asarray": lambda on, off: np.asarray(on),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_a_gpu_forbids_is_forbidden(name: str) -> None:
    with pretended_gpus():
        on, off = torch.ones(3, device="cuda"), torch.ones(3)
        with pytest.raises((RuntimeError, TypeError), match=r"same device|can't convert"):
            MIXED[name](on, off)


def test_tensors_of_two_gpus_do_not_mix() -> None:
    with pretended_gpus(2):
        one, other = torch.ones(3, device="cuda:0"), torch.ones(3, device="cuda:1")
        for number in (torch.tensor(2.0), torch.ones(3)[0]):
            assert (one * number).tolist() == [2, 2, 2] or number == 1
        with pytest.raises(RuntimeError, match="same device"):
            one + other
        one.copy_(2 * other)
        assert one.tolist() == [2, 2, 2]


WAITING: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0]),
    "int": lambda x: int(x[0]),
    "to": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.ones(3).to(x.device),
    "from a list": lambda x: torch.tensor([1, 2], device=x.device),
    "nonzero": lambda x: torch.nonzero(x),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask to write": lambda x: x.__setitem__(x > 0, 1),
    "unique": lambda x: torch.unique(x),
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "repeat_interleave": lambda x: x.repeat_interleave(x),
    "allclose": lambda x: torch.allclose(x, x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_counted(name: str) -> None:
    with pretended_gpus() as waits:
        x = torch.arange(3, device="cuda")
        (x + 1).sum().float().sort().values.argmax(), x[1:], x[x], torch.where(x > 0, x, 1)
        assert not waits
        WAITING[name](x)
        assert waits == Waits(elsewhere=1)


def test_a_module_moves_with_its_ties() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pretended_gpus():
        model.to("cuda")
        assert str(model(torch.ones(3, device="cuda")).device) == "cuda:0"
        assert model[1].weight is model[0].weight
        assert isinstance(model[0].weight, torch.nn.Parameter)
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.ones(3))


# --- the decode -------------------------------------------------------------------------------------


@functools.cache
def prompts_of(config: ToyConfig) -> list[list[int]]:
    """Prompts whose texts are the same on any device; to be called on the CPU first."""
    sets = [PLAIN, *random_sets(config.d_mlp, SETS, 2.0)]
    model = load(spec_for(str(toy_folder(config))))
    found = clear(model, token_prompts(N_PROMPTS, config, seed=3), sets)
    assert len(found) > N_PROMPTS // 2
    return found


def decoded(config: ToyConfig, device: str, dtype: str = "float32", **options: Any) -> Run:
    model = load(spec_for(str(toy_folder(config))), device, dtype)
    sets, prompts = random_sets(config.d_mlp, SETS, 2.0), prompts_of(config)
    return run(model, prompts, sets, targets=some_targets(len(prompts), config.d_vocab), **options)


@each_toy
def test_the_shared_decode_gives_the_cpus_results(config: ToyConfig) -> None:
    wanted = decoded(config, "cpu", own_top=True)
    with pretended_gpus():
        found = decoded(config, "cuda", own_top=True)
    assert replace(found.work, peak_bytes=0) == replace(wanted.work, peak_bytes=0)
    within = margins_of(str(toy_folder(config)))
    for i in range(found.n_sets):
        mine, its = found.decoded.completions(i), wanted.decoded.completions(i)
        assert (mine.tokens, mine.texts) == (its.tokens, its.texts)
        within.entropy.assert_close(mine.first.entropy, its.first.entropy)
        within.log_prob.assert_close(mine.first.log_probs, its.first.log_probs)


@each_toy
def test_a_step_of_the_decode_waits_once(config: ToyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for near ties. Prefilling waits before the first step, reading the tree after the last."""
    held: list[bool] = []
    begun: list[Waits] = []

    class Counted(BoundedLists):
        def start(self) -> None:
            super().start()
            begun.append(Waits(waits))

        def holds(self) -> bool:
            held.append(super().holds())
            return held[-1]

    monkeypatch.setattr(decoding, "BoundedLists", Counted)
    prompts_of(config)
    with pretended_gpus() as waits:
        work = decoded(config, "cuda").work
    assert len(begun) > 4
    assert waits["bounded.holds"] == len(held)
    assert held.count(False) <= work.refereed, "a list was too short for something usual"
    in_steps = begun[-1] - begun[0]
    of_float64 = ("exact.exact_last_positions", "forward.run_body")
    for of_near_ties in ("next_token.settle", "next_token._likely", "engine.prefix", *of_float64):
        assert (in_steps.pop(of_near_ties, 0) > 0) <= (work.refereed > 0)
    assert list(in_steps) == ["bounded.holds"]


@each_toy
def test_a_step_in_which_sets_may_stop_waits_twice_more(config: ToyConfig) -> None:
    """To read the new tokens, and to say which of them are the last."""
    full = [True] + [False] * len(SETS)
    wanted = decoded(config, "cpu", full=full)
    with pretended_gpus() as waits:
        found = decoded(config, "cuda", full=full)
    assert 0 < waits["engine._cut"] <= 2 * waits["bounded.holds"]
    for i in range(found.n_sets):
        assert found.decoded.completions(i).texts == wanted.decoded.completions(i).texts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_lower_precision_runs(config: ToyConfig, dtype: str) -> None:
    prompts_of(config)
    with pretended_gpus():
        found = decoded(config, "cuda", dtype)
    assert all(np.isfinite(found.decoded.completions(i).first.entropy).all() for i in range(5))


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_the_hooked_path_gives_the_cpus_results(config: ToyConfig) -> None:
    folder = spec_for(str(toy_folder(config)))
    model, sets = load(folder), random_sets(config.d_mlp, [5], 2.0)
    prompts = clear(model, token_prompts(N_PROMPTS, config, seed=3), sets)
    assert len(prompts) > N_PROMPTS // 2
    (ablation,) = sets
    wanted = hooked.decode(model, prompts, ablation)
    with pretended_gpus():
        found = hooked.decode(load(folder, "cuda"), prompts, ablation)
    assert found.tokens == wanted.tokens
    assert found.texts == wanted.texts


# --- whole commands ---------------------------------------------------------------------------------


def scores_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def assert_alike(found: Any, wanted: Any) -> None:
    """Counts, names and texts alike; numbers but for rounding."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_alike(found[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for mine, its in zip(found, wanted, strict=True):
            assert_alike(mine, its)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4, nan_ok=True)
    else:
        assert found == wanted


def on_gpu(arguments: list[str], device: str = "cuda") -> list[str]:
    arguments = list(arguments)
    arguments[arguments.index("--device") + 1] = device
    return arguments


def test_a_whole_run_gives_the_cpus_scores(tmp_path: Path) -> None:
    assert main(command(tmp_path / "cpu")) == 0
    with pretended_gpus():
        assert main(on_gpu(command(tmp_path / "gpu"))) == 0
    assert_alike(scores_of(tmp_path / "gpu"), scores_of(tmp_path / "cpu"))
    manifest = json.loads((tmp_path / "gpu" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["identity"]["device"] == "cuda"
    assert manifest["identity"]["device_name"] == "a pretended GPU"
    for name in ("plain", "mean_ablation/entropy"):
        mine, its = (pd.read_parquet(tmp_path / d / f"{name}.parquet") for d in ("gpu", "cpu"))
        assert mine["text"].tolist() == its["text"].tolist()


def test_a_run_on_two_gpus_gives_the_cpus_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = set[str]()

    def spread(model: LoadedModel) -> LoadedModel:
        spread_over_devices(model)
        places.update(str(p.device) for p in model.body.parameters())
        return model

    monkeypatch.setattr(experiment, "spread_over_devices", spread)
    assert main(command(tmp_path / "cpu")) == 0
    arguments = [*on_gpu(command(tmp_path / "gpus")), "--device-map", "auto"]
    with pretended_gpus(2, memory=1200 << 10):  # each holds one of its two layers
        assert main(arguments) == 0
    assert places == {"cuda:0", "cuda:1"}
    assert_alike(scores_of(tmp_path / "gpus"), scores_of(tmp_path / "cpu"))

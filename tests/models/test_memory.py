"""What a model takes, what is free, and what is said where it does not suffice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccm.cli import commands as subcommands
from ccm.cli.parser import main
from ccm.errors import NotAvailable
from ccm.experiment.effects import EffectsReader
from ccm.models import memory
from ccm.models.load import load
from ccm.models.memory import (
    GIB,
    bytes_by_device,
    check_memory,
    default_budget,
    free_bytes,
    needed_bytes,
    weight_bytes,
)
from ccm.models.specs import MODELS, spec_for
from ccm.models.weights import n_parameters, weight_files
from tests.decoding.test_pretended_gpu import on_gpu
from tests.decoding.test_shared import random_sets
from tests.effects import measure_effects
from tests.exact import margins
from tests.experiment.test_run import command
from tests.pretended_gpu import pretended_gpus
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
each_toy = pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.id)


@pytest.mark.parametrize(("free", "budget"), [(3 * GIB, 3 * GIB // 2), (80 * GIB, 4 * GIB)])
def test_half_of_what_is_free_is_planned_with(
    free: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpus(memory=free):
        assert (free_bytes(GPU), default_budget(GPU)) == (free, budget)
    assert 0 < free_bytes(CPU) < 1 << 50


def test_what_torch_holds_ready_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpus(memory=GIB):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
        assert free_bytes(GPU) == 3 * GIB


def test_gpus_keep_room_to_work_in() -> None:
    for free, share in ((24 * GIB, 18 * GIB), (80 * GIB, 72 * GIB)):
        with pretended_gpus(2, free):
            shares = bytes_by_device()
        assert [shares[0], shares[1]] == [share, share]
        assert list(shares) == ["cpu", 0, 1]


def test_least_memory_is_weights_and_what_measures_hold() -> None:
    spec, n = MODELS["Meta-Llama-3-8B"], 8_030_261_248
    beside = 4 * 128256 * 4096 + 3 * 8 * 14336 * 8192
    for dtype in (torch.float32, torch.bfloat16):
        assert weight_bytes(spec, n, dtype) == dtype.itemsize * n
        assert needed_bytes(spec, n, dtype) == dtype.itemsize * n + beside
    # GPT-2's joint matrix is held twice, once split.
    joint = 12 * 3 * 768 * 769
    assert weight_bytes(MODELS["gpt2-small"], 124_439_808, torch.float32) == 4 * (124_439_808 + joint)


@each_toy
def test_what_a_model_takes_follows_from_the_headers_of_its_files(config: ToyConfig) -> None:
    spec = spec_for(str(toy_folder(config)))
    held = sum(p.numel() * p.element_size() for p in set(load(spec).bridge.original_model.parameters()))
    assert weight_bytes(spec, n_parameters(weight_files(spec)), torch.float32) == held


def test_masks_in_old_files_are_no_parameters(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"w": torch.ones(3, 4), "half": torch.ones(5).bfloat16(), "bias": torch.ones(1, 1, 9, 9)}
    save_file({**tensors, "mask": torch.ones(7, 7).bool()}, tmp_path / "model.safetensors")
    assert n_parameters([tmp_path / "model.safetensors"]) == 17


@pytest.mark.parametrize(
    ("n", "dtype", "ways"),
    [
        (1, torch.float32, "--dtype bfloat16 or another device"),
        (2, torch.float32, "--dtype bfloat16 or ccm run --device-map auto or another device"),
        (1, torch.bfloat16, "another device"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_ways_out(n: int, dtype: torch.dtype, ways: str) -> None:
    with pretended_gpus(n, memory=GIB):
        check_memory("gpt2-small", GIB, GPU, dtype)
        with pytest.raises(NotAvailable) as refused:
            check_memory("gpt2-small", 2 * GIB, GPU, dtype)
    name = str(dtype).removeprefix("torch.")
    assert str(refused.value) == (f"gpt2-small in {name}: needs 2 GiB on cuda, free 1 GiB. Use {ways}.")


@pytest.mark.parametrize("free", [1 << 20, 6 << 20])
def test_a_run_that_does_not_fit_leaves_no_trace(
    free: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The organism's weights take 2.4 MiB, its measures 9 MiB more."""
    (tmp_path / "empty").mkdir()
    with pretended_gpus(memory=free):
        assert main(on_gpu(command(tmp_path / "empty"))) == 2
        assert main(on_gpu(command(tmp_path / "run"))) == 2
    assert not (tmp_path / "run").exists()
    assert f"on cuda, free {free / GIB:.3g} GiB. Use --dtype bfloat16" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.*"))


def test_weights_that_do_not_fit_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.models.load._read_weights", None)
    with pretended_gpus(memory=1 << 10), pytest.raises(NotAvailable, match=r"^organism in float32"):
        load(MODELS["organism"], "cuda")


def test_weights_must_fit_the_cpu_on_their_way_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.models.load._read_weights", None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: GIB if device.type == "cuda" else 1 << 10)
    with (
        pretended_gpus(),
        pytest.raises(NotAvailable, match=r"on cpu, .* or a machine with more memory"),
    ):
        load(MODELS["organism"], "cuda")


# --- where memory runs out later ----------------------------------------------------------------------

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]
each_way = pytest.mark.parametrize("error", FULL, ids=["cuda", "cpu", "python", "cublas", "driver"])


@each_way
def test_memory_that_runs_out_is_one_line(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(options: Any) -> None:
        raise error

    monkeypatch.setattr(subcommands, "run", full)
    assert main(command(tmp_path / "run")) == 2
    printed = capsys.readouterr().err.strip()
    assert "\n" not in printed
    assert printed.startswith(f"ccm: out of memory ({str(error).splitlines()[0] if str(error) else ''}")
    assert f"the same command with --out {tmp_path / 'run'} goes on from here" in printed


@each_way
def test_memory_that_runs_out_while_loading_is_called_that(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", full)
    assert main(["measure", "--model", "organism", "--device", "cpu", "--dtype", "bfloat16"]) == 2
    printed = capsys.readouterr().err
    assert "ccm: out of memory (" in printed
    assert printed.endswith("no result. Free some first.\n"), "there is no --memory-budget to lower"


def test_other_errors_are_not_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(subcommands, "run", broken)
    assert main([*command(tmp_path / "run"), "--debug"]) == 1
    assert "out of memory" not in capsys.readouterr().err


@each_way
def test_a_part_whose_effects_do_not_fit_is_halved(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES[0]
    model, prompts = load(spec_for(str(toy_folder(config)))), token_prompts(9, config, seed=3)
    own, *others = random_sets(config.d_mlp, [5, 5, 5], 2.0)
    whole = measure_effects(model, prompts, [own], others)
    read, sizes = EffectsReader.__call__, list[int]()

    def full(self: EffectsReader, indices: Sequence[int], *more: Any) -> Any:
        sizes.append(len(indices))
        if sizes[-1] > 3:
            raise error
        return read(self, indices, *more)

    monkeypatch.setattr(EffectsReader, "__call__", full)
    halved = measure_effects(model, prompts, [own], others)
    assert sizes == [9, 4, 2, 2, 5, 2, 3]
    np.testing.assert_array_equal(halved.sampled, whole.sampled)
    for name in ("plain", "own", "others"):
        margins(model).entropy.of(name).assert_close(getattr(halved, name), getattr(whole, name))

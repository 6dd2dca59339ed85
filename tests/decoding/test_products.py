"""Products by oneDNN: only where they are faster, in float32 alone, and equal up to rounding."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ccm.decoding import products
from ccm.decoding.exact import float64
from ccm.decoding.products import quick_products, unembed
from tests.decoding.test_certificate import LOGIT

MOST = 5 * 24 * 40
N_VOCAB = 2 * products.VOCAB_COLUMNS + 100  # three parts, the last of them smaller


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of weights that oneDNN multiplies by, on a CPU for which MKL is slow."""
    operator = products._operator()
    if operator is None:
        pytest.skip("this PyTorch has no operator for oneDNN's linear layers")
    seen = list[tuple[int, ...]]()

    def counted(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append(tuple(weight.shape))
        return operator(x, weight, *rest)

    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_operator", lambda: counted)
    monkeypatch.setattr(products, "LEAST", 0)
    return seen


class Disguised(torch.nn.Parameter):
    """Weights that are more than the numbers they show, as quantized ones are."""


def layers() -> list[tuple[str, torch.nn.Module]]:
    """Linear layers, with and without bias, as models hold them."""
    return [
        ("Linear", torch.nn.Linear(24, 40)),
        ("no bias", torch.nn.Linear(24, 40, bias=False)),
        ("Conv1D", Conv1D(40, 24)),
    ]


@pytest.mark.numeric
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24), (0, 24)], ids=str)
@torch.inference_mode()
def test_linear_layers_are_equal_up_to_rounding(
    calls: list[tuple[int, ...]], shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    for name, layer in layers():
        with float64():
            wanted = layer(x)
        assert not calls, f"{name}: float64 is no matter of oneDNN"
        with quick_products(MOST):
            found = layer(x)
        assert found.shape == wanted.shape
        LOGIT.assert_close(found, wanted, what=f"{name} of {shape}")
        assert calls.pop() == (40, 24), f"{name} was not sent to oneDNN"
        layer(x)
        assert not calls, f"{name}: beyond the block nothing changes"
        with float64(), quick_products(MOST):
            assert layer(x).dtype == torch.float64
        assert not calls, f"{name}: oneDNN knows no float64"


@pytest.mark.numeric
@pytest.mark.parametrize("stored", ["row by row", "column by column"])
@torch.inference_mode()
def test_the_unembedding_is_multiplied_in_parts(calls: list[tuple[int, ...]], stored: str) -> None:
    random = torch.Generator().manual_seed(0)
    x, W_U = torch.randn(5, 24, generator=random), torch.randn(24, N_VOCAB, generator=random)
    W_U = W_U if stored == "row by row" else W_U.T.contiguous().T
    LOGIT.assert_close(unembed(x, W_U), x.double() @ W_U.double(), what=stored)
    assert [n for n, _ in calls] == [products.VOCAB_COLUMNS, products.VOCAB_COLUMNS, 100]


@torch.inference_mode()
def test_small_products_do_not_pay(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LEAST", 2 * 3 * 24 * 40)
    with quick_products(2 * 3 * 24 * 40):
        for name, layer in layers():
            layer(torch.randn(5, 24))
            layer(torch.randn(24))
            assert not calls, name
            layer(torch.randn(2, 3, 24))
            assert calls.pop() == (40, 24), name
    with quick_products(2 * 3 * 24 * 40 - 1):
        layer(torch.randn(2, 3, 24))
    assert not calls, "none of the products within pays: none is looked at"


def test_what_onednn_cannot_do_is_left_alone(calls: list[tuple[int, ...]]) -> None:
    layer, x = torch.nn.Linear(24, 40), torch.randn(3, 24)
    with quick_products(MOST):
        layer(x).sum().backward()  # gradients
        with torch.no_grad():
            layer.bfloat16()(x.bfloat16())
            layer.double()(x.double())
            functional.linear(input=x, weight=torch.randn(40, 24))
            functional.linear(x, Disguised(torch.randn(40, 24)))
            torch.addmm(torch.randn(3, 40), x, torch.randn(24, 40))
    assert not calls


@pytest.mark.parametrize(
    ("machine", "info", "slow"),
    [
        ("x86_64", "vendor_id\t: AuthenticAMD\n", True),
        ("x86_64", "vendor_id\t: GenuineIntel\n", False),
        ("AMD64", "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),  # Windows
        ("AMD64", "Intel64 Family 6 Model 151 Stepping 2, GenuineIntel", False),
        ("arm64", "", False),
        ("aarch64", "", False),
    ],
)
def test_only_amd_s_cpus_are_asked_for_onednn(
    machine: str, info: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "processor", lambda: info)
    (tmp_path / "cpuinfo").write_text(info)
    there: Callable[[str], Path] = lambda _: tmp_path / ("cpuinfo" if machine == "x86_64" else "none")  # noqa: E731
    monkeypatch.setattr(products, "Path", there)
    assert products.mkl_is_slow.__wrapped__() is slow


def test_without_the_operator_pytorch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_operator", lambda: None)
    assert not products.by_onednn()
    x, W_U = torch.randn(2, 3), torch.randn(3, 4)
    with quick_products(MOST), torch.inference_mode():
        assert torch.equal(unembed(x, W_U), x @ W_U)

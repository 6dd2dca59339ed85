"""A model laid over several places decodes as it does in one."""

from pathlib import Path

import pytest
import torch

from ccm.cli.parser import main
from ccm.decoding.results import merge
from ccm.decoding.shared import decode_sets
from ccm.errors import NotAvailable
from ccm.models.device_map import spread_over_devices
from ccm.models.load import load
from ccm.models.specs import spec_for
from tests.decoding.test_shared import assert_same, random_sets
from tests.pretended_gpu import pretended_gpus
from tests.toys import FAMILIES, ToyConfig, token_prompts, toy_folder

pytestmark = pytest.mark.whole_runs


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
def test_a_model_in_two_places_decodes_as_in_one(config: ToyConfig, tmp_path: Path) -> None:
    """Half on the CPU, half on disk: the same hooks move data between GPUs."""
    spec = spec_for(str(toy_folder(config)))
    prompts = token_prompts(7, config, seed=3)
    ablations = random_sets(config.d_mlp, [5, 9], 1.0)
    whole = merge(list(decode_sets(load(spec), prompts, ablations)))
    model = load(spec)
    size = sum(p.numel() * p.element_size() for p in model.body.parameters())
    spread_over_devices(model, {"cpu": size * 9 // 10}, tmp_path)
    assert any(p.device.type == "meta" for p in model.body.parameters()), "all of it fits"
    assert any(p.device.type == "cpu" for p in model.body.parameters()), "none of it fits"
    assert model.device == torch.device("cpu")
    parts = merge(list(decode_sets(model, prompts, ablations)))
    for i in range(7):
        assert_same(model, parts, i, whole, i, config.id)


@pytest.mark.parametrize("config", FAMILIES[:5], ids=lambda config: config.id)
@pytest.mark.parametrize("share", [0.8, 1.0])
def test_a_model_on_several_gpus_decodes_as_on_the_cpu(config: ToyConfig, share: float) -> None:
    """On pretended ones. With less on each, the CPU takes what no GPU has room for."""
    spec = spec_for(str(toy_folder(config)))
    first, *others = token_prompts(6, config, seed=3)
    prompts = [first, *others, [*first[:-1], first[-2]]]  # the first and the last begin alike
    ablations = random_sets(config.d_mlp, [5, 9], 1.0)
    whole = merge(list(decode_sets(load(spec), prompts, ablations)))
    size = sum(p.numel() * p.element_size() for p in load(spec).body.parameters())
    with pretended_gpus(3, int(share * size)):
        model = load(spec)
        model.float32_error = 1.0  # as if measured before
        assert spread_over_devices(model).float32_error is None
        places = {str(p.device) for p in model.body.parameters()}
        assert len([place for place in places if place.startswith("cuda")]) > 1, places
        parts = merge(list(decode_sets(model, prompts, ablations)))
    for i in range(7):
        assert_same(model, parts, i, whole, i, config.id)


def test_a_model_that_fits_nowhere_is_refused() -> None:
    model = load(spec_for(str(toy_folder(FAMILIES[0]))))
    with pytest.raises(NotAvailable, match=r"GiB of weights fit on no combination of the devices here"):
        spread_over_devices(model, {"cpu": 1000})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device-map", "balanced"], "device map 'balanced': unknown. Allowed: auto."),
        (["--device-map", "auto"], "device map auto: not with device 'cpu'. Use --device cuda."),
        (
            ["--device-map", "auto", "--device", "cuda", "--engine", "hooked"],
            "not with engine 'hooked'",
        ),
    ],
)
def test_device_maps_that_cannot_be(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["run", "--model", "organism", *more, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

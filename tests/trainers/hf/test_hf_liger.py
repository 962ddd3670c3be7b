"""use_liger_kernel=True: the metrics come, the logits never exist, the training is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hf_tools import tiny_model, train
from liger_tools import interpreted, needs_liger
from torch import Tensor

from channel_metrics import UnsupportedVersionError
from channel_metrics.capture import liger as hf_liger
from channel_metrics.trainers.hf import attach


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return interpreted(Path(__file__).with_name("liger_run.py"), tmp_path_factory.mktemp("liger"))


@needs_liger
def test_training_is_the_same_up_to_rounding(results: dict[str, Any]) -> None:
    off, on = results["off"], results["on"]
    assert on["loss"] == pytest.approx(off["loss"], rel=1e-6)
    assert on["norms"] == pytest.approx(off["norms"], rel=1e-5)


@needs_liger
def test_the_logits_never_exist(results: dict[str, Any]) -> None:
    assert results["plain"]["rows"] >= results["plain"]["tokens"]
    assert results["on"]["rows"] == results["off"]["rows"] < results["on"]["tokens"] / 2


@needs_liger
def test_a_function_in_the_place_of_ligers_computes_the_loss(results: dict[str, Any]) -> None:
    off, on = results["own_off"], results["own_on"]
    for what in ("loss", "norms", "weights"):
        assert on[what] == off[what]
    assert on["loss"][0] == pytest.approx(10 * results["on"]["loss"][0], rel=1e-6)
    # Before the first step, the channels are the same as those of Liger's own function.
    assert on["channels"][0] == pytest.approx(results["on"]["channels"][0], rel=1e-6)
    assert on["rows"] == off["rows"]


@needs_liger
def test_metrics_equal_the_oracle_in_training_and_evaluation(results: dict[str, Any]) -> None:
    assert results["trained"] == pytest.approx(results["expected"], rel=1e-5)
    assert results["evaluated"] == pytest.approx(results["expected_evaluated"], rel=1e-5)
    assert max(v for key, v in results["trained"].items() if key.endswith("token_acc")) > 0


@needs_liger
def test_equals_ligers_own_loss(results: dict[str, Any]) -> None:
    for name, differences in results["against_liger"].items():
        assert max(differences) < 1e-5, name


def _liger(parameters: str = "") -> ModuleType:
    """Liger's module as far as its function is looked at."""
    module = ModuleType("loss_utils")
    names = parameters or ", ".join(f"{name}=None" for name in hf_liger._PARAMETERS[:-1])
    exec(f"def fixed_fused_linear_cross_entropy({names}, **kwargs): return 7.0", vars(module))
    return module


class FusedModel(torch.nn.Module):
    """Its loss comes from Liger's function, and no logits do."""

    def __init__(self, module: ModuleType, **options: Any) -> None:
        super().__init__()
        self.inner, self.module, self.options = tiny_model(), module, options

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        loss = self.module.fixed_fused_linear_cross_entropy(
            self.inner.model(input_ids)[0].flatten(0, 1),
            self.inner.lm_head.weight,
            torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten(),
            **self.options,
        )
        return {"loss": loss}


REFUSED = {
    "0.8.1": ("", {}, r"needs liger-kernel >= 0\.8\.2, but 0\.8\.1 is installed: its gradients"),
    "0.8.2": ("hidden, weight, target", {}, r"of Liger has the parameters \('hidden', 'weight'"),
    "0.8.3": ("", {"label_smoothing": 0.1}, "Liger's loss was called with label_smoothing"),
}


@pytest.mark.parametrize("version", REFUSED)
def test_refuses(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, options, message = REFUSED[version]
    module = _liger(parameters)
    monkeypatch.setitem(sys.modules, hf_liger._MODULE, module)
    monkeypatch.setattr("channel_metrics.losses.kernels.metadata.version", lambda _: version)
    hf_liger._check_version.cache_clear()
    with pytest.raises(UnsupportedVersionError, match=message):
        train(tmp_path, prepare=attach, model=FusedModel(module, **options))
    hf_liger._check_version.cache_clear()
    # Put back, also after an error.
    assert module.fixed_fused_linear_cross_entropy(1, 2, 3) == 7.0

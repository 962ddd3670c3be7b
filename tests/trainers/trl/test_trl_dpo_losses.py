"""DPOTrainer: the loss of a channel, for each loss of TRL, is that of each of its pairs alone."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from liger_tools import needs_liger
from transformers import MixtralConfig, MixtralForCausalLM
from trl_dpo_tools import EVERYTHING, IGNORED, OLD, Inputs, dpo
from trl_tools import (
    CHANNELS,
    logs,
    sizes,
    tiny_model,
    weights,
)

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach, detach
from channel_metrics.trainers.trl.dpo_losses import FORMULAS

pytestmark = IGNORED


def losses_and_oracle(folder: Path, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The losses in the log; and the mean of what TRL itself gives for each pair alone."""
    inputs = Inputs()
    options = {"max_steps": 2, "learning_rate": 0.0, **options}
    trainer = dpo(folder, prepare=lambda t: attach(t, EVERYTHING), before=inputs, **options)
    (entry,) = logs(trainer)
    found = {k.removesuffix("_loss"): v for k, v in entry.items() if k.endswith("_loss")}
    plain = detach(trainer)
    losses: dict[str, list[Any]] = {name: [] for name in CHANNELS}
    batches = inputs.each_alone()
    with torch.no_grad():
        for name, pair in batches:
            losses[name].append(plain._compute_loss(plain.model, pair, False).item())
    assert len(batches) == 16
    return found, {name: sum(of) / len(of) for name, of in losses.items() if of}


SMOOTH = {"label_smoothing": 0.1}
PER_PAIR: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": SMOOTH,
    "nca_pair": {},
    "robust": SMOOTH,
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
    "sigmoid_norm": {},
}
OF_THE_BATCH = {"aot", "aot_unpaired", "sft"}


@pytest.mark.parametrize("loss_type", [t for t in PER_PAIR if not (OLD and t == "sigmoid_norm")])
def test_every_loss_is_that_of_each_pair_alone(
    tmp_path: Path, loss_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"loss_type": [loss_type], **PER_PAIR[loss_type]}
    found, want = losses_and_oracle(tmp_path, **options)
    assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert not caplog.records


def test_every_loss_type_of_trl_is_known_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Should be one of") as caught:
        dpo(tmp_path, before=lambda t: setattr(t, "loss_types", ["nonsense"]))
    named = set(ast.literal_eval(str(caught.value).split("one of ")[1]))
    assert named == {*PER_PAIR, *OF_THE_BATCH} - ({"sigmoid_norm"} if OLD else set())
    assert set(FORMULAS) == set(PER_PAIR)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "ipo"], "loss_weights": [0.8, 0.3, 0.1]},
        {"loss_type": ["apo_down"], "precompute_ref_log_probs": True},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.5},
        {"loss_type": ["ipo"], "max_length": 10},
        {"loss_type": ["ipo"], "max_length": 10, "truncation_mode": "keep_end"},
        {"loss_type": ["ipo"], "max_length": 6, "truncation_mode": "keep_end"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "forward_kl"},
        {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
        {"loss_type": ["exo_pair"], "f_divergence_type": "alpha_divergence", **SMOOTH},
        {
            "loss_type": ["robust"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.5,
            **SMOOTH,
        },
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_options_that_change_the_loss(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    found, want = losses_and_oracle(tmp_path, **options)
    assert found == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3]},
        {"loss_type": ["discopop"]},
        {"loss_type": ["apo_down"], "precompute_ref_log_probs": True},
    ],
    ids=lambda options: "-".join(options["loss_type"]),
)
def test_losses_add_up_to_the_trainers_own(tmp_path: Path, options: dict[str, Any]) -> None:
    config = MetricsConfig(metrics=("loss", "samples"))
    trainer = dpo(tmp_path, prepare=lambda t: attach(t, config), max_steps=2, **options)
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    pairs = sum(entry.get(f"{name}_samples", 0) for name in CHANNELS)
    together = sum(
        entry.get(f"{name}_loss", 0) * entry.get(f"{name}_samples", 0) for name in CHANNELS
    )
    assert pairs == 16
    assert together / pairs == pytest.approx(float(entry["loss"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": ["sigmoid", "aot"]}, "no formula per pair for loss_type=['aot']"),
        ({"loss_type": ["aot_unpaired"]}, "no formula per pair for loss_type=['aot_unpaired']"),
        ({"loss_type": ["sigmoid", "sft"]}, "no formula per pair for loss_type=['sft']"),
        ({"use_weighting": True}, "use_weighting=True weights each pair"),
    ],
    ids=["aot", "aot_unpaired", "sft", "weighting"],
)
def test_a_loss_that_does_not_follow_from_the_rewards_is_left_out(
    tmp_path: Path, options: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = dpo(tmp_path, prepare=attach, max_steps=2, **options)
    (entry,) = logs(trainer)
    assert "bbu_rewards/margins" in entry
    assert not any(key.endswith("_loss") for key in entry)
    (warning,) = caplog.messages
    assert reason in warning


def test_a_window_with_another_loss_than_the_formula_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second micro-batch of the first window: its pairs have rewards and no loss."""
    inputs = Inputs()

    def second_is_other(trainer: Any) -> None:
        inner = trainer._compute_loss

        def other(*args: Any, **kwargs: Any) -> Any:
            loss = inner(*args, **kwargs)
            return loss + 0.01 if len(inputs.seen) == 2 else loss

        trainer._compute_loss = other
        inputs(trainer)

    trainer = dpo(tmp_path, prepare=lambda t: attach(t, EVERYTHING), before=second_is_other)
    first, second = logs(trainer)
    names = [name for name, _ in inputs.each_alone()]
    without = set(names[4:8])
    assert without and without < set(names[:16])
    for name in set(names[:16]):
        assert f"{name}_rewards/margins" in first
        assert (f"{name}_loss" in first) is (name not in without)
    assert {name for name in CHANNELS if f"{name}_loss" in second} == set(names[16:])
    (warning,) = caplog.messages
    assert "loss_type=['sigmoid'], the formulas of channel_metrics do not give the loss" in warning


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_a_model_in_half_precision_has_losses(
    tmp_path: Path, loss_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The rewards are rounded to bfloat16 in trl 0.29; the loss from them is as exact as they."""
    trainer = dpo(
        tmp_path,
        model=tiny_model().bfloat16(),
        prepare=lambda t: attach(t, EVERYTHING),
        before=lambda t: t.ref_model.bfloat16(),
        loss_type=[loss_type],
    )
    for entry, whole in zip(
        logs(trainer), [e for e in trainer.state.log_history if "loss" in e], strict=True
    ):
        counts = {name: entry.get(f"{name}_samples", 0) for name in CHANNELS}
        together = sum(count * entry[f"{name}_loss"] for name, count in counts.items() if count)
        assert together / 16 == pytest.approx(float(whole["loss"]), rel=0.02)
    assert not caplog.messages


@needs_liger
@pytest.mark.skipif(
    not OLD, reason="newer TRL has no fused DPO loss of Liger; `make test` runs this"
)
@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_zero"])
def test_ligers_fused_loss_has_the_same_metrics(tmp_path: Path, loss_type: str) -> None:
    """TRL gathers the rewards of Liger's loss in the same way. Compilation is off: no GPU."""
    kernels = ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy")
    usual = {"loss_type": [loss_type]}
    liger = {
        **usual,
        "use_liger_kernel": True,
        "liger_kernel_config": dict.fromkeys(kernels, False),
    }

    def watch(trainer: Any) -> object:
        return attach(trainer, EVERYTHING)

    with torch.compiler.set_stance("force_eager"):
        plain, watched = (dpo(tmp_path, prepare=p, **liger) for p in (None, watch))
        assert torch.equal(weights(plain), weights(watched))
        fused = dpo(tmp_path, prepare=watch, learning_rate=0.0, **liger)
    for found, want in zip(
        logs(fused), logs(dpo(tmp_path, prepare=watch, learning_rate=0.0, **usual)), strict=True
    ):
        assert "bbu_loss" in found
        assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_a_formula_that_trl_has_changed_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = dpo(
        tmp_path,
        prepare=attach,
        max_steps=2,
        loss_type=["ipo"],
        f_divergence_type="js_divergence",
    )
    assert ("bbu_loss" in logs(trainer)[0]) is not OLD
    assert ("do not give the loss" in caplog.text) is OLD


def test_the_loss_of_experts_is_not_that_of_a_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Newer TRL adds the experts' auxiliary loss, one number per batch; trl 0.29 does not."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes(num_local_experts=2)))
    trainer = dpo(tmp_path, model=model, prepare=attach, max_steps=2)
    (entry,) = logs(trainer)
    assert ("bbu_loss" in entry) is OLD
    assert ("auxiliary loss of the experts" in caplog.text) is not OLD

"""A script that puts its own function in the place of transformers' cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_case_tools import ddp, run, told
from hf_tools import (
    PaddingCollator,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from rank_cases import RanksOf
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.loss import loss_utils

from channel_metrics.trainers.hf import attach

transformers_own = loss_utils.fixed_cross_entropy


def times_ten(*args: Any, **kwargs: Any) -> Tensor:
    return 10 * transformers_own(*args, **kwargs)


class Overwriting(torch.autograd.Function):
    """Writes the gradient over the logits, as fused kernels do to save memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target, ignore_index=ignore_index, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        logits.detach().copy_(gradient)
        ctx.save_for_backward(logits.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * outer[0], None, None


def overwriting(
    source: Tensor,
    target: Tensor,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **_: Any,
) -> Tensor:
    if num_items_in_batch is None:
        num_items_in_batch = (target != ignore_index).sum()
    summed: Any = Overwriting.apply
    loss: Tensor = summed(source, target, ignore_index) / num_items_in_batch
    return loss


class Configured:
    """A callable object that cannot be hashed."""

    __hash__: Any = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configured)

    def __call__(self, logits: Tensor, labels: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return transformers_own(logits / 2, labels, *rest, **kwargs)


OWN: dict[str, Callable[..., Tensor]] = {
    "times ten": times_ten,
    "overwriting": overwriting,
    "object": Configured(),
}


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.extend(p.grad.clone() for p in kwargs["model"].parameters())


def trace(folder: Path, prepare: Callable[[Trainer], object] | None) -> dict[str, Any]:
    """All that a training leaves behind, without what the metrics add to its logs."""
    gradients = Gradients()
    trainer = train(
        folder, prepare=prepare, logging_steps=1, trainer_arguments={"callbacks": [gradients]}
    )
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "gradients": gradients.seen,
        "weights": [p.detach() for p in trainer.model.parameters()],
    }


@pytest.mark.parametrize("name", OWN)
def test_it_computes_the_loss(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where metrics were used before it was put there."""
    plain = trace(tmp_path, attach)
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", OWN[name])
    off, on = trace(tmp_path, None), trace(tmp_path, attach)
    torch.testing.assert_close(on, off, rtol=0, atol=0)
    assert loss_utils.fixed_cross_entropy is OWN[name]
    factor = on["losses"][0] / plain["losses"][0]
    assert factor == pytest.approx({"times ten": 10.0, "overwriting": 1.0}.get(name, 0.99), 1e-2)


@pytest.mark.parametrize("name", OWN)
def test_the_channels_have_the_plain_loss(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", OWN[name])
    model, records, collator = (
        tiny_model(attention_dropout=0.0),
        make_records(16),
        PaddingCollator(),
    )
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        logging_steps=4,
        trainer_arguments={"data_collator": collator},
    )
    (entry,) = channel_logs(trainer)
    expected = expected_metrics(token_table(model, records), collator.batches)
    assert entry == pytest.approx(expected, rel=1e-5)
    assert trainer.channel_scratch.reader.captured


def test_another_cross_entropy_inside_transformers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Liger's patches put one there; that the plain one was tried before says nothing of it."""
    plain = F.cross_entropy
    trace(tmp_path, attach)
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: 3 * plain(*args, **kwargs))
    off, on = trace(tmp_path, None), trace(tmp_path, attach)
    torch.testing.assert_close(on, off, rtol=0, atol=0)
    assert "is not plain cross entropy here" in caplog.text


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, wanted = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss: Tensor = F.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch
    return loss


def tripled_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 3 * own_loss(outputs, labels, num_items_in_batch)


@ddp
def with_own_loss(folder: Path) -> Any:
    """transformers divides it by the tokens of all ranks, and multiplies it by their number."""
    records = make_records(64)
    # So the mean of a rank is not that of all.
    for record in records[::2]:
        record["labels"] = [-100] * 3 + record["labels"][3:]
    found = {}
    for name, loss in (("own", own_loss), ("tripled", tripled_loss)):
        trainer = run(folder, records=records, trainer_arguments={"compute_loss_func": loss})
        found[name] = told(trainer)
    return found


def test_the_loss_of_a_rank_is_compared_as_transformers_scales_it(ranks_of: RanksOf) -> None:
    for rank in ranks_of(with_own_loss):
        assert rank["own"]["processes"] == 2 and not rank["own"]["warned"]
        (said,) = rank["tripled"]["warned"]
        assert said.startswith("compute_loss returned ")

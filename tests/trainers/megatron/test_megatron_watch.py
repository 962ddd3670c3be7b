"""Token accuracy, and the loss that somebody else has put into a model: both stay what they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from megatron_tools import MEGATRON
from rank_cases import Case, RanksOf, case

from channel_metrics import ChannelMetricsError, MetricsConfig

alone = case(MEGATRON, ranks=1)


def new_metrics() -> Any:
    from megatron_loop import NAMES

    from channel_metrics.trainers.megatron import MegatronChannelMetrics

    return MegatronChannelMetrics(
        NAMES, config=MetricsConfig(metrics=("loss", "token_acc", "tokens"))
    )


def gpt() -> Any:
    from megatron_loop import model, start

    start()
    made = model()
    made.logits = []
    made.remember = lambda logits: made.logits.append(logits.detach().clone())
    return made


def twice(model: Any) -> None:
    """What tools do to an instance: another loss, and back."""
    own = model.compute_language_model_loss
    model.compute_language_model_loss = MethodType(
        lambda self, labels, logits: 2 * own(labels, logits), model
    )


def counted(metrics: Any, model: Any) -> dict[str, Any]:
    """One micro-batch: what is logged, and the losses and right tokens that the model computed."""
    from megatron_loop import ROWS, batches, forward, loss_func

    batch = next(batches(0))
    metrics.watch(model)
    losses = forward(model, batch)
    loss = partial(loss_func, batch["loss_mask"])
    mask = batch["loss_mask"]
    metrics.count(loss, channels=["bbu"] * ROWS, loss_mask=mask)(losses)
    right = (model.logits.pop().argmax(-1).transpose(0, 1) == batch["labels"]).float()
    return {
        "values": metrics.compute(),
        "naive": {
            "bbu_loss": float((losses * mask).sum() / mask.sum()),
            "bbu_token_acc": float((right * mask).sum() / mask.sum()),
            "bbu_tokens": float(mask.sum()),
        },
    }


@alone
def override(folder: Path) -> Any:
    """An instance has another loss before it is watched."""
    model, metrics = gpt(), new_metrics()
    twice(model)
    return {"plain": counted(new_metrics(), gpt()), "found": counted(metrics, model)}


@alone
def override_on_top(folder: Path) -> Any:
    """It gets another loss after it was watched."""
    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    twice(model)
    return {"plain": plain, "found": counted(metrics, model), "again": counted(metrics, model)}


@alone
def taken_back(folder: Path) -> Any:
    """The loss of before is put back; and other metrics watch the same model in between."""
    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    before = model.compute_language_model_loss
    twice(model)
    counted(metrics, model)
    model.compute_language_model_loss = before
    for _ in range(3):
        counted(new_metrics(), model)
        found = counted(metrics, model)
    own = vars(model)["compute_language_model_loss"]
    return {"plain": plain, "found": found, "is_one_deep": own.own is None}


@alone
def class_replaced(folder: Path) -> Any:
    """The method of the class is replaced after the model was watched."""
    from megatron_loop import Model

    model, metrics = gpt(), new_metrics()
    plain = counted(metrics, model)
    own = Model.compute_language_model_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "compute_language_model_loss", lambda *given: 2 * own(*given))
        return {"plain": plain, "found": counted(metrics, model)}


class Unknown(torch.nn.Module):
    """No Megatron model."""


@alone
def unknown(folder: Path) -> str:
    from megatron_loop import loss_func

    metrics, mask = new_metrics(), torch.ones(1, 4)
    metrics.watch(Unknown())
    count = metrics.count(partial(loss_func, mask), channels=["bbu"], loss_mask=mask)
    try:
        count(torch.ones(1, 4))
    except ChannelMetricsError as error:
        return str(error)
    return ""


@alone
def llava(folder: Path) -> Any:
    """Images stand in the place of a token each; the model says what the labels became."""
    from megatron_llava import IMAGE, POSITIONS, TILE, Wrapper, new_llava, of_rows
    from megatron_loop import LENGTH, ROWS, Model, batches, loss_func, start

    start()
    model, metrics = new_llava(), new_metrics()
    logits: list[torch.Tensor] = []
    # The only way to see them before the loss overwrites them.
    model.language_model.__class__ = Model
    model.language_model.remember = lambda found: logits.append(found.detach().clone())
    batch = next(batches(0))
    tokens = batch["tokens"].clone()
    tokens[:, 2] = IMAGE
    model.encoder_hidden_state = torch.randn(POSITIONS, ROWS, 32)
    metrics.watch(Wrapper(model))
    losses, mask = model(
        images=torch.randn(ROWS, 3, TILE, TILE),
        input_ids=tokens,
        position_ids=torch.arange(LENGTH).repeat(ROWS, 1),
        attention_mask=None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    names = ["bbu", "rru", "bbu"]
    metrics.count(partial(loss_func, mask), channels=names, loss_mask=mask)(losses)
    predicted = logits.pop().argmax(-1).transpose(0, 1)
    return {
        "values": metrics.compute(),
        "naive": of_rows(names, losses, mask, predicted, batch),
        "positions": losses.shape[1],
    }


def check(found: Any) -> None:
    assert found["values"] == pytest.approx(found["naive"], rel=1e-6)


@pytest.mark.parametrize("of", [override, override_on_top, class_replaced])
def test_a_loss_of_somebody_elses_is_called(ranks_of: RanksOf, of: Case) -> None:
    (found,) = ranks_of(of)
    plain, doubled = found["plain"], found["found"]
    check(plain)
    check(doubled)
    loss = 2 * plain["values"]["bbu_loss"]
    assert doubled["values"] == pytest.approx(plain["values"] | {"bbu_loss": loss}, rel=1e-6)


def test_it_is_called_in_each_forward(ranks_of: RanksOf) -> None:
    (found,) = ranks_of(override_on_top)
    assert found["again"] == found["found"]


def test_a_loss_that_is_put_back_is_called(ranks_of: RanksOf) -> None:
    """And what watches it does not pile up."""
    (found,) = ranks_of(taken_back)
    check(found["found"])
    assert found["found"] == found["plain"]
    assert found["is_one_deep"]


def test_a_model_without_a_loss_of_tokens_is_named(ranks_of: RanksOf) -> None:
    (message,) = ranks_of(unknown)
    assert "Unknown has no such method, nor has what it holds" in message


def test_the_language_model_of_a_multimodal_model(ranks_of: RanksOf) -> None:
    """Each image takes the place of one token, with four positions."""
    (found,) = ranks_of(llava)
    assert found["positions"] == 16 + 3
    check(found)

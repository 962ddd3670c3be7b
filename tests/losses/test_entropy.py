"""The entropy of what is predicted: against plain Python, and through a model's own loss."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hf_tools import (
    PaddingCollator,
    channel_logs,
    expected_entropies,
    make_records,
    tiny_model,
    train,
)
from no_sync import NoSync
from reference import entropy
from session_tools import batch, new
from transformers import DataCollatorWithFlattening

from channel_metrics import MetricsConfig
from channel_metrics.losses.cross_entropy import (
    cross_entropy,
    entropy_of,
    token_losses_of_logits,
)
from channel_metrics.trainers.hf import attach


def logits_with(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    logits = (torch.randn(7, 11) * 4).to(dtype)
    logits[1] = 0.0  # all alike: ln 11
    logits[2, 3:] = -torch.inf  # tokens that cannot come
    logits[3, 4] = 300.0  # one is certain
    return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_size", [3, 100])
def test_it_is_that_of_the_softmax(dtype: torch.dtype, chunk_size: int) -> None:
    logits = logits_with(dtype)
    target = torch.zeros(7, dtype=torch.int64)
    expected = [entropy(row) for row in logits.double().tolist()]
    found = token_losses_of_logits(logits, target, with_entropy=True, chunk_size=chunk_size)
    assert found.entropy is not None
    assert found.entropy.tolist() == pytest.approx(expected, abs=1e-5)
    log_probs = torch.log_softmax(logits.double(), -1)
    assert entropy_of(log_probs).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_loss_and_its_gradient_stay_as_they_are() -> None:
    found = []
    for wanted in (False, True):
        logits = logits_with(torch.float32).requires_grad_()
        loss, tokens = cross_entropy(logits, torch.arange(7), reduction="mean", with_entropy=wanted)
        loss.backward()
        assert (tokens.entropy is not None) == wanted and logits.grad is not None
        found.append((loss.detach(), logits.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].nan_to_num(), found[1][1].nan_to_num())


def given_batch(metrics: Any) -> dict[str, Any]:
    def base(records: list[Any]) -> dict[str, Any]:
        ids = torch.tensor([record["ids"] for record in records])
        return {"input_ids": ids, "labels": ids.masked_fill(ids == 5, -100)}

    found: dict[str, Any] = metrics.collator(base)(
        [{"ids": [1, 2, 3, 4], "channel": "a"}, {"ids": [6, 5, 8, 9], "channel": "b"}]
    )
    return found


@pytest.mark.parametrize("by", ["model", "logits", "own loss"])
def test_of_a_model(by: str) -> None:
    """Seen in transformers' loss, handed over, and measured on the outputs."""
    model = tiny_model(attention_dropout=0.0)
    metrics = new(metrics=("entropy", "loss"))
    inputs = given_batch(metrics)
    with metrics.observe(model, inputs) as seen:
        if by == "model":
            model(**inputs)
        elif by == "logits":
            seen.logits(model(input_ids=inputs["input_ids"]).logits)
        else:
            model(input_ids=inputs["input_ids"])
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits.double()
    rows = [[entropy(row) for row in rows] for rows in logits.tolist()]
    logs = metrics.close(1).logs
    assert logs["a_entropy"] == pytest.approx(sum(rows[0][:3]) / 3, rel=1e-5)
    # The label 5 is not supervised: position 0 does not count.
    assert logs["b_entropy"] == pytest.approx(sum(rows[1][1:3]) / 2, rel=1e-5)


@pytest.mark.parametrize("collator", [PaddingCollator(left=True), DataCollatorWithFlattening()])
def test_of_a_trainer(tmp_path: Path, collator: Any) -> None:
    """Padded rows, and packed ones, in training and evaluation."""
    model, records, held_out = (
        tiny_model(attention_dropout=0.0),
        make_records(8),
        make_records(5, 1),
    )
    run = train(
        tmp_path,
        prepare=lambda trainer: attach(trainer, MetricsConfig(metrics=("entropy",))),
        model=model,
        records=records,
        learning_rate=0.0,
        max_steps=2,
        trainer_arguments={"data_collator": collator},
    )
    evaluated = run.evaluate(Dataset.from_list(held_out))
    found = {k: value for k, value in evaluated.items() if k.endswith("_entropy")}
    of_windows = [
        {k: v for k, v in log.items() if k.endswith("_entropy")} for log in channel_logs(run)
    ]
    for logs, those, prefix in ((of_windows[0], records, ""), (found, held_out, "eval_")):
        ids = [[record["input_ids"] for record in those]]
        assert logs == pytest.approx(expected_entropies(model, those, ids, prefix), rel=1e-5)


def test_off_is_free_and_it_is_not_measured() -> None:
    metrics = new(metrics=("loss",))
    inputs, model = given_batch(metrics), tiny_model()
    with metrics.observe(model, inputs) as seen:
        model(**inputs)
    assert [tokens.entropy for tokens in seen.observation.losses] == [None]
    assert "entropy_sum" not in metrics.close(1).columns


def test_without_logits_it_is_absent_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new(metrics=("entropy", "loss"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            metrics.count(batch(("a", 3, 1.0)))
            assert metrics.close(step).logs == {"a_loss": 1.0}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("entropy needs logits, but the loss of a micro-batch")


def test_nothing_waits_for_the_device() -> None:
    with NoSync():
        entropy_of(torch.zeros(4, 9, device="meta"))

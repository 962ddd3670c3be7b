"""Losses of a model that are not the mean of its tokens' losses, or are not shifted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_beside_tools import check_windows, run
from hf_tools import (
    VOCABULARY,
    Record,
    channel_logs,
    tiny_model,
    train,
)
from transformers import BertConfig, BertForMaskedLM, Qwen2ForCausalLM

from channel_metrics.trainers.hf import attach


class Liar(Qwen2ForCausalLM):
    """From its second step on, the sum that its loss is made of is not that of its tokens."""

    steps = 0
    grows = False

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        self.steps += 1
        factor = float(self.steps) if self.grows else 2.0
        honest: Callable[..., torch.Tensor] = F.nll_loss

        def lying(*args: Any, reduction: str = "mean", **kwargs: Any) -> torch.Tensor:
            loss = honest(*args, reduction=reduction, **kwargs)
            return loss if reduction == "none" else factor * loss

        # The first step is honest: there, the way to the token losses is tried.
        F.nll_loss = honest if self.steps == 1 else lying
        try:
            return super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        finally:
            F.nll_loss = honest


@pytest.mark.parametrize(
    "grows",
    [
        False,
        True,
    ],
)
def test_a_loss_that_lies_is_reported_once(
    tmp_path: Path, grows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """In both windows, by the same amount or by another."""
    model: Any = tiny_model(kind=Liar, attention_dropout=0.0)
    model.grows = grows
    trainer, collator = run(tmp_path, model=model)
    check_windows(trainer, collator)
    said = [r.getMessage() for r in caplog.records if r.name == "channel_metrics"]
    assert len([text for text in said if "do not add up" in text]) == 1, said


class PackedRows:
    """Two records of eight tokens per row; where one ends can be seen in the positions."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[Record], dict[str, torch.Tensor]]] = []

    def __call__(self, features: list[Record]) -> dict[str, torch.Tensor]:
        batch = {
            name: torch.tensor([feature[name] for feature in features]).view(-1, 16)
            for name in ("input_ids", "labels")
        }
        batch["position_ids"] = torch.arange(8).repeat(len(features) // 2, 2)
        self.batches.append((features, dict(batch)))
        return batch


def masked_records(count: int) -> list[Record]:
    """About half of the labels are asked for, the first and the last always."""
    generator = torch.Generator().manual_seed(0)
    records = []
    for index in range(count):
        ids = torch.randint(1, VOCABULARY, (8,), generator=generator)
        hidden = torch.rand(8, generator=generator) < 0.5
        hidden[[0, -1]] = False
        labels = ids.masked_fill(hidden, -100)
        channel = ("bbu", "rru", "lvis")[index % 3]
        records.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "channel": channel})
    return records


def test_masked_language_models_with_packed_rows(tmp_path: Path) -> None:
    """Nothing is shifted: the loss at a position is about its own label, also at an edge."""
    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    records, collator = masked_records(32), PackedRows()
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        trainer_arguments={"data_collator": collator},
    )
    channel_of = {tuple(record["input_ids"]): record["channel"] for record in records}
    exact = model.double().eval()
    for entry, start in zip(channel_logs(trainer), (0, 2), strict=True):
        nll: dict[str, list[float]] = {}
        for features, batch in collator.batches[start : start + 2]:
            with torch.no_grad():
                rows = exact(**batch).logits.log_softmax(-1).view(len(features), 8, -1)
            for feature, log_probs in zip(features, rows, strict=True):
                of_channel = nll.setdefault(channel_of[tuple(feature["input_ids"])], [])
                for position, label in enumerate(feature["labels"]):
                    if label != -100:
                        of_channel.append(-log_probs[position, label].item())
        for name, losses in nll.items():
            assert entry[f"{name}_tokens"] == len(losses)
            assert entry[f"{name}_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert sum(v for k, v in entry.items() if k.endswith("_tokens")) == sum(
            map(len, nll.values())
        )

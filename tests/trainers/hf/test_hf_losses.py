"""Losses that do not pass transformers' cross entropy: right all the same, or refused clearly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import (
    VOCABULARY,
    PaddingCollator,
    channel_logs,
    expected_metrics,
    make_records,
    tiny_model,
    token_table,
    train,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.loss import loss_utils
from transformers.modeling_outputs import CausalLMOutput

from channel_metrics import ChannelMetricsError, UnsupportedVersionError
from channel_metrics.capture.logits import shifted_labels
from channel_metrics.trainers.hf import attach


def run_with_oracle(folder: Path, model: torch.nn.Module, **arguments: Any) -> Any:
    """Train with lr 0 on 16 records, one window; assert the metrics equal the oracle."""
    records, collator = make_records(16), PaddingCollator()
    extra = arguments.pop("trainer_arguments", {})
    trainer = train(
        folder,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        logging_steps=4,
        trainer_arguments={"data_collator": collator} | extra,
        **arguments,
    )
    (entry,) = channel_logs(trainer)
    expected = expected_metrics(token_table(model, records), collator.batches)
    assert entry == pytest.approx(expected, rel=1e-5)
    return trainer


def test_label_smoothing_reports_the_plain_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "channel_metrics")
    trainer = run_with_oracle(
        tmp_path, tiny_model(attention_dropout=0.0), label_smoothing_factor=0.1
    )
    assert "second softmax" in caplog.text
    channels = channel_logs(trainer)[0]
    plain = sum(channels[f"{c}_loss"] * channels[f"{c}_share"] for c in ("bbu", "rru", "lvis"))
    plain += channels["lang_chat_loss"] * channels["lang_chat_share"]
    assert trainer.state.log_history[0]["loss"] != pytest.approx(plain, rel=1e-4)


def test_compute_loss_func_reports_the_plain_loss(tmp_path: Path) -> None:
    def focal(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        nll = F.cross_entropy(
            outputs.logits.flatten(0, 1), shifted_labels(labels).flatten(), reduction="none"
        )
        loss: torch.Tensor = ((1 - (-nll).exp()) ** 2 * nll).sum() / num_items_in_batch
        return loss

    run_with_oracle(
        tmp_path,
        tiny_model(attention_dropout=0.0),
        trainer_arguments={"compute_loss_func": focal},
    )


class OwnLoss(Qwen2ForCausalLM):
    """A model that computes its loss itself, as remote code often does."""

    weight = 1.0

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        logits = output.logits.float()
        loss: Any = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=self.weight * loss, logits=logits)


class WeightedLoss(OwnLoss):
    weight = 3.0


class UnknownKind(torch.nn.Module):
    """Not one of transformers' classes, and its loss is not the mean of anything known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = F.multi_margin_loss(logits.flatten(0, 1), labels.flatten().clamp(min=0))
        return {"loss": loss, "logits": logits}


class FusedLoss(OwnLoss):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask, labels)
        return CausalLMOutput(loss=output.loss)


class PartialLogits(OwnLoss):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        output = super().forward(input_ids, attention_mask, labels)
        return CausalLMOutput(loss=output.loss, logits=output.logits[:, -1:])


class TwoHeads(Qwen2ForCausalLM):
    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        first = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        second = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        return CausalLMOutput(loss=first.loss + second.loss, logits=first.logits)


class OtherLabels(Qwen2ForCausalLM):
    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, labels=labels.clamp(min=0), **kwargs)


def of_class(model_class: type[Qwen2ForCausalLM]) -> Qwen2ForCausalLM:
    plain = tiny_model(attention_dropout=0.0)
    model = model_class(plain.config)
    model.load_state_dict(plain.state_dict())
    return model


def test_a_loss_of_its_own_is_measured_on_the_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_oracle(tmp_path, of_class(OwnLoss))
    assert "adds or weights something" not in caplog.text


def test_a_weighted_loss_of_its_own_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_with_oracle(tmp_path, of_class(WeightedLoss))
    assert "adds or weights something" in caplog.text


@pytest.mark.parametrize(
    ("model_class", "error", "message"),
    [
        (FusedLoss, UnsupportedVersionError, "returned no logits"),
        (PartialLogits, UnsupportedVersionError, "logits_to_keep, leave it out"),
        (TwoHeads, UnsupportedVersionError, "computed 2 cross entropies"),
        (OtherLabels, ChannelMetricsError, "tokens cannot be matched to their channels"),
    ],
)
def test_what_cannot_be_seen_is_refused(
    tmp_path: Path, model_class: type[Qwen2ForCausalLM], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path, prepare=attach, model=of_class(model_class))
    assert loss_utils.fixed_cross_entropy.__module__ == "transformers.loss.loss_utils"


def test_an_unknown_kind_of_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match="shifts its labels cannot be told"):
        train(tmp_path, prepare=attach, model=UnknownKind())


def test_fallbacks_leave_the_training_bit_identical(tmp_path: Path) -> None:
    weights = []
    for prepare in (None, attach):
        trainer = train(tmp_path, prepare=prepare, label_smoothing_factor=0.1, max_steps=8)
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert all(torch.equal(off, on) for off, on in zip(*weights, strict=True))


def unshifted_nll(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B] summed nll per row where the logit at a position is about its own label."""
    with torch.no_grad():
        logits = model.eval()(**batch).logits.double()
    nll = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return nll.view(batch["labels"].shape).sum(1)


@pytest.mark.parametrize("kind", ["masked_lm", "encoder_decoder"])
def test_unshifted_losses(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model: torch.nn.Module
    if kind == "masked_lm":
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY,
                intermediate_size=32,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **sizes,
            )
        )
    else:
        t5_config: Any = T5Config
        model = T5ForConditionalGeneration(
            t5_config(
                vocab_size=VOCABULARY,
                d_model=16,
                d_ff=32,
                d_kv=8,
                num_layers=1,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        )
    records = make_records(4)
    collator = PaddingCollator()
    for record in records:
        # The first label counts here: nothing is shifted.
        record["labels"][0] = record["input_ids"][0]
    trainer = train(
        tmp_path,
        prepare=attach,
        model=model,
        records=records,
        learning_rate=0.0,
        max_steps=1,
        logging_steps=1,
        trainer_arguments={"data_collator": collator},
    )
    nll = unshifted_nll(model, collator(records))
    (entry,) = channel_logs(trainer)
    for channel in {record["channel"] for record in records}:
        rows = [i for i, record in enumerate(records) if record["channel"] == channel]
        count = sum(label != -100 for i in rows for label in records[i]["labels"])
        assert entry[f"{channel}_tokens"] == count
        assert entry[f"{channel}_loss"] == pytest.approx(float(nll[rows].sum()) / count, rel=1e-5)

"""A loop of one's own in one process: what is handed over, packs, teachers, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_tools import CHANNELS, PaddingCollator, tiny_model, token_table
from loop_tools import (
    RECORDS,
    OwnModel,
    check,
    logits_loss,
    model_loss,
    no_trace,
    oracle,
    own_table,
    plain_oracle,
    run_loop,
    shifted_hits,
    shifted_nll,
)
from no_sync import NoSync
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorWithFlattening,
)

from channel_metrics import ChannelMetrics, MetricsConfig, evaluate

BATCHES = [RECORDS[:5], RECORDS[5:12]]


def with_junk(losses: Tensor) -> Tensor:
    """[B, S]: the last position predicts nothing."""
    return F.pad(losses, (0, 1), value=1000.0)


# Each hands over the same tokens, from logits [B, S, V] and labels [B, S].
WAYS: dict[str, Callable[[Any, Tensor, Tensor], None]] = {
    "logits": lambda seen, x, y: seen.logits(x),
    "logits without the last": lambda seen, x, y: seen.logits(x[:, :-1]),
    "flat logits": lambda seen, x, y: seen.logits(x.flatten(0, 1)),
    "flat logits without the last": lambda seen, x, y: seen.logits(x[:, :-1].flatten(0, 1)),
    "shifted labels": lambda seen, x, y: seen.logits(x[:, :-1], labels=y[:, 1:], causal=False),
    "losses": lambda seen, x, y: seen.token_losses(
        with_junk(shifted_nll(x, y)), correct=with_junk(shifted_hits(x, y)) == 1
    ),
    "losses without the last": lambda seen, x, y: seen.token_losses(
        shifted_nll(x, y), correct=shifted_hits(x, y)
    ),
    "flat losses": lambda seen, x, y: seen.token_losses(
        shifted_nll(x, y).flatten(), correct=shifted_hits(x, y).flatten()
    ),
    "losses, shifted labels": lambda seen, x, y: seen.token_losses(
        shifted_nll(x, y), correct=shifted_hits(x, y), labels=y[:, 1:], causal=False
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_handed_over(way: str) -> None:
    model, metrics = OwnModel(), ChannelMetrics()
    records = [record for batch in BATCHES for record in batch]
    for number, batch_of in enumerate(BATCHES):
        batch = metrics.collator(PaddingCollator())(batch_of)
        if number:
            batch["targets"] = batch.pop("labels")
        with metrics.observe(model, batch) as seen:
            logits = model(batch["input_ids"])
            labels = batch.pop("targets") if number else batch["labels"]
            given = Handing(seen, labels) if number else seen
            WAYS[way](given, logits, labels)
            logits.detach().zero_()  # what comes later must not matter
    check(metrics.close(1).logs, oracle(own_table(model, records), records))


class Handing:
    """Hands over `labels` too, where a way does not."""

    def __init__(self, seen: Any, labels: Tensor) -> None:
        self.seen, self.labels = seen, labels

    def logits(self, logits: Tensor, **more: Any) -> None:
        self.seen.logits(logits, **{"labels": self.labels} | more)

    def token_losses(self, losses: Tensor, **more: Any) -> None:
        self.seen.token_losses(losses, **{"labels": self.labels} | more)


def test_without_correct_there_is_no_accuracy() -> None:
    metrics = ChannelMetrics()
    batch = metrics.collator(PaddingCollator())(RECORDS[:4])
    with metrics.observe(OwnModel(), batch) as seen:
        seen.token_losses(torch.ones_like(batch["labels"]).bfloat16())
    logs = metrics.close(1).logs
    assert {key for key in logs if key.endswith("_loss")}
    assert not {key for key in logs if key.endswith("_token_acc")}
    assert all(logs[key] == 1.0 for key in logs if key.endswith("_loss"))


# ---- models and losses ---------------------------------------------------------------------------


def test_a_teacher_in_the_block_is_not_counted() -> None:
    student, teacher = tiny_model(0, attention_dropout=0.0), tiny_model(1).eval()
    metrics = ChannelMetrics()
    for labelled in (False, True):
        batch = metrics.collator(PaddingCollator())(RECORDS[:8])
        with metrics.observe(student, batch):
            with torch.no_grad():
                wanted = teacher(**batch).logits
            if not labelled:
                batch.pop("labels")
            found = student(**batch).logits
            F.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean").backward()
        check(metrics.close(1).logs, plain_oracle(RECORDS[:8]))


@pytest.mark.parametrize(
    "wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_a_wrapped_model_without_a_loss(wrap: Any) -> None:
    model, metrics = wrap(tiny_model(attention_dropout=0.0)), ChannelMetrics()
    batch = metrics.collator(PaddingCollator())(RECORDS[:8])
    with metrics.observe(model, batch):
        batch.pop("labels")
        model(**batch)  # that its logits predict the next token is known by its class
    check(metrics.close(1).logs, plain_oracle(RECORDS[:8]))


def test_each_model_of_a_session_is_read_in_its_own_way() -> None:
    torch.manual_seed(0)
    masked = BertForMaskedLM(
        BertConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    causal, metrics = tiny_model(attention_dropout=0.0), ChannelMetrics()
    for model in (causal, masked, causal, masked):
        batch = metrics.collator(PaddingCollator())(RECORDS[:6])
        with metrics.observe(model, batch):
            found = model(**batch)
        logs = metrics.close(1).logs
        if model is causal:
            check(logs, plain_oracle(RECORDS[:6]))
        else:
            mean = sum(logs[k] * logs[k[:-4] + "tokens"] for k in logs if k.endswith("_loss"))
            tokens = int((batch["labels"] != -100).sum())
            assert mean / tokens == pytest.approx(found.loss.item(), rel=1e-5)


# ---- the training stays the same ----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformers", "logits", "own model"])
def test_training_is_the_same_bit_for_bit(kind: str) -> None:
    forward = model_loss if kind == "transformers" else logits_loss

    def run(on: bool) -> tuple[Any, torch.nn.Module]:
        model = OwnModel(dropout=0.1) if kind == "own model" else tiny_model()
        return run_loop(forward, model, on=on), model

    assert len(no_trace(run)) == 2


def test_windows_of_a_training_with_accumulation() -> None:
    for forward in (model_loss, logits_loss):
        model = tiny_model(attention_dropout=0.0)
        first, second = run_loop(forward, model, on=True, learning_rate=0.0)
        check(first, plain_oracle(RECORDS[:8]))
        check(second, plain_oracle(RECORDS[8:16]))


# ---- evaluation ---------------------------------------------------------------------------------


def test_evaluate_in_the_middle_of_a_training() -> None:
    held_out = [RECORDS[30:35], RECORDS[35:41]]
    found: list[Any] = []
    model = tiny_model()

    def after(metrics: ChannelMetrics | None, step: int) -> None:
        if metrics is not None and step in (1, 3):
            collate = metrics.collator(PaddingCollator())
            found.append(evaluate(metrics, model, map(collate, held_out), step=step, split="held"))
            with torch.random.fork_rng():
                table = token_table(model, RECORDS[30:41])
            check(found[-1], oracle(table, RECORDS[30:41], prefix="held_"))

    def run(on: bool) -> tuple[Any, torch.nn.Module]:
        nonlocal model
        model = tiny_model()
        model.model.layers[0].mlp.eval()  # stays so
        logs = run_loop(model_loss, model, on=on, after=after)
        assert model.training and model.model.layers[0].self_attn.training
        assert not model.model.layers[0].mlp.training
        return logs, model

    first, _ = no_trace(run)
    counted = sum(value for key, value in first.items() if key.endswith("_tokens"))
    wanted = plain_oracle(RECORDS[:8])
    assert counted == sum(value for key, value in wanted.items() if key.endswith("_tokens"))
    assert len(found) == 2


def test_an_evaluation_that_fails_leaves_the_training_as_it_was() -> None:
    model, metrics = tiny_model(attention_dropout=0.0), ChannelMetrics()
    batch = metrics.collator(PaddingCollator())(RECORDS[:4])
    model_loss(metrics, model, batch)

    def loader() -> Any:
        yield metrics.collator(PaddingCollator())(RECORDS[4:8])
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(metrics, model, loader(), step=1)
    assert model.training and torch.is_grad_enabled()
    check(metrics.close(1).logs, plain_oracle(RECORDS[:4]))


# ---- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [model_loss, logits_loss])
@pytest.mark.parametrize("flat", [False, True])
def test_no_wait_for_the_device(forward: Any, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model(attn_implementation="eager")
    metrics = ChannelMetrics(MetricsConfig(channels=CHANNELS))
    collate = metrics.collator(DataCollatorWithFlattening() if flat else PaddingCollator())
    # transformers' own sync: it looks whether the position ids restart.
    masking_utils = pytest.importorskip(
        "transformers.masking_utils", reason="transformers 4.51 does it elsewhere"
    )
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    forward(metrics, model, collate(RECORDS[:4]))  # at the first batch, the labels are compared
    model.to("meta")
    batch = {key: value.to("meta") for key, value in collate(RECORDS[4:8]).items()}
    with NoSync():
        forward(metrics, model, batch).backward()

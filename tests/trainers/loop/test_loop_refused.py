"""What a loop of one's own must not do, and what it is told."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from hf_tools import PaddingCollator, tiny_model
from loop_tools import RECORDS, OwnModel, check, oracle, own_table

from channel_metrics import (
    ChannelError,
    ChannelMetrics,
    ChannelMetricsError,
    MetricsConfig,
    UnsupportedVersionError,
)


def batch_for(metrics: ChannelMetrics, first: int = 0) -> Any:
    return metrics.collator(PaddingCollator())(RECORDS[first : first + 4])


@pytest.mark.parametrize(
    ("shape", "causal", "wanted"),
    [
        ((4, 9, 61), True, r"must have \[4, 14\] or \[4, 13\] positions, but have \[4, 9\]"),
        ((14, 4, 61), True, r"must have \[4, 14\] or \[4, 13\] positions, but have \[14, 4\]"),
        ((4, 13, 61), False, r"must have \[4, 14\] positions with causal=False, but have"),
    ],
)
def test_logits_of_another_shape(shape: Any, causal: bool, wanted: str) -> None:
    metrics = ChannelMetrics()
    batch = batch_for(metrics)
    assert batch["labels"].shape == (4, 14)
    with (
        pytest.raises(ChannelMetricsError, match=wanted),
        metrics.observe(OwnModel(), batch) as seen,
    ):
        seen.logits(torch.zeros(shape), causal=causal)


def test_two_hand_overs_in_one_block() -> None:
    metrics = ChannelMetrics()

    def twice() -> None:
        with metrics.observe(OwnModel(), batch_for(metrics)) as seen:
            seen.token_losses(torch.ones(4, 14))
            seen.token_losses(torch.ones(4, 14))

    with pytest.raises(ChannelMetricsError, match="handed over twice in one block"):
        twice()
    assert metrics.close(1).values == {}


def test_correct_of_another_shape() -> None:
    metrics = ChannelMetrics()
    with (
        pytest.raises(ChannelMetricsError, match=r"`correct` must have the shape of the losses"),
        metrics.observe(OwnModel(), batch_for(metrics)) as seen,
    ):
        seen.token_losses(torch.ones(4, 14), correct=torch.ones(4, 13).bool())


def test_a_batch_without_labels() -> None:
    metrics = ChannelMetrics()
    batch = batch_for(metrics)
    del batch["labels"]
    with (
        pytest.raises(ChannelError, match="need `labels`: keep them in the batch, or pass"),
        metrics.observe(OwnModel(), batch) as seen,
    ):
        seen.logits(torch.zeros(4, 14, 61))


def test_a_batch_without_channels() -> None:
    metrics = ChannelMetrics()
    with (
        pytest.raises(ChannelError, match=r"collate_fn that `metrics\.collator` has made"),
        metrics.observe(OwnModel(), PaddingCollator()(RECORDS[:4])) as seen,
    ):
        seen.token_losses(torch.ones(4, 14))


def test_a_model_of_ones_own_that_hands_nothing_over() -> None:
    model, metrics = OwnModel(), ChannelMetrics()
    batch = batch_for(metrics)
    with (
        pytest.raises(UnsupportedVersionError, match=r"hand over .* `seen\.logits\(\.\.\.\)`"),
        metrics.observe(model, batch),
    ):
        model(batch["input_ids"])


def test_two_forwards_in_one_block() -> None:
    model, metrics = tiny_model(), ChannelMetrics()

    def twice() -> None:
        batch = batch_for(metrics)
        with metrics.observe(model, batch):
            model(**batch)
            model(**batch)

    with pytest.raises(UnsupportedVersionError, match="ran 2 forwards in one step"):
        twice()


def test_labels_of_another_length_in_a_pack() -> None:
    metrics = ChannelMetrics()
    flat = {
        "input_ids": torch.ones(1, 6).long(),
        "labels": torch.ones(1, 6).long(),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    batch = metrics.collator(lambda _: flat)([{"channel": "a"}, {"channel": "b"}])
    with (
        pytest.raises(ChannelMetricsError, match="cu_seqlens"),
        metrics.observe(OwnModel(), batch) as seen,
    ):
        seen.token_losses(torch.ones(1, 5), labels=flat["labels"][:, 1:], causal=False)


def test_a_block_that_raises_counts_nothing() -> None:
    model, metrics = OwnModel(), ChannelMetrics()
    for fails in (True, False):
        batch = batch_for(metrics)
        try:
            with metrics.observe(model, batch) as seen:
                seen.logits(model(batch["input_ids"]))
                if fails:
                    raise MemoryError
        except MemoryError:
            pass
    check(metrics.close(1).logs, oracle(own_table(model, RECORDS[:4]), RECORDS[:4]))


def test_a_late_mistake_ends_the_metrics_and_not_the_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, metrics = OwnModel(), ChannelMetrics(MetricsConfig())
    with metrics.observe(model, batch := batch_for(metrics)) as seen:
        seen.logits(model(batch["input_ids"]))
    assert metrics.close(1).values
    for step in (2, 3):
        with caplog.at_level(logging.WARNING), metrics.observe(model, batch_for(metrics)) as seen:
            seen.logits(torch.zeros(4, 3, 61))
            seen.token_losses(torch.zeros(4, 3))
        assert metrics.close(step).values == {}
    assert caplog.text.count("channel metrics are off for the rest of this run") == 1


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # an import of it raises
import torch
from channel_metrics import ChannelMetrics
del sys.modules["transformers"]

metrics = ChannelMetrics()
base = lambda rs: {"input_ids": torch.tensor([r["ids"] for r in rs])}
records = [{"ids": [1, 2, 3], "channel": "a"}, {"ids": [1, 0, 0], "channel": "b"}]
batch = metrics.collator(base)(records)
model = torch.nn.Embedding(4, 4)
with metrics.observe(model, batch) as seen:
    logits = model(batch["input_ids"]) * 0
    seen.logits(logits, labels=batch["input_ids"])
print(metrics.close(1).logs)
metrics = ChannelMetrics()
try:
    batch = metrics.collator(base)([{"ids": [1, 2], "channel": "a"}])
    with metrics.observe(model, batch | {"labels": batch["input_ids"]}):
        pass
except ValueError as error:
    print(error)
assert "transformers" not in sys.modules
"""


def test_without_transformers() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=True
    )
    first, second = run.stdout.splitlines()
    logs = eval(first)
    assert logs["a_loss"] == logs["b_loss"] == pytest.approx(1.3862944)
    assert logs["a_tokens"] == logs["b_tokens"] == 2.0
    assert second.startswith("the model is none of transformers. In a loop of your own, hand over")

"""`ChannelMetrics`: names of channels, and the keys of a log."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from session_tools import batch, new

from channel_metrics import ChannelError, ConfigError
from channel_metrics.session import ChannelMetrics


def test_declared_channels_that_share_a_key() -> None:
    with pytest.raises(ChannelError, match="'bbu' and 'bbu_weighted' would both be logged"):
        new("bbu", "bbu_weighted")
    with pytest.raises(ConfigError, match="'train_loss', which is the trainer's own key"):
        new("train", reserved=["train_loss"])
    metrics = new("bbu", reserved=["train_loss"])
    with pytest.raises(ConfigError, match="'train_loss'"):
        metrics.declare_names(["rru", "train"])
    with pytest.raises(ChannelError, match="'lvis' is not in the declared table"):
        new("bbu", unknown="error").declare_names(["bbu", "unlabeled", "lvis"])
    unlabeled = new("bbu", unknown="unlabeled", reserved=["lvis_loss"])
    unlabeled.declare_names(["lvis"])
    assert unlabeled.labels.names == ("bbu",)


def test_keys_that_clash_later_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("bbu", metrics=("loss", "weighted_loss"), reserved=["grad_norm", "lvis_loss"])
    metrics.count(batch(("bbu", 1, 1.0), weights=torch.ones(1)))
    assert metrics.close(1).logs == {"bbu_loss": 1.0, "bbu_weighted_loss": 1.0}
    for step in (2, 3):
        given = batch(
            ("bbu", 1, 1.0), ("bbu_weighted", 1, 2.0), ("lvis", 1, 3.0), weights=torch.ones(3)
        )
        metrics.count(given)
        window = metrics.close(step)
        assert window.logs == {
            "bbu_loss": 1.0, "bbu_weighted_weighted_loss": 2.0, "lvis_weighted_loss": 3.0,
        }  # fmt: skip
        # The values are there for observers.
        assert window.values["lvis"]["loss"] == 3.0
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert all(message.endswith("These keys are left out of the log.") for message in messages)


def test_keys_that_an_evaluation_brings(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("bbu", "eval_bbu")
    with metrics.evaluation("test", 1) as evaluation:
        metrics.count(batch(("bbu", 1, 1.0), ("eval_bbu", 2, 1.0)))
    assert evaluation.logs == {"eval_eval_bbu_loss": 1.0, "eval_eval_bbu_tokens": 2.0}
    metrics.count(batch(("bbu", 1, 1.0), ("eval_bbu", 2, 1.0)))
    assert metrics.close(1).logs == {"bbu_loss": 1.0, "bbu_tokens": 1.0}
    assert len(caplog.records) == 1


def test_values_join_the_log_of_a_trainer(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new()
    logs: dict[str, Any] = {"a_loss": "the trainer's", "lr": 1e-3}
    for step in (1, 2):
        metrics.count(batch(("a", 2, 1.0)))
        metrics.write(metrics.close(step), logs)
    assert logs == {"a_loss": "the trainer's", "lr": 1e-3, "a_tokens": 2.0}
    (record,) = caplog.records
    assert "'a_loss' is already logged by the trainer" in record.getMessage()


def test_class_labels_of_a_declared_dataset() -> None:
    """A collator without a dataset of its own has the names from `declare`."""
    features = Features(channel=ClassLabel(names=["web", "books"]))
    metrics = ChannelMetrics()
    metrics.declare(Dataset.from_dict({"channel": [1, 0, 1]}, features=features), "train")
    assert metrics.labels.names == ("books", "web")
    batch = {"labels": torch.zeros(2, 3, dtype=torch.int64)}
    found = metrics.collator(lambda _: batch)([{"channel": 0}, {"channel": 1}])
    assert found["channels"].tolist() == [1, 0]

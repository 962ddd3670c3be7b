"""ms-swift's own loss of a channel, as a metric; without ms-swift."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from channel_metrics import ChannelMetrics, ConfigError, MetricsConfig, MicroBatch
from channel_metrics.trainers.swift.schema import schema_with_own_loss

CONFIG = MetricsConfig(metrics=("loss", "tokens"), eval_channels=("bbu",))


def opened() -> ChannelMetrics:
    session = ChannelMetrics(CONFIG, schema=schema_with_own_loss(CONFIG.key_format))
    session.declare_names(["bbu", "rru"])
    return session


def batch() -> MicroBatch:
    """bbu: losses 1 and 3, weights 1 and 0.5; without a channel: 4 with weight 2, and a NaN."""
    return MicroBatch(
        token_losses=torch.tensor([[1.0, 3.0], [4.0, torch.nan], [5.0, 5.0]]),
        channels=["bbu", None, "rru"],
        weights=torch.tensor([[1.0, 0.5], [2.0, 1.0], [0.0, 1.0]]),
    )


def test_the_optimised_loss_over_the_number_of_tokens() -> None:
    session = opened()
    session.count(batch())
    logs = session.close(1).logs
    assert (logs["bbu_loss"], logs["loss_bbu"]) == (2.0, 1.25)
    assert (logs["unlabeled_loss"], logs["loss_None"]) == (4.0, 8.0)
    assert (logs["rru_loss"], logs["loss_rru"]) == (5.0, 2.5)


def test_an_evaluation_logs_it_for_every_channel() -> None:
    session = opened()
    with session.evaluation("eval", 1) as found:
        session.count(batch())
    own = {"eval_loss_bbu", "eval_loss_None", "eval_loss_rru"}
    assert set(found.logs) == {"eval_bbu_loss", "eval_bbu_tokens"} | own


@pytest.mark.parametrize(
    ("key_format", "rewrite"),
    [("{metric}_{channel}", str), ("{metric}/{channel}", lambda key: key.replace("/", "_"))],
)
def test_a_format_with_the_same_keys_is_refused(
    key_format: str, rewrite: Callable[[str], str]
) -> None:
    with pytest.raises(ConfigError, match="Or leave out --enable_channel_loss"):
        schema_with_own_loss(key_format, rewrite)


@pytest.mark.parametrize("name", ["None", "loss"])
def test_names_with_the_same_keys_are_refused(name: str) -> None:
    """`loss_None` is that of samples without a channel; `loss_loss` would be both."""
    schema = schema_with_own_loss("{channel}_{metric}")
    with pytest.raises(ValueError, match=f"loss_{name}"):
        ChannelMetrics(MetricsConfig(channels=(name,)), schema=schema)

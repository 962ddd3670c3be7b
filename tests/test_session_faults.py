"""`ChannelMetrics`: what is said, and what an error does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from session_tools import batch, new, tokens

from channel_metrics import ChannelMetricsError


def test_a_window_without_any_channel_warns(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new("a", fields=("meta.source", "channel"))
    metrics.count(batch((None, 2, 1.0), ("a", 1, 1.0)))
    metrics.close(0)
    assert not caplog.records
    for step in (1, 2):
        metrics.count(batch((None, 2, 1.0)))
        assert tokens(metrics.close(step)) == {"unlabeled": 2}
    (record,) = caplog.records
    assert record.getMessage() == (
        "no record of this train window had a channel (looked for meta.source, channel); all "
        "tokens count as 'unlabeled'."
    )


def test_what_does_not_add_up_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = new()
    for step, reported in ((1, 2.00001), (2, 4.0), (3, 8.0), (4, 2.0)):
        metrics.count(batch(("a", 2, 1.0), reported_sum=torch.tensor(reported)))
        metrics.peek(step)
        assert len(caplog.records) == (step > 2)
        metrics.close(step)
    (record,) = caplog.records
    assert "do not add up to the trainer's own loss" in record.getMessage()
    assert "difference is 5.0e-01." in record.getMessage()


def test_an_error_raises_until_a_train_window_was_seen(caplog: pytest.LogCaptureFixture) -> None:
    bad = batch(("a", 2, 1.0), labels=torch.ones(3).long())
    metrics = new()
    with pytest.raises(ChannelMetricsError, match="labels must have the shape"):
        metrics.count(bad)
    # An evaluation before training, or an empty window, proves nothing.
    with metrics.evaluation("sanity", 0):
        metrics.count(batch(("a", 2, 1.0)))
    metrics.close(0)
    with pytest.raises(ChannelMetricsError, match="labels must have the shape"):
        metrics.count(bad)
    metrics.count(batch(("a", 2, 1.0)))
    metrics.close(1)
    metrics.count(bad)
    assert not metrics.measuring
    (record,) = caplog.records
    assert "off for the rest of this run, training goes on" in record.getMessage()
    metrics.count(batch(("a", 2, 1.0)))
    with metrics.evaluation("test", 2) as evaluation:
        metrics.count(batch(("a", 2, 1.0)))
    assert evaluation.logs == {} and metrics.close(2).values == {} and metrics.peek(2).logs == {}


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_on_error(on_error: Any, tmp_path: Path) -> None:
    metrics = new(on_error=on_error)
    if on_error == "warn":
        metrics.count(batch(("a", 2, 1.0), labels=torch.ones(3).long()))
        assert not metrics.measuring and metrics.close(1).values == {}
        metrics.save(tmp_path, is_writer=True)
        assert list(tmp_path.iterdir()) == []
        return
    metrics.count(batch(("a", 2, 1.0)))
    metrics.close(1)
    with pytest.raises(ChannelMetricsError):
        metrics.count(batch(("a", 2, 1.0), labels=torch.ones(3).long()))

"""`ChannelMetrics`: totals of the run, saved and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import TORCH, RanksOf, case
from session_tools import batch, new, tokens

from channel_metrics import ChannelMetricsError, MetricsConfig
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.session import ChannelMetrics


def trained(metrics: ChannelMetrics) -> ChannelMetrics:
    """Two channels: one in a window that was closed, one in the open window."""
    metrics.count(batch(("a", 3, 1.0)))
    metrics.close(1)
    metrics.count(batch(("a", 2, 1.0), ("b", 4, 1.0)))
    return metrics


def of(number: int, samples: int) -> dict[str, int]:
    return {"tokens_total": number, "samples_total": samples}


def test_totals_are_saved_and_resumed(tmp_path: Path) -> None:
    metrics = trained(new())
    metrics.save(tmp_path, is_writer=True)
    # The open window is in the file, and stays open.
    assert metrics.totals.of("a") == of(3, 1)
    assert tokens(metrics.close(2)) == {"a": 2, "b": 4}
    again = new(metrics=("tokens", "tokens_total"))
    again.start(tmp_path)
    assert (again.totals.of("a"), again.totals.of("b")) == (of(5, 2), of(4, 1))
    again.count(batch(("a", 1, 1.0)))
    assert again.close(3).logs == {"a_tokens": 1.0, "a_tokens_total": 6}
    # What is absent from a window keeps its totals.
    again.save(tmp_path / "later", is_writer=True)
    assert new().totals.of("b") == of(0, 0)
    last = new()
    last.resume(tmp_path / "later")
    assert (last.totals.of("a"), last.totals.of("b")) == (of(6, 3), of(4, 1))
    last.start()
    assert last.totals.of("a") == of(0, 0)


def test_only_the_writer_writes(tmp_path: Path) -> None:
    trained(new()).save(tmp_path, is_writer=False)
    assert list(tmp_path.iterdir()) == []


@case(TORCH, ranks=2)
def saved_by_default(folder: Path) -> list[str]:
    """Each rank into a folder of its own."""
    own = folder / f"of_rank{dist.get_rank()}"
    own.mkdir(parents=True)
    trained(new()).save(own)
    return [path.name for path in own.iterdir()]


def test_by_default_the_first_rank_writes(ranks_of: RanksOf) -> None:
    assert ranks_of(saved_by_default) == [["channel_metrics.json"], []]


def test_a_file_under_its_old_name_is_resumed(tmp_path: Path) -> None:
    trained(new()).save(tmp_path, is_writer=True)
    (tmp_path / "channel_metrics.json").rename(tmp_path / "channel_metrics_totals.json")
    metrics = new()
    metrics.resume(tmp_path)
    assert metrics.totals.of("b") == of(4, 1)


def test_a_checkpoint_without_totals(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metrics = trained(new())
    metrics.start(tmp_path)
    assert metrics.totals.of("a") == of(0, 0) and metrics.close(1).values == {}
    (record,) = caplog.records
    assert str(tmp_path) in record.getMessage() and "count from here" in record.getMessage()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "channels": {"a": {"tokens_total": null}}}']
)
@pytest.mark.parametrize("on_error", [None, "raise", "warn"])
def test_a_damaged_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, on_error: Any
) -> None:
    path = tmp_path / "channel_metrics.json"
    path.write_text(text)
    metrics = new(on_error=on_error, metrics=("tokens", "tokens_total"))
    if on_error != "warn":
        with pytest.raises(ChannelMetricsError, match="delete it to resume with totals") as raised:
            metrics.start(tmp_path)
        assert str(path) in str(raised.value)
        return
    for _ in range(2):
        metrics.start(tmp_path)
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "delete it" in record.getMessage()
    metrics.count(batch(("a", 2, 1.0)))
    assert metrics.close(1).logs == {"a_tokens": 2.0, "a_tokens_total": 2}


def test_a_state_of_ones_own() -> None:
    metrics = trained(new())
    metrics.begin_step()
    metrics.count(batch(("b", 1, 1.0)))
    state = json.loads(json.dumps(metrics.state_dict(), default=lambda tensor: tensor.tolist()))
    state["train"]["sums"] = torch.tensor(state["train"]["sums"], dtype=torch.float64)
    again = new("c", metrics=("tokens", "tokens_total"))
    again.count(batch(("c", 9, 1.0)))
    again.load_state_dict(state)
    assert again.close(2).values == {
        "a": {"tokens": 2.0, "tokens_total": 5},
        "b": {"tokens": 5.0, "tokens_total": 5},
    }
    with pytest.raises(ChannelMetricsError, match="another version"):
        again.load_state_dict({**state, "totals": {"version": 9}})


@pytest.mark.parametrize("change", [{"totals": None}, {"train": [1]}, {"train": {"version": 1}}])
def test_a_damaged_state_of_ones_own_changes_nothing(change: dict[str, Any]) -> None:
    metrics = trained(new(metrics=("tokens", "tokens_total")))
    before = metrics.state_dict()
    state = trained(new()).state_dict()
    with pytest.raises(ChannelMetricsError):
        metrics.load_state_dict({**state, **change})
    states: list[Any] = [{}, {"train": state["train"]}, [state], "state"]
    for damaged in states:
        with pytest.raises(ChannelMetricsError, match="a mapping with `totals`"):
            metrics.load_state_dict(damaged)
    after = metrics.state_dict()
    assert after["totals"] == before["totals"]
    assert torch.equal(after["train"].pop("sums"), before["train"].pop("sums"))
    assert after == before


def test_a_checkpoint_has_no_step_that_is_still_open(tmp_path: Path) -> None:
    """A trainer may save before the optimizer has stepped, and take the step again."""
    metrics = ChannelMetrics(MetricsConfig(metrics=("tokens",)))
    batch = MicroBatch(token_losses=torch.ones(4), channels=["a"])
    metrics.begin_step()
    metrics.count(batch)
    metrics.end_step()
    metrics.begin_step()
    metrics.count(batch)
    metrics.save(tmp_path, is_writer=True)
    stored = json.loads((tmp_path / "channel_metrics.json").read_text())
    assert stored["channels"]["a"]["tokens_total"] == 4
    metrics.end_step()
    assert metrics.close(2).logs == {"a_tokens": 8}

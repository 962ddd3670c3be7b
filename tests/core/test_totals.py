"""Totals of a run: sums by name that outlive windows, files and channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from channel_metrics import (
    ChannelLossAccumulator,
    ChannelMetrics,
    ChannelMetricsError,
    MetricsConfig,
    MicroBatch,
)
from channel_metrics.core.schema import Column, Schema
from channel_metrics.core.totals import TOTALS_FILE, RunTotals, totals_path


def window(**tokens: int) -> ChannelLossAccumulator:
    """One sequence of so many supervised tokens per channel."""
    made = ChannelLossAccumulator(tokens)
    for name, count in tokens.items():
        made.update(torch.ones(1, count), channels=[name])
    return made


def add(totals: RunTotals, window: ChannelLossAccumulator) -> RunTotals:
    return totals.add(window.table.names, window.sums())


def of(tokens: int, samples: int) -> dict[str, int]:
    return {"tokens_total": tokens, "samples_total": samples}


def test_windows_add_up_by_name() -> None:
    totals = add(add(RunTotals(), window(bbu=3, rru=2)), window(lvis=1, bbu=4))
    assert totals.of("bbu") == of(7, 2)
    assert totals.of("rru") == of(2, 1)
    assert totals.of("lvis") == of(1, 1)
    assert totals.of("never") == of(0, 0)


def test_tokens_without_a_channel_are_kept_too() -> None:
    made = ChannelLossAccumulator().update(torch.ones(2, 5), channels=[None, None])
    assert add(RunTotals(), made).of("unlabeled") == of(10, 2)


def test_a_channel_without_tokens_leaves_no_trace() -> None:
    assert add(RunTotals(), ChannelLossAccumulator(["bbu"])).state_dict()["channels"] == {}


def test_a_sequence_without_supervised_tokens_is_a_sample() -> None:
    made = ChannelLossAccumulator(["bbu"])
    made.update(torch.ones(1, 3), channels=["bbu"], loss_mask=torch.zeros(1, 3))
    assert add(RunTotals(), made).of("bbu") == of(0, 1)


def test_a_copy_is_independent() -> None:
    first = add(RunTotals(), window(bbu=3))
    first.notes["seen"] = [1]
    second = add(first.copy(), window(bbu=1))
    second.notes["seen"].append(2)
    assert first.notes == {"seen": [1]}
    assert (first.of("bbu"), second.of("bbu")) == (of(3, 1), of(4, 2))
    first.of("bbu")["tokens_total"] = 99
    assert first.of("bbu") == of(3, 1)


def test_files_keep_numbers_beyond_float32(tmp_path: Path) -> None:
    path = tmp_path / "made" / "on" / "the way" / "totals.json"
    state = {"version": 1, "channels": {"büb": of(2**53 - 1, 2**40)}}
    RunTotals().load_state_dict(state).save(path)
    assert RunTotals().load(path).state_dict() == state
    # Nothing else is left in the folder, and what was there is replaced.
    add(RunTotals(), window(rru=2)).save(path)
    assert RunTotals().load(path).of("büb") == of(0, 0)
    assert [file.name for file in path.parent.iterdir()] == ["totals.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "channels": 3}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": "many"}}}',
        '{"version": 1, "channels": {"bbu": 1}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": %s}}}' % ("9" * 5_000),
        '{"version": 1, "channels": {"bbu": {"tokens_total": 9223372036854775808}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": NaN}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": Infinity}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": -1}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": 2.5}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": true}}}',
        '{"version": 1, "channels": {"bbu": {"tokens_total": "3"}}}',
        '{"version": 1, "channels": []}',
        '{"version": NaN, "channels": {}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        b"\xff\xfe\x00damaged\x80",
        None,
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "channel_metrics.json"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    totals = add(RunTotals(), window(bbu=3))
    with pytest.raises(ChannelMetricsError) as error:
        totals.load(path)
    assert str(path) in str(error.value) and "delete it" in str(error.value)
    assert totals.of("bbu") == of(3, 1)
    # A run that only warns goes on with zeros.
    session = ChannelMetrics(MetricsConfig(on_error="warn"))
    session.totals = totals
    session.start(tmp_path)
    assert session.totals.state_dict()["channels"] == {}
    assert any(str(path) in warning for warning in session.warned)
    session.count(MicroBatch(token_losses=torch.ones(1, 2), channels=["bbu"]))
    session.close(1)
    assert session.totals.of("bbu") == of(2, 1)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "channel_metrics.json"
    path.write_text(json.dumps({"version": 2, "channels": {}}))
    with pytest.raises(ChannelMetricsError, match="must have version 1, but have 2"):
        RunTotals().load(path)


def test_a_version_with_other_columns_loads_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "channel_metrics.json"
    path.write_text('{"version": 1, "channels": {"bbu": {"tokens_total": 4, "bytes_total": 9}}}')
    totals = RunTotals().load(path)
    assert totals.of("bbu")["tokens_total"] == 4 and totals.of("bbu")["samples_total"] == 0
    # What this version does not count is kept for the one that does.
    assert add(totals, window(bbu=1)).state_dict()["channels"]["bbu"] == {
        **of(5, 1),
        "bytes_total": 9,
    }


def test_the_old_name_of_the_file(tmp_path: Path) -> None:
    assert totals_path(tmp_path) is None
    old = tmp_path / "channel_metrics_totals.json"
    old.write_text("{}")
    assert totals_path(tmp_path) == old
    (tmp_path / TOTALS_FILE).write_text("{}")
    assert totals_path(tmp_path) == tmp_path / "channel_metrics.json"


def test_totals_of_something_else() -> None:
    pairs = Schema("pairs", count="pairs")
    pairs.register(Column("margin", "reward", ""), Column("pairs", "pairs", "", total=True))
    totals = RunTotals(pairs).add(["a"], torch.tensor([[0.5, 0.0], [0.25, 3.0]]))
    assert totals.of("a") == {"pairs_total": 3}
    assert totals.copy().state_dict() == {"version": 1, "channels": {"a": {"pairs_total": 3}}}

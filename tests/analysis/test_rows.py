"""The final table of a log whose channels are only evaluated."""

from __future__ import annotations

import math
from typing import Any

import pytest

from analysis.analysis_tools import run_of
from channel_metrics.analysis.rows import final_rows, total_of
from channel_metrics.analysis.store import SeriesStore


def evaluations(num_channels: int) -> list[dict[str, float]]:
    """Two evaluations, in which channel c3 has 3 + 1 tokens."""
    return [
        {"step": step}
        | {f"eval_c{i}_loss": 1.0 + i + step for i in range(num_channels)}
        | {f"eval_c{i}_tokens": i + 1 for i in range(num_channels)}
        for step in (1, 2)
    ]


def test_tokens_are_those_of_one_evaluation() -> None:
    first, last = final_rows(run_of(evaluations(2)))
    assert (first.channel, first.split, first.first_loss, first.last_loss) == ("c0", "eval", 2, 3)
    assert (first.tokens, last.tokens) == (1, 2)
    assert (first.share, last.share) == (1 / 3, 2 / 3)


def test_beside_channels_that_are_trained_they_have_no_share() -> None:
    log = [entry | {"a_loss": 1.0, "a_tokens": 7} for entry in evaluations(2)]
    rows = {row.channel: row for row in final_rows(run_of(log))}
    assert list(rows) == ["a", "c0", "c1"]
    assert (rows["a"].tokens, rows["a"].share) == (14, 1)
    assert (rows["c1"].tokens, rows["c1"].share) == (2, None)


def test_each_series_is_read_a_few_times_however_many_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = SeriesStore.series
    reads: list[Any] = []

    def counted(store: SeriesStore, key: Any) -> Any:
        reads.append(key)
        return read(store, key)

    monkeypatch.setattr(SeriesStore, "series", counted)
    for count in (2, 40):
        run = run_of(evaluations(count))
        reads.clear()
        assert len(final_rows(run)) == count
        assert len(reads) <= 3 * count


def test_a_count_that_is_no_number_takes_no_part() -> None:
    log = [
        {"step": step, "a_loss": 1.0, "a_tokens": math.nan if step == 2 else 5}
        for step in range(1, 5)
    ]
    assert total_of(run_of(log), "a", "tokens") == 15

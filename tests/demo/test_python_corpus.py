"""Text of this machine's Python."""

from __future__ import annotations

import pytest

from channel_metrics.demo import python_corpus
from channel_metrics.demo.python_corpus import PARTS, read_corpus
from channel_metrics.errors import ChannelMetricsError, ConfigError


@pytest.mark.parametrize("part", PARTS)
def test_records_are_there_the_same_each_time_and_within_the_cap(part: str) -> None:
    records = list(read_corpus(part, max_bytes=50_000))
    assert records == list(read_corpus(part, max_bytes=50_000))
    assert len(records) > 10
    assert sum(len(record["text"].encode()) for record in records) <= 50_000
    assert len({record["metadata"]["name"] for record in records}) > 1
    assert all(record["text"].strip() for record in records)


def test_unknown_part() -> None:
    with pytest.raises(ConfigError, match="known are stdlib, tests, topics, packages"):
        next(read_corpus("libs", max_bytes=1))


def test_a_part_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(python_corpus.PARTS, "topics", lambda: iter(()))
    with pytest.raises(ChannelMetricsError, match="has none"):
        next(read_corpus("topics", max_bytes=1000))

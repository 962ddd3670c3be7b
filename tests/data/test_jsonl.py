"""Broken JSONL is reported with its file and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from channel_metrics.data.jsonl import check_record, read_jsonl, text_of
from channel_metrics.errors import ChannelMetricsError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2: .* no JSON"),
        (b'{"text": "a"}\n\n[1]\n', "data.jsonl:3: .* list"),
        (b'{"text": "\xff"}\n', "data.jsonl:1: .* no JSON"),
        (b"[" * 100_000 + b"\n", "data.jsonl:1: .* no JSON"),
        (b"", "data.jsonl is empty"),
        (b"\n  \n", "data.jsonl is empty"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ChannelMetricsError, match=message):
        list(read_jsonl(path))


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ChannelMetricsError, match="does not exist"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    with pytest.raises(ChannelMetricsError, match="is a directory"):
        list(read_jsonl(tmp_path))


def test_byte_order_mark_windows_lines_and_a_last_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert list(read_jsonl(path)) == [(1, {"text": "a"}), (2, {"text": "b"})]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": ""},
        {"text": 3},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": ["parts"]}]},
        {"text": "a", "metadata": "bbu"},
    ],
)
def test_records_that_cannot_be_trained_on(record: dict[str, object]) -> None:
    with pytest.raises(ChannelMetricsError, match=re.escape("data.jsonl:7: ")):
        check_record(record, "data.jsonl:7")


def test_text_of_a_record() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert text_of({"messages": messages}) == "a\nb"
    assert text_of({"text": "c"}) == "c"
    assert text_of({"input_ids": [1]}) is None

"""Reads JSONL records line by line. The error for a broken line names file and line number.

>>> from pathlib import Path
>>> [record["text"] for _, record in read_jsonl(Path("notes.jsonl"))]  # doctest: +SKIP
['one', 'two']
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from channel_metrics.errors import ChannelMetricsError

__all__ = ["check_record", "read_jsonl", "text_of"]


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line of `path` that is not blank.

    Raises `ChannelMetricsError` for a missing or empty file, and for a line that is no JSON object.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ChannelMetricsError(f"expected a JSONL file, but {path} {what}; check the path.")
    found = False
    # Bytes, because the errors of text mode do not name the line of bytes that are no UTF-8.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                found = True
                yield number, _parse(line, f"{path}:{number}")
    if not found:
        raise ChannelMetricsError(f"expected at least one record, but {path} is empty.")


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Check that a record has `messages` or `text` to train on.

    Args:
        record: a record of a JSONL file.
        where: file and line, for the message.

    Raises:
        ChannelMetricsError: it has neither, or `metadata` is no object.
    """
    messages, text, metadata = (record.get(key) for key in ("messages", "text", "metadata"))
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ChannelMetricsError(
            f"{where}: metadata must be an object, but is {type(metadata).__name__}."
        )
    if messages is None and isinstance(text, str) and text:
        return
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return
    raise ChannelMetricsError(
        f"{where}: expected a record with messages, a list of "
        '{"role": ..., "content": ...} with strings, or a non-empty text, but it has the keys '
        f"{', '.join(map(str, record)) or '(none)'}; convert the record."
    )


def text_of(record: Mapping[str, Any]) -> str | None:
    """The text of a record, or of all its messages; None if it has neither."""
    messages, text = record.get("messages"), record.get("text")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return "\n".join(message["content"] for message in messages)
    return text if isinstance(text, str) else None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ChannelMetricsError(
            f"{where}: expected one JSON object per line, but this line is no JSON ({error}); "
            "repair or remove it."
        ) from None
    if not isinstance(value, dict):
        raise ChannelMetricsError(
            f"{where}: expected a JSON object, but this line is a {type(value).__name__}; "
            'write records as {"messages": [...]} or {"text": ...}.'
        )
    return value


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )

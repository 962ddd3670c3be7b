"""How `channel-metrics doctor` prints its report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from channel_metrics.cli.diagnosis import Report

__all__ = ["has_problem", "lines"]


def has_problem(report: Report, patches: Sequence[str]) -> bool:
    """Whether something that was asked for would not work."""
    return (
        "error" in report["config"]
        or any(report["patches"][name] is not None for name in patches)
        or any("error" in of_file or not of_file["channels"] for of_file in report["data"].values())
    )


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    versions = report["versions"]
    yield from (f"{name} {found}" for name, found in versions.items() if found is not None)
    yield f"not installed: {', '.join(name for name, found in versions.items() if found is None)}"
    for name, reason in report["patches"].items():
        yield f"patch {name}: {'applies' if reason is None else f'does not apply: {reason}'}"
    config = report["config"]
    yield f"config: {config['from']}"
    if "error" in config:
        yield f"  error: {config['error']}"
    for name, value in config.get("values", {}).items():
        yield f"  {name}: {json.dumps(value, ensure_ascii=False)}"
    for path, found in report["data"].items():
        yield f"data: {path}"
        yield from (f"  {line}" for line in _data_lines(found))


def _data_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if "error" in found:
        yield f"error: {found['error']}"
        return
    yield f"records: {found['records']:,}"
    for field, count in found["fields"].items():
        yield f"channel from the field {field}: {count:,} records"
    yield f"no channel: {found['records'] - sum(found['fields'].values()):,} records"
    for name, count in found["channels"].items():
        yield f"channel {name}: {count:,}"

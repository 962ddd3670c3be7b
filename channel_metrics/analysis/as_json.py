"""What the commands print with `--json`: one object, for scripts.

A number that JSON does not have, NaN or infinite, is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.readers.keys import GLOBAL

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.finding import Finding
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.summary import ChannelRow

__all__ = ["runs_json", "text_of"]


def text_of(value: Mapping[str, Any]) -> str:
    """JSON text, indented."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def runs_json(views: Sequence[RunView], found: Sequence[Sequence[Finding]]) -> list[dict[str, Any]]:
    """The final values of runs, the notes about their logs, and what is found about them."""
    return [_run(view, findings) for view, findings in zip(views, found, strict=True)]


def _run(view: RunView, findings: Sequence[Finding]) -> dict[str, Any]:
    run = view.run
    steps = run.series(GLOBAL, "loss")[0]
    return {
        "name": run.name,
        "origin": run.origin,
        "notes": run.problems.notes,
        "num_unreadable": run.problems.count,
        "unreadable": run.problems.examples,
        "num_values": len(run.store),
        "first_step": int(steps[0]) if len(steps) else None,
        "last_step": int(steps[-1]) if len(steps) else None,
        "resumes": list(run.resumes),
        "whole_run": _row(view.whole),
        "channels": [_row(item.row) for item in view.rows],
        "findings": [_finding(item) for item in findings],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "level": finding.level,
        "channel": finding.channel,
        "text": finding.line,
    }


def _row(row: ChannelRow) -> dict[str, Any]:
    return asdict(row) | {"change": row.change}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

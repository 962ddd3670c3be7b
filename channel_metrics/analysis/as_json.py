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
from channel_metrics.analysis.rows import final_rows, whole_row

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.summary import ChannelRow

__all__ = ["run_json", "text_of"]


def text_of(value: Mapping[str, Any]) -> str:
    """JSON text, indented."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def run_json(run: Run) -> dict[str, Any]:
    """The final values of a run, and the notes about its log."""
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
        "whole_run": _row(whole_row(run)),
        "channels": [_row(row) for row in final_rows(run)],
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

"""What `watch --once --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from channel_metrics.analysis.as_json import text_of

if TYPE_CHECKING:
    from channel_metrics.analysis.watch.follow import Follower
    from channel_metrics.analysis.watch.screen import View

__all__ = ["view_text"]


def view_text(follower: Follower, view: View, max_rows: int | None = None) -> str:
    """The contents of the screen as JSON, without the curves."""
    source = follower.source
    rows = [asdict(row) for row in (view.whole, *view.rows[:max_rows])]
    for row in rows:
        del row["curve"]
    content = {
        "file": str(source.files[-1]) if source else None,
        "format": source.format if source else None,
        "notes": list(source.notes) if source else [],
        "num_unreadable": follower.problems.count,
        "unreadable": follower.problems.examples,
        "split": view.split,
        "step": view.step,
        "alerts": [asdict(alert) for alert in follower.alerts],
        "whole_run": rows[0],
        "channels": rows[1:],
    }
    return text_of(content)

"""The alerts of a run, from the `alerts.jsonl` that it has written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from channel_metrics.alerting import ALERTS_FILE

__all__ = ["RunAlert", "alerts_of"]


@dataclass(frozen=True)
class RunAlert:
    """One alert. channel: empty for the whole run."""

    kind: str
    channel: str
    split: str
    step: int
    text: str


def alerts_of(path: Path) -> list[RunAlert]:
    """The alerts of a run, in the order of the file; none if there is no such file.

    A line that cannot be read is left out. If a run was resumed, alerts of the steps that were
    done again stand there twice, and each is given once.

    path: a run folder, or a log in it.
    """
    folder = path if path.is_dir() else path.parent
    files = [folder / ALERTS_FILE]
    if path.is_dir():
        files += sorted(folder.glob(f"*/{ALERTS_FILE}"))
    file = next((file for file in files if file.is_file()), None)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file else []
    except OSError:  # files of a running job come and go
        return []
    found = (_read(line) for line in lines)
    return [*dict.fromkeys(alert for alert in found if alert is not None)]


def _read(line: str) -> RunAlert | None:
    try:
        record = json.loads(line)
        return RunAlert(
            kind=str(record["alert"]),
            channel=str(record["channel"]),
            split=str(record["split"]),
            step=int(record["step"]),
            text=str(record["text"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None

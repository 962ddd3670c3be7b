"""Logs that have a known fault, and what is found in them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.analysis_tools import Entry, run_of
from channel_metrics.analysis.judging.finding import Finding, lines_of
from channel_metrics.analysis.judging.told import findings_of
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.views import views_of
from channel_metrics.analysis.run import Run, load_run

LOGS = Path(__file__).parent / "logs"


def found_in(*runs: Run) -> list[Finding]:
    """The findings of the last run, which is compared with the first."""
    return findings_of(views_of(runs)[-1])


def bad_in(*runs: Run) -> list[str]:
    """What is bad in the last run."""
    return [finding.line for finding in found_in(*runs) if finding.level == "bad"]


def told_in(*runs: Run) -> str:
    """All findings of the last run, as the terminal shows them."""
    return "\n".join(lines_of(found_in(*runs)))


def training(steps: int, losses: dict[str, Callable[[int], float]], seed: int = 0) -> list[Entry]:
    """A log with a value per step, noise of 0.02, 100 tokens per channel, and the exact loss."""
    rng = random.Random(seed)
    history = []
    for step in range(1, steps + 1):
        entry: Entry = {"step": step}
        for name, loss in losses.items():
            entry |= {f"{name}_loss": loss(step) + rng.gauss(0, 0.02), f"{name}_tokens": 100}
        entry["loss"] = sum(entry[f"{name}_loss"] for name in losses) / len(losses)
        history.append(entry)
    return history


def evaluated(every: int, losses: Mapping[str, Sequence[float]]) -> list[Entry]:
    """Evaluations of several sets, without one of the whole."""
    return [
        {"step": every * (place + 1)}
        | {f"eval_{name}_loss": own[place] for name, own in losses.items()}
        for place in range(len(next(iter(losses.values()))))
    ]


def run_with_log(*histories: Sequence[Entry], **more: Any) -> Run:
    """A run of several logs, in the order of their steps."""
    entries = [entry for history in histories for entry in history]
    return run_of(sorted(entries, key=lambda entry: entry["step"]), **more)


def playbook(name: str) -> Run:
    """A run of docs/playbook.py."""
    return load_run(LOGS / f"playbook_{name}.jsonl")


def nan_history(web_from: int = 101) -> list[Entry]:
    """200 steps; the loss of the whole run is NaN from 101 on, that of web from another step."""
    history = training(200, {"web": lambda s: 2.2 - s / 200, "code": lambda s: 1.5 - s / 400})
    for entry in history:
        if entry["step"] >= web_from:
            entry["web_loss"] = math.nan
        if entry["step"] > 100:
            entry["loss"] = math.nan
    return history


def text_of(runs: list[Run], folder: Path) -> str:
    """The page of a report."""
    write_report(runs, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def between(text: str, begin: str, end: str) -> str:
    """What stands between two marks."""
    return text.split(begin, 1)[1].split(end, 1)[0]

"""A log that grows, its follower, and what the view of it must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis.analysis_tools import Entry, make_history, run_of
from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.rows import final_rows
from channel_metrics.analysis.watch.follow import Follower
from channel_metrics.analysis.watch.screen import render, view_of
from channel_metrics.analysis.watch.traces import traces_of

HISTORY = make_history(60)
OPEN: list[Follower] = []


def following(run: Path, format: str | None = None) -> Follower:
    """A follower that is closed after the test."""
    OPEN.append(Follower(run, format))
    return OPEN[-1]


def lines(history: list[Entry]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in history)


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def check(follower: Follower, history: list[Entry], rel: float = 1e-12) -> None:
    """The view is what the table of the whole run, read at once, would be."""
    view = view_of(follower.traces, order="log")
    run = run_of(history)
    expected = {row.channel: row for row in final_rows(run)}
    assert [row.name for row in view.rows] == list(expected)
    for row in view.rows:
        whole = expected[row.name]
        found = (row.loss, row.change, row.token_acc, row.share)
        wanted = (whole.last_loss, whole.change, whole.token_acc, whole.share)
        assert found == pytest.approx(wanted, rel=rel)
        steps, losses = run.series(row.name, "loss")
        assert row.step == steps[-1]
        assert len(losses) <= 256
        assert row.curve == pytest.approx(losses.tolist(), rel=rel)
    whole_steps, whole_losses = run.series("", "loss")
    assert view.whole.loss == pytest.approx(whole_losses[-1], rel=rel)
    assert view.step == whole_steps[-1]


def save_state(root: Path, history: list[Entry]) -> None:
    folder = root / f"checkpoint-{history[-1]['step']}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def shares(parts: dict[str, float]) -> Any:
    readings = [
        (step, key, value)
        for step in (1, 2)
        for place, (name, tokens) in enumerate(parts.items())
        for key, value in (
            (Key("train", name, "loss"), 4.0 - step * (1 + place) / 10),
            (Key("train", name, "tokens"), tokens),
        )
    ]
    return traces_of(readings)


def printed(view: Any, **options: Any) -> str:
    console = Console(width=160, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        console.print(render(view, **options))
    return capture.get()

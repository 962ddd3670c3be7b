"""What the commands show while they work, and that their help is there at once."""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.analysis_tools import make_history, write_jsonl
from channel_metrics.analysis.progress import bar


def test_a_long_phase_shows_its_progress_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("writing metrics.parquet", 4000) as (advance, expect):
        expect(100)
        for _ in range(100):
            advance(1)
        time.sleep(0.2)
    assert "writing metrics.parquet" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        (
            ["analyze", "--csv"],
            ["reading run", "estimating the losses", "judging the losses",
             "writing metrics.parquet", "writing metrics.csv", "writing TensorBoard events"],
        ),
        (["report"], ["reading run", "judging the losses", "writing report.html", "drawing the"]),
    ],
)  # fmt: skip
def test_each_long_phase_is_shown_in_a_terminal(
    tmp_path: Path, command: list[str], phases: list[str]
) -> None:
    run = tmp_path / "run"
    write_jsonl(run / "logging.jsonl", make_history(40))
    terminal, inside = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "channel_metrics", *command, str(run)],
        stdout=subprocess.DEVNULL,
        stderr=inside,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(inside)
    said = b""
    try:
        while part := os.read(terminal, 65536):
            said += part
    except OSError:  # the end of a terminal
        pass
    os.close(terminal)
    assert done.wait() == 0, said
    text = said.decode()
    places = [text.find(phase) for phase in phases]
    assert -1 not in places and places == sorted(places), text


def test_the_help_takes_a_fifth_of_a_second() -> None:
    """Of the processor, because others may be using it."""
    environ = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-m", "channel_metrics", "--help"]
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, env=environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.2, seconds

"""The live view: in a real pseudo-terminal, redirected, and in transformers' notebook table."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

from hf_tools import train
from paths import python_path
from transformers.utils.notebook import NotebookProgressCallback

from channel_metrics import MetricsConfig
from channel_metrics.observers.live_table import LiveTable, table_lines
from channel_metrics.trainers.hf import attach, detach

ENVIRONMENT = os.environ | {"PYTHONPATH": python_path()}

SCRIPT = """
import sys
from pathlib import Path
from hf_tools import train
from channel_metrics.trainers.hf import attach
train(Path(sys.argv[1]), prepare=attach, disable_tqdm=False, max_steps=6)
"""


def in_terminal(tmp_path: Path) -> str:
    """What a terminal of 24 x 100 gets from the script."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=ENVIRONMENT,
    )
    os.close(slave)
    output = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux says so when the last writer has closed the terminal
            break
        output += chunk
    assert process.wait(timeout=60) == 0, output.decode()
    return output.decode()


def test_a_terminal_shows_the_table(tmp_path: Path) -> None:
    shown = in_terminal(tmp_path)
    rows = re.findall(r"(bbu|rru|lvis|lang_chat) +(\d\.\d{4}) +([+-]\d\.\d{4})?", shown)
    assert {name for name, _, _ in rows} == {"bbu", "rru", "lvis", "lang_chat"}
    # The first window has no change to show; later ones do.
    assert any(not change for _, _, change in rows) and any(change for _, _, change in rows)
    assert "\x1b[A" in shown, "the rows must be drawn in place"


def test_redirected_output_is_plain_lines(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b[" not in result.stdout + result.stderr
    assert "'bbu_loss': " in result.stdout + result.stderr


def test_a_notebook_gets_columns(tmp_path: Path) -> None:
    notebook: Any = NotebookProgressCallback()
    tables = []

    def prepare(trainer: Any) -> None:
        trainer.add_callback(notebook)
        attach(trainer)
        original = notebook.on_train_end

        def keep_table(*args: Any, **kwargs: Any) -> Any:
            tables.append(notebook.training_tracker.inner_table)
            return original(*args, **kwargs)

        notebook.on_train_end = keep_table

    trainer = train(tmp_path, prepare=prepare)
    (header, first, second) = tables[0]
    assert header[:2] == ["Step", "Training Loss"]
    entries = [e for e in trainer.state.log_history if "loss" in e]
    for row, entry in zip((first, second), entries, strict=True):
        shown = dict(zip(header, row, strict=False))
        assert shown["Step"] == entry["step"] and shown["Training Loss"] == entry["loss"]
        assert shown["bbu loss"] == entry["bbu_loss"]
        assert shown["lvis token_acc"] == entry["lvis_token_acc"]


def test_the_table_can_be_switched_off(tmp_path: Path) -> None:
    def prepare(trainer: Any) -> None:
        trainer.add_callback(NotebookProgressCallback())
        attach(trainer, MetricsConfig(live_table=False))
        assert not any(isinstance(c, LiveTable) for c in trainer.callback_handler.callbacks)
        attach(attach(trainer))
        found = [c for c in trainer.callback_handler.callbacks if isinstance(c, LiveTable)]
        assert len(found) == 1
        detach(trainer)
        assert not any(isinstance(c, LiveTable) for c in trainer.callback_handler.callbacks)

    train(tmp_path, prepare=prepare)


def test_lines_of_many_channels() -> None:
    values = {f"channel_{i}": {"loss": 1.0 + i, "share": i / 100} for i in range(20)}
    lines = table_lines(values, {"channel_19": {"loss": 21.0}})
    assert len(lines) == 14 and lines[-1] == "and 8 more channels"
    assert lines[1].split() == ["channel_19", "20.0000", "-1.0000", "19.0%"]
    assert table_lines({"x" * 30: {}}, {})[1].startswith("x" * 19 + "…")

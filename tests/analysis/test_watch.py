"""`channel-metrics watch`, once, redirected, and in a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.analysis_tools import HOSTILE, make_history, run_of, write_jsonl
from analysis.watch_tools import HISTORY, append, lines
from channel_metrics.analysis.rows import final_rows
from channel_metrics.analysis.run import RUN_FILE, load_run
from channel_metrics.cli.main import app

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["watch", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    code, out, err = invoke(tmp_path, "--once", "--top", 2)
    assert code == 0, err
    rows = {row.channel: row for row in final_rows(load_run(tmp_path))}
    (bbu,) = (line.split() for line in out.splitlines() if line.strip().startswith("bbu"))
    row = rows["bbu"]
    assert bbu[1:5] == [
        f"{row.last_loss:.4f}",
        f"{row.change:+.1%}",
        f"{row.token_acc:.1%}",
        f"{row.share:.1%}",
    ]
    assert bbu[5] == "60" and set(bbu[6]) <= set("▁▂▃▄▅▆▇█") and len(bbu[6]) == 24
    assert "and 1 more" in out and "step 60" in out


def test_names_that_only_the_configuration_knows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "logging.jsonl", [{"step": 1, "aux_loss": 1.0, "a_b_loss": 2.0}])
    _, out, _ = invoke(tmp_path, "--once", "--channel", "aux")
    assert "aux " in out and "a_b" not in out
    (tmp_path / RUN_FILE).write_text(json.dumps({"ratios": {"a b": 1}}))
    _, out, _ = invoke(tmp_path, "--once")
    assert "a b " in out and "aux" not in out
    (tmp_path / RUN_FILE).write_text("{")
    code, out, _ = invoke(tmp_path, "--once")
    assert code == 0 and f"{RUN_FILE}: cannot be read" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [((), "does not exist"), (("--sort", "x"), "--sort: expected"), (("--format", "x"), "formats")],
)
def test_nothing_to_show_is_an_error_that_says_so(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    code, out, err = invoke(tmp_path / "none", "--once", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err


COMMAND = [sys.executable, "-m", "channel_metrics", "watch"]


def wait_for(text: Callable[[], str], wanted: str, timeout: float = 120) -> None:
    until = time.monotonic() + timeout
    while wanted not in text():
        assert time.monotonic() < until, f"{wanted!r} is not in {text()[-3000:]!r}"
        time.sleep(0.05)


def test_redirected_it_writes_a_line_for_each_new_step(tmp_path: Path) -> None:
    out, err, path = tmp_path / "out", tmp_path / "err", tmp_path / "run" / "logging.jsonl"
    history = [e | {"中_loss": 1.0, "中_tokens": 5} for e in HISTORY if "loss" in e]
    with out.open("w") as stdout, err.open("w") as stderr:
        job = subprocess.Popen(
            [*COMMAND, str(path.parent), "--interval", "0.05", "--sort", "name"],
            stdout=stdout,
            stderr=stderr,
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        )
        try:
            wait_for(err.read_text, "does not exist")
            write_jsonl(path, history[:3])
            wait_for(out.read_text, "step 3 ")
            append(path, lines(history[3:9]))
            wait_for(out.read_text, "step 9 ")
            job.send_signal(signal.SIGINT)
            assert job.wait(60) == 0
        finally:
            job.kill()
    written = out.read_text().splitlines()
    assert written[0].startswith("step 3 ") and written[-1].startswith("step 9 ")
    values = {name: history[8][f"{name}_loss" if name else "loss"] for name in ("", "bbu", "rru")}
    assert f"  loss {values['']:.4f}  bbu {values['bbu']:.4f}  " in written[-1]
    assert "  ? 1.0000" in written[-1], "what cannot be written is replaced"
    assert "\x1b" not in out.read_text()
    assert "Traceback" not in err.read_text()
    assert err.read_text().count("waiting") == len(set(err.read_text().splitlines()))


@contextmanager
def in_a_terminal(*args: str, rows: int, columns: int) -> Iterator[tuple[Any, Any, Any]]:
    """(process, its output so far, type into it), with a terminal of its own."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # The leader of a session gets the first terminal that it opens: Ctrl-C is then a signal.
    start = (
        "import os, sys; os.close(os.open(sys.argv.pop(1), os.O_RDWR)); "
        "from channel_metrics.cli.main import main; main()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    job = subprocess.Popen(
        [sys.executable, "-c", start, os.ttyname(slave), "watch", *args],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=environment | {"TERM": "xterm-256color", "PYTHONUTF8": "1"},
    )
    os.close(slave)
    received = bytearray()

    def output() -> str:
        while select.select([master], [], [], 0)[0]:
            try:
                received.extend(os.read(master, 65536))
            except OSError:  # the other end is closed
                break
        return received.decode(errors="replace")

    try:
        yield job, output, lambda text: os.write(master, text)
    finally:
        job.kill()
        job.wait()
        os.close(master)


def last_screen(output: str) -> list[str]:
    """The lines of the last drawing; each begins by moving up over the one before."""
    frame = re.split(r"\x1b\[1A\x1b\[2K(?!\x1b\[1A)", output)[-1]
    return [line.rstrip("\r") for line in ESCAPE.sub("", frame).split("\n")]


def test_in_a_terminal_until_ctrl_c(tmp_path: Path) -> None:
    """A log that grows while it is watched, with a hostile channel, in a small window."""
    names = ("bbu", "\x1b[31m" + HOSTILE + "[red]", *(f"c{i}" for i in range(30)))
    history = make_history(30, channels=names)
    path = tmp_path / "run" / "logging.jsonl"
    with in_a_terminal(str(path.parent), "--interval", "0.1", rows=20, columns=110) as terminal:
        job, output, type_in = terminal
        wait_for(output, "does not exist")
        path.parent.mkdir()

        def train() -> None:
            with path.open("ab", buffering=0) as file:
                for entry in history:
                    content = lines([entry])
                    for part in (content[:50], content[50:]):
                        file.write(part)
                        time.sleep(0.02)

        trainer = threading.Thread(target=train)
        trainer.start()
        wait_for(output, "step 30,")
        trainer.join()
        type_in(b"\x03")
        until = time.monotonic() + 60
        while job.poll() is None and time.monotonic() < until:
            output()
            time.sleep(0.05)
        assert job.poll() == 0
        text = output()
    steps = [int(step) for step in re.findall(r"step (\d+), \d+ s ago", text)]
    assert steps == sorted(steps) and len(set(steps)) > 3, "it was drawn while the log grew"
    assert "Traceback" not in text and "Abort" not in text
    assert "\x1b[31m" not in text.replace("\x1b[31mnan", "")
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor is shown again"
    screen = last_screen(text)
    assert len(screen) <= 20 and all(len(line) <= 110 for line in screen)
    last = [entry for entry in history if "loss" in entry][-1]
    (whole,) = (line.split() for line in screen if "(whole run)" in line)
    assert whole[2] == f"{last['loss']:.4f}"
    shown = {line.split()[0]: line.split() for line in screen if re.match(r" ?(c\d+|bbu) ", line)}
    assert len(shown) > 5
    for name, cells in shown.items():
        at, losses = run_of(history).series(name, "loss")
        assert cells[1] == f"{losses[-1]:.4f}" and cells[5 - (cells[2] == "-")] == str(at[-1])
    assert any(re.match(r"\s*and \d+ more", line) for line in screen)

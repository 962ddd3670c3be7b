"""A log that grows, under another thread or process, is seen as it would be read as a whole."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import random
import re
import select
import signal
import sqlite3
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
from analysis_tools import HOSTILE, Entry, make_history, run_of, write_jsonl
from report_runs import HOSTILE_NAMES
from rich.console import Console
from typer.testing import CliRunner

from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.report.findings import final_rows
from channel_metrics.analysis.run import RUN_FILE, load_run
from channel_metrics.analysis.watch import follow
from channel_metrics.analysis.watch.follow import Follower
from channel_metrics.analysis.watch.screen import line_of, render, sparkline, view_of
from channel_metrics.analysis.watch.traces import Trace, traces_of
from channel_metrics.cli.main import app
from channel_metrics.trainers.megatron.log import log_line

HISTORY = make_history(60)
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What a terminal would obey.
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


OPEN: list[Follower] = []
BIG = "9" * 400
BIGGER = "9" * 5000


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks that are told apart by time would make the tests slow."""
    monkeypatch.setattr(follow, "_SECONDS_BETWEEN_SEARCHES", -1.0)
    monkeypatch.setattr(follow, "_REST", 0.0)
    yield
    while OPEN:
        OPEN.pop().close()


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


def test_a_log_that_grows_by_any_number_of_bytes(tmp_path: Path) -> None:
    path, rng, content = tmp_path / "logging.jsonl", random.Random(0), lines(HISTORY)
    path.write_bytes(b"")
    follower = following(tmp_path)
    place = looks = 0
    while place < len(content):
        size = rng.choice((1, 7, 300, 2000))
        append(path, content[place : place + size])
        place += size
        changed = follower.look()
        done = content[:place].count(b"\n")
        if done:
            check(follower, HISTORY[:done])
        assert bool(follower.waiting_for) is not bool(done)
        looks += changed
    assert 10 < looks <= len(HISTORY)
    assert not follower.look()
    assert not follower.problems.count


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY[:40])
    follower = following(path)
    follower.look()
    monkeypatch.setattr(follow, "traces_of", lambda _: pytest.fail("all of it was read again"))
    append(path, lines(HISTORY[40:]))
    assert follower.look()
    check(follower, HISTORY)


def test_a_last_line_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(HISTORY)[:-1])
    live, once = following(path), following(path)
    live.look()
    check(live, HISTORY[:-1])
    once.look(to_end=True)
    check(once, HISTORY)
    assert not live.problems.count
    append(path, b"\n")
    assert live.look()
    check(live, HISTORY)


def test_broken_lines_are_counted_once_with_their_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY[:2])
    follower = following(tmp_path)
    follower.look()
    append(path, b"no\n\n[1]\n" + lines(HISTORY[2:]))
    follower.look()
    follower.look()
    check(follower, HISTORY)
    assert [example.split(":")[1] for example in follower.problems.examples] == ["3", "5"]


@pytest.mark.parametrize(
    "step", ["NaN", "Infinity", "1e300", BIG, BIGGER, f'"{BIG}"', f'"{BIGGER}"']
)
def test_a_step_that_is_none_is_a_problem(tmp_path: Path, step: str) -> None:
    """Followed, and read as a whole."""
    path = write_jsonl(tmp_path / "a.jsonl", HISTORY[:2])
    follower = following(path)
    follower.look()
    append(path, f'{{"step": {step}, "bbu_loss": 1}}\n'.encode() + lines(HISTORY[2:]))
    follower.look()
    check(follower, HISTORY)
    for problems in (follower.problems, load_run(path).problems):
        assert [example.split(":")[1] for example in problems.examples] == ["3"]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", HISTORY)
    append(path, f'{{"step": 61, "bbu_loss": -{BIG}}}\n'.encode())
    follower = following(path)
    follower.look()
    assert view_of(follower.traces, order="name").rows[0].loss == -math.inf
    text = tmp_path / "b.log"
    entries = (f" iteration {BIGGER} | lm loss: 9 |", " iteration 3 | v: 1.2.3 | lm loss: 2.0 |")
    text.write_text("\n".join((*entries, "")))
    follower = following(text)
    follower.look()
    assert follower.traces.keys() == {"lm loss"}
    assert follower.traces["lm loss"].curve == [2.0]
    assert follower.problems.count == load_run(text).problems.count == 1


@pytest.mark.parametrize("steps", [5, 60, 61])
def test_a_log_that_is_overwritten_by_another_run(tmp_path: Path, steps: int) -> None:
    """In place: shorter, as long, and longer than what was read."""
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    follower = following(tmp_path)
    follower.look()
    other = make_history(steps, seed=1)
    inode = path.stat().st_ino
    path.write_bytes(lines(other))
    assert path.stat().st_ino == inode
    assert follower.look()
    check(follower, other)


def test_a_log_that_is_emptied_and_begun_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    follower = following(tmp_path)
    follower.look()
    path.write_bytes(b"")
    assert not follower.look()
    check(follower, HISTORY)
    other = make_history(7, seed=1)
    append(path, lines(other))
    assert follower.look()
    check(follower, other)


@pytest.mark.parametrize("by_folder", [False, True])
@pytest.mark.parametrize("looks_between", [False, True])
def test_a_rotated_log_goes_on(tmp_path: Path, by_folder: bool, looks_between: bool) -> None:
    """Also what was written to the old file between the last look and the rotation."""
    path = write_jsonl(tmp_path / "train.jsonl", HISTORY[:20])
    follower = following(tmp_path if by_folder else path)
    follower.look()
    append(path, lines(HISTORY[20:30]))
    path.rename(tmp_path / "train.1.jsonl")
    if looks_between:
        follower.look()
        assert str(path) in follower.waiting_for
    write_jsonl(path, HISTORY[30:40])
    assert follower.look()
    check(follower, HISTORY[:40])
    append(path, lines(HISTORY[40:]))
    assert follower.look()
    check(follower, HISTORY)


def test_a_log_that_is_replaced_by_that_of_another_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    follower = following(tmp_path)
    follower.look()
    path.unlink()
    assert not follower.look()
    assert follower.waiting_for
    check(follower, HISTORY)
    other = make_history(70, channels=("x", "y"), seed=1)
    write_jsonl(path, other)
    assert follower.look()
    check(follower, other)
    assert not follower.waiting_for


def test_another_run_without_a_key_in_common(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    follower = following(path)
    follower.look()
    path.unlink()
    write_jsonl(path, [{"step": 1, "x_loss": 2.0, "x_tokens": 3}])
    assert follower.look()
    assert [row.name for row in view_of(follower.traces).rows] == ["x"]


def test_a_file_that_is_empty_while_it_is_written_anew(tmp_path: Path) -> None:
    save_state(tmp_path, HISTORY)
    follower = following(tmp_path)
    follower.look()
    (path,) = tmp_path.rglob("trainer_state.json")
    path.write_text("")
    assert not follower.look()
    check(follower, HISTORY)


def test_a_resumed_run_is_put_in_order(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "logging.jsonl", HISTORY)
    follower = following(tmp_path)
    follower.look()
    again = [e for e in make_history(70, seed=1) if e["step"] > 30]
    append(path, lines(again))
    assert follower.look()
    check(follower, [*HISTORY, *again])


def test_the_newest_folder_of_ms_swift_is_followed(tmp_path: Path) -> None:
    old = write_jsonl(tmp_path / "v0-a" / "logging.jsonl", HISTORY)
    os.utime(old, (1, 1))
    follower = following(tmp_path)
    follower.look()
    other = make_history(9, seed=1)
    write_jsonl(tmp_path / "v1-b" / "logging.jsonl", other)
    assert follower.look()
    check(follower, other)


def test_a_run_that_does_not_exist_yet(tmp_path: Path) -> None:
    run = tmp_path / "later"
    follower = following(run)
    assert not follower.look()
    assert "does not exist" in follower.waiting_for
    run.mkdir()
    assert not follower.look()
    assert "holds no log" in follower.waiting_for
    (run / "logging.jsonl").touch()
    assert not follower.look()
    assert "holds no values yet" in follower.waiting_for
    append(run / "logging.jsonl", lines(HISTORY[:3]))
    assert follower.look()
    check(follower, HISTORY[:3])
    assert not follower.waiting_for


def test_lines_of_megatron(tmp_path: Path) -> None:
    path, history = tmp_path / "train.log", [e for e in HISTORY if "loss" in e]
    path.write_text("using world size: 4\n")
    follower = following(tmp_path)
    assert not follower.look()
    for count, entry in enumerate(history, 1):
        values = {k: v for k, v in entry.items() if k not in ("step", "loss", "grad_norm")}
        head = f" [2026-11-23 03:18:15] iteration {entry['step']:8d}/      60 | consumed samples: 9"
        with path.open("a") as file:
            file.write(f"{head} | lm loss: {entry['loss']:.6E} | loss scale: 1.0 |\n")
            file.write(log_line(f"iteration {entry['step']:8d}", values) + "\n")
        assert follower.look()
        check(follower, history[:count], rel=1e-5)


def save_state(root: Path, history: list[Entry]) -> None:
    folder = root / f"checkpoint-{history[-1]['step']}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def write_mlflow(root: Path, history: list[Entry]) -> None:
    """The lines of MLflow's file store; read from MLflow itself in test_readers."""
    folder = root / "0" / "abc"
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    (folder / "meta.yaml").touch()
    for key in {key for entry in history for key in entry} - {"step"}:
        with (folder / "metrics" / key).open("w") as file:
            file.writelines(f"1 {e[key]!r} {e['step']}\n" for e in history if key in e)


def write_mlflow_database(root: Path, history: list[Entry]) -> None:
    with sqlite3.connect(root) as database:
        database.execute(
            "CREATE TABLE IF NOT EXISTS metrics (key TEXT, value DOUBLE, timestamp BIGINT, "
            "run_uuid TEXT, step BIGINT, is_nan BOOLEAN)"
        )
        database.execute("DELETE FROM metrics")
        rows = [(k, v, e["step"], "a", e["step"]) for e in history for k, v in e.items()]
        rows = [row for row in rows if row[0] != "step"]
        database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, 0)", rows)
    database.close()


@pytest.mark.parametrize(
    ("write", "name"),
    [(save_state, "run"), (write_mlflow, "mlruns"), (write_mlflow_database, "mlflow.db")],
)
def test_formats_that_are_read_anew(
    tmp_path: Path, write: Callable[[Path, list[Entry]], None], name: str
) -> None:
    root = tmp_path / name
    follower = following(root)
    follower.look()
    assert follower.waiting_for
    if write is save_state:
        root.mkdir()
    for end in (7, 30, 63):
        write(root, HISTORY[:end])
        assert follower.look()
        shown_order = {row.name for row in view_of(follower.traces).rows}
        assert shown_order == {"bbu", "rru", "lvis"}
        if write is not write_mlflow:  # it is ordered by the names of its files
            check(follower, HISTORY[:end])
        assert view_of(follower.traces).step == HISTORY[end - 1]["step"]
        assert not follower.look(), "nothing has changed"


def test_event_files_while_they_are_written(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    follower = following(tmp_path)
    history = [entry for entry in HISTORY if "loss" in entry]
    with SummaryWriter(str(tmp_path / "runs")) as writer:
        for count, entry in enumerate(history, 1):
            for key, value in entry.items():
                if key != "step":
                    writer.add_scalar(f"train/{key}", value, entry["step"])
            if count % 20 == 0:
                writer.flush()
                assert follower.look()
                check(follower, history[:count], rel=1e-5)
                assert not follower.look()


def test_what_grows_is_followed_before_the_state_of_a_checkpoint(tmp_path: Path) -> None:
    save_state(tmp_path, HISTORY[:5])
    follower = following(tmp_path)
    follower.look()
    assert follower.source is not None and follower.source.format == "trainer_state"
    (tmp_path / "a.log").write_text(
        "".join(
            f" iteration {e['step']} | lm loss: {e['loss']} |\n"
            for e in HISTORY[:30]
            if "loss" in e
        )
    )
    assert follower.look()
    assert follower.source.format == "text"
    assert view_of(follower.traces).step == HISTORY[29]["step"]
    chosen = following(tmp_path, "trainer_state")
    chosen.look()
    check(chosen, HISTORY[:5])
    absent = following(tmp_path, "wandb")
    assert not absent.look()
    assert "no log of format 'wandb' yet, but trainer_state, text" in absent.waiting_for
    with pytest.raises(ChannelMetricsError, match=r"expected one of the formats .* got 'none'"):
        following(tmp_path, "none")


def test_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "logging.jsonl"
    script = (
        "import sys, time\n"
        "file = open(sys.argv[1], 'ab', buffering=0)\n"
        "for start in range(0, 10**9, 97):\n"
        "    part = sys.stdin.buffer.read(97)\n"
        "    if not part: break\n"
        "    file.write(part)\n"
        "    time.sleep(0.002)\n"
    )
    content, follower, seen = lines(HISTORY), following(tmp_path), set()
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE) as job:
        assert job.stdin is not None
        feeder = threading.Thread(target=lambda: (job.stdin.write(content), job.stdin.close()))
        feeder.start()
        until = time.monotonic() + 120
        while view_of(follower.traces).step != 60 or len(seen) < 2:
            assert time.monotonic() < until
            follower.look()
            seen.add(view_of(follower.traces).step)
            time.sleep(0.01)
        feeder.join()
    follower.look()
    check(follower, HISTORY)
    assert not follower.problems.count
    assert len(seen) > 5


def test_a_trace_is_bounded_and_exact() -> None:
    rng, trace = random.Random(0), Trace()
    values = [rng.random() for _ in range(5000)]
    for step, value in enumerate(values):
        assert trace.add(step, rng.random())
        assert trace.add(step, value), "the last value of a step counts"
    assert (trace.first, trace.last, trace.step) == (values[0], values[-1], 4999)
    assert trace.total == pytest.approx(math.fsum(values))
    size = 32
    parts = [values[i : i + size] for i in range(0, 5000, size)]
    assert trace.curve == pytest.approx([sum(part) / len(part) for part in parts])
    assert not trace.add(4998, 1.0)


def test_values_that_are_not_finite() -> None:
    trace = Trace()
    for step, value in ((1, math.nan), (2, 3.0), (3, math.inf), (3, 2.0), (4, 5.0), (4, math.nan)):
        assert trace.add(step, value)
    assert trace.first == 3.0 and math.isnan(trace.last or 0.0)
    assert (trace.total, trace.count, trace.curve) == (5.0, 2, [3.0, 2.0])
    view = view_of({"a_loss": trace, "a_tokens": Trace()})
    assert view.rows[0].change is None
    assert "a nan" in line_of(view)


def test_sparklines() -> None:
    assert sparkline([], width=5) == ""
    assert sparkline([2.0, 2.0], width=5) == "▁▁"
    assert sparkline([0.0, 7.0, 3.0], width=5) == "▁█▄"
    assert sparkline([0, 0, 4, 4, 8, 8], width=3) == "▁▅█"
    assert len(sparkline(range(1000), width=24)) == 24


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


def test_orders() -> None:
    traces = shares({"b": 10, "unlabeled": 99, "c": 30, "a": 20})
    orders = {
        order: "".join(r.name[0] for r in view_of(traces, order=order).rows)
        for order in ("share", "loss", "change", "name", "log")
    }
    assert orders == {
        "share": "cabu",
        "loss": "bcau",
        "change": "bcau",
        "name": "abcu",
        "log": "bcau",
    }
    found = {row.name: row.share for row in view_of(traces).rows}
    assert found == pytest.approx(
        {"c": 30 / 159, "a": 20 / 159, "b": 10 / 159, "unlabeled": 99 / 159}
    )


def printed(view: Any, **options: Any) -> str:
    console = Console(width=160, highlight=False, markup=False, color_system=None)
    with console.capture() as capture:
        console.print(render(view, **options))
    return capture.get()


def test_more_channels_than_rows() -> None:
    view = view_of(shares({f"c{i:03d}": i + 1 for i in range(200)}))
    table = printed(view, max_rows=3)
    assert re.findall(r"c\d{3}", table) == ["c199", "c198", "c197"]
    assert "and 197 more" in table
    assert line_of(view, 2).endswith("c199 -36.0000  c198 -35.8000  and 198 more")
    assert "more" not in printed(view)


@pytest.mark.parametrize(
    "name",
    [*HOSTILE_NAMES, "\x1b[2J\x1b]0;title\x07", "[bold red]x[/]", "\x9b31mred", "a\rb", "[/]"],
)
def test_hostile_names_are_text(name: str) -> None:
    view = view_of(shares({name: 1, "b": 2}))
    for text in (printed(view), line_of(view)):
        assert not CONTROLS.search(text)
        text.encode()
    table = printed(view).splitlines()
    assert len(table) == len(printed(view_of(shares({"a": 1, "b": 2}))).splitlines())
    if name.startswith("["):
        assert name in printed(view) and name in line_of(view)


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
        steps, losses = run_of(history).series(name, "loss")
        assert cells[1] == f"{losses[-1]:.4f}" and cells[5 - (cells[2] == "-")] == str(steps[-1])
    assert any(re.match(r"\s*and \d+ more", line) for line in screen)

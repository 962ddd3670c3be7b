"""A log that grows is seen as it would be read as a whole, whatever happens to its file."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from analysis.analysis_tools import make_history, write_jsonl
from analysis.watch_tools import HISTORY, append, check, following, lines, save_state
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.watch import follow
from channel_metrics.analysis.watch.screen import view_of

pytestmark = pytest.mark.usefixtures("no_rest")

BIG = "9" * 400
BIGGER = "9" * 5000


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
    content, follower = lines(HISTORY), following(tmp_path)
    seen: set[int | None] = set()
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE) as job:
        pipe = job.stdin
        assert pipe is not None
        feeder = threading.Thread(target=lambda: (pipe.write(content), pipe.close()))
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

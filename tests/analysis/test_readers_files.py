"""Compressed files, UTF-16, files that are none, and what the errors say."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pytest
import zstandard

from analysis.analysis_tools import make_history, series_of, write_jsonl
from analysis.reader_tools import HISTORY, check, tensorboard
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.run import load_run

LINE = " iteration {step}/ 9 | lm loss: {loss} |\n"


def jsonl_bytes() -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in HISTORY).encode()


def write_state(folder: Path, steps: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": make_history(steps)}))


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".zst", zstandard.ZstdCompressor().compress),
        ("", lambda raw: raw.decode().encode("utf-16")),
        ("", lambda raw: b"\xfe\xff" + raw.decode().encode("utf-16-be")),
        (".gz", lambda raw: gzip.compress(raw[:5000]) + gzip.compress(raw[5000:])),
    ],
)
def test_compressed_and_utf_16(tmp_path: Path, suffix: str, pack: object) -> None:
    assert callable(pack)
    path = tmp_path / f"logging.jsonl{suffix}"
    path.write_bytes(pack(jsonl_bytes()))
    read: list[int] = []
    for place in (tmp_path, path):
        run = load_run(place, progress=read.append)
        check(run, HISTORY)
        assert not run.problems.count
    assert sum(read) == 2 * path.stat().st_size


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_compressed_state_and_text(tmp_path: Path, pack: object) -> None:
    assert callable(pack)
    path = tmp_path / "trainer_state.json.gz"
    path.write_bytes(pack(json.dumps({"log_history": HISTORY}).encode()))
    check(load_run(path), HISTORY)
    log = tmp_path / "slurm-1.out.zst"
    log.write_bytes(pack(LINE.format(step=3, loss=1.5).encode()))
    assert series_of(load_run(log), GLOBAL, "loss") == {3: 1.5}


@pytest.mark.parametrize("keep", [5, 3000, -200])
@pytest.mark.parametrize("name", ["logging.jsonl.gz", "a.log.gz"])
def test_a_compressed_file_that_is_cut_off_gives_what_stands_before(
    tmp_path: Path, name: str, keep: int
) -> None:
    path = tmp_path / name
    if name == "a.log.gz":
        raw = "".join(LINE.format(step=s, loss=s * s % 97) for s in range(1, 3000)).encode()
    else:
        raw = b"".join(jsonl_bytes() for _ in range(3))
    path.write_bytes(gzip.compress(raw)[:keep])
    if keep == 5:
        with pytest.raises(ChannelMetricsError):
            load_run(path)
        return
    run = load_run(path)
    assert len(series_of(run, GLOBAL, "loss")) > 0
    assert "compressed file is damaged" in " ".join(run.problems.examples)


def test_one_stray_file_does_not_matter(tmp_path: Path) -> None:
    write_state(tmp_path)
    (tmp_path / "latest.log").symlink_to(tmp_path / "gone.log")
    (tmp_path / "loop.log").symlink_to(tmp_path / "loop.log")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "x.log").mkdir()
    os.mkfifo(tmp_path / "pipe.log")
    (tmp_path / "events.out.tfevents.1.host").touch()
    (tmp_path / "logging.jsonl").touch()
    (tmp_path / "notes.txt").write_text("nothing")
    run = load_run(tmp_path)
    check(run, HISTORY)
    assert not run.problems.count
    notes = " | ".join(run.problems.notes)
    for name in ("latest.log", "loop.log", "pipe.log"):
        assert f"{tmp_path / name} was left aside" in notes
    assert f"{tmp_path / 'logging.jsonl'} holds no values" in notes
    assert "the run also has jsonl, tensorboard" in notes


def test_a_link_to_a_log_in_the_folder_is_not_a_second_log(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(LINE.format(step=1, loss=1.5))
    (tmp_path / "latest.log").symlink_to("a.log")
    run = load_run(tmp_path)
    assert series_of(run, GLOBAL, "loss") == {1: 1.5}
    assert run.problems.notes == []


def test_a_pipe_by_itself_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ChannelMetricsError, match="is a pipe or device"):
        load_run(tmp_path / "pipe")


def test_a_hundred_thousand_files(tmp_path: Path) -> None:
    """They took 55 s once. The newest are looked at, and a note counts the others."""
    folder = tmp_path / "samples"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    for number in range(100_000):
        os.close(os.open(f"{number}.txt", os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    (folder / "train.log").write_text(LINE.format(step=1, loss=1.5))
    begin = time.perf_counter()
    run = load_run(folder)
    assert time.perf_counter() - begin < 15
    assert series_of(run, GLOBAL, "loss") == {1: 1.5}
    assert "99,801 older files (*.log) were not looked at" in run.problems.notes


def test_an_empty_event_file_beside_a_good_one(tmp_path: Path) -> None:
    tensorboard(tmp_path / "runs", HISTORY)
    (tmp_path / "runs" / "events.out.tfevents.9999999999.host").touch()
    check(load_run(tmp_path), HISTORY, rel=1e-6)


def test_a_step_above_int64_is_a_problem_of_its_line(tmp_path: Path) -> None:
    write_jsonl(
        tmp_path / "logging.jsonl", [{"step": 2**70, "loss": 1.0}, {"step": 1, "loss": 2.0}]
    )
    run = load_run(tmp_path)
    assert series_of(run, GLOBAL, "loss") == {1: 2.0}
    assert run.problems.count == 1
    metrics = tmp_path / "mlruns" / "0" / "run" / "metrics"
    metrics.mkdir(parents=True)
    (metrics.parent / "meta.yaml").touch()
    (metrics / "loss").write_text(f"1 2.5 {2**70}\n2 3.5 4\n")
    other = load_run(tmp_path, format="mlflow")
    assert series_of(other, GLOBAL, "loss") == {4: 3.5}
    assert "a step larger than 2**53" in other.problems.examples[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"epoch": 1, "loss": 2}\n', r"it is JSONL, but no line has one of: step, glo"),
        ("a.json", '{"best": 1}', r"trainer_state: it is JSON, but has no log_history"),
        ("a.log", "hello\n", r"text: no line is in a known form: NeMo 2 \(Training epoch"),
        ("a.csv", "a,b\n1,2\n", r"csv: its first line names none of: step, "),
        ("a.db", "no", r"mlflow-db: it is no SQLite file"),
        ("a.bin", "\0\1", r"Tried samples: .*; jsonl: .*; text: "),
    ],
)
def test_the_error_says_what_was_tried_and_what_was_missing(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ChannelMetricsError, match=message):
        load_run(tmp_path / name)


def test_a_folder_without_a_log_names_what_was_looked_for_and_left_aside(tmp_path: Path) -> None:
    (tmp_path / "latest.log").symlink_to("gone")
    with pytest.raises(ChannelMetricsError) as caught:
        load_run(tmp_path)
    assert "Looked for: JSON lines with a step, trainer_state.json" in str(caught.value)
    assert "Left aside: " in str(caught.value)
    assert "latest.log" in str(caught.value)
    with pytest.raises(
        ChannelMetricsError, match=r"one of the formats jsonl, trainer_state, .*'foo'"
    ):
        load_run(tmp_path, format="foo")

"""Logs of other formats than lines of JSON are followed while they are written."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.analysis_tools import Entry
from analysis.watch_tools import HISTORY, check, following, save_state
from channel_metrics import ChannelMetricsError
from channel_metrics.analysis.watch.screen import view_of
from channel_metrics.trainers.megatron.log import log_line

pytestmark = pytest.mark.usefixtures("no_rest")


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

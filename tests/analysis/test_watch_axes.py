"""Labels of axes in a log that is watched: left aside, or shown in place of the channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from analysis.analysis_tools import write_jsonl
from analysis.labelled import AXES, PLAIN, SLASHED, history
from analysis.watch_tools import append, following, lines
from channel_metrics.analysis.run import load_run
from channel_metrics.analysis.watch import labels
from channel_metrics.analysis.watch.labels import LabelFinder
from channel_metrics.analysis.watch.screen import view_of
from channel_metrics.cli.main import app

pytestmark = pytest.mark.usefixtures("no_rest")


def watched(folder: Path, *args: str) -> tuple[int, Any, str]:
    result = CliRunner().invoke(app, ["watch", str(folder), "--once", *args])
    return result.exit_code, result.stdout, result.stderr


def names_in(text: str) -> list[str]:
    return sorted(row["name"] for row in json.loads(text)["channels"])


def test_labels_are_no_channels(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "logging.jsonl", history(PLAIN, axes=AXES))
    code, out, err = watched(tmp_path, "--json")
    assert code == 0, err
    assert names_in(out) == sorted(PLAIN)
    assert sum(row["share"] for row in json.loads(out)["channels"]) == pytest.approx(1)
    _, text, _ = watched(tmp_path)
    assert "labels of the axes domain, lang are left aside; --axis domain shows them" in text


def test_an_axis_in_place_of_the_channels(tmp_path: Path) -> None:
    log = history(PLAIN, axes=AXES)
    write_jsonl(tmp_path / "logging.jsonl", log)
    _, out, _ = watched(tmp_path, "--json", "--axis", "lang")
    rows = {row["name"]: row for row in json.loads(out)["channels"]}
    assert sorted(rows) == ["de", "en"]
    assert rows["de"]["loss"] == log[-1]["lang/de_loss"]
    mean = sum(entry["lang/de_share"] for entry in log) / len(log)
    assert rows["de"]["share"] == pytest.approx(mean)
    assert json.loads(out)["whole_run"]["loss"] == log[-1]["loss"]
    _, text, _ = watched(tmp_path, "--axis", "lang")
    assert "left aside" not in text and "de " in text


def test_an_axis_that_is_not_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "logging.jsonl", history(PLAIN, axes=AXES))
    code, _, err = watched(tmp_path, "--axis", "role")
    assert code == 2
    assert "expected an axis of" in err and "got 'role'; its log has domain, lang" in err


def test_channels_with_a_slash_stay_channels(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "logging.jsonl", history(SLASHED))
    _, out, _ = watched(tmp_path, "--json")
    assert names_in(out) == sorted(SLASHED)


def test_labels_that_come_later_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        read.append(path)
        return load_run(path, **options)

    monkeypatch.setattr(labels, "load_run", counted)
    log = history(PLAIN, axes=AXES, steps=40)
    file = tmp_path / "logging.jsonl"
    plain = [{key: v for key, v in entry.items() if "/" not in key} for entry in log[:4]]
    append(file, lines(plain))
    follower = following(tmp_path)
    finder = LabelFinder(follower)
    follower.look()
    assert finder.axes([]) == [] and read == []
    for entry in log[4:]:
        append(file, lines([entry]))
        follower.look()
        finder.axes([])
    assert finder.axes([]) == ["domain", "lang"]
    view = view_of(follower.traces, axes=finder.axes([]))
    assert sorted(row.name for row in view.rows) == sorted(PLAIN)
    # New names, and steps that have doubled: not at every look.
    assert 2 <= len(read) <= 6


def test_a_log_that_goes_away_keeps_its_labels(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "logging.jsonl", history(PLAIN, axes=AXES))
    follower = following(tmp_path)
    finder = LabelFinder(follower)
    follower.look()
    assert finder.axes([]) == ["domain", "lang"]
    file.unlink()
    follower.traces["new/x_loss"] = next(iter(follower.traces.values()))
    assert finder.axes([]) == ["domain", "lang"]

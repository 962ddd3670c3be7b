"""`load` and `plot_channels` for notebooks, and the notebook of the docs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from analysis.analysis_tools import (
    CHANNELS,
    HOSTILE,
    expected_series,
    make_history,
    run_of,
    write_jsonl,
)
from analysis.report_runs import HOSTILE_NAMES
from channel_metrics.analysis import load, plot_channels
from channel_metrics.analysis.report.moving import MovingMeans
from channel_metrics.errors import ChannelMetricsError

matplotlib.use("agg")
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_jsonl(tmp_path / name / "logging.jsonl", make_history(60, seed=seed)).parent
        for seed, name in enumerate(("base", "other"))
    ]


def line_of(figure: Any, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in figure.axes[0].lines if line.get_label() == f" {label}")
    return line.get_xdata().tolist(), line.get_ydata().tolist()


def test_load_is_the_log_as_rows(runs: list[Path]) -> None:
    data = load(*runs)
    assert list(data.columns) == ["run", "split", "channel", "metric", "step", "value"]
    assert set(data["channel"]) == {"", *CHANNELS}
    history = make_history(60, seed=1)
    for key, channel, metric in (("lvis_loss", "lvis", "loss"), ("grad_norm", "", "grad_norm")):
        rows = data.query("run == 'other' and split == 'train'")
        rows = rows[(rows["channel"] == channel) & (rows["metric"] == metric)]
        assert dict(zip(rows["step"], rows["value"], strict=True)) == expected_series(history, key)
    evaluated = data.query("split == 'eval' and channel == 'bbu'")
    assert sorted(evaluated["step"]) == [20, 20, 40, 40, 60, 60]


def test_a_figure_has_the_values_of_the_log(runs: list[Path]) -> None:
    figure = plot_channels(load(runs[0]), "token_acc")
    assert len(figure.axes[0].lines) == 3
    steps, values = line_of(figure, "bbu")
    assert dict(zip(steps, values, strict=True)) == expected_series(
        make_history(60), "bbu_token_acc"
    )
    assert figure.axes[0].get_title(loc="left") == "Token accuracy"


def test_runs_differ_by_the_kind_of_line_and_channels_by_color(runs: list[Path]) -> None:
    lines = plot_channels(load(*runs)).axes[0].lines
    assert len(lines) == 8
    of = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in lines}
    assert of[" bbu · base"][0] == of[" bbu · other"][0] != of[" rru · base"][0]
    assert of[" bbu · base"][1] == of[" whole run · base"][1] != of[" bbu · other"][1]


def test_smooth_lines_are_ratios_of_sums(tmp_path: Path) -> None:
    history = make_history(200, seed=2)
    write_jsonl(tmp_path / "logging.jsonl", history)
    # Five points: half a window of 200 / (2 * 40) = 2 on both sides.
    steps, values = line_of(plot_channels(load(tmp_path), smooth=5), "bbu")
    expected = MovingMeans(run_of(history), []).of("bbu", "loss")
    assert steps == expected[0].tolist()
    assert values == pytest.approx(expected[1].tolist(), rel=1e-9)


def test_a_line_is_broken_at_a_gap(tmp_path: Path) -> None:
    history = make_history(60)
    for entry in history:
        if 20 <= entry["step"] < 40:
            entry.pop("bbu_loss", None)
    write_jsonl(tmp_path / "logging.jsonl", history)
    steps, values = line_of(plot_channels(load(tmp_path)), "bbu")
    (broken,) = np.flatnonzero(np.isnan(values)).tolist()
    assert (steps[broken - 1], steps[broken + 1]) == (19, 40)


def test_hostile_names_are_drawn(tmp_path: Path) -> None:
    lines = [{"step": s, "dataset": n, "loss": 1 / s} for s in (1, 2) for n in HOSTILE_NAMES[:6]]
    write_jsonl(tmp_path / "samples.jsonl", lines)
    figure = plot_channels(load(tmp_path))
    figure.savefig(tmp_path / "x.png")
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert f" {HOSTILE}" in labels and len(labels) >= 6


def test_errors_name_what_there_is(runs: list[Path]) -> None:
    with pytest.raises(ChannelMetricsError, match=r"metric 'los'.*'loss'"):
        plot_channels(load(runs[0]), "los")
    with pytest.raises(ChannelMetricsError, match=r"channel 'bub'.*'bbu', 'lvis', 'rru'"):
        plot_channels(load(runs[0]), channels=["bub"])
    with pytest.raises(ChannelMetricsError, match="at least one run"):
        load()


def test_the_notebook_of_the_docs_gives_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS)
    notebook = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for cell in cells:
        *lines, last = "".join(cell["source"]).rstrip().split("\n")
        exec("\n".join(lines), names)
        result = eval(last, names)
        kinds = {kind: data for output in cell["outputs"] for kind, data in output["data"].items()}
        if "image/png" in kinds:
            assert type(result).__name__ == "Figure" and len(kinds["image/png"]) > 10_000
        else:
            assert repr(result) == "".join(kinds["text/plain"])
    assert len(cells) >= 4
    assert math.isfinite(names["data"]["value"].sum())

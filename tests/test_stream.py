"""The stream of windows: what a line holds, that no half line stays, and that analyze reads it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from rank_cases import TORCH, Case, RanksOf, case
from session_tools import batch, new
from typer.testing import CliRunner

from channel_metrics import ConfigError, MetricsConfig
from channel_metrics.analysis.judging.told import judged
from channel_metrics.analysis.rows import final_rows
from channel_metrics.analysis.run import load_run
from channel_metrics.cli.main import app
from channel_metrics.core.schema import Column, Metric, Schema
from channel_metrics.session import ChannelMetrics


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def run(path: Path, steps: range, **settings: Any) -> ChannelMetrics:
    settings = {"metrics": ("loss", "tokens", "ppl"), **settings}
    metrics = new(stream=str(path), **settings)
    for step in steps:
        metrics.count(batch(("bbu", 1, float(step)), ("rru", 3, 2.0), (None, 1, math.nan)))
        metrics.close(step)
    return metrics


def test_a_line_holds_values_and_sums(tmp_path: Path) -> None:
    path = tmp_path / "new" / "windows.jsonl"
    metrics = run(path, range(1, 2))
    with metrics.evaluation("code", 1, "eval_code_"):
        metrics.count(batch(("bbu", 2, 1000.0)))
    train, evaluation = lines(path)
    columns = train.pop("columns")
    sums = {name: dict(zip(columns, row, strict=True)) for name, row in train.pop("sums").items()}
    assert train == {
        "channel_metrics": 1, "step": 1, "split": "train", "unit": "tokens", "loss": 7 / 4,
        "bbu_loss": 1.0, "bbu_tokens": 1.0, "bbu_ppl": math.e,
        "rru_loss": 2.0, "rru_tokens": 3.0, "rru_ppl": math.exp(2),
        "unlabeled_tokens": 1.0, "unlabeled_nonfinite": 1.0,
        "bbu_tokens_total": 1, "bbu_samples_total": 1,
        "rru_tokens_total": 3, "rru_samples_total": 1,
        "unlabeled_tokens_total": 1, "unlabeled_samples_total": 1,
    }  # fmt: skip
    assert sums["rru"]["nll"] == 6.0 and sums["unlabeled"]["nonfinite"] == 1.0
    assert (evaluation["split"], evaluation["eval_code_loss"]) == ("code", 1000.0)
    assert evaluation["eval_code_bbu_ppl"] is None, "infinity is no JSON"


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_a_half_line_is_dropped_at_the_next_start(tmp_path: Path, size: int) -> None:
    path = tmp_path / "windows.jsonl"
    run(path, range(1, 3))
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * size)
    run(path, range(3, 4))
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    path.write_bytes(b"x" * size)
    run(path, range(1, 2))
    assert [line["step"] for line in lines(path)] == [1]


def test_a_run_that_became_nan_is_not_called_fine(tmp_path: Path) -> None:
    """Its log stands beside the stream, which is read first."""
    metrics = new(stream=str(tmp_path / "windows.jsonl"))
    for step in range(1, 61):
        bbu, rru = (2 - step / 100, 3 - step / 100) if step <= 30 else (math.nan, math.nan)
        metrics.count(batch(("bbu", 1, bbu), ("rru", 1, rru)))
        metrics.close(step)
    with metrics.evaluation("eval", 60):
        metrics.count(batch(("bbu", 1, math.nan)))
    *train, evaluation = lines(tmp_path / "windows.jsonl")
    assert [line["loss"] for line in train[29:32]] == [pytest.approx(2.2), None, None]
    assert evaluation["eval_loss"] is None
    (view,), (findings,) = judged([load_run(tmp_path)])
    told = [found.line for found in findings]
    last = "NaN since step 31; the last number was 2.2000 at step 30; first in bbu, rru, at step 31"
    assert f"the whole run: {last}" in told
    assert not any(found.kind == "trend" and found.level == "good" for found in findings)
    assert view.lost is not None and view.lost.channel == "" and str(view.whole.last_loss) == "nan"
    watched = CliRunner().invoke(app, ["watch", str(tmp_path), "--once", "--json"])
    assert [row["loss"] for row in json.loads(watched.output)["channels"]] == [None, None]


@pytest.mark.parametrize("settings", [{"top": 1}, {"axes": {"kind": {"bbu": "x"}}}])
def test_its_loss_is_that_of_all_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also of the channels that are not logged, and of each once."""
    metrics = run(tmp_path / "w.jsonl", range(1, 2), eval_channels=("bbu",), **settings)
    with metrics.evaluation("code", 1):
        metrics.count(batch(("bbu", 1, 1.0), ("rru", 3, 2.0)))
    train, evaluation = lines(tmp_path / "w.jsonl")
    assert train["loss"] == evaluation["eval_loss"] == 7 / 4


def test_with_top_it_has_the_sums_only(tmp_path: Path) -> None:
    """Totals of channels in `others` would count twice, or grow at once when they are shown."""
    run(tmp_path / "w.jsonl", range(1, 4), top=1)
    for line in lines(tmp_path / "w.jsonl"):
        assert not [key for key in line if key.endswith("_total")]
        assert len(line["sums"]) > 1


def test_kill_9_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    script = f"import test_stream; test_stream.die_in_line(3, {str(path)!r})"
    ended = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = path.read_bytes()
    assert left.count(b"\n") == 2 and not left.endswith(b"\n")
    run(path, range(3, 5))
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]


def die_in_line(number: int, path: str) -> None:
    """In a process of its own: half of a line reaches the disk."""
    write, calls = os.write, iter(range(1, 100))

    def half(file: int, text: Any) -> int:
        if next(calls) == number:
            write(file, text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, text)

    os.write = half
    run(Path(path), range(1, 9))


def test_report_and_watch_read_it_first(tmp_path: Path) -> None:
    run(tmp_path / "windows.jsonl", range(1, 6))
    (tmp_path / "logging.jsonl").write_text('{"step": 1, "other_loss": 9.0}\n')
    cli = CliRunner()
    watched = cli.invoke(app, ["watch", str(tmp_path), "--once"])
    assert "windows.jsonl" in watched.output and "bbu" in watched.output, watched.output
    page = tmp_path / "page.html"
    made = cli.invoke(app, ["report", str(tmp_path), "--output", str(page)])
    assert made.exit_code == 0, made.output
    text = page.read_text()
    assert "windows.jsonl" in text and "bbu" in text
    assert "other" not in watched.output and "other_loss" not in text


def test_other_units_and_few_columns(tmp_path: Path) -> None:
    few = new(stream=str(tmp_path / "few.jsonl"), metrics=("tokens",))
    few.count(batch(("a", 1, 1.0)))
    few.close(1)
    schema = Schema("pairs", "samples", [Column("samples", "pairs", "pairs")])
    schema.register(Metric("samples", ("samples",), lambda sums: sums["samples"]))
    config = MetricsConfig(stream=str(tmp_path / "pairs.jsonl"))
    pairs = ChannelMetrics(config, schema=schema)
    pairs.add(["a"], {"samples": torch.ones(1)})
    pairs.close(1)
    for name, unit in (("few", "tokens"), ("pairs", "pairs")):
        (line,) = lines(tmp_path / f"{name}.jsonl")
        assert line["unit"] == unit
    assert "loss" not in line


def test_a_disk_that_is_full_costs_the_stream_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = run(tmp_path / "windows.jsonl", range(1, 2))

    def full(*args: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    metrics.count(batch(("a", 1, 1.0)))
    assert metrics.close(2).values["a"]["loss"] == 1.0
    assert metrics.on_window == []
    assert "windows.jsonl failed, and shows nothing from now on: OSError(28" in caplog.text


def test_analyze_reads_it_first(tmp_path: Path) -> None:
    run(
        tmp_path / "windows.jsonl",
        range(1, 6),
        axes={"kind": {"bbu": "x"}},
        metrics=("loss", "share"),
    )
    (tmp_path / "logging.jsonl").write_text('{"step": 1, "bbu_loss": 9.0}\n')
    found = load_run(tmp_path)
    assert found.series("bbu", "loss")[1].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(found.channels()) == ["bbu", "rru", "unlabeled"]
    assert found.series("", "loss")[1].tolist() == [(step + 6) / 4 for step in range(1, 6)]


def test_lines_fit_the_schema_of_the_page(tmp_path: Path) -> None:
    """Without a package for it: required keys, and the type of each known one."""
    schema = json.loads((ROOT / "docs/windows.schema.json").read_text())
    types = {"integer": int, "string": str, "array": list, "object": dict}
    run(tmp_path / "windows.jsonl", range(1, 2), metrics=("loss", "worst_loss"))
    (line,) = lines(tmp_path / "windows.jsonl")
    assert set(schema["required"]) <= set(line) and "worst_channel" in schema["properties"]
    assert (line["worst_channel"], line["worst_loss"]) == ("rru", 2.0)
    assert load_run(tmp_path).channels() == ["bbu", "rru", "unlabeled"], "a name is no value"
    for key, value in line.items():
        if key in schema["properties"]:
            assert isinstance(value, types[schema["properties"][key]["type"]]), key
        else:
            assert schema["additionalProperties"]["type"] == ["number", "null"]
            assert value is None or isinstance(value, (float, int)), key


def test_the_code_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/stream.md").read_text()
    monkeypatch.chdir(tmp_path)
    run(Path("runs/a/windows.jsonl"), range(1, 4))
    run(Path("runs/a/windows.jsonl"), range(2, 5))  # resumed behind step 1
    scope: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], scope)
    assert scope["total"] == 1 + 2 + 3 + 4


def test_a_resume_from_the_middle_of_a_window_loses_no_tokens(tmp_path: Path) -> None:
    """Windows of two steps, a checkpoint after step 3, and a crash after step 4."""
    path = tmp_path / "windows.jsonl"

    def steps(metrics: ChannelMetrics, numbers: range, save_at: int = 0) -> None:
        for step in numbers:
            metrics.count(batch(("bbu", 1, 1.0), ("rru", 3, 2.0)))
            if step % 2 == 0:
                metrics.close(step)
            if step == save_at:
                metrics.save(tmp_path / "checkpoint")

    steps(new(stream=str(path), metrics=("loss", "tokens")), range(1, 5), save_at=3)
    second = new(stream=str(path), metrics=("loss", "tokens"))
    second.start(tmp_path / "checkpoint")
    steps(second, range(4, 7))
    assert [line["step"] for line in lines(path)] == [2, 4, 4, 6]
    rows = {row.channel: row.tokens for row in final_rows(load_run(tmp_path))}
    assert rows == {"bbu": 6, "rru": 18}


@case(TORCH, ranks=2)
def two(folder: Path) -> Any:
    run(folder / "windows.jsonl", range(1, 3))
    return str(folder)


@pytest.mark.parametrize("case", [two])
def test_one_rank_writes_the_sums_of_all(ranks_of: RanksOf, case: Case) -> None:
    first, second = (Path(folder) / "windows.jsonl" for folder in ranks_of(case))
    assert [(line["step"], line["rru_tokens"]) for line in lines(first)] == [(1, 6), (2, 6)]
    assert first == second or not second.exists()


def test_a_wrong_path() -> None:
    with pytest.raises(ConfigError, match="stream must be the path of a file, but is 3"):
        MetricsConfig.from_mapping({"stream": 3})

"""The commands for scripts and for people: JSON, notes, progress, files that cannot be written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from analysis.analysis_tools import make_history, run_of, write_jsonl
from channel_metrics.analysis.commands import Format
from channel_metrics.analysis.readers.sources import FORMATS
from channel_metrics.analysis.rows import final_rows
from channel_metrics.analysis.watch.screen import view_of
from channel_metrics.analysis.watch.traces import traces_of
from channel_metrics.cli.main import app


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    history = make_history(40)
    folder = tmp_path / "run"
    write_jsonl(folder / "logging.jsonl", history)
    with (folder / "logging.jsonl").open("a") as file:
        file.write('broken\n{"step": 41, "bbu_loss": NaN}\n')
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def check_row(found: dict[str, Any], expected: Any) -> None:
    for name in ("channel", "first_loss", "last_loss", "token_acc", "eval_loss", "tokens", "share"):
        assert found[name] == getattr(expected, name)


def test_analyze_and_report_as_json(run: Path) -> None:
    rows = {row.channel: row for row in final_rows(run_of(make_history(40)))}
    for command in (("analyze", "--csv"), ("report", "--no-pictures")):
        code, out, err = invoke(*command, run, "--json")
        assert code == 0, err
        content = json.loads(out)
        (found,) = content["runs"]
        assert [row["channel"] for row in found["channels"]] == list(rows)
        for row in found["channels"]:
            # The last loss of `bbu` is NaN, which JSON does not have.
            lost: dict[str, Any] = {"last_loss": None} if row["channel"] == "bbu" else {}
            check_row(row, replace(rows[row["channel"]], **lost))
        nan = found["findings"][0]
        assert (nan["kind"], nan["level"], nan["channel"]) == ("nan", "bad", "bbu")
        assert nan["text"].startswith("bbu: NaN since step 41; the last number was ")
        assert found["whole_run"]["last_loss"] == make_history(40)[-2]["loss"]
        assert found["notes"] == ["read as jsonl; the run also has trainer_state"]
        assert (found["first_step"], found["last_step"], found["num_unreadable"]) == (1, 40, 1)
        assert "logging.jsonl:43: is no JSON" in found["unreadable"][0]
        for file in content.get("files", [content.get("report")]):
            assert Path(file).is_file()


@pytest.mark.parametrize("command", [("analyze",), ("report", "--no-pictures")])
def test_json_and_fail_on_together(run: Path, command: tuple[str, ...]) -> None:
    code, out, _ = invoke(*command, run, "--json", "--fail-on", "worse")
    assert code == 1
    assert [item["kind"] for item in json.loads(out)["runs"][0]["findings"]][:1] == ["nan"]


def test_watch_as_json(run: Path) -> None:
    code, out, err = invoke("watch", run, "--once", "--json", "--top", 1)
    assert code == 0, err
    content = json.loads(out)
    assert (content["step"], content["format"], content["num_unreadable"]) == (41, "jsonl", 1)
    rows = {row.channel: row for row in final_rows(run_of(make_history(40)))}
    (row,) = content["channels"]
    assert row["share"] == pytest.approx(rows[row["name"]].share)
    # The last loss of `bbu` is NaN, which JSON does not have.
    bbu = json.loads(invoke("watch", run, "--once", "--json", "--sort", "name")[1])["channels"][0]
    assert (bbu["name"], bbu["loss"], bbu["step"]) == ("bbu", None, 41)
    code, _, err = invoke("watch", run, "--json")
    assert code == 2
    assert "give --once, too" in err


def test_check_as_json(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 40, "channel": "bbu"}, {"text": "xx"}])
    code, out, _ = invoke("check", data, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["channels"] == {"bbu": {"records": 1, "tokens": 10}}
    assert content["no_channel"] == {"records": 1, "tokens": 0}
    assert content["fields"]["channel"] == 1
    assert invoke("check", write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}]), "--json")[0] == 1


def test_report_prints_the_notes_that_analyze_prints(run: Path) -> None:
    code, analyzed, analyze_err = invoke("analyze", run)
    assert code == 0
    _, reported, report_err = invoke("report", run, "--no-pictures")
    for line in ("read from ", "note: read as jsonl; the run also has trainer_state"):
        assert line in analyzed
        assert line in reported
    assert "1 places could not be read:" in analyze_err
    assert "1 places could not be read:" in report_err


def test_the_csv_is_optional(run: Path) -> None:
    code, out, _ = invoke("analyze", run)
    assert code == 0
    folder = run / "channel_analysis"
    assert not (folder / "metrics.csv").exists()
    assert "metrics.csv" not in out
    assert parquet.read_table(folder / "metrics.parquet").num_rows > 100


def test_the_whole_run_has_a_row_even_without_channels(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 4.0 - step, "eval_loss": 5.0} for step in (1, 2, 3)]
    code, out, _ = invoke("analyze", write_jsonl(tmp_path / "a.jsonl", log))
    assert code == 0
    (line,) = (line for line in out.splitlines() if "(whole run)" in line)
    assert line.split() == ["(whole", "run)", "3.0000", "1.0000", "-66.7%", "5.0000"]
    assert "no channel was found" in out


def test_channels_that_are_only_evaluated_fill_their_rows(tmp_path: Path) -> None:
    log: list[dict[str, float]] = [
        {"step": s, "loss": 3.0, "web_loss": 2.0, "web_tokens": 9} for s in (1, 2, 3)
    ]
    log += [
        {"step": s, "eval_web_loss": 2.5, "eval_code_loss": 4.0 / s, "eval_code_tokens": 7}
        for s in (1, 2)
    ]
    web, code_row = final_rows(run_of(log))
    assert (web.split, web.last_loss, web.eval_loss, web.tokens) == ("train", 2.0, 2.5, 27)
    assert (code_row.split, code_row.first_loss, code_row.last_loss) == ("eval", 4.0, 2.0)
    assert (code_row.tokens, code_row.share) == (7, None)
    out = invoke("analyze", write_jsonl(tmp_path / "a.jsonl", log))[1]
    (line,) = (line for line in out.splitlines() if "code (eval)" in line)
    assert line.split()[2:5] == ["4.0000", "2.0000", "-50.0%"]


def test_a_log_that_gains_tokens_after_a_resume() -> None:
    """`tokens_total` goes on from the checkpoint; the sum of the windows would be too small."""
    log: list[dict[str, float]] = [
        {"step": s, "loss": 1.0, "web_loss": 1.0, "web_tokens_total": 100.0 * s} for s in (1, 2)
    ]
    log += [{"step": 3, "web_loss": 1.0, "web_tokens_total": 333.0, "web_tokens": 133.0}]
    log += [{"step": s, "code_loss": 1.0, "code_tokens": 50.0} for s in (1, 2, 3)]
    log += [{"step": 4, "web_loss": 1.0, "web_tokens": 17.0}]
    rows = {row.channel: row for row in final_rows(run_of(log))}
    assert (rows["web"].tokens, rows["code"].tokens) == (350, 150)
    assert (rows["web"].share, rows["code"].share) == (0.7, 0.3)
    readings = [(int(e["step"]), k, v) for e in log[:-1] for k, v in e.items() if k != "step"]
    shares = {row.name: row.share for row in view_of(traces_of(readings)).rows}
    assert shares == pytest.approx({"web": 333 / 483, "code": 150 / 483})


@pytest.mark.parametrize(
    "command", [("analyze", "--output-dir"), ("report", "--no-pictures", "--output")]
)
def test_an_output_that_cannot_be_written_is_an_error_without_a_traceback(
    run: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    (tmp_path / "file").touch()
    code, _, err = invoke(*command, tmp_path / "file" / "x", run)
    assert code == 2
    assert err.startswith("error: ")
    assert str(tmp_path / "file") in err


def test_a_full_disk_leaves_the_old_report(run: Path) -> None:
    """Files of more than 64 kB cannot be written in this process."""
    report = run / "report.html"
    report.write_text("old")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); "
        "from channel_metrics.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(run), "--no-pictures"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert report.read_text() == "old"
    assert sorted(path.name for path in run.iterdir()) == [
        "logging.jsonl",
        "report.html",
        "trainer_state.json",
    ]


@pytest.mark.parametrize(
    ("package", "command"),
    [("pyarrow", ["analyze"]), ("matplotlib", ["report"]), ("jinja2", ["report"])],
)
def test_a_missing_package_is_said_before_the_work(
    run: Path, monkeypatch: pytest.MonkeyPatch, package: str, command: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("channel_metrics.analysis.run.load_run", pytest.fail)
    code, _, err = invoke(*command, run)
    assert code == 2
    assert f"this needs {package}" in err
    assert "pip install 'channel_metrics[report]'" in err


def test_without_wandb_its_file_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.wandb").write_bytes(b":W&B123")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for command in ("analyze", "report"):
        code, _, err = invoke(command, tmp_path)
        assert code == 2
        assert "'wandb' is not installed; run: pip install 'channel_metrics[trackers]'" in err
    # Where the run has another log, that one is read.
    (tmp_path / "a.log").write_text(" iteration 1/ 9 | lm loss: 2.5 |\n")
    code, out, _ = invoke("analyze", tmp_path)
    assert code == 0
    assert "run.wandb was left aside: 'wandb' is not installed" in out
    assert "2.5000" in invoke("watch", tmp_path, "--once")[1]


def test_an_unknown_format_lists_the_formats(run: Path) -> None:
    for command in ("analyze", "report", "watch"):
        code, _, err = invoke(command, run, "--format", "foo")
        assert code == 2
        assert f"one of the formats {', '.join(FORMATS)}, but got 'foo'" in err
    # The help names them all, too, without loading the readers.
    assert get_args(Format)[1].help.endswith(f"has several: {', '.join(FORMATS)}.")

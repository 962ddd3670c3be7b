"""`channel-metrics report`, the report at the end of a training, and the pictures."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

import pytest
from typer.testing import CliRunner

from analysis.analysis_tools import make_history, run_of, write_jsonl
from analysis.report_runs import HOSTILE_NAMES, run_with
from channel_metrics.analysis.report.command import report_of_training
from channel_metrics.analysis.report.html import write_report
from channel_metrics.analysis.report.pictures import write_pictures
from channel_metrics.analysis.report.views import shown
from channel_metrics.cli.main import app

SVG = "{http://www.w3.org/2000/svg}"


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def test_it_writes_into_the_run_folder(tmp_path: Path) -> None:
    run = write_jsonl(tmp_path / "a run" / "logging.jsonl", make_history(20)).parent
    code, out, err = invoke("report", run)
    assert code == 0, err
    assert f"report:   {run / 'report.html'} (" in out
    assert "<h1><bdi>a run</bdi></h1>" in (run / "report.html").read_text()
    pictures = {path.name for path in (run / "report_pictures").iterdir()}
    assert pictures == {f"{m}.{s}" for m in ("loss", "token_acc", "share") for s in ("png", "svg")}


def test_runs_and_options(tmp_path: Path) -> None:
    runs = [
        write_jsonl(tmp_path / name / "logging.jsonl", make_history(20, seed=seed)).parent
        for seed, name in enumerate("ab")
    ]
    file = tmp_path / "new" / "compare.html"
    options = ("--output", file, "--no-pictures", "--title", "Which mix?")
    code, out, err = invoke("report", *runs, *options)
    assert code == 0, err
    assert "pictures" not in out
    assert [path.name for path in file.parent.iterdir()] == ["compare.html"]
    text = file.read_text()
    assert "<h1><bdi>Which mix?</bdi></h1>" in text and "2 runs, 3 channels" in text


@pytest.mark.parametrize("content", [None, "no log\n"])
def test_without_a_log_it_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_text(content)
    code, out, err = invoke("report", tmp_path / "x.txt")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ") and "x.txt" in err
    assert not (tmp_path / "report.html").exists()


def test_the_report_of_a_training_reads_its_log_and_its_ratios(tmp_path: Path) -> None:
    history = {"log_history": make_history(20)}
    (tmp_path / "trainer_state.json").write_text(json.dumps(history))
    ratios = {"ratios": {"bbu": 3, "rru": 1}}
    (tmp_path / "channel_metrics_run.json").write_text(json.dumps(ratios))
    line = report_of_training(tmp_path, "trainer_state")
    assert line == f"report:      {tmp_path / 'report.html'}"
    assert "75.0%" in (tmp_path / "report.html").read_text()


def test_an_error_in_the_report_does_not_end_a_training_that_is_done(tmp_path: Path) -> None:
    line = report_of_training(tmp_path, "trainer_state")
    assert line.startswith("report:      none, because of an error: ")
    (tmp_path / "report.html").mkdir()
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": make_history(4)}))
    assert "because of an error" in report_of_training(tmp_path, "trainer_state")


def test_without_the_extra_the_training_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    hidden = {"jinja2"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find_spec(name)
    )
    line = report_of_training(tmp_path, "trainer_state")
    assert "pip install 'channel_metrics[report]'" in line
    assert list(tmp_path.iterdir()) == []


def comments_of(path: Path) -> list[str]:
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    elements: Iterable[Any] = ET.parse(path, parser).iter()
    return [unescape(element.text or "") for element in elements if element.tag is ET.Comment]


@pytest.mark.parametrize("names", [HOSTILE_NAMES[:7], (*HOSTILE_NAMES[7:], "\u4e2d\u6587")])
def test_pictures_of_hostile_names_are_text(tmp_path: Path, names: tuple[str, ...]) -> None:
    for path in write_pictures([run_with(names, steps=12)], tmp_path):
        if path.suffix == ".svg":
            tags = {element.tag.removeprefix(SVG) for element in ET.parse(path).iter()}
            assert not tags & {"script", "image", "a", "foreignObject", "iframe"}
            # Letters are drawn as paths, with the text in a comment before them.
            comments = comments_of(path)
            for name in names:
                assert any(shown(name)[:20].replace("--", "- -") in text for text in comments), name
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_show_what_there_is_and_are_the_same_each_time(tmp_path: Path) -> None:
    run = run_of([{"step": s, "loss_a": 1 / s, "loss_b": 2 / s} for s in range(1, 20)])
    once, again = (write_pictures([run, run], tmp_path / name) for name in "xy")
    assert [path.name for path in once] == ["loss.png", "loss.svg"]
    assert once[1].read_bytes() == again[1].read_bytes()
    lines = [path for path in ET.parse(once[1]).iter(f"{SVG}path") if path.get("clip-path")]
    # Two runs of two channels; a point of the log is a vertex of its line.
    drawn = [path.get("d", "").count("L") + 1 for path in lines if "#" in str(path.get("style"))]
    assert drawn.count(19) == 4


def test_without_configured_ratios_the_mix_has_no_empty_columns(tmp_path: Path) -> None:
    pages = []
    for name, ratios in (("planned", {"bbu": 1.0, "rru": 1.0}), ("free", {})):
        write_report([run_of(make_history(12), ratios=ratios)], tmp_path / name)
        pages.append((tmp_path / name).read_text(encoding="utf-8"))
    for word in (">configured<", "difference, points"):
        assert [word in page for page in pages] == [True, False]

"""Every exit code in the table of docs/REFERENCE.md, one run of each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from typer.testing import CliRunner

from channel_metrics.cli.main import app
from channel_metrics.demo.tiny import TinyModel, byte_tokenizer, tiny_model
from channel_metrics.startup.sitecustomize import PATCHES

TRAIN = """
sources: {{a: {{path: data.jsonl}}}}
model: {{tiny: {{hidden_size: 8, num_layers: 1, num_heads: 1, intermediate_size: 8}}}}
training: {{max_steps: 1, logging_steps: 1, save_strategy: "no", report_to: []}}
metrics: {{live_table: false, on_window: {}}}
"""
# {(command, exit code): the arguments}. The files are those of `folder`.
CASES = {
    ("train", 0): ("train.yaml", "--output-dir", "trained"),
    ("train", 1): ("fails.yaml", "--output-dir", "failed"),
    ("train", 2): ("absent.yaml",),
    ("check", 0): ("data.jsonl",),
    ("check", 1): ("no_channels.jsonl",),
    ("check", 2): ("absent.jsonl",),
    ("doctor", 0): ("--patch", "hf_trainer", "--data", "data.jsonl"),
    ("doctor", 1): ("--patch", "absent"),
    ("doctor", 2): ("--patch", "unknown"),
    ("analyze", 0): ("log.jsonl",),
    ("analyze", 1): ("worse.jsonl", "--fail-on", "worse"),
    ("analyze", 2): ("empty",),
    ("report", 0): ("log.jsonl", "--no-pictures"),
    ("report", 1): ("worse.jsonl", "--no-pictures", "--fail-on", "worse"),
    ("report", 2): ("empty",),
    ("reference", 0): ("model", "data.jsonl", "--output", "with_reference.jsonl"),
    ("reference", 1): ("model", "data.jsonl", "--output", "lost.jsonl", "--device", "meta"),
    ("reference", 2): ("absent", "data.jsonl"),
    ("watch", 0): ("log.jsonl", "--once"),
    ("watch", 2): ("empty", "--once"),
}


def write(path: Path, *records: Any) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exit_codes")
    (folder / "empty").mkdir()
    (folder / "train.yaml").write_text(TRAIN.format("[]"))
    # It takes no argument, so it raises.
    (folder / "fails.yaml").write_text(TRAIN.format('["os:getcwd"]'))
    write(folder / "data.jsonl", *[{"channel": "a", "text": "one two"}] * 8)
    write(folder / "no_channels.jsonl", {"text": "one two"})
    log = [{"step": step, "a_loss": 1 / step, "a_tokens": 5} for step in range(1, 9)]
    write(folder / "log.jsonl", *log)
    write(folder / "worse.jsonl", *log, {"step": 9, "a_loss": float("nan"), "a_tokens": 5})
    size = TinyModel(hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8)
    tiny_model(size, byte_tokenizer(), max_length=64, seed=0).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.mark.parametrize(
    ("case", "arguments"), CASES.items(), ids=lambda of: " ".join(map(str, of))
)
def test_exit_code(
    case: tuple[str, int],
    arguments: tuple[str, ...],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, code = case
    monkeypatch.chdir(folder)
    monkeypatch.setitem(PATCHES, "absent", {"no_such_package": "no_such_patch"})
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == code, result.output
    # An error that is not ours has its traceback.
    is_theirs = result.exception is not None and not isinstance(result.exception, SystemExit)
    assert is_theirs == (case in {("train", 1), ("reference", 1)}), result.exception


def test_every_command_refuses_an_unknown_option() -> None:
    names = [command.name for command in app.registered_commands]
    assert len(names) >= 8
    for name in names:
        assert CliRunner().invoke(app, [str(name), "--no-such-option"]).exit_code == 2, name


def test_the_cases_are_those_of_the_reference() -> None:
    page = (ROOT / "docs/REFERENCE.md").read_text(encoding="utf-8")
    section = page.split("\n### Exit codes\n")[1].split("\n### ")[0]
    found = set()
    for line in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
        names, *cells = line.split(" |")
        found |= {
            (name, code)
            for name in re.findall(r"`(\w+)`", names)
            for code, cell in enumerate(cells)
            if cell.strip()
        }
    assert found == {*CASES}

"""The log line in README and docs is the last one of the demo, whose log is docs/example_run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

EXAMPLE = ROOT / "docs/example_run"


def last_of(folder: Path) -> dict[str, Any]:
    """The last log of the training in a run folder."""
    state = json.loads((folder / "trainer_state.json").read_text())
    found: dict[str, Any] = [entry for entry in state["log_history"] if "bbu_loss" in entry][-1]
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/TRAINING_PLAYBOOK.md"])
def test_the_line_on_the_page(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (line,) = re.findall(r"^\{'loss'.*?\}$", text, re.DOTALL | re.MULTILINE)
    shown = dict(re.findall(r"'(\w+)': '([\d.]+)'", line))
    last = last_of(EXAMPLE)
    assert len(shown) >= 5
    assert shown == {key: f"{last[key]:.4g}" for key in shown}


@pytest.mark.skipif("CI" not in os.environ, reason="`.ci/run` runs `make demo` before the tests")
def test_the_demo_still_logs_it() -> None:
    """Not to the last digit, which depends on the processor."""
    last, now = last_of(EXAMPLE), last_of(ROOT / "runs/debug")
    keys = [key for key in last if key.endswith(("loss", "token_acc", "tokens", "share"))]
    assert [now[key] for key in keys] == pytest.approx([last[key] for key in keys], rel=0.01)

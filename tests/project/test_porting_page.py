"""docs/porting.md: its adapter runs, and gives the numbers of a plain computation."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hf_tools import PaddingCollator, make_records, tiny_model
from loop_tools import check, plain_oracle

from channel_metrics.core.totals import TOTALS_FILE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "porting.md"
TRAIN, EVAL = make_records(16), make_records(7, seed=1)
OWN = {"step", "loss"}


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the code of the page leaves, with a model that it does not change."""
    names: dict[str, Any] = {
        "learning_rate": 0.0,
        "model": tiny_model(attention_dropout=0.0),
        "train_set": TRAIN,
        "eval_set": EVAL,
        "pad": PaddingCollator(),
        "folder": tmp_path / "checkpoint",
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    return names


def test_the_logs_are_those_of_a_plain_computation(names: dict[str, Any]) -> None:
    first, second, evaluated = names["trainer"].history
    for logs, records in ((first, TRAIN[:8]), (second, TRAIN[8:])):
        assert set(logs) >= OWN
        check({key: value for key, value in logs.items() if key not in OWN}, plain_oracle(records))
    check(evaluated, plain_oracle(EVAL, prefix="eval_"))


def test_the_checkpoint_has_totals(names: dict[str, Any]) -> None:
    saved = json.loads((names["folder"] / TOTALS_FILE).read_text())["channels"]
    logs = names["trainer"].history[:2]
    for channel, totals in saved.items():
        assert totals["tokens_total"] == sum(log.get(f"{channel}_tokens", 0) for log in logs)
    assert saved and (names["folder"] / "trainer.json").exists()


def test_the_patch_is_gone(names: dict[str, Any]) -> None:
    plain = names["Trainer"](names["model"], TRAIN, EVAL, PaddingCollator())
    plain.train()
    assert [set(logs) for logs in plain.history] == [OWN, OWN]

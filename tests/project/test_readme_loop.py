"""The README's loop of one's own: its code runs, and gives the losses of a plain computation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import PaddingCollator, make_records, tiny_model

README = Path(__file__).resolve().parents[2] / "README.md"

TRAIN, EVAL = make_records(16), make_records(8, seed=1)


def _blocks() -> list[str]:
    section = README.read_text(encoding="utf-8").split("\n## A loop of your own\n")[1]
    return re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)


def _run(model: Any) -> dict[str, Any]:
    """What the names of the blocks hold in the end."""
    names: dict[str, Any] = {
        "model": model,
        # The model stays as it is, so that every window can be computed again.
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0),
        "train_set": TRAIN,
        "eval_set": EVAL,
        "base_collate": PaddingCollator(),
    }
    for block in _blocks():
        exec(block, names)
    return names


def _losses(model: Any, records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """{channel: losses of its supervised tokens}, one record at a time."""
    found: dict[str, list[float]] = {}
    for record in records:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([record["input_ids"]])).logits[0]
        for position, label in enumerate(record["labels"][1:]):
            if label != -100:
                nll = -logits[position].double().log_softmax(-1)[label]
                found.setdefault(record["channel"], []).append(float(nll))
    return found


def test_the_loop_gives_the_losses_of_a_plain_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model(attention_dropout=0.0)
    names = _run(model)
    first, second, evaluation, by_hand = capsys.readouterr().out.splitlines()
    for line, records, prefix in (
        (first, TRAIN[:8], ""),
        (second, TRAIN[8:], ""),
        (evaluation, EVAL, "eval_"),
    ):
        logs, expected = eval(line), _losses(model, records)
        assert {key for key in logs if key.endswith("_tokens")} == {
            f"{prefix}{channel}_tokens" for channel in expected
        }
        for channel, losses in expected.items():
            assert logs[f"{prefix}{channel}_tokens"] == len(losses)
            assert logs[f"{prefix}{channel}_loss"] == pytest.approx(sum(losses) / len(losses), 1e-5)
    assert by_hand == "2.0 1.0"

    totals = {channel: len(losses) for channel, losses in _losses(model, TRAIN).items()}
    assert names["metrics"].totals.of("bbu")["tokens_total"] == totals["bbu"] + 2

    _run(model)  # resumes
    resumed = eval(capsys.readouterr().out.splitlines()[1])
    of_both = {channel: 2 * tokens for channel, tokens in totals.items()}
    last = _losses(model, TRAIN[8:])
    assert {c: resumed[f"{c}_tokens_total"] for c in last} == {c: of_both[c] for c in last}

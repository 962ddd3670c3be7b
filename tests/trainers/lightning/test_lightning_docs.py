"""The code of docs/lightning.md runs, and gives the losses of a plain computation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import PaddingCollator, make_records
from lightning_tools import check, quiet, run, still_model

pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:.*litlogger")]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "lightning.md"
TRAIN, EVAL = make_records(16), make_records(8, seed=1)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {
        "model": still_model(),
        "base_collate": PaddingCollator(),
        "train_set": TRAIN,
        "eval_set": EVAL,
    }
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    tokens = sum(label != -100 for r in TRAIN if r["channel"] == "bbu" for label in r["labels"][1:])
    logged = names["trainer"].callback_metrics
    assert logged["bbu_tokens_total"] == 2 * tokens
    best = names["best"].best_model_score.item()
    assert f"{best:.4f}" in capsys.readouterr().out
    assert best == pytest.approx(logged["val_bbu_loss"].item(), rel=0.1)

    module = names["FromLogits"](still_model())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    found = run(TRAIN[:8], module=module, log_every_n_steps=2)
    logs = found.windows[0].logs
    assert not any(key.endswith("_token_acc") for key in logs)
    with_acc = run(TRAIN[:8]).windows[0].logs
    check(with_acc, TRAIN[:8])
    for key, value in logs.items():
        assert value == pytest.approx(with_acc[key], rel=1e-5)


def test_the_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from lightning.pytorch import Trainer
    from lightning_tools import Module
    from torch.utils.data import DataLoader

    from channel_metrics.trainers.lightning import ChannelMetricsCallback

    text = PAGE.read_text(encoding="utf-8")
    block = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)[0]
    names: dict[str, Any] = {
        "ChannelMetricsCallback": ChannelMetricsCallback,
        "DataLoader": DataLoader,
        "Trainer": lambda callbacks: Trainer(
            callbacks=callbacks, accelerator="cpu", max_epochs=1, log_every_n_steps=2, logger=False
        ),
        "mixture": TRAIN,
        "collate": PaddingCollator(),
        "module": Module(),
    }
    exec(block, names)
    assert names["metrics"].metrics.totals.of("bbu")["tokens_total"] > 0

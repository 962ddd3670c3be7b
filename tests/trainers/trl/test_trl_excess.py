"""`excess_loss` in TRL's SFTTrainer: with whole sequences, and with packs, which may cut them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer
from trl_sft_tools import HAS_BOUNDS, MySFT, expected, sft
from trl_tools import token_records

from channel_metrics import MetricsConfig
from channel_metrics.trainers.hf import attach

CONFIG = MetricsConfig(metrics=("loss", "excess_loss", "tokens"), live_table=False)


def records() -> list[dict[str, Any]]:
    return [
        {**record, "ref_nll": 1.7 * number, "ref_tokens": len(record["input_ids"]) - 1}
        for number, record in enumerate(token_records(32))
    ]


@pytest.mark.parametrize(
    "padding_free",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not HAS_BOUNDS, reason="this trl gives padding-free rows no position ids"
            ),
        ),
    ],
)
def test_whole_sequences(tmp_path: Path, padding_free: bool) -> None:
    """One window is an epoch, so each record is in it once."""
    trainer = sft(
        tmp_path,
        SFTTrainer,
        records(),
        prepare=lambda trainer: attach(trainer, CONFIG),
        padding_free=padding_free,
        learning_rate=0.0,
        max_length=None,
        logging_steps=4,
    )
    (log,) = [entry for entry in trainer.state.log_history if "bbu_loss" in entry]
    ids = [torch.tensor([record["input_ids"]]) for record in records()]
    model = expected(trainer.model, [{"input_ids": one, "labels": one} for one in ids])
    for name in ("bbu", "rru", "lvis", "lang_chat"):
        own = [record for record in records() if record["channel"] == name]
        nll, tokens = (sum(record[key] for record in own) for key in ("ref_nll", "ref_tokens"))
        assert log[f"{name}_tokens"] == tokens
        assert log[f"{name}_excess_loss"] == pytest.approx(
            model[f"{name}_loss"] - nll / tokens, rel=1e-5
        )


def test_packs_have_none_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = sft(tmp_path, MySFT, records(), packing=True, channel_metrics=CONFIG, max_steps=2)
    logs = [entry for entry in trainer.state.log_history if "bbu_loss" in entry]
    assert logs and not any("excess" in key for log in logs for key in log)
    said = [r.getMessage() for r in caplog.records if "excess_loss needs" in r.getMessage()]
    assert len(said) == 1

"""A column and a metric are a few lines in one place, and every trainer and reader knows them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from hf_tools import make_records, tiny_model, token_table, train
from schema_tools import registered
from typer.testing import CliRunner

from channel_metrics import Column, Metric, MetricsConfig
from channel_metrics.cli.main import app
from channel_metrics.trainers.hf import attach
from channel_metrics.trainers.megatron import MegatronChannelMetrics
from channel_metrics.trainers.megatron.log import log_line

# All that a new statistic takes.
HARD = (
    Column("hard", "tokens", "tokens with a loss above 4.1", per_token=lambda v: v.losses > 4.1),
    Metric(
        "hard_share",
        needs=("hard", "tokens"),
        formula=lambda sums: sums["hard"] / sums["tokens"],
        doc="hard / tokens",
        label="Hard tokens",
    ),
)


def test_a_registered_metric_is_in_the_hf_log_in_analyze_and_in_the_report(tmp_path: Path) -> None:
    records = make_records(16)
    model = tiny_model(attention_dropout=0.0)
    table = token_table(model, records)
    with registered(*HARD):
        config = MetricsConfig(metrics=("loss", "tokens", "hard_share"))
        trainer = train(
            tmp_path,
            model=model,
            records=records,
            prepare=lambda trainer: attach(trainer, config),
            learning_rate=0.0,
            max_steps=4,
            logging_steps=4,
        )
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        for channel in ("bbu", "rru"):
            losses = [nll for c, tokens in table.values() if c == channel for nll, _ in tokens]
            share = sum(loss > 4.1 for loss in losses) / len(losses)
            assert 0 < share < 1
            assert entry[f"{channel}_hard_share"] == pytest.approx(share)
        log = tmp_path / "logging.jsonl"
        log.write_text("".join(json.dumps(line) + "\n" for line in trainer.state.log_history))
        for command in (["analyze", str(log), "--csv"], ["report", str(log)]):
            result = CliRunner().invoke(app, command)
            assert result.exit_code == 0, result.output
    with (tmp_path / "channel_analysis" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "hard_share"]
    assert {row["channel"] for row in rows} >= {"bbu", "rru"}
    (report,) = tmp_path.rglob("*.html")
    assert "Hard tokens" in report.read_text()


def test_a_registered_metric_is_in_the_line_of_megatron() -> None:
    losses, mask = torch.tensor([[1.0, 5.0, 6.0], [7.0, 2.0, 0.0]]), torch.ones(2, 3)
    with registered(*HARD):
        config = MetricsConfig(metrics=("tokens", "hard_share"))
        metrics = MegatronChannelMetrics(["web", "code"], config=config)
        count = metrics.count(lambda given: given.sum(), channels=["web", "code"], loss_mask=mask)
        count(losses)
        line = log_line("iteration       10", metrics.compute(10))
    assert line == (
        " iteration       10 channels | web_tokens: 3 | web_hard_share: 6.666667E-01 |"
        " code_tokens: 3 | code_hard_share: 3.333333E-01 |"
    )

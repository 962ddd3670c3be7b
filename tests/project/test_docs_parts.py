"""The pieces of scripts in the docs, with what they leave out: a trainer, data, a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs_blocks import PYTHON

from channel_metrics.demo.tiny import TinyModel, byte_tokenizer, tiny_model


def run(page: str, word: str, **names: Any) -> dict[str, Any]:
    """Run the block of a page that has this word in it, and return its names."""
    (text,) = [block.text for block in PYTHON if block.page == page and word in block.text]
    exec(compile(text, page, "exec"), names)
    return names


def records(channel: str) -> list[dict[str, Any]]:
    """Records with tokens and a channel."""
    ids = [[i, i + 1, i + 2] for i in range(8)]
    return [{"input_ids": own, "labels": own, "channel": channel} for own in ids]


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """A transformers Trainer for two steps."""
    import datasets
    import transformers

    tokenizer = byte_tokenizer()
    size = TinyModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16)
    return transformers.Trainer(
        tiny_model(size, tokenizer, max_length=16, seed=0),
        transformers.TrainingArguments(
            str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True
        ),
        train_dataset=datasets.Dataset.from_list(records("bbu")),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )


def test_probe(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(record) + "\n" for record in records("canary"))
    Path("canary.jsonl").write_text(lines)
    run("docs/probe.md", "attach_probe", trainer=trainer, mmlu=records("mmlu"))
    logged = {key for log in trainer.state.log_history for key in log}
    assert {"dataset_canary_loss", "dataset_mmlu_loss"} <= logged


def test_collator_that_drops_records() -> None:
    names = run(
        "docs/hf_trainer.md",
        "def collate",
        usable=lambda record: record["input_ids"][0] > 5,
        pad=lambda features: {"input_ids": torch.tensor([f["input_ids"] for f in features])},
    )
    batch = names["collate"]([*records("a"), *records("b")])
    assert len(batch["input_ids"]) == 4
    assert batch["channels"] == ["a", "a", "b", "b"]


def test_channel_per_token() -> None:
    tokenizer = byte_tokenizer()
    names = run("docs/hf_trainer.md", "def tokenize_function", tokenizer=tokenizer)
    output = names["tokenize_function"]({"text": ["abc", "d"], "source": ["web", "code"]})
    assert output["channel"] == [["web"] * 3, ["code"]]


def test_fused_loss() -> None:
    hidden = torch.randn(4, 8)
    head, target = torch.nn.Linear(8, 11, bias=False), torch.tensor([1, 2, -100, 3])
    names = run("docs/fused_losses.md", "chunked", hidden=hidden, head=head, target=target)
    expected = torch.nn.functional.cross_entropy(head(hidden), target)
    torch.testing.assert_close(names["loss"], expected)


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/debug")
    folder.mkdir(parents=True)
    logs = [{"step": i, "loss": 1 / i, "bbu_loss": 2 / i, "bbu_tokens": 5} for i in range(1, 9)]
    logs = [log | {"bbu_token_acc": 1 - log["loss"]} for log in logs]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))
    run("docs/report.md", "write_report")
    assert "bbu" in Path("report.html").read_text(encoding="utf-8")
    names = run("docs/report.md", "plot_channels")
    assert set(names["data"]["channel"]) == {"", "bbu"}


def test_attach(trainer: Any) -> None:
    run("docs/hf_trainer.md", "attach(trainer)", trainer=trainer)
    assert {"bbu_loss", "bbu_tokens"} <= set(trainer.state.log_history[0])

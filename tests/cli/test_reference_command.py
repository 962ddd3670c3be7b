"""`channel-metrics reference`: its numbers, its resume, and a run that uses them."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.testing import CliRunner

from channel_metrics import MetricsConfig
from channel_metrics.cli.main import app
from channel_metrics.demo.tiny import TinyModel, byte_tokenizer, tiny_model
from channel_metrics.trainers.hf import attach


def invoke(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["reference", *map(str, args)])
    return result.exit_code, result.output


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and records with token ids; the odd ones have prompts that are not learned."""
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = byte_tokenizer()
    for seed, name in ((0, "model"), (1, "other")):
        size = TinyModel(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
        tiny_model(size, tokenizer, max_length=64, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    records = []
    for i in range(40):
        ids = torch.randint(97, 122, (3 + i * 7 % 20,), generator=torch.manual_seed(i)).tolist()
        labels = [-100, -100, *ids[2:]] if i % 2 else ids
        records.append({"id": i, "channel": "ab"[i % 2], "input_ids": ids, "labels": labels})
    write(folder / "data.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> Path:
    out = folder / "result.jsonl"
    arguments = (folder / "model", folder / "data.jsonl", "--output", out, "--batch-size", 3)
    code, said = invoke(*arguments)
    assert code == 0 and said.rstrip().endswith(str(out))
    return out


def test_numbers_are_those_of_the_model_one_record_at_a_time(folder: Path, result: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    data, lines = read(folder / "data.jsonl"), read(result)
    assert len(data) == len(lines)
    for record, line in zip(data, lines, strict=True):
        nll, tokens = line.pop("ref_nll"), line.pop("ref_tokens")
        assert line == record
        ids, labels = (torch.tensor([record[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad():
            mean = float(model(input_ids=ids, labels=labels).loss)
        assert tokens == sum(label != -100 for label in record["labels"][1:])
        assert nll / tokens == pytest.approx(mean, rel=1e-5)


def test_a_model_that_is_its_own_reference_has_no_excess(folder: Path, result: Path) -> None:
    """An HF run at learning rate 0, with the columns and with a table; and another model."""
    from transformers import AutoModelForCausalLM

    table = folder / "table.jsonl"
    code, _ = invoke(folder / "model", folder / "data.jsonl", "--output", table, "--id", "id")
    assert code == 0 and set(read(table)[0]) == {"id", "ref_nll", "ref_tokens"}

    def logs(name: str, data: Path, **config: Any) -> dict[str, float]:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(folder / name),
            args=TrainingArguments(
                output_dir=str(folder / "run"),
                learning_rate=0.0,
                logging_steps=10,
                max_steps=10,
                per_device_train_batch_size=4,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(read(data)),
            data_collator=DataCollatorForSeq2Seq(byte_tokenizer()),
        )
        metrics = ("loss", "excess_loss", "tokens")
        attach(trainer, MetricsConfig(metrics=metrics, live_table=False, **config))
        trainer.train()
        (found,) = [log for log in trainer.state.log_history if "a_tokens" in log]
        return found

    by_column = logs("model", result)
    by_table = logs("model", folder / "data.jsonl", reference=table)
    for found in (by_column, by_table):
        assert abs(found["a_excess_loss"]) < 1e-5 and abs(found["b_excess_loss"]) < 1e-5
    other = logs("other", result)
    for channel in "ab":
        nll, tokens = (
            sum(line[key] for line in read(result) if line["channel"] == channel)
            for key in ("ref_nll", "ref_tokens")
        )
        expected = other[f"{channel}_loss"] - nll / tokens
        assert other[f"{channel}_excess_loss"] == pytest.approx(expected, abs=1e-5)
        assert abs(expected) > 1e-3


def test_a_run_that_was_killed_goes_on(folder: Path, result: Path, tmp_path: Path) -> None:
    whole = result.read_text().splitlines(keepends=True)
    out = tmp_path / "half.jsonl"
    out.write_text("".join(whole[:17]) + whole[17][:30])
    code, said = invoke(folder / "model", folder / "data.jsonl", "--output", out)
    assert code == 0 and "17 records were there already" in said
    assert [line["id"] for line in read(out)] == list(range(40))
    for one, other in zip(read(out), read(result), strict=True):
        assert one["ref_nll"] == pytest.approx(other["ref_nll"], rel=1e-5)
    assert out.read_text().startswith("".join(whole[:17]))
    before = out.read_text()
    assert invoke(folder / "model", folder / "data.jsonl", "--output", out)[0] == 0
    assert out.read_text() == before


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *args: object) -> str:
    """What the command writes to stderr, which is a terminal."""
    ours, theirs = pty.openpty()
    with ThreadPoolExecutor(1) as threads, os.fdopen(ours, "rb", 0) as screen:
        seen = threads.submit(lambda: b"".join(iter(partial(read_from, screen), b"")))
        with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            patch.setenv("TERM", "xterm")
            app(["reference", *map(str, args)], standalone_mode=False)
        return seen.result(timeout=20).decode()


def read_from(screen: Any) -> bytes:
    try:
        found: bytes = screen.read(4096)
    except OSError:  # so Linux tells that nobody writes any more
        return b""
    return found


def test_a_terminal_shows_how_far_it_is(
    folder: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume; only where stderr is a terminal."""
    out = tmp_path / "half.jsonl"
    arguments = folder / "model", folder / "data.jsonl", "--output", out, "--batch-size", 3
    out.write_text("".join(result.read_text().splitlines(keepends=True)[:17]))
    shown = on_a_terminal(monkeypatch, *arguments)
    done = [int(count) for count in re.findall(r"(\d+)/40", shown)]
    assert "data.jsonl" in shown and done == sorted(done) and done[-1] == 40
    out.unlink()
    code, said = invoke(*arguments)
    assert code == 0 and "/40" not in said and "data.jsonl" not in said


def test_it_does_not_go_on_with_other_data_or_another_model(
    folder: Path, result: Path, tmp_path: Path
) -> None:
    data = folder / "data.jsonl"
    code, said = invoke(folder / "other", data, "--output", result)
    assert code == 2 and "it was made with another model" in said
    turned = write(tmp_path / "turned.jsonl", read(data)[::-1])
    code, said = invoke(folder / "model", turned, "--output", result)
    assert code == 2 and "was made from other records" in said
    code, said = invoke(folder / "model", data, "--output", data)
    assert code == 2 and "must be another file" in said


def test_text_and_messages_are_encoded_as_train_does(folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]
    data = write(tmp_path / "chat.jsonl", [{"text": "abc"}, {"messages": turns}])
    assert invoke(folder / "model", data, "--max-length", 50)[0] == 0
    text, chat = read(tmp_path / "chat.reference.jsonl")
    # The end of a text is learned, too, and so is the mark at the end of an answer.
    assert (text["ref_tokens"], chat["ref_tokens"]) == (3, 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "x"}, "odd.jsonl:1: expected a record with messages"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels and 2 tokens"),
        ({"input_ids": [1, 9_999]}, "odd.jsonl:1: token 9999"),
    ],
)
def test_data_that_cannot_be_used(
    folder: Path, tmp_path: Path, record: dict[str, Any], message: str
) -> None:
    code, said = invoke(folder / "model", write(tmp_path / "odd.jsonl", [record]))
    assert code == 2 and message in said


def test_a_model_that_is_none(folder: Path, tmp_path: Path) -> None:
    code, said = invoke(tmp_path / "absent", folder / "data.jsonl")
    assert code == 2 and "no model could be loaded" in said
    code, said = invoke(folder / "model", folder / "data.jsonl", "--dtype", "float3")
    assert code == 2 and "dtype must be one of torch" in said

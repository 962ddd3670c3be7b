"""docs/own_loop.md: its code runs, and gives the numbers of a plain computation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from hf_case_tools import HF
from hf_tools import VOCABULARY, PaddingCollator, make_records, tiny_model
from loop_tools import OwnModel, check, oracle, own_table, plain_oracle
from rank_cases import Case, RanksOf, case

from channel_metrics import ChannelMetrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own_loop.md"
TRAIN, EVAL = make_records(16), make_records(7, seed=1)
BLOCK = 8


def blocks(section: str) -> list[str]:
    """The code of a section of the page; "" is what comes before the first heading."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")
    (text,) = [part for part in parts[1:] if part.startswith(section)] if section else parts[:1]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(section: str, folder: Path, **names: Any) -> dict[str, Any]:
    """What the names of a section hold after its code. The model is not changed."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model(attention_dropout=0.0).save_pretrained(folder / "model")
    if dist.is_initialized():
        dist.barrier()  # rank 0 has written it
    names = {
        "model_path": folder / "model",
        "learning_rate": 0.0,
        "train_set": TRAIN,
        "eval_set": EVAL,
        "pad": PaddingCollator(),
        **names,
    }
    for block in blocks(section):
        exec(block, names)
    return names


def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, float]]:
    return map(eval, capsys.readouterr().out.splitlines())


def test_every_section_with_code_is_run() -> None:
    found = re.findall(r"\n## ([^\n]*)\n(?:(?!\n## ).)*?```python", PAGE.read_text(), re.DOTALL)
    assert [title.split()[0] for title in found] == [
        "Plain",
        "accelerate",
        "Blocks",
        "A",
        "Distillation",
    ]
    assert PAGE.read_text().count("```python") == sum(len(blocks(t)) for t in ("", *found))


def test_three_lines(tmp_path: Path) -> None:
    metrics, base = ChannelMetrics(), PaddingCollator()
    batch = metrics.collator(base)(TRAIN[:4])
    model = tiny_model(attention_dropout=0.0)
    names = run("", tmp_path, metrics=metrics, base=base, model=model, batch=batch, step=1)
    check(names["logs"], plain_oracle(TRAIN[:4]))
    assert "channels" in names["collate"](TRAIN[:4])


def test_plain_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("Plain PyTorch", tmp_path)
    first, evaluated, second, again = printed(capsys)
    check(first, plain_oracle(TRAIN[:8]))
    check(second, plain_oracle(TRAIN[8:]))
    check(evaluated, plain_oracle(EVAL, prefix="eval_"))
    assert again == evaluated


def test_a_loss_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = OwnModel()
    run("A loss that the loop computes itself", tmp_path, own_model=model)
    for logs in (found := list(printed(capsys))):
        check(logs, oracle(own_table(model, TRAIN), TRAIN))
    assert len(found) == 2


def test_distillation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(3).save_pretrained(tmp_path / "teacher")
    run("Distillation", tmp_path, teacher_path=tmp_path / "teacher")
    (logs,) = printed(capsys)
    check(logs, plain_oracle(TRAIN))


# ---- blocks that mix sources --------------------------------------------------------------------

TEXTS = [
    {"text": "first text", "channel": "web"},
    {"text": "code", "channel": "code"},
    {"text": "a second text of the web", "channel": "web"},
    {"text": "x = 1", "channel": "code"},
    {"text": "poem", "channel": "poems"},
]


def tokenizer(texts: list[str]) -> dict[str, list[list[int]]]:
    return {"input_ids": [[ord(char) % (VOCABULARY - 1) + 1 for char in text] for text in texts]}


def test_blocks_that_mix_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"train_texts": TEXTS, "tokenizer": tokenizer, "block_size": BLOCK}
    run("Blocks that mix sources", tmp_path, **names)
    (logs,) = printed(capsys)
    model = tiny_model(attention_dropout=0.0).double()
    chars = [(char, text["channel"]) for text in TEXTS for char in text["text"]]
    table = {}
    for start in range(0, len(chars) // BLOCK * BLOCK, BLOCK):
        block = chars[start : start + BLOCK]
        (ids,) = tokenizer(["".join(char for char, _ in block)])["input_ids"]
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(1, BLOCK):
            row, target = rows[position - 1], ids[position]
            # As if each token were a record of its own.
            seen = [(-row[target].item(), int(row.argmax()) == target)]
            table[start, position] = (block[position][1], seen)
    records = [{"input_ids": place} for place in table]
    check(logs, oracle(table, records))


# ---- accelerate ---------------------------------------------------------------------------------


def with_accelerate(folder: Path) -> Any:
    logged: list[Any] = []
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` says it
    with patch.object(Accelerator, "log", lambda _, values, step: logged.append(values)):
        run("accelerate", folder, checkpoint=folder / "checkpoint")
    if dist.is_initialized():
        dist.barrier()  # rank 0 has saved
    resumed = ChannelMetrics()
    resumed.resume(folder / "checkpoint")
    channels = sorted({record["channel"] for record in TRAIN})
    return {"logs": logged, "totals": {c: resumed.totals.of(c)["tokens_total"] for c in channels}}


@case(HF, ranks=1)
def alone(folder: Path) -> Any:
    return with_accelerate(folder)


@case(HF, ranks=2)
def together(folder: Path) -> Any:
    return with_accelerate(folder)


@pytest.mark.parametrize("case", [alone, together])
def test_accelerate(ranks_of: RanksOf, case: Case) -> None:
    all_tokens = {k: v for k, v in plain_oracle(TRAIN).items() if k.endswith("_tokens")}
    for rank in ranks_of(case):
        *windows, evaluated = rank["logs"]
        each = len(TRAIN) // len(windows)
        assert each == 8 * case.ranks
        for number, logs in enumerate(windows):
            wanted = plain_oracle(TRAIN[number * each : (number + 1) * each])
            check(without_totals(logs), without_share(wanted))
        check(without_totals(evaluated), without_share(plain_oracle(EVAL, prefix="eval_")))
        assert {f"{name}_tokens": count for name, count in rank["totals"].items()} == all_tokens


def without_totals(logs: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if not key.endswith("_total")}


def without_share(logs: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in logs.items() if not key.endswith("_share")}

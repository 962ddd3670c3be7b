"""What runs of Axolotl must log, by a forward of each sample alone, in float64."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from axolotl_tools import SIZE
from mixture_runs import NAMES, Expected, means
from transformers import Qwen2ForCausalLM

from channel_metrics.demo.tiny import byte_tokenizer

__all__ = ["of_sft", "of_texts", "records"]

EOS = byte_tokenizer().eos_token_id


@cache
def _model(folder: Path) -> Any:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def records(files: Path, name: str) -> list[dict[str, Any]]:
    """The records of a dataset."""
    lines = (files / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def of_sft(
    files: Path, field: str | None = None, seen: set[tuple[int, ...]] | None = None
) -> Expected:
    """Records with `segments`.

    field: the column that names the channel. seen: only records with these tokens.
    """
    found = []
    for name in NAMES:
        for record in records(files, name):
            asked, said = (list(part["text"].encode()) for part in record["segments"])
            if seen is None or (*asked, *said) in seen:
                found.append((record[field] if field else name, [*asked, *said], len(asked)))
    return _means(files, found)


def of_texts(files: Path, field: str | None = None) -> Expected:
    """Records with a `text`, which is cut into rows."""
    found = []
    for name in NAMES:
        for record in records(files, name):
            ids = [*record["text"].encode(), EOS] if record["text"] else []
            rows = [ids[start : start + SIZE] for start in range(0, len(ids), SIZE)]
            found += [(record[field] if field else name, row, 1) for row in rows]
    return _means(files, found)


def _means(files: Path, samples: Iterable[tuple[str, list[int], int]]) -> Expected:
    """samples: (channel, tokens, how many of them are the prompt)."""
    found = []
    for name, ids, prompt in samples:
        with torch.no_grad():
            logits = _model(files / "model")(input_ids=torch.tensor([ids])).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        counted = log_probs[prompt - 1 :]
        found.append((name, -float(counted.sum()), len(counted), 1))
    return means(found)

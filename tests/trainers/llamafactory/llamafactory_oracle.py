"""What runs of LLaMA-Factory must log, by a forward of each sample alone, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from mixture_runs import NAMES, Expected, means
from transformers import Qwen2ForCausalLM

from channel_metrics.demo.tiny import byte_tokenizer

EOS = byte_tokenizer().eos_token_id


@cache
def _model(folder: Path) -> Any:
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def records(files: Path, name: str) -> list[dict[str, Any]]:
    """The records of a dataset."""
    found: list[dict[str, Any]] = json.loads((files / f"{name}.json").read_text())
    return found


def log_probs(folder: Path, ids: list[int], places: list[int] | None = None) -> torch.Tensor:
    """The log probability of each token but the first. places: their position ids."""
    positions = torch.tensor([places or list(range(len(ids)))])
    with torch.no_grad():
        logits: torch.Tensor = _model(folder)(
            input_ids=torch.tensor([ids]),
            position_ids=positions,
            # With a mask, the model does not look for sequences in the position ids.
            attention_mask=torch.ones_like(positions),
        ).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def answer(folder: Path, asked: str, said: str) -> torch.Tensor:
    """The log probabilities of an answer. The template `empty` ends it with no token."""
    prompt = list(asked.encode())
    return log_probs(folder, [*prompt, *said.encode()])[len(prompt) - 1 :]


def of_sft(files: Path, field: str | None = None) -> Expected:
    """Stage sft. field: a column of the records that names the channel."""
    values: list[tuple[str, float, int, int]] = []
    for name in NAMES:
        for record in records(files, name):
            if record["turns"]:
                asked, said = (turn["value"] for turn in record["turns"])
                found = answer(files / "model", asked, said)
                values.append(
                    (record[field] if field else name, -float(found.sum()), len(found), 1)
                )
    return means(values)


def of_excess(files: Path) -> dict[str, float]:
    """Stage sft: {channel: excess loss}, over the records with a reference."""
    found = {}
    for name in NAMES:
        known = [record for record in records(files, name) if record["ref_nll"] is not None]
        losses = [answer(files / "model", *(t["value"] for t in r["turns"])) for r in known]
        nll = sum(-float(one.sum()) - r["ref_nll"] for one, r in zip(losses, known, strict=True))
        found[name] = nll / sum(len(one) for one in losses)
    return found


def of_packs(files: Path, size: int) -> Expected:
    """Stage sft with `packing`: the samples of a pack see those before them."""
    samples = []
    for name in NAMES:
        for record in records(files, name):
            if record["turns"]:
                asked, said = (list(turn["value"].encode()) for turn in record["turns"])
                samples.append((name, asked + said, len(asked)))
    values: list[tuple[str, float, int, int]] = []
    while samples:
        pack: list[Any] = []
        while fitting := [s for s in samples if sum(len(p[1]) for p in pack) + len(s[1]) <= size]:
            # The longest that fits; of several, the last.
            longest = max(enumerate(fitting), key=lambda pair: (len(pair[1][1]), pair[0]))[1]
            samples.pop(max(i for i, sample in enumerate(samples) if sample is longest))
            pack.append(longest)
        ids = [token for _, tokens, _ in pack for token in tokens]
        places = [place for _, tokens, _ in pack for place in range(len(tokens))]
        found, start = log_probs(files / "model", ids, places), 0
        for name, tokens, prompt in pack:
            answered = found[start + prompt - 1 : start + len(tokens) - 1]
            values.append((name, -float(answered.sum()), len(answered), 1))
            start += len(tokens)
    return means(values)


def of_texts(files: Path, size: int) -> Expected:
    """Stage pt without packing: each text is cut to `size` tokens."""
    values: list[tuple[str, float, int, int]] = []
    for name in NAMES:
        for record in records(files, name):
            ids = [*record["text"].encode(), EOS][:size]
            found = log_probs(files / "model", ids)
            values.append((f"{name}_text", -float(found.sum()), len(found), 1))
    return means(values)


def of_blocks(files: Path, size: int) -> Expected:
    """Stage pt with packing: all texts one after the other, cut into blocks."""
    texts = [(f"{n}_text", [*r["text"].encode(), EOS]) for n in NAMES for r in records(files, n)]
    ids = [token for _, tokens in texts for token in tokens]
    owner = [name for name, tokens in texts for _ in tokens]
    of_text = [number for number, (_, tokens) in enumerate(texts) for _ in tokens]
    values: list[tuple[str, float, int, int]] = []
    for start in range(0, len(ids) - size + 1, size):
        block = slice(start, start + size)
        found = log_probs(files / "model", ids[block])
        for name, value in zip(owner[block][1:], found.tolist(), strict=True):
            values.append((name, -value, 1, 0))
        values += [(texts[number][0], 0.0, 0, 1) for number in set(of_text[block])]
    return means(values)


def rewards(files: Path, record: dict[str, Any], beta: float = 0.1) -> Iterator[float]:
    """Of the chosen and of the rejected answer, against the model `other`."""
    for kind in ("chosen", "rejected"):
        asked, said = record["asked"][0]["value"], record[kind]["value"]
        policy, other = (answer(files / name, asked, said).sum() for name in ("model", "other"))
        yield beta * float(policy - other)


def dpo_loss(files: Path, record: dict[str, Any], ftx: float) -> float:
    """Of one pair. ftx: the weight of the mean loss of the chosen answer's tokens."""
    chosen, rejected = rewards(files, record)
    said = answer(files / "model", record["asked"][0]["value"], record["chosen"]["value"])
    return math.log1p(math.exp(rejected - chosen)) - ftx * float(said.mean())

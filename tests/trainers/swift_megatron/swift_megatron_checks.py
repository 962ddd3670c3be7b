"""What holds for every run of ms-swift's Megatron trainer: a loop over its tokens, and no harm."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from swift_files import CHANNELS
from swift_megatron_launch import Case, Pair, Runs


def seen_tokens(runs: Runs, case: Case, *, training: bool = True) -> list[list[Any]]:
    """Per step (or evaluation batch): the micro-batches of all ranks, as [names, tokens]."""
    per_rank = [
        [found[1:] for found in rank["tokens"] if found[0] is training] for rank in runs.ranks(case)
    ]
    counted = [batches for batches in per_rank if batches]
    num_steps = max(log["iteration"] for log in runs.logs(case)) if training else 1
    steps: list[list[Any]] = [[] for _ in range(num_steps)]
    for batches in counted:
        each = len(batches) // num_steps
        for index, batch in enumerate(batches):
            steps[index // each].append(batch)
    return steps


def naive(batches: list[Any], copies: int = 1) -> dict[str, dict[str, float]]:
    """{channel: {metric: value}} of micro-batches, by a loop over tokens.

    copies: how many ranks hold a part of the same sequences.
    """
    tokens: dict[str, list[Any]] = {}
    samples = Counter(str(name) for names, _ in batches for name in names)
    for _, rows in batches:
        for name, nll, optimised, right in rows:
            tokens.setdefault(str(name), []).append((nll, optimised, right))
    total = sum(map(len, tokens.values()))
    return {
        name: {
            "loss": math.fsum(nll for nll, _, _ in rows) / len(rows),
            "own": math.fsum(optimised for _, optimised, _ in rows) / len(rows),
            "token_acc": sum(right for _, _, right in rows) / len(rows),
            "ppl": math.exp(math.fsum(nll for nll, _, _ in rows) / len(rows)),
            "tokens": len(rows),
            "samples": samples[name] / copies,
            "share": len(rows) / total,
        }
        for name, rows in tokens.items()
    }


def check_against_naive(log: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> None:
    """All keys of channels in `log` are there, with the values of the loop; no others."""
    names = {None: "unlabeled"}
    wanted: dict[str, float] = {}
    for name, values in expected.items():
        for metric, value in values.items():
            ours = f"{names.get(None) if name == 'None' else name}_{metric}"
            wanted[f"{prefix}loss_{name}" if metric == "own" else prefix + ours] = value
    found = {key: value for key, value in log.items() if is_ours(key) and "total" not in key}
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if key.endswith(("tokens", "samples")):
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


def is_ours(key: str) -> bool:
    parts = key.removeprefix("eval_")
    names = (*CHANNELS, "unlabeled")
    return parts.startswith(("loss_", *(f"{name}_" for name in names)))


def check_training(runs: Runs, pair: Pair) -> None:
    """Weights, random numbers and what ms-swift logs are the same, bit for bit."""
    off, on = runs.ranks(pair.off), runs.ranks(pair.on)
    assert [rank["end"] for rank in on] == [rank["end"] for rank in off]
    assert len(off[0]["end"]) > 10
    for theirs, ours in zip(runs.logs(pair.off), runs.logs(pair.on), strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert ours.get(key) == theirs.get(key), key
        assert "loss" in theirs or "eval_loss" in theirs
        assert ours.get("eval_loss") == theirs.get("eval_loss")


def present(log: dict[str, Any]) -> list[str]:
    found = [name for name in CHANNELS if f"{name}_loss" in log]
    assert found
    return found

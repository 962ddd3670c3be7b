"""Logs of single samples, and orders of samples, are summed over tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from analysis.analysis_tools import (
    CHANNELS,
    Entry,
    make_history,
    series_of,
    write_jsonl,
)
from channel_metrics.analysis.readers.readings import Problems
from channel_metrics.analysis.readers.samples import read_sample_order
from channel_metrics.analysis.run import load_run


def sample_log(
    history: list[Entry], rng: random.Random
) -> tuple[list[Entry], dict[Any, list[Any]]]:
    """Lines of single samples, shuffled within 50 steps, and {(step, channel): its samples}."""
    lines: list[Entry] = []
    groups: dict[Any, list[Any]] = {}
    for entry in (entry for entry in history if "loss" in entry):
        for name in CHANNELS:
            samples = [(rng.random(), rng.randint(1, 50)) for _ in range(rng.randint(0, 3))]
            if samples:
                groups[entry["step"], name] = samples
            for loss, tokens in samples:
                line = {"step": entry["step"], "id": len(lines), "dataset": name}
                lines.append(line | {"loss": loss, "tokens": tokens})
    lines.sort(key=lambda line: line["step"] + rng.random() * 50)
    return lines, groups


def test_per_sample_logs_are_summed_over_tokens(tmp_path: Path) -> None:
    lines, groups = sample_log(make_history(200), random.Random(0))
    run = load_run(write_jsonl(tmp_path / "samples.jsonl", lines))
    for name in CHANNELS:
        expected = {step: of for (step, channel), of in groups.items() if channel == name}
        losses = {
            s: sum(loss * n for loss, n in of) / sum(n for _, n in of) for s, of in expected.items()
        }
        assert series_of(run, name, "loss") == pytest.approx(losses)
        assert series_of(run, name, "samples") == {s: len(of) for s, of in expected.items()}
        tokens = {s: sum(n for _, n in of) for s, of in expected.items()}
        assert series_of(run, name, "tokens") == tokens
    assert not run.problems.notes


def test_without_token_counts_the_losses_are_means_of_samples_and_that_is_said(
    tmp_path: Path,
) -> None:
    lines = [{"step": 1, "dataset": "a", "loss": x} for x in (1.0, 2.0)]
    run = load_run(write_jsonl(tmp_path / "samples.jsonl", lines))
    assert series_of(run, "a", "loss") == {1: 1.5}
    assert "averaged per sample" in run.problems.notes[0]
    assert not run.has("a", "tokens")


@pytest.mark.parametrize("as_list", [False, True])
def test_the_order_of_the_samples(tmp_path: Path, as_list: bool) -> None:
    data = [{"id": i, "channel": CHANNELS[i % 3], "tokens": 10 + i} for i in range(6)]
    order = ["0", "3", "1", "5", "0", "9"]
    path = tmp_path / "order"
    path.write_text(json.dumps(order) if as_list else "\n".join(order))
    problems = Problems()
    samples = write_jsonl(tmp_path / "data.jsonl", data)
    readings: list[Any] = list(read_sample_order(path, samples, 4, problems, lambda _: None))
    counts = {(s, k.channel): v for s, k, v in readings if k.metric == "samples"}
    assert counts == {
        (1, "bbu"): 2,
        (1, "rru"): 1,
        (1, "lvis"): 1,
        (2, "bbu"): 1,
        (2, "unlabeled"): 1,
    }
    tokens = {(s, k.channel): v for s, k, v in readings if k.metric == "tokens"}
    assert tokens == {(1, "bbu"): 23, (1, "rru"): 11, (1, "lvis"): 15}
    assert problems.count == 1

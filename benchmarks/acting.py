"""The CPU time that alerts and outliers take, per window and per micro-batch, and what they keep.

A window of alerts: 8 tokens of each channel, one micro-batch; all kinds, with a budget. What is
kept is measured as the JSON of a checkpoint, after more and more windows. A window of outliers:
32 micro-batches of 8 sequences of 512 tokens; 5 of each kind, with ids and 64 tokens of text.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks.timing import compare, one_thread
from channel_metrics import ChannelMetrics, MetricsConfig, MicroBatch
from channel_metrics.core.extremes import id_words

__all__ = ["alerts", "kept", "outliers"]

_CHANNELS = (10, 100, 1000)
_WINDOWS = (100, 1000, 10_000)
_BATCHES, _SEQUENCES, _TOKENS = 32, 8, 512


class _Losses:
    """Micro-batches of 8 tokens per channel, around 2 nats."""

    def __init__(self, names: list[str]) -> None:
        self._names, self._draw = names, random.Random(0)

    def next(self) -> MicroBatch:
        losses = [[2 + 0.02 * self._draw.gauss(0, 1)] * 8 for _ in self._names]
        return MicroBatch(token_losses=torch.tensor(losses), channels=self._names)


def _names(channels: int) -> list[str]:
    return [f"channel{number}" for number in range(channels)]


def _session(channels: int, folder: Path, *, watches: bool) -> ChannelMetrics:
    names = _names(channels)
    budget = {"ratios": dict.fromkeys(names, 1), "records": dict.fromkeys(names, 1e12)}
    settings: dict[str, Any] = {"alerts": {"file": str(folder / "alerts.jsonl")}} if watches else {}
    return ChannelMetrics(MetricsConfig(channels=tuple(names), budget=budget, **settings))


def alerts(num_rounds: int = 200) -> list[dict[str, Any]]:
    """Microseconds per window without and with alerts, for more and more channels."""
    rows = []
    for channels in _CHANNELS:
        with tempfile.TemporaryDirectory() as folder, one_thread():
            calls = {}
            for watches in (False, True):
                metrics = _session(channels, Path(folder), watches=watches)
                losses, steps = _Losses(_names(channels)), count(1)
                calls[str(watches)] = partial(_window, metrics, losses, steps)
            off, on = compare(calls, num_rounds=num_rounds, num_warmup=20, clock=process_time)
        rows.append({"channels": channels, "off_us": off.median_us, "on_us": on.median_us})
    return rows


def _window(metrics: ChannelMetrics, losses: _Losses, steps: count[int]) -> None:
    metrics.count(losses.next())
    metrics.close(next(steps))


def kept(channels: int = 10) -> list[dict[str, int]]:
    """Bytes of the alerts in a checkpoint, per channel, after so many windows."""
    rows: list[dict[str, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        metrics, losses = _session(channels, Path(folder), watches=True), _Losses(_names(channels))
        for step in range(1, _WINDOWS[-1] + 1):
            metrics.count(losses.next())
            metrics.close(step)
            if step in _WINDOWS:
                size = len(json.dumps(metrics.totals.notes["alerts"]))
                rows.append({"windows": step, "bytes": size // channels})
    return rows


def outliers(num_rounds: int = 20) -> list[dict[str, Any]]:
    """Microseconds without and with outliers: per micro-batch, and for the end of a window."""
    rows = []
    for channels in _CHANNELS:
        with tempfile.TemporaryDirectory() as folder, one_thread():
            counting: dict[str, Any] = {}
            closing = {}
            for wanted in ({}, {"folder": folder}):
                config = MetricsConfig(channels=tuple(_names(channels)), outliers=wanted)
                metrics, batches = ChannelMetrics(config), _batches(channels)
                counting[str(bool(wanted))] = partial(_count, metrics, batches)
                closing[str(bool(wanted))] = _closing_us(metrics, batches, num_rounds)
            off, on = compare(counting, num_rounds=num_rounds, clock=process_time)
            lines = (Path(folder) / "rank0.jsonl").read_text().count("\n") // num_rounds
        counted = {"off_us": off.median_us / _BATCHES, "on_us": on.median_us / _BATCHES}
        closed = {"close_off_us": closing["False"], "close_on_us": closing["True"]}
        rows.append({"channels": channels, "lines": lines, **counted, **closed})
    return rows


def _batches(channels: int) -> list[MicroBatch]:
    draw, names = random.Random(0), _names(channels)
    made = torch.Generator().manual_seed(0)
    shape = (_SEQUENCES, _TOKENS)
    return [
        MicroBatch(
            token_losses=torch.rand(shape, generator=made),
            labels=torch.randint(50_000, shape, generator=made),
            channels=[draw.choice(names) for _ in range(_SEQUENCES)],
            record_ids=torch.tensor([id_words(f"{n}-{s}") for s in range(_SEQUENCES)]),
        )
        for n in range(_BATCHES)
    ]


def _count(metrics: ChannelMetrics, batches: list[MicroBatch]) -> None:
    for batch in batches:
        metrics.count(batch)


def _closing_us(metrics: ChannelMetrics, batches: list[MicroBatch], num_rounds: int) -> float:
    """The end of a window of all the batches."""
    taken = []
    for step in range(1, num_rounds + 1):
        _count(metrics, batches)
        begin = process_time()
        metrics.close(step)
        taken.append(process_time() - begin)
    return round(median(taken) * 1e6, 1)

"""Logs for the tests of the analysis: one history in memory, written by each real writer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.readings import Problems
from channel_metrics.analysis.run import Run, run_from_readings

CHANNELS = ("bbu", "rru", "lvis")
HOSTILE = '<img src=x onerror="window.hacked=1">'

Entry = dict[str, Any]


def make_history(steps: int = 40, channels: Sequence[str] = CHANNELS, seed: int = 0) -> list[Entry]:
    """A log history: falling losses, a mix that varies, the exact loss of the whole."""
    rng = random.Random(seed)
    history = []
    for step in range(1, steps + 1):
        entry: Entry = {"step": step, "grad_norm": rng.random()}
        tokens = {name: rng.randint(0, 400) for name in channels}
        tokens[channels[0]] += 1
        nll = 0.0
        for place, name in enumerate(channels):
            if tokens[name]:
                loss = 1 + place / len(channels) + 3 * math.exp(-step / 10) + rng.gauss(0, 0.01)
                nll += loss * tokens[name]
                entry[f"{name}_loss"] = loss
                entry[f"{name}_token_acc"] = 1 / (1 + loss)
                entry[f"{name}_tokens"] = tokens[name]
                entry[f"{name}_share"] = tokens[name] / sum(tokens.values())
        entry["loss"] = nll / sum(tokens.values())
        history.append(entry)
        if step % 20 == 0:
            losses = {f"eval_{name}_loss": 2.0 - step / 100 for name in channels}
            history.append({"step": step, "eval_loss": 2.0 - step / 100, **losses})
    return history


def write_jsonl(path: Path, entries: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def run_of(history: Iterable[Mapping[str, Any]], name: str = "run", **more: Any) -> Run:
    """A `Run` straight from a history."""
    readings = [
        (entry["step"], key, float(value))
        for entry in history
        for key, value in entry.items()
        if key != "step"
    ]
    return run_from_readings(readings, name=name, origin="memory", problems=Problems(), **more)


def expected_series(history: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """{step: value} of one key of a history."""
    return {entry["step"]: entry[key] for entry in history if key in entry}


def series_of(run: Run, channel: str, metric: str, split: str = "train") -> dict[int, float]:
    """{step: value} of one series of a run."""
    steps, values = run.series(channel, metric, split)
    return dict(zip(steps.tolist(), values.tolist(), strict=True))


def log_key(key: Key) -> str:
    """The key of a history that means `key`."""
    prefix = "" if key.split == "train" else f"{key.split}_"
    return prefix + (f"{key.channel}_{key.metric}" if key.channel else key.metric)

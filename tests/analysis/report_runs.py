"""Runs for the tests of the report: many channels, long, with gaps, with hostile names."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from analysis.analysis_tools import HOSTILE, make_history, run_of
from channel_metrics.analysis.run import Run

FOUR = ("bbu", "rru", "lvis", "lang_chat")
HOSTILE_NAMES = (
    HOSTILE,
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "\"quotes' & [brackets] {{ 7*7 }} {% raw %}",
    "\u202eright\u2066to-left \u05e9\u05dc\u05d5\u05dd",
    "__proto__",
    "constructor",
    "very long " * 400,
    "line\nbreak\u2028separator\x00nul",
    "$\\frac{1}{$",
    "_hidden",
    "javascript:alert(1)",
    "\ud800 lone",
    "   ",
)


def run_with(channels: Sequence[str], *, steps: int = 40, name: str = "run", seed: int = 0) -> Run:
    """A run whose channels fall to different losses; keys are built so that every name is safe."""
    rng = random.Random(seed)
    places = range(len(channels))
    history = []
    for step in range(1, steps + 1):
        entry: dict[str, float] = {"step": step}
        tokens = [rng.randint(50, 400 + 2000 // (place + 1)) for place in places]
        nll = 0.0
        for place, count in enumerate(tokens):
            floor = 0.3 + 2 * ((place * 7) % len(channels)) / len(channels)
            loss = floor + 3 * math.exp(-8 * step / steps) + rng.gauss(0, 0.03)
            nll += loss * count
            key = f"c{place}x"
            entry |= {f"{key}_loss": loss, f"{key}_token_acc": math.exp(-loss)}
            entry |= {f"{key}_tokens": count, f"{key}_samples": count // 50 + 1}
            entry[f"{key}_share"] = count / sum(tokens)
        entry["loss"] = nll / sum(tokens)
        history.append(entry)
        if step % (steps // 4) == 0:
            losses = {f"eval_c{p}x_loss": entry[f"c{p}x_loss"] * 1.1 for p in places}
            history.append({"step": step, "eval_loss": entry["loss"] * 1.1, **losses})
    return renamed(run_of(history, name=name), channels)


def renamed(run: Run, channels: Sequence[str]) -> Run:
    """The run with its channels c0x, c1x, ... called by other names."""
    from dataclasses import replace

    names = {f"c{place}x": name for place, name in enumerate(channels)}
    meanings = {
        key: means._replace(channel=names.get(means.channel, means.channel))
        for key, means in run.meanings.items()
    }
    return replace(run, meanings=meanings)


def troubled_run(steps: int = 60) -> Run:
    """`fine` falls, `worse` turns up half way, `starved` is missing for a third of the run."""
    rng = random.Random(1)
    history = []
    for step in range(1, steps + 1):
        part = step / steps
        losses = {"fine": 3 - 2.5 * part, "worse": 2 - 2 * min(part, 1 - part) * 1.5}
        if not 0.3 < part < 0.65:
            losses["starved"] = 2.0 - part
        entry: dict[str, float] = {"step": step}
        tokens = {name: 3000 if name == "fine" else 400 for name in losses}
        for name, loss in losses.items():
            entry[f"{name}_loss"] = loss + rng.gauss(0, 0.01)
            entry[f"{name}_tokens"] = tokens[name]
            entry[f"{name}_samples"] = tokens[name] // 100
            entry[f"{name}_share"] = tokens[name] / sum(tokens.values())
        whole = sum(entry[f"{name}_loss"] * tokens[name] for name in losses)
        entry["loss"] = whole / sum(tokens.values())
        if step in (7, 8):
            entry["worse_nonfinite"] = 3
        history.append(entry)
    return run_of(history, name="troubled", ratios={"fine": 0.5, "worse": 0.25, "starved": 0.25})


def resumed_run(branches: Sequence[tuple[int, int]] = ((1, 30), (21, 38), (36, 60))) -> Run:
    """A run of several branches, each with its first and last step."""
    history = [
        entry
        for seed, (first, last) in enumerate(branches)
        for entry in make_history(last, seed=seed)
        if entry["step"] >= first
    ]
    return run_of(history, name="resumed")


def rich_run(name: str = "rich", seed: int = 0, steps: int = 160) -> Run:
    """Epochs, a clock, intervals, an alert and series of the trainer's own, with a known plan."""
    rng = random.Random(seed)
    history = []
    for step in range(1, steps + 1):
        entry: dict[str, float] = {"step": step, "epoch": step / 40, "_runtime": 100 + 7 * step}
        entry |= {"grad_norm": 1 + rng.random(), "learning_rate": 1e-4 / step}
        tokens = {"a": rng.randint(200, 400), "b": rng.randint(50, 150)}
        for place, (channel, count) in enumerate(tokens.items()):
            loss = 1 + place + 2 * math.exp(-step / 30) + rng.gauss(0, 0.05)
            entry |= {f"{channel}_loss": loss, f"{channel}_tokens": count}
            entry |= {f"{channel}_loss_low": loss - 0.1, f"{channel}_loss_high": loss + 0.1}
            entry[f"{channel}_samples"] = count // 10
        whole = sum(entry[f"{channel}_loss"] * count for channel, count in tokens.items())
        entry["loss"] = whole / sum(tokens.values())
        if step == 50:
            entry["alert_rising"] = 1
        history.append(entry)
        if step % 40 == 0:
            history.append({"step": step, "eval_loss": 2.0, "eval_a_loss": 1.5, "eval_b_loss": 2.5})
    return run_of(history, name=name, ratios={"a": 3, "b": 1})

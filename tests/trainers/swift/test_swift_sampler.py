"""A `MixedStream` in ms-swift, whose data are prepared by its own pipeline."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT
from rank_cases import Case, RanksOf, case
from swift_files import CHANNELS, given, ranks_given
from swift_tools import SWIFT, needs_swift

from channel_metrics import MetricsConfig, MixedStream

pytestmark = needs_swift

ROWS, STEPS = 4, 8
# Two workers are two batches ahead each.
LAG = 2 * 2 * ROWS
SAMPLER: dict[str, Any] = {
    "start": dict.fromkeys(CHANNELS, 1),
    "rule": "test_swift_sampler:by_step",
}
CONFIG = MetricsConfig(channels=CHANNELS, metrics=("loss", "samples"), sampler=SAMPLER)


def by_step(window: Any, weights: dict[str, float]) -> dict[str, float]:
    return {"bbu": 1.0, "rru": 2.0 + window.step, "lvis": 1.0, "lang_chat": weights["bbu"]}


def trained(arguments: dict[str, Any], lag: int) -> Any:
    """By the class in docs/sampler.md."""
    import channel_metrics.patches.ms_swift as patch

    (block,) = [
        block
        for block in (ROOT / "docs/sampler.md").read_text().split("```python\n")[1:]
        if "SwiftSft" in block
    ]
    patch.revert()
    patch.apply(CONFIG)
    names: dict[str, Any] = {"LAG": lag}
    try:
        exec(block.split("```")[0], names)
        pipeline = names["Mixed"](names["SftArguments"](**arguments))
        log_history = pipeline.main()["log_history"]
    finally:
        patch.revert()
    ends = ("_weight", "_samples")
    logs = [entry for entry in log_history if "loss" in entry]
    sizes = {name: len(part) for name, part in pipeline.stream.sources.items()}
    return [{k: v for k, v in e.items() if k.endswith(ends)} for e in logs], sizes


OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "enable_channel_loss": False,
}


@case(SWIFT, ranks=1)
def alone(folder: Path) -> Any:
    return trained(given(folder, **OPTIONS), 0)


@case(SWIFT, ranks=1)
def with_workers(folder: Path) -> Any:
    return trained(given(folder, **OPTIONS, dataloader_num_workers=2), LAG)


@case(SWIFT, ranks=2)
def on_ranks(folder: Path) -> Any:
    return trained(ranks_given(folder, **OPTIONS), 0)


@case(SWIFT, ranks=2)
def on_ranks_with_workers(folder: Path) -> Any:
    return trained(ranks_given(folder, **OPTIONS, dataloader_num_workers=2), 2 * LAG)


@pytest.mark.parametrize(
    ("of", "ranks", "lag"),
    [
        (alone, 1, 0),
        (with_workers, 1, LAG),
        (on_ranks, 2, 0),
        (on_ranks_with_workers, 2, 2 * LAG),
    ],
)
def test_the_weights_are_followed(ranks_of: RanksOf, of: Case, ranks: int, lag: int) -> None:
    (logs, sizes), *others = ranks_of(of)
    assert all(other[0] == logs for other in others) and len(logs) == STEPS
    per_step = ROWS * ranks
    # In the order in which ms-swift has met the channels.
    made = MixedStream({name: [{}] * size for name, size in sizes.items()}, batch_size=per_step)
    weights = dict.fromkeys(sizes, 0.25)
    entries = [(0, [*weights.values()])]
    for step, log in enumerate(logs, start=1):
        scores = {"bbu": 1.0, "rru": 2.0 + step, "lvis": 1.0, "lang_chat": weights["bbu"]}
        weights = {name: scores[name] / sum(scores.values()) for name in sizes}
        assert sum(log.get(f"{name}_samples", 0) for name in CHANNELS) == per_step
        entries.append((step * per_step + lag, [*weights.values()]))
    made.plan.begin(entries, 0, [0] * len(CHANNELS))
    drawn = iter(made)
    for log in logs:
        counts = Counter(record["channel"] for record in islice(drawn, per_step))
        assert {n: counts[n] for n in CHANNELS} == {n: log.get(f"{n}_samples", 0) for n in CHANNELS}
    assert logs[-1]["rru_weight"] > 0.5

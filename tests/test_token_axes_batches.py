"""Positions and lengths where batches come from a collator: pads, packs, runs of one channel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collator_tools import left, padded
from reference import Batch, reference_token_axis
from session_tools import new
from transformers import DataCollatorWithFlattening

from channel_metrics.observing import observe

AXES = {"position": {"by": "position"}, "length": {"by": "length"}}
METRICS = ("loss", "tokens", "share")
Record = dict[str, Any]


def record(channel: Any, *ids: int, prompt: int = 1) -> Record:
    """The loss of a token is its id."""
    labels = [-100] * prompt + list(ids[prompt:])
    return {"input_ids": list(ids), "labels": labels, "channel": channel}


RECORDS = [
    record("a", 1, 2, 3),
    record("b", 4, 5, 6, 7, 8, 9, prompt=3),
    record("a", 10, 11),
    record("b", 12, 13, 14, 15, 16),
]
IN_RUNS = [
    record(["a", "a", "b", "b", "b", "a"], 1, 2, 3, 4, 5, 6),
    record(["b", "a", "a", "b", "b"], 7, 8, 9, 10, 11),
]


def check(window: Any, records: list[Record]) -> None:
    counted = [
        Batch(
            [float(token) for token in one["input_ids"]],
            ["all"],
            [0, len(one["input_ids"])],
            loss_mask=[float(label != -100) for label in one["labels"]],
        )
        for one in records
    ]
    for axis in AXES:
        wanted = reference_token_axis(counted, axis)
        assert window.axes[axis].keys() == wanted.keys()
        for label, values in window.axes[axis].items():
            assert values == pytest.approx({name: wanted[label][name] for name in METRICS})


def count(metrics: Any, batch: Any, **more: Any) -> None:
    with observe(metrics, torch.nn.Module(), batch, **more) as seen:
        seen.token_losses(batch["input_ids"].roll(-1, dims=-1).float())


@pytest.mark.parametrize(
    ("base", "records"),
    [
        (padded, RECORDS),
        (left, RECORDS),
        (DataCollatorWithFlattening(return_tensors="pt"), RECORDS),
        (padded, IN_RUNS),
        (left, IN_RUNS),
    ],
    ids=["padded", "left", "flat", "runs", "runs-left"],
)
def test_every_layout_gives_the_same_places(base: Any, records: list[Record]) -> None:
    metrics = new(metrics=METRICS, axes=AXES)
    collate = metrics.collator(base)
    for start in range(0, len(records), 2):
        batch = collate(records[start : start + 2])
        count(metrics, batch)
        assert not any(key.startswith("channel") for key in batch)
    check(metrics.close(1), records)


@pytest.mark.parametrize("base", [padded, left, DataCollatorWithFlattening(return_tensors="pt")])
def test_records_that_are_repeated_are_left_out(base: Any) -> None:
    metrics = new(metrics=METRICS, axes=AXES)
    with metrics.evaluation("eval", 1) as found:
        count(metrics, metrics.collator(base)(RECORDS), real=(3, 4))
    check(found.window, RECORDS[:3])


def test_records_in_another_order() -> None:
    def shortest_first(features: list[Record]) -> Any:
        return left(sorted(features, key=lambda one: len(one["input_ids"])))

    metrics = new(metrics=METRICS, axes=AXES)
    with metrics.evaluation("eval", 1) as found:
        count(metrics, metrics.collator(shortest_first)(RECORDS), real=(3, 4))
    check(found.window, RECORDS[:3])

"""Records with several labels, over micro-batches, windows and ranks, against the naive loop."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from reference_axes import (
    Record,
    reference_axis,
    reference_objectives,
    reference_tree,
    reference_tree_means,
)
from session_tools import new

from channel_metrics import ChannelMetrics
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.windows import Window

LOGGED = ("loss", "tokens", "samples", "share", "loss_se", "loss_low", "loss_high")
PERCENTILES = ("loss_p10", "loss_p50", "loss_p90")
OBJECTIVES = ("macro_loss", "worst_loss", "weighted_loss_of_channels")
LEVELS, WEIGHTS = 2, {"a": 2.0, "b/c": 1.0}
SETTINGS: dict[str, Any] = {
    "axes": {"lang": "lang", "topic": "topics"},
    "cross": [["channel", "topic"], ["lang", "topic"]],
    "tree": LEVELS,
    "channel_weights": WEIGHTS,
    "metrics": (*LOGGED, *PERCENTILES, *OBJECTIVES),
}
NUM_WINDOWS, NUM_RANKS, NUM_BATCHES = 2, 3, 2


@dataclass(frozen=True)
class Simulated(Ranks):
    """One of several ranks that are threads of this process."""

    number: int = 0
    vectors: list[torch.Tensor] = field(default_factory=list)
    barrier: Barrier = field(default_factory=lambda: Barrier(1))

    @property
    def is_one(self) -> bool:
        return False

    @property
    def rank(self) -> int:
        return self.number

    @property
    def size(self) -> int:
        return self.barrier.parties

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        self.vectors[self.number] = values
        self.barrier.wait(timeout=20)
        total = torch.stack(self.vectors).sum(0)
        self.barrier.wait(timeout=20)
        return total


def sessions() -> list[ChannelMetrics]:
    vectors, barrier = [torch.empty(0)] * NUM_RANKS, Barrier(NUM_RANKS)
    ranks = [Simulated(number=n, vectors=vectors, barrier=barrier) for n in range(NUM_RANKS)]
    return [new(ranks=one, **SETTINGS) for one in ranks]


def count(metrics: ChannelMetrics, records: Sequence[Record]) -> None:
    """One padded micro-batch, as a collator makes it. The first token of a record has no loss."""
    length = 2 + max(len(record.losses) for record in records)

    def base(features: list[Any]) -> dict[str, Any]:
        labels = torch.full((len(features), length), -100)
        for row, feature in zip(labels, features, strict=True):
            row[: 1 + feature["size"]] = 1
        return {"input_ids": torch.ones_like(labels), "labels": labels}

    given = [
        {
            "channel": record.channel,
            "lang": next(iter(record.labels["lang"]), None),
            "topics": list(record.labels["topic"]),
            "size": len(record.losses),
        }
        for record in records
    ]
    losses = torch.zeros(len(records), length - 1)
    for row, record in zip(losses, records, strict=True):
        row[: len(record.losses)] = torch.tensor(record.losses)
    with metrics.observe(torch.nn.Module(), metrics.collator(base)(given)) as seen:
        seen.token_losses(losses)


def close_all(metrics: Sequence[ChannelMetrics], step: int) -> Window:
    """The window of all ranks, which is the same on each of them."""
    with ThreadPoolExecutor(len(metrics)) as threads:
        windows: list[Window] = [*threads.map(lambda one: one.close(step), metrics)]
    assert all(window == windows[0] for window in windows)
    return windows[0]


def check(window: Window, records: Sequence[Record]) -> None:
    close_to(window.values, reference_axis(records, "channel"))
    wanted = {
        "lang": reference_axis(records, "lang"),
        "topic": reference_axis(records, "topic"),
        "channel.topic": reference_axis(records, "channel", "topic"),
        "lang.topic": reference_axis(records, "lang", "topic"),
        "tree": reference_tree(records, LEVELS),
    }
    for axis, values in wanted.items():
        close_to(window.axes.get(axis, {}), values)
    means = {group: of["loss"] for group, of in window.axes.get("tree_mean", {}).items()}
    assert means == pytest.approx(reference_tree_means(records, LEVELS))
    found = {name: window.logs[name] for name in OBJECTIVES if name in window.logs}
    assert found == pytest.approx(reference_objectives(records, WEIGHTS))


def close_to(found: Any, wanted: dict[str, dict[str, float]]) -> None:
    assert found.keys() == wanted.keys()
    for label, values in wanted.items():
        # A variance near 0 is a difference of sums of squares. Half a bin is less than 4.5 %.
        logged = {n: pytest.approx(v, 1e-9, 1e-5) for n, v in values.items() if n in LOGGED}
        logged |= {n: pytest.approx(v, 0.045) for n, v in values.items() if n in PERCENTILES}
        assert found[label] == logged, label


RECORDS = st.builds(
    Record,
    channel=st.sampled_from(["a", "b/c", "b/d/e", "b/d/f/x", "g/h", None]),
    losses=st.lists(st.floats(0, 8, width=32, allow_subnormal=False), max_size=3),
    labels=st.fixed_dictionaries(
        {
            "lang": st.lists(st.sampled_from(["en", "de"]), max_size=1),
            "topic": st.lists(st.sampled_from(["math", "code", "web"]), max_size=3),
        }
    ),
)
# The window, the rank and the micro-batch of a record.
PLACES = st.tuples(
    st.integers(0, NUM_WINDOWS - 1), st.integers(0, NUM_RANKS - 1), st.integers(0, NUM_BATCHES - 1)
)


@given(st.lists(st.tuples(RECORDS, PLACES), min_size=1, max_size=12))
@example(
    [
        (Record("a", [1.0, 3.0], {"lang": ["en"], "topic": ["math", "code"]}), (0, 0, 0)),
        (Record("b/d/e", [5.0], {"lang": [], "topic": ["code"]}), (0, 1, 0)),
        (Record("b/c", [2.0], {"lang": ["de"], "topic": []}), (0, 1, 1)),
        (Record(None, [4.0], {"lang": ["de"], "topic": ["math", "math"]}), (1, 2, 0)),
    ]
)
def test_labels_are_those_of_the_naive_loop(placed: list[tuple[Record, Any]]) -> None:
    """However the records are split, and whichever rank meets a label first."""
    metrics = sessions()
    for window in range(NUM_WINDOWS):
        here = [(record, place[1:]) for record, place in placed if place[0] == window]
        for split in sorted({place for _, place in here}):
            count(metrics[split[0]], [record for record, place in here if place == split])
        check(close_all(metrics, window + 1), [record for record, _ in here])


def test_the_labels_of_the_loop_by_hand() -> None:
    """What the naive loop itself says, of two records that overlap on one axis."""
    records = [
        Record("b/c", [1.0, 3.0], {"topic": ["math", "code"]}),
        Record("b/d", [5.0], {"topic": ["code"]}),
        Record(None, [], {}),
    ]
    topics = reference_axis(records, "topic")
    assert {name: (v["loss"], v["share"], v["samples"]) for name, v in topics.items()} == {
        "math": (2.0, 2 / 3, 1), "code": (3.0, 1.0, 2),
    }  # fmt: skip
    assert reference_axis(records, "channel", "topic").keys() == {
        "b/c.math", "b/c.code", "b/d.code",
    }  # fmt: skip
    assert reference_tree(records, 1)["b"]["loss"] == 3.0
    assert reference_tree_means(records, 1) == {"b": 3.5}
    assert reference_objectives(records, {"b/c": 3, "b/d": 1}) == {
        "macro_loss": 3.5, "worst_loss": 5.0, "weighted_loss_of_channels": 2.75,
    }  # fmt: skip

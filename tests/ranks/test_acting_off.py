"""What acts on windows costs nothing when it is off; when on, no operator and no all-reduce more.

Outliers alone add operators, because they are kept on the device: see tests/test_outliers.py.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

from operators import operators_of
from rank_cases import TORCH, RanksOf, case
from session_tools import batch, new
from sync_tools import CountedCollectives

from channel_metrics.data.mixed_stream import MixedStream
from channel_metrics.session import ChannelMetrics

NAMES = ("a", "b")
COUNTS = (("a", 2, 1.0), ("b", 3, 2.0), (None, 1, 3.0))


def everything(folder: Path) -> dict[str, Any]:
    """All settings but outliers."""
    return {
        "stream": str(folder / "windows.jsonl"),
        "alerts": {"to": ["logger"]},
        "budget": {"ratios": {"a": 1, "b": 1}, "records": {"a": 9}},
        "stop_at": {"a_tokens": 1e9},
        "stop_when": {"channel": "a", "metric": "loss", "patience": 99},
        "sampler": {"start": {"a": 1, "b": 1}, "rule": "loss"},
    }


def session(**settings: Any) -> ChannelMetrics:
    metrics = new(*NAMES, metrics=("loss", "samples"), **settings)
    if metrics.sampler is not None:
        stream = MixedStream({name: [{}] for name in NAMES}, lag=10**6, batch_size=10**6)
        stream.follow(metrics)
    return metrics


def window(metrics: ChannelMetrics, step: int = 1) -> dict[str, float]:
    metrics.count(batch(*COUNTS))
    return dict(metrics.close(step).logs)


def test_nothing_is_there_when_nothing_is_set(tmp_path: Path) -> None:
    threads, off = threading.active_count(), session()
    assert off.on_window == off._adding == []
    assert off.sampler is None and off._riders() == ()
    assert getattr(off._train.table, "extremes", "unknown") is None
    assert set(window(off)) == {"a_loss", "b_loss", "unlabeled_loss",
                                "a_samples", "b_samples", "unlabeled_samples"}  # fmt: skip
    assert not off.totals.notes and threading.active_count() == threads
    on = session(**everything(tmp_path))
    assert len(on.on_window) == 5 and len(on._adding) == 2 and len(on._riders()) == 1


def test_no_operator_more(tmp_path: Path) -> None:
    """Neither when nothing is set, nor by what acts on windows. A sampler writes its weights."""
    found = []
    for settings in ({}, everything(tmp_path)):
        settings.pop("sampler", None)
        metrics = session(**settings)
        window(metrics)
        found.append(operators_of(partial(window, metrics)))
    off, on = found
    assert len(off) > 5 and on == off


@case(TORCH, ranks=2)
def on_two_ranks(folder: Path) -> Any:
    collectives = CountedCollectives()
    outliers = {"outliers": {"folder": str(folder / "outliers")}}
    found: list[list[dict[str, int]]] = []
    for settings in ({}, everything(folder) | outliers):
        metrics = session(**settings)
        collectives.take()
        found.append([])
        for step in (1, 2, 3):
            window(metrics, step)
            found[-1].append(collectives.take())
    return found


def test_no_all_reduce_more(ranks_of: RanksOf) -> None:
    for off, on in ranks_of(on_two_ranks):
        assert on == off and off[2] == {"all_reduce": 1}

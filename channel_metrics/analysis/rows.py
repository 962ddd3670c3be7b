"""The final table of a run: one row for each channel, and one for the whole run."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.summary import ChannelRow, part_of

if TYPE_CHECKING:
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["final_rows", "loss_metric", "total_of", "totals_at", "whole_row"]


def final_rows(run: Run) -> list[ChannelRow]:
    """The final table, by channel; values that the log does not have are None.

    Channels that are only evaluated come last, with the values of their evaluations.
    """
    trained = run.channels("train")
    tokens = {name: total_of(run, name, "tokens") for name in trained}
    samples = {name: total_of(run, name, "samples") for name in trained}
    rows = []
    for name in trained:
        # The labels of an axis need not add up to the whole run.
        share = None if run.axis else part_of(tokens, name)
        rows.append(
            _row(
                run,
                name,
                "train",
                tokens=tokens[name],
                share=_mean(_finite(run.series(name, "share")[1])) if share is None else share,
                record_share=part_of(samples, name),
            )
        )
    return rows + _evaluated_rows(run, trained)


def whole_row(run: Run) -> ChannelRow:
    """The same values of the whole run."""
    counts = [total_of(run, name, "tokens") for name in run.channels("train")]
    known = [count for count in counts if count is not None and not run.axis]
    return _row(run, GLOBAL, "train", tokens=sum(known) if known else None)


def loss_metric(run: Run, channel: str, split: str = "train") -> str | None:
    """The name of a channel's loss: measured, else estimated; None if it has none."""
    return next((m for m in ("loss", "loss_estimate") if run.has(channel, m, split)), None)


def totals_at(run: Run, channel: str, metric: str, steps: Steps) -> Values | None:
    """The tokens or samples of a channel up to each of `steps`, float64 [N]; None if not logged.

    That is the last logged total, which a resumed run continues, and what was counted after it. If
    no total is logged, it is the sum of the windows.
    """
    import numpy as np

    logged, totals = _finite_series(run, channel, f"{metric}_total")
    counted, counts = _finite_series(run, channel, metric)
    if not len(logged) and not len(counted):
        return None
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    before = totals - sums[np.searchsorted(counted, logged, side="right")]
    before = np.concatenate([[0.0], before])[np.searchsorted(logged, steps, side="right")]
    return np.asarray(before + sums[np.searchsorted(counted, steps, side="right")])


def total_of(run: Run, channel: str, metric: str) -> int | None:
    """The tokens or samples of a channel since the run began; None if they are not logged."""
    import numpy as np

    totals = totals_at(run, channel, metric, np.array([np.iinfo("int64").max]))
    return None if totals is None else round(totals[0])


def _evaluated_rows(run: Run, trained: Collection[str]) -> list[ChannelRow]:
    """The rows of the channels that only evaluations have."""
    there = set(trained)
    split_of: dict[str, str] = {}
    for key in run.keys:
        split_of.setdefault(key.channel, key.split)
    others = {name: split_of[name] for name in run.channels() if name not in there}
    # Each evaluation counts the same tokens again.
    tokens = {
        split: {name: _last_count(run, name, split) for name in run.channels(split)}
        for split in dict.fromkeys(others.values())
    }
    return [
        _row(
            run,
            name,
            split,
            tokens=tokens[split][name],
            share=None if trained else part_of(tokens[split], name),
        )
        for name, split in others.items()
    ]


def _last_count(run: Run, name: str, split: str) -> int | None:
    size = _last(run, name, split, "tokens")
    return None if size is None else int(size)


def _row(
    run: Run,
    name: str,
    split: str,
    *,
    tokens: int | None = None,
    share: float | None = None,
    record_share: float | None = None,
) -> ChannelRow:
    losses = _finite(run.series(name, loss_metric(run, name, split) or "loss", split)[1])
    return ChannelRow(
        channel=name,
        split=split,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        token_acc=_last(run, name, split, "token_acc"),
        eval_loss=_last(run, name, "eval", "loss"),
        tokens=tokens,
        share=share,
        record_share=record_share,
    )


def _last(run: Run, name: str, split: str, metric: str) -> float | None:
    values = _finite(run.series(name, metric, split)[1])
    return values[-1] if values else None


def _finite_series(run: Run, channel: str, metric: str) -> tuple[Steps, Values]:
    import numpy as np

    steps, values = run.series(channel, metric)
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _finite(values: Values) -> list[float]:
    return [value for value in values.tolist() if math.isfinite(value)]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

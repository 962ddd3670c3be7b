"""Columns and metrics of a test: registered for a while, and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from channel_metrics.core.schema import TOKENS, Column, Metric, ratio

EASY = (
    Column("easy", "tokens", "tokens with a loss below 1", per_token=lambda v: v.losses < 1),
    Metric(
        "easy_share",
        ("easy", "tokens"),
        lambda sums: ratio(sums["easy"], sums["tokens"]),
        doc="easy / tokens",
        label="Easy tokens",
    ),
)


@contextmanager
def registered(*entries: Column | Metric) -> Iterator[None]:
    """A block in which `TOKENS` has these, too."""
    columns, metrics = list(TOKENS.columns), list(TOKENS.metrics)
    try:
        TOKENS.register(*entries)
        yield
    finally:
        TOKENS.columns[:], TOKENS.metrics[:] = columns, metrics

"""Totals since a run began: they outlive windows, processes and checkpoints.

Totals are sums over all ranks, kept as plain numbers by name, so that a checkpoint can be resumed
with another number of ranks and with other channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.sums import COLUMNS
from channel_metrics.errors import ChannelMetricsError

__all__ = ["RunTotals"]

_VERSION = 1
_TOKENS, _SAMPLES = COLUMNS.index("tokens"), COLUMNS.index("samples")


class RunTotals:
    """{channel: supervised tokens and sequences since the run began}, over all ranks."""

    def __init__(self) -> None:
        # {channel: (tokens, samples)}
        self._totals: dict[str, tuple[int, int]] = {}

    def of(self, channel: str) -> dict[str, int]:
        """{"tokens_total": ..., "samples_total": ...} of one channel; zeros if it is unknown."""
        return _named(self._totals.get(channel, (0, 0)))

    def add(self, window: ChannelLossAccumulator) -> RunTotals:
        """Add a window that `sync` has summed over all ranks."""
        names, counts = (UNLABELED, *window.table.names), window.sums()[:, [_TOKENS, _SAMPLES]]
        seen = counts.any(dim=1).nonzero().flatten()
        # float64 holds counts below 2**53 exactly.
        for index, (tokens, samples) in zip(
            seen.tolist(), counts[seen].long().tolist(), strict=True
        ):
            before = self._totals.get(names[index], (0, 0))
            self._totals[names[index]] = (before[0] + tokens, before[1] + samples)
        return self

    def copy(self) -> RunTotals:
        """An independent copy."""
        copy = RunTotals()
        copy._totals = dict(self._totals)
        return copy

    def state_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        channels = {name: _named(totals) for name, totals in self._totals.items()}
        return {"version": _VERSION, "channels": channels}

    def load_state_dict(self, state: Mapping[str, Any]) -> RunTotals:
        """Replace the totals by those of `state_dict()`."""
        if state.get("version") != _VERSION:
            raise ChannelMetricsError(
                f"the totals must have version {_VERSION}, but have {state.get('version')!r}; "
                "they were written by another version of channel_metrics."
            )
        self._totals = {
            str(name): (int(totals["tokens_total"]), int(totals["samples_total"]))
            for name, totals in state["channels"].items()
        }
        return self

    def save(self, path: Path) -> None:
        """Write `path` at once or not at all: a run may be killed at any moment."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self.state_dict(), indent=2, sort_keys=True) + "\n")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> RunTotals:
        """Read what `save` wrote; raises `ChannelMetricsError` for a file that is damaged."""
        try:
            return cls().load_state_dict(json.loads(path.read_text()))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ChannelMetricsError(
                f"{path} must hold the totals of a run, but cannot be read ({error!r}); delete "
                "it to resume with totals that start at zero."
            ) from None


def _named(totals: tuple[int, int]) -> dict[str, int]:
    return {"tokens_total": totals[0], "samples_total": totals[1]}

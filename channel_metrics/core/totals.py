"""`RunTotals`: counts since a run began. Checkpoints keep them.

Totals are sums over all ranks. They are plain numbers by name, so a checkpoint can be resumed with
another number of ranks and with other channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import TOKENS, Schema
from channel_metrics.errors import ChannelMetricsError

__all__ = ["TOTALS_FILE", "RunTotals", "totals_path"]

# The file in the folder of a checkpoint.
TOTALS_FILE = "channel_metrics.json"
# Its name in the Megatron adapters of version 0.1.
_OLD_FILE = "channel_metrics_totals.json"
_VERSION = 1
_LIMIT = 2**63


class RunTotals:
    """The counts of each channel since the run began, over all ranks.

    Args:
        schema: its columns with `total` are kept.

    Attributes:
        notes: plain values that observers keep across a resume, by name.
    """

    def __init__(self, schema: Schema = TOKENS) -> None:
        self.schema = schema
        self._totals: dict[str, dict[str, int]] = {}
        self.notes: dict[str, Any] = {}

    def of(self, channel: str) -> dict[str, int]:
        """{"tokens_total": ..., "samples_total": ...} of one channel; zeros for an unknown one."""
        return {**dict.fromkeys(self.schema.run_metrics, 0), **self._totals.get(channel, {})}

    def by_row(self, rows: Callable[[str | None], list[str]]) -> dict[str, dict[str, int]]:
        """{row: totals}; `rows` gives the rows that a name belongs to."""
        found: dict[str, dict[str, int]] = {}
        for name, totals in self._totals.items():
            for row in rows(None if name == UNLABELED else name):
                of_row = found.setdefault(row, dict.fromkeys(self.schema.run_metrics, 0))
                found[row] = {key: count + totals.get(key, 0) for key, count in of_row.items()}
        return found

    def add(self, names: Sequence[str], sums: Tensor) -> RunTotals:
        """Add a window that has been summed over all ranks.

        Args:
            names: of all rows but the first.
            sums: float64 [len(names) + 1, K] on the host. Row 0 is unlabeled, and columns are in
                the order of the schema.

        Returns:
            These totals.
        """
        columns = [self.schema.column_names.index(name) for name in self.schema.total_names]
        rows, counts = (UNLABELED, *names), sums[:, columns]
        seen = counts.any(dim=1).nonzero().flatten()
        # float64 holds counts below 2**53 exactly.
        for index, added in zip(seen.tolist(), counts[seen].long().tolist(), strict=True):
            before = self.of(rows[index])
            self._totals[rows[index]] = before | {
                name: before[name] + count
                for name, count in zip(self.schema.run_metrics, added, strict=True)
            }
        return self

    def copy(self) -> RunTotals:
        """An independent copy."""
        copy = RunTotals(self.schema)
        copy._totals = {name: dict(totals) for name, totals in self._totals.items()}
        copy.notes = deepcopy(self.notes)
        return copy

    def state_dict(self) -> dict[str, Any]:
        """The totals as plain values that JSON can hold."""
        channels = {name: self.of(name) for name in self._totals}
        notes = {"notes": deepcopy(self.notes)} if self.notes else {}
        return {"version": _VERSION, "channels": channels, **notes}

    def load_state_dict(self, state: Mapping[str, Any]) -> RunTotals:
        """Replace the totals by those of `state_dict()`.

        Raises `ChannelMetricsError` for a damaged state; then the totals stay as they are.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("channels", {}), Mapping):
            raise ChannelMetricsError("the totals must be a mapping of channels to counts.")
        if state.get("version") != _VERSION:
            raise ChannelMetricsError(
                f"the totals must have version {_VERSION}, but have {state.get('version')!r}; "
                "they were written by another version of channel_metrics."
            )
        if "channels" not in state:
            raise ChannelMetricsError("the totals must have `channels`, but have none.")
        self._totals = {
            str(name): _checked(str(name), totals) for name, totals in state["channels"].items()
        }
        notes = state.get("notes")
        self.notes = deepcopy(notes) if isinstance(notes, dict) else {}
        return self

    def save(self, path: Path) -> None:
        """Write the totals to `path`. If the run is killed meanwhile, the old file stays whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self.state_dict(), sort_keys=True) + "\n")
        draft.replace(path)

    def load(self, path: Path) -> RunTotals:
        """Replace the totals by those in `path`; raises `ChannelMetricsError` if it is damaged."""
        try:
            return self.load_state_dict(json.loads(path.read_text()))
        except (ValueError, OSError, RecursionError) as error:
            raise ChannelMetricsError(
                f"{path} must hold the totals of a run, but cannot be read ({error!r}); delete "
                "it to resume with totals that start at zero."
            ) from None


def _checked(channel: str, totals: Any) -> dict[str, int]:
    """The totals of one channel; raises `ChannelMetricsError` unless they are counts."""
    if not isinstance(totals, Mapping):
        raise ChannelMetricsError(f"the totals of {channel!r} must be counts, but are {totals!r}.")
    for key, count in totals.items():
        if type(count) is not int or not 0 <= count < _LIMIT:
            came = "out of that range" if type(count) is int else repr(count)[:40]
            raise ChannelMetricsError(
                f"{key} of {channel!r} must be a whole number from 0 to 2**63 - 1, but is {came}."
            )
    return {str(key): count for key, count in totals.items()}


def totals_path(folder: Path) -> Path | None:
    """The file of totals in the folder of a checkpoint, new or old name; None if it has none."""
    for name in (TOTALS_FILE, _OLD_FILE):
        if (folder / name).exists():
            return folder / name
    return None

"""The totals of a run, and what its observers remember, in checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from channel_metrics.core.totals import TOTALS_FILE, RunTotals, totals_path
from channel_metrics.counting import Counting
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.ranks.sync import sum_over_ranks

__all__ = ["Checkpoints"]


class Checkpoints(Counting):
    """What a session saves and loads.

    Attributes:
        ranks: the ranks that count together.
        totals: the counts of training since the run began, up to the last closed window.
    """

    ranks: Ranks
    totals: RunTotals
    stop_reason: str
    _agreement: Agreement

    def start(self, folder: Path | None = None) -> None:
        """Begin a run: empty the window, and load the totals of the checkpoint `folder`, if any."""
        self.guard.restart()
        self._train.table.reset()
        self._train.step, self.totals = None, RunTotals(self.schema)
        self.stop_reason = ""
        if folder is not None:
            self._load_totals(folder)
        self._begun()

    def save(self, folder: Path, *, is_writer: bool | None = None) -> None:
        """Write `totals_now()` into the folder of a checkpoint. A collective.

        Args:
            folder: that of the checkpoint.
            is_writer: whether this rank writes the file; by default, the first rank does.
        """
        with self.guard.guarded():
            totals = self.totals_now()
            writes = self.ranks.rank == 0 if is_writer is None else is_writer
            if totals is not None and writes:
                totals.save(folder / TOTALS_FILE)

    def totals_now(self) -> RunTotals | None:
        """The totals of all ranks, with the open window; None if metrics ended. A collective."""
        with self.guard.guarded():  # without the open step, which may be taken again
            if not self.guard.off:
                table = self._train.table
                names, sums, *_ = sum_over_ranks(table, self._agreement, self.ranks, self.guard)
                return self.totals.copy().add(names, sums)
        return None

    def resume(self, folder: Path) -> None:
        """Go on from the totals of a checkpoint. If it has none, warn and start at zero."""
        self._load_totals(folder)
        self._begun()

    def _load_totals(self, folder: Path) -> None:
        path = totals_path(folder)
        read = None if path is None else lambda: RunTotals(self.schema).load(path)
        self._resume(read, f"{folder} has no {TOTALS_FILE}: it")

    def totals_state(self, *, alone: bool = False) -> dict[str, Any]:
        """`totals_now()` for the checkpoint of a trainer that keeps states of its callbacks.

        Args:
            alone: whether the other ranks may not do the same. Then it is no collective, and the
                open window is left out.
        """
        totals = self.totals if alone and not self.ranks.is_one else self.totals_now()
        return {} if totals is None else {"totals": totals.state_dict()}

    def resume_state(self, state: Any, checkpoint: str) -> None:
        """Go on from `totals_state()`, or warn if there is none; `checkpoint` is its path."""

        def read() -> RunTotals:
            totals: Any = state.get("totals") if isinstance(state, Mapping) else state
            try:
                return RunTotals(self.schema).load_state_dict(totals)
            except ChannelMetricsError as error:
                raise ChannelMetricsError(
                    f"the totals in {checkpoint} cannot be read: {error} To go on with totals that "
                    'start at zero, set on_error="warn" in the config.'
                ) from error

        self._resume(read if state else None, checkpoint)

    def _resume(self, read: Callable[[], RunTotals] | None, checkpoint: str) -> None:
        self.totals = RunTotals(self.schema)
        if read is None:
            self.warn_once(
                f"{checkpoint} was written without channel metrics, so "
                f"{' and '.join(self.schema.run_metrics)} count from here."
            )
            return
        try:
            self.totals = read()
        except ChannelMetricsError as error:  # the counts from here on are right
            if self.guard.raises:
                raise
            self.warn_once(f"{error} The totals of the run start at zero.")

    def state_dict(self) -> dict[str, Any]:
        """The totals and the open window of this rank, for a checkpoint of your own."""
        self._end_step(self._train)
        return {"totals": self.totals.state_dict(), "train": self._train.table.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; a damaged one changes nothing and raises
        `ChannelMetricsError`. Without `train`, the window is empty."""
        if not isinstance(state, Mapping) or "totals" not in state:
            raise ChannelMetricsError("the state must be a mapping with `totals`; it is damaged.")
        totals = RunTotals(self.schema).load_state_dict(state["totals"])
        self._train.table.load_state_dict(state.get("train") or self._new_table().state_dict())
        self._train.step, self.totals = None, totals
        self._begun()

    def _begun(self) -> None:
        """Tell what depends on the totals and notes that these are those of the run."""

"""`SumTable`: sums of named columns per label. Tokens, pairs, completions and probes all use it.

>>> from channel_metrics.core.labels import LabelTable
>>> table = SumTable(LabelTable(["bbu", "rru"]), ["samples"])
>>> table.add(["rru", None, "rru"], {"samples": torch.ones(3)})
>>> table.sums().tolist()
[[1.0], [0.0], [2.0]]

Letters: N things that are counted (sequences, tokens, pairs), C labels, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from channel_metrics.core.checks import can_read, channels_shape, check_ids, check_scalar
from channel_metrics.core.labels import UNLABELED, LabelTable
from channel_metrics.core.rows import table_rows
from channel_metrics.core.schema import Metric, Schema
from channel_metrics.errors import ChannelError, ChannelMetricsError, ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SumTable", "values_by_channel"]

_STATE_VERSION = 1


class SumTable:
    """Sums of `columns` for each label, and for `unlabeled`.

    In float32, the sums of one `add` are rounded to float32. The running sums keep the lost bits
    in a second tensor (Knuth's two-sum), so counters do not stop at 2**24.

    Args:
        labels: a name that joins a shared table joins for all who share it.
        columns: their names.
        device: where the sums are kept.
        dtype: float64, or float32 for devices without float64 (MPS).

    Raises:
        ConfigError: for another dtype.
    """

    def __init__(
        self,
        labels: LabelTable,
        columns: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        device, self.labels, self.columns = torch.device(device), labels, tuple(columns)
        self._place = {name: index for index, name in enumerate(self.columns)}
        self.dtype = dtype or _dtype_of(device)
        if self.dtype not in (torch.float64, torch.float32):
            raise ConfigError(
                f"dtype must be torch.float64 or torch.float32, but is {dtype}; in any other, "
                "counts and losses would be rounded."
            )
        # A tensor that is made in inference mode cannot be changed in place outside of it.
        with torch.inference_mode(False):
            size = (len(self.columns), len(labels) + 1)
            self._sums = torch.zeros(size, dtype=self.dtype, device=device)
            self._lost = torch.zeros_like(self._sums)
            self._mismatch = torch.zeros((), dtype=self.dtype, device=device)

    @property
    def device(self) -> torch.device:
        """Where the sums are kept."""
        return self._sums.device

    @torch.no_grad()
    def add(self, labels: Tensor | Sequence[str | None], values: Mapping[str, Tensor]) -> None:
        """Add N things: labels, int64 ids [N] or names, and for each column its values [N].

        A column that is not in `values` stays as it is. Nothing is read back from the device.
        Raises `ChannelError` if the number of labels and values differ; then nothing is added.
        """
        shapes = {name: list(value.shape) for name, value in values.items()}
        if not shapes or any(shape != [len(labels)] for shape in shapes.values()):
            raise ChannelError(
                f"expected one value per label and column for {len(labels)} labels, but got "
                f"{shapes}; labels and values are out of step."
            )
        self.to(next(iter(values.values())).device)
        self._add(self._ids(labels), values)

    @torch.no_grad()
    def compare(self, ours: Tensor, theirs: Tensor) -> None:
        """Keep the largest relative difference of two scalars; nothing is read from the device.

        Two zeros do not differ. If one of them is not finite, they are not compared.
        """
        check_scalar("the loss to compare with", theirs)
        ours, theirs = (one.detach().reshape(()).to(self._mismatch) for one in (ours, theirs))
        off = (ours - theirs).abs() / torch.maximum(ours.abs(), theirs.abs())
        torch.maximum(self._mismatch, torch.nan_to_num(off, nan=0), out=self._mismatch)

    def merge(self, other: SumTable) -> None:
        """Add the sums of another table. Labels and columns are matched by name.

        Nothing is read back from the device if both share labels, columns and device.
        """
        if other._kind() == self._kind():
            missing = self._num_rows() - other._sums.shape[1]
            for part in (other._sums, other._lost):
                self._add_up(torch.nn.functional.pad(part, (0, missing)))
        else:
            self._load(other.labels.names, other.columns, other.sums())
        worst = torch.maximum(self._mismatch, other._mismatch.to(self._mismatch))
        self._mismatch.copy_(worst)

    def sums(self) -> Tensor:
        """float64 [C + 1, K] on the host: row 0 is unlabeled, row i + 1 is label i. One sync."""
        rows = len(self.labels) + 1
        exact = self._sums.cpu().double() + self._lost.cpu().double()
        return torch.nn.functional.pad(exact, (0, rows - exact.shape[1])).t().contiguous()

    def mismatch(self) -> float:
        """The largest relative difference that `compare` found since the last reset."""
        return float(self._mismatch)

    def reset(self) -> Self:
        """Set the sums to zero and keep the names."""
        for state in (self._sums, self._lost, self._mismatch):
            state.zero_()
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move the sums to `device`; on a device without float64, they become float32."""
        device = torch.device(device)
        if device == self.device:
            return self
        dtype = torch.float32 if device.type == "mps" else self.dtype
        if dtype != self.dtype:
            # Sums in float64 have lost nothing.
            self._sums, self._lost = _in_two(self._sums, dtype)
            self.dtype = dtype
        self._sums, self._lost = self._sums.to(device), self._lost.to(device)
        self._mismatch = self._mismatch.to(device, dtype)
        return self

    def state_dict(self) -> dict[str, Any]:
        """Names and sums, as plain values and one host tensor. It does not depend on ids."""
        return {
            "version": _STATE_VERSION,
            "columns": list(self.columns),
            "names": list(self.labels.names),
            "sums": self.sums(),
            "mismatch": self.mismatch(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Replace the sums by those of `state_dict()`. Labels and columns are matched by name.

        Raises `ChannelMetricsError` for a damaged state; then the sums stay as they are.
        """
        if not isinstance(state, Mapping):
            raise ChannelMetricsError(
                f"the state must be a mapping, but is {type(state).__name__}; it is damaged."
            )
        if state.get("version") != _STATE_VERSION or "columns" not in state:
            raise ChannelMetricsError(
                f"the state must have version {_STATE_VERSION} and name its columns, but has "
                f"version {state.get('version')!r} and columns {state.get('columns')}; it was "
                "written by another version of channel_metrics."
            )
        columns, names, sums, mismatch = _checked_state(state)
        # This may refuse a name, so it comes before the reset.
        self.labels.add_all(names)
        self.reset()
        self._load(names, columns, sums)
        self._mismatch.fill_(mismatch)
        return self

    def _kind(self) -> tuple[Any, ...]:
        """Two tables with the same kind can be added without matching names."""
        return self.labels, self.columns, self.device, self.dtype

    def _ids(self, labels: Tensor | Sequence[str | None]) -> Tensor:
        """int64 [N] on the device of the sums."""
        if isinstance(labels, Tensor):
            check_ids(labels, len(self.labels))
            return labels.to(self.device, non_blocking=True)
        channels_shape(labels)
        return torch.tensor(self.labels.ids(labels), dtype=torch.int64, device=self.device)

    def _add(self, ids: Tensor, values: Mapping[str, Tensor]) -> None:
        """`values` may have one entry more than `ids`, for the tokens past the last bound."""
        num_sums = next(iter(values.values())).numel()
        # `_ids` has checked the ids that can be read.
        rows = table_rows(ids.flatten(), self._num_rows(), num_sums, checked=can_read(ids))
        places = [self._place[name] for name in values if name in self._place]
        if not places:
            return
        # One scatter for all columns. Those of the schema stand together, so few are empty.
        first, end = min(places), max(places) + 1
        empty = rows.new_zeros(num_sums, dtype=self.dtype)
        added = [values.get(name, empty).to(self.dtype) for name in self.columns[first:end]]
        sums = self._sums if self.dtype == torch.float64 else torch.zeros_like(self._sums)
        sums[first:end].index_add_(1, rows, torch.stack(added))
        if sums is not self._sums:
            self._add_up(sums)

    def _add_up(self, added: Tensor) -> None:
        """Add sums [K, C + 1]."""
        if self.dtype == torch.float64:
            self._sums += added
            return
        total = self._sums + added
        other = total - self._sums
        self._lost += (self._sums - (total - other)) + (added - other)
        self._sums.copy_(total)

    def _num_rows(self) -> int:
        """C + 1. Adds rows for labels that joined meanwhile."""
        missing = len(self.labels) + 1 - self._sums.shape[1]
        if missing > 0:
            with torch.inference_mode(False):
                self._sums = torch.nn.functional.pad(self._sums, (0, missing))
                self._lost = torch.nn.functional.pad(self._lost, (0, missing))
        return self._sums.shape[1]

    def _load(self, names: Sequence[str], columns: Sequence[str], sums: Tensor) -> None:
        """Add float64 [len(names) + 1, len(columns)]; unknown columns are dropped."""
        ids = self.labels.add_all(names)
        rows = torch.tensor([0, *(index + 1 for index in ids)], device=self.device)
        placed = sums.new_zeros(len(self.columns), len(sums))
        for index, name in enumerate(columns):
            if name in self._place:
                placed[self._place[name]] = sums[:, index]
        # One float32 cannot hold a float64, but two can hold it almost exactly.
        for part in _in_two(placed, self.dtype):
            moved = part.to(self.device)
            self._add_up(moved.new_zeros(len(moved), self._num_rows()).index_add_(1, rows, moved))


def values_by_channel(
    schema: Schema,
    names: Sequence[str],
    sums: Tensor,
    metrics: Sequence[Metric],
    num_channels: int | None = None,
) -> dict[str, dict[str, float]]:
    """{channel: {metric: value}} of the channels that were counted; `unlabeled` comes last.

    names: of all rows but the first. sums: float64 [len(names) + 1, K] on the host; row 0 is
    unlabeled, and columns are in the order of the schema. num_channels: how many of the names are
    channels, by default all; the rows after these hold the same tokens once more.
    """
    columns = schema.column_names
    # Move `unlabeled` from the first row to the last.
    ordered, rows = (*names, UNLABELED), sums.roll(-1, dims=0)
    counted = rows[:, columns.index(schema.count)]
    present = (counted > 0).nonzero().flatten()
    total = float(counted[:num_channels].sum())
    if num_channels is not None:
        total += float(counted[-1])
    return {
        ordered[index]: schema.values(dict(zip(columns, row, strict=True)), total, metrics)
        for index, row in zip(present.tolist(), rows[present].tolist(), strict=True)
    }


def _checked_state(state: Mapping[str, Any]) -> tuple[list[str], list[str], Tensor, float]:
    """columns, names, sums [len(names) + 1, len(columns)] and mismatch of a `state_dict()`."""
    try:
        columns, names = [str(name) for name in state["columns"]], list(state["names"])
        sums = torch.as_tensor(state["sums"], dtype=torch.float64, device="cpu")
        mismatch = float(state["mismatch"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ChannelMetricsError(
            f"the state must hold columns, names, sums and mismatch, but is damaged ({error!r}); "
            "load the state of another checkpoint."
        ) from None
    if not all(isinstance(name, str) for name in names):
        raise ChannelMetricsError(f"the names of a state must be strings, but are {names[:8]}.")
    expected = (len(names) + 1, len(columns))
    if sums.shape != expected:
        raise ChannelMetricsError(
            f"the sums of a state with {len(names)} names and {len(columns)} columns must have "
            f"shape {list(expected)}, but have {list(sums.shape)}; it is damaged."
        )
    return columns, names, sums, mismatch


def _dtype_of(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _in_two(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float64 values as the nearest values of `dtype`, and the rest that these lost."""
    rounded = exact.to(dtype)
    return rounded, (exact - rounded).to(dtype)

"""Keeps readings on disk, so that a log of any size can be sorted in little memory.

If the steps of a log go back, the job was resumed from a checkpoint. What was logged before for the
steps after that checkpoint belongs to no model that was kept: it is set aside as `overwritten`.

>>> with SeriesWriter() as writer:
...     writer.add(2, "loss", 1.5)
...     writer.add(1, "loss", 2.5)
>>> [part.tolist() for part in writer.finish().series("loss")]
[[1, 2], [2.5, 1.5]]
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.branches import Branches
from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.readings import Reading
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.extras import need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Steps = NDArray[np.int64]
    Values = NDArray[np.float64]

__all__ = ["JoinedStore", "SeriesStore", "SeriesWriter", "store_of"]

_CHUNK = 1 << 16


class _Folder:
    """A folder that is deleted with the last object that refers to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="channel_metrics_"))
        # TemporaryDirectory would warn if nobody calls its cleanup().
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class SeriesWriter:
    """Takes readings in any order; `finish` sorts them by key.

    Args:
        in_order: whether they come in the order of time. Only then resumes can be seen.
    """

    def __init__(self, *, in_order: bool = True) -> None:
        self._branches = Branches(in_order)
        self._np: Any = need("numpy", extra="report")
        self._folder = _Folder()
        self._names = {"steps": "q", "keys": "q", "values": "d"}
        self._columns: dict[str, Any] = {n: array(code) for n, code in self._names.items()}
        self._files = {name: (self._path(name)).open("wb") for name in self._names}
        self._ids: dict[str | Key, int] = {}

    def __enter__(self) -> SeriesWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, step: int, key: str | Key, value: float) -> None:
        """Add one reading."""
        columns = self._columns
        number = self._ids.setdefault(key, len(self._ids))
        self._branches.see(step, number, key)
        try:
            columns["steps"].append(step)
        except OverflowError:
            raise ChannelMetricsError(
                f"expected a step below 2**63, but {key!r} has {step}."
            ) from None
        columns["keys"].append(number)
        columns["values"].append(value)
        if len(columns["steps"]) >= _CHUNK:
            self._flush()

    def finish(self) -> SeriesStore:
        """The readings, sorted by key. The writer takes no more."""
        self._flush()
        self.__exit__()
        resumes = self._branches.resumes
        kept = self._sorted(is_kept=True)
        aside = self._sorted(is_kept=False) if resumes else None
        for name in self._names:
            self._path(name).unlink()
        return SeriesStore(self._folder, kept, aside, resumes)

    def _sorted(self, *, is_kept: bool) -> _Columns:
        """The readings that are kept, or those that are set aside."""
        np = self._np
        counts = np.zeros(len(self._ids), dtype="int64")
        for keys, _, _ in self._parts(is_kept):
            counts += np.bincount(keys, minlength=len(counts))
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        name = "kept" if is_kept else "aside"
        steps = self._sorted_file(f"{name}_steps", "int64", total)
        values = self._sorted_file(f"{name}_values", "float64", total)
        free = ends - counts
        for keys, chunk_steps, chunk_values in self._parts(is_kept):
            order = np.argsort(keys, kind="stable")
            found, starts, sizes = np.unique(keys[order], return_index=True, return_counts=True)
            places = np.empty(len(keys), dtype="int64")
            offsets = np.arange(len(keys)) - np.repeat(starts, sizes)
            places[order] = free[keys[order]] + offsets
            steps[places], values[places] = chunk_steps, chunk_values
            free[found] += sizes
        bounds = dict(zip(self._ids, zip(ends - counts, ends, strict=True), strict=True))
        # Plain arrays on the same file: slices of a `memmap` are slow.
        return _Columns(np.asarray(steps), np.asarray(values), bounds)

    def _parts(self, is_kept: bool) -> Iterator[tuple[Any, Any, Any]]:
        """The chunks, of which only some readings are taken."""
        position = 0
        for keys, steps, values in self._chunks():
            limits = self._branches.limits(self._np, position, keys)
            position += len(keys)
            if limits is None:
                yield keys, steps, values
                continue
            taken = (steps < limits) == is_kept
            yield keys[taken], steps[taken], values[taken]

    def _path(self, name: str) -> Path:
        return self._folder.path / name

    def _flush(self) -> None:
        for name, column in self._columns.items():
            column.tofile(self._files[name])
            self._columns[name] = array(self._names[name])

    def _sorted_file(self, name: str, dtype: str, total: int) -> Any:
        if not total:
            return self._np.empty(0, dtype=dtype)
        return self._np.memmap(self._path(name), dtype=dtype, mode="w+", shape=(total,))

    def _chunks(self) -> Iterator[tuple[Any, Any, Any]]:
        """(key ids, steps, values) of up to `_CHUNK` readings, in the order they came."""
        dtypes = {"steps": "int64", "keys": "int64", "values": "float64"}
        offset = 0
        while True:
            parts = {
                name: self._np.fromfile(
                    self._path(name), dtype=dtype, count=_CHUNK, offset=offset * 8
                )
                for name, dtype in dtypes.items()
            }
            if not len(parts["keys"]):
                return
            yield parts["keys"], parts["steps"], parts["values"]
            offset += len(parts["keys"])


@dataclass(frozen=True)
class _Columns:
    """Readings that are sorted by key."""

    steps: Steps
    values: Values
    bounds: dict[str | Key, tuple[int, int]]


class SeriesStore:
    """Sorted readings: one series of steps and values per key."""

    def __init__(
        self,
        folder: _Folder,
        kept: _Columns,
        aside: _Columns | None = None,
        resumes: Sequence[int] = (),
    ) -> None:
        self._np: Any = need("numpy", extra="report")
        self._folder = folder
        self._kept, self._aside = kept, aside
        self.resumes = tuple(resumes)
        """The first steps after each resume."""

    @property
    def keys(self) -> tuple[str | Key, ...]:
        """All keys, in the order of their first readings."""
        return tuple(self._kept.bounds)

    def __len__(self) -> int:
        """The number of readings."""
        return len(self._kept.steps)

    def series(self, key: str | Key) -> tuple[Steps, Values]:
        """Steps (int64 [N], strictly increasing) and values (float64 [N]) of one key.

        If a step was logged twice, the last value is kept.
        """
        return self._series(self._kept, key)

    def overwritten(self, key: str | Key) -> tuple[Steps, Values]:
        """What a key had before a resume overwrote it, in the same form."""
        return self._series(self._aside or self._kept, key if self._aside else None)

    def num_repeated(self, key: str | Key) -> int:
        """The number of readings of `key` that later ones of the same step replace."""
        first, end = self._kept.bounds[key]
        return int(end - first) - len(self.series(key)[0])

    def _series(self, columns: _Columns, key: str | Key | None) -> tuple[Steps, Values]:
        first, end = (0, 0) if key is None else columns.bounds[key]
        steps, values = columns.steps[first:end], columns.values[first:end]
        if len(steps) > 1 and not (self._np.diff(steps) > 0).all():
            order = self._np.argsort(steps, kind="stable")
            last = self._np.append(self._np.diff(steps[order]) > 0, True)
            steps, values = steps[order][last], values[order][last]
        return self._np.asarray(steps), self._np.asarray(values)


class JoinedStore(SeriesStore):
    """A store, and another one with further series. If both have a key, the second one counts."""

    def __init__(self, first: SeriesStore, more: SeriesStore) -> None:
        self._first, self._more = first, more
        self._store_of = dict.fromkeys(first.keys, first) | dict.fromkeys(more.keys, more)
        self.resumes = first.resumes

    @property
    def keys(self) -> tuple[str | Key, ...]:
        """All keys, those of the first store first."""
        return tuple(self._store_of)

    def __len__(self) -> int:
        """The number of readings in both."""
        return len(self._first) + len(self._more)

    def series(self, key: str | Key) -> tuple[Steps, Values]:
        """The series in the store that has it."""
        return self._store_of[key].series(key)

    def overwritten(self, key: str | Key) -> tuple[Steps, Values]:
        """What a resume has overwritten, in the store that has the key."""
        return self._store_of[key].overwritten(key)

    def num_repeated(self, key: str | Key) -> int:
        """The number of readings of `key` that later ones replace, in its store."""
        return self._store_of[key].num_repeated(key)


def store_of(readings: Iterable[Reading], *, in_order: bool = True) -> SeriesStore:
    """All readings of a reader, sorted."""
    with SeriesWriter(in_order=in_order) as writer:
        for step, key, value in readings:
            writer.add(step, key, value)
        return writer.finish()

"""Keeps readings on disk, so that a log of any size can be sorted in little memory.

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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.readings import Reading
from channel_metrics.extras import need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Steps = NDArray[np.int64]
    Values = NDArray[np.float64]

__all__ = ["SeriesStore", "SeriesWriter", "store_of"]

_CHUNK = 1 << 16


class _Folder:
    """A folder that is deleted with the last object that refers to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="channel_metrics_"))
        # TemporaryDirectory would warn if nobody calls its cleanup().
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class SeriesWriter:
    """Takes readings in any order; `finish` sorts them by key."""

    def __init__(self) -> None:
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
        columns["steps"].append(step)
        columns["keys"].append(self._ids.setdefault(key, len(self._ids)))
        columns["values"].append(value)
        if len(columns["steps"]) >= _CHUNK:
            self._flush()

    def finish(self) -> SeriesStore:
        """The readings, sorted by key. The writer takes no more."""
        self._flush()
        self.__exit__()
        counts = self._np.zeros(len(self._ids), dtype="int64")
        for keys, _, _ in self._chunks():
            counts += self._np.bincount(keys, minlength=len(counts))
        ends = self._np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        steps = self._sorted_file("sorted_steps", "int64", total)
        values = self._sorted_file("sorted_values", "float64", total)
        free = ends - counts
        for keys, chunk_steps, chunk_values in self._chunks():
            order = self._np.argsort(keys, kind="stable")
            found, starts, sizes = self._np.unique(
                keys[order], return_index=True, return_counts=True
            )
            places = self._np.empty(len(keys), dtype="int64")
            offsets = self._np.arange(len(keys)) - self._np.repeat(starts, sizes)
            places[order] = free[keys[order]] + offsets
            steps[places], values[places] = chunk_steps, chunk_values
            free[found] += sizes
        for name in self._names:
            self._path(name).unlink()
        bounds = dict(zip(self._ids, zip(ends - counts, ends, strict=True), strict=True))
        return SeriesStore(self._folder, steps, values, bounds)

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


class SeriesStore:
    """Sorted readings: one series of steps and values per key."""

    def __init__(
        self,
        folder: _Folder,
        steps: Steps,
        values: Values,
        bounds: dict[str | Key, tuple[int, int]],
    ) -> None:
        self._np: Any = need("numpy", extra="report")
        self._folder = folder
        self._steps = steps
        self._values = values
        self._bounds = bounds

    @property
    def keys(self) -> tuple[str | Key, ...]:
        """All keys, in the order of their first readings."""
        return tuple(self._bounds)

    def __len__(self) -> int:
        """The number of readings."""
        return len(self._steps)

    def series(self, key: str | Key) -> tuple[Steps, Values]:
        """Steps (int64 [N], strictly increasing) and values (float64 [N]) of one key.

        If a step was logged twice, as after a resume, the last value is kept.
        """
        first, end = self._bounds[key]
        steps, values = self._steps[first:end], self._values[first:end]
        if len(steps) > 1 and not (self._np.diff(steps) > 0).all():
            order = self._np.argsort(steps, kind="stable")
            last = self._np.append(self._np.diff(steps[order]) > 0, True)
            steps, values = steps[order][last], values[order][last]
        return self._np.asarray(steps), self._np.asarray(values)

    def num_repeated(self, key: str | Key) -> int:
        """The number of readings of `key` that a later one for the same step replaces."""
        first, end = self._bounds[key]
        return int(end - first) - len(self.series(key)[0])


def store_of(readings: Iterable[Reading]) -> SeriesStore:
    """All readings of a reader, sorted."""
    with SeriesWriter() as writer:
        for step, key, value in readings:
            writer.add(step, key, value)
        return writer.finish()

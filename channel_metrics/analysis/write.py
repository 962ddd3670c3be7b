"""Writes runs as parquet, as CSV, and as TensorBoard events, to compare them with a new run.

The table has one line per value: `run, split, channel, metric, step, value`. `channel` is empty for
the run's own values.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.run import Run
from channel_metrics.analysis.whole_file import whole_file
from channel_metrics.core.keys import metric_key
from channel_metrics.extras import need

if TYPE_CHECKING:
    from channel_metrics.analysis.store import Steps, Values

__all__ = ["COLUMNS", "write_csv", "write_events", "write_parquet"]

COLUMNS = ("run", "split", "channel", "metric", "step", "value")

_CHUNK = 1 << 16


def write_parquet(
    runs: Sequence[Run], path: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write the table of all runs as parquet, series by series.

    progress is called with the number of values that were written.
    """
    arrow: Any = need("pyarrow", extra="report")
    parquet: Any = need("pyarrow.parquet", extra="report")
    words = arrow.dictionary(arrow.int32(), arrow.string())
    types = [words] * 4 + [arrow.int64(), arrow.float64()]
    schema = arrow.schema(list(zip(COLUMNS, types, strict=True)))
    with whole_file(path) as part, parquet.ParquetWriter(part, schema) as writer:
        for run in runs:
            # Several series are written together, because most are short.
            waiting: list[Any] = []
            for key, steps, values in run.all_series():
                texts = (run.name, *key)
                names = [arrow.array([text] * len(steps)).dictionary_encode() for text in texts]
                columns = [*names, arrow.array(steps), arrow.array(values)]
                progress(len(steps))
                waiting.append(arrow.Table.from_arrays(columns, schema=schema))
                if sum(map(len, waiting)) >= _CHUNK:
                    writer.write_table(arrow.concat_tables(waiting).unify_dictionaries())
                    waiting = []
            if waiting:
                writer.write_table(arrow.concat_tables(waiting).unify_dictionaries())


def write_csv(
    runs: Sequence[Run], path: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write the same table as CSV. Values have all digits of a float64."""
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            for key, steps, values in run.all_series():
                progress(len(steps))
                for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                    writer.writerow((run.name, *map(_cell, key), step, repr(value)))


def write_events(run: Run, folder: Path, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write `run` as TensorBoard events, with the tags of the transformers Trainer.

    Tags are `train/bbu_loss` and `eval/loss`, for instance. Steps are in order, as TensorBoard
    expects them. Event files that are already in the folder are deleted.
    """
    protos: Any = need("tensorboard.compat.proto.event_pb2", extra="report")
    summaries: Any = need("tensorboard.compat.proto.summary_pb2", extra="report")
    writers: Any = need("tensorboard.summary.writer.event_file_writer", extra="report")
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = writers.EventFileWriter(os.fspath(folder))
    series = [(_tag(key), steps, values) for key, steps, values in run.all_series()]
    for step, found in _by_step(series):
        values = [summaries.Summary.Value(tag=tag, simple_value=value) for tag, value in found]
        # The wall time is the step, so that old runs do not look like new ones.
        event = protos.Event(step=step, wall_time=float(step), summary={"value": values})
        writer.add_event(event)
        progress(len(values))
    writer.close()


def _by_step(series: Sequence[tuple[str, Steps, Values]]) -> Any:
    """(step, [(tag, value)]) in the order of the steps."""
    import heapq

    ends = [len(steps) for _, steps, _ in series]
    heap = [(int(steps[0]), index, 0) for index, (_, steps, _) in enumerate(series) if len(steps)]
    heapq.heapify(heap)
    while heap:
        step, found = heap[0][0], []
        while heap and heap[0][0] == step:
            _, index, position = heapq.heappop(heap)
            tag, steps, values = series[index]
            found.append((tag, float(values[position])))
            if position + 1 < ends[index]:
                heapq.heappush(heap, (int(steps[position + 1]), index, position + 1))
        yield step, found


def _tag(key: Key) -> str:
    if not key.channel:
        return f"{key.split}/{key.metric}"
    return f"{key.split}/{metric_key('{channel}_{metric}', key.channel, key.metric)}"


def _cell(text: str) -> str:
    """The text, quoted if a spreadsheet would take it for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text

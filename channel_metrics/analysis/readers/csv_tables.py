"""Reads CSV: a chart or a history of W&B, or our own `metrics.csv`.

A history has a column for the step (`_step`, `train/global_step`) and one for each key. A chart has
`Step` and columns such as `run - train/loss`, with its lowest and highest values beside it.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.json_logs import STEP_KEYS, readings_of, step_of
from channel_metrics.analysis.readers.keys import Key
from channel_metrics.analysis.readers.line_reader import number_of
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.errors import ChannelMetricsError

__all__ = ["CSV", "read_csv_table"]

_OURS = ["run", "split", "channel", "metric", "step", "value"]
_RANGE = ("__MIN", "__MAX")
_SHOWN = 8
# csv refuses longer cells, such as those with a picture; a number is shorter.
_MAX_CELL = 1 << 20


def read_csv_table(
    path: Path, problems: Problems, progress: Progress, run_id: str | None = None
) -> Iterator[Reading]:
    """Every number of one run; by default the last one that is named."""
    header = _header(path)
    names = _ours(path) if header == _OURS else _of_chart(header)
    run = _chosen(names, path, run_id, problems)
    for number, row in _rows(path, problems, progress):
        record = dict(zip(header, row, strict=False))
        found = _of_ours(record, run) if header == _OURS else _of_row(record, run)
        if found is None:
            problems.add(path, number, "has no step")
        else:
            yield from found


def _of_ours(record: dict[str, str], run: str) -> list[Reading] | None:
    step, value = step_of(record), number_of(record.get("value", ""))
    if step is None or value is None:
        return None
    # Names that a spreadsheet would take for a formula were quoted.
    key = Key(record["split"], record["channel"].removeprefix("'"), record["metric"])
    return [(step, key, value)] if record["run"] == run else []


def _of_row(record: dict[str, str], run: str) -> list[Reading] | None:
    values = {key: number_of(text) for key, text in record.items() if text}
    # One column for all rows: `_step` counts calls, and must not stand in for a missing step.
    column = next((key for key in STEP_KEYS if key in record), "")
    step = step_of({column: values.get(column)})
    if step is None:
        return None
    prefix = f"{run} - " if run else ""
    named = {
        key.removeprefix(prefix): value
        for key, value in values.items()
        if value is not None and key.startswith(prefix) and not key.endswith(_RANGE)
    }
    return list(readings_of({k: v for k, v in named.items() if not k.startswith("_")}, step))


def _chosen(names: list[str], path: Path, run_id: str | None, problems: Problems) -> str:
    if run_id is not None and run_id not in names:
        raise ChannelMetricsError(
            f"{path} has no run {run_id!r}; there are {', '.join(names[-_SHOWN:])}."
        )
    run = run_id or (names or [""])[-1]
    if len(names) > 1:
        problems.note(f"{path.name} has {len(names)} runs; this is {run}. See {path.name}#RUN")
    return run


def _of_chart(header: list[str]) -> list[str]:
    """The names of the runs in the columns of a chart; none if it is no chart."""
    named = [key.rpartition(" - ")[0] for key in header if " - " in key]
    return list(dict.fromkeys(named))


def _ours(path: Path) -> list[str]:
    rows = _rows(path, Problems(), lambda _: None)
    return list(dict.fromkeys(row[0] for _, row in rows if row))


def _header(path: Path) -> list[str]:
    for _, line in lines_of(path, Problems(), lambda _: None):
        try:
            return next(csv.reader([line]), [])
        except csv.Error:
            break
    return []


def _rows(path: Path, problems: Problems, progress: Progress) -> Iterator[tuple[int, list[str]]]:
    """(number of its line, cells) of every row below the header."""
    lines = lines_of(path, problems, progress)
    csv.field_size_limit(_MAX_CELL)
    table = csv.reader(line for _, line in lines)
    next(table, None)
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(path, table.line_num, f"is no line of a table ({error})")
            continue
        yield table.line_num, row


def _lacks_columns(path: Path) -> str:
    header = _header(path)
    has_step = any(key in STEP_KEYS for key in header) and len(header) > 1
    return "" if has_step else f"its first line names none of: {', '.join(STEP_KEYS)}"


CSV = Format(
    name="csv",
    what="CSV table with a step per line, as W&B exports it",
    read=read_csv_table,
    check=_lacks_columns,
    suffixes=(".csv",),
    starts=in_folder("*.csv", check=_lacks_columns, depth=1),
)

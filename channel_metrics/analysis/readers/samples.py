"""Reads which samples were in each step: from a per-sample log, or from the order of the samples.

A per-sample log has one JSON object per line, with a step and the dataset of the sample. It may
also have the loss of the sample (mean nll per token), and its number of supervised tokens:

    {"step": 10, "id": "a-17", "dataset": "bbu", "loss": 1.25, "tokens": 212}
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from channel_metrics.analysis.readers.format import Format, in_folder
from channel_metrics.analysis.readers.json_logs import first_with_step, parse_object, step_of
from channel_metrics.analysis.readers.keys import GLOBAL, Key
from channel_metrics.analysis.readers.lines import lines_of
from channel_metrics.analysis.readers.readings import Problems, Progress, Reading
from channel_metrics.core.labels import DEFAULT_FIELDS, UNLABELED, channel_of
from channel_metrics.errors import ChannelMetricsError

__all__ = ["SAMPLES", "is_no_log", "is_sample_record", "read_sample_log", "read_sample_order"]

_FIELDS = ("dataset", *DEFAULT_FIELDS, "source")
_LOSS_KEYS = ("loss", "nll", "sample_loss")
_TOKEN_KEYS = ("tokens", "num_tokens", "n_tokens", "supervised_tokens")
_ID_KEYS = ("id", "sample_id", "index", "uid")
# Several processes or workers may write a log, so lines of this many steps may be mixed.
_OPEN_STEPS = 1000

# [samples, tokens, samples with tokens, weighted loss, weight]
_Sums = dict[str, list[float]]


def is_sample_record(record: Mapping[str, Any] | None) -> bool:
    """Whether a line is about one sample: it has a step, and a dataset by name."""
    if record is None or step_of(record) is None or is_no_log(record):
        return False
    return any(isinstance(record.get(field), str) for field in _FIELDS)


def is_no_log(record: Mapping[str, Any]) -> bool:
    """Whether a line is one of ours, but none of the stream: an alert, or an outlier."""
    return "channel_metrics" in record and "columns" not in record


def read_sample_log(path: Path, problems: Problems, progress: Progress) -> Iterator[Reading]:
    """The samples of each step per channel, and their tokens and loss, if the log has them.

    If there are token counts, the loss is weighted by them, which is exact. If not, it is the mean
    over the samples, and a note says so.
    """
    open_steps: dict[int, _Sums] = {}
    closed = -math.inf
    for number, line in lines_of(path, problems, progress):
        record = parse_object(line, path, number, problems)
        step = None if record is None else step_of(record)
        if record is None or step is None:
            if record is not None:
                problems.add(path, number, "has no step")
            continue
        if step <= closed and step not in open_steps:
            problems.add(path, number, f"is of step {step}, {_OPEN_STEPS} steps too late")
            continue
        try:
            channel = channel_of(record, _FIELDS) or UNLABELED
        except ChannelMetricsError as error:
            problems.add(path, number, str(error))
            continue
        sums = open_steps.setdefault(step, defaultdict(lambda: [0.0] * 5))
        _add(sums[channel], _first(record, _TOKEN_KEYS), _first(record, _LOSS_KEYS), problems)
        if len(open_steps) > _OPEN_STEPS:
            closed = min(open_steps)
            yield from _readings(int(closed), open_steps.pop(int(closed)))
    for step in sorted(open_steps):
        yield from _readings(step, open_steps[step])


def read_sample_order(
    path: Path, samples: Path, batch_size: int, problems: Problems, progress: Progress
) -> Iterator[Reading]:
    """The mix of each step, from the order of the samples.

    Args:
        path: one id per line, or a JSON list of ids.
        samples: JSONL with the id and the dataset of each sample, and its tokens, if known.
        batch_size: samples per step, over all ranks and micro-batches.
        problems, progress: as for all readers.
    """
    if batch_size < 1:
        raise ChannelMetricsError(f"batch_size must be at least 1, but is {batch_size}.")
    known = _known_samples(samples, problems)
    sums: _Sums = defaultdict(lambda: [0.0] * 5)
    position = 0
    for number, sample in _ids(path, problems, progress):
        if sample not in known:
            problems.add(path, number, f"names sample {sample!r}, which {samples} does not have")
        channel, tokens = known.get(sample, (UNLABELED, None))
        _add(sums[channel], tokens, None, problems)
        position += 1
        if position % batch_size == 0:
            yield from _readings(position // batch_size, sums)
            sums.clear()
    if sums:
        yield from _readings(position // batch_size + 1, sums)


def _known_samples(path: Path, problems: Problems) -> dict[str, tuple[str, float | None]]:
    known = {}
    for number, line in lines_of(path, problems, lambda _: None):
        record = parse_object(line, path, number, problems)
        if record is None:
            continue
        name = next((str(record[key]) for key in _ID_KEYS if key in record), None)
        if name is None:
            problems.add(path, number, f"has no id ({', '.join(_ID_KEYS)})")
            continue
        try:
            channel = channel_of(record, _FIELDS) or UNLABELED
        except ChannelMetricsError as error:
            problems.add(path, number, str(error))
            continue
        known[name] = channel, _first(record, _TOKEN_KEYS)
    return known


def _ids(path: Path, problems: Problems, progress: Progress) -> Iterator[tuple[int, str]]:
    """Ids of a JSON list, on one line or on many, or of plain lines."""
    for number, line in lines_of(path, problems, progress):
        text = line.strip()
        if text.startswith("[") and text.endswith("]"):
            try:
                items = json.loads(text)
            except ValueError as error:
                problems.add(path, number, f"is no JSON list ({error})")
            else:
                yield from ((number, str(item)) for item in items)
        elif name := text.strip('[]," \t'):
            yield number, name


def _add(sums: list[float], tokens: float | None, loss: float | None, problems: Problems) -> None:
    sums[0] += 1
    if tokens is not None:
        sums[1] += tokens
        sums[2] += 1
    if loss is not None and math.isfinite(loss):
        if tokens is None:
            problems.note("samples have no token counts: their losses are averaged per sample")
        weight = 1.0 if tokens is None else tokens
        sums[3] += weight * loss
        sums[4] += weight


def _readings(step: int, by_channel: _Sums) -> Iterator[Reading]:
    whole = [sum(column) for column in zip(*by_channel.values(), strict=True)]
    has_tokens = whole[2] == whole[0]
    for channel, (samples, tokens, _, weighted_loss, weight) in by_channel.items():
        yield step, Key("train", channel, "samples"), samples
        if has_tokens:
            yield step, Key("train", channel, "tokens"), tokens
        if weight:
            yield step, Key("train", channel, "loss"), weighted_loss / weight
    if whole[4]:
        yield step, Key("train", GLOBAL, "loss"), whole[3] / whole[4]


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    for key in keys:
        value = record.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _lacks_dataset(path: Path) -> str:
    record = first_with_step(path)
    if record is None:
        return "it has no JSON lines with a step"
    return "" if is_sample_record(record) else f"it has none of: {', '.join(_FIELDS)}"


SAMPLES = Format(
    name="samples",
    what="JSON lines with step and dataset of each sample",
    read=read_sample_log,
    check=_lacks_dataset,
    suffixes=(".jsonl", ".json", ".log", ".txt"),
    starts=in_folder("*.jsonl", check=_lacks_dataset, depth=1),
)

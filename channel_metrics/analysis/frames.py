"""Runs in a notebook: the log as a tidy DataFrame, and a figure of its channels.

from channel_metrics.analysis import load, plot_channels

data = load("runs/debug")
plot_channels(data)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.pictures import DASHES, PALETTE, WHOLE_RUN, styled
from channel_metrics.analysis.report.views import shown
from channel_metrics.analysis.run import load_run, run_names
from channel_metrics.analysis.write import COLUMNS
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.schema import TOKENS
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["load", "plot_channels"]

# A line is broken where the next value is this many times farther away than usual.
_GAP_FACTOR = 4.0


def load(
    *runs: str | PathLike[str],
    format: str | None = None,
    channels: Iterable[str] = (),
    axis: str = "",
) -> DataFrame:
    """Read the logs of runs as one tidy DataFrame.

    Args:
        runs: run folders or log files.
        format: which log to read, if a folder has several.
        channels: names that are channels. By default, they are inferred from the keys.
        axis: an axis whose labels stand in place of the channels. By default, labels are left out.

    Returns:
        One row per value: `run`, `split`, `channel`, `metric` (categories), `step`, `value`. The
        channel of the run's own values is "".

    Raises:
        ChannelMetricsError: if there is no log, no value in it, or no such axis.
    """
    pandas: Any = need("pandas", extra="notebook")
    if not runs:
        raise ChannelMetricsError("expected the path of at least one run, but got none.")
    paths = [Path(run) for run in runs]
    names = [*channels]
    parts = []
    for path, name in zip(paths, run_names(paths), strict=True):
        run = load_run(path, format=format, channels=names)
        run = with_axis(run, axis) if axis else replace(run, labels={})
        for key, steps, values in run.all_series():
            texts = dict(zip(COLUMNS, (name, *key), strict=False))
            parts.append(pandas.DataFrame({**texts, "step": steps, "value": values}))
    data = pandas.concat(parts, ignore_index=True)[list(COLUMNS)]
    return data.astype(dict.fromkeys(COLUMNS[:4], "category"))


def plot_channels(
    data: DataFrame,
    metric: str = "loss",
    *,
    split: str = "train",
    channels: Sequence[str] | None = None,
    smooth: int = 1,
) -> Figure:
    """A figure of one metric: a line per channel, a kind of line per run, grey for the whole run.

    Args:
        data: what `load` returns, or rows of it.
        metric: its name in `data`.
        split: `train`, `eval`, `test` or `probe`.
        channels: which are drawn. By default, the eight with the most tokens.
        smooth: the number of values of a moving mean; it is weighted by tokens if they are known.

    Raises:
        ChannelMetricsError: if `data` has no such values, or no such channel.
    """
    pyplot: Any = need("matplotlib.pyplot", extra="report")
    rows = data[(data["metric"] == metric) & (data["split"] == split)]
    if rows.empty:
        raise ChannelMetricsError(
            f"expected values of metric {metric!r} in split {split!r}, but the data has "
            f"{', '.join(sorted(map(repr, data['metric'].unique())))}."
        )
    names = _channels(rows, data) if channels is None else list(channels)
    known_names = sorted(set(rows["channel"]) - {GLOBAL})
    for name in names:
        if name not in known_names:
            raise ChannelMetricsError(
                f"expected channels of the data, but got channel {name!r}; it has "
                f"{', '.join(map(repr, known_names))}."
            )
    runs = list(dict.fromkeys(rows["run"]))
    with styled():
        figure, axis = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
        for (run, name), own in rows.groupby(["run", "channel"], observed=True):
            if name != GLOBAL and name not in names:
                continue
            steps, values = _line(own, data, smooth)
            axis.plot(
                steps,
                values,
                color=WHOLE_RUN if name == GLOBAL else PALETTE[names.index(name) % len(PALETTE)],
                linestyle=DASHES[runs.index(run) % len(DASHES)],
                marker="o" if len(own) == 1 else None,
                label=_label(run if len(runs) > 1 else "", name),
            )
        known = TOKENS.metric(metric)
        axis.set_title((known and known.label) or metric, loc="left", fontweight="bold")
        axis.set_xlabel("step")
        if rows["value"].min() >= 0:
            axis.set_ylim(bottom=0)
        axis.grid(axis="y")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        # A notebook shows what a cell returns, and would show an open figure once more.
        pyplot.close(figure)
    result: Figure = figure
    return result


def _channels(rows: DataFrame, data: DataFrame) -> list[str]:
    """The channels with the most tokens, as in the report; `unlabeled` is last."""
    names = sorted(set(rows["channel"]) - {GLOBAL})
    tokens = data[(data["metric"] == "tokens") & (data["split"] == "train")]
    counts = tokens.groupby("channel", observed=True)["value"].sum()
    names.sort(key=lambda name: (name == UNLABELED, -counts.get(name, 0.0)))
    return names[: len(PALETTE)]


def _line(own: DataFrame, data: DataFrame, smooth: int) -> tuple[Any, Any]:
    """Steps and values of a line, with a NaN in each gap."""
    own = own.sort_values("step").set_index("step")
    values = own["value"]
    if smooth > 1:
        weights = _tokens(own, data).where(values.notna())
        window = {"window": smooth, "center": True, "min_periods": 1}
        values = (values * weights).rolling(**window).sum() / weights.rolling(**window).sum()
    steps, heights = values.index.to_numpy(), values.to_numpy()
    distances = np.diff(steps)
    if not len(distances):
        return steps, heights
    gaps = np.flatnonzero(distances > _GAP_FACTOR * np.median(distances)) + 1
    return np.insert(steps, gaps, steps[gaps]), np.insert(heights, gaps, np.nan)


def _tokens(own: DataFrame, data: DataFrame) -> Any:
    """The tokens of each value; 1 where they are not known, and for counts."""
    run, split, channel, metric = own.iloc[0][list(COLUMNS[:4])]
    known = TOKENS.metric(metric)
    same = (data["run"] == run) & (data["split"] == split) & (data["metric"] == "tokens")
    tokens = data[same] if channel == GLOBAL else data[same & (data["channel"] == channel)]
    if tokens.empty or (known is not None and known.adds_up):
        return own["value"] * 0 + 1
    return tokens.groupby("step")["value"].sum().reindex(own.index).fillna(0)


def _label(run: str, name: str) -> str:
    # matplotlib leaves out names that begin with "_", so each name gets a blank before it.
    text = "whole run" if name == GLOBAL else shown(name)
    return f" {text}" + (f" · {shown(run)}" if run else "")

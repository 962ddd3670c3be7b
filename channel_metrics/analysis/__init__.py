"""Reads the logs of runs, also of runs without channel metrics: tables, estimates, reports.

    from channel_metrics.analysis import load, plot_channels
    data = load("runs/debug")           # a tidy DataFrame
    plot_channels(data, "token_acc")    # a figure

| module | what |
|---|---|
| `readers` | one reader per format, and what a log key means: (split, channel, metric) |
| `store`, `run` | readings on disk, a run |
| `summary`, `write` | the table in the terminal; parquet, CSV, TensorBoard |
| `estimate` | channel losses where only the loss of the whole run is known |
| `judging` | findings: what became NaN, got worse, or is worse than in another run |
| `report` | the report: one HTML file, and pictures |
| `frames` | for notebooks: the log as a DataFrame, a figure of its channels |
| `watch` | the log of a job that is running |

`channel_metrics.core.schema` defines the metrics, and which of them have a chart.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from channel_metrics.analysis.frames import load, plot_channels

__all__ = ["load", "plot_channels"]


def __getattr__(name: str) -> Any:
    # Imported late, because the command line must not wait for numpy.
    if name in __all__:
        from channel_metrics.analysis import frames

        return getattr(frames, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

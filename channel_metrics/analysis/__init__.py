"""Runs that are over, or that were made without us: logs -> one table -> curves, estimates, report.

    from channel_metrics.analysis.run import load_run
    run = load_run(Path("runs/debug"))
    steps, values = run.series(channel="bbu", metric="loss")

| module | what |
|---|---|
| `readers` | one reader per format, and what a log key means: (split, channel, metric) |
| `store`, `run` | readings on disk, a run |
| `summary`, `write` | the table in the terminal; parquet, CSV, TensorBoard |
| `estimate` | channel losses where only the loss of the whole run is known |
| `report` | the report: one HTML file, and pictures |
| `watch` | the log of a job that is running |

Which metrics there are, and which have a chart, is read from `channel_metrics.core.schema`.

Importing this package imports nothing else.
"""

from __future__ import annotations

__all__: list[str] = []

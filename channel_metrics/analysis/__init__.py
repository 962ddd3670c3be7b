"""Runs that are over, or that were made without us: logs -> one table -> curves, estimates, report.

    from channel_metrics.analysis.run import load_run
    run = load_run(Path("runs/debug"))
    steps, values = run.series(channel="bbu", metric="loss")

| module | what |
|---|---|
| `sources` | which log of which format a file or folder holds |
| `json_logs`, `event_files`, `trackers`, `text_logs`, `samples` | one reader per format |
| `store`, `keys`, `run` | readings on disk, log keys as (split, channel, metric), a run |
| `write` | parquet, CSV, TensorBoard |
| `mix`, `estimate`, `smoother` | channel losses where only the loss of the whole run is known |
| `findings`, `curves`, `report`, `pictures` | the report |
| `tail`, `traces`, `follow`, `watch` | the log of a job that is running |

Importing this package imports nothing else.
"""

from __future__ import annotations

__all__: list[str] = []

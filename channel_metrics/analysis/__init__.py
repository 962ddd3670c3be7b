"""Reads the logs of runs, also of runs without channel metrics: tables, estimates, reports.

    from channel_metrics.analysis.run import load_run
    run = load_run(Path("runs/debug"))
    steps, values = run.series(channel="bbu", metric="loss")

| module | what |
|---|---|
| `readers` | one reader per format, and what a log key means: (split, channel, metric) |
| `store`, `run` | readings on disk, a run |
| `summary`, `write` | the table in the terminal; parquet, CSV, TensorBoard |
| `estimate` | channel losses where only the loss of the whole run is known |
| `judging` | findings: what became NaN, got worse, or is worse than in another run |
| `report` | the report: one HTML file, and pictures |
| `watch` | the log of a job that is running |

`channel_metrics.core.schema` defines the metrics, and which of them have a chart.
"""

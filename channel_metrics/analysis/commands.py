"""The commands that read runs: analyze, report, watch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from channel_metrics.analysis.report_command import add_report_command

if TYPE_CHECKING:
    from rich.console import Console

    from channel_metrics.analysis.run import Run

__all__ = ["add_commands"]

_MAX_PROBLEMS = 8

Runs = Annotated[list[Path], typer.Argument(help="Run folders or log files.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Which log to read, where a folder has several: jsonl, trainer_state, tensorboard, "
        "wandb, mlflow, text, samples.",
    ),
]
Channels = Annotated[
    list[str] | None,
    typer.Option("--channel", help="A name that is a channel (repeatable). Default: found out."),
]


def add_commands(
    app: typer.Typer,
    reported: Callable[[], AbstractContextManager[None]],
    console: Callable[[], Console],
) -> None:
    """Add the commands to `app`.

    reported: a context that turns our errors into messages. console: makes the console.
    """

    @app.command("analyze")
    def analyze(
        runs: Runs,
        output_dir: Annotated[
            Path | None,
            typer.Option(help="Default: channel_analysis in the (first) run folder."),
        ] = None,
        format: Format = None,
        channel: Channels = None,
    ) -> None:
        """Read the logs of runs, made with channel metrics or without, as one table.

        Writes metrics.parquet, metrics.csv and TensorBoard events.
        """
        with reported():
            from channel_metrics.analysis.write import write_csv, write_events, write_parquet

            loaded = _load(runs, format, channel)
            folder = output_dir or _default_folder(runs[0])
            write_parquet(loaded, folder / "metrics.parquet")
            write_csv(loaded, folder / "metrics.csv")
            for run in loaded:
                write_events(run, folder / "tensorboard" / run.name)
                _show(run, console())
            typer.echo(f"table:       {folder / 'metrics.parquet'}, {folder / 'metrics.csv'}")
            typer.echo(f"TensorBoard: {folder / 'tensorboard'}")

    add_report_command(app, reported, _load)


def _load(paths: Sequence[Path], format: str | None, channels: Sequence[str] | None) -> list[Run]:
    from dataclasses import replace
    from functools import partial

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from channel_metrics.analysis.run import load_run, run_names
    from channel_metrics.analysis.sources import pick_source

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    names = run_names(paths)
    loaded = []
    # Redirected output gets no bar.
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        for path, name in zip(paths, names, strict=True):
            total = pick_source(path, format)[0].num_bytes
            task = progress.add_task("reading", total=total)
            run = load_run(
                path,
                format=format,
                channels=channels or (),
                progress=partial(progress.advance, task),
            )
            loaded.append(replace(run, name=name))
    return loaded


def _default_folder(run: Path) -> Path:
    from channel_metrics.analysis.sources import OUTPUT_FOLDER

    return (run if run.is_dir() else run.parent) / OUTPUT_FOLDER


def _show(run: Run, console: Console) -> None:
    from channel_metrics.analysis.findings import final_rows
    from channel_metrics.summary import render

    typer.echo(f"{run.name}: {len(run.store):,} values of {len(run.channels())} channels")
    typer.echo(f"read from {run.origin}")
    for note in run.problems.notes:
        typer.echo(f"note: {note}")
    if run.problems.count:
        typer.echo(f"{run.problems.count} places could not be read:", err=True)
        for example in run.problems.examples[:_MAX_PROBLEMS]:
            typer.echo(f"  {example}", err=True)
    rows = final_rows(run)
    if rows:
        console.print(render(rows, ratios=run.ratios))
    else:
        typer.echo("no channel was found; name them with --channel, or see docs/analysis.md.")

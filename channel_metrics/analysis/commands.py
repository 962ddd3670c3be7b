"""The commands that read runs: analyze, report, watch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from channel_metrics.analysis.report.command import FailOnOption, add_report_command
from channel_metrics.analysis.watch.command import add_watch_command
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from rich.console import Console

    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run

__all__ = ["add_commands"]

_MAX_PROBLEMS = 8
_BYTES_PER_ADVANCE = 1 << 20

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

    Args:
        app: the command line.
        reported: makes a context that turns our errors into messages.
        console: makes the console.
    """

    @app.command("analyze")
    def analyze(  # noqa: PLR0917 - the options of a command
        runs: Runs,
        output_dir: Annotated[
            Path | None,
            typer.Option(help="Default: channel_analysis in the (first) run folder."),
        ] = None,
        format: Format = None,
        channel: Channels = None,
        samples: Annotated[
            Path | None,
            typer.Option(
                help="What was in each step: a per-sample JSONL log; or, with --sample-data and "
                "--batch-size, a list of sample ids in the order of the training."
            ),
        ] = None,
        sample_data: Annotated[
            Path | None, typer.Option(help="JSONL with the id and the dataset of each sample.")
        ] = None,
        batch_size: Annotated[
            int | None, typer.Option(min=1, help="Samples per step, over all ranks.")
        ] = None,
        fail_on: FailOnOption = None,
    ) -> None:
        """Read the logs of runs, made with channel metrics or without, as one table.

        Writes metrics.parquet, metrics.csv and TensorBoard events. Where the log has only the
        loss of the whole run, but it is known what was in each step, the losses of the channels are
        estimated, with 95 % bands; points that the mix does not determine are left out.
        """
        with reported():
            from channel_metrics.analysis.judging.finding import is_worse
            from channel_metrics.analysis.judging.told import findings_of
            from channel_metrics.analysis.readers.sources import OUTPUT_FOLDER
            from channel_metrics.analysis.report.views import views_of
            from channel_metrics.analysis.run import folder_of
            from channel_metrics.analysis.write import write_csv, write_events, write_parquet

            loaded = _load(runs, format, channel)
            loaded = _with_estimates(loaded, samples, sample_data, batch_size)
            folder = output_dir or folder_of(runs[0]) / OUTPUT_FOLDER
            write_parquet(loaded, folder / "metrics.parquet")
            write_csv(loaded, folder / "metrics.csv")
            views = views_of(loaded)
            for view in views:
                write_events(view.run, folder / "tensorboard" / view.run.name)
                _show(view, console())
            typer.echo(f"table:       {folder / 'metrics.parquet'}, {folder / 'metrics.csv'}")
            typer.echo(f"TensorBoard: {folder / 'tensorboard'}")
            if fail_on and any(is_worse(findings_of(view)) for view in views):
                raise typer.Exit(1)

    add_report_command(app, reported, _load)
    add_watch_command(app, reported, console)


def _load(paths: Sequence[Path], format: str | None, channels: Sequence[str] | None) -> list[Run]:
    from dataclasses import replace

    from channel_metrics.analysis.readers.sources import pick_source
    from channel_metrics.analysis.run import load_run, run_names

    loaded = []
    for path, name in zip(paths, run_names(paths), strict=True):
        with _progress(pick_source(path, format)[0].num_bytes) as advance:
            run = load_run(path, format=format, channels=channels or (), progress=advance)
        loaded.append(replace(run, name=name))
    return loaded


def _with_estimates(
    runs: list[Run], samples: Path | None, sample_data: Path | None, batch_size: int | None
) -> list[Run]:
    from channel_metrics.analysis.estimate.mix import load_mix, with_estimates

    if samples is None:
        if sample_data or batch_size:
            raise ChannelMetricsError(
                "--sample-data and --batch-size explain --samples; give the order of the samples."
            )
        return [with_estimates(run) for run in runs]
    if len(runs) > 1:
        raise ChannelMetricsError(
            f"--samples tells what was in one run, but there are {len(runs)}; analyze one."
        )
    size = samples.stat().st_size if samples.is_file() else 0
    with _progress(size) as advance:
        mix = load_mix(samples, sample_data=sample_data, batch_size=batch_size, progress=advance)
    return [with_estimates(runs[0], mix)]


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    # An update of the bar per line would take longer than reading the line.
    waiting = 0
    with Progress(
        *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    ) as bar:
        task = bar.add_task("reading", total=num_bytes)

        def advance(count: int) -> None:
            nonlocal waiting
            waiting += count
            if waiting >= _BYTES_PER_ADVANCE:
                bar.advance(task, waiting)
                waiting = 0

        yield advance


def _show(view: RunView, console: Console) -> None:
    from channel_metrics.analysis.judging.finding import lines_of
    from channel_metrics.analysis.judging.told import findings_of
    from channel_metrics.analysis.summary import render

    run = view.run
    typer.echo(f"{run.name}: {len(run.store):,} values of {len(run.channels())} channels")
    typer.echo(f"read from {run.origin}")
    for note in run.problems.notes:
        typer.echo(f"note: {note}")
    if run.problems.count:
        typer.echo(f"{run.problems.count} places could not be read:", err=True)
        for example in run.problems.examples[:_MAX_PROBLEMS]:
            typer.echo(f"  {example}", err=True)
    rows = [row.row for row in view.rows]
    if rows:
        console.print(render(rows, console.width, ratios=run.ratios))
    else:
        typer.echo("no channel was found; name them with --channel, or see docs/analysis.md.")
    typer.echo("\n".join(lines_of(findings_of(view))))

"""The commands that read runs: analyze, report, watch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from channel_metrics.analysis.report.command import AxisOption, FailOnOption, add_report_command
from channel_metrics.analysis.watch.command import add_watch_command
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from rich.console import Console

    from channel_metrics.analysis.judging.finding import Finding
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run

__all__ = ["add_commands"]

_MAX_PROBLEMS = 8

Runs = Annotated[list[Path], typer.Argument(help="Run folders or log files.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="Which log to read, where a folder has several: jsonl, trainer_state, trainer_log, "
        "tensorboard, wandb, mlflow, trackio, swanlab, mlflow-db, csv, text, samples.",
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
        axis: AxisOption = "",
        fail_on: FailOnOption = None,
        csv: Annotated[
            bool, typer.Option("--csv", help="Write metrics.csv, too; it is larger than the log.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Read the logs of runs, made with channel metrics or without, as one table.

        Writes metrics.parquet and TensorBoard events. Where the log has only the loss of the whole
        run, but it is known what was in each step, the losses of the channels are estimated, with
        95 % bands; points that the mix does not determine are left out.
        """
        with reported():
            from channel_metrics.analysis.axes import with_axis
            from channel_metrics.analysis.judging.finding import is_worse
            from channel_metrics.analysis.judging.told import judged
            from channel_metrics.analysis.readers.sources import OUTPUT_FOLDER
            from channel_metrics.analysis.run import folder_of
            from channel_metrics.extras import check_installed

            check_installed("numpy", "pyarrow", "tensorboard", extra="report")
            loaded = _load(runs, format, channel)
            loaded = _with_estimates(loaded, samples, sample_data, batch_size)
            folder = output_dir or folder_of(runs[0]) / OUTPUT_FOLDER
            views, found = judged([with_axis(run, axis) for run in loaded] if axis else loaded)
            files = _write(loaded, folder, with_csv=csv)
            if as_json:
                _print_json(views, found, files)
            else:
                for view, findings in zip(views, found, strict=True):
                    _show(view, findings, console())
                typer.echo(f"table:       {', '.join(map(str, files))}")
                typer.echo(f"TensorBoard: {folder / 'tensorboard'}")
            if fail_on and any(map(is_worse, found)):
                raise typer.Exit(1)

    add_report_command(app, reported, _load, _show_notes)
    add_watch_command(app, reported, console)


def _load(paths: Sequence[Path], format: str | None, channels: Sequence[str] | None) -> list[Run]:
    from dataclasses import replace

    from channel_metrics.analysis.progress import bar
    from channel_metrics.analysis.run import load_run, run_names

    loaded = []
    for path, name in zip(paths, run_names(paths), strict=True):
        with bar(f"reading {name}") as (advance, expect):
            run = load_run(
                path, format=format, channels=channels or (), progress=advance, expect=expect
            )
        loaded.append(replace(run, name=name))
    return loaded


def _with_estimates(
    runs: list[Run], samples: Path | None, sample_data: Path | None, batch_size: int | None
) -> list[Run]:
    from channel_metrics.analysis.estimate.mix import load_mix, with_estimates
    from channel_metrics.analysis.progress import bar, phase

    if samples is None:
        if sample_data or batch_size:
            raise ChannelMetricsError(
                "--sample-data and --batch-size explain --samples; give the order of the samples."
            )
        with phase("estimating the losses of channels that were not logged"):
            return [with_estimates(run) for run in runs]
    if len(runs) > 1:
        raise ChannelMetricsError(
            f"--samples tells what was in one run, but there are {len(runs)}; analyze one."
        )
    size = samples.stat().st_size if samples.is_file() else 0
    with bar(f"reading {samples.name}", size) as (advance, _):
        mix = load_mix(samples, sample_data=sample_data, batch_size=batch_size, progress=advance)
    with phase("estimating the losses of the channels"):
        return [with_estimates(runs[0], mix)]


def _write(runs: Sequence[Run], folder: Path, *, with_csv: bool) -> list[Path]:
    from channel_metrics.analysis.progress import bar
    from channel_metrics.analysis.write import write_csv, write_events, write_parquet

    total = sum(len(run.store) for run in runs)
    files = [folder / "metrics.parquet"]
    with bar("writing metrics.parquet", total) as (advance, _):
        write_parquet(runs, files[0], advance)
    if with_csv:
        files.append(folder / "metrics.csv")
        with bar("writing metrics.csv", total) as (advance, _):
            write_csv(runs, files[1], advance)
    with bar("writing TensorBoard events", total) as (advance, _):
        for run in runs:
            write_events(run, folder / "tensorboard" / run.name, advance)
    return files


def _print_json(
    views: Sequence[RunView], found: Sequence[Sequence[Finding]], files: Sequence[Path]
) -> None:
    from channel_metrics.analysis.as_json import runs_json, text_of

    typer.echo(text_of({"runs": runs_json(views, found), "files": [str(file) for file in files]}))


def _show(view: RunView, findings: Sequence[Finding], console: Console) -> None:
    from channel_metrics.analysis.judging.finding import lines_of
    from channel_metrics.analysis.summary import render

    _show_notes(view.run)
    rows, whole = [row.row for row in view.rows], view.whole
    if rows or whole.last_loss is not None:
        has_whole = whole.last_loss is not None or whole.eval_loss is not None
        shown = [whole, *rows] if has_whole else rows
        console.print(render(shown, console.width, ratios=view.run.ratios))
    if not rows:
        typer.echo("no channel was found; name them with --channel, or see docs/analysis.md.")
    typer.echo("\n".join(lines_of(findings)))


def _show_notes(run: Run) -> None:
    """What was read, what was left aside, and what could not be read."""
    num_channels = len(run.channels())
    ending = "" if num_channels == 1 else "s"
    typer.echo(f"{run.name}: {len(run.store):,} values of {num_channels:,} channel{ending}")
    typer.echo(f"read from {run.origin}")
    for note in run.problems.notes:
        typer.echo(f"note: {note}")
    if run.problems.count:
        typer.echo(f"{run.problems.count} places could not be read:", err=True)
        for example in run.problems.examples[:_MAX_PROBLEMS]:
            typer.echo(f"  {example}", err=True)

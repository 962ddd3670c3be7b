"""The command `channel-metrics report`, and the report at the end of a training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.finding import Finding
    from channel_metrics.analysis.report.html import ReportSize
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run

__all__ = [
    "REPORT_FILE",
    "AxisOption",
    "FailOn",
    "FailOnOption",
    "add_report_command",
    "report_of_training",
]

REPORT_FILE = "report.html"


class FailOn(str, Enum):
    """Findings that end a command with exit code 1."""

    worse = "worse"


FailOnOption = Annotated[
    FailOn | None,
    typer.Option(
        "--fail-on",
        help="worse: exit code 1 if a loss became NaN, rose, or is above that of the first run.",
    ),
]

AxisOption = Annotated[
    str, typer.Option("--axis", help="Show the labels of this axis in place of the channels.")
]

Load = Callable[[Sequence[Path], "str | None", "Sequence[str] | None"], "list[Run]"]


def add_report_command(
    app: typer.Typer,
    reported: Callable[[], AbstractContextManager[None]],
    load: Load,
    show_notes: Callable[[Run], None],
) -> None:
    """Add `report` to `app`.

    Args:
        app: the command line.
        reported: makes a context that turns our errors into messages.
        load: reads runs, given their paths, a format, and names that are channels.
        show_notes: prints what was read of a run, and what was left aside.
    """

    @app.command("report")
    def report(  # noqa: PLR0917 - the options of a command
        runs: Annotated[
            list[Path],
            typer.Argument(help="Run folders or log files; several are compared with the first."),
        ],
        output: Annotated[
            Path | None,
            typer.Option(help=f"Default: {REPORT_FILE} in the (first) run folder."),
        ] = None,
        pictures: Annotated[
            bool, typer.Option(help="Write the main plots as PNG and SVG beside it, too.")
        ] = True,
        title: Annotated[str, typer.Option(help="Default: the names of the runs.")] = "",
        format: Annotated[
            str | None, typer.Option("--format", help="Which log to read; see analyze.")
        ] = None,
        channel: Annotated[
            list[str] | None, typer.Option("--channel", help="A name that is a channel.")
        ] = None,
        axis: AxisOption = "",
        fail_on: FailOnOption = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Write one HTML file about runs, which needs no network: curves, mix, findings, table."""
        with reported():
            from channel_metrics.analysis.axes import with_axis
            from channel_metrics.analysis.judging.finding import is_worse, lines_of
            from channel_metrics.analysis.judging.told import judged
            from channel_metrics.analysis.progress import phase
            from channel_metrics.analysis.report.html import write_views
            from channel_metrics.analysis.run import folder_of
            from channel_metrics.extras import check_installed

            drawn_with = ("matplotlib",) if pictures else ()
            check_installed("numpy", "jinja2", *drawn_with, extra="report")
            loaded = load(runs, format, channel)
            loaded = [with_axis(run, axis) for run in loaded] if axis else loaded
            file = output or folder_of(runs[0]) / REPORT_FILE
            views, found = judged(loaded)
            with phase(f"writing {file.name}"):
                size = write_views(views, found, file, title=title)
            drawn: list[Path] = []
            if pictures:
                from channel_metrics.analysis.report.pictures import write_pictures

                with phase("drawing the pictures"):
                    drawn = write_pictures(loaded, file.parent / f"{file.stem}_pictures")
            if as_json:
                _print_json(views, found, file, drawn)
            else:
                for run, findings in zip(loaded, found, strict=True):
                    show_notes(run)
                    typer.echo("\n".join(lines_of(findings)))
                _show_files(size, file, drawn)
            if fail_on and any(map(is_worse, found)):
                raise typer.Exit(1)


def _show_files(size: ReportSize, file: Path, pictures: Sequence[Path]) -> None:
    typer.echo(f"report:   {file} ({size.num_bytes / 1e6:.1f} MB)")
    if size.num_left_out:
        typer.echo(f"note:     {size.num_left_out} small channels were left out", err=True)
    if pictures:
        names = ", ".join(path.name for path in pictures)
        typer.echo(f"pictures: {pictures[0].parent} ({names})")


def _print_json(
    views: Sequence[RunView],
    found: Sequence[Sequence[Finding]],
    file: Path,
    pictures: Sequence[Path],
) -> None:
    from channel_metrics.analysis.as_json import runs_json, text_of

    content = {
        "runs": runs_json(views, found),
        "report": str(file),
        "pictures": [str(picture) for picture in pictures],
    }
    typer.echo(text_of(content))


def report_of_training(folder: Path, format: str, channels: Sequence[str] = ()) -> str:
    """Write the report of a run that has just ended.

    Args:
        folder: the run folder.
        format: which of its logs is read.
        channels: names that are channels.

    Returns:
        A line that says where the report is. If there is none, because of an error or because a
        package is missing, the line says why. Nothing is raised, because the training is done.
    """
    if not all(map(importlib.util.find_spec, ("jinja2", "numpy"))):
        return "report:      none; pip install 'channel_metrics[report]' brings it"
    from channel_metrics.analysis.report.html import write_report
    from channel_metrics.analysis.run import load_run

    file = folder / REPORT_FILE
    try:
        write_report([load_run(folder, format=format, channels=channels)], file)
    except (ChannelMetricsError, OSError) as error:
        return f"report:      none, because of an error: {error}"
    return f"report:      {file}"

"""The command `channel-metrics`: those of its own, and those that are added from other modules."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from channel_metrics.errors import ChannelMetricsError

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"the commands need {missing.name}, which is not installed; run: "
        "pip install 'channel_metrics[cli]'"
    ) from None

from channel_metrics.analysis.commands import add_commands
from channel_metrics.cli.reference_command import add_reference

if TYPE_CHECKING:
    from rich.console import Console

    from channel_metrics.cli.check import CheckResult
    from channel_metrics.demo.config import TrainConfig
    from channel_metrics.demo.train import TrainSummary

__all__ = ["app", "main"]

app = typer.Typer(
    help="Exact training metrics per dataset: bbu_loss, lvis_token_acc, tokens, share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with rich, the help takes twice as long
    context_settings={"max_content_width": 120},
)

# The width of output that is not a terminal. No table is wider.
_PLAIN_WIDTH = 160


def main() -> None:
    """Entry point. A script starts after click has returned, which would catch its exceptions."""
    scripts: list[Callable[[], None]] = []
    try:
        app(obj=scripts)
    except SystemExit as done:
        if done.code or not scripts:
            raise
    for start in scripts:
        start()


@app.command("train")
def train_command(
    config: Annotated[Path, typer.Argument(help="YAML: sources, model, training, metrics.")],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Run folder. Default: training.output_dir, else runs/NAME-OF-CONFIG."),
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
) -> None:
    """Train with the transformers Trainer on a mixture of sources, and show every channel.

    Exit code 2 if the config or the data cannot be used; the message says what to do.
    """
    with _reported_errors():
        from channel_metrics.demo.config import load_config
        from channel_metrics.demo.train import train

        settings = load_config(config)
        folder = output_dir or Path(settings.training.get("output_dir") or f"runs/{config.stem}")
        # Progress bars go to stderr.
        quiet = not sys.stderr.isatty()
        summary = train(settings, output_dir=folder, max_steps=max_steps, quiet=quiet)
        if summary.is_main:
            _show_run(summary, settings)


@app.command("check")
def check_command(
    data: Annotated[
        list[Path] | None, typer.Argument(help="JSONL files, or the YAML of a run.")
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="Record field that holds the channel (dotted; repeatable)."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML of the metrics, or of a run: its tokenizer and sources, too."),
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which channels the data has: field, records, tokens, names that would be refused.

    Exit code 0 if training could use the channels; 1 if there are none, or some would be refused;
    2 if the data cannot be read.
    """
    with _reported_file_errors():
        from channel_metrics.cli.check import as_json_text, check_data

        result = check_data(data or [], fields=field or [], config_path=config)
        if as_json:
            typer.echo(as_json_text(result))
        else:
            _show_check(result)
    if result.problems or not result.has_channel:
        raise typer.Exit(1)


@app.command("doctor")
def doctor_command(
    patch: Annotated[
        list[str] | None,
        typer.Option(help="Try only this patch (repeatable). Default: all that are installed."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of the metrics, as for run --config.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL file to look for channels (repeatable).")
    ] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a bug report needs: versions, patches that apply, config, channels of a file.

    Exit code 0 if what was asked for would work, 1 if not; 2 for an unknown patch.
    """
    from channel_metrics.cli.diagnosis import diagnose
    from channel_metrics.cli.doctor import has_problem, lines

    with _reported_errors():
        report = diagnose(patch or (), config, data or ())
    text = json.dumps(report, indent=2, ensure_ascii=False) if as_json else "\n".join(lines(report))
    typer.echo(text)
    if has_problem(report, patch or ()):
        raise typer.Exit(1)


@app.command("run", context_settings={"allow_interspersed_args": False})
def run_command(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="The training script; with -m, a module.")],
    args: Annotated[
        list[str] | None, typer.Argument(help="Everything after SCRIPT belongs to it.")
    ] = None,
    patch: Annotated[
        list[str] | None, typer.Option(help="What to patch, e.g. hf_trainer (repeatable).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of the metrics, or of a run with a section metrics.")
    ] = None,
    *,
    as_module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")
    ] = False,
) -> None:
    """Run an unmodified training script with channel metrics.

    Options of ours come before SCRIPT. Output, exit code and signals are those of the script.
    """
    start = partial(_run_script, script, list(args or []), list(patch or []), config, as_module)
    if isinstance(context.obj, list):
        context.obj.append(start)
    else:
        start()


def _run_script(
    script: str, args: list[str], patches: list[str], config: Path | None, as_module: bool
) -> None:
    from channel_metrics.cli.run_script import run_script
    from channel_metrics.startup import sitecustomize

    try:
        run_script(script, args, patches, config, as_module=as_module)
    except ChannelMetricsError as error:
        frames = traceback.walk_tb(error.__traceback__)
        modules = {frame.f_globals.get("__name__") for frame, _ in frames}
        if "runpy" in modules and sitecustomize.__name__ not in modules:
            raise  # The script raised it, and not a patch, so its traceback is shown.
        _fail(error)


@contextmanager
def _reported_errors() -> Iterator[None]:
    """End the command with the message and exit code 2 for our own errors."""
    try:
        yield
    except ChannelMetricsError as error:
        _fail(error)


@contextmanager
def _reported_file_errors() -> Iterator[None]:
    """The same for what the disk refuses: a file that cannot be read or written, no room."""
    with _reported_errors():
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(error)


def _fail(error: Exception) -> NoReturn:
    typer.echo(f"error: {error}", err=True)
    raise SystemExit(2) from None


def _console() -> Console:
    from rich.console import Console

    # Brackets in the name of a channel are not markup.
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, markup=False)


add_commands(app, _reported_file_errors, _console)
add_reference(app, _reported_file_errors)


def _show_run(summary: TrainSummary, settings: TrainConfig) -> None:
    from channel_metrics.analysis.report.command import report_of_training
    from channel_metrics.analysis.summary import render

    console = _console()
    table = render(
        summary.rows,
        console.width,
        ratios={source.name: source.ratio for source in settings.sources},
        domains={source.name: source.domain for source in settings.sources},
    )
    console.print(table)
    if summary.num_skipped:
        console.print(
            f"{summary.num_skipped} records were left out: their answers begin after max_length = "
            f"{settings.max_length} tokens."
        )
    # Not with rich, which would wrap a path.
    typer.echo(f"run folder:  {summary.output_dir}")
    typer.echo(f"TensorBoard: tensorboard --logdir {shlex.quote(str(summary.output_dir))}")
    typer.echo(report_of_training(summary.output_dir, "trainer_state"))


def _show_check(result: CheckResult) -> None:
    from channel_metrics.cli.check import render

    for name in result.fields:
        typer.echo(f"field {name}: channel of {result.found_in[name]:,} records")
    if result.found_in[None]:
        typer.echo(f"no field: {result.found_in[None]:,} records, counted as unlabeled")
    _console().print(render(result))
    for problem in result.problems:
        typer.echo(f"problem: {problem}")
    if not result.has_channel:
        typer.echo(
            "no record has a channel: name the field that holds it with --field, or add one.",
            err=True,
        )

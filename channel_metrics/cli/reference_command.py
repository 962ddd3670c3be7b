"""The command `channel-metrics reference`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_reference"]


def add_reference(app: typer.Typer, reported: Callable[[], AbstractContextManager[None]]) -> None:
    """Add the command to `app`; `reported` prints errors, and exits with code 2."""

    @app.command("reference")
    def reference_command(
        model: Annotated[str, typer.Argument(help="A model of transformers: a folder or a name.")],
        data: Annotated[
            Path, typer.Argument(help="JSONL: input_ids and labels, or messages, or text.")
        ],
        *,
        output: Annotated[
            Path | None, typer.Option(help="File to write. Default: DATA with .reference.jsonl.")
        ] = None,
        id_field: Annotated[
            str, typer.Option("--id", help="Write only this field and the numbers.")
        ] = "",
        tokenizer: Annotated[str, typer.Option(help="Default: that of the model.")] = "",
        max_length: Annotated[int, typer.Option(min=0, help="Cut records, as in training.")] = 0,
        batch_size: Annotated[int, typer.Option(min=1, help="Records per forward.")] = 8,
        device: Annotated[str, typer.Option(help="Default: a GPU if there is one.")] = "",
        dtype: Annotated[str, typer.Option(help="Such as bfloat16. Default: the model's.")] = "",
    ) -> None:
        """Write the losses of a reference model beside each record, for the metric excess_loss.

        A run that was stopped goes on where it was. Exit code 2 if the data or the model cannot
        be used.
        """
        with reported():
            from channel_metrics.cli.reference import ReferenceOptions, write_reference

            out = output or data.with_suffix(".reference.jsonl")
            options = ReferenceOptions(
                model=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                device=device,
                dtype=dtype,
            )
            with _progress(data) as done:
                before = write_reference(data, out, options, id_field=id_field, done=done)
            typer.echo(f"{out}{f' ({before} records were there already)' if before else ''}")


@contextmanager
def _progress(data: Path) -> Iterator[Callable[[int], object]]:
    """A bar over the records of a file; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    shown = sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(data.name, total=None)
        if shown and data.is_file():
            with data.open("rb") as lines:
                bar.update(task, total=sum(1 for line in lines if line.strip()))
        yield lambda count: bar.advance(task, count)

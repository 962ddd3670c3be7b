"""The command `channel-metrics watch`: the log of a running job, live in the terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from channel_metrics.analysis.report.command import AxisOption
from channel_metrics.errors import ChannelMetricsError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from channel_metrics.analysis.watch.follow import Follower
    from channel_metrics.analysis.watch.screen import View

__all__ = ["add_watch_command"]

# Lines of the terminal that are not channels: header, head of the table, whole run, note.
_OTHER_LINES = 11


def add_watch_command(
    app: typer.Typer,
    reported: Callable[[], AbstractContextManager[None]],
    console: Callable[[], Console],
) -> None:
    """Add `watch` to `app`; for the arguments see `add_commands`."""

    @app.command("watch")
    def watch(  # noqa: PLR0917 - the options of a command
        run: Annotated[Path, typer.Argument(help="Run folder or log file; it may be made later.")],
        interval: Annotated[
            float, typer.Option(min=0.05, help="Seconds between looks at the log.")
        ] = 2.0,
        once: Annotated[bool, typer.Option("--once", help="Show one table and end.")] = False,
        sort: Annotated[
            str, typer.Option(help="share, loss, change (largest first), name, or log.")
        ] = "share",
        top: Annotated[
            int | None,
            typer.Option(min=1, help="At most so many channels. Default: as many as have room."),
        ] = None,
        format: Annotated[
            str | None, typer.Option("--format", help="Which log to read; see analyze.")
        ] = None,
        channel: Annotated[
            list[str] | None, typer.Option("--channel", help="A name that is a channel.")
        ] = None,
        axis: AxisOption = "",
        as_json: Annotated[
            bool, typer.Option("--json", help="With --once: print JSON instead of a table.")
        ] = False,
    ) -> None:
        """Follow the log of a running job: the channels as a table that is kept up to date.

        Where the output is no terminal, a line of text for each new step that is seen. Ctrl-C ends
        it, with exit code 0; with --once, exit code 2 if there is nothing to show.
        """
        with reported():
            if as_json and not once:
                raise ChannelMetricsError("--json is one answer; give --once, too.")
            _Watch(
                run,
                format=format,
                channels=channel or [],
                axis=axis,
                order=sort,
                top=top,
                console=console(),
            ).start(interval, once, as_json)


class _Watch:
    def __init__(
        self,
        run: Path,
        *,
        format: str | None,
        channels: list[str],
        axis: str,
        order: str,
        top: int | None,
        console: Console,
    ) -> None:
        from channel_metrics.extras import need

        need("numpy", extra="report")
        from channel_metrics.analysis.readers.readings import Problems
        from channel_metrics.analysis.watch.follow import Follower
        from channel_metrics.analysis.watch.labels import LabelFinder
        from channel_metrics.analysis.watch.screen import ORDERS

        if order not in ORDERS:
            raise ChannelMetricsError(
                f"--sort: expected one of {', '.join(ORDERS)}, but got {order!r}."
            )
        self.follower: Follower = Follower(run, format)
        self.console = console
        self._labels = LabelFinder(self.follower)
        self._axes: list[str] = []
        self._axis = axis
        self._channels = channels
        self._ratios: dict[str, float] = {}
        self._ratio_problems = Problems()
        self._order = order
        self._top = top
        self._view: View | None = None

    def start(self, interval: float, once: bool, as_json: bool) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names may have characters that the terminal cannot show.
            sys.stdout.reconfigure(errors="replace")
        try:
            if once:
                self._show_once(as_json)
            elif self.console.is_terminal and not self.console.is_dumb_terminal:
                self._draw(interval)
            else:
                self._write_lines(interval)
        except KeyboardInterrupt:
            pass  # Users end it with Ctrl-C.
        finally:
            self.follower.close()

    def _show_once(self, as_json: bool) -> None:
        from channel_metrics.analysis.axes import check_axis

        view = self._look(to_end=True)
        if not self.follower.traces:
            raise ChannelMetricsError(self.follower.waiting_for)
        if self._axis:
            check_axis(self._axis, self._axes, self.follower.run.name)
        if as_json:
            from channel_metrics.analysis.watch.as_json import view_text

            typer.echo(view_text(self.follower, view, self._top))
        else:
            self.console.print(self._screen(self._top))

    def _draw(self, interval: float) -> None:
        from rich.live import Live
        from rich.text import Text

        from channel_metrics.analysis.watch.screen import MAX_ALERTS

        first = Text(f"reading {self._name()} ...")
        with Live(first, console=self.console, auto_refresh=False) as live:
            live.refresh()
            while True:
                self._look()
                others = _OTHER_LINES + min(len(self.follower.alerts), MAX_ALERTS)
                room = max(1, self.console.height - others)
                live.update(self._screen(min(self._top or room, room)), refresh=True)
                time.sleep(interval)

    def _write_lines(self, interval: float) -> None:
        from channel_metrics.analysis.report.views import shown
        from channel_metrics.analysis.watch.screen import alert_line, line_of

        said, step, told = "", None, 0
        while True:
            view = self._look()
            if self.follower.waiting_for not in ("", said):
                typer.echo(f"waiting: {shown(self.follower.waiting_for)}", err=True)
            said = self.follower.waiting_for
            if view.step is not None and view.step != step:
                step = view.step
                typer.echo(line_of(view, self._top))
                for alert in self.follower.alerts[told:]:
                    typer.echo(alert_line(alert))
                told = len(self.follower.alerts)
                sys.stdout.flush()
            time.sleep(interval)

    def _look(self, *, to_end: bool = False) -> View:
        from channel_metrics.analysis.run import configured_ratios
        from channel_metrics.analysis.watch.screen import view_of

        if self.follower.look(to_end=to_end) or self._view is None:
            if not self._ratios and not self._ratio_problems.count:
                # The file is written when the training begins, maybe later than this.
                self._ratios = configured_ratios(self.follower.run, self._ratio_problems)
            names = [*self._channels, *self._ratios]
            self._axes = self._labels.axes(names)
            self._view = view_of(
                self.follower.traces,
                channels=names,
                order=self._order,
                axes=self._axes,
                axis=self._axis,
            )
        return self._view

    def _screen(self, max_rows: int | None) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        from channel_metrics.analysis.report.views import shown
        from channel_metrics.analysis.watch.screen import header, render

        view = self._view
        assert view is not None
        is_ascii = not self.console.encoding.lower().startswith("utf")
        lines = [*header(self.follower, view), *self._about_labels()]
        lines += [shown(example) for example in self._ratio_problems.examples]
        if not self.follower.traces:
            return Group(*map(Text, lines))
        texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(
            *texts, render(view, width=self.console.width, max_rows=max_rows, is_ascii=is_ascii)
        )

    def _about_labels(self) -> list[str]:
        from channel_metrics.analysis.axes import note_of
        from channel_metrics.analysis.report.views import shown

        if self._axis and self._axis not in self._axes:
            return [f"waiting: the log has no labels of the axis {shown(self._axis)} yet"]
        if self._axes and not self._axis:
            return [shown(note_of(self._axes))]
        return []

    def _name(self) -> str:
        from channel_metrics.analysis.report.views import shown

        return shown(str(self.follower.run))

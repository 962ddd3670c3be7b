"""The contents of the report's texts and tables, as one object per run, channel and finding."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from channel_metrics.analysis.axes import with_axis
from channel_metrics.analysis.judging.nonfinite import nonfinite_of
from channel_metrics.analysis.judging.trends import trends_of
from channel_metrics.analysis.judging.versus import versus_of
from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.curves import is_over_run
from channel_metrics.analysis.report.findings import find_gaps, self_check
from channel_metrics.analysis.rows import final_rows, total_of, whole_row
from channel_metrics.core.labels import UNLABELED

if TYPE_CHECKING:
    from channel_metrics.analysis.judging.nonfinite import NonFinite
    from channel_metrics.analysis.judging.trends import Trend
    from channel_metrics.analysis.judging.versus import Versus
    from channel_metrics.analysis.report.findings import Gap, SelfCheck
    from channel_metrics.analysis.run import Run
    from channel_metrics.analysis.summary import ChannelRow

__all__ = ["ChannelView", "GapView", "RunView", "rank_channels", "shown", "views_of"]

_MAX_NAME = 160
# The share of the records is off if it differs by more than random drawing explains.
_MIX_SIGMAS = 4.0
_MIX_POINTS = 0.02
# Above this, the difference to the trainer's loss is more than rounding.
_EXACT = 1e-3
_CLOSE = 0.05
# Persian and emoji need these characters.
_JOINERS = (0x200C, 0x200D)


@dataclass(frozen=True, kw_only=True)
class ChannelView:
    """A channel in a run: one line of the tables."""

    run: int
    """The index of the run."""

    index: int
    """The index of the channel in the report."""

    name: str
    """The name as it is shown."""

    row: ChannelRow
    """Its values."""

    configured: float | None
    """The configured share of the records."""

    samples: int | None
    """The number of records."""

    nonfinite: int
    """Tokens whose loss was NaN or infinite."""

    is_estimate: bool
    """Whether its loss is an estimate."""

    versus: Versus | None
    """Its loss compared with that of the first run."""

    @property
    def off(self) -> float | None:
        """The achieved share of the records minus the configured one."""
        if self.configured is None or self.row.record_share is None:
            return None
        return self.row.record_share - self.configured

    @property
    def is_off(self) -> bool:
        """Whether that is more than random drawing of records explains."""
        if self.off is None or not self.samples or self.configured is None:
            return False
        whole = self.samples / self.row.record_share if self.row.record_share else self.samples
        sigma = math.sqrt(self.configured * (1 - self.configured) / whole)
        return abs(self.off) > max(_MIX_POINTS, _MIX_SIGMAS * sigma)


@dataclass(frozen=True, kw_only=True)
class GapView:
    """A stretch without a channel. place: its begin and end, in percent of the run."""

    name: str
    gap: Gap
    place: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The contents about one run."""

    index: int
    name: str
    run: Run
    steps: tuple[int, int]
    """The first and the last step."""

    losses: tuple[float, float] | None
    """The first and the last loss of the run itself."""

    whole: ChannelRow
    """The values of the whole run."""

    rows: Sequence[ChannelView]
    trends: Sequence[Trend]
    nonfinite_losses: Sequence[NonFinite]
    gaps: Sequence[GapView]
    check: SelfCheck | None

    first_name: str = ""
    """The name of the run that it is compared with."""

    versus: Sequence[Versus] = ()
    """The comparison with this run."""

    @property
    def tokens(self) -> int | None:
        """The tokens of all channels."""
        return self.whole.tokens

    @property
    def verdict(self) -> str:
        """`exact`, `close`, `uneven` (mostly close) or `differs`; empty without a check."""
        if self.check is None:
            return ""
        if self.check.largest <= _EXACT:
            return "exact"
        if self.check.largest <= _CLOSE:
            return "close"
        return "uneven" if self.check.median <= _CLOSE else "differs"

    @property
    def off(self) -> list[ChannelView]:
        """The channels whose share of the records is not the configured one."""
        return [view for view in self.rows if view.is_off]

    @property
    def nonfinite(self) -> list[ChannelView]:
        """The channels that had tokens without a finite loss."""
        return [view for view in self.rows if view.nonfinite]

    @property
    def lost(self) -> NonFinite | None:
        """What became NaN or infinite for good: the loss of the whole run, else the first one."""
        final = [item for item in self.nonfinite_losses if item.is_final]
        return next((item for item in final if item.channel == GLOBAL), next(iter(final), None))


def _view_of(
    run: Run, index: int, channels: Mapping[str, int], first_run: Run | None = None
) -> RunView:
    """The contents about a run.

    Args:
        run: the run.
        index: its index in the report.
        channels: {each channel of the run: its index}.
        first_run: the run that it is compared with.
    """
    global_losses = run.series(GLOBAL, "loss")[1].tolist()
    first, last = _span(run)
    nonfinite = nonfinite_of(run)
    # Until it was lost, a loss may have been fine, but this is no comfort.
    lost = {(item.channel, item.split) for item in nonfinite if item.is_final}
    versus = [
        found
        for found in ([] if first_run is None else versus_of(run, first_run))
        if found.is_worse or (found.channel, found.split) not in lost
    ]
    compared = {found.channel: found for found in versus if found.split == "train"}
    return RunView(
        index=index,
        name=shown(run.name),
        run=run,
        steps=(first, last),
        losses=(global_losses[0], global_losses[-1]) if global_losses else None,
        whole=_without_lost(whole_row(run), lost),
        rows=[
            _channel(
                run,
                _without_lost(row, lost),
                index,
                channels[row.channel],
                compared.get(row.channel),
            )
            for row in final_rows(run)
        ],
        trends=[
            trend
            for trend in trends_of(run)
            if trend.is_bad or (trend.channel, trend.split) not in lost
        ],
        nonfinite_losses=nonfinite,
        gaps=[
            GapView(
                name=shown(gap.channel),
                gap=gap,
                place=(_part(gap.first_step, first, last), _part(gap.last_step, first, last)),
            )
            for gap in find_gaps(run)
        ],
        check=self_check(run),
        first_name="" if first_run is None else shown(first_run.name),
        versus=versus,
    )


def views_of(runs: Sequence[Run], axis: str = "") -> list[RunView]:
    """The contents about runs with all their channels; all but the first are compared with it.

    axis: show the labels of this axis in place of the channels. Runs without them have no view.
    """
    chosen = {
        index: with_axis(run, axis) if axis else run
        for index, run in enumerate(runs)
        if not axis or axis in run.axes
    }
    channels = {name: index for index, name in enumerate(rank_channels(list(chosen.values())))}
    return [
        _view_of(run, index, channels, chosen.get(0) if index else None)
        for index, run in chosen.items()
    ]


def rank_channels(runs: Sequence[Run]) -> list[str]:
    """All channels of all runs, by their number of tokens; `unlabeled` is last."""
    tokens: dict[str, float] = {}
    for run in runs:
        for name in run.channels():
            count = float(total_of(run, name, "tokens") or 0)
            tokens[name] = max(tokens.get(name, 0.0), count)
    return sorted(tokens, key=lambda name: (name == UNLABELED, -tokens[name]))


def shown(name: str) -> str:
    """A name as it is shown: on one line, not too long, with controls and blanks made visible."""
    if name.isspace():
        return f"({len(name):,} blank{'' if len(name) == 1 else 's'})"
    cut = name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}… ({len(name):,} characters)"
    return "".join(map(_visible, cut)) or "(no name)"


def _visible(character: str) -> str:
    code = ord(character)
    # Controls, lone surrogates, and characters that reorder or hide the text around them.
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character if code in _JOINERS else f"⟨{code:04X}⟩"
    return character


def _channel(
    run: Run, row: ChannelRow, number: int, index: int, versus: Versus | None
) -> ChannelView:
    whole = sum(run.ratios.values())
    ratio = run.ratios.get(row.channel)
    nonfinite = run.series(row.channel, "nonfinite")[1].tolist()
    return ChannelView(
        run=number,
        index=index,
        name=shown(row.channel),
        row=row,
        configured=ratio / whole if ratio is not None and whole else None,
        samples=total_of(run, row.channel, "samples"),
        nonfinite=round(sum(v for v in nonfinite if math.isfinite(v))),
        is_estimate=not run.has(row.channel, "loss") and run.has(row.channel, "loss_estimate"),
        versus=versus,
    )


def _without_lost(row: ChannelRow, lost: Collection[tuple[str, str]]) -> ChannelRow:
    """The row, without the last number of a loss that was lost."""
    if (row.channel, row.split) in lost:
        row = replace(row, last_loss=math.nan)
    return replace(row, eval_loss=math.nan) if (row.channel, "eval") in lost else row


def _span(run: Run) -> tuple[int, int]:
    series = [run.series(k.channel, k.metric, k.split)[0] for k in run.keys if is_over_run(k)]
    ends = [(int(steps[0]), int(steps[-1])) for steps in series if len(steps)] or [(0, 0)]
    return min(first for first, _ in ends), max(last for _, last in ends)


def _part(step: int, first: int, last: int) -> float:
    return 100 * (step - first) / (last - first) if last > first else 0.0

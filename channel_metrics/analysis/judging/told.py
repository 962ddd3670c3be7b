"""All findings about runs in words, the same for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from channel_metrics.analysis.judging import losses_told as losses
from channel_metrics.analysis.judging.finding import Finding, bad
from channel_metrics.analysis.judging.means import MIN_VALUES
from channel_metrics.analysis.progress import phase
from channel_metrics.analysis.report.views import shown, views_of

if TYPE_CHECKING:
    from channel_metrics.analysis.report.views import RunView
    from channel_metrics.analysis.run import Run

__all__ = ["findings_of", "judged"]

# verdict: (level, badge, what the losses of the channels do with the trainer's)
_CHECKED = {
    "exact": ("good", "fine", "give"),
    "close": ("good", "close", "come close to"),
    "uneven": ("unknown", "unknown", "mostly come close to"),
    "differs": ("bad", "differs", "do not give"),
}
_WHY_UNEVEN = (
    ". They are equal where a window is one step; over several, most trainers log the mean of the "
    "steps\u2019 means, which weighs tokens unevenly"
)
_WHY_DIFFERS = (
    f"{_WHY_UNEVEN}. Whether that explains so much is not known: a loss with weights or further "
    "terms, tokens without a channel, and tokens that are counted twice also give a difference"
)


def judged(runs: Sequence[Run]) -> tuple[list[RunView], list[list[Finding]]]:
    """Runs as the report shows them, and the findings about each; the first is the baseline."""
    with phase("judging the losses"):
        views = views_of(runs)
        return views, [findings_of(view) for view in views]


def findings_of(view: RunView) -> list[Finding]:
    """All findings of a run; the worst first, what is fine last."""
    return [
        *losses.not_finite(view, is_final=True),
        *losses.worse(view),
        *losses.worse_than_first(view),
        *_alerts(view),
        *_gaps(view),
        *_mix(view),
        *losses.not_finite(view, is_final=False),
        *_nonfinite_tokens(view),
        *([] if view.run.axis else [_self_check(view)]),
        *losses.unknown(view),
        *losses.not_worse(view),
        *_no_gaps(view),
    ]


def _alerts(view: RunView) -> Iterator[Finding]:
    """What the run told of while it ran."""
    for alert in view.run.alerts:
        text = f"alert at step {alert.step:,}: {alert.kind}: {shown(alert.text)}"
        yield bad("alert", alert.channel, alert.split, text)


def _gaps(view: RunView) -> Iterator[Finding]:
    for item in view.gaps:
        gap = item.gap
        windows = f"{gap.windows:,} logged window{'' if gap.windows == 1 else 's'}"
        yield Finding(
            kind="gap",
            level="bad",
            text=f"no tokens in {windows}, between steps {gap.first_step:,} and {gap.last_step:,}",
            subject=item.name,
            channel=gap.channel,
            gap=item,
        )


def _no_gaps(view: RunView) -> Iterator[Finding]:
    windows = [t.num_values for t in view.trends if t.channel and t.split == "train"]
    if max(windows, default=0) >= MIN_VALUES and not view.gaps:
        what = "label" if view.run.axis else "channel"
        text = f"no {what} is missing for longer than its own rhythm explains"
        yield Finding(kind="gap", level="good", text=text)


def _mix(view: RunView) -> Iterator[Finding]:
    for row in view.off:
        text = (
            f"{row.row.record_share:.1%} of the records, but configured as {row.configured:.1%}; "
            f"more than the drawing of {row.samples:,} records explains"
        )
        yield bad("mix", row.row.channel, "train", text)


def _nonfinite_tokens(view: RunView) -> Iterator[Finding]:
    for row in view.nonfinite:
        text = f"{row.nonfinite:,} tokens have no finite loss; they take no part in its loss"
        yield bad("nonfinite", row.row.channel, "train", text)


def _self_check(view: RunView) -> Finding:
    check = view.check
    if check is None:
        reason = "the log lacks tokens per channel, or the loss of the run or of some channel"
        text = f"self-check: unknown, because {reason}"
        return Finding(kind="check", level="unknown", text=text)
    level, word, do = _CHECKED[view.verdict]
    why = {"exact": "", "differs": _WHY_DIFFERS}.get(view.verdict, _WHY_UNEVEN)
    return Finding(
        kind="check",
        level=level,
        word=word,
        text=f"self-check: the losses of the channels, weighted by their tokens, {do} the "
        f"trainer\u2019s loss: over {check.windows:,} windows they differ by "
        f"{_tiny(check.median)} in the median, and by {_tiny(check.largest)} at most (step "
        f"{check.step:,}){why}",
    )


def _tiny(value: float) -> str:
    """A relative difference."""
    return "less than 0.001%" if value < 1e-5 else f"{value:.3%}"

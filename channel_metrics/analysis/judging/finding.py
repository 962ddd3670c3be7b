"""A finding: one sentence about a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from channel_metrics.analysis.readers.keys import GLOBAL
from channel_metrics.analysis.report.views import shown

if TYPE_CHECKING:
    from channel_metrics.analysis.report.views import GapView

__all__ = [
    "Finding",
    "bad",
    "is_worse",
    "lines_of",
    "listed",
    "shortened",
    "subject_of",
]

_MAX_NAMES = 12
_MAX_OF_A_KIND = 20
_BADGES = {"nan": "NaN", "nonfinite": "NaN", "overfitting": "overfits", "versus": "worse"}
# The kinds that say that a run has become worse.
_WORSE = ("nan", "worse", "overfitting", "versus")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence about a run."""

    kind: str
    """`nan`, `worse`, `overfitting`, `versus`, `gap`, `mix`, `nonfinite`, `check`, `trend`; `alert`
    for what the run itself has told of."""

    level: str
    """`bad`, `unknown` or `good`."""

    text: str
    """What is found."""

    subject: str = ""
    """What the sentence begins with: the channel as it is shown, and the split."""

    channel: str | None = None
    """The channel that it is about, if it is about one."""

    gap: GapView | None = None
    """The place of a gap."""

    word: str = ""
    """One word that sums it up, if it is not the usual one."""

    @property
    def badge(self) -> str:
        """One word that sums it up."""
        of_kind = _BADGES.get(self.kind, self.kind)
        return self.word or {"good": "fine", "unknown": "unknown"}.get(self.level, of_kind)

    @property
    def line(self) -> str:
        """The whole sentence, on one line."""
        return f"{self.subject}: {self.text}" if self.subject else self.text


def bad(kind: str, channel: str, split: str, text: str) -> Finding:
    """What is bad about a channel, or about the whole run."""
    subject = subject_of(channel, split)
    return Finding(kind=kind, level="bad", text=text, subject=subject, channel=channel or None)


def is_worse(findings: Iterable[Finding]) -> bool:
    """Whether a loss became NaN, or rose, or is above that of the first run."""
    return any(found.kind in _WORSE for found in findings)


def shortened(findings: Iterable[Finding]) -> list[Finding]:
    """At most 20 findings of a kind, and how many more there are."""
    few: list[Finding] = []
    for (kind, level), group in groupby(findings, key=lambda found: (found.kind, found.level)):
        found = list(group)
        few += found[:_MAX_OF_A_KIND]
        if more := found[_MAX_OF_A_KIND:]:
            text = f"and {len(more):,} more of the kind"
            few.append(Finding(kind=kind, level=level, text=text))
    return few


def lines_of(findings: Iterable[Finding]) -> list[str]:
    """The findings as lines for a terminal, marked `!` if something is bad, `?` if unknown."""
    marks = {"bad": "! ", "unknown": "? ", "good": "  "}
    return [marks[found.level] + found.line for found in shortened(findings)]


def subject_of(channel: str, split: str = "train") -> str:
    """A channel, or the whole run, as it is shown; with the split, if it is not training."""
    name = shown(channel) if channel != GLOBAL else "the whole run"
    return name if split == "train" else f"{name} in {split}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")

"""The table at the end of a run, from the trainer's `log_history`.

>>> rows = summarize([{"bbu_loss": 2.0, "bbu_tokens": 8}, {"bbu_loss": 1.0, "bbu_tokens": 8}],
...                  ["bbu"])
>>> rows[0].first_loss, rows[0].last_loss, rows[0].tokens, rows[0].share
(2.0, 1.0, 16, 1.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from channel_metrics.analysis.tables import EMPTY, TableColumn, fitted
from channel_metrics.core.keys import metric_key
from channel_metrics.core.labels import UNLABELED

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "WHOLE_RUN",
    "ChannelRow",
    "count",
    "number",
    "part_of",
    "percent",
    "relative_change",
    "render",
    "summarize",
]

Log = Mapping[str, Any]

# The name of the whole run in a table.
WHOLE_RUN = "(whole run)"


@dataclass(frozen=True, kw_only=True)
class ChannelRow:
    """The values of one channel at the end of a run. Those that are not logged are None."""

    channel: str
    """The name, as declared; empty for the whole run."""

    split: str = "train"
    """The split that the values are from; `eval` for a channel that is only evaluated."""

    first_loss: float | None
    """The loss of its first window."""

    last_loss: float | None
    """The loss of its last window."""

    token_acc: float | None
    """The accuracy of its last window."""

    eval_loss: float | None
    """The loss of its last evaluation."""

    tokens: int | None
    """Tokens of all windows."""

    share: float | None
    """`tokens` / tokens of all channels."""

    record_share: float | None
    """Records / records of all channels, which a configured ratio is compared to."""

    @property
    def change(self) -> float | None:
        """Relative change of the loss from the first to the last window."""
        return relative_change(self.first_loss, self.last_loss)


def summarize(
    log_history: Sequence[Log], channels: Iterable[str], key_format: str = "{channel}_{metric}"
) -> list[ChannelRow]:
    """The channels that the logs have, in the given order; `unlabeled` is last."""
    rows = []
    names = list(dict.fromkeys([*channels, UNLABELED]))
    tokens = {name: _total(log_history, metric_key(key_format, name, "tokens")) for name in names}
    samples = {name: _total(log_history, metric_key(key_format, name, "samples")) for name in names}
    for name in names:
        losses, accuracies, eval_losses = (
            _values(log_history, prefix + metric_key(key_format, name, metric))
            for prefix, metric in (("", "loss"), ("", "token_acc"), ("eval_", "loss"))
        )
        if losses or eval_losses or tokens[name]:
            row = ChannelRow(
                channel=name,
                first_loss=losses[0] if losses else None,
                last_loss=losses[-1] if losses else None,
                token_acc=accuracies[-1] if accuracies else None,
                eval_loss=eval_losses[-1] if eval_losses else None,
                tokens=tokens[name],
                share=part_of(tokens, name),
                record_share=part_of(samples, name),
            )
            rows.append(row)
    return rows


def render(
    rows: Sequence[ChannelRow],
    width: int,
    *,
    ratios: Mapping[str, float] | None = None,
    domains: Mapping[str, str] | None = None,
) -> Table:
    """A rich table of the channels, of at most this width.

    Ratios are shown as shares, beside those of the records.
    """
    ratios, domains = ratios or {}, domains or {}
    whole = sum(ratios.values())
    columns = [
        TableColumn("channel", [_name(row) for row in rows], is_name=True),
        TableColumn("domain", [domains.get(row.channel, EMPTY) for row in rows], 7, is_name=True),
        TableColumn("first loss", [number(row.first_loss) for row in rows], 2),
        TableColumn("last loss", [number(row.last_loss) for row in rows]),
        TableColumn("change", [percent(row.change, "+.1%") for row in rows], 3),
        TableColumn("token acc", [percent(row.token_acc) for row in rows], 10),
        TableColumn("eval loss", [number(row.eval_loss) for row in rows], 1),
        TableColumn("tokens", [count(row.tokens) for row in rows], 6),
        TableColumn("token share", [percent(row.share) for row in rows], 5),
        TableColumn("record share", [percent(row.record_share) for row in rows], 9),
        TableColumn(
            "ratio",
            [percent(ratios[r.channel] / whole if r.channel in ratios else None) for r in rows],
            8,
        ),
    ]
    return fitted(columns, width, title="channels")


def _values(log_history: Sequence[Log], key: str) -> list[float]:
    return [float(log[key]) for log in log_history if log.get(key) is not None]


def _total(log_history: Sequence[Log], key: str) -> int | None:
    values = _values(log_history, key)
    return int(sum(values)) if values else None


def _name(row: ChannelRow) -> str:
    name = row.channel or WHOLE_RUN
    return name if row.split == "train" else f"{name} ({row.split})"


def relative_change(first: float | None, last: float | None) -> float | None:
    """The change / the first value; None if it is not known, or no number."""
    if not first or last is None:
        return None
    change = last / first - 1
    return change if math.isfinite(change) else None


def part_of(totals: Mapping[str, float | None], name: str) -> float | None:
    """The total of one channel / the total of all channels; None if it is not known."""
    part, whole = totals[name], sum(total or 0 for total in totals.values())
    return part / whole if part is not None and whole else None


def number(value: float | None) -> str:
    """A loss with four digits, for a table."""
    return EMPTY if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    """A whole number, for a table."""
    return EMPTY if value is None else f"{value:,}"


def percent(value: float | None, spec: str = ".1%") -> str:
    """A share in percent, for a table."""
    return EMPTY if value is None else format(value, spec)

"""Alerts: sentences about channels that somebody should see now.

alert at step 1200: code: forgetting: the loss rose from 1.9021 to 2.1133, ...
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from channel_metrics.alerting import ALERTS_FILE, Alerts
from channel_metrics.config import MetricsConfig
from channel_metrics.core.labels import UNLABELED
from channel_metrics.core.totals import RunTotals
from channel_metrics.observers import loss_alerts, window_alerts
from channel_metrics.observers.line_file import LineFile
from channel_metrics.observers.loss_alerts import LOSS_KINDS, forget_loss, loss_reasons, new_losses
from channel_metrics.observers.sending import Sender, to_trackio, to_wandb, webhook
from channel_metrics.observers.window_alerts import Reason
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.windows import Window

__all__ = ["Alert", "AlertObserver", "Session", "rates"]

logger = logging.getLogger("channel_metrics")

_NOTE = "alerts"


class Session(loss_alerts.Session, Protocol):
    """What this observer asks of a `ChannelMetrics`."""

    ranks: Ranks
    totals: RunTotals

    def is_label(self, row: str) -> bool:
        """Whether a row is a label of an axis."""


@dataclass(frozen=True)
class Alert:
    """One alert.

    kind: `forgetting`, `overfitting`, `nonfinite`, `starved`, `share`, `unlabeled`, `exhausted`.
    channel: empty for the whole run. split: `train`, or the name of an evaluation set.
    """

    kind: str
    channel: str
    split: str
    step: int
    text: str

    @property
    def title(self) -> str:
        """Channel, split and kind."""
        name = self.channel or "the whole run"
        return f"{name if self.split == 'train' else f'{name} in {self.split}'}: {self.kind}"

    @property
    def line(self) -> str:
        """The whole sentence."""
        return f"alert at step {self.step}: {self.title}: {self.text}"

    @property
    def values(self) -> dict[str, Any]:
        """Its line in alerts.jsonl, as plain values."""
        return {
            "channel_metrics": Window.version,
            "alert": self.kind,
            "channel": self.channel,
            "split": self.split,
            "step": self.step,
            "text": self.text,
        }


def rates(rate: float, kinds: Collection[str]) -> tuple[float, float]:
    """The parts of the rate of a run: for losses, and for absent channels as for shares.

    Losses have twice as much. What is not among the kinds that are watched for has nothing.
    """
    losses = 2 * bool({*LOSS_KINDS}.intersection(kinds))
    others = len({"starved", "share"}.intersection(kinds))
    each = rate / max(1, losses + others)
    return losses * each, each * bool(others)


class AlertObserver:
    """An observer that watches for alerts. All ranks watch; the first one tells.

    An alert of one kind about one channel is told once, and again only after its reason has gone
    and the cooldown is over. A rise of a loss is found once, so one that is found in the cooldown
    is kept until its end. What is remembered stands in the checkpoints, beside the totals.

    Args:
        config: its `alerts`, `budget` and `stream`.
        settings: those of `alerts`.
        functions: {path: function} for the targets that are functions.
        session: gives the totals, and says which rank this is.

    Raises:
        ConfigError: there is no address for the webhook.
    """

    is_display = True

    def __init__(
        self,
        config: MetricsConfig,
        settings: Alerts,
        functions: dict[str, Callable[[Any], object]],
        session: Session,
    ) -> None:
        self.settings, self._session = settings, session
        self._budget = config.mixture
        self._kinds = settings.chosen(config.budget)
        self._rates = rates(settings.rate, self._kinds)
        beside = Path(config.stream).parent / ALERTS_FILE if config.stream else None
        path = Path(settings.file) if settings.file else beside
        self._file = LineFile(path) if path is not None else None
        self._senders = [Sender(name, function) for name, function in functions.items()]
        for name, target in (("trackio", to_trackio), ("wandb", to_wandb)):
            if name in settings.to:
                self._senders.append(Sender(name, target))
        # The process group may come later, and only one rank may have the address.
        may_tell = session.ranks.rank == 0 and os.environ.get("RANK", "0") == "0"
        if "webhook" in settings.to and may_tell:
            post = webhook(settings.webhook)
            self._senders.append(Sender("the webhook", post, names_error=False))
        if self._file is None and may_tell:
            session.warn_once(
                "alerts are told, but not written: `report` and `watch` will not show them. Set "
                "`stream`, or `file` of alerts."
            )

    def __repr__(self) -> str:
        return "alerts"

    def __call__(self, window: Window) -> None:
        """Look at a window, and tell what is new."""
        fresh = {"windows": {}, "told": {}, "losses": new_losses(), "presence": {}}
        notes: dict[str, Any] = self._session.totals.notes.setdefault(_NOTE, fresh)
        number = notes["windows"].get(window.split, 0) + 1
        notes["windows"][window.split] = number
        # {kind and channel: [window of the last alert, whether its reason goes on, a rise to tell]}
        told: dict[str, list[Any]] = notes["told"].setdefault(window.split, {})
        seen, cooldown = set(), self.settings.cooldown
        for reason in self._reasons(window, notes):
            key, is_rise = f"{reason.kind} {reason.channel}", reason.kind in LOSS_KINDS
            seen.add(key)
            last, goes_on, _ = told.get(key, (-math.inf, False, ""))
            if not reason.text or goes_on:
                continue
            if is_rise:
                forget_loss(notes["losses"], window.split, reason.channel)
            if number - last >= cooldown:
                told[key] = [number, True, ""]
                self._tell(
                    Alert(reason.kind, reason.channel, window.split, window.step, reason.text)
                )
            elif is_rise:
                told[key][2] = f"{reason.text}; found at step {window.step}"
        for key, of_key in told.items():
            of_key[1] = of_key[1] and key in seen
            if of_key[2] and number - of_key[0] >= cooldown:
                kind, _, channel = key.partition(" ")
                self._tell(Alert(kind, channel, window.split, window.step, of_key[2]))
                of_key[:] = number, False, ""

    def _reasons(self, window: Window, notes: dict[str, Any]) -> Iterator[Reason]:
        settings, kinds, schema = self.settings, self._kinds, self._session.schema
        names = (UNLABELED, *window.names[: window.num_channels])
        sums = {name: window.sums(name) for name in names}
        counts = {name: of_channel[schema.count] for name, of_channel in sums.items()}
        of_losses, of_others = self._rates
        if "nonfinite" in kinds:
            yield from window_alerts.nonfinite(sums, counts)
        if "unlabeled" in kinds:
            yield from window_alerts.unlabeled(counts, settings.unlabeled, schema.unit)
        if of_losses:
            yield from loss_reasons(
                window.split,
                sums,
                self._session,
                kinds=kinds,
                rate=of_losses,
                state=notes["losses"],
            )
        if window.split != "train":
            return
        if "starved" in kinds:
            yield from window_alerts.starved(counts, of_others, notes["presence"])
        budget = self._budget
        if budget is not None and "share" in kinds:
            is_label = self._session.is_label
            yield from window_alerts.shares(
                window.totals, is_label, budget, settings.share, of_others
            )
        if budget is not None and "exhausted" in kinds:
            yield from window_alerts.exhausted(window, budget, settings.epochs)

    def _tell(self, alert: Alert) -> None:
        if self._session.ranks.rank != 0:
            return
        if "logger" in self.settings.to:
            logger.warning("%s", alert.line)
        for sender in self._senders:
            sender.send(alert)
        try:
            if self._file is not None:
                self._file.append(alert.values)
        except OSError as error:
            self._file = None
            self._session.warn_once(f"alerts cannot be written, and are only told: {error!r}")

"""`ChannelMetrics`: everything that a run knows of its channels; the same class for all trainers.

    collate = metrics.collator(base)                 # batches carry their channels
    with metrics.observe(model, batch):              # counts the tokens of one forward
        loss = model(**batch).loss
    print(metrics.close(step).logs)                  # {"bbu_loss": ..., ...}

It owns the windows of training and evaluation, the totals of the run, the names, the log keys and
the observers, and it decides what an error does. An adapter only says where a trainer's tokens,
names, log points and checkpoints are.

All ranks make the same calls in one order. `close`, `peek`, `save` and evaluations are collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import time
from typing import Any

import torch

from channel_metrics.alerting import Outliers
from channel_metrics.capture.gradients import Gradients
from channel_metrics.checkpoints import Checkpoints
from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.schema import TOKENS, Schema
from channel_metrics.core.table import SumTable
from channel_metrics.core.totals import RunTotals
from channel_metrics.data.carried import carried_of
from channel_metrics.data.collator import BOUNDS_KEY, RECORDS_KEY, ChannelCollator
from channel_metrics.data.scan import class_names, scan_channels
from channel_metrics.observers.configured import adding_of, observers_of, sampler_of
from channel_metrics.observers.outliers import OutlierFiles
from channel_metrics.observing import observe
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.ranks.sync import sum_over_ranks
from channel_metrics.seen import Seen
from channel_metrics.window_maker import WindowMaker
from channel_metrics.windows import Evaluation, Window, tell, with_added

__all__ = ["ChannelMetrics"]

logger = logging.getLogger("channel_metrics")


class ChannelMetrics(Checkpoints):
    """The channels of one run.

    Args:
        config: what is measured and logged.
        reserved: log keys of the trainer itself, which no channel may have.
        rewrite: how the trainer's log writers change keys, see `KeyBook`.
        ranks: the ranks that count together; by default the default process group, or one process.
        schema: what is counted; tokens by default.
        on_window: functions that get each closed `Window`, which is the same on all ranks. If one
            with a true attribute `is_display` fails, it is removed with a warning. If another one
            fails, the run ends, because it may steer the training, and ranks must not differ. If
            one returns a text, that is `stop(text)`.

    Attributes:
        stop_reason: why the run should end; empty if it should not. It is set when a window is
            closed, on all ranks alike. Some trainers end by it. A loop of one's own asks for it.
        ends_run: whether the trainer ends by it.
        gradients: `gradients.watch(model)` turns on the metrics `grad_...`, see docs/gradients.md.
        sampler: what a `MixedStream` follows; None without the setting `sampler`.

    Raises:
        ConfigError, ChannelError: if declared channels would share a log key, or if an entry of
            `eval_channels` is no declared channel.
    """

    def __init__(
        self,
        config: MetricsConfig | None = None,
        *,
        reserved: Iterable[str] = (),
        rewrite: Callable[[str], str] = str,
        ranks: Ranks | None = None,
        schema: Schema = TOKENS,
        on_window: Iterable[Callable[[Window], Any]] = (),
    ) -> None:
        self.config = config = config or MetricsConfig()
        schema = schema.narrowed(config.metrics)  # a copy: columns are fixed from here on
        labels = LabelTable(config.channels, unknown=config.unknown)
        correct = any("correct" in metric.needs for metric in schema.chosen(config.metrics))
        guard = FaultGuard(config.on_error)
        wanted = Outliers.of(config.outliers)
        super().__init__(labels, schema, guard, config.axes, with_correct=correct, outliers=wanted)
        self._outliers = OutlierFiles(wanted, self)
        self.keys = KeyBook(
            config.key_format,
            reserved=reserved,
            schema=schema,
            objectives=config.objectives,
            rewrite=rewrite,
        )
        self._maker = WindowMaker(config, schema, self.keys, self.warn_once)
        self.ranks = ranks or Ranks()
        self.stop_reason, self.ends_run = "", False
        self.totals = RunTotals(schema)
        self.gradients = Gradients(self)
        self.sampler = sampler_of(config, self)
        self.on_window = [*on_window, *observers_of(config, self, self.sampler)]
        self._adding = adding_of(config, self, self.sampler)
        self._agreement = Agreement()
        self.classes: dict[str, tuple[str, ...]] = {}  # {field: names} in the declared datasets
        self._maker.declare(labels.names)
        if config.unknown != "add":
            self.check_eval_channels()

    # ---- windows ---------------------------------------------------------------------------

    def close(self, step: int) -> Window:
        """End the train window: sum it over all ranks, call the observers, open the next one."""
        self._end_step(self._train)
        window = self._summed(self._train.table, "train", step)
        self._train.table.reset()
        self._tell(window)
        self.guard.proven |= bool(window.values)
        return window

    def peek(self, step: int) -> Window:
        """The train window so far, without a call of the observers. It stays open, so counts and
        totals are left out: the logged tokens must add up to those of the run."""
        self._end_step(self._train)
        return self._summed(self._train.table, "train", step, final=False)

    @contextmanager
    def evaluation(self, split: str, step: int, prefix: str = "eval_") -> Iterator[Evaluation]:
        """A block that counts in a window of its own, which is `window` of the result afterwards.

        Evaluations may be nested. If an exception ends the block, or if it is discarded, its
        counts are dropped without a collective.
        """
        split = "eval_train" if split == "train" else split  # `train` is the training itself
        with self._open_evaluation() as found:
            yield found
        if not found.discarded:
            found.window = self._summed(found.table, split, step, prefix)
            self._tell(found.window)

    def stop(self, reason: str) -> None:
        """Ask for the end of the run, for observers. All ranks must do so, or none."""
        if not self.stop_reason and self.ranks.rank == 0:
            end = "the run ends here" if self.ends_run else "this trainer goes on; end it yourself"
            logger.warning("%s: %s.", reason, end)
        self.stop_reason = self.stop_reason or reason

    def write(
        self, window: Window, logs: MutableMapping[str, Any], theirs: Container[str] = ()
    ) -> None:
        """Add a window to a log. A key that is there or in `theirs` is left out, with a warning."""
        taken = sorted(key for key in window.logs if key in logs or key in theirs)
        if taken:
            self.warn_once(
                f"the metric key {taken[0]!r} is already logged by the trainer, so the channel's "
                "value is left out; choose another key_format, or rename the channel."
            )
        logs.update({key: value for key, value in window.logs.items() if key not in taken})

    # ---- batches ---------------------------------------------------------------------------

    def collator(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """A collator like `base` that also adds the channels and boundaries for `observe`."""
        return ChannelCollator(
            base,
            fields=self.config.label_fields,
            table=self.labels if self.labels.names else None,
            bounds_key=BOUNDS_KEY,
            row_bounds=False,
            carry_faults=True,
            classes=self.classes,
            records_key=RECORDS_KEY,
            columns=self.token_axes.columns,
            carried=carried_of(self.config),
        )

    def observe(
        self, model: torch.nn.Module, batch: MutableMapping[str, Any], *, accelerator: Any = None
    ) -> AbstractContextManager[Seen]:
        """One forward over exactly the labels of `batch`, counted if the block does not raise.

        Our keys are removed from the batch. The token losses come from the model's own loss. If
        the loop computes the loss itself, it hands over the logits or token losses, see `Seen`.

        Args:
            accelerator: an `Accelerator` of accelerate. In an evaluation, the records that it
                repeats to fill the last batch of all ranks are not counted.

        Raises:
            ChannelError: if the batch has no channels, see `collator`.
            UnsupportedVersionError: if the losses of single tokens cannot be read.
            ConfigError: if the config has `sampler`, and no `MixedStream` follows it.
        """
        if self.sampler is not None and not self.evaluating:
            self.sampler.followed()
        return observe(self, model, batch, accelerator=accelerator)

    # ---- names -----------------------------------------------------------------------------

    def declare(self, dataset: Any, split: str, fields: Sequence[str] = ()) -> bool:
        """Learn the channels of a dataset; tell whether it could be scanned before training.

        Args:
            dataset: a `datasets.Dataset` or a list of records; nothing else can be scanned.
            split: `train`, or another name of this set, for messages.
            fields: the fields that may hold the channel; by default those of the config.

        Raises:
            ChannelError: no record of a training set has a channel; and as `declare_names`.
        """
        fields = fields or self.config.label_fields
        self.classes.update(class_names(dataset, fields))
        names = scan_channels(dataset, fields, split, needed=not self.config.channels)
        self.declare_names(names or ())
        return names is not None

    def declare_names(self, names: Iterable[str]) -> None:
        """Learn names of channels before training, in the same order on all ranks.

        `unknown` of the config decides about names that are not declared in it.

        Raises:
            ChannelError, ConfigError: if names share a log key, or if the config refuses one.
        """
        names = list(names)
        self.labels.ids(names)
        self._maker.declare(name for name in names if name in self.labels)

    def rows(self, names: Iterable[str | None]) -> set[str]:
        """What is logged of records with these names: their channels, and labels of axes."""
        return {row for name in names for row in self._maker.book.rows(name)}

    def channel_of(self, name: str | None) -> str:
        """The channel of a joint name of labels; `unlabeled` if it has none."""
        return self._maker.book.rows(name)[0]

    def is_label(self, row: str) -> bool:
        """Whether a row is a label on a further axis, such as `domain/target`."""
        return row in self._maker.book.labels

    def check_eval_channels(self) -> None:
        """Raise `ConfigError` if an entry of `eval_channels` is none of the channels so far."""
        self._maker.check_eval_channels(self.labels.names)

    # ---- behind the scenes -----------------------------------------------------------------

    def _summed(
        self, table: SumTable, split: str, step: int, prefix: str = "", *, final: bool = True
    ) -> Window:
        """The window of all ranks; a window without values if the metrics have ended."""
        if not self.guard.off:
            with self.guard.guarded():
                closes = split == "train" and final
                found = sum_over_ranks(
                    table,
                    self._agreement,
                    self.ranks,
                    self.guard,
                    self._riders(),
                    beside=self.gradients.table if closes else None,
                )
                if closes:
                    self.totals.add(found.names, found.sums)
                    self.gradients.reset()
                window = self._maker.make(
                    found, split=split, step=step, prefix=prefix, totals=self.totals, final=final
                )
                if not final:
                    return window
                self._outliers.write(table, window)
                return with_added(window, self._adding, self._maker.limit, self.warn_once)
        return Window(split=split, step=step, prefix=prefix, final=final)

    def _begun(self) -> None:
        if self.sampler is None:
            return
        self.sampler.begin()
        if bool(self._train.table.sums().any()):
            self.warn_once(
                "this state was taken in the middle of a window, so a MixedStream draws the "
                "records of that window again; call `close` before `state_dict`, or use `save`."
            )

    def _riders(self) -> tuple[float, ...]:
        """The clock of the first rank, if something reads it."""
        return (time() if self.ranks.rank == 0 else 0.0,) if self._adding else ()

    def _tell(self, window: Window) -> None:
        # A trainer may log twice at one step: a window that holds nothing.
        if self.measuring and window.has_counts:
            tell(window, self.on_window, self.warn_once, self.stop)

"""`ChannelMetrics`: everything that a run keeps of its channels, once, for every trainer.

    metrics = ChannelMetrics(MetricsConfig(channels=("bbu", "rru")))
    for step, batch in enumerate(loader, start=1):
        losses = token_losses(model, batch)              # [B, S], nll of each target
        metrics.count(MicroBatch(token_losses=losses, channels=batch["channels"]))
        if step % 10 == 0:
            print(metrics.close(step).logs)              # {"bbu_loss": ..., ...}

It owns the windows of training and evaluation, the totals of the run, the names, the log keys, the
observers, and what an error does. An adapter says where a trainer's tokens, names, log points and
checkpoints are, and nothing else.

Every rank makes the same calls in the same order. `close`, `peek`, the end of an `evaluation` and
`save` are collectives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from channel_metrics.config import MetricsConfig
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.keys import KeyBook
from channel_metrics.core.labels import UNLABELED, LabelTable
from channel_metrics.core.schema import TOKENS, Schema
from channel_metrics.core.table import SumTable
from channel_metrics.core.totals import TOTALS_FILE, RunTotals, totals_path
from channel_metrics.counting import Counting
from channel_metrics.data.collator import BOUNDS_KEY, ChannelCollator
from channel_metrics.data.scan import class_names, scan_channels
from channel_metrics.errors import ChannelMetricsError
from channel_metrics.ranks.agreed_names import Agreement
from channel_metrics.ranks.exchange import GlobalSums
from channel_metrics.ranks.ranks import Ranks
from channel_metrics.ranks.sync import sum_over_ranks
from channel_metrics.windows import Evaluation, Window, WindowMaker

__all__ = ["ChannelMetrics"]

logger = logging.getLogger("channel_metrics")


class ChannelMetrics(Counting):
    """The channels of one run.

    Args:
        config: what is measured and logged.
        reserved: log keys of the trainer itself, which no channel may have.
        rewrite: what the trainer's writers do to keys, see `KeyBook`.
        ranks: who counts together; by default the default process group, or one process.
        schema: what is counted; tokens by default.
        on_window: called with each closed `Window`, the same on all ranks. One whose attribute
            `is_display` is true is removed with a warning when it fails; any other ends the run,
            because it may steer the training, and ranks must not differ.

    Raises:
        ConfigError, ChannelError: for declared channels that would share a log key, and for an
            `eval_channels` that no declared channel has.
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
        # A copy: columns and metrics are fixed from here on.
        schema = schema.extended()
        labels = LabelTable(config.channels, unknown=config.unknown)
        super().__init__(labels, schema, FaultGuard(config.on_error))
        self.keys = KeyBook(config.key_format, reserved=reserved, schema=schema, rewrite=rewrite)
        self._maker = WindowMaker(config, schema, self.keys)
        self.ranks = ranks or Ranks()
        self.on_window = list(on_window)
        self.totals = RunTotals(schema)
        self._agreement = Agreement()
        # {field: names} of class labels in the declared datasets
        self._classes: dict[str, tuple[str, ...]] = {}
        self._maker.declare(labels.names)
        if config.unknown != "add":
            self.check_eval_channels()

    @property
    def warned(self) -> frozenset[str]:
        """What has been warned of."""
        return frozenset(self._maker.warned)

    # ---- windows ---------------------------------------------------------------------------

    def close(self, step: int) -> Window:
        """End the train window: sum it over all ranks, tell the observers, open the next."""
        self.end_step()
        window = self._summed(self._train, "train", step)
        self._train.reset()
        self._tell(window)
        if window.values:
            self.guard.proven = True
        return window

    def peek(self, step: int) -> Window:
        """The train window so far. It goes on, so there are no counts, no totals, no observers:
        whoever adds up the tokens of a log must get the tokens of the run."""
        self.end_step()
        return self._summed(self._train, "train", step, final=False)

    @contextmanager
    def evaluation(self, split: str, step: int, prefix: str = "eval_") -> Iterator[Evaluation]:
        """A block of counts of their own; the train window and an open step wait.

        Evaluations may be nested. One that is left by an exception, or discarded, is dropped
        without a collective. After the block, `window` of what is yielded has the values.
        """
        with self._open_evaluation() as found:
            yield found
        if not found.discarded:
            found.window = self._summed(found.table, split, step, prefix)
            self._tell(found.window)

    def write(self, window: Window, logs: MutableMapping[str, Any]) -> None:
        """Put a window into a trainer's own log; a key that is there stays, with a warning."""
        taken = sorted(key for key in window.logs if key in logs)
        if taken:
            self.warn_once(
                f"the metric key {taken[0]!r} is already logged by the trainer, so the channel's "
                "value is left out; choose another key_format, or rename the channel."
            )
        logs.update({key: value for key, value in window.logs.items() if key not in taken})

    # ---- batches ---------------------------------------------------------------------------

    def collator(self, base: Callable[[list[Any]], Any]) -> ChannelCollator:
        """`base`, whose batches also carry the channels and boundaries that `observe` takes."""
        return ChannelCollator(
            base,
            fields=self.config.fields,
            table=self.labels if self.labels.names else None,
            bounds_key=BOUNDS_KEY,
            row_bounds=False,
            carry_faults=True,
            classes=self._classes,
        )

    @contextmanager
    def observe(self, model: torch.nn.Module, batch: MutableMapping[str, Any]) -> Iterator[None]:
        """One forward of a transformers model over exactly the labels of `batch`.

            with metrics.observe(model, batch):
                loss = model(**batch).loss

        Our keys are taken out of the batch. The token losses are those that the model's own loss
        is made of. They are counted when the block ends without an exception.

        Raises:
            ChannelError: if the batch has no channels, see `collator`.
            UnsupportedVersionError: if the losses of single tokens cannot be had.
        """
        # Only here: counting by hand needs no transformers.
        from channel_metrics.observing import observe

        with observe(self, model, batch, with_correct="token_acc" in self.config.metrics):
            yield

    # ---- names -----------------------------------------------------------------------------

    def declare(self, dataset: Any, split: str, fields: Sequence[str] = ()) -> bool:
        """Learn the channels of a dataset, where they can be read beforehand.

        Args:
            dataset: a `datasets.Dataset`, or a list of records. Others cannot be scanned.
            split: `train`, or what the messages call this set.
            fields: where a record holds its channel; by default those of the config.

        Returns:
            Whether the dataset could be scanned.

        Raises:
            ChannelError: if no record of a training set has a channel; and as `declare_names`.
        """
        fields = fields or self.config.fields
        self._classes.update(class_names(dataset, fields))
        names = scan_channels(dataset, fields, split, needed=not self.config.channels)
        if names is not None:
            self.declare_names(names)
        return names is not None

    def declare_names(self, names: Iterable[str]) -> None:
        """Learn the names of channels that are known beforehand, in the same order on all ranks.

        Those that the config does not want (`unknown`) are an error, or count as unlabeled.

        Raises:
            ChannelError, ConfigError: for names that would share a log key, and for one that the
                config refuses.
        """
        names = [name for name in names if name != UNLABELED]
        self.labels.ids(names)
        self._maker.declare(name for name in names if name in self.labels)

    def check_eval_channels(self) -> None:
        """Once all channels are known: `ConfigError` for an `eval_channels` that is none."""
        self._maker.check_eval_channels(self.labels.names)

    def warn_once(self, message: str) -> None:
        """Log a warning the first time it comes up."""
        self._maker.warn_once(message)

    # ---- checkpoints -----------------------------------------------------------------------

    def start(self, folder: Path | None = None) -> None:
        """A run begins: an empty window, and the totals of the checkpoint `folder`, or zeros."""
        self._train.reset()
        self._step = None
        self.totals = RunTotals(self.schema)
        if folder is not None:
            self.resume(folder)

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write the totals of all ranks into the folder of a checkpoint. A collective.

        Those of the open window are among them, and it stays open.
        """
        self.end_step()
        if self.guard.off:
            return
        with self.guard.guarded():
            names, sums, *_ = self._sum(self._train)
            totals = self.totals.copy().add(names, sums)
            if is_writer:
                totals.save(folder / TOTALS_FILE)

    def resume(self, folder: Path) -> None:
        """Go on with the totals of a checkpoint; warn and start at zero if it has none."""
        path = totals_path(folder)
        if path is None:
            logger.warning(
                "%s has no %s: it was written without channel metrics, so %s count from here.",
                folder,
                TOTALS_FILE,
                " and ".join(self.schema.run_metrics),
            )
            return
        self.totals = RunTotals(self.schema)
        try:
            self.totals.load(path)
        except ChannelMetricsError as error:
            # What is counted from here on is right all the same.
            if self.guard.raises:
                raise
            self.warn_once(f"{error} Until then, they start at zero.")

    def state_dict(self) -> dict[str, Any]:
        """The totals and the open window of this rank, for a checkpoint of your own."""
        self.end_step()
        return {"totals": self.totals.state_dict(), "train": self._train.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        totals = RunTotals(self.schema).load_state_dict(state["totals"])
        self._train.load_state_dict(state["train"])
        self.totals = totals

    # ---- behind the scenes -----------------------------------------------------------------

    def _sum(self, table: SumTable) -> GlobalSums:
        return sum_over_ranks(table, self._agreement, self.ranks, self.guard)

    def _summed(
        self, table: SumTable, split: str, step: int, prefix: str = "", *, final: bool = True
    ) -> Window:
        """The window of all ranks; one without values where the metrics have ended."""
        if not self.guard.off:
            with self.guard.guarded():
                found = self._sum(table)
                totals = self.totals if split == "train" and final else None
                if totals is not None:
                    totals.add(found.names, found.sums)
                return self._maker.make(
                    found, split=split, step=step, prefix=prefix, totals=totals, final=final
                )
        return Window(split=split, step=step, prefix=prefix, final=final)

    def _tell(self, window: Window) -> None:
        # A trainer may log twice at one step: nobody is told of a window that holds nothing.
        if not self.measuring or not window.table.any():
            return
        for observer in list(self.on_window):
            try:
                observer(window)
            except Exception as error:
                if not getattr(observer, "is_display", False):
                    raise
                self.on_window.remove(observer)
                self.warn_once(f"{observer!r} failed, and shows nothing from now on: {error!r}")

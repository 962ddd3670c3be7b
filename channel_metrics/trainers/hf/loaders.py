"""The data side of the Trainer mixin: it makes data loaders whose batches carry channels.

The collator is wrapped only while a data loader is made. At all other times,
`trainer.data_collator` is the user's own object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from channel_metrics.data.carried import INDEX, Indexed, carried_of
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.repeats import repeats_unseen
from channel_metrics.data.scan import class_names, count_channels
from channel_metrics.errors import ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.hf.batch import Scratch
from channel_metrics.trainers.hf.data import TokenBatchCollator, wrap_collator
from channel_metrics.trainers.hf.parallel import (
    RankLayout,
    RowCollator,
    TargetIdCollator,
    check_keeps_rows,
    layout_of,
)
from channel_metrics.trainers.wanted import rows_of

__all__ = ["ChannelLoadersMixin"]

if TYPE_CHECKING:
    import transformers

    class _TrainerBase(transformers.Trainer):
        """The class that the mixins extend, for type checkers only."""

        train_dataset: Any
        eval_dataset: Any
        _signature_columns: Any
else:
    _TrainerBase = object


class ChannelLoadersMixin(_TrainerBase):
    """Makes data loaders whose batches carry `channels`."""

    channel_metrics: ChannelMetrics | None = None
    channel_scratch: Scratch
    channel_whole_script = False
    """Whether a patch attached the metrics to every trainer of the script.

    A trainer without labels of tokens is then left alone."""

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._channel_collator(self.train_dataset, "train"):
            return super().get_train_dataloader(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        with self._channel_collator(dataset, "eval"):
            loader = super().get_eval_dataloader(eval_dataset)
        if self.channel_metrics is not None:
            with self.channel_metrics.guard.guarded():
                self._warn_of_repetitions(self.channel_metrics, loader)
        return loader

    def _warn_of_repetitions(self, session: ChannelMetrics, loader: Any) -> None:
        if repeats_unseen(loader, self.accelerator):
            session.warn_once(
                "every rank reads the evaluation stream itself (dispatch_batches=False): if its "
                "records do not fill the last batch of all ranks, accelerate repeats the first "
                "ones, which cannot be told from others here, and they are counted twice."
            )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._channel_collator(test_dataset, "test"):
            return super().get_test_dataloader(test_dataset)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        if not isinstance(self.data_collator, ChannelCollator):
            return super()._remove_unused_columns(dataset, description=description)
        self._set_signature_columns_if_needed()
        before = self._signature_columns
        self._signature_columns = [*before, *self.data_collator.roots]
        try:
            kept = super()._remove_unused_columns(dataset, description=description)
        finally:
            self._signature_columns = before
        carried = self.data_collator.carried
        return Indexed(kept) if carried is not None and carried.id_field == INDEX else kept

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_train_sampler(*map(_without_index, args), **kwargs)

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return super()._get_eval_sampler(*map(_without_index, args), **kwargs)

    def _get_collator_with_removed_columns(
        self, data_collator: Callable[..., Any], description: str | None = None
    ) -> Callable[..., Any]:
        remove = super()._get_collator_with_removed_columns
        if not isinstance(data_collator, ChannelCollator):
            return remove(data_collator, description=description)
        # Our collator must be the outer one, because it needs columns that the other one removes.
        return data_collator.around(remove(data_collator.base, description=description))

    def _rank_layout(self) -> RankLayout:
        """How the ranks of this run divide the batches."""
        found = getattr(self, "get_tp_size", lambda: 1)()
        return layout_of(self.accelerator, tp_size=found)

    def _collator_kind(self, dataset: Any, description: str, known: bool) -> type[ChannelCollator]:
        """The collator that fits the way in which batches reach the ranks."""
        dispatched = self.accelerator.dispatch_batches
        if dispatched is None:
            dispatched = isinstance(dataset, torch.utils.data.IterableDataset)
        dispatched = dispatched and self.accelerator.num_processes > 1
        cut = self._rank_layout().shards_rows
        if (dispatched or cut) and not known:
            declare = "declare `channels` in the metrics config"
            reason, remedy = (
                ("rows are cut along the sequence (cp_size or sp_size > 1)", declare)
                if cut
                else (
                    "one process sends the batches of a stream to the others (dispatch_batches)",
                    'set accelerator_config={"dispatch_batches": False}, or, if all batches are '
                    f"padded to one length (accelerate asks for that), {declare}",
                )
            )
            raise ConfigError(
                f"{reason}, so channels must be ids, but the {description} set cannot be scanned "
                f"for names ({type(dataset).__name__}); {remedy}."
            )
        if dispatched:
            check_keeps_rows(self.data_collator)
        return TargetIdCollator if cut else RowCollator if dispatched else ChannelCollator

    @contextmanager
    def _channel_collator(self, dataset: Any, description: str) -> Iterator[None]:
        """Inside this context, `data_collator` also adds the channels to a batch of `dataset`."""
        session, before = self.channel_metrics, self.data_collator
        loading = self.accelerator.dataloader_config
        dispatch = loading.dispatch_batches
        if session is not None and session.measuring:
            with session.guard.guarded():
                self.data_collator = self._with_channels(session, dataset, description)
                if self.accelerator.num_processes == 1:
                    # There is nobody to send batches to. But accelerate would cut the boundaries
                    # as if they were rows, and below 1.13 it raises TypeError on names.
                    loading.dispatch_batches = False
        try:
            yield
        finally:
            self.data_collator, loading.dispatch_batches = before, dispatch

    def _declare(self, session: ChannelMetrics, dataset: Any, split: str) -> bool:
        """Scan a dataset for channels; False if it cannot be scanned."""
        return session.declare(dataset, split)

    def channel_names(self, session: ChannelMetrics, dataset: Any) -> set[str] | None:
        """The channels of a dataset, `unlabeled` included; None if it cannot be scanned."""
        counts = count_channels(dataset, session.config.label_fields)
        return rows_of(session, counts)

    def _with_channels(self, session: ChannelMetrics, dataset: Any, description: str) -> Any:
        """The trainer's own collator, wrapped for a data loader of `dataset`."""
        if isinstance(self.data_collator, ChannelCollator):
            return self.data_collator
        scanned = self._declare(session, dataset, description)
        known = scanned or bool(session.config.channels)
        kind = self._collator_kind(dataset, description, known)
        if kind is ChannelCollator and self.channel_whole_script:
            kind = TokenBatchCollator
        self._set_signature_columns_if_needed()
        return wrap_collator(
            self.data_collator,
            fields=session.config.label_fields,
            table=session.labels if known else None,
            signature_columns=self._signature_columns,
            remove_unused_columns=self.args.remove_unused_columns,
            kind=kind,
            classes=class_names(dataset, session.config.label_fields),
            columns=session.token_axes.columns,
            carried=carried_of(session.config),
        )


def _without_index(dataset: Any) -> Any:
    """What transformers knows, which reads the lengths in a column of a `datasets.Dataset`."""
    return dataset.dataset if isinstance(dataset, Indexed) else dataset

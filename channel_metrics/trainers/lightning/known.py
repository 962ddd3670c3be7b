"""What is known before the first batch: the channels of the data sets, and the log keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch.utils._pytree import tree_leaves

from channel_metrics import swap
from channel_metrics.data.collator import ChannelCollator
from channel_metrics.data.scan import class_names, count_channels
from channel_metrics.errors import ChannelError, ConfigError
from channel_metrics.session import ChannelMetrics
from channel_metrics.trainers.wanted import check_stop_when, check_wanted

__all__ = ["Known"]


class Known:
    """Learns the channels when Lightning asks for its data loaders, before their workers start.

    Attributes:
        sets: {stage: for each data loader its channels, or None if they cannot be scanned}.
    """

    def __init__(self, session: ChannelMetrics) -> None:
        self.session = session
        self.sets: dict[str, list[set[str] | None]] = {}

    def watch(self, trainer: Any, undo: ExitStack) -> None:
        """Learn from all data loaders of this run, until `undo` is closed."""
        loops = {
            "train": [trainer.fit_loop],
            "val": [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop],
            "test": [trainer.test_loop],
        }
        for stage, of_stage in loops.items():
            for loop in of_stage:
                undo.enter_context(
                    swap.wrapped(loop._data_source, "dataloader", self._asking(stage))
                )

    def _asking(self, stage: str) -> Callable[..., Any]:
        def dataloader(original: Callable[[], Any]) -> Any:
            loaders = original()
            with self.session.guard.guarded():
                self._learn(tree_leaves(getattr(loaders, "flattened", loaders)), stage)
            return loaders

        return dataloader

    def _learn(self, loaders: list[Any], stage: str) -> None:
        fields = self.session.config.label_fields
        for loader in loaders:
            _name_classes(loader, fields)
        # Lightning may ask again in later epochs, for data sets like these.
        if stage in self.sets:
            return
        counts = [count_channels(getattr(one, "dataset", None), fields) for one in loaders]
        rows = self.session.rows
        self.sets[stage] = [None if found is None else rows(found) for found in counts]
        self.session.declare_names(sorted(n for found in counts for n in found or () if n))

    def check(self, trainer: Any) -> None:
        """Check the settings that name channels or keys, as far as they can be known now.

        Raises:
            ConfigError, ChannelError: two values would share a key, or an entry of
                `eval_channels` is no channel.
        """
        session, train, held = self.session, self.sets.get("train", []), self.sets.get("val", [])
        if not trainer.enable_validation:
            held = []
        prefixes = ["val_"] if len(held) == 1 else [f"val_{i}_" for i in range(len(held))]
        for prefix in prefixes:
            for error in session.keys.learn(prefix=prefix):
                raise error
        if held and None not in (*train, *held):
            session.check_eval_channels()
        sets = dict(zip(prefixes, held, strict=True))
        of_train = None if len(train) != 1 else train[0]
        for setting, wanted in _monitored(trainer):
            try:
                check_wanted(session, wanted, {"": of_train, **sets}, setting)
            except ConfigError as error:
                session.warn_once(f"{error} (Ignore this if the module itself logs the key.)")
        check_stop_when(session, {"": of_train, **sets})


def _monitored(trainer: Any) -> Iterator[tuple[str, str]]:
    """(who watches a logged key, the key)"""
    for callback in trainer.callbacks:
        if isinstance(getattr(callback, "monitor", None), str):
            yield f"`monitor` of {type(callback).__name__}", callback.monitor
    for scheduler in trainer.lr_scheduler_configs:
        if scheduler.reduce_on_plateau and scheduler.monitor:
            yield f"`monitor` of {type(scheduler.scheduler).__name__}", scheduler.monitor


def _name_classes(loader: Any, fields: tuple[str, ...]) -> None:
    """Tell the collator of a data loader the names of the class numbers in its data set."""
    collate = getattr(loader, "collate_fn", None)
    if not isinstance(collate, ChannelCollator):
        return
    classes = class_names(loader.dataset, fields)
    for field, names in classes.items():
        if collate.classes.setdefault(field, names) != names:
            raise ChannelError(
                f"the data sets of two data loaders number the classes of {field!r} in different "
                "ways, but share a collator; make one with `metrics.collator` for each of them."
            )

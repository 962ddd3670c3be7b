"""The mixin for Axolotl's trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer

from channel_metrics.data.collator import ChannelCollator
from channel_metrics.errors import UnsupportedVersionError
from channel_metrics.trainers.hf.mixin import ChannelMetricsMixin
from channel_metrics.trainers.hf.rows import RowsMixin, WithoutNames

__all__ = ["AxolotlMixin", "mixin_for"]


class AxolotlMixin(RowsMixin):
    """For `AxolotlTrainer`."""

    data_collator: Any
    eval_data_collator: Any

    @contextmanager
    def _channel_collator(self, *args: Any) -> Iterator[None]:
        """Inside this context, Axolotl's second collator, for evaluations, is like the first."""
        before = self.eval_data_collator
        with super()._channel_collator(*args):
            self.eval_data_collator = self.data_collator.around(before)
            try:
                yield
            finally:
                self.eval_data_collator = before

    def _set_signature_columns_if_needed(self) -> None:
        # With `sample_packing`, a second call of Axolotl's own raises KeyError.
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        # With `balance_labels`, Axolotl asks for the class of its collator.
        before = self.data_collator
        if isinstance(before, (ChannelCollator, WithoutNames)):
            self.data_collator = before.base
        try:
            return super()._get_train_sampler(*args, **kwargs)
        finally:
            self.data_collator = before


def mixin_for(trainer_class: type) -> type[ChannelMetricsMixin]:
    """The mixin for a trainer of Axolotl.

    Raises:
        UnsupportedVersionError: it is not that of supervised fine-tuning.
    """
    if not issubclass(trainer_class, AxolotlTrainer):
        raise UnsupportedVersionError(
            "channel metrics are for Axolotl's supervised fine-tuning, but this run has a "
            f"{trainer_class.__name__}; remove the plugin for this run."
        )
    return AxolotlMixin

"""Where counts go: to the train window, to the open step, or to the innermost open evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from channel_metrics.alerting import Outliers
from channel_metrics.core.accumulator import ChannelLossAccumulator
from channel_metrics.core.axis_settings import Source
from channel_metrics.core.checks import check_scalar
from channel_metrics.core.excess import EXCESS_LOSS, UNMATCHED
from channel_metrics.core.extremes import Extremes
from channel_metrics.core.faults import FaultGuard
from channel_metrics.core.labels import LabelTable
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.schema import Schema
from channel_metrics.core.table import SumTable
from channel_metrics.core.text_sizes import TextSizes
from channel_metrics.core.token_axes import TokenAxes
from channel_metrics.core.token_text import text_sizes
from channel_metrics.errors import ChannelMetricsError, ConfigError
from channel_metrics.windows import Evaluation, OpenWindow

__all__ = ["Counting"]

logger = logging.getLogger("channel_metrics")


class Counting:
    """The sums of this rank that are open now.

    Args:
        labels: the channels.
        schema: what is counted.
        guard: decides what an error does. After the first error, nothing is counted any more.
        axes: those of the config.
        outliers: the settings of the most extreme sequences, if they are kept.
        with_correct: whether `observe` measures which tokens are predicted.

    Attributes:
        warned: the warnings that were logged.
        with_targets: whether a metric needs the token that each loss is about.
        token_axes: the axes whose labels belong to single tokens.
        with_entropy: whether a metric needs the entropy of what is predicted.
        text_sizes: the bytes and characters of the tokens, if they are known.
        on_count: functions that get each micro-batch of training, after it was counted and before
            its backward pass.
    """

    def __init__(
        self,
        labels: LabelTable,
        schema: Schema,
        guard: FaultGuard,
        axes: Mapping[str, Source],
        *,
        with_correct: bool,
        outliers: Outliers | None = None,
    ) -> None:
        self.labels, self.schema, self.guard = labels, schema, guard
        self.with_correct = with_correct
        self.with_entropy = "entropy_sum" in schema.column_names
        self.text_sizes: TextSizes | None = None
        self.on_count: list[Callable[[MicroBatch], object]] = []
        self.token_axes = TokenAxes(axes)
        self._with_text = "text_nll" in schema.column_names
        self.outliers, self.tokenizer = outliers, None
        of_text = outliers is not None and outliers.text_tokens > 0
        self.with_targets = self._with_text or of_text or bool(self.token_axes.of_targets)
        if self.token_axes and schema.unit != "tokens":
            raise ConfigError(
                f"the axes {', '.join(self.token_axes)} are about single tokens, but this "
                f"trainer counts {schema.unit}; take them out of `axes`."
            )
        self.warned: set[str] = set()
        self._train = OpenWindow(self._new_table())
        self._evaluations: list[Evaluation] = []

    def warn_once(self, message: str, *values: object) -> None:
        """Log a warning once. Later calls with the same message and other values do nothing."""
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message, *values)

    @property
    def measuring(self) -> bool:
        """Whether this rank still measures."""
        return self.guard.measuring

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is open. Counts then go to it."""
        return bool(self._evaluations)

    def count(self, batch: MicroBatch) -> None:
        """Add the tokens of one micro-batch to the innermost open evaluation, else to training."""
        with self.guard.guarded():
            if self.measuring:
                table = self._open_table()
                assert isinstance(table, ChannelLossAccumulator)
                table.text_sizes = self.text_sizes
                batch.add_to(table, self._groups(batch))
                for tell in () if self.evaluating else self.on_count:
                    tell(batch)
                if self._with_text and (self.text_sizes is None or batch.labels is None):
                    self._tell_of_text()
                if self.with_entropy and batch.entropy is None:
                    self.warn_once(
                        "entropy needs logits, but the loss of a micro-batch was computed without "
                        "them (by a fused loss, by Megatron, or in a loop that hands over token "
                        "losses): its tokens are left out of `entropy`."
                    )
                if table.extremes is not None and table.extremes.lacks_sequences:
                    self.warn_once(
                        "outliers need whole sequences, but here they are cut across ranks, so "
                        "there are no outliers."
                    )
                if table.in_parts:
                    self._tell_of_parts()
                elif UNMATCHED in table.columns and batch.reference is None:
                    self.warn_once(
                        f"{EXCESS_LOSS} needs `ref_nll` and `ref_tokens` of each sequence, which "
                        "a micro-batch does not have: its tokens are left out; see docs/excess.md."
                    )

    def _groups(self, batch: MicroBatch) -> list[Tensor]:
        """For each token axis the rows of the tokens."""
        if not self.token_axes:
            return []
        needed = self.token_axes.of_places
        found = batch.of_tokens if needed else None
        if needed and found is None:
            self.warn_once(
                "the batches do not show where a token stands in its sequence, so the axes "
                f"{', '.join(needed)} are left out. This is so where sequences are cut across "
                "ranks, or packed without their boundaries."
            )
        return self.token_axes.groups(
            self.labels,
            batch.token_losses,
            places=found,
            marks=batch.marks,
            targets=batch.labels,
        )

    def read_tokenizer(self, tokenizer: Any, model: Any = None) -> None:
        """Learn from a tokenizer how many bytes of text each token stands for.

        For an axis by modality, learn which tokens stand for images, from a processor or else
        from a model. It does nothing if the config needs none of this, or without a tokenizer.

        Args:
            tokenizer: a fast tokenizer of transformers, a processor that has one, or None.
            model: one of transformers, or None.

        Raises:
            ConfigError: the bytes of its tokens cannot be told.
        """
        sources = (getattr(tokenizer, "tokenizer", None), getattr(model, "config", None))
        self.token_axes.read_ids(tokenizer, *sources)
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if self._with_text and tokenizer is not None:
            self.text_sizes = text_sizes(tokenizer)

    def _tell_of_text(self) -> None:
        lacks = "the labels" if self.text_sizes is not None else "a tokenizer"
        self.warn_once(
            f"bits_per_byte and bits_per_char need {lacks}, so they are left out; give "
            "`metrics.read_tokenizer(tokenizer)` the tokenizer, and micro-batches their `labels`."
        )

    def _tell_of_parts(self) -> None:
        left_out = {column.name for column in self.schema.columns if column.whole}
        names = [m.name for m in self.schema.metrics if left_out.intersection(m.needs)]
        self.warn_once(
            f"{', '.join(names)} need whole sequences and float64: they are left out, because "
            "sequences are cut across ranks, or because the device has no float64."
        )

    def add(
        self,
        labels: Tensor | Sequence[str | None],
        values: Mapping[str, Tensor],
        *,
        ours: Tensor | None = None,
        theirs: Tensor | None = None,
    ) -> None:
        """Add N samples that are not tokens, such as preference pairs.

        Args:
            labels: their channels, as N names or ids [N].
            values: {column of the schema: values [N]}.
            ours, theirs: a scalar that follows from the values, and the trainer's own. Each
                window compares their sums.

        Raises:
            ChannelMetricsError: labels, values and scalars do not fit; then nothing is added.
        """
        with self.guard.guarded():
            if self.measuring:
                # Before anything is added: a call that is refused changes nothing.
                if ours is not None and theirs is not None:
                    check_scalar("ours", ours)
                    check_scalar("theirs, the loss to compare with,", theirs)
                table = self._open_table()
                table.add(labels, values)
                if ours is not None and theirs is not None:
                    table.compare(ours, theirs)

    def begin_step(self) -> None:
        """Count in a table for this step, until `end_step`; in an evaluation, for a step of it.

        A second call drops what the step has counted so far, for trainers that repeat a step.
        """
        window = self._open_window()
        if window.step is None:
            window.step = self._new_table()
        window.step.reset()

    def end_step(self, *, discard: bool = False) -> None:
        """Add the step to the window, or `discard` it if the optimizer skipped it."""
        self._end_step(self._open_window(), discard)

    def _end_step(self, window: OpenWindow, discard: bool = False) -> None:
        step, window.step = window.step, None
        with self.guard.guarded():
            if discard and step is None:
                raise ChannelMetricsError(
                    "end_step(discard=True) needs begin_step() before the step; without it, what "
                    "the step counted is in the window already."
                )
            if step is not None and not discard:
                window.table.to(step.device)
                window.table.merge(step)

    @contextmanager
    def _open_evaluation(self) -> Iterator[Evaluation]:
        """A block with a table of its own, which takes the counts."""
        found = Evaluation(self._new_table())
        self._evaluations.append(found)
        try:
            yield found
            self._end_step(found)
        finally:
            # A generator may leave an inner evaluation open, or close it after the outer one.
            if found in self._evaluations:
                del self._evaluations[self._evaluations.index(found) :]

    def _new_table(self) -> SumTable:
        if self.schema.unit == "tokens":
            table = ChannelLossAccumulator(self.labels, schema=self.schema)
            if self.outliers is not None:
                table.extremes = Extremes(self.outliers.count, self.outliers.text_tokens)
            return table
        return SumTable(self.labels, self.schema.column_names)

    def _open_window(self) -> OpenWindow:
        return self._evaluations[-1] if self._evaluations else self._train

    def _open_table(self) -> SumTable:
        window = self._open_window()
        return window.table if window.step is None else window.step

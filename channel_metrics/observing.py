"""One forward of a model, observed and counted: `ChannelMetrics.observe`.

If the model computes its loss itself, as transformers' models do, the token losses are read from
that. A loop that computes its own loss hands over the logits, or the token losses:

    with metrics.observe(model, batch) as seen:
        logits = model(batch["input_ids"])
        seen.logits(logits)

Letters: B rows, S row length, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from channel_metrics.capture.logits import shifted_labels
from channel_metrics.capture.placing import Place, beside_labels
from channel_metrics.core.checks import IGNORE_INDEX
from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.sums import TokenValues
from channel_metrics.counting import Counting
from channel_metrics.data.batch_channels import BatchChannels, check_not_cut, take_channels
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.repeats import first_records, real_records
from channel_metrics.errors import ChannelError, ChannelMetricsError, UnsupportedVersionError
from channel_metrics.losses.cross_entropy import token_losses_of_logits

__all__ = ["Seen", "observe"]

_REMEDY = (
    "In a loop of your own, hand over what the loss was computed from: `seen.logits(...)` in the "
    "block."
)

# {session: {model: its reader}}. A reader keeps what it learned about the model at the first batch.
_readers: WeakKeyDictionary[Counting, WeakKeyDictionary[torch.nn.Module, Any]] = WeakKeyDictionary()


class Seen:
    """What `observe` gives its block: takes the logits or token losses of a loop's own loss.

    Call one of the two methods, once. What is handed over is read at once and not kept.

    Attributes:
        labels: those of the batch.
        values: the values of the tokens that were handed over; None if none were.
        observation: what was seen of the model, an `Observation`; None if it is not observed.
        discarded: whether `discard` was called.
    """

    def __init__(self, metrics: Counting, labels: Any) -> None:
        self._metrics, self.labels = metrics, labels
        self.values: TokenValues | None = None
        self.observation: Any = None
        self.discarded = False

    def discard(self) -> None:
        """Do not count this batch: nothing is trained on it."""
        self.discarded = True

    def logits(self, logits: Tensor, *, labels: Tensor | None = None, causal: bool = True) -> None:
        """Measure the token losses on logits, with a softmax of our own.

        Args:
            logits: [B, S, V], or [B, S - 1, V] without the last position; rows may be flattened.
            labels: int64 [B, S], -100 where not supervised; by default those of the batch.
            causal: whether the logits at position t predict the label at t + 1. If False, they
                predict the label at t, and `logits` must have all S positions.
        """
        with self._metrics.guard.guarded():
            if not self._metrics.measuring:
                return
            targets, place = self._targets(logits.shape[:-1], labels, causal)
            found = token_losses_of_logits(
                logits.detach().reshape(-1, logits.shape[-1]),
                targets.reshape(-1).to(logits.device),
                with_correct=self._metrics.with_correct,
                with_entropy=self._metrics.with_entropy,
            )
            more = {"correct": found.correct, "entropy": found.entropy}
            self._keep(targets, place, found.nll, **more)

    def token_losses(
        self,
        losses: Tensor,
        *,
        correct: Tensor | None = None,
        labels: Tensor | None = None,
        causal: bool = True,
    ) -> None:
        """Take token losses that the loop has computed itself.

        Args:
            losses: [B, S] in nats, or [B, S - 1] without the last position; may be flattened.
            correct: bool of the same shape, whether the target was predicted; for `token_acc`.
            labels, causal: as for `logits`.
        """
        with self._metrics.guard.guarded():
            if not self._metrics.measuring:
                return
            targets, place = self._targets(losses.shape, labels, causal)
            if correct is not None and correct.shape != losses.shape:
                raise ChannelMetricsError(
                    f"`correct` must have the shape of the losses, {list(losses.shape)}, but has "
                    f"{list(correct.shape)}."
                )
            self._keep(targets, place, losses.detach(), correct=correct)

    def _targets(
        self, shape: torch.Size, labels: Tensor | None, causal: bool
    ) -> tuple[Tensor, Place]:
        """The target [B, S] or [B, S - 1] of each position, and where the labels are."""
        labels = self.labels if labels is None else labels
        if not isinstance(labels, Tensor):
            raise ChannelError(
                "logits and token losses need `labels`: keep them in the batch, or pass `labels=`."
            )
        width = labels.shape[-1]
        rows = labels.numel() // max(width, 1)
        for lead in (0, -1) if causal else (0,):
            # Flat, or rows of this length: not the layout [S, B].
            if shape.numel() == rows * (width + lead) and shape[-1] in (width + lead, *shape[:1]):
                targets = shifted_labels(labels) if causal else labels
                return targets[..., : width + lead], Place(causal, lead)
        wanted = f"{[rows, width]} or {[rows, width - 1]}" if causal else f"{[rows, width]}"
        raise ChannelMetricsError(
            f"logits or token losses over labels {list(labels.shape)} must have {wanted} "
            f"positions{'' if causal else ' with causal=False'}, but have {list(shape)}; pass the "
            "`labels` that they belong to, and causal=False if these are already shifted."
        )

    def _keep(self, targets: Tensor, place: Place, nll: Tensor, **more: Any) -> None:
        if self.values is not None:
            raise ChannelMetricsError(
                "logits or token losses were handed over twice in one block; open one block of "
                "`observe` per forward."
            )
        mask = (targets != IGNORE_INDEX).to(nll.device)
        kept = targets.to(nll.device) if self._metrics.with_targets else None
        values = TokenValues(nll, mask, targets=kept, **more)
        values = values.map(lambda v: v.reshape(targets.shape))
        self.values = beside_labels(values, place, by_rows=False)


@contextmanager
def observe(
    metrics: Counting,
    model: torch.nn.Module,
    batch: MutableMapping[str, Any],
    *,
    accelerator: Any = None,
    real: tuple[int, int] | None = None,
    remedy: str = _REMEDY,
) -> Iterator[Seen]:
    """See `ChannelMetrics.observe`.

    Args:
        real: (records without repetitions, all records) of an evaluation batch; None if nothing
            is repeated, or if `accelerator` knows it.
        remedy: the end of the error that is raised if the token losses cannot be read.
    """
    taken = take_channels(batch)
    seen = Seen(metrics, batch.get("labels"))
    if metrics.measuring:
        with metrics.guard.guarded():
            _check(taken, batch)
    if not metrics.measuring or not isinstance(taken, BatchChannels):
        yield seen
        return
    reader = _reader_of(metrics, model)
    watching: AbstractContextManager[Any] = reader.observe(model) if reader else nullcontext()
    with watching as seen.observation:
        yield seen
    if seen.discarded:
        return
    with metrics.guard.guarded():
        # The loop may have taken the labels out of the batch for its own loss.
        check_not_cut(taken)
        labels = batch.get("labels", seen.labels)
        values, reported = seen.values, None
        if values is None:
            try:
                values, reported = _captured(
                    reader, seen.observation, model, labels, taken, metrics=metrics
                )
            except UnsupportedVersionError as error:
                raise UnsupportedVersionError(f"{error} {remedy}") from error
        values = taken.with_places(values) if metrics.token_axes else values
        real = _real_records(metrics, accelerator, real)
        if real is not None and real[0] < real[1]:
            taken, values, reported = *_without_repeats(taken, values, *real), None
        of_batch = taken.channels, taken.cu_seqlens, reported, taken.reference
        metrics.count(MicroBatch.of_values(values, *of_batch, record_ids=taken.record_ids))


def _check(taken: Any, batch: Mapping[str, Any]) -> None:
    """Raise if the collator failed, or if the batch does not come from one of ours."""
    if isinstance(taken, CollatorFault):
        raise taken.error
    if taken is None:
        raise ChannelError(
            f"a batch must hold `channels`, but holds {', '.join(map(str, batch)) or 'nothing'}; "
            "give its data loader a collate_fn that `metrics.collator` has made."
        )


def _reader_of(metrics: Counting, model: torch.nn.Module) -> Any:
    """The `TokenLossReader` of a model; None if no model of transformers can exist yet."""
    if "transformers" not in sys.modules:
        return None
    from channel_metrics.capture.reader import TokenLossReader

    of_session = _readers.setdefault(metrics, WeakKeyDictionary())
    if model not in of_session:
        reader = TokenLossReader(with_correct=metrics.with_correct, guard=metrics.guard)
        reader.with_entropy = metrics.with_entropy
        of_session[model] = reader
    return of_session[model]


def _captured(
    reader: Any,
    observation: Any,
    model: torch.nn.Module,
    labels: Any,
    taken: BatchChannels,
    *,
    metrics: Counting,
) -> tuple[TokenValues, Tensor | None]:
    """What the model's own loss was made of, and its sum."""
    if not isinstance(labels, Tensor):
        raise ChannelError("a batch must hold `labels`, one for each token; add them to it.")
    if reader is None:
        raise UnsupportedVersionError("the model is none of transformers.")
    if not observation.forwards and not observation.others:
        raise UnsupportedVersionError("the model has not run, or its forward was not called.")
    from channel_metrics.capture.transformers import is_causal

    causal = None if reader.captured is not None else is_causal(model)
    found: tuple[TokenValues, Tensor | None] = reader.read(
        observation,
        labels,
        causal=causal,
        by_rows=taken.cu_seqlens is None and not metrics.token_axes,
        with_targets=metrics.with_targets,
    )
    return found


def _real_records(
    metrics: Counting, accelerator: Any, real: tuple[int, int] | None
) -> tuple[int, int] | None:
    """`real`, or what the accelerator says instead; None in training, where repetitions count."""
    if not metrics.evaluating:
        return None
    if accelerator is not None:
        return real_records(accelerator, accelerator.process_index, accelerator.num_processes)
    if real is None and "accelerate" in sys.modules:
        _tell_of_repeats(metrics)
    return real


def _without_repeats(
    taken: BatchChannels, values: TokenValues, count: int, size: int
) -> tuple[BatchChannels, TokenValues]:
    """The first `count` of the `size` records of a batch; the others are repeated."""
    kept = first_records(taken, values, count, size)
    if kept is None:
        raise ChannelMetricsError(
            f"the last evaluation batch repeats {size - count} of its {size} records, but holds "
            f"{taken.num_sequences} sequences: which of them are repeated cannot be told. "
            "Evaluate with one record per row, or so that nothing is repeated: on one process, or "
            "in accelerate with even_batches=False."
        )
    return kept


def _tell_of_repeats(metrics: Counting) -> None:
    """Warn once if accelerate has repeated records, and `accelerator` was not given."""
    from accelerate.state import GradientState, PartialState

    state = GradientState()
    repeats = state.end_of_dataloader and state.remainder > 0
    if repeats and PartialState().num_processes > 1:
        metrics.warn_once(
            "accelerate may have repeated records to fill the last evaluation batch of all ranks; "
            "then they are counted twice. Pass `accelerator=` to `evaluate` or `observe`."
        )

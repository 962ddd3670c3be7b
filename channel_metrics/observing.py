"""One forward of a model, observed and counted: `ChannelMetrics.observe`.

If the model computes its loss itself, as transformers' models do, the token losses are read from
that. A loop that computes its own loss hands over the logits, or the token losses:

    with metrics.observe(model, batch) as seen:
        logits = model(batch["input_ids"])
        seen.logits(logits)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from channel_metrics.core.micro_batch import MicroBatch
from channel_metrics.core.sums import TokenValues
from channel_metrics.counting import Counting
from channel_metrics.data.batch_channels import BatchChannels, check_not_cut, take_channels
from channel_metrics.data.collator_fault import CollatorFault
from channel_metrics.data.repeats import first_records, real_records
from channel_metrics.errors import ChannelError, ChannelMetricsError, UnsupportedVersionError
from channel_metrics.seen import Seen

__all__ = ["observe"]

_REMEDY = (
    "In a loop of your own, hand over what the loss was computed from: `seen.logits(...)` in the "
    "block."
)

# {session: {model: its reader}}. A reader keeps what it learned about the model at the first batch.
_readers: WeakKeyDictionary[Counting, WeakKeyDictionary[torch.nn.Module, Any]] = WeakKeyDictionary()


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
